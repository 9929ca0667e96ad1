// Activity: keeps the list of downloads current, and asks for a reason when a request is declined.

import { localTimes } from "./base.js";
import { keepListCurrent } from "./live-list.js";

const list = () => document.getElementById("activity-list");
const dialog = document.getElementById("decline-dialog");
const form = document.getElementById("decline-form");

const keepCurrent = keepListCurrent({
  listId: "activity-list",
  offlineId: "activity-offline",
  query: () => new URLSearchParams({ limit: list().dataset.limit }),
});

new MutationObserver(() => localTimes(list())).observe(list().parentElement, { childList: true });

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-decline]");
  if (!button) return;
  form.setAttribute("hx-post", button.dataset.decline);
  form.reset();
  window.htmx.process(form);
  dialog.showModal();
});
document.addEventListener("clear-alerts", () => document.getElementById("model-alerts").replaceChildren());
document.addEventListener("htmx:afterSwap", (event) => {
  dialog.close();
  if (event.detail.target.id !== "model-alerts") keepCurrent();
});
