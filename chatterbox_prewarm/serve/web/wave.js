// The waveform of the latest speech. A click, or an arrow key, moves the player.

import { byId } from "./dom.js";

const STEP = 1; // seconds of an arrow key

const QUIETEST = 0.01; // silence must not look like speech

let peaks = []; // the lowest and the highest sample of each column, relative to the loudest sample

/** Show the waveform of these samples. */
export function showWave(samples) {
  const canvas = byId("wave");
  const columns = Math.max(1, Math.round(canvas.clientWidth));
  const absolute = samples.peaks(columns);
  const loudest = Math.max(QUIETEST, ...absolute.flat().map(Math.abs));
  peaks = absolute.map((range) => range.map((value) => value / loudest));
  canvas.setAttribute("aria-valuemax", samples.seconds.toFixed(1));
  draw();
}

export function wireWave() {
  const canvas = byId("wave");
  const player = byId("player");
  player.addEventListener("timeupdate", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  canvas.addEventListener("click", (event) => move((player.duration * event.offsetX) / canvas.clientWidth));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -STEP, ArrowRight: STEP }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    move(player.currentTime + step);
  });
}

function move(time) {
  const player = byId("player");
  if (Number.isFinite(player.duration)) player.currentTime = Math.max(0, Math.min(player.duration, time));
}

function draw() {
  const canvas = byId("wave");
  const player = byId("player");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const colour = (name) => getComputedStyle(canvas).getPropertyValue(name);
  const played = player.duration ? player.currentTime / player.duration : 0;
  peaks.forEach(([low, high], column) => {
    const x = (column / peaks.length) * width;
    context.fillStyle = colour(column / peaks.length < played ? "--good" : "--bar");
    const top = (height / 2) * (1 - high);
    context.fillRect(x, top, Math.max(1, width / peaks.length), Math.max(1, (height / 2) * (high - low)));
  });
  canvas.setAttribute("aria-valuenow", player.currentTime.toFixed(1));
  canvas.setAttribute("aria-valuetext", `${player.currentTime.toFixed(1)} s`);
}
