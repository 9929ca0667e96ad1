// One message on the page: builds it from its row, applies the events of its generation, renders at most once per frame.

import { copyText, element, icon } from "../base.js";
import { GrowingMarkdown } from "./markdown.js";

const TERMINAL = new Set(["completed", "cancelled", "failed"]);
const STOP_REASONS = {
  eosFound: "finished",
  stopStringFound: "stop string",
  maxPredictedTokensReached: "token limit",
  contextLengthReached: "context full",
  userStopped: "stopped",
  failed: "failed",
};

/** Return whether a message, as the server sends it, is an answer that is still being written. */
export const isRunning = ({ generation }) => Boolean(generation) && !TERMINAL.has(generation.status);

const percent = (fraction) => `${Math.round(fraction * 100)} %`;
const seconds = (value) => (value < 10 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : `${Math.round(value)} s`);

function button(symbol, label, action) {
  const node = element("button", { class: "icon-button small", type: "button", "aria-label": label, title: label }, icon(symbol));
  node.addEventListener("click", action);
  return node;
}

/** What every message has: id, place in the tree, raw text (`source` on the element), a copy button. */
class MessageView {
  constructor(data, role) {
    this.id = data.id;
    this.parentId = data.parent_id;
    this.role = role;
    this.text = data.text;
    this.versions = data.versions ?? [];
    this.element = element("article", { class: `message ${role}`, id: `m-${data.id}`, "data-role": role });
    this.element.source = this.text;
  }

  /** Links to the other versions of this message, if there are any. */
  versionLinks(chatId) {
    const place = this.versions.indexOf(this.id);
    if (this.versions.length < 2 || place < 0) return null;
    const link = (index, symbol, label) => {
      const target = this.versions[index];
      if (!target) return element("span", { class: "icon-button small", "aria-disabled": "true" }, icon(symbol));
      return element("a", { class: "icon-button small", href: `/chat/${chatId}?through=${target}`, "aria-label": label, title: label }, icon(symbol));
    };
    return element(
      "span",
      { class: "versions number" },
      link(place - 1, "chevron-left", "Version before"),
      `${place + 1} / ${this.versions.length}`,
      link(place + 1, "chevron-right", "Next version"),
    );
  }
}

export class Question extends MessageView {
  constructor(data, page) {
    super(data, "user");
    this.state = element("span", { class: "tiny muted", role: "status" });
    const actions = element("div", { class: "actions" }, this.state, this.versionLinks(page.chatId), button("copy", "Copy message", () => copyText(this.text)));
    this.element.append(
      element("h2", { class: "visually-hidden" }, "You"),
      element("div", { class: "bubble", dir: "auto" }, this.text),
      element("footer", { class: "message-foot" }, actions),
    );
  }

  /** Say what is going on with a message that the server has not confirmed yet; empty when it has. */
  setState(text) {
    this.state.textContent = text;
    this.element.classList.toggle("pending", Boolean(text));
  }
}

export class Answer extends MessageView {
  constructor(data, page) {
    super(data, "assistant");
    this.page = page;
    this.model = data.model;
    this.adopt(data.generation);
    this.build();
    this.render();
  }

  adopt(generation) {
    this.generationId = generation?.id ?? null;
    this.seq = generation?.seq ?? 0;
    this.status = generation?.status ?? "completed";
    this.text = generation?.content ?? this.text;
    this.reasoning = generation?.reasoning ?? "";
    this.stats = generation?.stats ?? {};
    this.error = generation?.error ?? null;
    this.phase = this.running && !this.text && !this.reasoning ? { text: this.status === "queued" ? "Waiting for a free place…" : "Starting…" } : null;
  }

  get running() {
    return !TERMINAL.has(this.status);
  }

