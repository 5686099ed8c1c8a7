// The content of /startupz: the waterfall of the start, the baked caches and the workers.

import { byId, count, element, facts, seconds, size } from "./dom.js";

const MARKS = ["attached", "ready"];
const MOST_REASONS = 6; // shown per cache family

/** The time at which the list of phases last grew. It gives an estimate of the duration of the current phase. */
let grown = { length: -1, at: 0 };

export function showFacts(status) {
  const marks = status.marks ?? {};
  facts(byId("facts"), [
    ...MARKS.map((name) => [name, name in marks ? `${seconds(marks[name])} s` : undefined]),
    ["start of", severalModels(status) ? status.model : undefined],
    ["profile", status.profile],
    ["warm state", status.cross_compiled ? `${status.state}, compiled without the GPU: unproven` : status.state],
    ["restarts", status.restarts],
  ]);
}

function severalModels(status) {
  return Object.keys(status.models ?? {}).length > 1;
}

/** Show the phases as bars and the marks as points, ordered by time. */
export function showWaterfall(status) {
  const phases = status.phases ?? [];
  const marks = Object.entries(status.marks ?? {}).filter(([name]) => MARKS.includes(name));
  const last = Math.max(0, ...phases.map((phase) => phase.start + phase.seconds));
  if (phases.length !== grown.length) grown = { length: phases.length, at: performance.now() };
  const running = !status.ready && !["draining", "worker gone", "starting", "attached"].includes(status.phase);
  const soFar = (performance.now() - grown.at) / 1000;
  const end = Math.max(last + (running ? soFar : 0), ...marks.map(([, at]) => at), 0.1);

  const rows = [
    ...phases.map((phase) => ({ ...phase, at: phase.start })),
    // A mark comes after all phases that began before it, including the phase that it ends.
    ...marks.map(([name, at]) => ({ name, at, mark: true })),
  ].sort((a, b) => a.at - b.at);
  if (running) rows.push({ name: status.phase, at: last, running: true, start: last, seconds: soFar });

  const table = byId("waterfall");
  table.hidden = rows.length === 0;
  const ticks = ticksUpTo(end);
  byId("axis").replaceChildren(...ticks.map((tick) => placed("span", "tick", tick / end, null, String(tick))));
  const lines = () => [
    ...ticks.map((tick) => placed("span", "grid", tick / end)),
    ...marks.map(([, at]) => placed("span", "moment", at / end)),
  ];
  table.tBodies[0].replaceChildren(...rows.map((row) => waterfallRow(row, end, lines())));

  const restarts = status.restarts ?? 0;
  const times = restarts === 1 ? "1 restart" : `${count(restarts)} restarts`;
  byId("start-note").textContent = rows.length
    ? `Seconds since exec${restarts ? `, for the latest start after ${times}` : ""}.`
    : "The server has not reported its start yet.";
}

function waterfallRow(row, end, lines) {
  const shape = row.mark
    ? placed("span", "moment point", row.at / end)
    : placed("span", row.running ? "bar running" : "bar", row.start / end, row.seconds / end);
  return element(
    "tr",
    { class: row.mark ? "mark" : undefined },
    element("th", { scope: "row" }, row.name),
    element("td", { class: "lane", "aria-hidden": "true" }, ...lines, shape),
    element("td", { class: "number from" }, seconds(row.at)),
    element("td", { class: "number" }, row.mark ? "" : row.running ? `> ${Math.floor(row.seconds)}` : seconds(row.seconds)),
  );
}

/** Create an element at a position of the axis. Position and width are fractions of its length. */
function placed(tag, name, left, width = null, text = "") {
  const made = element(tag, { class: name }, text);
  made.style.left = `${100 * left}%`;
  if (width !== null) made.style.width = `${100 * Math.min(width, 1 - left)}%`;
  return made;
}

