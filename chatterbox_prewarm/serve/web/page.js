// The page's clock: ask /startupz again and again, and show what it says.

import { address } from "./api.js";
import { byId, say } from "./dom.js";
import { setReady, wireSpeak } from "./speak.js";
import { showCaches, showFacts, showWaterfall, showWorkers } from "./startup.js";
import { refreshVoices, wireVoices } from "./voices.js";

const WHILE_STARTING = 1000; // milliseconds between two questions
const ONCE_READY = 5000;
const PATIENCE = 4000;

let latest = {};
let seen = null; // when the server last answered
let voicesShown = null;
let timer = 0;
let asking = false;

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden) return; // asked again when somebody looks
  asking = true;
  try {
    // 503 is an answer too: it is what the probe says until the state is attached.
    const answer = await fetch(address("startupz"), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    latest = await answer.json();
    seen = new Date();
    show();
  } catch {
    showLost();
  }
  asking = false;
  timer = setTimeout(poll, latest.ready ? ONCE_READY : WHILE_STARTING);
}

function show() {
  const state = byId("state");
  const gone = ["worker gone", "draining"].includes(latest.phase);
  say(state, headline());
  state.className = `state ${latest.ready ? "good" : gone ? "bad" : ""}`.trim();
  showFacts(latest);
  showWaterfall(latest);
  showCaches(latest);
  showWorkers(latest);
  setReady(Boolean(latest.ready), latest.phase);
  const every = latest.ready ? ONCE_READY : WHILE_STARTING;
  say(byId("updated"), `As of ${seen.toLocaleTimeString("en-GB")}, asked every ${every / 1000} s.`);
  // The voices are known once the model is in place; their list is fetched whenever it changes.
  const voices = JSON.stringify(latest.attached ? (latest.voices ?? []) : []);
  if (latest.attached && voices !== voicesShown) {
    voicesShown = voices;
    refreshVoices(latest.voices ?? []);
  }
}

function headline() {
  if (latest.phase === "draining") return "shutting down";
  if (latest.ready) return "ready";
  if (latest.attached) return `not ready: ${latest.phase}`;
  if (latest.phase === "worker gone") return "not ready: the worker is gone, another is being started";
  return latest.phase === "starting" ? "starting" : `starting: ${latest.phase}`;
}

function showLost() {
  latest = { ...latest, ready: false };
  voicesShown = null;
  say(byId("state"), seen ? `no answer since ${seen.toLocaleTimeString("en-GB")}` : "no answer");
  byId("state").className = "state bad";
  setReady(false, "it does not answer");
}

document.addEventListener("visibilitychange", poll);
wireSpeak();
wireVoices();
poll();
