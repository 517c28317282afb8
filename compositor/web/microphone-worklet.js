/** Runs in the audio thread: the microphone's samples at the context's rate become chunks of PCM16 at the session's. */

import { Resampler, toPcm16 } from "./resampler.js";

const CHUNK_S = 0.04;

class MicrophoneProcessor extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate } }) {
    super();
    this.resampler = new Resampler(sampleRate, rate);
    this.chunk = Math.round(CHUNK_S * rate);
    this.pieces = [];
    this.count = 0;
    this.ended = false;
    this.port.onmessage = () => this.end();
  }

  /** Called with 128 samples of each channel, which are averaged; none while the microphone is being connected. */
  process([channels]) {
    if (!this.ended && channels.length > 0) this.take(this.resampler.push(mix(channels)));
    return !this.ended;
  }

  take(samples) {
    this.pieces.push(samples);
    this.count += samples.length;
    if (this.count >= this.chunk) this.post();
  }

  post() {
    const samples = new Float32Array(this.count);
    let position = 0;
    for (const piece of this.pieces) {
      samples.set(piece, position);
      position += piece.length;
    }
    [this.pieces, this.count] = [[], 0];
    const pcm = toPcm16(samples);
    this.port.postMessage(pcm, [pcm.buffer]);
  }

  /** Posts what is left, and null to say that it was the last. */
  end() {
    if (this.ended) return;
    this.ended = true;
    this.take(this.resampler.finish());
    if (this.count > 0) this.post();
    this.port.postMessage(null);
  }
}

function mix(channels) {
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, index) => channels.reduce((sum, channel) => sum + channel[index], 0) / channels.length);
}

registerProcessor("microphone", MicrophoneProcessor);
