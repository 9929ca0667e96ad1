// Workers: keeps the cards current, and shows a new join token.

import { localTimes } from "./base.js";
import { keepListCurrent } from "./live-list.js";

const keepCurrent = keepListCurrent({ listId: "worker-list", offlineId: "workers-offline" });
const list = document.getElementById("worker-list");

new MutationObserver(() => localTimes(document.getElementById("worker-list"))).observe(list.parentElement, { childList: true });

document.addEventListener("clear-alerts", () => document.getElementById("model-alerts").replaceChildren());
document.addEventListener("token-created", () => {
  document.getElementById("join-token-dialog").close();
  document.getElementById("new-secret").focus();
});
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id === "model-alerts") document.getElementById("model-alerts").scrollIntoView({ block: "nearest" });
  else if (event.detail.target.id === "worker-list") keepCurrent();
});
