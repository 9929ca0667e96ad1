// The composer: grows with its text, keeps drafts, turns send into stop.

const coarse = matchMedia("(pointer: coarse)");

export class Composer {
  /** `send(text)` returns whether the text was taken; `stop()` stops what runs. */
  constructor({ chatId, send, stop }) {
    this.form = document.getElementById("composer");
    this.text = document.getElementById("composer-text");
    this.sendButton = document.getElementById("send");
    this.stopButton = document.getElementById("stop");
    this.alert = document.getElementById("composer-alert");
    this.onSend = send;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.stopButton.addEventListener("click", stop);
    this.text.addEventListener("keydown", (event) => this.keydown(event));
    this.text.addEventListener("input", () => this.changed());
    this.openChat(chatId);
    if (!this.text.value) this.text.value = sessionStorage.getItem(this.key) ?? "";
    this.fit();
    if (!coarse.matches) this.text.focus(); // on a phone that would cover half the page with the keyboard
  }

  openChat(chatId) {
    this.key = `draft:${chatId ?? "new"}`;
  }

  keydown(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || coarse.matches) return;
    event.preventDefault();
    this.submit();
  }

  changed() {
    sessionStorage.setItem(this.key, this.text.value);
    this.fit();
  }

  fit() {
    if (!CSS.supports("field-sizing", "content")) {
      this.text.style.height = "auto";
      this.text.style.height = `${this.text.scrollHeight}px`;
    }
    this.sendButton.disabled = !this.text.value.trim();
  }

  submit() {
    if (!this.text.value.trim() || this.busy) return;
    if (this.onSend(this.text.value)) {
      this.showError("");
      this.set("");
    }
  }

  set(text) {
    this.text.value = text;
    this.changed();
  }

  /** Give back a text that could not be sent, in front of what was typed since. */
  restore(text) {
    this.set(this.text.value.trim() ? `${text}\n\n${this.text.value}` : text);
    this.text.focus();
  }

  setBusy(busy) {
    this.busy = busy;
    this.sendButton.hidden = busy;
    this.stopButton.hidden = !busy;
  }

  showError(message) {
    this.alert.textContent = message;
    this.alert.hidden = !message;
  }
}
