// Talking to the server: the key, errors as one line, streams of server-sent events.

const KEY = "kimi-cpu.key";

/** What went wrong, as one line for the person. */
export class ServerError extends Error {
  /** @param {number} status 0: no answer at all */
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get() {
    for (const storage of storages()) {
      const value = storage.getItem(KEY);
      if (value) return value;
    }
    return this.unsaved || "";
  },
  /** Keep it for this tab, or with `keep` for this browser. */
  set(value, keep) {
    this.unsaved = value;
    const [session, local] = [quietly(() => sessionStorage), quietly(() => localStorage)];
    for (const storage of storages()) quietly(() => storage.removeItem(KEY));
    if (value) quietly(() => (keep ? local : session).setItem(KEY, value));
  },
  unsaved: "",
};

function storages() {
  return [quietly(() => sessionStorage), quietly(() => localStorage)].filter(Boolean);
}

function quietly(what) {
  try {
    return what();
  } catch {
    return null; // storage is forbidden or full
  }
}

function headers(more = {}) {
  const value = key.get();
  return value ? { ...more, Authorization: `Bearer ${value}` } : more;
}

/** A response with status 200; ServerError otherwise, AbortError when aborted. */
export async function ask(path, { body, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: headers(body === undefined ? {} : { "Content-Type": "application/json" }),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  let said = {};
  try {
    said = (await response.json()).error || {};
  } catch {
    // not one of the server's own errors, a proxy's perhaps
  }
  const message = said.message || `The server answered ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  const hint = response.status === 429 && wait ? ` (in ${wait} s)` : "";
  throw new ServerError(response.status, sentence(message) + hint, said.code);
}

/** The state of the server; never throws. `{status: "unreachable"}` when there is no answer. */
export async function health() {
  try {
    const response = await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(8000) });
    const body = await response.json();
    return body.status ? body : { status: "unreachable", message: body.error?.message };
  } catch {
    return { status: "unreachable" };
  }
}

/**
 * Server-sent events of a response: {event, data} with data as text, {comment} for comments.
 * Ends with the response; throws ServerError when the connection breaks.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError(0, "The connection to the server broke.");
      }
      if (part.done) return;
      rest += part.value;
      let end;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const event = parsed(rest.slice(0, end));
        rest = rest.slice(end + 2);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  const event = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith(":")) return { comment: line.slice(1).trim() };
    const colon = line.indexOf(":");
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (line.startsWith("data:")) event.data += (event.data && "\n") + value;
    else if (line.startsWith("event:")) event.event = value;
  }
  return event.data ? event : null;
}

/** The chunks of a chat completion; `onComment` is told what the server says meanwhile. */
export async function* chat(body, signal, onComment) {
  const response = await ask("/v1/chat/completions", { body, signal });
  for await (const event of events(response)) {
    if (event.comment !== undefined) {
      onComment(event.comment);
    } else if (event.data === "[DONE]") {
      return;
    } else {
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new ServerError(500, sentence(chunk.error.message), chunk.error.code);
      yield chunk;
    }
  }
  throw new ServerError(0, "The connection to the server broke.");
}

/** A message as a sentence: begins large and ends with a full stop. */
export function sentence(text) {
  const trimmed = String(text).trim();
  // Names of fields stay as they are.
  const begun = /^[a-z]+[ ,]/.test(trimmed) ? trimmed.charAt(0).toUpperCase() + trimmed.slice(1) : trimmed;
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
