/**
 * A live session as its viewer has it: what the service sends becomes a picture in time with its sound, and what the
 * user says goes to the service. Knows the canvas, and no other part of the page.
 */

import { Connection, sentence } from "./connection.js";
import { Pictures } from "./pictures.js";
import { Recent } from "./readout.js";
import { Sound, isQuiet } from "./sound.js";
import { Speech } from "./speech.js";
import { Timeline } from "./timeline.js";

export const RATE = 24_000;

/** Tells `started`, `change` (see `state`), `failed` with a message, and `lost` with what Connection says. */
export class Viewer extends EventTarget {
  constructor(canvas) {
    super();
    this.sound = new Sound(RATE);
    this.pictures = new Pictures(canvas, (pts) => this.dueIn(pts), (pts) => this.connection?.send("ack", { pts }));
    this.timeline = new Timeline(RATE);
    this.connection = null;
    this.prepared = new Map(); // Backgrounds by tenant, for patches
    canvas.addEventListener("drawn", () => this.drawn.add(1));
    this.reset();
  }

  reset() {
    this.state = "connecting"; // or idle, speaking, lost
    this.mode = "frames";
    this.tenant = null; // until the session has started
    this.epoch = 0; // what is of an older one is out of date
    this.dropped = 0; // by the service, for this viewer was slow
    this.delayS = null; // from the first sample sent to the first moving picture
    this.speech = null;
    this.segmentOpen = false; // speech was sent, and not its end
    this.askedAt = null; // when the first of it was sent, until it has been shown
    this.loudUntil = 0;
    this.drawn = new Recent();
    this.received = new Recent();
  }

  /** Begins a session. picture: `frames`, or `patches` where the tenant's prepared frames are held. */
  connect(tenant, picture) {
    this.disconnect();
    this.reset();
    this.mode = picture;
    this.timeline = new Timeline(RATE);
    this.connection = new Connection(
      tenant,
      { sample_rate: RATE, picture },
      (message, bytes) => this.receive(message, bytes),
      (reason) => this.lose(reason),
    );
  }

  disconnect() {
    this.connection?.close();
    this.connection = null;
    this.sound.cut();
    this.pictures.clear();
  }

  get connected() {
    return this.tenant !== null && this.connection !== null;
  }

  switch(tenant) {
    this.renew(this.epoch + 1);
    this.connection?.send("switch", { tenant });
  }

  /** Whether something is being said, or will be. */
  get busy() {
    return this.askedAt !== null;
  }

  /** Speech as it is said: a chunk of PCM16. */
  push(samples) {
    if (!this.segmentOpen) this.askedAt = this.sound.now();
    this.segmentOpen = true;
    this.connection?.sendAudio(samples);
  }

  /** What was said is whole. */
  finish() {
    this.segmentOpen = false;
    this.connection?.send("segment_end");
  }

  /** Says PCM16 that is there as a whole, instead of what is being said. */
  say(samples) {
    if (this.busy) this.interrupt();
    this.speech = new Speech(samples, RATE, (chunk) => this.push(chunk), () => this.finish());
    this.speech.advance(0);
  }

  /** Be silent: here at once, and at the service as soon as it knows. Its next epoch is the first that counts. */
  interrupt() {
    this.renew(this.epoch + 1);
    this.connection?.send("interrupt");
  }

  /** Drops what is said, shown and heard of epochs before `epoch`. */
  renew(epoch) {
    this.epoch = epoch;
    this.speech = null;
    this.segmentOpen = false;
    this.askedAt = null;
    this.loudUntil = 0;
    this.sound.cut();
    this.pictures.withdraw(epoch);
  }

  dueIn(pts) {
    return this.timeline.due(pts) + this.sound.latency - this.sound.now();
  }

  receive(message, bytes) {
    this.received.add(bytes);
    if (message.epoch > this.epoch) this.renew(message.epoch);
    RECEIVERS[message.type]?.call(this, message);
  }

  started({ tenant }) {
    this.tenant = tenant;
    this.pictures.backgrounds = this.prepared.get(tenant) ?? null;
    this.turn("idle");
    this.dispatchEvent(new Event("started"));
  }

  takePicture(picture) {
    const now = this.sound.now();
    this.timeline.arrive(picture.pts, now, now >= this.loudUntil);
    this.dropped = picture.dropped;
    this.pictures.take(picture).catch((error) => this.fail(`A picture cannot be shown: ${error.message}.`));
  }

  takeAudio({ pts, epoch, samples }) {
    if (epoch < this.epoch) return;
    const [now, quiet] = [this.sound.now(), isQuiet(samples)];
    this.timeline.arrive(pts, now, quiet && now >= this.loudUntil);
    this.timeline.postpone(this.sound.play(samples, this.timeline.due(pts)));
    if (!quiet) this.loudUntil = this.timeline.due(pts + samples.length);
    this.speech?.advance(samples.length);
  }

  playbackStarted({ pts, epoch }) {
    if (epoch < this.epoch) return;
    if (this.busy) this.delayS = this.sound.now() + this.dueIn(pts) - this.askedAt;
    this.turn("speaking");
  }

  playbackFinished({ epoch, interrupted }) {
    if (epoch < this.epoch) return;
    if (!interrupted) this.askedAt = null; // else the next may be on its way already
    this.turn("idle");
  }

  lose(reason) {
    this.disconnect();
    this.dispatchEvent(new CustomEvent("lost", { detail: reason }));
  }

  fail(message) {
    this.dispatchEvent(new CustomEvent("failed", { detail: message }));
  }

  turn(state) {
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }
}

const RECEIVERS = {
  started: Viewer.prototype.started,
  picture: Viewer.prototype.takePicture,
  audio: Viewer.prototype.takeAudio,
  playback_started: Viewer.prototype.playbackStarted,
  playback_finished: Viewer.prototype.playbackFinished,
  failed({ error }) {
    this.fail(sentence(error.message));
  },
};
