// Requests to the server of this page, and the display of its errors.

import { element } from "./dom.js";

/** Return the URL of `path`, relative to this page, without the user name and password of the page's URL. */
export function address(path) {
  return new URL(path, location.origin + location.pathname);
}

/** An error response. `error` is the object in OpenAI's format, or undefined if the body has another format. */
export class Refusal extends Error {
  constructor(answer, error) {
    super(error?.message ?? `The server responded with status ${answer.status} and no message.`);
    const wait = answer.headers.get("retry-after");
    this.details = [
      `HTTP ${answer.status}`,
      error?.code,
      answer.status === 401 && "reload the page to enter the token",
      wait && `retry in ${wait} s`,
      answer.headers.get("x-request-id") && `request ${answer.headers.get("x-request-id")}`,
    ].filter(Boolean);
  }
}

/**
 * Fetch `path`, relative to this page.
 * Throws a Refusal for an error response, and an AbortError when `options.signal` is aborted.
 */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(address(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server is not reachable.", { cause: error });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refusal(answer, body?.error);
}

/**
 * Yield the server-sent events of a response: each is a line of JSON after "data: ", and an empty line. Skip others.
 * Throws the error that an event contains. When the caller stops, the request ends.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Error("The connection closed too early.", { cause: error });
      });
      if (done) return;
      const parts = (text + value).split(/\r?\n\r?\n/);
      text = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const event = JSON.parse(part.slice("data: ".length));
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Show an error in the element `place`, or clear the element if `error` is null. */
export function showError(place, error) {
  if (!error) return place.replaceChildren();
  const details = (error.details ?? []).join(" · ");
  return place.replaceChildren(
    element("p", { class: "error" }, error.message, details && "\n", details && element("code", {}, details)),
  );
}
