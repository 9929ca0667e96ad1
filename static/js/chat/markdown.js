// Markdown to DOM: parse, sanitise what came out of the parser, then add our own controls to the clean tree.

import { copyText, element, icon } from "../base.js";

// Markup that models write on purpose inside Markdown. Everything else that looks like a tag is shown as the text it is.
const PLAIN_TAG = /^<\/?(?:br|sub|sup|kbd|b|i|em|strong|u|s|hr|details|summary)\s*\/?>$/i;
const ALLOWED_TAGS = [
  "a", "b", "blockquote", "br", "code", "del", "details", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "input", "kbd", "li",
  "ol", "p", "pre", "s", "strong", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
];
const CONFIG = {
  ALLOWED_TAGS,
  ALLOWED_ATTR: ["href", "title", "class", "start", "align", "type", "checked", "disabled"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "checked", "class", "disabled", "start", "type"],
  RETURN_DOM_FRAGMENT: true,
};

const escapeHtml = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const OPTIONS = {
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => (PLAIN_TAG.test(text.trim()) ? text : escapeHtml(text)),
    // A picture could carry what was said to whoever serves it, so it is a link that only a person follows.
    image: ({ href, text }) => `<a href="${escapeHtml(href)}">Image: ${escapeHtml(text || href)}</a>`,
    code: ({ text, lang }) => {
      const language = /^[\w+#.-]+/.exec(lang ?? "")?.[0];
      return `<pre><code${language ? ` class="language-${escapeHtml(language)}"` : ""}>${escapeHtml(text)}</code></pre>`;
    },
  },
};

/** Load what rendering needs, unless the page has done so: one with messages to show does, the others need it for the first answer. */
export async function loadLibraries() {
  if (globalThis.marked && globalThis.DOMPurify) return;
  await Promise.all([import("../../vendor/marked.umd.js"), import("../../vendor/purify.min.js")]);
}

let parser;

/** Return the parser, which is set up at its first use. */
function marked() {
  if (!parser) {
    parser = new globalThis.marked.Marked(OPTIONS);
    globalThis.DOMPurify.addHook("uponSanitizeAttribute", keepAttribute);
  }
  return parser;
}

function keepAttribute(node, data) {
  if (data.attrName === "class") data.keepAttr = node.nodeName === "CODE" && /^language-[\w+#.-]+$/.test(data.attrValue);
  if (data.attrName === "type") data.keepAttr = data.attrValue === "checkbox";
}

function clean(html) {
  const fragment = globalThis.DOMPurify.sanitize(html, CONFIG);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noreferrer noopener";
  }
  for (const box of fragment.querySelectorAll("input")) {
    box.disabled = true;
    box.setAttribute("aria-label", box.checked ? "done" : "to do");
  }
  for (const table of fragment.querySelectorAll("table")) {
    const scroll = element("div", { class: "table-scroll", tabindex: "0" });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  return fragment;
}

/** Put a code block into a frame with its language and a copy button. */
function frameCode(pre) {
  const code = pre.firstElementChild;
  const language = code?.className.replace("language-", "") || "text";
  const copy = element("button", { class: "button quiet small", type: "button" }, icon("copy"), "Copy");
  copy.addEventListener("click", () => copyText(pre.textContent));
  const frame = element("div", { class: "code-block" }, element("div", { class: "code-head" }, element("span", {}, language), copy));
  pre.replaceWith(frame);
  pre.tabIndex = 0;
  frame.append(pre);
}

const normalise = (text) => (text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text);

/** Render a whole text. */
export function render(text) {
  return clean(marked().parse(normalise(text)));
}

// The beginning of a line that may yet continue the block before it: "2" becomes "2. next item".
const MARKER = /^\s*(?:\d{1,9}[.)]?|[-*+>|#=_~`]{1,3})$/;

/** Return the index of the first token that later text may still change. */
function firstOpen(tokens) {
  const block = (index) => {
    while (index > 0 && tokens[index].type === "space") index--;
    return index;
  };
  const last = block(tokens.length - 1);
  return last > 0 && MARKER.test(tokens[last].raw) ? block(last - 1) : last;
}

/** Renders a text that grows: finished blocks are made once and stay; only the last, open block is made again. */
export class GrowingMarkdown {
  constructor(container) {
    this.container = container;
    this.reset();
  }

  reset() {
    this.container.replaceChildren();
    this.done = 0; // characters whose blocks are finished
    this.tail = []; // nodes of the open block
    this.openCode = null; // its <code>, while the open block is one
  }

  /** Show `text`, which begins with what was shown before. */
  update(text) {
    const source = normalise(text);
    const tokens = marked().lexer(source.slice(this.done));
    const open = firstOpen(tokens);
    if (open > 0) {
      const finished = tokens.splice(0, open);
      this.clearTail();
      this.container.append(clean(marked().parser(finished)));
      this.done += finished.reduce((sum, token) => sum + token.raw.length, 0);
    }
    this.showTail(tokens);
  }

  showTail(tokens) {
    const [token] = tokens;
    if (this.openCode && token?.type === "code") {
      this.openCode.textContent = token.text;
      return;
    }
    this.clearTail();
    const fragment = clean(marked().parser(tokens));
    this.tail = [...fragment.childNodes];
    this.openCode = token?.type === "code" ? fragment.querySelector("pre > code") : null;
    if (this.openCode && token.lang === undefined) this.openCode = null;
    this.container.append(fragment);
  }

  clearTail() {
    for (const node of this.tail) node.remove();
    this.tail = [];
    this.openCode = null;
  }

  /**
   * The text is complete. One that did not grow here is rendered in one go, which costs half as much. Link definitions may stand below
   * their use, so a text with one is rendered once more as a whole.
   */
  finish(text) {
    if (this.container.hasChildNodes() && !/^ {0,3}\[[^\]]+\]:/m.test(text)) return this.update(text);
    this.reset();
    this.container.append(render(text));
    this.done = normalise(text).length;
  }
}
