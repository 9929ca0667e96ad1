// Behaviour that every page shares: theme, toasts, confirmation, copying, times in the reader's zone.

const root = document.documentElement;

/** Return an icon of the sprite as an SVG element. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `${root.dataset.icons}#${name}`);
  svg.append(use);
  return svg;
}

/** Build an element: `element("p", {class: "muted", hidden: true}, "text", child)`. Text is always text, never HTML. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

/** Show a short message that goes away by itself; kind is "info", "good" or "bad". */
export function toast(text, kind = "info") {
  const close = element("button", { class: "icon-button small", type: "button", "aria-label": "Dismiss" }, icon("x"));
  const symbol = { good: "circle-check", bad: "circle-alert" }[kind] ?? "info";
  const box = element("div", { class: `toast ${kind}` }, icon(symbol), element("span", { class: "grow" }, text), close);
  close.addEventListener("click", () => box.remove());
  document.getElementById("toasts").append(box);
  setTimeout(() => box.remove(), kind === "bad" ? 10_000 : 4_000);
}

/** Ask before something that cannot be undone; resolves to true or false. */
export function confirmDialog({ title, text = "", action = "Continue", danger = true }) {
  const dialog = element("dialog", { "aria-labelledby": "confirm-title" });
  const form = element("form", { method: "dialog" });
  form.append(
    element("h2", { id: "confirm-title" }, title),
    element("p", {}, text),
    element(
      "div",
      { class: "actions" },
      element("button", { class: "button", value: "", autofocus: true }, "Cancel"),
      element("button", { class: `button ${danger ? "danger" : "primary"}`, value: "yes" }, action),
    ),
  );
  dialog.append(form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
  });
}

/** Copy text and say so; works on plain http too, where the clipboard API does not exist. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { class: "visually-hidden", readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) return toast("The browser did not allow copying. Select the text and press Ctrl+C.", "bad");
  }
  toast("Copied", "good");
}

/** Return the CSRF token for requests made by scripts. */
export function csrfToken() {
  return document.body.dataset.csrf;
}

function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  document.cookie = `theme=${theme}; path=/; max-age=31536000; samesite=lax`;
  showTheme();
}

function showTheme() {
  const current = root.dataset.theme ?? "auto";
  for (const item of document.querySelectorAll("[data-theme-choice]")) {
    item.setAttribute("aria-checked", String(item.dataset.themeChoice === current));
  }
}

/** Write server times (`<time datetime>`) in the reader's zone and language. */
export function localTimes(scope) {
  for (const node of scope.querySelectorAll("time[datetime]:not([data-local])")) {
    const moment = new Date(node.dateTime);
    node.dataset.local = "";
    node.title = moment.toLocaleString();
    if (node.dataset.format !== "title") {
      node.textContent = moment.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    }
  }
}

document.addEventListener("click", (event) => {
  const theme = event.target.closest("[data-theme-choice]");
  if (theme) setTheme(theme.dataset.themeChoice);

  const copy = event.target.closest("[data-copy]");
  if (copy) copyText(copy.dataset.copy || document.getElementById(copy.dataset.copyFrom).textContent);

  const opener = event.target.closest("[data-open-dialog]");
  if (opener) document.getElementById(opener.dataset.openDialog).showModal();

  const closer = event.target.closest("[data-close-dialog]");
  if (closer) closer.closest("dialog").close();

  const reveal = event.target.closest("[data-reveal]");
  if (reveal) {
    const input = reveal.parentElement.querySelector("input");
    const hidden = input.type === "password";
    input.type = hidden ? "text" : "password";
    reveal.setAttribute("aria-pressed", String(hidden));
    reveal.replaceChildren(icon(hidden ? "eye-off" : "eye"));
  }
});

// hx-confirm opens our dialog instead of the browser's; data-confirm-title and data-confirm-action word it.
document.addEventListener("htmx:confirm", async (event) => {
  if (!event.detail.question) return;
  event.preventDefault();
  const { confirmTitle = "Are you sure?", confirmAction = "Continue" } = event.detail.elt.dataset;
  const agreed = await confirmDialog({ title: confirmTitle, text: event.detail.question, action: confirmAction });
  if (agreed) event.detail.issueRequest(true);
});

// The server sends HX-Trigger: {"toast": {"text": "...", "kind": "good"}}.
document.addEventListener("toast", (event) => toast(event.detail.text, event.detail.kind));
document.addEventListener("htmx:sendError", () => toast("The server cannot be reached. Nothing was changed.", "bad"));
document.addEventListener("htmx:afterSwap", (event) => localTimes(event.target));
// Errors come as a part of the page (a field error, an alert), so they are swapped like any answer, unless the server said otherwise.
document.addEventListener("htmx:beforeSwap", (event) => {
  const status = event.detail.xhr.status;
  if (status >= 400 && event.detail.xhr.getResponseHeader("HX-Reswap") !== "none") event.detail.shouldSwap = true;
});

// The badge of Activity: how many downloads run, or, in red, how many need this person.
const badge = document.getElementById("activity-badge");
const BADGE_MS = 5000;
let badgeTimer;

async function showBadge() {
  clearTimeout(badgeTimer);
  try {
    const response = document.hidden ? null : await fetch(badge.dataset.url, { headers: { Accept: "application/json" } });
    if (response?.ok && !response.redirected) {
      const { running, attention } = await response.json();
      badge.hidden = !(attention || running);
      badge.classList.toggle("bad", attention > 0);
      badge.textContent = attention || running;
      badge.setAttribute("aria-label", attention ? `${attention} need attention` : `${running} in progress`);
    }
  } catch {
    // The server is away; the page's own parts say so.
  }
  clearTimeout(badgeTimer);
  badgeTimer = setTimeout(showBadge, BADGE_MS);
}

if (badge) {
  addEventListener("load", showBadge, { once: true }); // not before the page can be used
  document.addEventListener("activity-changed", showBadge);
}

showTheme();
localTimes(document);
