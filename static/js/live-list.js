// Keeps a list that the server renders current: fetches it again when it changed, and says when the server is away.

const BUSY_MS = 1000;
const IDLE_MS = 5000;

/**
 * Keep the element `listId` current. It carries `data-url`, `data-seen` (a fingerprint) and, while something moves, `data-busy`.
 * `query()` returns what else the address needs. Returns a function that looks at once. What somebody has open stays as it is,
 * or, with `data-live` and an id, stays open and current.
 */
export function keepListCurrent({ listId, offlineId, query = () => new URLSearchParams() }) {
  const list = () => document.getElementById(listId);
  const offline = document.getElementById(offlineId);
  let timer;

  /** Put a fresh list in the page's place, keeping the focus where it was. */
  function replaceList(html) {
    const focused = document.activeElement?.id;
    const live = [...list().querySelectorAll("details[open][data-live]")].map((details) => details.id);
    const template = document.createElement("template");
    template.innerHTML = html; // rendered and escaped by our own server
    list().replaceWith(template.content);
    window.htmx.process(list());
    for (const id of live) document.getElementById(id)?.setAttribute("open", "");
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  /** Whether somebody has something open, or waits for what a button of the list brings: without the button it could not be shown. */
  function isInUse() {
    return list().querySelector("details[open]:not([data-live]), .htmx-request") || document.querySelector("dialog[open]");
  }

  async function refresh() {
    const shown = list();
    const parameters = query();
    parameters.set("seen", shown.dataset.seen);
    try {
      const response = await fetch(`${shown.dataset.url}?${parameters}`, { headers: { "HX-Request": "true" } });
      if (response.headers.get("HX-Redirect")) return location.assign(response.headers.get("HX-Redirect"));
      offline.hidden = response.status < 500;
      const html = response.status === 200 ? await response.text() : "";
      if (html && list() === shown && !isInUse()) replaceList(html);
    } catch {
      offline.hidden = false;
    }
  }

  async function keepCurrent() {
    clearTimeout(timer);
    if (!document.hidden) await refresh();
    clearTimeout(timer); // another call may have come while this one waited
    timer = setTimeout(keepCurrent, "busy" in list().dataset ? BUSY_MS : IDLE_MS);
  }

  document.addEventListener("visibilitychange", () => document.hidden || keepCurrent());
  timer = setTimeout(keepCurrent, "busy" in list().dataset ? BUSY_MS : IDLE_MS);
  return keepCurrent;
}
