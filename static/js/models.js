// My Models: keeps the list current, opens the load options, and drives the import panel.

import { toast } from "./base.js";
import { startImportPanel } from "./import.js";

const BUSY_MS = 1000;
const IDLE_MS = 5000;

const list = () => document.getElementById("model-list");
let timer;

/** Put a fresh list in the page's place, keeping the focus where it was. */
function replaceList(html) {
  const focused = document.activeElement?.id;
  const template = document.createElement("template");
  template.innerHTML = html; // rendered and escaped by our own server
  list().replaceWith(template.content);
  window.htmx.process(list());
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

/** Fetch the list if it changed. Says so when the server is away, once, without losing what is shown. */
async function refresh() {
  const shown = list();
  const query = new URLSearchParams(new FormData(document.getElementById("model-filter")));
  query.set("seen", shown.dataset.seen);
  try {
    const response = await fetch(`${shown.dataset.url}?${query}`, { headers: { "HX-Request": "true" } });
    if (response.headers.get("HX-Redirect")) return location.assign(response.headers.get("HX-Redirect"));
    document.getElementById("model-offline").hidden = response.status < 500;
    const open = list().querySelector("details[open]") || document.querySelector("dialog[open]");
    if (response.status === 200 && list() === shown && !open) replaceList(await response.text());
  } catch {
    document.getElementById("model-offline").hidden = false;
  }
}

async function keepCurrent() {
  clearTimeout(timer);
  if (!document.hidden) await refresh();
  clearTimeout(timer); // another call may have come while this one waited
  timer = setTimeout(keepCurrent, "busy" in list().dataset ? BUSY_MS : IDLE_MS);
}

function clearSearch() {
  const search = document.querySelector("#model-filter input[type=search]");
  search.value = "";
  search.dispatchEvent(new Event("input", { bubbles: true }));
  search.focus();
}

document.addEventListener("visibilitychange", () => document.hidden || keepCurrent());
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
timer = setTimeout(keepCurrent, "busy" in list().dataset ? BUSY_MS : IDLE_MS);
