// The voices: list, preview, add and delete.

import { ask, showError } from "./api.js";
import { byId, element, say, size } from "./dom.js";
import { setVoices } from "./speak.js";

let shown = ""; // the list in the table, as JSON
let known = []; // the names in the latest response of /startupz

/** Fetch and show the list. `names` from /startupz are used in the form if the server does not return the list. */
export async function refreshVoices(names = known) {
  known = names;
  let voices = [];
  try {
    voices = (await (await ask("v1/audio/voices")).json()).data;
    showError(byId("voices-error"), null);
  } catch (error) {
    setVoices(names.map((id) => ({ id })));
    showError(byId("voices-error"), error);
    return;
  }
  setVoices(voices.filter((voice) => voice.usable));
  const described = JSON.stringify(voices);
  if (described === shown) return; // keeps the keyboard focus in the table
  shown = described;
  byId("voices").hidden = voices.length === 0;
  byId("voices").tBodies[0].replaceChildren(...voices.map(row));
}

function row(voice) {
  const date = voice.created ? ` ${new Date(1000 * voice.created).toISOString().slice(0, 10)}` : "";
  const kind = voice.baked ? ["baked"] : ["added", element("span", { class: "date" }, date)];
  if (voice.reason) {
    const only = voice.usable ? `only for ${voice.models.join(", ")}` : "cannot be used";
    kind.push(element("p", { class: "error" }, `${only}: ${voice.reason}`));
  }
  const button = (text, action) =>
    element("button", { type: "button", class: "small", "aria-label": `${text} ${voice.id}`, onclick: () => action(voice.id) }, text);
  return element(
    "tr",
    { "data-voice": voice.id },
    element("th", { scope: "row" }, voice.id),
    element("td", {}, ...kind),
    element("td", { class: "number" }, size(voice.bytes)),
    element("td", { class: "actions" }, voice.usable ? button("Preview", preview) : "", voice.baked ? "" : button("Delete", remove)),
  );
}

async function preview(name) {
  await attempt(`Speaking with ${name} …`, async () => {
    const answer = await ask(`v1/audio/voices/${encodeURIComponent(name)}/preview`);
    const audio = byId("preview");
    URL.revokeObjectURL(audio.src);
    audio.src = URL.createObjectURL(await answer.blob());
    audio.hidden = false;
    await audio.play();
    return `This is ${name}.`;
  });
}

async function remove(name) {
  if (!window.confirm(`Delete the voice “${name}”?`)) return;
  await attempt(`Deleting ${name} …`, async () => {
    await ask(`v1/audio/voices/${encodeURIComponent(name)}`, { method: "DELETE" });
    await refreshVoices();
    return `${name} was deleted.`;
  });
}

async function add() {
  const name = byId("name").value.trim();
  const body = new FormData();
  body.set("name", name);
  body.set("file", byId("file").files[0]);
  byId("add-button").disabled = true;
  await attempt(`Preparing ${name} …`, async () => {
    await ask("v1/audio/voices", { method: "POST", body });
    byId("add").reset();
    await refreshVoices();
    return `${name} was added.`;
  });
  byId("add-button").disabled = false;
}

async function attempt(doing, action) {
  showError(byId("voices-error"), null);
  say(byId("voices-state"), doing);
  try {
    say(byId("voices-state"), await action());
  } catch (error) {
    say(byId("voices-state"), "");
    showError(byId("voices-error"), error);
  }
}

export function wireVoices() {
  byId("add").addEventListener("submit", (event) => {
    event.preventDefault();
    add();
  });
}
