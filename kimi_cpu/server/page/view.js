// A conversation as elements: one view a turn, updated in place while a reply grows.

import { codeBlock, Markdown } from "/static/markdown.js";
import { isJson } from "/static/chats.js";

/** Makes an element: h("p", {className: "x", onclick}, "text", child). */
export function h(tag, properties = {}, ...children) {
  const result = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") result.setAttribute(name, value);
    else result[name] = value;
  }
  result.append(...children.filter((child) => child !== null && child !== undefined));
  return result;
}

function button(label, onclick, className = "link") {
  return h("button", { type: "button", className, onclick }, label);
}

/** A turn of the person. `edit(text)` replaces it and what follows. */
export class UserView {
  constructor(turn, { edit, laterTurns }) {
    this.turn = turn;
    this.edit = edit;
    this.laterTurns = laterTurns;
    this.text = h("div", { className: "text" });
    this.actions = h("div", { className: "actions" });
    this.element = h("li", { className: "turn user" }, h("h2", { className: "sr" }, "You"), this.text, this.actions);
    this.#read();
  }

  #read() {
    this.text.replaceChildren(this.turn.content);
    this.editButton = button("Edit", () => this.open());
    this.actions.replaceChildren(this.editButton, copyButton(() => this.turn.content));
  }

  /** Make the message editable. */
  open() {
    if (this.field) return this.field.focus();
    this.field = h("textarea", { value: this.turn.content, rows: 2, "aria-label": "Edit your message" });
    const close = () => {
      this.field = null;
      this.#read();
      this.editButton.focus();
    };
    const send = () => {
      const text = this.field.value.trim();
      if (!text) return;
      this.field = null;
      this.edit(text);
    };
    this.field.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    };
    this.field.oninput = () => grow(this.field, 400);
    const note = this.laterTurns() > 1 ? h("span", { className: "hint" }, "What follows it is replaced.") : null;
    this.text.replaceChildren(this.field);
    this.actions.replaceChildren(...[button("Send", send, "primary"), button("Cancel", close, ""), note].filter(Boolean));
    grow(this.field, 400);
    this.field.focus();
    this.field.setSelectionRange(this.field.value.length, this.field.value.length);
  }
}

/** A turn of the model: reasoning, answer, calls of tools, figures, an error. */
export class ReplyView {
  /** retry(): another reply. sendResults([{id, content}]): of the calls. */
  constructor(turn, { retry, sendResults }) {
    this.turn = turn;
    this.retry = retry;
    this.sendResults = sendResults;
    this.thoughts = h("div", { className: "prose" });
    this.thoughtsTitle = h("summary", {});
    this.reasoning = h("details", { className: "reasoning", hidden: true }, this.thoughtsTitle, this.thoughts);
    // Open while the model thinks, unless the person decides.
    this.thoughtsTitle.onclick = () => (this.decided = true);
    this.reasoning.ontoggle = () => this.reasoning.open && this.#drawThoughts();
    this.answer = h("div", { className: "prose" });
    this.calls = h("div", { className: "calls" });
    this.wait = h("p", { className: "wait", hidden: true });
    this.error = h("p", { className: "error", hidden: true });
    this.actions = h("div", { className: "actions" });
    this.element = h(
      "li", { className: "turn reply", tabIndex: -1 },
      h("h2", { className: "sr" }, "Reply"),
      this.reasoning, this.answer, this.calls, this.wait, this.error, this.actions,
    );
    this.answerText = new Markdown(this.answer);
    this.thoughtsText = new Markdown(this.thoughts);
  }

