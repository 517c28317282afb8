/** The microphone: PCM16 at the session's sample rate, in chunks, while it is open. */

const AUDIO = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
const FAREWELL_MS = 1000; // an audio thread that was stopped from outside says nothing any more

/** Why there is no microphone, in words, or null where there may be one. */
export function obstacle() {
  if (!window.isSecureContext) {
    return "The microphone needs HTTPS, or this page opened at localhost. Sentences and files work without.";
  }
  if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) {
    return "This browser offers no microphone to pages. Sentences and files work without.";
  }
  return null;
}

export class Microphone {
  /** Asks for the microphone and opens it; `take` gets each chunk. Throws with words for people. */
  static async open(rate, take) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: AUDIO }).catch((error) => {
      throw new Error(REFUSALS[error.name] ?? `The microphone cannot be opened: ${error.message}`);
    });
    const context = new AudioContext();
    try {
      await context.audioWorklet.addModule(new URL("microphone-worklet.js", import.meta.url));
      return new Microphone(stream, context, rate, take);
    } catch (error) {
      release(stream, context);
      throw error;
    }
  }

  constructor(stream, context, rate, take) {
    this.stream = stream;
    this.context = context;
    // No output: the microphone is not to be heard here.
    this.node = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0, processorOptions: { rate } });
    this.whole = new Promise((resolve) => {
      this.node.port.onmessage = ({ data }) => (data === null ? resolve() : take(data));
    });
    context.createMediaStreamSource(stream).connect(this.node);
    context.resume();
  }

  /** Closes it, and returns when all of it was handed over. */
  async close() {
    this.node.port.postMessage("end");
    const patience = new Promise((resolve) => setTimeout(resolve, FAREWELL_MS));
    await Promise.race([this.whole, patience]);
    release(this.stream, this.context);
  }
}

const REFUSALS = {
  NotAllowedError: "The microphone was refused. Allow it for this page in the browser, then press again.",
  NotFoundError: "No microphone was found. Sentences and files work without.",
  NotReadableError: "The microphone is in use by another program, or cannot be read.",
};

function release(stream, context) {
  stream.getTracks().forEach((track) => track.stop());
  context.close();
}
