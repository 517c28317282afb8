/** Changes the sample rate of a stream: windowed sinc, one bank of filter taps for each phase between two inputs. */

const ZERO_CROSSINGS = 24; // on each side: a transition band of about a tenth of the lower rate
const KAISER_BETA = 8; // about 80 dB of stop band
const PASS_BAND = 0.92; // of the lower Nyquist frequency

export class Resampler {
  /** from, to: Hz, whole numbers. */
  constructor(from, to) {
    const divisor = greatestCommonDivisor(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    const cutoff = PASS_BAND * Math.min(1, to / from); // of the input's Nyquist frequency
    this.reach = Math.ceil(ZERO_CROSSINGS / cutoff);
    this.banks = Array.from({ length: this.up }, (_, phase) => taps(phase / this.up, this.reach, cutoff));
    this.held = new Float32Array(this.reach - 1); // silence before the first sample
    this.phase = 0; // of the next output, behind held[reach - 1], in `up`ths of an input
  }

  /** What the samples (Float32Array) add to the output, which lags behind by half the filter. */
  push(samples) {
    const input = new Float32Array(this.held.length + samples.length);
    input.set(this.held);
    input.set(samples, this.held.length);
    const output = [];
    let first = 0;
    while (first + 2 * this.reach <= input.length) {
      const bank = this.banks[this.phase];
      let sum = 0;
      for (let tap = 0; tap < bank.length; tap++) sum += bank[tap] * input[first + tap];
      output.push(sum);
      this.phase += this.down;
      first += Math.floor(this.phase / this.up);
      this.phase %= this.up;
    }
    this.held = input.slice(first);
    return Float32Array.from(output);
  }

  /** The last of the output; the stream has ended. */
  finish() {
    return this.push(new Float32Array(this.reach));
  }
}

/** The taps for an output `offset` of a sample behind the middle: 2 * reach of them, which sum to 1. */
function taps(offset, reach, cutoff) {
  const bank = new Float64Array(2 * reach);
  for (let tap = 0; tap < bank.length; tap++) {
    const distance = tap - (reach - 1) - offset;
    bank[tap] = sinc(cutoff * distance) * kaiser(distance / reach);
  }
  const sum = bank.reduce((total, value) => total + value, 0);
  return Float32Array.from(bank, (value) => value / sum);
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function kaiser(x) {
  return Math.abs(x) >= 1 ? 0 : bessel(KAISER_BETA * Math.sqrt(1 - x * x)) / bessel(KAISER_BETA);
}

/** The modified Bessel function of order 0, by its power series. */
function bessel(x) {
  let [sum, term] = [1, 1];
  for (let k = 1; term > 1e-12 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

function greatestCommonDivisor(a, b) {
  return b === 0 ? a : greatestCommonDivisor(b, a % b);
}

/** Samples in [-1, 1] as PCM16. */
export function toPcm16(samples) {
  return Int16Array.from(samples, (sample) => Math.max(-32768, Math.min(32767, Math.round(32768 * sample))));
}