  /**
   * Show the turn as it is now.
   * @param {{live?: boolean, waiting?: string, last?: boolean, answered?: Map}} state
   *   waiting: what is happening while there is nothing to see yet; last: the end of the
   *   conversation; answered: results of the calls by id.
   */
  update({ live = false, waiting = "", last = false, answered = new Map() } = {}) {
    const { turn } = this;
    const thinking = live && !turn.content && !turn.tool_calls;
    this.reasoning.hidden = !turn.reasoning_content;
    this.thoughtsTitle.textContent = thinking ? "Thinking" : "Thoughts";
    if (!this.decided) this.reasoning.open = thinking;
    if (this.reasoning.open) this.#drawThoughts();
    this.answerText.update(turn.content);
    this.wait.hidden = !waiting;
    if (this.wait.textContent !== waiting) this.wait.textContent = waiting;
    this.element.classList.toggle("live", live);
    if (live) {
      this.#drawCalls(answered, false);
      this.actions.replaceChildren();
      this.error.hidden = true;
      return;
    }
    this.#drawCalls(answered, last && !turn.error);
    const tail = { length: "It ended at the most tokens allowed.", stopped: "Stopped." }[turn.finish] || "";
    const text = turn.error || tail;
    this.error.hidden = !text;
    this.error.className = turn.error ? "error" : "hint";
    this.error.replaceChildren(text);
    if (turn.error && last) this.error.append(" ", button("Try again", this.retry));
    this.actions.replaceChildren(
      ...[
        turn.content ? copyButton(() => turn.content) : null,
        last && !turn.error ? button("Retry", this.retry) : null,
        figures(turn),
      ].filter(Boolean),
    );
  }

  #drawThoughts() {
    this.thoughtsText.update(this.turn.reasoning_content || "");
  }

  #drawCalls(answered, open) {
    const calls = this.turn.tool_calls || [];
    const state = JSON.stringify([calls, [...answered], open]);
    if (state === this.callsState) return;
    this.callsState = state;
    const fields = new Map();
    const parts = calls.map((call, i) => {
      const result = answered.get(call.id);
      const id = `result-${call.id.replace(/[^\w-]/g, "-")}-${i}`;
      const part = h(
        "div", { className: "call", role: "group", "aria-label": `Call of ${call.function.name}` },
        h("div", { className: "call-head" }, h("span", { className: "tag" }, "call"), h("code", {}, call.function.name), h("span", { className: "hint" }, call.id)),
        codeBlock(pretty(call.function.arguments), "json"),
      );
      if (result !== undefined) {
        part.append(h("div", { className: "call-head" }, h("span", { className: "tag" }, "result")), codeBlock(pretty(result)));
      } else if (open) {
        const field = h("textarea", { id, rows: 2, className: "code", placeholder: "What the tool returned" });
        fields.set(call.id, field);
        part.append(h("label", { htmlFor: id }, "Result"), field);
      }
      return part;
    });
    this.calls.replaceChildren(...parts);
    if (fields.size) {
      const send = () => this.sendResults([...fields].map(([id, field]) => ({ id, content: field.value })));
      for (const field of fields.values()) {
        field.onkeydown = (event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          send();
        };
      }
      this.calls.append(button(fields.size > 1 ? "Send the results" : "Send the result", send, "primary"));
    }
  }
}

function pretty(text) {
  return isJson(text) && /^\s*[{[]/.test(text) ? JSON.stringify(JSON.parse(text), null, 2) : text;
}

/** The tokens and times of a reply, as the server counted them. */
function figures({ usage, timings }) {
  if (!usage && !timings) return null;
  const parts = [];
  if (timings) {
    if (timings.predicted_per_second) parts.push(`${rate(timings.predicted_per_second)} tokens/s`);
    parts.push(`${count(timings.predicted_n)} tokens`);
    const cached = timings.cache_n ? `, ${count(timings.cache_n)} of them cached` : "";
    parts.push(`prompt ${count(timings.prompt_n + timings.cache_n)}${cached}`);
    parts.push(`read in ${seconds(timings.prompt_ms)}`);
    if (timings.queue_ms >= 100) parts.push(`waited ${seconds(timings.queue_ms)}`);
  } else {
    parts.push(`${count(usage.completion_tokens)} tokens`);
  }
  return h("span", { className: "figures" }, parts.join(" · "));
}

export function count(n) {
  return Math.round(n || 0).toLocaleString("en");
}

export function rate(n) {
  return n >= 100 ? count(n) : n.toFixed(n >= 10 ? 1 : 2);
}

function seconds(ms) {
  return ms >= 10_000 ? `${count(ms / 1000)} s` : ms >= 100 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms)} ms`;
}

/** Copies what `text()` gives and says so for a moment. */
export function copyButton(text) {
  const result = button("Copy", () => copy(result, text()));
  return result;
}

export async function copy(element, text) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Only pages over TLS or of this machine may write to the clipboard that way.
    const field = h("textarea", { value: text, className: "sr" });
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    element.focus();
  }
  element.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => (element.textContent = "Copy"), 1500);
}

/** Make a text field as high as its text. */
export function grow(field, most) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, most)}px`;
}
