/**
 * The service's WebSocket wire, version 1: plain values become messages, messages become plain values.
 * Described byte by byte in docs/websocket.md. Knows no network.
 */

export const SUBPROTOCOL = "lipsync.v1";
const VERSION = 1;
const HEADER_BYTES = 20;
const AUDIO = 1;
const FRAME = 2;
const PATCH = 3;
const SPEAKING = 1;

/** Speech, an Int16Array at the session's sample rate, as a binary message. */
export function packAudio(samples) {
  const message = new ArrayBuffer(HEADER_BYTES + samples.byteLength);
  const view = new DataView(message);
  view.setUint8(0, VERSION);
  view.setUint8(1, AUDIO);
  view.setUint32(16, samples.byteLength, true);
  samples.forEach((sample, index) => view.setInt16(HEADER_BYTES + 2 * index, sample, true));
  return message;
}

/**
 * A message of the service as {type, ...}: the JSON ones as they are; `audio` with samples (Float32Array in [-1, 1]);
 * `picture` with number, dropped, speaking, jpeg (Blob, or null where the prepared frame is shown as it is) and patch,
 * [x, y, width, height], or null for a whole frame. Throws for what is none.
 */
export function unpack(message) {
  if (typeof message === "string") return JSON.parse(message);
  const view = new DataView(message);
  const [version, kind] = [view.getUint8(0), view.getUint8(1)];
  if (version !== VERSION) throw new Error(`the service sends version ${version} of binary messages, not ${VERSION}`);
  const head = { epoch: view.getUint32(4, true), pts: Number(view.getBigUint64(8, true)) };
  const length = view.getUint32(16, true);
  if (length !== message.byteLength - HEADER_BYTES) throw new Error("a binary message has lost its end");
  if (kind === AUDIO) return { type: "audio", ...head, samples: toFloat(message) };
  if (kind !== FRAME && kind !== PATCH) throw new Error(`the service sends an unknown kind ${kind} of message`);
  return { type: "picture", ...head, ...unpackPicture(message, view, kind) };
}

function unpackPicture(message, view, kind) {
  const begin = HEADER_BYTES + (kind === FRAME ? 8 : 16);
  const empty = begin === message.byteLength;
  return {
    speaking: (view.getUint16(2, true) & SPEAKING) !== 0,
    number: view.getUint32(HEADER_BYTES, true),
    dropped: view.getUint32(HEADER_BYTES + 4, true),
    patch: kind === FRAME ? null : [8, 10, 12, 14].map((offset) => view.getUint16(HEADER_BYTES + offset, true)),
    jpeg: empty ? null : new Blob([new Uint8Array(message, begin)], { type: "image/jpeg" }),
  };
}

function toFloat(message) {
  const samples = new Int16Array(message.slice(HEADER_BYTES));
  return Float32Array.from(samples, (sample) => sample / 32768);
}
