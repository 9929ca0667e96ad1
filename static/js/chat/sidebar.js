// The list of chats: drawer and collapse, rename, delete, staying current.

import { confirmDialog, csrfToken, localTimes, toast } from "../base.js";

const phone = matchMedia("(max-width: 900px)");
const remember = (name, value) => (document.cookie = `${name}=${value}; path=/; max-age=31536000; samesite=lax`);

/** POST a form and return the JSON answer. Throws an Error whose message can be shown. */
export async function post(url, fields) {
  const body = fields instanceof Blob ? fields : new URLSearchParams(fields);
  const headers = { Accept: "application/json", "X-CSRFToken": csrfToken() };
  let response;
  try {
    response = await fetch(url, { method: "POST", body, headers });
  } catch {
    throw new Error("The server cannot be reached. Nothing was changed.");
  }
  if (response.redirected) location.reload(); // signed out
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(answer.error?.message ?? "That did not work."), { param: answer.error?.param });
  return answer;
}

/** Open or close one of the two side columns: a drawer on small screens, else a column whose state is remembered. */
function toggle(kind) {
  const { classList } = document.body;
  if (phone.matches) {
    const open = classList.toggle(`${kind}-drawer`);
    document.querySelector("[data-close-drawers]").hidden = !open;
    if (open) document.getElementById(kind).querySelector("a, button, input, textarea").focus();
  } else if (kind === "sidebar") {
    remember("sidebar", classList.toggle("sidebar-closed") ? "closed" : "open");
  } else {
    remember("panel", classList.toggle("panel-open") ? "open" : "closed");
  }
}

const parse = (html) => new DOMParser().parseFromString(html, "text/html").body.childNodes;

export function closeDrawers() {
  const { classList } = document.body;
  const open = classList.contains("sidebar-drawer") || classList.contains("panel-drawer");
  classList.remove("sidebar-drawer", "panel-drawer");
  document.querySelector("[data-close-drawers]").hidden = true;
  return open;
}

export class Sidebar {
  constructor() {
    this.list = document.getElementById("chats");
    this.menu = document.getElementById("chat-menu");
    this.more = new IntersectionObserver((entries) => entries[0].isIntersecting && this.fetchMore(entries[0].target), { root: this.list });
    this.watchEnd();
    this.restore();
    this.list.addEventListener("scroll", () => this.remember(), { passive: true });
    document.addEventListener("click", (event) => this.clicked(event));
    document.getElementById("rename-dialog").addEventListener("submit", (event) => this.rename(event));
  }

  get items() {
    return [...this.list.querySelectorAll("[data-chat]")];
  }

  /** Keep for the next page how far the list is scrolled and how much of it there is. */
  remember() {
    sessionStorage.setItem("chats-view", JSON.stringify({ top: this.list.scrollTop, shown: this.items.length }));
  }

  async restore() {
    const { top = 0, shown = 0 } = JSON.parse(sessionStorage.getItem("chats-view") ?? "{}");
    if (top && shown > this.items.length) await this.fetch(shown);
    this.list.scrollTop = top;
  }

  /** Fetch the next page of the list when its end comes into view. */
  watchEnd() {
    this.more.disconnect();
    const end = this.list.querySelector(".chat-more");
    if (end) this.more.observe(end);
  }

  async fetchMore(end) {
    this.more.unobserve(end); // once: a list that was fetched again has another end
    const response = await fetch(end.dataset.url).catch(() => null);
    if (!response?.ok || response.redirected || !end.isConnected) return;
    end.replaceWith(...parse(await response.text()));
    this.watchEnd();
  }

  clicked(event) {
    const target = (selector) => event.target.closest(selector);
    if (target("[data-toggle-sidebar]")) toggle("sidebar");
    if (target("[data-toggle-panel]")) toggle("panel");
    if (target("[data-close-drawers]")) closeDrawers();
    if (target("[data-chat-menu]")) this.openMenu(target("[data-chat-menu]"));
    if (target("[data-chat-rename]")) this.openRename();
    if (target("[data-chat-delete]")) this.delete();
  }

  openMenu(button) {
    this.chosen = button.closest("[data-chat]");
    this.menu.showPopover();
    const place = button.getBoundingClientRect();
    const top = Math.min(place.bottom + 4, innerHeight - this.menu.offsetHeight - 8);
    const left = Math.min(place.left, innerWidth - this.menu.offsetWidth - 8);
    Object.assign(this.menu.style, { top: `${top}px`, left: `${left}px` });
    this.menu.querySelector("button").focus();
    this.menu.addEventListener("toggle", (event) => event.newState === "closed" && button.focus(), { once: true });
  }

  get title() {
    return this.chosen.querySelector("a").textContent.trim();
  }

  openRename() {
    this.menu.hidePopover();
    const dialog = document.getElementById("rename-dialog");
    dialog.querySelector(".error").hidden = true;
    dialog.querySelector("input").value = this.title;
    dialog.showModal();
    dialog.querySelector("input").select();
  }

  async rename(event) {
    event.preventDefault();
    const dialog = event.currentTarget;
    const error = dialog.querySelector(".error");
    try {
      await post(`/chat/${this.chosen.dataset.chat}/rename`, { title: dialog.querySelector("input").value });
      dialog.close();
      this.refresh();
    } catch (failure) {
      error.textContent = failure.message;
      error.hidden = false;
    }
  }

  async delete() {
    this.menu.hidePopover();
    const { chat } = this.chosen.dataset;
    const sure = await confirmDialog({ title: "Delete this chat?", text: `“${this.title}” and everything in it will be gone for good.`, action: "Delete" });
    if (!sure) return;
    try {
      await post(`/chat/${chat}/delete`, {});
      if (chat === this.list.dataset.current) location.assign("/");
      else this.refresh();
    } catch (failure) {
      toast(failure.message, "bad");
    }
  }

  /** Fetch the list again, soon: several changes in a row cost one request. */
  refresh() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.fetch(), 100);
  }

  async fetch(shown = this.items.length) {
    const { url, current } = this.list.dataset;
    const response = await fetch(`${url}?current=${current}&shown=${shown}`).catch(() => null);
    if (!response?.ok || response.redirected) return;
    const nodes = parse(await response.text());
    const { scrollTop } = this.list;
    const place = (node) => node.getBoundingClientRect().top;
    const isAnchor = (item) => item.dataset.chat !== current && place(item) >= place(this.list);
    const anchor = scrollTop > 0 && this.items.find(isAnchor); // what is being read stays where it is
    const before = anchor && place(anchor);
    this.list.replaceChildren(...nodes);
    this.list.scrollTop = scrollTop;
    const after = anchor && this.items.find((item) => item.dataset.chat === anchor.dataset.chat);
    if (after) this.list.scrollTop += place(after) - before;
    this.watchEnd();
    localTimes(this.list);
  }
}
