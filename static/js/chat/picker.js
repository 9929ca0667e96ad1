// The model bar and its picker: what is loaded, what can be loaded, which one answers next.

import { element, icon, toast } from "../base.js";
import { post } from "./sidebar.js";

const STATES = { ready: "Ready", loading: "Loading", unloading: "Unloading", "": "Not loaded" };

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = bytes < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(bytes) / 3));
  return `${Number((bytes / 1000 ** step).toPrecision(3))} ${units[step]}`;
}

const stateText = (model) => (model.state === "loading" ? `Loading ${Math.round(model.progress * 100)} %` : STATES[model.state]);

export class Picker {
  constructor({ models, model, may_load: mayLoad }, chosen) {
    this.models = models;
    this.key = model;
    this.mayLoad = mayLoad;
    this.chosen = chosen;
    this.button = document.getElementById("model-button");
    this.menu = document.getElementById("picker");
    this.search = document.getElementById("picker-search");
    this.list = document.getElementById("picker-list");
    this.menu.addEventListener("toggle", (event) => this.toggled(event.newState === "open"));
    this.search.addEventListener("input", () => this.renderList());
    this.menu.addEventListener("keydown", (event) => this.keydown(event));
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    this.render();
    this.plan();
    if (this.menu.matches(":popover-open")) this.toggled(true); // the browser opens it also before this script has run
  }

  get model() {
    return this.models.find((model) => model.key === this.key);
  }

  name(key) {
    return this.models.find((model) => model.key === key)?.name ?? key;
  }

  open() {
    this.menu.showPopover();
    this.search.focus(); // at once: the toggle event comes later, and what is typed by then belongs here
  }

  toggled(open) {
    this.isOpen = open;
    if (!open) return this.plan();
    const place = this.button.getBoundingClientRect();
    const left = Math.max(8, Math.min(place.left + place.width / 2 - this.menu.offsetWidth / 2, innerWidth - this.menu.offsetWidth - 8));
    Object.assign(this.menu.style, { top: `${place.bottom + 6}px`, left: `${left}px` });
    this.search.value = "";
    this.renderList();
    if (!matchMedia("(pointer: coarse)").matches) this.search.focus();
    this.refresh();
  }

  keydown(event) {
    const rows = [...this.list.querySelectorAll(".picker-row")];
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move && rows.length) {
      event.preventDefault();
      const next = rows.indexOf(document.activeElement) + move;
      if (next < 0) this.search.focus();
      else rows[Math.min(next, rows.length - 1)].focus();
    } else if (event.key === "Enter" && event.target === this.search && rows.length) {
      event.preventDefault();
      rows[0].click();
    }
  }

  /** Ask again soon while something changes, now and then otherwise. */
  plan() {
    clearTimeout(this.timer);
    const busy = this.isOpen || this.models.some((model) => model.state === "loading" || model.state === "unloading");
    this.timer = setTimeout(() => this.refresh(), busy ? 1_000 : 15_000);
  }

  async refresh() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    const response = await fetch("/chat/models", { headers: { Accept: "application/json" } }).catch(() => null);
    if (response?.ok && !response.redirected) this.update((await response.json()).models);
    this.plan();
  }

  update(models) {
    if (JSON.stringify(models) === JSON.stringify(this.models)) return;
    this.models = models;
    if (!this.model && models.length) this.key = models[0].key;
    this.render();
    this.chosen(this.model);
  }

  render() {
    this.renderButton();
    if (this.isOpen) this.renderList();
  }

  renderButton() {
    const model = this.model;
    if (!model) return this.button.replaceChildren(element("span", { class: "truncate" }, "No model installed"), icon("chevron-down"));
    this.button.replaceChildren(
      element("span", { class: `dot ${model.state}` }),
      element("span", { class: "truncate", dir: "auto" }, model.name),
      element("span", { class: "state tiny muted nowrap" }, stateText(model)),
      icon("chevron-down"),
    );
  }

  renderList() {
    const focused = document.activeElement?.dataset?.key;
    const wanted = this.search.value.trim().toLowerCase();
    const found = this.models.filter((model) => `${model.name} ${model.key} ${model.quantization}`.toLowerCase().includes(wanted));
    const groups = [
      ["Loaded", found.filter((model) => model.state)],
      ["Available", found.filter((model) => !model.state)],
    ].filter(([, models]) => models.length);
    this.list.replaceChildren(
      ...groups.map(([label, models]) =>
        element("section", { class: "picker-group" }, element("h2", {}, label), ...models.map((model) => this.row(model))),
      ),
    );
    if (!found.length) this.list.append(element("p", { class: "muted small picker-none" }, wanted ? "No model of this name." : "No model is installed yet."));
    if (focused) this.list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  row(model) {
    const facts = [model.params, model.quantization, size(model.size_bytes), `${model.context.toLocaleString()} context`].filter(Boolean);
    const choose = element(
      "button",
      { class: "picker-row", type: "button", "data-key": model.key, "aria-pressed": String(model.key === this.key) },
      element("span", { class: "picker-name", dir: "auto" }, model.name),
      element("span", { class: "picker-facts tiny muted" }, ...facts.map((fact) => element("span", {}, fact))),
      model.error && !model.state && element("span", { class: "picker-error tiny" }, `Could not be loaded: ${model.error}`),
    );
    choose.addEventListener("click", () => this.choose(model));
    const side = element("span", { class: "picker-side tiny nowrap" }, model.state ? stateText(model) : "");
    if (model.key === this.key) side.prepend(icon("check"));
    const row = element("div", { class: "picker-line" }, choose, side);
    if (model.state === "ready" && this.mayLoad) {
      const eject = element("button", { class: "button small quiet", type: "button", "aria-label": `Eject ${model.name}` }, icon("power"), "Eject");
      eject.addEventListener("click", () => this.act("/chat/models/eject", model));
      row.append(eject);
    }
    return row;
  }

  choose(model) {
    this.key = model.key;
    this.menu.hidePopover();
    this.render();
    this.chosen(model);
    if (!model.state && this.mayLoad) this.act("/chat/models/load", model);
  }

  async act(url, model) {
    try {
      this.update((await post(url, { model: model.key })).models);
    } catch (failure) {
      toast(failure.message, "bad");
    }
    this.plan();
  }
}
