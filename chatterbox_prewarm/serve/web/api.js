// Requests to the server this page came from, and its refusals in words.

import { element } from "./dom.js";

/** The address of `path`, relative to this page; without the name and password that the page's own may have. */
export function address(path) {
  return new URL(path, location.origin + location.pathname);
}

/** An answer that is an error, in the shape of OpenAI's API as far as it has it. */
export class Refusal extends Error {
  constructor(answer, error) {
    super(error?.message ?? `The server answered ${answer.status} without a word.`);
    const wait = answer.headers.get("retry-after");
    this.details = [
      `HTTP ${answer.status}`,
      error?.code,
      answer.status === 401 && "load the page again to be asked for the token",
      wait && `try again in ${wait} s`,
      answer.headers.get("x-request-id") && `request ${answer.headers.get("x-request-id")}`,
    ].filter(Boolean);
  }
}

/**
 * Fetch `path`, relative to this page.
 * Throws a Refusal for an answer that is an error, an AbortError when `options.signal` says so.
 */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(address(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.", { cause: error });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refusal(answer, body?.error);
}

/** Show what went wrong in `place`; nothing when there is no error. */
export function showError(place, error) {
  if (!error) return place.replaceChildren();
  const details = (error.details ?? []).join(" · ");
  return place.replaceChildren(
    element("p", { class: "error" }, error.message, details && "\n", details && element("code", {}, details)),
  );
}
