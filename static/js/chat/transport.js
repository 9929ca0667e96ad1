// The page's websocket: reconnects by itself with back-off, notices a dead line, and says what state it is in.

const PING_EVERY = 20_000;
const SILENCE = 10_000;
const LONGEST_WAIT = 10_000;
const SIGNED_OUT = 4401;

/** Events: "open", "closed" and "frame" (detail: the parsed frame). */
export class Transport extends EventTarget {
  constructor(path) {
    super();
    this.url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`;
    this.failures = 0;
  }

  /** Open the line and keep it open. */
  start() {
    addEventListener("online", () => this.retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.retryNow());
    addEventListener("pagehide", () => this.socket?.close());
    addEventListener("pageshow", (event) => event.persisted && this.retryNow());
    this.connect();
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  connect() {
    clearTimeout(this.timer);
    const socket = new WebSocket(this.url);
    this.socket = socket;
    socket.addEventListener("open", () => {
      this.pingTimer = setInterval(() => this.ping(), PING_EVERY);
      this.dispatchEvent(new Event("open"));
    });
    socket.addEventListener("message", (event) => {
      this.failures = 0;
      clearTimeout(this.silenceTimer);
      this.dispatchEvent(new CustomEvent("frame", { detail: JSON.parse(event.data) }));
    });
    socket.addEventListener("close", (event) => {
      if (socket === this.socket) this.closed(event.code);
    });
  }

  closed(code) {
    clearInterval(this.pingTimer);
    clearTimeout(this.silenceTimer);
    if (code === SIGNED_OUT) return location.reload();
    this.dispatchEvent(new Event("closed"));
    const wait = Math.min(LONGEST_WAIT, 250 * 2 ** this.failures++);
    this.timer = setTimeout(() => this.connect(), wait * (0.75 + Math.random() / 2));
  }

  ping() {
    this.send({ type: "ping" });
    clearTimeout(this.silenceTimer);
    this.silenceTimer = setTimeout(() => this.drop(), SILENCE);
  }

  /** Give up a line on which nothing comes back; the browser itself may take minutes to notice. */
  drop() {
    const socket = this.socket;
    this.socket = undefined;
    socket.close();
    this.closed(0);
  }

  retryNow() {
    if (this.isOpen) this.ping();
    else if (this.socket?.readyState !== WebSocket.CONNECTING) {
      this.failures = 0;
      this.connect();
    }
  }

  /** Send a frame; false when there is no connection (whoever wants it sent asks again on "open"). */
  send(frame) {
    if (!this.isOpen) return false;
    this.socket.send(JSON.stringify(frame));
    return true;
  }
}
