// Sends a file in pieces. A lost connection is waited for; the server says where to go on.

import { csrfToken } from "./base.js";

const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const STALL_MS = 60_000; // a piece that moves no further for so long is sent again

/** A refusal by the server, with its words. */
export class Refused extends Error {
  constructor(status, facts) {
    super(facts?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.details = facts?.details ?? {};
    this.param = facts?.param;
  }
}

/** One upload; events: "progress" ({received}), "waiting" ({seconds}). */
export class Upload extends EventTarget {
  #request = null;
  #cancelled = false;
  #url = null;

  constructor(file, url, chunkBytes) {
    super();
    this.file = file;
    this.received = 0;
    this.base = url;
    this.chunkBytes = chunkBytes;
  }

  /** Send everything that is missing. Throws Refused, or AbortError after cancel(). */
  async send() {
    if (!this.#url) {
      const state = await this.#retry(() => this.#json("POST", this.base, { file_name: this.file.name, size: this.file.size }));
      this.#url = `${this.base}/${state.id}`;
    }
    while (this.received < this.file.size) await this.#retry(() => this.#piece());
  }

  /** Have the server take the complete file in under this name. Returns the model. Throws Refused; may be called again then. */
  finish(userRepo) {
    return this.#json("POST", `${this.#url}/finish`, { user_repo: userRepo });
  }

  /** Stop, and have the server forget what it got. */
  async cancel() {
    this.#cancelled = true;
    this.#request?.abort();
    if (this.#url) await this.#json("DELETE", this.#url).catch(() => {}); // the server discards it by itself after a day
  }

  async #piece() {
    const from = this.received;
    const piece = this.file.slice(from, from + this.chunkBytes);
    try {
      const state = await this.#call("PUT", `${this.#url}?offset=${from}`, piece, (sent) => this.#progress(from + sent));
      this.#progress(state.received);
      this.received = state.received;
    } catch (error) {
      // The piece arrived, but its answer was lost: the server knows better where we are.
      if (!(error instanceof Refused) || error.status !== 409 || !("received" in error.details) || error.details.received === from) throw error;
      this.received = error.details.received;
    }
  }

  #progress(received) {
    this.dispatchEvent(new CustomEvent("progress", { detail: { received } }));
  }

  /** Repeat while the server is away; a refusal is final. */
  async #retry(step) {
    for (let attempt = 0; ; attempt++) {
      try {
        return await step();
      } catch (error) {
        const passing = !(error instanceof Refused) || error.status >= 500;
        if (this.#cancelled || error.name === "AbortError") throw new DOMException("cancelled", "AbortError");
        if (!passing) throw error;
        const wait = RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)];
        this.dispatchEvent(new CustomEvent("waiting", { detail: { seconds: wait / 1000 } }));
        await new Promise((resolve) => setTimeout(resolve, wait));
        if (this.#cancelled) throw new DOMException("cancelled", "AbortError");
      }
    }
  }

  #json(method, url, body) {
    return this.#call(method, url, body && JSON.stringify(body), null, "application/json");
  }

  /** XMLHttpRequest, because fetch does not tell how much of a body is sent. */
  #call(method, url, body, onProgress, type = "application/octet-stream") {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      this.#request = request;
      request.open(method, url);
      request.setRequestHeader("X-CSRFToken", csrfToken());
      if (body) request.setRequestHeader("Content-Type", type);
      if (onProgress) {
        let watch;
        const moved = () => {
          clearTimeout(watch);
          watch = setTimeout(() => {
            reject(new Error("The connection does not move.")); // before the abort, which would count as cancelled
            request.abort();
          }, STALL_MS);
        };
        request.upload.onprogress = (event) => {
          moved();
          onProgress(event.loaded);
        };
        request.onloadend = () => clearTimeout(watch);
        moved();
      }
      request.onerror = () => reject(new Error("The server cannot be reached."));
      request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
      request.onload = () => {
        const answer = parse(request.responseText);
        if (request.status >= 200 && request.status < 300) resolve(answer);
        else reject(new Refused(request.status, answer?.error));
      };
      request.send(body || null);
    });
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