  build() {
    this.body = element("div", { class: "md", dir: "auto" });
    this.markdown = new GrowingMarkdown(this.body);
    this.thoughtLabel = element("span");
    this.thought = element("div", { class: "md thought", dir: "auto" });
    this.thoughtMarkdown = new GrowingMarkdown(this.thought);
    this.shownReasoning = "";
    this.thoughts = element("details", { class: "reasoning" }, element("summary", {}, icon("brain"), this.thoughtLabel, icon("chevron-down")), this.thought);
    this.overflow = element("p", { class: "overflow tiny" });
    this.phaseText = element("span", { class: "grow" });
    this.phaseBar = element("progress", { max: "1", "aria-label": "Progress" });
    this.phaseBox = element("div", { class: "phase" }, element("span", { class: "spinner", "aria-hidden": "true" }), this.phaseText, this.phaseBar);
    this.failure = element("div", { class: "alert bad", role: "alert" });
    this.foot = element("footer", { class: "message-foot" });
    this.element.append(
      element("h2", { class: "message-head tiny", dir: "auto" }, this.page.modelName(this.model) || "Answer"),
      this.overflow,
      this.thoughts,
      this.phaseBox,
      this.body,
      this.failure,
      this.foot,
    );
    this.thoughts.hidden = this.failure.hidden = true;
    this.thoughts.addEventListener("toggle", () => this.renderThought());
  }

  /** Apply one entry of the stream. Entries that are known already are ignored, so no text can come twice. */
  apply(seq, events) {
    if (seq <= this.seq || !this.running) return;
    this.seq = seq;
    for (const event of events) this.applyEvent(event);
    if (this.running) this.schedule();
    else this.render();
  }

  applyEvent(event) {
    switch (event.type) {
      case "queue.update":
        this.phase = { text: queueText(event) };
        break;
      case "model_load.start":
        this.phase = { text: `Loading ${this.page.modelName(event.model_instance_id)}…`, value: 0 };
        this.page.modelsChanged();
        break;
      case "model_load.progress":
        this.phase = { text: `Loading ${this.page.modelName(event.model_instance_id)}… ${percent(event.progress)}`, value: event.progress };
        break;
      case "model_load.end":
        this.phase = { text: "Starting…" };
        this.page.modelsChanged();
        break;
      case "context.overflow":
        this.dropped = event.dropped_messages;
        this.droppedTokens = event.dropped_tokens;
        break;
      case "prompt_processing.start":
        this.phase = { text: "Reading the prompt…" };
        break;
      case "prompt_processing.progress":
        this.phase = { text: `Reading the prompt… ${percent(event.progress)}`, value: event.progress };
        break;
      case "reasoning.start":
        this.thinkingSince = performance.now();
        break;
      case "reasoning.delta":
        this.reasoning += event.content;
        this.phase = null;
        break;
      case "reasoning.end":
        if (this.thinkingSince) this.thoughtSeconds = (performance.now() - this.thinkingSince) / 1000;
        break;
      case "message.start":
        this.phase = null;
        break;
      case "message.delta":
        this.text += event.content;
        this.phase = null;
        break;
      case "generation.snapshot":
        this.replaceText(event.content, event.reasoning ?? "");
        break;
      case "error":
        this.error = event.error;
        break;
      case "chat.end":
        this.end(event);
        break;
    }
  }

  end(event) {
    const of = (type) => event.result.output.filter((item) => item.type === type).map((item) => item.content).join("");
    if (of("message") !== this.text || of("reasoning") !== this.reasoning) this.replaceText(of("message"), of("reasoning"));
    this.status = event.status ?? "completed";
    this.stats = event.result.stats;
    this.phase = null;
  }

