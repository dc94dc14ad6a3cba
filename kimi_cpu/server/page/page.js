// The page: which conversation is open, and what happens to it.

import { ask, chat as streamed, health, key, sentence } from "/static/api.js";
import { Chats, isJson, MAX_CHARS, markdown, messages, newChat } from "/static/chats.js";
import { closeSide, dialog, setUpChrome, toast } from "/static/chrome.js";
import { RoutingMap } from "/static/routing.js";
import { copy, count, grow, h, rate, ReplyView, UserView } from "/static/view.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = ["What is 17 + 25?", "What is the capital of France?", "Which is larger, 41 or 14?"];
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "calculator",
      description: "Evaluate an arithmetic expression.",
      parameters: {
        type: "object",
        properties: { expression: { type: "string" } },
        required: ["expression"],
      },
    },
  },
];
const TITLE_CHARS = 60;
const SAVE_EVERY_MS = 2000;

let current = newChat();
let views = [];
const runs = new Map(); // id of a conversation -> its reply under way, {chat, turn, abort, draw}
const running = () => runs.get(current.id);
let server = { status: "connecting" };
let context = 0; // the model's, in tokens
let follow = true; // the end of the log is kept in sight

const chats = new Chats((id) => {
  drawList();
  if (id === current.id && !running()) open(id, false);
});
const map = new RoutingMap($("map"), $("map-text"));

// --- The server's state -------------------------------------------------------------------------

let becameReady;
let ready = new Promise((resolve) => (becameReady = resolve));

async function watch() {
  for (let i = 0; ; i++) {
    const due = server.status !== "ready" || i % 10 === 0;
    if (due && !document.hidden) await look();
    await new Promise((done) => setTimeout(done, 1500));
  }
}

async function look() {
  const before = server.status;
  server = await health();
  if (server.status === "ready" && before !== "ready") {
    becameReady();
    await welcome();
  } else if (server.status !== "ready" && before === "ready") {
    ready = new Promise((resolve) => (becameReady = resolve));
    map.show(false);
  }
  drawState();
}

/** What can be known once the model is there. */
async function welcome() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    context = data[0]?.max_model_len || 0;
    $("key-open").hidden = true;
  } catch (error) {
    if (error.status === 401) {
      $("key-open").hidden = false;
      askKey(key.get() ? "The key was not accepted." : "");
    }
  }
  map.show(routingShown());
}

function drawState() {
  const { status, phase, loading_s, model } = server;
  const texts = {
    connecting: "Connecting",
    ready: model || "Ready",
    loading: `Loading the model${phase ? `: ${phase}` : ""}${loading_s ? `, ${Math.round(loading_s)} s` : ""}`,
    failed: "The model could not be loaded; the server's log says why",
    unreachable: sentence(server.message || "the server does not answer").replace(/\.$/, ""),
    stopping: "The server is stopping",
    stopped: "The server has stopped",
  };
  if ($("state").textContent !== (texts[status] ?? status)) $("state").textContent = texts[status] ?? status;
  $("dot").className = `dot ${status}`;
  document.title = current.title ? `${current.title} · kimi-cpu` : `${model || "kimi-cpu"} · kimi-cpu`;
  $("empty-title").textContent = model ? `Talk to ${model}` : "Ask something";
  $("empty-text").textContent =
    status === "ready" || status === "connecting"
      ? "It runs on this server's processor alone. What you write stays between it and this browser."
      : status === "loading"
        ? "The model is loading. What you send now is answered when it is there."
        : "Until the server answers again, you can read what is here.";
  $("examples").hidden = model !== "nano";
}

/** The line of figures below: of the reply that grows, or of the last one. */
function drawFigures(turn, live = null) {
  const parts = [];
  const { timings, usage } = turn || {};
  const tps = live ? live.tps : timings?.predicted_per_second;
  if (tps) {
    parts.push(`${live ? "about " : ""}${rate(tps)} tokens/s`);
    if (server.ceiling_tps) parts.push(`${rate((100 * tps) / server.ceiling_tps)} % of what memory allows`);
  }
  if (timings) {
    const prompt = timings.prompt_n + timings.cache_n;
    parts.push(`${count(timings.cache_n)} of ${count(prompt)} prompt tokens cached`);
  }
  if (usage && context) parts.push(`context ${count(usage.total_tokens)} of ${count(context)}`);
  $("figures").textContent = parts.join(" · ");
}

