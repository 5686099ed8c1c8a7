// The box to type into and hear: one request at a time, played while it arrives.

import { ask, showError } from "./api.js";
import { byId, facts, say, seconds } from "./dom.js";
import { Player, Samples } from "./sound.js";

const NUMBERS = ["exaggeration", "cfg_weight", "temperature", "look_ahead"];

let ready = false;
let running = null; // the AbortController of the request that is being spoken
let phase = "";

/** Tell the form whether the server can speak, and what it does if not. */
export function setReady(isReady, phaseNow) {
  ready = isReady;
  phase = phaseNow;
  update();
}

/** Offer these voices, and keep the one that is chosen. */
export function setVoices(names) {
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
}

function update(text) {
  byId("go").disabled = !ready || running !== null;
  byId("stop").disabled = running === null;
  if (text !== undefined) say(byId("speak-state"), text);
  else if (running === null && !ready) say(byId("speak-state"), `The server is not ready: ${phase}.`);
  else if (running === null && byId("speak-state").textContent.startsWith("The server is not ready")) say(byId("speak-state"), "");
}

/** The fields as the API has them. A seed that was left out is drawn here, so that the sound can be had again. */
function order() {
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  const fields = {
    input: byId("text").value,
    voice: byId("voice").value,
    seed: byId("seed").value === "" ? drawn : Number(byId("seed").value),
    response_format: "pcm",
    stream_format: "audio",
  };
  for (const name of NUMBERS) if (byId(name).value !== "") fields[name] = Number(byId(name).value);
  return fields;
}

async function speak() {
  const fields = order();
  running = new AbortController();
  showError(byId("speak-error"), null);
  byId("player").pause();
  update("Waiting for the first sound …");
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
    await receive(answer.body.getReader(), player, samples, times);
    if (samples.length === 0) throw new Error("The server sent no sound.");
    show(fields, player, samples, times);
    update("All is here; playing to the end.");
    await Promise.race([player.finished(), aborted(running.signal)]);
  } catch (error) {
    if (error.name === "AbortError") outcome = "Stopped.";
    else showError(byId("speak-error"), samples.length ? brokenOff(samples, error) : error);
    if (samples.length && times.last !== null) show(fields, player, samples, times);
  }
  running = null;
  await player?.close();
  update(outcome);
}

async function receive(reader, player, samples, times) {
  for (;;) {
    const { done, value } = await reader.read().catch(explain);
    if (done) return;
    times.last = performance.now();
    times.first ??= times.last;
    const fresh = samples.add(value);
    if (fresh.length) player.play(fresh);
    update(`Playing: ${seconds(samples.seconds)} s have come.`);
  }
}

function explain(error) {
  throw error.name === "AbortError" ? error : new Error("The connection ended before the sound did.", { cause: error });
}

/** Rejects when the signal says so; the sound that plays out is stopped by the same button as the request. */
function aborted(signal) {
  return new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
  });
}

function brokenOff(samples, error) {
  return new Error(`${error.message} ${seconds(samples.seconds)} s of it came.`);
}

function show(fields, player, samples, times) {
  const took = (times.last - times.began) / 1000;
  facts(byId("figures"), [
    ["first chunk", `${seconds((times.first - times.began) / 1000)} s`],
    ["all", `${seconds(took)} s`],
    ["sound", `${seconds(samples.seconds)} s`],
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
}
