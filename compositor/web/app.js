/** The page: what the user presses goes to the viewer, and what the viewer tells is shown in words. */

import { Backgrounds } from "./backgrounds.js";
import { sentence } from "./connection.js";
import { Microphone, obstacle } from "./microphone.js";
import { inWords } from "./readout.js";
import { decodeFile } from "./speech.js";
import { TalkButton } from "./talk.js";
import { RATE, Viewer } from "./viewer.js";

const READOUT_MS = 500;
const FIRST_RETRY_S = 0.5;
const LAST_RETRY_S = 8;

const $ = (id) => document.getElementById(id);
const sentences = [...document.querySelectorAll("[data-speech]")];
const viewer = new Viewer($("picture"));
const talk = new TalkButton($("talk"), { begin: beginTalking, end: endTalking, held: show });

let opening = new AbortController(); // of the session that is being opened; aborted when another is wanted
let retryS = FIRST_RETRY_S;
let retrying = null;
let saying = null; // what is being decoded, to be said
let turn = null; // the user's last: its microphone, whether that is open, whether the turn was cut short

// Sessions.

/** Opens a session with the chosen tenant, or goes on with it in the one that is open. */
async function open() {
  clearTimeout(retrying);
  opening.abort();
  opening = new AbortController();
  const { signal } = opening;
  try {
    const name = await choose(signal);
    const picture = $("patches").checked ? "patches" : "frames";
    if (picture === "patches") await prepare(name, signal);
    if (signal.aborted) return;
    if (!viewer.connected || viewer.mode !== picture) viewer.connect(name, picture);
    else if (viewer.tenant !== name) viewer.switch(name);
  } catch (error) {
    if (!signal.aborted) lose({ message: error.message, retry: error.retry ?? true, retryAfterS: null });
  } finally {
    if (!signal.aborted) $("progress").hidden = true;
  }
}

/** The chosen tenant's name, after a look at what is installed. */
async function choose(signal) {
  const select = $("tenant");
  const { tenants } = await ask("v1/tenants", signal);
  if (tenants.length === 0) throw Object.assign(new Error(NO_TENANT), { retry: false });
  const wanted = [select.value, decodeURIComponent(location.hash.slice(1))];
  const names = tenants.map(({ id }) => id);
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = wanted.find((name) => names.includes(name)) ?? names[0];
  select.disabled = false;
  return select.value;
}

/** Sees that the prepared frames of a tenant are here, and as they are now. */
async function prepare(name, signal) {
  const tenant = await ask(`v1/tenants/${encodeURIComponent(name)}`, signal);
  if (viewer.prepared.get(name)?.version === tenant.version) return;
  const progress = $("progress");
  Object.assign(progress, { hidden: false, max: tenant.frames, value: 0 });
  const tell = (done, all, bytes) => {
    progress.value = done;
    $("patches-hint").textContent = `Fetched ${done} of ${all} prepared frames, ${inWords(bytes)}.`;
  };
  const backgrounds = await Backgrounds.fetch(tenant, tell, signal);
  // Those of one tenant only, besides the one that is shown: they are megabytes.
  for (const held of viewer.prepared.keys()) if (held !== viewer.tenant) viewer.prepared.delete(held);
  viewer.prepared.set(name, backgrounds);
}

/** JSON of the service. Throws with its own words. */
async function ask(path, signal) {
  const response = await fetch(path, { signal }).catch(() => {
    throw new Error("The service cannot be reached.");
  });
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const words = answer.error ? sentence(answer.error.message) : `The service answers with HTTP ${response.status}.`;
  throw Object.assign(new Error(words), { retry: response.status >= 500 || response.status === 429 });
}

function lose({ message, retry, retryAfterS }) {
  clearTimeout(retrying);
  cutTurn();
  viewer.disconnect();
  viewer.turn("lost");
  if (retry) notify(`${message} Trying again.`, null);
  else notify(message, "retry");
  if (!retry) return;
  retrying = setTimeout(open, 1000 * (retryAfterS ?? retryS));
  retryS = Math.min(2 * retryS, LAST_RETRY_S);
}

// Speech.

async function beginTalking() {
  saying = null;
  if (turn !== null) turn.cut = true;
  if (viewer.busy) viewer.interrupt();
  const mine = (turn = { cut: false, open: false });
  mine.microphone = Microphone.open(RATE, (samples) => mine.cut || viewer.push(samples));
  show();
  try {
    await mine.microphone;
    mine.open = true;
    forget();
  } catch (error) {
    if (turn === mine) talk.stop();
    notify(error.message);
  }
  show();
}

