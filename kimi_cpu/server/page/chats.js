// Conversations in this browser's localStorage: one entry each, the oldest go when it is full.

const PREFIX = "kimi-cpu.chat.";
export const MAX_CHATS = 200;
/** Characters of all conversations together; browsers allow about five million. */
export const MAX_CHARS = 4_000_000;

const TEXTS = ["content", "reasoning_content", "error", "tool_call_id"];
const ROLES = ["user", "assistant", "tool"];

/**
 * A conversation: {id, title, named, created, updated, options, turns}.
 * named: the person gave the title. options: {system, temperature, maxTokens, tools, thinking}.
 * A turn: {role, content} and, of the assistant, {reasoning_content, tool_calls, finish, error,
 * usage, timings, model}; of a tool, {tool_call_id}.
 */
export function newChat(options = {}) {
  const now = Date.now();
  const id = `${now.toString(36)}-${crypto.getRandomValues(new Uint32Array(2)).join("")}`;
  return { id, title: "", named: false, created: now, updated: now, options: { ...options }, turns: [] };
}

export class Chats {
  /** onChange: called when another tab has changed, made or deleted the one with this id. */
  constructor(onChange) {
    this.storage = usable();
    this.all = new Map();
    this.sizes = new Map();
    this.unsaved = new Map();
    for (const id of this.#stored()) this.#read(id);
    window.addEventListener("storage", (event) => {
      if (event.storageArea !== this.storage || !event.key?.startsWith(PREFIX)) return;
      const id = event.key.slice(PREFIX.length);
      this.all.delete(id);
      this.sizes.delete(id);
      this.#read(id);
      onChange(id);
    });
  }

  /** {id, title, updated} of each, the latest first. */
  list() {
    return [...this.all.values(), ...this.unsaved.values()].sort((a, b) => b.updated - a.updated);
  }

  get chars() {
    return [...this.sizes.values()].reduce((sum, size) => sum + size, 0);
  }

  /** The whole conversation, or null. */
  load(id) {
    if (this.unsaved.has(id)) return this.unsaved.get(id);
    return decoded(id, quietly(() => this.storage.getItem(PREFIX + id)));
  }

  /**
   * Write a conversation. The oldest others are deleted when there is no room.
   * @returns {{removed: string[], saved: boolean}} titles of those, and whether it was written.
   */
  save(chat) {
    const text = JSON.stringify({ v: 1, ...chat });
    const removed = [];
    const room = () => this.chars - (this.sizes.get(chat.id) || 0) + text.length <= MAX_CHARS;
    const many = () => this.all.size + (this.all.has(chat.id) ? 0 : 1) > MAX_CHATS;
    let saved = false;
    if (this.storage && text.length <= MAX_CHARS) {
      while (!saved) {
        if (room() && !many()) {
          try {
            this.storage.setItem(PREFIX + chat.id, text);
            saved = true;
            break;
          } catch {
            // the browser's own limit
          }
        }
        const oldest = this.list().filter((other) => other.id !== chat.id && this.all.has(other.id)).pop();
        if (!oldest) break;
        removed.push(oldest.title);
        this.remove(oldest.id);
      }
    }
    if (saved) {
      this.unsaved.delete(chat.id);
      this.all.set(chat.id, summary(chat));
      this.sizes.set(chat.id, text.length);
    } else {
      this.unsaved.set(chat.id, chat);
    }
    return { removed, saved };
  }

  remove(id) {
    this.unsaved.delete(id);
    this.all.delete(id);
    this.sizes.delete(id);
    quietly(() => this.storage.removeItem(PREFIX + id));
  }

  removeAll() {
    for (const { id } of this.list()) this.remove(id);
  }

  #stored() {
    const keys = quietly(() => Object.keys(this.storage)) || [];
    return keys.filter((name) => name.startsWith(PREFIX)).map((name) => name.slice(PREFIX.length));
  }

  #read(id) {
    const text = quietly(() => this.storage.getItem(PREFIX + id));
    const chat = decoded(id, text);
    if (!chat) return;
    this.all.set(id, summary(chat));
    this.sizes.set(id, text.length);
  }
}

function summary({ id, title, updated }) {
  return { id, title, updated };
}

/** A conversation from its text, with everything of the wrong kind left out; null if damaged. */
function decoded(id, text) {
  const value = quietly(() => JSON.parse(text));
  if (!value || !Array.isArray(value.turns)) return null;
  const chat = newChat(typeof value.options === "object" && value.options ? value.options : {});
  chat.id = id;
  if (typeof value.title === "string") chat.title = value.title;
  chat.named = value.named === true;
  for (const name of ["created", "updated"]) if (Number.isFinite(value[name])) chat[name] = value[name];
  chat.turns = value.turns.filter((turn) => ROLES.includes(turn?.role)).map(cleaned);
  return chat;
}

function cleaned(turn) {
  const result = { ...turn };
  for (const name of TEXTS) if (name in result && typeof result[name] !== "string") delete result[name];
  result.content ??= "";
  const calls = Array.isArray(turn.tool_calls) ? turn.tool_calls : [];
  result.tool_calls = calls.filter(
    (call) =>
      typeof call?.id === "string" &&
      typeof call.function?.name === "string" &&
      typeof call.function.arguments === "string",
  );
  if (!result.tool_calls.length) delete result.tool_calls;
  return result;
}

/** Turns as OpenAI's messages, without what cannot be sent: empty replies, calls cut off. */
export function messages(chat, turns = chat.turns) {
  const result = [];
  if (chat.options.system) result.push({ role: "system", content: chat.options.system });
  for (const turn of turns) {
    if (turn.role === "user") {
      result.push({ role: "user", content: turn.content });
    } else if (turn.role === "tool") {
      result.push({ role: "tool", tool_call_id: turn.tool_call_id, content: turn.content });
    } else {
      const message = { role: "assistant", content: turn.content };
      if (turn.reasoning_content) message.reasoning_content = turn.reasoning_content;
      const calls = (turn.tool_calls || []).filter((call) => isJson(call.function.arguments));
      if (calls.length) message.tool_calls = calls;
      if (message.content || message.reasoning_content || calls.length) result.push(message);
    }
  }
  return result;
}

/** A conversation as Markdown. */
export function markdown(chat) {
  const parts = [`# ${chat.title || "Conversation"}`];
  if (chat.options.system) parts.push("## System", chat.options.system);
  for (const turn of chat.turns) {
    parts.push({ user: "## You", assistant: "## Reply", tool: `## Result of ${turn.tool_call_id}` }[turn.role]);
    if (turn.reasoning_content) parts.push(turn.reasoning_content.replace(/^/gm, "> "));
    if (turn.content) parts.push(turn.content);
    for (const call of turn.tool_calls || []) {
      parts.push(`Call of \`${call.function.name}\` (${call.id}):`, "```json\n" + call.function.arguments + "\n```");
    }
  }
  return parts.join("\n\n") + "\n";
}

export function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

function usable() {
  const storage = quietly(() => window.localStorage);
  return quietly(() => (storage.setItem("kimi-cpu.probe", "1"), storage.removeItem("kimi-cpu.probe"), storage));
}

function quietly(what) {
  try {
    return what();
  } catch {
    return null;
  }
}