async function askKey(problem = "") {
  if ($("key").open) return;
  $("key-hint").textContent = problem || "This server wants the key that it was started with.";
  $("key-value").value = key.get();
  if ((await dialog("key", "key-value")) !== "ok") return;
  key.set($("key-value").value.trim(), $("key-keep").checked);
  map.show(false);
  if (server.status === "ready") await welcome();
}

// --- Conversations ------------------------------------------------------------------------------

function drawList() {
  const items = chats.list().map(({ id, title, updated }) => {
    const item = h("button", { type: "button", onclick: () => open(id) }, h("span", { className: "name" }, title || "Untitled"));
    item.append(h("time", { dateTime: new Date(updated).toISOString() }, ago(updated)));
    if (id === current.id) item.setAttribute("aria-current", "true");
    if (runs.has(id)) item.append(h("span", { className: "dot loading", title: "A reply is under way" }, h("span", { className: "sr" }, "A reply is under way")));
    return h("li", {}, item);
  });
  $("chats").replaceChildren(...items);
  $("no-chats").hidden = items.length > 0;
}

function ago(time) {
  const date = new Date(time);
  const today = new Date().toDateString() === date.toDateString();
  return date.toLocaleString(undefined, today ? { hour: "2-digit", minute: "2-digit" } : { day: "numeric", month: "short" });
}

function open(id, focus = true) {
  const loaded = runs.get(id)?.chat || chats.load(id);
  if (loaded) show(loaded, focus);
  else if (id === current.id) show(newChat(current.options), focus); // deleted in another tab
}

function show(chat, focus = true) {
  current = chat;
  remember("kimi-cpu.open", chat.turns.length ? chat.id : "");
  $("thinking").value = chat.options.thinking || "";
  drawTurns();
  drawButtons();
  running()?.draw();
  drawList();
  toEnd(true);
  closeSide();
  if (focus && matchMedia("(hover: hover)").matches) $("prompt").focus();
}

function save(chat = current) {
  chat.updated = Date.now();
  if (!chat.title) {
    const said = chat.turns.find((turn) => turn.role === "user")?.content.trim().replace(/\s+/g, " ") || "";
    chat.title = said.length > TITLE_CHARS ? `${said.slice(0, TITLE_CHARS - 1).trimEnd()}…` : said;
  }
  const { removed, saved } = chats.save(chat);
  if (!saved) toast("This conversation cannot be kept in this browser: there is no room. Export it if you need it.");
  else if (removed.length) toast(`To make room, ${removed.length === 1 ? "the oldest conversation was" : `${removed.length} old conversations were`} deleted.`);
  if (chat === current) {
    remember("kimi-cpu.open", chat.id);
    $("title").textContent = chat.title || "New conversation";
  }
  drawList();
}

function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // it is a convenience
  }
}

function remembered(name) {
  try {
    return localStorage.getItem(name) || "";
  } catch {
    return "";
  }
}

async function rename() {
  $("rename-value").value = current.title;
  if ((await dialog("rename-dialog", "rename-value")) !== "ok" || !$("rename-value").value.trim()) return;
  current.title = $("rename-value").value.trim();
  if (current.turns.length) save();
  $("title").textContent = current.title;
}

function remove() {
  if (!current.turns.length) return;
  stop();
  const gone = current;
  chats.remove(gone.id);
  show(newChat(gone.options));
  toast(`“${gone.title}” was deleted.`, () => {
    chats.save(gone);
    show(gone);
  });
}