/** Return at most five round numbers from zero to `end`, without those at the end whose label would not fit. */
function ticksUpTo(end) {
  const rough = end / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let index = 0; index * step < 0.93 * end; index += 1) ticks.push(Number((index * step).toPrecision(6)));
  return ticks;
}

export function showCaches(status) {
  const [loaded, hits, misses] = ["loaded", "hits", "misses"].map((kind) => status[kind] ?? {});
  const families = [...new Set([...Object.keys(loaded), ...Object.keys(hits), ...Object.keys(misses)])].sort();
  const table = byId("caches");
  table.hidden = families.length === 0;
  table.tBodies[0].replaceChildren(
    ...families.map((family) =>
      element(
        "tr",
        { "data-family": family },
        element("th", { scope: "row" }, family),
        counted(loaded[family]),
        counted(hits[family]),
        counted(misses[family], "missed"),
      ),
    ),
  );
  const total = Object.values(misses).reduce((sum, value) => sum + value, 0);
  byId("caches-note").textContent =
    families.length === 0
      ? "The server has not reported its caches yet."
      : total === 0
        ? "No misses. The server used all baked artifacts that it needed."
        : `${count(total)} ${total === 1 ? "miss" : "misses"}: artifacts rebuilt or skipped.`;
  byId("reasons").replaceChildren(...families.flatMap((family) => reasonsOf(family, status)));
}

/** List the first few distinct reasons for a family's misses, and how to mend them. */
function reasonsOf(family, status) {
  const nextSteps = status.next_steps ?? {};
  const times = new Map();
  for (const reason of (status.reasons ?? []).filter((text) => text.startsWith(`${family}: `))) {
    times.set(reason, (times.get(reason) ?? 0) + 1);
  }
  const first = [...times].slice(0, MOST_REASONS);
  const shown = first.map(([reason, number], index) => {
    const text = reason.slice(family.length + 2);
    const nextStep = nextSteps[reason];
    const again = index + 1 < first.length && nextSteps[first[index + 1][0]] === nextStep; // shown once, after the last
    return element(
      "li",
      {},
      element("b", {}, family),
      ` ${text}${number > 1 ? ` (${count(number)} times)` : ""}`,
      nextStep && !again ? element("p", { class: "next" }, "To mend it: ", ...withCode(nextStep)) : "",
    );
  });
  const left = times.size - shown.length;
  if (left > 0) shown.push(element("li", {}, element("b", {}, family), ` ${count(left)} more: see /startupz`));
  return shown;
}

/** Return the parts of a sentence, with the commands between backticks as code. */
function withCode(sentence) {
  return sentence.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function counted(value, alarm) {
  const name = value ? (alarm ?? "") : "none";
  return element("td", { class: `number ${name}`.trim() }, count(value ?? 0));
}

export function showWorkers(status) {
  const workers = status.workers ?? [];
  byId("workers-section").hidden = workers.length === 0;
  const onGpu = workers.some((worker) => worker.vram_bytes);
  const several = severalModels(status);
  const hasAdded = workers.some((worker) => worker.voices);
  byId("workers").querySelector(".model").hidden = !several;
  byId("workers").querySelector(".gpu").hidden = !onGpu;
  byId("workers").querySelector(".added").hidden = !hasAdded;
  byId("workers").tBodies[0].replaceChildren(
    ...workers.map((worker) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, worker.device),
        element("td", { hidden: !several }, worker.model),
        element("td", {}, worker.reason ? `${worker.phase}: ${worker.reason}` : worker.phase),
        element("td", {}, worker.busy ? "yes" : "no"),
        element("td", { class: "number" }, count(worker.restarts)),
        element("td", { class: "number" }, worker.rss_bytes ? size(worker.rss_bytes) : ""),
        element("td", { class: "number", hidden: !onGpu }, worker.vram_bytes ? size(worker.vram_bytes) : ""),
        element("td", { class: "number", hidden: !hasAdded }, worker.voices ? `${worker.voices}, ${size(worker.voice_bytes)}` : "none"),
      ),
    ),
  );
}
