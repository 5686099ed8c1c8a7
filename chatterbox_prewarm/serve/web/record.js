// Record a clip with the microphone, as a file for the form that adds a voice.

import { byId, say, seconds } from "./dom.js";
import { showError } from "./api.js";
import { SAMPLE_RATE, wavFile } from "./sound.js";

const LONGEST = 30; // seconds; the model uses the first 10

let stop = null; // ends the current recording

/** Show the button where the browser offers a microphone: on HTTPS, or on this machine. */
export function wireRecord() {
  const offered = Boolean(navigator.mediaDevices?.getUserMedia && window.MediaRecorder);
  byId("record").hidden = !offered;
  byId("record").addEventListener("click", () => (stop ? stop() : record()));
}

async function record() {
  byId("record").disabled = true; // until the recording begins: a second click would start a second one
  showError(byId("voices-error"), null);
  let stream = null;
  try {
    // The model hears the clip as it is; the browser's filters would change the voice.
    const filters = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, ...filters } });
    use(await capture(stream));
  } catch (error) {
    say(byId("voices-state"), "");
    showError(byId("voices-error"), explained(error));
  }
  stream?.getTracks().forEach((track) => track.stop());
  stop = null;
  byId("record").disabled = false;
  byId("record").textContent = "Record";
}

/** Record until the button is pressed again, or for LONGEST seconds. Returns the encoded recording. */
async function capture(stream) {
  const pieces = [];
  const recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  const stopped = new Promise((resolve, reject) => {
    recorder.addEventListener("stop", resolve);
    recorder.addEventListener("error", (event) => reject(event.error ?? new Error("The recording failed.")));
  });
  const began = performance.now();
  const show = () => {
    const length = (performance.now() - began) / 1000;
    say(byId("voices-state"), `Recording: ${length.toFixed(0)} s.`);
    if (length >= LONGEST) stop();
  };
  recorder.start();
  stop = () => {
    if (recorder.state === "recording") recorder.stop();
  };
  byId("record").disabled = false;
  byId("record").textContent = "Stop recording";
  show();
  const timer = setInterval(show, 250);
  await stopped.finally(() => clearInterval(timer));
  return decoded(new Blob(pieces));
}

/** Return the samples of a recording at SAMPLE_RATE, mono. The server does not read the browser's formats. */
async function decoded(recording) {
  const context = new OfflineAudioContext(1, 1, SAMPLE_RATE);
  return (await context.decodeAudioData(await recording.arrayBuffer())).getChannelData(0);
}

/** Put the recording into the form, as if it had been chosen as a file, and let the user hear it. */
function use(samples) {
  const clip = Int16Array.from(samples, (value) => Math.round(32767 * Math.max(-1, Math.min(1, value))));
  const file = new File([wavFile([clip], clip.length)], "recording.wav", { type: "audio/wav" });
  const list = new DataTransfer();
  list.items.add(file);
  byId("file").files = list.files;
  const audio = byId("preview");
  URL.revokeObjectURL(audio.src);
  audio.src = URL.createObjectURL(file);
  audio.hidden = false;
  say(byId("voices-state"), `Recorded ${seconds(clip.length / SAMPLE_RATE)} s. Enter a name and press Add.`);
}

function explained(error) {
  if (error.name === "NotAllowedError") return new Error("The browser does not allow this page to use the microphone.");
  if (error.name === "NotFoundError") return new Error("There is no microphone.");
  return error;
}
