// Says a WAV through a tenant: node live.mjs ws://127.0.0.1:8086/ws/TENANT speech.wav
// Node 22, or 20 with --experimental-websocket. All but reading the file runs in a browser as it is.
import { readFileSync } from "node:fs";

const [url, path] = process.argv.slice(2);
const wav = readFileSync(path); // mono PCM16
const speech = wav.subarray(wav.indexOf("data") + 8);
const socket = new WebSocket(url, "lipsync.v1");
socket.binaryType = "arraybuffer";

function sendAudio(samples) {
  const message = new Uint8Array(20 + samples.length); // flags, epoch and pts stay 0
  const header = new DataView(message.buffer);
  message.set([1, 1]); // version, kind: audio
  header.setUint32(16, samples.length, true);
  message.set(samples, 20);
  socket.send(message);
}
socket.onopen = () => {
  socket.send(JSON.stringify({ type: "start", sample_rate: wav.readUInt32LE(24) }));
  for (let at = 0; at < speech.length; at += 4096) sendAudio(speech.subarray(at, at + 4096));
  socket.send(JSON.stringify({ type: "segment_end" }));
};
socket.onmessage = ({ data }) => {
  if (typeof data === "string") {
    console.log(data);
    if (JSON.parse(data).type === "playback_finished") socket.close(1000);
    return;
  }
  const view = new DataView(data);
  if (view.getUint8(1) !== 2) return; // not a frame
  const [speaking, pts] = [view.getUint16(2, true), Number(view.getBigUint64(8, true))];
  const [number, dropped] = [view.getUint32(20, true), view.getUint32(24, true)];
  console.log(`frame of background ${number} at ${pts}, speaking=${speaking}, dropped=${dropped}`);
  // createImageBitmap(new Blob([data.slice(28)])) makes it a picture for a canvas.
  socket.send(JSON.stringify({ type: "ack", pts }));
};
socket.onclose = ({ code, reason }) => {
  if (code !== 1000) throw new Error(`closed: ${code} ${reason}`);
};
