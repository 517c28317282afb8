/**
 * Installed into the page before it starts: writes down every picture that is drawn, compared with the tenant's prepared
 * frame of the same number, every piece of sound, with the sound card's time, and every state that the page was in.
 */

window.recorded = { pictures: [], sounds: [], states: [], prepared: {} };

/** Gets the prepared frames of a tenant, for pictures to be compared with. */
window.compareWith = async (tenant) => {
  const { frames } = await (await fetch(`v1/tenants/${tenant}`)).json();
  const pixels = [];
  for (let number = 0; number < frames; number++) {
    const jpeg = await (await fetch(`v1/tenants/${tenant}/frames/${number}.jpg`)).blob();
    pixels.push(pixelsOf(await createImageBitmap(jpeg)));
  }
  window.recorded.prepared = pixels;
};

function pixelsOf(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** How many pixels differ visibly, and the box around them, [left, top, right, bottom]. */
window.difference = (one, other) => {
  const words = [one, other].map(({ data }) => new Uint32Array(data.buffer));
  const box = [one.width, one.height, 0, 0];
  let changed = 0;
  for (let index = 0; index < words[0].length; index++) {
    if (words[0][index] === words[1][index] || !visible(one.data, other.data, 4 * index)) continue;
    const [x, y] = [index % one.width, Math.floor(index / one.width)];
    changed += 1;
    box[0] = Math.min(box[0], x);
    box[1] = Math.min(box[1], y);
    box[2] = Math.max(box[2], x + 1);
    box[3] = Math.max(box[3], y + 1);
  }
  return { changed, box };
};

function visible(one, other, offset) {
  return [0, 1, 2].some((channel) => Math.abs(one[offset + channel] - other[offset + channel]) > 16);
}

document.addEventListener("DOMContentLoaded", () => {
  const states = new MutationObserver(() => window.recorded.states.push(document.body.dataset.state));
  // Not its body: a page without one has no states.
  states.observe(document, { attributes: true, subtree: true, attributeFilter: ["data-state"] });
  const canvas = document.querySelector("canvas");
  canvas?.addEventListener("drawn", ({ detail }) => {
    const prepared = window.recorded.prepared[detail.number];
    const fits = prepared?.width === canvas.width && prepared?.height === canvas.height;
    const compared = fits ? window.difference(pixelsOf(canvas), prepared) : {};
    window.recorded.pictures.push({ ...detail, at: window.soundContext?.currentTime, ...compared });
  });
});

const { start, stop } = AudioBufferSourceNode.prototype;
AudioBufferSourceNode.prototype.start = function (when) {
  window.soundContext = this.context;
  const loud = this.buffer.getChannelData(0).some((sample) => Math.abs(sample) > 0.05);
  this.record = { when, samples: this.buffer.length, latency: this.context.outputLatency, loud, cut: false };
  window.recorded.sounds.push(this.record);
  return start.call(this, when);
};
AudioBufferSourceNode.prototype.stop = function (when) {
  this.record.cut = true;
  return stop.call(this, when);
};
