// The side panel: system prompt, context policy and sampling of this chat, saved as they are typed.

import { post } from "./sidebar.js";

const OWN = new Set(["system_prompt", "context_overflow"]); // beside the sampling parameters
const NUMBERS = new Set(["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed"]);

export class Panel {
  constructor({ settings, defaults }, chatId) {
    this.form = document.getElementById("settings");
    this.state = document.getElementById("settings-state");
    this.chatId = chatId;
    this.fill(settings, defaults);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.changed());
  }

  fill({ sampling, ...own }, defaults) {
    for (const field of this.form.elements) {
      if (!field.name) continue;
      if (defaults[field.name] != null && NUMBERS.has(field.name)) field.placeholder = String(defaults[field.name]);
      if (OWN.has(field.name)) field.value = own[field.name];
      else if (field.name === "stop") field.value = (sampling.stop ?? []).join("\n");
      else field.value = sampling[field.name] ?? "";
    }
  }

  /** The settings as the server takes them; null while a field cannot be read as a number. */
  get value() {
    const sampling = {};
    for (const field of this.form.elements) {
      if (!field.name || OWN.has(field.name)) continue;
      if (field.name === "stop") {
        const lines = field.value.split("\n").filter(Boolean);
        if (lines.length) sampling.stop = lines;
      } else if (!field.validity.valid && (field.validity.badInput || field.validity.stepMismatch || field.validity.rangeUnderflow || field.validity.rangeOverflow)) {
        this.mark(field.name, field.validationMessage);
        return null;
      } else if (field.value !== "") sampling[field.name] = Number(field.value);
    }
    const own = Object.fromEntries([...OWN].map((name) => [name, this.form.elements[name].value]));
    return { ...own, sampling };
  }

  changed() {
    this.mark(null, "");
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), 400);
  }

  async save() {
    const { value } = this;
    if (!value) return;
    if (!this.chatId) return this.say("Counts from the first message of this chat.");
    try {
      await post(`/chat/${this.chatId}/settings`, new Blob([JSON.stringify(value)], { type: "application/json" }));
      this.say("Saved. Counts from the next answer.");
    } catch (failure) {
      this.mark(failure.param, failure.message);
    }
  }

  mark(name, message) {
    for (const field of this.form.elements) {
      if (field.name) field.closest(".field").classList.toggle("invalid", field.name === name && Boolean(message));
    }
    this.say(message);
  }

  say(text) {
    this.state.textContent = text;
  }
}
