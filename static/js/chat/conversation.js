// The list of messages: order, paging upwards, following the newest line, one running answer at a time.

import { element } from "../base.js";
import { Answer, isRunning, Question } from "./message.js";

const NEAR_BOTTOM = 64;
const CHUNK = 2; // messages that are rendered in one go
const FRAME = 16;

export class Conversation {
  /** `page` gives chatId, modelName, regenerate, stop, modelsChanged and stateChanged. */
  constructor(page, { messages, older, newest }) {
    this.page = page;
    this.newest = newest; // the last message that is known of, also on a branch that is not shown
    this.page.changed = (answer) => this.answerChanged(answer);
    this.list = document.getElementById("messages");
    this.scroller = document.getElementById("scroller");
    this.jump = document.getElementById("jump");
    this.views = new Map();
    this.following = true;
    this.waiting = messages; // those that are not rendered yet, from the first one on
    this.olderExist = older;
    this.fillWindow();
    this.watchScrolling();
    this.fillLater();
  }

  get last() {
    const id = this.list.lastElementChild?.id.slice(2);
    return id && this.views.get(id);
  }

  get running() {
    return [...this.views.values()].filter((view) => view.running);
  }

  // --- filling: what is seen first, the rest when there is time -----------------------------------------------------

  /** Render the newest messages, as many as the window shows, and whatever is still being written. */
  fillWindow() {
    do this.list.prepend(...this.render(this.waiting.splice(-CHUNK)));
    while (this.waiting.length && (this.list.offsetHeight < this.scroller.clientHeight || this.waiting.some(isRunning)));
  }

  /** Render the others from the newest one up, a few at a time, so that typing never waits for them. */
  fillLater() {
    if (this.waiting.length) setTimeout(() => this.fillMore(), FRAME);
    else if (this.olderExist) this.watchTop();
  }

  fillMore() {
    if (!this.waiting.length) return; // `fillNow` came in between
    this.insertAbove(this.waiting.splice(-CHUNK));
    this.fillLater();
  }

  /** Render all that waits; for whoever needs the messages as a whole. */
  fillNow() {
    if (!this.waiting.length) return;
    this.insertAbove(this.waiting.splice(0));
    this.fillLater();
  }

  render(messages) {
    return messages.map((data) => this.view(data).element);
  }

  insertAbove(messages) {
    this.keepPlace(() => this.list.prepend(...this.render(messages)));
  }

  /** Change something above what is being read without moving that. */
  keepPlace(change) {
    const height = this.scroller.scrollHeight;
    change();
    this.scroller.scrollTop += this.scroller.scrollHeight - height;
  }

  // --- messages that come and go -------------------------------------------------------------------------------------

  view(data) {
    const view = data.role === "user" ? new Question(data, this.page) : new Answer(data, this.page);
    this.views.set(data.id, view);
    return view;
  }

  append(data) {
    const view = this.view(data);
    this.list.append(view.element);
    return view;
  }

  /** Take a message from the server: confirm one that is shown, or put a new one after its parent, where it starts a newer branch. */
  receive(data) {
    this.newest = data.id;
    if (!this.views.has(data.id) && !this.views.has(data.parent_id)) this.fillNow();
    const known = this.views.get(data.id);
    if (known) {
      if (known.role === "user") known.setState("");
      return known;
    }
    const parent = this.views.get(data.parent_id);
    if (data.parent_id && !parent) return; // it goes on from a version that is not shown
    const replaced = parent ? parent.element.nextElementSibling : this.list.firstElementChild;
    const versions = this.cutFrom(replaced);
    if (versions.length) data.versions = [...versions, data.id];
    return this.append(data);
  }

  /** Remove a message and all after it; returns the ids of its versions. */
  cutFrom(node) {
    const first = node && this.views.get(node.id.slice(2));
    const versions = first ? (first.versions.length ? first.versions : [first.id]) : [];
    while (node) {
      const next = node.nextElementSibling;
      this.views.delete(node.id.slice(2));
      node.remove();
      node = next;
    }
    return versions;
  }

  remove(id) {
    this.views.get(id)?.element.remove();
    this.views.delete(id);
  }

  apply(frame) {
    for (const view of this.views.values()) {
      if (view.generationId === frame.generation_id) view.apply(frame.seq, frame.events);
    }
  }

  answerChanged(answer) {
    if (this.views?.has(answer.id)) this.page.stateChanged(answer);
  }

  // --- following the newest line ---------------------------------------------------------------------------------

  watchScrolling() {
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    new ResizeObserver(() => this.follow()).observe(this.list);
    new ResizeObserver(() => this.follow()).observe(this.scroller);
    this.jump.addEventListener("click", () => this.toBottom());
    this.toBottom();
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR_BOTTOM;
    this.jump.hidden = this.following;
  }

  follow() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.scrolled();
  }

  toBottom() {
    this.following = true;
    this.jump.hidden = true;
    this.follow();
  }

  // --- older messages ----------------------------------------------------------------------------------------------

  watchTop() {
    this.top = element("div", { class: "older column" }, element("span", { class: "skeleton" }), element("span", { class: "skeleton" }));
    this.keepPlace(() => this.list.before(this.top));
    this.observer = new IntersectionObserver((entries) => entries[0].isIntersecting && this.loadOlder(), { root: this.scroller, rootMargin: "600px 0px 0px" });
    this.observer.observe(this.top);
  }

  async loadOlder() {
    if (this.loading || !this.list.firstElementChild) return;
    this.loading = true;
    try {
      const before = this.list.firstElementChild.id.slice(2);
      const answer = await fetch(`/chat/${this.page.chatId}/messages?before=${before}`, { headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error(answer.statusText);
      this.prepend(await answer.json());
    } catch {
      this.top.replaceChildren(element("p", { class: "small muted" }, "Older messages could not be loaded. Scroll to try again."));
    } finally {
      this.loading = false;
    }
  }

  prepend({ messages, older }) {
    this.observer.unobserve(this.top);
    this.keepPlace(() => {
      this.list.prepend(...this.render(messages));
      if (!older) this.top.remove();
    });
    if (older) this.observer.observe(this.top);
  }
}
