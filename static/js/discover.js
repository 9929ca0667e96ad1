// Discover: keeps the address in step with what is looked at, and renders READMEs.

import { render } from "./chat/markdown.js";

const filter = document.getElementById("discover-filter");
const details = document.getElementById("discover-model");
const results = document.getElementById("discover-results");
const panes = details.parentElement;
const dialog = document.getElementById("catalog-dialog");
const beside = matchMedia("(min-width: 1024px)"); // wide enough for results and a model side by side

const shown = () => new URLSearchParams(location.search).get("model") ?? "";

/** Return the address of this page for the present search and a model. */
function address(model) {
  const query = new URLSearchParams([...new FormData(filter)].filter(([, value]) => value));
  if (model) query.set("model", model);
  return `${location.pathname}?${query}`;
}

/** Show a model; on a phone in place of the results. */
function open(model) {
  panes.toggleAttribute("data-open", Boolean(model));
  mark(model);
  if (model) {
    window.htmx.ajax("GET", `${details.dataset.url}?model=${encodeURIComponent(model)}`, { target: details, swap: "innerHTML" });
    details.scrollTop = 0;
  }
}

function mark(model) {
  for (const link of results.querySelectorAll("[data-model]")) {
    if (link.dataset.model === model) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

/** The level of the heading above a README. */
const README_LEVEL = 3;

/** Put a README's Markdown into its place. Markup of other kinds is left out: it is layout, not text. */
function renderReadme(place) {
  const text = place.textContent.replace(/<!--[\s\S]*?-->/g, "").replace(/<\/?[a-zA-Z][^<>\n]*>/g, "");
  place.replaceChildren(render(text));
  for (const heading of place.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    heading.setAttribute("aria-level", Math.min(6, Number(heading.tagName[1]) + README_LEVEL)); // below the page's own headings
  }
  place.removeAttribute("data-markdown");
  place.hidden = false;
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-model]");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
    event.preventDefault();
    history.pushState(null, "", address(link.dataset.model));
    open(link.dataset.model);
    details.focus({ preventScroll: true });
    window.scrollTo({ top: 0 });
  }
  if (event.target.closest("[data-back]")) {
    history.pushState(null, "", address(""));
    open("");
    results.querySelector("a[data-model]")?.focus();
  }
});
window.addEventListener("popstate", () => open(shown()));
document.addEventListener("clear-alerts", () => document.getElementById("model-alerts").replaceChildren());
document.addEventListener("close-dialog", () => dialog.close());
document.addEventListener("htmx:afterSwap", (event) => {
  const { target } = event.detail;
  for (const place of target.querySelectorAll("[data-markdown]")) renderReadme(place);
  if (target === results) {
    history.replaceState(null, "", address(shown()));
    const exact = results.querySelector("[data-choose]");
    if (exact && shown() !== exact.dataset.model && beside.matches) {
      history.replaceState(null, "", address(exact.dataset.model));
      open(exact.dataset.model);
    }
    mark(shown());
  }
  if (target.id === "catalog-editor" && !dialog.open) dialog.showModal();
  if (target === details) document.getElementById("model-alerts").replaceChildren();
});
