/** Speech that is there as a whole, a sentence or a file. Sent as it is heard, so that little is under way at a stop. */

import { toPcm16 } from "./resampler.js";

const CHUNK_S = 0.1;
const AHEAD_S = 2; // sent and not yet heard
const MOST_BYTES = 64 * 2 ** 20;

/** A sound file (Blob) as PCM16 at `rate`, its channels averaged. Throws with words for people. */
export async function decodeFile(file, rate) {
  if (file.size > MOST_BYTES) throw new Error(`The file is larger than ${MOST_BYTES / 2 ** 20} MiB.`);
  // Decoding changes the sample rate, too.
  const context = new OfflineAudioContext(1, 1, rate);
  const decoded = await context.decodeAudioData(await file.arrayBuffer()).catch(() => {
    throw new Error("This file holds no sound that the browser can read. WAV always works.");
  });
  const channels = Array.from({ length: decoded.numberOfChannels }, (_, index) => decoded.getChannelData(index));
  if (channels.length === 1) return toPcm16(channels[0]);
  return toPcm16(
    channels[0].map((_, index) => channels.reduce((sum, channel) => sum + channel[index], 0) / channels.length),
  );
}

export class Speech {
  /** samples: PCM16 (Int16Array) at `rate`. send(samples), end(): what to do with it. */
  constructor(samples, rate, send, end) {
    this.samples = samples;
    this.chunk = Math.round(CHUNK_S * rate);
    this.ahead = AHEAD_S * rate;
    this.send = send;
    this.end = end;
    this.sent = 0;
    this.heard = 0;
  }

  /** So many samples more were heard; 0 begins. */
  advance(heard) {
    this.heard += heard;
    while (!this.done && this.sent < this.heard + this.ahead) {
      this.send(this.samples.subarray(this.sent, this.sent + this.chunk));
      this.sent += this.chunk;
      if (this.done) this.end();
    }
  }

  get done() {
    return this.sent >= this.samples.length;
  }
}
