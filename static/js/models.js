// My Models: keeps the list current, opens the load options, and drives the import panel.

import { toast } from "./base.js";
import { startImportPanel } from "./import.js";
import { keepListCurrent } from "./live-list.js";

const keepCurrent = keepListCurrent({
  listId: "model-list",
  offlineId: "model-offline",
  query: () => new URLSearchParams(new FormData(document.getElementById("model-filter"))),
});

function clearSearch() {
  const search = document.querySelector("#model-filter input[type=search]");
  search.value = "";
  search.dispatchEvent(new Event("input", { bubbles: true }));
  search.focus();
}

document.addEventListener("clear-alerts", () => document.getElementById("model-alerts").replaceChildren());
document.addEventListener("close-dialog", () => document.getElementById("load-dialog").close());
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id === "load-options") {
    const dialog = document.getElementById("load-dialog");
    if (!dialog.open) dialog.showModal();
  } else if (event.detail.target.id === "model-alerts") {
    document.getElementById("load-dialog").close();
    document.getElementById("model-alerts").scrollIntoView({ block: "nearest" });
  } else keepCurrent();
});
document.addEventListener("click", (event) => event.target.closest("[data-clear-search]") && clearSearch());

const panel = document.getElementById("import-panel");
if (panel) {
  startImportPanel(panel, (model) => {
    toast(`${model.display_name} is imported.`, "good");
    keepCurrent();
  });
}
