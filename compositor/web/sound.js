/** What is heard, and the clock that goes with it: the sound card's while it runs, the machine's before. */

const LEAD_S = 0.01; // to the beginning of a sound that is played at once
const FADE_S = 0.01; // of a sound that is cut off
const QUIET = 10 ** (-50 / 20);

export class Sound {
  /** rate: of the samples, Hz. */
  constructor(rate) {
    this.rate = rate;
    this.context = null;
    this.playing = new Set();
    this.ticking = false; // whether the clock is the sound card's
    this.cardAhead = 0;
    this.machineAhead = 0;
  }

  /** Browsers allow sound only after a user did something: to be called then. */
  unlock() {
    if (this.context === null) {
      this.context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
      this.renew();
    }
    if (this.context.state !== "running") this.context.resume();
  }

  /** Seconds, without a step where the clocks change. */
  now() {
    const running = this.context?.state === "running";
    const machine = performance.now() / 1000;
    if (running && !this.ticking) this.cardAhead = machine + this.machineAhead - this.context.currentTime;
    if (!running && this.ticking) this.machineAhead = this.context.currentTime + this.cardAhead - machine;
    this.ticking = running;
    return running ? this.context.currentTime + this.cardAhead : machine + this.machineAhead;
  }

  /** Seconds between the playing of a sound and its being heard. */
  get latency() {
    return this.ticking ? this.context.outputLatency || this.context.baseLatency || 0 : 0;
  }

  /** Plays samples at a time of `now`; returns how many seconds they are too late for it. Unlocked, or nothing. */
  play(samples, at) {
    const now = this.now();
    const late = Math.max(0, now + LEAD_S - at);
    if (!this.ticking) return 0;
    const buffer = this.context.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.gain);
    source.onended = () => this.playing.delete(source);
    source.start(at + late - this.cardAhead);
    this.playing.add(source);
    return late;
  }

  /** Be silent now. */
  cut() {
    if (this.playing.size === 0) return;
    const now = this.context.currentTime;
    this.gain.gain.setValueAtTime(1, now);
    this.gain.gain.linearRampToValueAtTime(0, now + FADE_S);
    for (const source of this.playing) source.stop(now + FADE_S);
    this.playing.clear();
    this.renew();
  }

  renew() {
    this.gain = this.context.createGain();
    this.gain.connect(this.context.destination);
  }
}

/** Whether samples in [-1, 1] are too quiet for a listener to notice a gap in them. */
export function isQuiet(samples) {
  return samples.reduce((sum, sample) => sum + sample * sample, 0) <= samples.length * QUIET ** 2;
}
