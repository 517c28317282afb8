/**
 * When what carries a pts is due at this viewer. Pure: the time, in seconds, is handed in.
 *
 * The delay is as short as the network's jitter allows, and follows it, but only while nobody hears a change. So it
 * also makes up for a sound card and a service whose clocks do not run alike.
 */

const REMEMBERED = 100; // arrivals: about 2 s of speech, 4 s of silence
const PROMPT = 0.95; // the share of arrivals that is in time
const SPARE_S = 0.015;
const LONGEST_S = 0.3;
const SLEW_S = 0.004; // a change of the delay that nobody notices
const LOST_S = 0.5; // a delay so wrong, after the machine slept perhaps, that it is set anew

export class Timeline {
  /** rate: of the pts, Hz. */
  constructor(rate) {
    this.rate = rate;
    this.base = null; // when pts 0 was due
    this.transits = [];
  }

  /** Something arrived. quiet: nothing is being heard, so the delay may change a little, or a wrong one at once. */
  arrive(pts, now, quiet) {
    this.transits.push(now - pts / this.rate);
    if (this.transits.length > REMEMBERED) this.transits.shift();
    const wanted = this.wanted();
    if (this.base === null) this.base = wanted;
    if (!quiet) return;
    const change = wanted - this.base;
    this.base += Math.abs(change) > LOST_S ? change : clamp(change, -SLEW_S, SLEW_S);
  }

  due(pts) {
    return this.base + pts / this.rate;
  }

  /** Sound that came too late moves all that follows. */
  postpone(seconds) {
    this.base += seconds;
  }

  wanted() {
    const sorted = [...this.transits].sort((a, b) => a - b);
    const late = sorted[Math.floor(PROMPT * (sorted.length - 1))];
    return sorted[0] + Math.min(late - sorted[0] + SPARE_S, LONGEST_S);
  }
}

function clamp(value, least, most) {
  return Math.max(least, Math.min(most, value));
}
