// Markdown as a tree of elements. Text only ever becomes text nodes: no markup of a model is read
// as HTML, and links lead to http(s) and mail only.

/** How far the end of an emphasis, a link or a formula is looked for; bounds the time. */
const WINDOW = 2000;
const DEPTH = 6;
const COLUMNS = 50;

/** Draws a growing text, and keeps what has not changed since the last time. */
export class Markdown {
  /** @param {HTMLElement} target */
  constructor(target) {
    this.target = target;
    this.sources = [];
  }

  /** Show this text. */
  update(text) {
    const found = blocks(text.replace(/\r\n?/g, "\n").split("\n"));
    let same = 0;
    while (same < found.length && this.sources[same] === found[same].source) same++;
    while (this.target.children.length > same) this.target.lastElementChild.remove();
    for (const block of found.slice(same)) this.target.append(element(block, 0));
    this.sources = found.map((block) => block.source);
  }
}

const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** {indent, mark, language} if code begins with this line. */
function fence(line) {
  const match = /^( {0,3})(`{3,}|~{3,})(.*)$/.exec(line);
  if (!match || (match[2][0] === "`" && match[3].includes("`"))) return null;
  return { indent: match[1].length, mark: match[2], language: match[3].trim().split(/\s/)[0].slice(0, 40) };
}

/** Lines -> [{kind, source, ...}]. */
function blocks(lines) {
  const result = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const begin = i;
    if (!line.trim()) {
      i++;
      continue;
    }
    const block = {};
    let match;
    if ((match = fence(line))) {
      const { indent, mark, language } = match;
      for (i++; i < lines.length && !closes(lines[i], mark); i++);
      const inside = lines.slice(begin + 1, i).map((one) => unindented(one, indent));
      Object.assign(block, { kind: "code", language, text: inside.join("\n") });
      i++;
    } else if ((match = HEADING.exec(line))) {
      Object.assign(block, { kind: "heading", level: match[1].length, text: match[2] });
      i++;
    } else if (RULE.test(line)) {
      block.kind = "rule";
      i++;
    } else if (QUOTE.test(line)) {
      for (; i < lines.length && QUOTE.test(lines[i]); i++);
      Object.assign(block, { kind: "quote", lines: lines.slice(begin, i).map((one) => one.replace(QUOTE, "")) });
    } else if (ITEM.test(line)) {
      i = list(lines, begin, block);
    } else if (line.includes("|") && TABLE_RULE.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      for (i += 2; i < lines.length && lines[i].includes("|"); i++);
      const rows = [lines[begin], ...lines.slice(begin + 2, i)].map(cells);
      Object.assign(block, { kind: "table", rows, right: cells(lines[begin + 1]).map((c) => /-:$/.test(c)) });
    } else {
      for (i++; i < lines.length && !interrupts(lines[i]); i++);
      Object.assign(block, { kind: "paragraph", text: lines.slice(begin, i).join("\n") });
    }
    block.source = `${block.kind}\n${lines.slice(begin, i).join("\n")}`;
    result.push(block);
  }
  return result;
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function interrupts(line) {
  return !line.trim() || fence(line) !== null || [HEADING, RULE, QUOTE, ITEM].some((start) => start.test(line));
}

/** A list from line `begin`; returns the line after it. */
function list(lines, begin, block) {
  const first = ITEM.exec(lines[begin]);
  const ordered = /\d/.test(first[2]);
  const base = first[1].length;
  const items = [];
  let width = 0;
  let i = begin;
  let open = null; // the fence of code within an item
  for (; i < lines.length; i++) {
    const line = lines[i];
    const match = open ? null : ITEM.exec(line);
    const indent = /^\s*/.exec(line)[0].length;
    if (match && match[1].length < base + 2 && match[1].length >= base - 1) {
      if (/\d/.test(match[2]) !== ordered) break;
      width = match[1].length + match[2].length + Math.max(1, Math.min(match[3].length, 4));
      items.push([line.slice(width)]);
    } else if (!line.trim()) {
      const next = lines.slice(i + 1, i + 3).find((one) => one.trim());
      if (!open && next !== undefined && !ITEM.test(next) && /^\s*/.exec(next)[0].length < base + 2) break;
      items.at(-1).push("");
    } else if (open || indent >= base + 2 || (lines[i - 1].trim() && !interrupts(line))) {
      items.at(-1).push(unindented(line, width));
    } else {
      break;
    }
    const added = items.at(-1).at(-1);
    if (open === null) open = fence(added)?.mark ?? null;
    else if (closes(added, open)) open = null;
  }
  Object.assign(block, { kind: ordered ? "ol" : "ul", start: parseInt(first[2], 10), items });
  return i;
}

function unindented(line, width) {
  let n = 0;
  while (n < width && (line[n] === " " || line[n] === "\t")) n++;
  return line.slice(n);
}

function cells(line) {
  const inside = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inside.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function element(block, depth) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      // The page's own headings are h1 and h2.
      return made(`h${Math.min(block.level + 2, 6)}`, inline(block.text));
    case "rule":
      return made("hr");
    case "quote":
      return made("blockquote", nested(block.lines, depth));
    case "table":
      return table(block);
    case "ol":
    case "ul": {
      const items = block.items.map((lines) => made("li", nested(lines, depth, true)));
      const result = made(block.kind, items);
      if (block.kind === "ol" && block.start !== 1) result.start = block.start;
      return result;
    }
    default:
      return made("p", inline(block.text));
  }
}

/** Blocks within a block; of a list's item, a single paragraph is no block of its own. */
function nested(lines, depth, item = false) {
  if (depth >= DEPTH) return [lines.join("\n")];
  const found = blocks(lines);
  return found.flatMap((block, i) =>
    item && i === 0 && block.kind === "paragraph" ? inline(block.text) : [element(block, depth + 1)],
  );
}

function table({ rows, right }) {
  const line = (tag) => (row) =>
    made("tr", rows[0].slice(0, COLUMNS).map((_, i) => {
      const cell = made(tag, inline(row[i] ?? ""));
      if (right[i]) cell.className = "right";
      return cell;
    }));
  const parts = [made("thead", [line("th")(rows[0])]), made("tbody", rows.slice(1).map(line("td")))];
  const frame = made("div", [made("table", parts)]);
  frame.className = "table";
  frame.tabIndex = 0; // scrolled by keyboard
  frame.setAttribute("role", "group");
  frame.setAttribute("aria-label", "Table");
  return frame;
}

/** Code with its language and a button that copies it. */
export function codeBlock(text, language = "") {
  const pre = made("pre", [made("code", [text])]);
  pre.tabIndex = 0;
  const copy = made("button", ["Copy"]);
  copy.type = "button";
  copy.className = "link";
  copy.dataset.copy = "";
  const frame = made("div", [made("div", [made("span", [language || "text"]), copy]), pre]);
  frame.className = "code-block";
  return frame;
}

function made(tag, children = []) {
  const result = document.createElement(tag);
  // One by one: a call cannot have as many arguments as a text may have parts.
  for (const child of children) result.append(child);
  return result;
}

const MARKS = /[\\`*_~[$h\n]/g;
const PAIRS = [
  ["***", "em", "strong"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "s"],
  ["*", "em"],
  ["_", "em"],
];

/** Text within a block -> nodes and strings. */
function inline(text, depth = 0) {
  const out = [];
  let plain = "";
  let i = 0;
  const put = (node, next) => {
    if (plain) out.push(plain);
    plain = "";
    out.push(node);
    i = next;
  };
  while (i < text.length) {
    MARKS.lastIndex = i;
    const at = MARKS.exec(text)?.index ?? text.length;
    plain += text.slice(i, at);
    i = at;
    if (i >= text.length) break;
    const found = depth < DEPTH ? special(text, i, depth) : null;
    if (found) {
      put(found[0], found[1]);
    } else {
      plain += text[i++];
    }
  }
  if (plain) out.push(plain);
  return out;
}

/** What begins at position i: [node or string, the position after it], or null. */
function special(text, i, depth) {
  const c = text[i];
  if (c === "\n") return [made("br"), i + 1];
  if (c === "`") return code(text, i);
  if (c === "$" || c === "\\") return formula(text, i) || escaped(text, i);
  if (c === "[") return link(text, i, depth);
  if (c === "h") return address(text, i);
  for (const [mark, ...tags] of PAIRS) {
    if (!text.startsWith(mark, i)) continue;
    const end = closing(text, i, mark);
    if (end < 0) continue;
    const inside = inline(text.slice(i + mark.length, end), depth + 1);
    return [tags.reduce((children, tag) => [made(tag, children)], inside)[0], end + mark.length];
  }
  return null;
}

function closing(text, i, mark) {
  const begin = i + mark.length;
  const word = (c) => c !== undefined && /[\p{L}\p{N}_]/u.test(c);
  if (!text[begin] || /\s/.test(text[begin]) || (mark[0] === "_" && word(text[i - 1]))) return -1;
  const inside = text.slice(begin, begin + WINDOW);
  for (let at = inside.indexOf(mark, 1); at >= 0; at = inside.indexOf(mark, at + mark.length)) {
    if (/\s/.test(inside[at - 1])) continue;
    if (mark.length === 1 && inside[at + 1] === mark) {
      at++; // a double mark within
      continue;
    }
    if (mark[0] === "_" && word(inside[at + mark.length])) continue;
    return begin + at;
  }
  return -1;
}

function code(text, i) {
  const ticks = /^`+/.exec(text.slice(i, i + 100))[0];
  let end = i + ticks.length;
  const limit = Math.min(text.length, end + WINDOW);
  while ((end = text.indexOf(ticks, end)) >= 0 && end < limit) {
    let after = end + ticks.length;
    if (text[after] !== "`") {
      const inside = text.slice(i + ticks.length, end).replaceAll("\n", " ");
      const bare = /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside;
      return [made("code", [bare]), after];
    }
    while (text[after] === "`") after++;
    end = after;
  }
  return [ticks, i + ticks.length];
}