async function exported() {
  if (!current.turns.length) return toast("There is nothing to export yet.");
  const kind = await dialog("export-dialog");
  if (kind !== "json" && kind !== "md") return;
  const { title, created, updated, options } = current;
  const text = kind === "md" ? markdown(current) : JSON.stringify({ title, created, updated, options, messages: messages(current) }, null, 2);
  const url = URL.createObjectURL(new Blob([text], { type: kind === "md" ? "text/markdown" : "application/json" }));
  const name = (title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  h("a", { href: url, download: `${name || "conversation"}.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// --- Turns --------------------------------------------------------------------------------------

function drawTurns() {
  views = current.turns.map(viewOf);
  $("turns").replaceChildren(...views.filter(Boolean).map((view) => view.element));
  $("empty").hidden = current.turns.length > 0;
  $("title").textContent = current.title || "New conversation";
  for (const id of ["export", "delete"]) $(id).disabled = !current.turns.length;
  drawReplies();
  drawFigures(current.turns.findLast((turn) => turn.role === "assistant"));
  drawState();
}

function viewOf(turn) {
  if (turn.role === "user") {
    return new UserView(turn, {
      edit: (text) => edited(turn, text),
      laterTurns: () => current.turns.length - 1 - current.turns.indexOf(turn),
    });
  }
  if (turn.role === "tool") return null; // shown with its call
  return new ReplyView(turn, { retry: () => retry(turn), sendResults: (results) => sendResults(turn, results) });
}

function drawReplies() {
  current.turns.forEach((turn, i) => {
    if (views[i] instanceof ReplyView && turn !== running()?.turn) views[i].update({ last: i === current.turns.length - 1, answered: results(i) });
  });
}

/** Results of the calls of turn i: id -> content. */
function results(i) {
  const found = new Map();
  for (let k = i + 1; current.turns[k]?.role === "tool"; k++) found.set(current.turns[k].tool_call_id, current.turns[k].content);
  return found;
}

function send(text) {
  if (running() || !text.trim()) return;
  current.turns.push({ role: "user", content: text });
  reply();
}

function edited(turn, text) {
  stop();
  current.turns.length = current.turns.indexOf(turn);
  send(text);
}

function retry(turn) {
  if (running()) return;
  current.turns.length = current.turns.indexOf(turn);
  reply();
}

function sendResults(turn, given) {
  if (running() || current.turns.at(-1) !== turn) return;
  for (const { id, content } of given) current.turns.push({ role: "tool", tool_call_id: id, content });
  reply();
}

/** End the reply to the open conversation; whether there was one. */
function stop() {
  const run = running();
  if (!run) return false;
  runs.delete(current.id);
  run.abort.abort();
  drawButtons();
  return true;
}

function requestBody(chat) {
  const { temperature, maxTokens, tools, thinking } = chat.options;
  const body = { messages: messages(chat), stream: true, stream_options: { include_usage: true } };
  if (Number.isFinite(temperature)) body.temperature = temperature;
  if (Number.isFinite(maxTokens)) body.max_tokens = maxTokens;
  if (tools && isJson(tools) && JSON.parse(tools).length) body.tools = JSON.parse(tools);
  if (thinking) body.reasoning_effort = thinking;
  return body;
}

/** Ask for the next turn and show it as it comes. */
async function reply() {
  const chat = current;
  const body = requestBody(chat);
  const turn = { role: "assistant", content: "" };
  const abort = new AbortController();
  chat.turns.push(turn);
  const run = { chat, turn, abort, draw: () => {} };
  runs.set(chat.id, run);
  save();
  drawTurns();
  drawButtons();
  follow = true;
  let waiting = server.status === "ready" ? "Sent" : "Waiting for the model";
  let frame = 0;
  let [tokens, first, savedAt] = [0, 0, Date.now()];
  let rest = 0; // until then the page does something else than drawing
  const draw = () => {
    const begun = performance.now();
    frame = 0;
    if (begun < rest) return void (frame = requestAnimationFrame(draw));
    if (current !== chat || runs.get(chat.id) !== run) return;
    const visible = turn.content || turn.tool_calls || turn.reasoning_content;
    views[chat.turns.indexOf(turn)].update({ live: true, waiting: visible ? "" : waiting });
    const elapsed = (performance.now() - first) / 1000;
    if (tokens > 2 && elapsed > 0.2) drawFigures(null, { tps: (tokens - 1) / elapsed });
    toEnd();
    rest = performance.now() + 2 * (performance.now() - begun);
  };
  const soon = () => (frame ||= requestAnimationFrame(draw));
  run.draw = soon;
  soon();
  say("Sent.");
  try {
    await Promise.race([ready, aborted(abort.signal)]);
    abort.signal.throwIfAborted();
    for await (const chunk of streamed(body, abort.signal, (comment) => {
      waiting = commented(comment);
      soon();
    })) {
      if (chunk.timings) turn.timings = chunk.timings;
      if (chunk.usage) turn.usage = chunk.usage;
      if (chunk.model) turn.model = chunk.model;
      const choice = chunk.choices[0];
      if (choice) {
        if (add(turn, choice.delta)) {
          first ||= performance.now();
          tokens += 1;
        }
        if (choice.finish_reason) turn.finish = choice.finish_reason;
      }
      if (runs.get(chat.id) === run && Date.now() - savedAt > SAVE_EVERY_MS) {
        savedAt = Date.now();
        chats.save(chat);
      }
      soon();
    }
  } catch (error) {
    if (abort.signal.aborted) turn.finish = "stopped";
    else if (error.status !== undefined) turn.error = error.message;
    else {
      console.error(error);
      turn.error = "The page could not read the reply.";
    }
    if (error.status === 401) askKey(key.get() ? "The key was not accepted." : "");
    if (error.status !== 400) look();
  }
  cancelAnimationFrame(frame);
  if (runs.get(chat.id) === run) runs.delete(chat.id);
  ended(chat, turn);
}

/** A reply is over, however that came. */
function ended(chat, turn) {
  if (!chat.turns.includes(turn)) return; // edited meanwhile
  if (current === chat || chats.load(chat.id)) save(chat);
  if (current !== chat) return;
  drawReplies();
  drawFigures(turn);
  drawButtons();
  toEnd();
  const calls = (turn.tool_calls || []).map((call) => `It calls ${call.function.name}.`).join(" ");
  say(turn.error || (turn.finish === "stopped" ? "Stopped." : `Reply: ${turn.content.slice(0, 2000)} ${calls}`));
  if (calls && !turn.error) $("turns").querySelector(".reply:last-child textarea")?.focus();
}

/** Add a part to a turn; whether it was text of the model. */
function add(turn, delta) {
  let text = false;
  for (const name of ["content", "reasoning_content"]) {
    if (delta[name]) {
      turn[name] = (turn[name] || "") + delta[name];
      text = true;
    }
  }
  for (const part of delta.tool_calls || []) {
    const calls = (turn.tool_calls ||= []);
    calls[part.index] ||= { id: part.id, type: "function", function: { name: part.function.name, arguments: "" } };
    calls[part.index].function.arguments += part.function.arguments || "";
    text = true;
  }
  return text;
}

function commented(comment) {
  const match = /^reading (\d+) of (\d+) tokens$/.exec(comment);
  return match ? `Reading the prompt: ${count(+match[1])} of ${count(+match[2])} tokens` : "Working";
}

function aborted(signal) {
  return new Promise((resolve) => signal.addEventListener("abort", resolve, { once: true }));
}

function drawButtons() {
  const focused = document.activeElement;
  $("send").hidden = Boolean(running());
  $("stop").hidden = !running();
  $("log").setAttribute("aria-busy", String(Boolean(running())));
  if (focused === $("send") || focused === $("stop")) $("prompt").focus();
}

function say(text) {
  $("announce").textContent = text;
}

function toEnd(always = false) {
  if (always) follow = true;
  if (follow) $("log").scrollTop = $("log").scrollHeight;
}

// --- Settings -----------------------------------------------------------------------------------

async function settings() {
  const { system = "", temperature, maxTokens, tools = "" } = current.options;
  $("system").value = system;
  $("temperature").value = temperature ?? "";
  $("max-tokens").value = maxTokens ?? "";
  $("tools").value = tools;
  $("tools-error").hidden = true;
  const kept = chats.list().length;
  $("storage").textContent = `${count(kept)} ${kept === 1 ? "conversation" : "conversations"}, ${((100 * chats.chars) / MAX_CHARS).toFixed(chats.chars * 10 < MAX_CHARS ? 1 : 0)} % of the room. When it is full, the oldest are deleted.`;
  if ((await dialog("settings")) !== "ok") return;
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  Object.assign(current.options, {
    system: $("system").value.trim(),
    temperature: number("temperature"),
    maxTokens: number("max-tokens"),
    tools: $("tools").value.trim(),
  });
  remember("kimi-cpu.options", JSON.stringify(current.options));
  if (current.turns.length) save();
}

function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "The tools are not a list.";
  } catch (error) {
    return `The tools are not JSON: ${error.message}.`;
  }
}

function lastOptions() {
  try {
    const value = JSON.parse(remembered("kimi-cpu.options"));
    return value && typeof value === "object" && !Array.isArray(value) ? value : {};
  } catch {
    return {};
  }
}

function routingShown() {
  return remembered("kimi-cpu.routing") !== "off";
}

function showRouting(shown) {
  remember("kimi-cpu.routing", shown ? "on" : "off");
  $("routing").hidden = !shown;
  $("routing-toggle").setAttribute("aria-pressed", String(shown));
  map.show(shown && server.status === "ready");
}

// --- Start --------------------------------------------------------------------------------------

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running() || !text.trim()) return;
  $("prompt").value = "";
  grow($("prompt"), 240);
  send(text);
};
$("prompt").oninput = () => grow($("prompt"), 240);
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
$("stop").onclick = () => stop();
$("thinking").onchange = () => {
  current.options.thinking = $("thinking").value;
  remember("kimi-cpu.options", JSON.stringify(current.options));
};
$("log").onscroll = () => {
  const log = $("log");
  follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  $("latest").hidden = follow;
};
$("latest").onclick = () => {
  toEnd(true);
  $("prompt").focus();
};
$("turns").onclick = (event) => {
  const pressed = event.target.closest("[data-copy]");
  if (pressed) copy(pressed, pressed.closest(".code-block").querySelector("code").textContent);
};
$("settings").querySelector("form").onsubmit = (event) => {
  if (event.submitter?.value !== "ok") return;
  const problem = toolsProblem($("tools").value);
  $("tools-error").textContent = problem;
  $("tools-error").hidden = !problem;
  if (problem) {
    event.preventDefault();
    $("tools").focus();
  }
};
$("tools-example").onclick = () => ($("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 2));
$("key-open").onclick = () => askKey();
$("key-change").onclick = () => {
  $("settings").close("cancel");
  askKey();
};
$("clear").onclick = () => {
  if (!window.confirm("Delete all conversations kept in this browser?")) return;
  $("settings").close("cancel");
  for (const { abort } of runs.values()) abort.abort();
  runs.clear();
  chats.removeAll();
  show(newChat(current.options));
};
$("rename").onclick = rename;
$("export").onclick = exported;
$("delete").onclick = remove;
$("new").onclick = () => show(newChat(lastOptions()));
$("settings-open").onclick = settings;
$("routing-toggle").onclick = () => showRouting(!routingShown());
for (const text of EXAMPLES) $("examples").append(h("li", {}, h("button", { type: "button", onclick: () => send(text) }, text)));

setUpChrome({
  stop,
  recolour: () => map.recolour(),
  shortcuts: {
    KeyN: () => show(newChat(lastOptions())),
    KeyJ: () => $("turns").querySelector(".reply:last-child")?.focus(),
    KeyM: () => views.findLast((view) => view instanceof UserView)?.open(),
    KeyR: () => {
      const last = current.turns.at(-1);
      if (last?.role === "assistant") retry(last);
    },
    KeyG: () => showRouting(!routingShown()),
  },
});
document.addEventListener("visibilitychange", () => document.hidden || look());
window.addEventListener("pagehide", () => {
  for (const { chat } of runs.values()) chats.save(chat);
});
showRouting(routingShown());
const last = chats.load(remembered("kimi-cpu.open"));
show(last || newChat(lastOptions()));
watch();
