/** How the session fares, in figures: what happened in the last two seconds. */

const SPAN_MS = 2000;

/** Sums up what is added, over the last two seconds. */
export class Recent {
  constructor() {
    this.entries = [];
    this.since = performance.now();
  }

  add(value, at = performance.now()) {
    this.entries.push([at, value]);
    while (this.entries[0][0] < at - SPAN_MS) this.entries.shift();
  }

  /** A second's share. */
  rate(at = performance.now()) {
    const recent = this.entries.filter(([time]) => time >= at - SPAN_MS);
    return (1000 * recent.reduce((sum, [, value]) => sum + value, 0)) / Math.max(1, Math.min(SPAN_MS, at - this.since));
  }
}

/** Bytes for people. */
export function inWords(bytes) {
  if (bytes < 1000) return `${Math.round(bytes)} B`;
  if (bytes < 1e6) return `${(bytes / 1000).toPrecision(3)} kB`;
  return `${(bytes / 1e6).toPrecision(3)} MB`;
}
