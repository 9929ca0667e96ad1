// The chat page: ties the parts together and speaks the websocket's verbs.

import { toast } from "../base.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { loadLibraries } from "./markdown.js";
import { Panel } from "./panel.js";
import { Picker } from "./picker.js";
import { closeDrawers, Sidebar } from "./sidebar.js";
import { Transport } from "./transport.js";

const OFFLINE_AFTER = 1_500;
const SLOW_AFTER = 600;

const data = JSON.parse(document.getElementById("chat-data").textContent);

const page = {
  chatId: data.chat?.id ?? null,
  modelName: (key) => picker.name(key),
  modelsChanged: () => picker.refresh(),
  stateChanged: (answer) => stateChanged(answer),
  stop: (answer) => transport.send({ type: "generation.stop", generation_id: answer.generationId }) || offline(),
  regenerate,
};

/** Messages that the server has not confirmed: id -> frame. They are sent again after a reconnect; the server takes each once. */
const outbox = new Map();

const sidebar = new Sidebar();
const picker = new Picker(data, showWelcome);
const panel = new Panel(data, page.chatId);
const conversation = new Conversation(page, data);
const composer = new Composer({ chatId: page.chatId, send, stop: () => conversation.running.forEach(page.stop) });
const transport = new Transport("/ws/chat");

composer.setBusy(conversation.running.length > 0);

// --- sending -------------------------------------------------------------------------------------------------------

function uuid() {
  // crypto.randomUUID exists on https and localhost only; a team's server may be plain http.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

function send(content) {
  if (!data.may_generate) return refuse("Your account may look at models but not use them. Ask an admin.");
  if (!picker.key) return refuse("No model is installed yet. Import one in My Models.");
  if (outbox.size) return refuse("Your last message is still on its way.");
  const settings = page.chatId ? null : panel.value;
  if (!page.chatId && !settings) return refuse("One of the settings of this chat is not a number in range. Look at the panel.");
  const parent = conversation.last?.id ?? null;
  const message = { id: uuid(), parent_id: parent, role: "user", text: content };
  document.getElementById("empty")?.remove();
  const question = conversation.append(message);
  conversation.toBottom();
  const frame = { type: "message.send", ref: message.id, message_id: message.id, chat_id: page.chatId, parent_id: parent, model: picker.key, content, settings };
  outbox.set(message.id, frame);
  const sent = transport.send(frame);
  setTimeout(() => outbox.has(message.id) && question.setState(transport.isOpen ? "Sending…" : "Waits for the connection"), sent ? SLOW_AFTER : 0);
  return true;
}

function refuse(reason) {
  composer.showError(reason);
  return false;
}

function regenerate(answer) {
  if (conversation.running.length) return toast("An answer is still being written. Stop it first.");
  const sent = transport.send({ type: "message.regenerate", ref: answer.id, message_id: answer.id, answer_id: uuid(), model: picker.key });
  if (!sent) offline();
}

function offline() {
  toast("There is no connection right now. It comes back by itself.", "bad");
}

// --- receiving -----------------------------------------------------------------------------------------------------

const handlers = {
  "generation.events": (frame) => conversation.apply(frame),

  "message.added": ({ chat_id: chatId, title, message }) => {
    outbox.delete(message.id);
    if (!page.chatId) openChat(chatId, title);
    if (chatId !== page.chatId) return;
    conversation.receive(message);
    composer.setBusy(conversation.running.length > 0);
  },

  "chat.updated": ({ chat_id: chatId, title }) => {
    if (chatId === page.chatId && title) document.title = `${title} · lmweb`;
    sidebar.refresh();
  },

  "chat.deleted": ({ chat_id: chatId }) => {
    if (chatId === page.chatId) location.assign("/");
  },

  error: ({ ref, code, message, retryable }) => {
    const waiting = outbox.get(ref);
    if (waiting && retryable && code !== "rate_limit_exceeded") return setTimeout(() => transport.send(waiting), 1_000);
    if (!waiting) return toast(message, "bad");
    outbox.delete(ref);
    conversation.remove(ref);
    composer.restore(waiting.content);
    composer.showError(message);
  },

  pong: () => {},
};

function openChat(chatId, title) {
  sessionStorage.removeItem(composer.key);
  page.chatId = panel.chatId = chatId;
  sidebar.list.dataset.current = chatId;
  composer.openChat(chatId);
  composer.changed();
  history.replaceState(null, "", `/chat/${chatId}`);
  if (title) document.title = `${title} · lmweb`;
}

function stateChanged(answer) {
  const running = conversation.running.length > 0;
  if (composer.busy && !running) announce(answer);
  composer.setBusy(running);
}

function announce(answer) {
  const text = { completed: "The answer is complete.", cancelled: "The answer was stopped.", failed: "The answer failed." }[answer.status];
  document.getElementById("announce").textContent = text ?? "";
}

transport.addEventListener("frame", ({ detail }) => handlers[detail.type]?.(detail));

transport.addEventListener("open", () => {
  clearTimeout(transport.offlineTimer);
  document.getElementById("offline").hidden = true;
  if (page.chatId) transport.send({ type: "chat.open", chat_id: page.chatId, known: conversation.newest ? [conversation.newest] : [] });
  for (const answer of conversation.running) {
    transport.send({ type: "generation.watch", generation_id: answer.generationId, seq: answer.seq });
  }
  for (const frame of outbox.values()) transport.send(frame);
  if (transport.wasClosed) picker.refresh();
});

transport.addEventListener("closed", () => {
  transport.wasClosed = true;
  clearTimeout(transport.offlineTimer);
  transport.offlineTimer = setTimeout(() => (document.getElementById("offline").hidden = false), OFFLINE_AFTER);
});

// What was typed survives a reload in the middle of sending.
addEventListener("pagehide", () => {
  for (const frame of outbox.values()) composer.restore(frame.content);
});

// --- the rest of the page --------------------------------------------------------------------------------------------

function showWelcome(model) {
  const starter = document.getElementById("welcome-starter");
  if (starter) starter.hidden = !model?.is_starter;
}

// Slow to find out, and only wanted for the next page: the reader's time zone.
setTimeout(() => {
  document.cookie = `zone=${Intl.DateTimeFormat().resolvedOptions().timeZone}; path=/; max-age=31536000; samesite=lax`;
});

document.addEventListener("click", (event) => {
  const prompt = event.target.closest("[data-prompt]");
  if (prompt) send(prompt.dataset.prompt);
  if (event.target.closest("[data-reconnect]")) transport.retryNow();
});

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open") && !closeDrawers()) {
    conversation.running.forEach(page.stop);
  } else if ((command || event.altKey) && !event.shiftKey && key === "n") {
    event.preventDefault();
    location.assign("/");
  } else if (command && !event.shiftKey && key === "l") {
    event.preventDefault();
    picker.open();
  }
});

// Answers come over the line, so it opens when they can be shown; a message that is sent before waits in the outbox.
loadLibraries().finally(() => transport.start());
