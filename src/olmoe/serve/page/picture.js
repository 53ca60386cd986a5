// The live picture: a canvas with one pixel for each expert of each layer, scaled up by CSS. A chosen expert lights up
// with its weight and fades; an overlay of real resolution draws the grid, the cursor, and what is banned or boosted.

import { NO_EXPERT } from "./routing.js";

const FADE_MS = 700; // until a cell has lost two thirds of its light
const FADE_TOKEN = 0.82; // what each further token leaves of it: a fast model would fill the picture otherwise
const RAMP = [[7, 40, 44], [16, 84, 86], [168, 46, 118], [245, 108, 160], [255, 214, 186], [255, 250, 235]];
const STOPS = [0, 0.22, 0.5, 0.7, 0.88, 1];

export const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const x = i / 255;
  let s = 0;
  while (s < STOPS.length - 2 && x > STOPS[s + 1]) s++;
  const t = (x - STOPS[s]) / (STOPS[s + 1] - STOPS[s]);
  return RAMP[s].map((from, c) => Math.round(from + t * (RAMP[s + 1][c] - from)));
});

export class Picture {
  #context;
  #over;
  #overlay;
  #light; // of each cell, 0 to 1, fading
  #floor; // where it does not fade below
  #queue = []; // routes not shown yet
  #frame = 0;
  #last = 0;
  #held = null; // the route of a token that the reader looks at
  #reduced = window.matchMedia("(prefers-reduced-motion: reduce)");

  constructor(canvas, overlay, { layers, experts, policy }) {
    this.layers = layers;
    this.experts = experts;
    this.policy = policy;
    this.cursor = null; // {layer, expert}
    canvas.width = experts;
    canvas.height = layers;
    this.canvas = canvas;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    this.#overlay = overlay;
    this.#over = overlay.getContext("2d");
    this.#light = new Float32Array(layers * experts);
    this.#floor = new Float32Array(layers * experts);
    new ResizeObserver(() => this.drawOverlay()).observe(overlay);
    this.#paint();
  }

  /** A token was generated. */
  light(route) {
    this.#queue.push(route);
    this.#wake();
  }

  /** Shows one token's experts alone; null goes back to the live picture. */
  hold(route) {
    this.#held = route;
    this.#paint();
    this.drawOverlay();
  }

  /** What stays when all has faded: the load of an answer (a `Load`), or nothing. */
  rest(load) {
    this.#floor.fill(0);
    if (load?.tokens) {
      const most = load.counts.reduce((a, b) => Math.max(a, b), 1);
      load.counts.forEach((count, i) => (this.#floor[i] = 0.5 * Math.sqrt(count / most)));
    }
    this.#wake();
  }

  clear() {
    this.#queue = [];
    this.#light.fill(0);
    this.#floor.fill(0);
    this.#held = null;
    this.#paint();
    this.drawOverlay();
  }

  #wake() {
    if (!this.#frame) this.#frame = requestAnimationFrame((now) => this.#step(now));
  }

  #step(now) {
    this.#frame = 0;
    const passed = Math.min(100, now - this.#last || 16);
    this.#last = now;
    // A few tokens a frame at most look like motion; a backlog is caught up with within about twenty frames.
    const count = this.#reduced.matches ? this.#queue.length : Math.ceil(this.#queue.length / 20);
    const shown = this.#queue.splice(0, count);
    const keep = this.#reduced.matches ? (shown.length ? 0 : 1) : Math.exp(-passed / FADE_MS);
    let lit = false;
    for (let i = 0; i < this.#light.length; i++) {
      this.#light[i] *= keep;
      lit ||= this.#light[i] > 0.01;
    }
    for (const route of shown) {
      for (let i = 0; i < this.#light.length; i++) this.#light[i] *= FADE_TOKEN;
      this.#add(this.#light, route);
    }
    this.#paint();
    if (this.#queue.length || shown.length || (lit && !this.#reduced.matches)) this.#wake();
  }

  #add(cells, route) {
    const strongest = route.weights.reduce((a, b) => Math.max(a, b), 1e-9);
    route.experts.forEach((expert, j) => {
      if (expert === NO_EXPERT || expert >= this.experts) return;
      const i = Math.floor(j / route.k) * this.experts + expert;
      cells[i] = Math.min(1, Math.max(cells[i], 0.35 + 0.65 * Math.sqrt(route.weights[j] / strongest)));
    });
  }

  #paint() {
    const image = this.#context.createImageData(this.experts, this.layers);
    let cells = this.#light;
    if (this.#held) this.#add((cells = new Float32Array(cells.length)), this.#held);
    for (let i = 0; i < cells.length; i++) {
      const value = this.#held ? cells[i] : Math.max(cells[i], this.#floor[i]);
      image.data.set(COLOURS[Math.round(Math.min(1, value) * 255)], 4 * i);
      image.data[4 * i + 3] = 255;
    }
    this.#context.putImageData(image, 0, 0);
  }

  /** The cell under a point of the window, or null. */
  cellAt(x, y) {
    const box = this.#overlay.getBoundingClientRect();
    const expert = Math.floor(((x - box.left) / box.width) * this.experts);
    const layer = Math.floor(((y - box.top) / box.height) * this.layers);
    return expert >= 0 && expert < this.experts && layer >= 0 && layer < this.layers ? { layer, expert } : null;
  }

  /** The middle of a cell in the window. */
  centre({ layer, expert }) {
    const box = this.#overlay.getBoundingClientRect();
    return {
      x: box.left + ((expert + 0.5) * box.width) / this.experts,
      y: box.top + ((layer + 0.5) * box.height) / this.layers,
    };
  }

  drawOverlay() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.#overlay.clientWidth, this.#overlay.clientHeight];
    if (!width || !height) return;
    this.#overlay.width = Math.round(width * ratio);
    this.#overlay.height = Math.round(height * ratio);
    const c = this.#over;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    const [w, h] = [width / this.experts, height / this.layers];
    c.fillStyle = "#04191c";
    for (let e = 1; e < this.experts; e++) c.fillRect(e * w - 0.5, 0, 1, height);
    for (let l = 1; l < this.layers; l++) c.fillRect(0, l * h - 0.5, width, 1);
    this.#drawPolicy(c, w, h);
    if (this.cursor) {
      const { layer, expert } = this.cursor;
      c.lineWidth = 2;
      c.strokeStyle = "#ffffff";
      c.strokeRect(expert * w - 0.5, layer * h - 0.5, w + 1, h + 1);
    }
  }

  #drawPolicy(c, w, h) {
    for (const rule of this.policy.rules) {
      const layers = rule.layer === null ? [...Array(this.layers).keys()] : [rule.layer];
      for (const layer of layers) {
        const [x, y] = [rule.expert * w, layer * h];
        c.lineWidth = 1.5;
        if (rule.banned) {
          c.fillStyle = "#04191c";
          c.fillRect(x + 0.5, y + 0.5, w - 1, h - 1);
          c.strokeStyle = "#ff7a7a";
          c.beginPath();
          for (const [from, to] of [[y + 1.5, y + h - 1.5], [y + h - 1.5, y + 1.5]]) {
            c.moveTo(x + 1, from);
            c.lineTo(x + w - 1, to);
          }
          c.stroke();
        } else {
          c.strokeStyle = rule.bias > 0 ? "#7df0c0" : "#ffd27a";
          c.strokeRect(x + 1, y + 1, w - 2, h - 2);
        }
      }
    }
  }
}
