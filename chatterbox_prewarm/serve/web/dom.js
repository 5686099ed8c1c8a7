// Functions to create and fill elements, and to format numbers.

export const byId = (id) => document.getElementById(id);

/** Create an element. Attributes that are undefined or false are omitted. Names with "on…" add listeners. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Set the text of an element if it differs. Screen readers announce each change of a live region. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Fill a definition list with [name, value] pairs. Pairs without a value are omitted. */
export function facts(list, pairs) {
  const known = pairs.filter(([, value]) => value !== undefined && value !== "");
  list.replaceChildren(
    ...known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))),
  );
}

export const seconds = (value) => value.toFixed(2);

export const count = (value) => value.toLocaleString("en");

export function size(bytes) {
  if (bytes >= 1e10) return `${(bytes / 1e9).toFixed(0)} GB`;
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(1)} GB`;
  if (bytes >= 1e6) return `${(bytes / 1e6).toFixed(0)} MB`;
  return `${(bytes / 1e3).toFixed(0)} kB`;
}
