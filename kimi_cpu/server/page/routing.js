// The picture of the routing: a row for each layer, a column for each expert. A cell lights up
// when tokens choose its expert, and fades.

import { ask, events } from "/static/api.js";

/** Seconds after which a light has a third of its strength. */
const FADE_S = 0.8;
/** Cells of at least so many device pixels have a gap between them. */
const GAP_FROM = 5;
const MAX_CELL = 14;

export class RoutingMap {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLElement} text the line under it
   */
  constructor(canvas, text) {
    this.canvas = canvas;
    this.text = text;
    this.shape = null;
    this.wanted = false;
    this.still = window.matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.#resize()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => {
      this.pointed = null;
      this.#describe();
    });
    document.addEventListener("visibilitychange", () => this.#connect());
  }

  /** Listen while the page can be seen (each browser tab has few connections to a server). */
  show(wanted) {
    this.wanted = wanted;
    this.#connect();
  }

  /** The colours have changed. */
  recolour() {
    const style = getComputedStyle(this.canvas);
    this.ramp = ["--map-0", "--map-1", "--map-2", "--map-3"].map((name) => rgb(style.getPropertyValue(name)));
    this.#draw();
  }

  async #connect() {
    const open = this.wanted && !document.hidden;
    if (!open) {
      this.abort?.abort();
      this.abort = null;
      return;
    }
    if (this.abort) return;
    const abort = (this.abort = new AbortController());
    for (let wait = 1; !abort.signal.aborted; wait = Math.min(wait * 2, 30)) {
      try {
        const response = await ask("/routing", { signal: abort.signal });
        wait = 1;
        for await (const event of events(response)) {
          if (event.comment !== undefined) continue;
          const value = JSON.parse(event.data);
          if (event.event === "shape") this.#begin(value);
          else this.#light(value);
        }
      } catch {
        // whatever it was: later again, until somebody turns the picture off
      }
      await new Promise((done) => setTimeout(done, wait * 1000));
    }
  }

  #begin(shape) {
    const { layers, experts } = shape;
    if (this.shape?.layers.length !== layers.length || this.shape.experts !== experts) {
      this.levels = new Float32Array(layers.length * experts);
      this.times = new Uint32Array(layers.length * experts);
      this.cells = new OffscreenCanvas(Math.max(experts, 1), Math.max(layers.length, 1));
      this.pixels = new ImageData(this.cells.width, this.cells.height);
    }
    this.shape = shape;
    this.canvas.setAttribute(
      "aria-label",
      `Which experts the tokens choose: ${layers.length} layers of ${experts} experts`,
    );
    this.#resize();
    this.#describe();
  }

  #light(seen) {
    this.seen = seen;
    let most = 1;
    for (const row of seen.chosen) for (let i = 1; i < row.length; i += 2) most = Math.max(most, row[i]);
    seen.chosen.forEach((row, layer) => {
      for (let i = 0; i < row.length; i += 2) {
        const cell = layer * this.shape.experts + row[i];
        this.times[cell] += row[i + 1];
        // One token lights its experts fully; of many tokens, the experts they share.
        const level = most < 3 ? 1 : 0.15 + 0.85 * (row[i + 1] / most);
        this.levels[cell] = Math.max(this.levels[cell], level);
      }
    });
    this.#describe();
    if (this.still.matches) {
      this.#draw();
      this.levels.fill(0);
    } else if (!this.frame) {
      this.drawn = performance.now();
      this.frame = requestAnimationFrame((now) => this.#animate(now));
    }
  }

  #animate(now) {
    const factor = Math.exp(-Math.max(0, now - this.drawn) / 1000 / FADE_S);
    this.drawn = now;
    let strongest = 0;
    for (let i = 0; i < this.levels.length; i++) {
      const level = this.levels[i] * factor;
      this.levels[i] = level < 0.01 ? 0 : level;
      if (level > strongest) strongest = level;
    }
    this.#draw();
    this.frame = strongest >= 0.01 ? requestAnimationFrame((later) => this.#animate(later)) : 0;
  }

  #resize() {
    if (!this.shape) return;
    const { layers, experts } = this.shape;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.floor(this.canvas.parentElement.clientWidth * ratio) - Math.ceil(24 * ratio));
    const tallest = 132 * ratio;
    this.cell = {
      x: Math.min(MAX_CELL * 2 * ratio, width / Math.max(experts, 1)),
      y: Math.min(MAX_CELL * ratio, tallest / Math.max(layers.length, 1)),
    };
    for (const side of ["x", "y"]) if (this.cell[side] > 2) this.cell[side] = Math.floor(this.cell[side]);
    this.canvas.width = Math.max(1, Math.round(this.cell.x * experts));
    this.canvas.height = Math.max(1, Math.round(this.cell.y * layers.length));
    this.canvas.style.width = `${this.canvas.width / ratio}px`;
    this.canvas.style.height = `${this.canvas.height / ratio}px`;
    this.#draw();
  }

  #draw() {
    if (!this.shape || !this.levels.length) return;
    if (!this.ramp) return this.recolour();
    const data = this.pixels.data;
    for (let i = 0; i < this.levels.length; i++) {
      const at = Math.min(this.levels[i], 0.9999) * (this.ramp.length - 1);
      const [from, to, part] = [this.ramp[at | 0], this.ramp[(at | 0) + 1], at % 1];
      for (let c = 0; c < 3; c++) data[4 * i + c] = from[c] + (to[c] - from[c]) * part;
      data[4 * i + 3] = 255;
    }
    this.cells.getContext("2d").putImageData(this.pixels, 0, 0);
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = this.cell.x < 1 || this.cell.y < 1;
    context.clearRect(0, 0, width, height);
    context.drawImage(this.cells, 0, 0, width, height);
    if (this.cell.x >= GAP_FROM) for (let x = this.cell.x; x <= width; x += this.cell.x) context.clearRect(x - 1, 0, 1, height);
    if (this.cell.y >= GAP_FROM) for (let y = this.cell.y; y <= height; y += this.cell.y) context.clearRect(0, y - 1, width, 1);
  }

  #point(event) {
    if (!this.shape) return;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.shape.experts);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.shape.layers.length);
    const inside = column >= 0 && row >= 0 && column < this.shape.experts && row < this.shape.layers.length;
    this.pointed = inside ? { column, row } : null;
    this.#describe();
  }

  #describe() {
    if (!this.shape) return;
    const { layers, experts, top_k } = this.shape;
    let text = `${layers.length} layers of ${experts} experts`;
    if (this.pointed) {
      const { column, row } = this.pointed;
      const times = this.times[row * experts + column].toLocaleString("en");
      text = `Layer ${layers[row]}, expert ${column}: chosen ${times} times since this page was opened`;
    } else if (this.seen) {
      const { tokens, uses, hits } = this.seen;
      const found = uses ? ((100 * hits) / uses).toFixed(hits < uses ? 1 : 0) : "0";
      text += ` · ${tokens.toLocaleString("en")} tokens · ${found} % in memory`;
    } else {
      text += `, ${top_k} chosen by each token`;
    }
    if (this.text.textContent !== text) this.text.textContent = text;
  }
}

/** A colour like #rrggbb -> [r, g, b]. */
function rgb(colour) {
  const digits = colour.trim().slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}
