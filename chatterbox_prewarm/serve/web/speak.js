// The form to speak a text: one request at a time, played while it arrives.

import { ask, events, showError } from "./api.js";
import { byId, element, facts, say, seconds } from "./dom.js";
import { Player, Samples } from "./sound.js";
import { showWave } from "./wave.js";

/** The settings of the sampling in the form. Each model has some of them. */
const CONTROLS = ["exaggeration", "cfg_weight", "temperature", "top_k"];

let ready = false;
let running = null; // the AbortController of the current request
let phase = "";
let models = []; // as /v1/models lists them
let voices = []; // the usable ones

/** Enable or disable the form. `phaseNow` is the activity of a server that is not ready. */
export function setReady(isReady, phaseNow) {
  ready = isReady;
  phase = phaseNow;
  update();
}

/** Show these voices in the form, each with `id` and, if they are known, `models`. Keep the selected one. */
export function setVoices(entries) {
  voices = entries;
  showVoices();
}

/** Show the models in the form, if there are several, and keep the selected one. */
export async function refreshModels() {
  models = (await (await ask("v1/models")).json()).data.filter((model) => model.task !== "conversion");
  const select = byId("model");
  const chosen = select.value;
  select.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  if (models.some((model) => model.id === chosen)) select.value = chosen;
  byId("model-field").hidden = models.length < 2;
  showModel();
}

/** Show what the selected model has: its languages, if there are several, its settings, tags and voices. */
function showModel() {
  const model = models.find((one) => one.id === byId("model").value);
  if (!model) return;
  const languages = Object.entries(model.languages);
  const language = byId("language").value;
  byId("language").replaceChildren(...languages.map(([code, name]) => new Option(name, code)));
  byId("language").value = Object.hasOwn(model.languages, language) ? language : model.language;
  byId("language-field").hidden = languages.length < 2;
  for (const name of CONTROLS) {
    const control = model.controls[name];
    byId(name).parentElement.hidden = !control;
    byId(name).disabled = !control; // the browser validates hidden fields too
    if (control) byId(name).placeholder = control.default ?? "of the voice";
  }
  byId("tags").hidden = model.tags.length === 0;
  byId("tags").replaceChildren(
    "Sounds: ",
    ...model.tags.map((tag) => element("button", { type: "button", class: "small", onclick: () => insert(tag) }, tag)),
  );
  showVoices();
}

/** Replace the selection in the text with a tag. */
function insert(tag) {
  const text = byId("text");
  text.setRangeText(tag, text.selectionStart, text.selectionEnd, "end");
  text.focus();
}

function showVoices() {
  const model = byId("model").value;
  const names = voices.filter((voice) => !model || !voice.models || voice.models.includes(model)).map((voice) => voice.id);
  const select = byId("voice");
  const chosen = select.value;
  if ([...select.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = names.includes(chosen) ? chosen : names.includes("default") ? "default" : (names[0] ?? "");
}

export function wireSpeak() {
  byId("speak").addEventListener("submit", (event) => {
    event.preventDefault();
    if (ready && !running) speak();
  });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("speak").requestSubmit();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("model").addEventListener("change", showModel);
}

function update(text) {
  byId("go").disabled = !ready || running !== null;
  byId("stop").disabled = running === null;
  if (text !== undefined) say(byId("speak-state"), text);
  else if (running === null && !ready) say(byId("speak-state"), `The server is not ready: ${phase}.`);
  else if (running === null && byId("speak-state").textContent.startsWith("The server is not ready")) say(byId("speak-state"), "");
}

/** Return the request body. A missing seed is drawn here, so that the page can show it. */
function order() {
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  const fields = {
    input: byId("text").value,
    voice: byId("voice").value,
    seed: byId("seed").value === "" ? drawn : Number(byId("seed").value),
    response_format: "pcm",
    stream_format: "sse", // its last event says whether the speech is complete
  };
  if (!byId("model-field").hidden) fields.model = byId("model").value;
  if (!byId("language-field").hidden) fields.language = byId("language").value;
  for (const name of [...CONTROLS, "look_ahead"]) {
    const field = byId(name);
    if (!field.parentElement.hidden && field.value !== "") fields[name] = Number(field.value);
  }
  return fields;
}

async function speak() {
  const fields = order();
  running = new AbortController();
  showError(byId("speak-error"), null);
  byId("player").pause();
  update("Waiting for the first audio …");
  let player = null;
  const samples = new Samples();
  const times = { began: performance.now(), first: null, last: null };
  let outcome = "";
  try {
    player = new Player();
    const answer = await ask("v1/audio/speech", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(fields),
      signal: running.signal,
    });
    const end = await receive(answer.body, player, samples, times);
    if (samples.length === 0) throw new Error("The server sent no audio.");
    show(fields, player, samples, times);
    outcome = incomplete(end);
    update(`All audio has arrived and is playing. ${outcome}`.trim());
    await Promise.race([player.finished(), aborted(running.signal)]);
  } catch (error) {
    if (error.name === "AbortError") outcome = `Stopped. ${outcome}`.trim();
    else showError(byId("speak-error"), samples.length ? brokenOff(samples, error) : error);
    if (samples.length && times.last !== null) show(fields, player, samples, times);
  }
  running = null;
  await player?.close();
  update(outcome);
}

/** Play the audio of a response. Returns its last event, which describes the speech. */
async function receive(body, player, samples, times) {
  for await (const event of events(body)) {
    if (event.type === "speech.audio.done") return event;
    if (event.type !== "speech.audio.delta") continue;
    times.last = performance.now();
    times.first ??= times.last;
    const fresh = samples.add(Uint8Array.from(atob(event.audio), (byte) => byte.charCodeAt(0)));
    if (fresh.length) player.play(fresh);
    update(`Playing. ${seconds(samples.seconds)} s have arrived.`);
  }
  throw new Error("The connection closed before the audio was complete.");
}

/** Return what is missing in the speech, as a sentence. */
function incomplete(end) {
  const sentences = [];
  if (end.skipped_parts) sentences.push(`Parts of the text that could not be spoken: ${end.skipped_parts}.`);
  if (end.finish_reason === "length") sentences.push("The token limit ended a part of the speech, whose end may be missing.");
  return sentences.join(" ");
}

/** Return a promise that rejects when the signal is aborted, also during playback after the request. */
function aborted(signal) {
  return new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
  });
}

function brokenOff(samples, error) {
  return new Error(`${seconds(samples.seconds)} s of audio arrived. Then: ${error.message}`);
}

function show(fields, player, samples, times) {
  const took = (times.last - times.began) / 1000;
  facts(byId("figures"), [
    ["first chunk", `${seconds((times.first - times.began) / 1000)} s`],
    ["total time", `${seconds(took)} s`],
    ["audio", `${seconds(samples.seconds)} s`],
    ["real-time factor", seconds(took / samples.seconds)],
    ["pauses", player.pauses],
    ["seed", fields.seed],
  ]);
  const audio = byId("player");
  URL.revokeObjectURL(audio.src);
  audio.src = URL.createObjectURL(samples.wav());
  const link = byId("download");
  link.href = audio.src;
  link.download = `${fields.voice}-${fields.seed}.wav`;
  byId("result").hidden = false;
  showWave(samples);
}
