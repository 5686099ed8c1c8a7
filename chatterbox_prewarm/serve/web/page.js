// Request /startupz regularly, and show its response.

import { address } from "./api.js";
import { byId, say } from "./dom.js";
import { wireRecord } from "./record.js";
import { refreshModels, setReady, wireSpeak } from "./speak.js";
import { showCaches, showFacts, showWaterfall, showWorkers } from "./startup.js";
import { refreshVoices, wireVoices } from "./voices.js";
import { wireWave } from "./wave.js";

const WHILE_STARTING = 1000; // milliseconds between two requests
const ONCE_READY = 5000;
const PATIENCE = 4000;

let latest = {};
let seen = null; // the time of the latest response
let voicesShown = null;
let timer = 0;
let asking = false;

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden) return; // the visibilitychange listener polls again when the page is visible
  asking = true;
  try {
    // Status 503 also has a body. The probe returns it until the warm state is attached.
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
  say(byId("updated"), `Updated at ${seen.toLocaleTimeString("en-GB")}, every ${every / 1000} s.`);
  // The server knows its voices once the model is loaded. The list is fetched when their names change.
  const voices = JSON.stringify(latest.attached ? (latest.voices ?? []) : []);
  if (latest.attached && voices !== voicesShown) {
    voicesShown = voices;
    refreshVoices(latest.voices ?? []);
    refreshModels().catch(() => { voicesShown = null; }); // asked again with the next poll
  }
}

function headline() {
  if (latest.phase === "draining") return "shutting down";
  if (latest.ready) return "ready";
  if (latest.attached) return `not ready: ${latest.phase}`;
  if (latest.phase === "worker gone") return "not ready: the worker ended, and the server starts a new one";
  return latest.phase === "starting" ? "starting" : `starting: ${latest.phase}`;
}

function showLost() {
  latest = { ...latest, ready: false };
  voicesShown = null;
  say(byId("state"), seen ? `no response since ${seen.toLocaleTimeString("en-GB")}` : "no response");
  byId("state").className = "state bad";
  setReady(false, "it does not respond");
}

document.addEventListener("visibilitychange", poll);
wireSpeak();
wireVoices();
wireRecord();
wireWave();
poll();