/** Formulas stay as they are written, set apart so that their marks mean nothing here. */
function formula(text, i) {
  for (const [open, close] of [["$$", "$$"], ["\\[", "\\]"], ["\\(", "\\)"]]) {
    if (!text.startsWith(open, i)) continue;
    const end = text.slice(i + open.length, i + WINDOW).indexOf(close);
    if (end < 1) continue;
    const result = made("span", [text.slice(i + open.length, i + open.length + end).trim()]);
    result.className = "formula";
    return [result, i + open.length + end + close.length];
  }
  return null;
}

function escaped(text, i) {
  return text[i] === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? [text[i + 1], i + 2] : null;
}

function link(text, i, depth) {
  const match = /^\[((?:[^[\]\\]|\\.){1,500})\]\(\s*<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,500}\)[^\s<>()]{0,500})?)>?(?:\s+"[^"]{0,500}")?\s*\)/.exec(
    text.slice(i, i + WINDOW),
  );
  if (!match) return null;
  const target = safe(match[2]);
  if (!target) return null;
  return [anchor(target, inline(match[1], depth + 1)), i + match[0].length];
}

function address(text, i) {
  if (/[\p{L}\p{N}]/u.test(text[i - 1] ?? "")) return null;
  const match = /^https?:\/\/[^\s<>"'`*|]{1,2000}/.exec(text.slice(i, i + 2010));
  if (!match) return null;
  let shown = match[0];
  // What ends the sentence, or the parentheses around, is not part of it.
  while (/[.,;:!?]$/.test(shown) || (shown.endsWith(")") && times(shown, ")") > times(shown, "("))) {
    shown = shown.slice(0, -1);
  }
  const target = safe(shown);
  return target ? [anchor(target, [shown]), i + shown.length] : null;
}

function times(text, part) {
  return text.split(part).length - 1;
}

function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null; // relative: it would lead to this server
  }
}

function anchor(target, children) {
  const result = made("a", children);
  result.href = target;
  result.target = "_blank";
  result.rel = "noopener noreferrer nofollow";
  result.title = target;
  return result;
}