async function endTalking() {
  const mine = turn;
  show();
  const microphone = await mine.microphone.catch(() => null);
  await microphone?.close();
  if (microphone !== null && !mine.cut) viewer.finish();
}

/** Ends the user's turn, and what of it was not sent yet never will be. */
function cutTurn() {
  saying = null;
  if (turn !== null) turn.cut = true;
  talk.stop();
}

/** Says a sound file, a Blob or a promise of one. */
async function say(file) {
  cutTurn();
  viewer.sound.unlock();
  saying = file;
  try {
    const samples = await decodeFile(await file, RATE);
    if (saying !== file) return;
    forget();
    viewer.say(samples);
  } catch (error) {
    notify(error.message);
  }
}

async function fetchSpeech(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`The sentence cannot be had (HTTP ${response.status}).`);
  return response.blob();
}

function stop() {
  cutTurn();
  viewer.interrupt();
  show();
}

// What is shown.

/** The state, in words and in what can be pressed. */
function show() {
  const { state } = viewer;
  const told = talk.talking ? (turn.open ? "listening" : "opening") : state;
  document.body.dataset.state = told;
  if ($("state").textContent !== STATES[told]) $("state").textContent = STATES[told];
  $("talk").setAttribute("aria-pressed", talk.talking);
  const ending = talk.pressedAt === null ? "Press to end" : "Let go to end";
  $("talk-text").textContent = talk.talking ? ending : "Hold to talk";
  const away = state === "connecting" || state === "lost";
  $("talk").disabled = away || obstacle() !== null;
  for (const control of [$("stop"), $("file"), ...sentences]) control.disabled = away;
}

/** button: what the user can do about it, `dismiss` or `retry`, or nothing. */
function notify(message, button = "dismiss") {
  $("notice-text").textContent = message;
  $("notice").hidden = false;
  for (const id of ["dismiss", "retry"]) $(id).hidden = id !== button;
}

function forget() {
  $("notice").hidden = true;
}

function measure() {
  const away = !viewer.connected;
  const { delayS, dropped, drawn, received, pictures } = viewer;
  $("fps").textContent = away ? "-" : drawn.rate().toFixed(1);
  $("delay").textContent = delayS === null ? "-" : `${Math.round(1000 * delayS)} ms`;
  $("drops").textContent = away ? "-" : `${dropped}, ${pictures.late}`;
  $("data").textContent = away ? "-" : inWords(received.rate());
}

const STATES = {
  connecting: "Connecting",
  idle: "Ready",
  opening: "Opening the microphone",
  listening: "Listening",
  speaking: "Speaking",
  lost: "Not connected",
};
const NO_TENANT = "No avatar is installed here. Add one with “lipsync tenant add”, then try again.";

// Wiring.

viewer.addEventListener("change", show);
viewer.addEventListener("started", () => {
  retryS = FIRST_RETRY_S;
  forget();
  $("picture").setAttribute("aria-label", `The avatar ${viewer.tenant}`);
});
viewer.addEventListener("failed", ({ detail }) => notify(detail));
viewer.addEventListener("lost", ({ detail }) => lose(detail));
$("tenant").addEventListener("change", () => {
  cutTurn();
  history.replaceState(null, "", `#${encodeURIComponent($("tenant").value)}`);
  open();
});
$("patches").addEventListener("change", open);
$("stop").addEventListener("click", stop);
$("retry").addEventListener("click", open);
$("dismiss").addEventListener("click", forget);
window.addEventListener("online", () => viewer.state === "lost" && open());
for (const type of ["pointerdown", "keydown"]) document.addEventListener(type, () => viewer.sound.unlock());
document.addEventListener("keydown", ({ key }) => key === "Escape" && viewer.connected && stop());
for (const button of sentences) button.addEventListener("click", () => say(fetchSpeech(button.dataset.speech)));
$("file").addEventListener("change", () => {
  if ($("file").files.length > 0) say($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop-hint").hidden = false;
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (relatedTarget === null) $("drop-hint").hidden = true;
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop-hint").hidden = true;
  if (event.dataTransfer.files.length > 0 && viewer.connected) say(event.dataTransfer.files[0]);
});

if (obstacle() !== null) $("talk-hint").textContent = obstacle();
setInterval(measure, READOUT_MS);
open();
