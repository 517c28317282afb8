/** One WebSocket to the service, and why it ended, in words. Does not try again by itself. */

import { SUBPROTOCOL, packAudio, unpack } from "./wire.js";

const SILENT_MS = 10_000; // a visible page is sent pictures all the time: without them the network is gone
const WATCH_MS = 1000;
const MOST_UNSENT_BYTES = 256 * 1024;
const NOT_UNDERSTOOD = 4400;
const NO_USE = [NOT_UNDERSTOOD, 4404, 4412, 4501]; // what trying again does not mend

export class Connection {
  /**
   * start: the fields of the first message. receive(message, bytes): a message of the service, and its size.
   * lost({ message, retry, retryAfterS }): it ended, but not by `close`.
   */
  constructor(tenant, start, receive, lost) {
    this.receive = receive;
    this.lost = lost;
    this.error = null;
    this.refused = 0; // chunks of speech that the network did not take
    const url = new URL(`ws/${encodeURIComponent(tenant)}`, document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    this.socket = new WebSocket(url, SUBPROTOCOL);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.send("start", start);
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onclose = ({ code }) => this.end(code);
    this.newsAt = performance.now();
    this.watch = setInterval(() => this.check(), WATCH_MS);
  }

  get open() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  send(type, fields = {}) {
    if (this.open) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  /** Speech, an Int16Array. What the network does not take in time is lost: it must not wait without bound. */
  sendAudio(samples) {
    if (this.open && this.socket.bufferedAmount < MOST_UNSENT_BYTES) this.socket.send(packAudio(samples));
    else this.refused += 1;
  }

  /** Ends it; nothing is received any more. */
  close() {
    this.detach();
    this.socket.close(1000);
  }

  take(data) {
    this.newsAt = performance.now();
    const message = this.unpack(data);
    if (message === null) return;
    if (message.type === "error") this.error = message.error;
    else this.receive(message, data.byteLength ?? data.length);
  }

  /** A message of the service; null where it is none, which ends the connection. */
  unpack(data) {
    try {
      return unpack(data);
    } catch (error) {
      this.error = { message: error.message };
      this.socket.close(NOT_UNDERSTOOD);
      this.end(NOT_UNDERSTOOD);
      return null;
    }
  }

  check() {
    if (document.hidden) this.newsAt = performance.now();
    else if (performance.now() - this.newsAt > SILENT_MS) {
      this.socket.close();
      this.end(1006);
    }
  }

  end(code) {
    this.detach();
    this.lost({
      message: this.error ? sentence(this.error.message) : (CLOSED[code] ?? CLOSED[1006]),
      retry: !NO_USE.includes(code),
      retryAfterS: this.error?.retry_after_s ?? null,
    });
  }

  detach() {
    clearInterval(this.watch);
    this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
  }
}

const CLOSED = {
  1001: "The service is stopping.",
  1006: "The service cannot be reached.",
  1009: "The service refused a message that was too big.",
};

/** A message of the service as a sentence. */
export function sentence(message) {
  return `${message.charAt(0).toUpperCase()}${message.slice(1)}${/[.!?]$/.test(message) ? "" : "."}`;
}
