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

/** Show an error in the element `place`, or clear the element if `error` is null. */
export function showError(place, error) {
  if (!error) return place.replaceChildren();
  const details = (error.details ?? []).join(" · ");
  return place.replaceChildren(
    element("p", { class: "error" }, error.message, details && "\n", details && element("code", {}, details)),
  );
}