  replaceText(text, reasoning) {
    if (!text.startsWith(this.text)) this.markdown.reset();
    this.text = text;
    this.reasoning = reasoning;
    if (text || reasoning) this.phase = null;
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.render();
    });
  }

  render() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = undefined;
    this.element.source = this.text;
    this.element.dataset.status = this.status;
    this.element.setAttribute("aria-busy", String(this.running));
    this.phaseBox.hidden = !this.phase;
    if (this.phase) {
      this.phaseText.textContent = this.phase.text;
      this.phaseBar.hidden = this.phase.value === undefined;
      this.phaseBar.value = this.phase.value ?? 0;
    }
    this.renderOverflow();
    this.renderThought();
    if (this.running) this.markdown.update(this.text);
    else this.markdown.finish(this.text);
    this.renderFailure();
    this.renderFoot();
    this.page.changed(this);
  }

  /** Say what the model did not get to see; known from the event, and later from the row's stats. */
  renderOverflow() {
    const dropped = this.stats.dropped_messages || this.dropped;
    const tokens = this.stats.dropped_tokens || this.droppedTokens;
    this.overflow.hidden = !dropped && !tokens;
    const parts = [];
    if (dropped) parts.push(`${dropped} earlier message${dropped === 1 ? "" : "s"}`);
    if (tokens) parts.push(`${tokens} earlier tokens of this conversation`);
    if (parts.length) this.overflow.textContent = `The model no longer sees ${parts.join(" and ")}: the context is full.`;
  }

  renderThought() {
    this.thoughts.hidden = !this.reasoning;
    const thinking = this.running && !this.text;
    const took = this.stats.reasoning_time_seconds || this.thoughtSeconds;
    const time = took ? ` for ${seconds(took)}` : "";
    this.thoughtLabel.textContent = thinking ? "Thinking…" : `Thought${time}`;
    if (this.thoughts.open && this.reasoning !== this.shownReasoning) {
      if (!this.reasoning.startsWith(this.shownReasoning)) this.thoughtMarkdown.reset();
      this.shownReasoning = this.reasoning;
      this.thoughtMarkdown.update(this.reasoning);
    }
  }

  renderFailure() {
    const failed = this.status === "failed";
    this.failure.hidden = !failed;
    if (!failed || this.failure.childElementCount) return;
    const kept = this.text ? " What was written so far is kept." : "";
    const retry = element("button", { class: "button small", type: "button" }, icon("rotate-ccw"), "Retry");
    retry.addEventListener("click", () => this.page.regenerate(this));
    this.failure.append(
      icon("circle-alert"),
      element("div", { class: "grow stack tight" }, element("p", {}, `${this.error?.message ?? "The answer could not be finished."}${kept}`), element("div", {}, retry)),
    );
  }

  renderFoot() {
    const key = `${this.status}|${Boolean(this.text)}`;
    if (key === this.footKey) return;
    this.footKey = key;
    if (this.running) {
      const stop = element("button", { class: "button small", type: "button" }, icon("square"), "Stop");
      stop.addEventListener("click", () => this.page.stop(this));
      this.foot.replaceChildren(stop);
      return;
    }
    const actions = element("div", { class: "actions" }, this.versionLinks(this.page.chatId));
    if (this.text) actions.append(button("copy", "Copy answer", () => copyText(this.text)));
    actions.append(button("rotate-ccw", "Regenerate", () => this.page.regenerate(this)));
    this.foot.replaceChildren(actions, element("span", { class: "stats tiny faint number" }, statsText(this.stats, this.status)));
  }
}

function queueText({ position, reason, eta_seconds: eta }) {
  const place = position > 0 ? `${position} ahead of you` : "You are next";
  const why = reason ? ` · ${reason.replace(/\.$/, "")}` : "";
  return `${place}${why}${eta == null ? "" : ` · about ${Math.max(1, Math.round(eta))} s`}`;
}

function statsText(stats, status) {
  const parts = [];
  if (stats.tokens_per_second) parts.push(`${stats.tokens_per_second.toFixed(1)} tokens/s`);
  if (stats.total_output_tokens) parts.push(`${stats.total_output_tokens} tokens`);
  if (stats.time_to_first_token_seconds) parts.push(`${seconds(stats.time_to_first_token_seconds)} to first token`);
  const reason = STOP_REASONS[stats.stop_reason] ?? stats.stop_reason;
  if (status === "cancelled") parts.push("stopped");
  else if (reason && status === "completed") parts.push(reason);
  return parts.join(" · ");
}
