// The panel beside the conversation: the live picture, the router policy, the token looked at, and the load.

import { button, el, percent, visible } from "./dom.js";
import { ExpertMenu } from "./expert_menu.js";
import { drawHistogram, summary } from "./histogram.js";
import { COLOURS, Picture } from "./picture.js";
import { describe } from "./policy.js";
import { Load, NO_EXPERT } from "./routing.js";

const byId = (id) => document.getElementById(id);

export class ExpertsPanel {
  #picture = null;
  #menu;
  #answer = null; // whose load is shown
  #all = null; // the load of the conversation
  #stale = 0; // animation frame that will draw the load

  constructor(policy) {
    this.policy = policy;
    this.#menu = new ExpertMenu(policy);
    policy.addEventListener("change", () => this.#policyChanged());
    byId("policy-reset").addEventListener("click", () => {
      policy.reset();
      byId("picture").focus();
    });
    for (const id of ["load-scope", "load-layer"]) byId(id).addEventListener("change", () => this.#drawLoad());
    byId("histogram").addEventListener("click", (event) => {
      const expert = event.target.dataset.expert;
      if (expert === undefined) return;
      this.#menu.open({ layer: this.#loadLayer, expert: Number(expert) }, { x: event.clientX, y: event.clientY });
    });
    const ramp = byId("ramp").getContext("2d");
    COLOURS.forEach((colour, i) => {
      ramp.fillStyle = `rgb(${colour.join(" ")})`;
      ramp.fillRect(i / 2, 0, 1, 1);
    });
    this.#policyChanged();
  }

  /** What the picture has rows and cells for. */
  configure({ layers, experts, perToken }) {
    document.body.classList.toggle("no-routing", !layers);
    if (!layers) {
      byId("picture-caption").textContent = "This server does not say which experts it has.";
      return;
    }
    this.layers = layers;
    this.experts = experts;
    this.#all = new Load(layers, experts);
    byId("picture-caption").textContent = `${layers} layers, ${experts} experts each, ${perToken} chosen per token`;
    byId("axis-last").textContent = String(layers - 1);
    byId("histogram-last").textContent = `E${experts - 1}`;
    byId("load-layer").replaceChildren(
      el("option", { value: "", textContent: "all layers" }),
      ...Array.from({ length: layers }, (_, l) => el("option", { value: String(l), textContent: `layer ${l}` })),
    );
    const first = this.#picture === null;
    const frame = byId("picture");
    frame.style.setProperty("--rows", String(layers));
    frame.style.setProperty("--columns", String(experts));
    this.#picture = new Picture(byId("cells"), byId("overlay"), { layers, experts, policy: this.policy });
    if (first) this.#listen(frame);
    this.#drawLoad();
  }

  /** An answer begins. */
  begin(answer) {
    this.#answer = answer;
    this.#forgetToken();
    this.#picture?.clear();
    this.#drawLoad();
  }

  #forgetToken() {
    this.inspect(null);
    this.#point(null);
    byId("inspected").replaceChildren(
      el("p", { className: "caption", textContent: "Point at a word of an answer, or move between words with the arrow keys." }),
    );
  }

  /** Tokens of it came with these routes. */
  take(routes) {
    for (const route of routes) {
      this.#picture?.light(route);
      this.#all?.add(route);
    }
    if (routes.length && !this.#stale) {
      this.#stale = requestAnimationFrame(() => {
        this.#stale = 0;
        this.#drawLoad();
      });
    }
  }

  /** It has ended (or another version of it is shown): its load stays in the picture. */
  end(answer) {
    this.#answer = answer;
    this.#picture?.rest(answer.load);
    this.#drawLoad();
  }

  /** A new conversation. */
  forget() {
    this.#answer = null;
    if (this.layers) this.#all = new Load(this.layers, this.experts);
    this.#picture?.clear();
    this.#forgetToken();
    this.#drawLoad();
  }

  /** Shows one token of an answer; with null the live picture again, while the table keeps the last token. */
  inspect(found, pinned = false) {
    byId("unpin").hidden = !pinned;
    byId("inspector").classList.toggle("pinned", pinned);
    if (found === null) {
      this.#picture?.hold(null);
      return;
    }
    const { answer, token } = found;
    const route = answer.routes[token] ?? null;
    this.#picture?.hold(route);
    byId("inspected").replaceChildren(this.#tokenHead(answer, token), ...this.#alternatives(answer, token), this.#table(route));
  }

  #tokenHead(answer, token) {
    const logprob = answer.logprobs[token];
    return el("p", { className: "token-head" },
      el("code", { className: "token-text", textContent: visible(answer.pieces[token] ?? "") }),
      el("span", { textContent: `token ${token + 1} of ${answer.count}, id ${answer.ids[token]}` }),
      logprob === null || logprob === undefined ? null
        : el("span", { className: "token-probability", textContent: `probability ${percent(Math.exp(logprob))}` }));
  }

  #alternatives(answer, token) {
    const top = answer.tops[token] ?? [];
    if (!top.length) return [];
    const items = top.map(({ text, logprob }) => {
      const share = Math.exp(logprob);
      const meter = el("span", { className: "meter", "aria-hidden": "true" });
      meter.style.setProperty("--share", String(share));
      return el("li", { className: text === answer.pieces[token] ? "taken" : "" },
        el("code", { textContent: visible(text) }), meter, el("span", { textContent: percent(share) }));
    });
    return [el("ol", { className: "alternatives", "aria-label": "Most likely tokens here" }, ...items)];
  }

  #table(route) {
    if (!route) return el("p", { className: "caption", textContent: "The server sent no experts for this token." });
    const rows = Array.from({ length: route.layers }, (_, layer) => {
      const chosen = Array.from({ length: route.k }, (_, j) => layer * route.k + j)
        .filter((i) => route.experts[i] !== NO_EXPERT)
        .sort((a, b) => route.weights[b] - route.weights[a]);
      const strongest = route.weights[chosen[0]] || 1;
      const cells = chosen.map((i) => this.#expertButton(layer, route.experts[i], route.weights[i], strongest));
      return el("tr", {}, el("th", { scope: "row", textContent: String(layer) }), el("td", {}, el("div", { className: "chosen" }, ...cells)));
    });
    const head = el("tr", {}, el("th", { scope: "col", textContent: "Layer" }),
      el("th", { scope: "col", textContent: "Experts that computed it, by weight" }));
    return el("div", { className: route.layers > 8 ? "token-experts dense" : "token-experts" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  }

  #expertButton(layer, expert, weight, strongest) {
    const made = el("button", {
      type: "button", className: "expert", "aria-haspopup": "menu", data: { layer: String(layer), expert: String(expert) },
      "aria-label": `Layer ${layer}, expert ${expert}, weight ${weight.toFixed(3)}`,
      on: {
        click: () => {
          const box = made.getBoundingClientRect();
          this.#menu.open({ layer, expert }, { x: box.left, y: box.bottom });
        },
        pointerenter: () => this.#point({ layer, expert }),
        focus: () => this.#point({ layer, expert }),
        pointerleave: () => this.#point(null),
        blur: () => this.#point(null),
      },
    }, el("span", { className: "expert-id", textContent: String(expert) }),
    el("span", { className: "weight", textContent: weight.toFixed(2).replace(/^0/, "") }));
    this.#markExpert(made);
    made.style.setProperty("--weight", String(Math.min(1, weight / strongest)));
    return made;
  }

  #markExpert(made) {
    const { banned, bias } = this.policy.effect(Number(made.dataset.layer), Number(made.dataset.expert));
    made.classList.toggle("banned", banned);
    made.classList.toggle("boosted", !banned && bias > 0);
    made.classList.toggle("weakened", !banned && bias < 0);
  }

  #listen(frame) {
    frame.addEventListener("pointermove", (event) => {
      const cell = this.#picture.cellAt(event.clientX, event.clientY);
      if (cell) this.#point(cell);
    });
    frame.addEventListener("pointerleave", () => this.#point(document.activeElement === frame ? this.#picture.cursor : null));
    frame.addEventListener("click", (event) => {
      const cell = this.#picture.cellAt(event.clientX, event.clientY);
      if (cell) this.#openMenu(cell, { x: event.clientX, y: event.clientY });
    });
    frame.addEventListener("focus", () => {
      if (frame.matches(":focus-visible")) this.#point(this.#picture.cursor ?? { layer: 0, expert: 0 });
    });
    frame.addEventListener("blur", () => {
      if (byId("menu").hidden) this.#point(null);
    });
    frame.addEventListener("keydown", (event) => this.#pictureKey(event));
  }

  #pictureKey(event) {
    const at = this.#picture.cursor ?? { layer: 0, expert: 0 };
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -at.expert],
      End: [0, this.experts], PageUp: [-this.layers, 0], PageDown: [this.layers, 0] }[event.key];
    if (step) {
      const within = (n, most) => Math.max(0, Math.min(most - 1, n));
      this.#point({ layer: within(at.layer + step[0], this.layers), expert: within(at.expert + step[1], this.experts) });
    } else if (event.key === "Enter" || event.key === " ") this.#openMenu(at, this.#picture.centre(at));
    else return;
    event.preventDefault();
  }

  #openMenu(cell, at) {
    this.#point(cell);
    byId("picture").focus({ preventScroll: true });
    this.#menu.open(cell, at);
  }

  /** Says what a cell is, and frames it. */
  #point(cell) {
    if (!this.#picture) return;
    this.#picture.cursor = cell;
    this.#picture.drawOverlay();
    byId("cell").textContent = cell ? this.#cellInWords(cell) : "Point at a cell, or click it to ban or boost its expert.";
  }

  #cellInWords({ layer, expert }) {
    const words = [`Layer ${layer}, expert ${expert}`];
    const load = this.#load;
    if (load?.tokens) words.push(`${percent(load.shares(layer)[expert])} of this layer’s choices`);
    const { banned, bias } = this.policy.effect(layer, expert);
    if (banned) words.push("banned");
    else if (bias) words.push(`${bias > 0 ? "boosted by" : "weakened by"} ${Math.abs(bias)}`);
    return words.join(" · ");
  }

  get #load() {
    return byId("load-scope").value === "all" ? this.#all : (this.#answer?.load ?? null);
  }

  get #loadLayer() {
    const { value } = byId("load-layer");
    return value === "" ? null : Number(value);
  }

  #drawLoad() {
    if (!this.layers) return;
    const layer = this.#loadLayer;
    const shares = (this.#load ?? new Load(this.layers, this.experts)).shares(layer);
    const label = layer === null ? "Load of the experts, all layers" : `Load of the experts of layer ${layer}`;
    const policyOf = (expert) => (layer === null ? this.policy.rule(null, expert) ?? { banned: false, bias: 0 }
      : this.policy.effect(layer, expert));
    drawHistogram(byId("histogram"), shares, { label, policyOf });
    byId("load-summary").textContent = summary(shares);
  }

  #policyChanged() {
    const { policy } = this;
    const chips = policy.rules.map((rule) => this.#chip(describe(rule), rule.banned ? "ban" : rule.bias > 0 ? "boost" : "weaken",
      () => policy.clear(rule.layer, rule.expert)));
    if (policy.perToken !== null) chips.push(this.#chip(`${policy.perToken} experts per token`, "k", () => (policy.perToken = null)));
    byId("chips").replaceChildren(...chips);
    byId("policy-none").hidden = !policy.empty;
    byId("policy-reset").hidden = policy.empty;
    for (const made of byId("inspected").querySelectorAll(".expert")) this.#markExpert(made);
    this.#picture?.drawOverlay();
    this.#drawLoad();
  }

  #chip(text, kind, remove) {
    return el("li", { className: `chip ${kind}` }, el("span", { textContent: text }),
      button("×", "chip-remove", () => {
        remove();
        (byId("chips").querySelector("button") ?? byId("picture")).focus();
      }, { "aria-label": `Remove: ${text}` }));
  }
}
