/**
 * Pictures as they come become what the canvas shows when it is due. JPEG is decoded off the main thread; of those that
 * are due together the newest is drawn, and the others are counted as late.
 */

const ROOM = 8; // pictures that wait for their time; more are not asked for
const MOST = 2 * ROOM;

export class Pictures {
  /**
   * dueIn(pts): seconds until a picture's time. acknowledge(pts): the service may send more. After each drawing the
   * canvas gets the event `drawn`, with what the picture says of itself as detail.
   */
  constructor(canvas, dueIn, acknowledge) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.dueIn = dueIn;
    this.acknowledge = acknowledge;
    this.backgrounds = null;
    this.waiting = [];
    this.clear();
    this.draw = this.draw.bind(this);
    requestAnimationFrame(this.draw);
  }

  /** Forgets what waits: a new session begins. The canvas keeps its picture. */
  clear() {
    this.waiting.forEach(close);
    this.waiting = [];
    this.owed = null;
    this.epoch = 0;
    this.late = 0;
    this.session = {}; // what is being decoded for an older one comes too late
  }

  /** Forgets speech of epochs before `epoch`: it was interrupted. */
  withdraw(epoch) {
    this.epoch = epoch;
    this.waiting.filter((picture) => this.isStale(picture)).forEach(close);
    this.waiting = this.waiting.filter((picture) => !this.isStale(picture));
    this.settle();
  }

  isStale({ speaking, epoch }) {
    return speaking && epoch < this.epoch;
  }

  /** Takes a picture of the wire. Throws where its JPEG is none. */
  async take(picture) {
    const session = this.session;
    const [whole, part] = await this.decode(picture);
    const decoded = { ...picture, whole, part };
    if (session !== this.session) return close(decoded);
    if (this.isStale(picture)) close(decoded);
    else this.waiting.push(decoded);
    this.waiting.sort((a, b) => a.pts - b.pts);
    if (this.waiting.length > MOST) this.skip(this.waiting.shift());
    // Not when it is drawn: the wait for its time would count as the network's, and the service would send less.
    this.owed = Math.max(this.owed ?? 0, picture.pts);
    this.settle();
  }

  decode({ patch, jpeg, number }) {
    if (patch === null) return Promise.all([createImageBitmap(jpeg), null]);
    return Promise.all([this.backgrounds.bitmap(number), jpeg && createImageBitmap(jpeg)]);
  }

  draw() {
    requestAnimationFrame(this.draw);
    const due = this.waiting.filter(({ pts }) => this.dueIn(pts) <= 0);
    if (due.length === 0) return;
    this.waiting.splice(0, due.length);
    const newest = due.pop();
    due.forEach((picture) => this.skip(picture));
    this.paint(newest);
    close(newest);
    this.settle();
  }

  paint(picture) {
    const { whole, part, patch, pts, epoch, number, speaking } = picture;
    if (this.canvas.width !== whole.width || this.canvas.height !== whole.height) {
      [this.canvas.width, this.canvas.height] = [whole.width, whole.height];
    }
    this.context.drawImage(whole, 0, 0);
    if (part !== null) this.context.drawImage(part, patch[0], patch[1]);
    const detail = { pts, epoch, number, speaking };
    this.canvas.dispatchEvent(new CustomEvent("drawn", { detail }));
  }

  skip(picture) {
    close(picture);
    this.late += 1;
  }

  settle() {
    if (this.owed === null || this.waiting.length > ROOM) return;
    this.acknowledge(this.owed);
    this.owed = null;
  }
}

function close({ whole, part }) {
  whole.close();
  part?.close();
}
