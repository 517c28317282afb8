/** The talk button: hold it while talking, or tap it to begin and tap it again to end. Space does the same. */

const TAP_MS = 350;

export class TalkButton {
  /** begin(), end(): what pressing and letting go mean. held(): it is no longer held, and goes on until a press. */
  constructor(button, { begin, end, held }) {
    this.button = button;
    this.begin = begin;
    this.end = end;
    this.held = held;
    this.talking = false;
    this.pressedAt = null; // null while nothing is held
    this.key = null; // the one that is held
    this.reached = false; // whether what has the focus got it from the keyboard
    this.listen();
  }

  listen() {
    const { button } = this;
    button.addEventListener("pointerdown", (event) => event.button === 0 && this.press(event));
    for (const type of ["pointerup", "pointercancel"]) button.addEventListener(type, (event) => this.release(event));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    // Assistive technology clicks without a pointer.
    button.addEventListener("click", (event) => event.detail === 0 && this.toggle());
    // Asked now, for the next key makes the focus visible.
    document.addEventListener("focusin", ({ target }) => (this.reached = target.matches(":focus-visible")));
    document.addEventListener("keydown", (event) => this.takesKey(event) && this.pressKey(event));
    document.addEventListener("keyup", (event) => event.key === this.key && this.releaseKey(event));
    window.addEventListener("blur", () => this.pressedAt !== null && this.stop());
  }

  takesKey({ key, target, ctrlKey, altKey, metaKey }) {
    if (ctrlKey || altKey || metaKey) return false;
    if (target === this.button) return key === " " || key === "Enter";
    // A control that was clicked does not mean to have the keyboard; one that was reached with it does.
    const control = target.closest("a, button, input, select, textarea");
    return key === " " && (control === null || (!this.reached && !control.matches("select")));
  }

  pressKey(event) {
    event.preventDefault();
    this.key = event.key;
    if (!event.repeat) this.press(event);
  }

  releaseKey(event) {
    event.preventDefault(); // of the click that follows
    this.key = null;
    this.release(event);
  }

  press(event) {
    if (this.button.disabled) return;
    if (event.pointerId !== undefined) this.button.setPointerCapture(event.pointerId);
    if (this.talking) return this.stop();
    this.pressedAt = event.timeStamp;
    this.talking = true;
    this.begin();
  }

  release({ timeStamp }) {
    if (this.pressedAt === null) return;
    if (timeStamp - this.pressedAt >= TAP_MS) return this.stop();
    this.pressedAt = null;
    this.held();
  }

  toggle() {
    if (this.talking) return this.stop();
    this.talking = true;
    this.begin();
  }

  stop() {
    this.pressedAt = null;
    if (!this.talking) return;
    this.talking = false;
    this.end();
  }
}
