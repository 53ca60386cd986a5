// The menu of one expert: ban it, boost it, weaken it, here or in all layers.

import { announce, el } from "./dom.js";

const CHOICES = [
  ["Ban", "never chosen", (policy, layer, expert) => policy.ban(layer, expert)],
  ["Boost strongly", "+4", (policy, layer, expert) => policy.boost(layer, expert, 4)],
  ["Boost", "+2", (policy, layer, expert) => policy.boost(layer, expert, 2)],
  ["Weaken", "−2", (policy, layer, expert) => policy.boost(layer, expert, -2)],
  ["Leave as it is", "", (policy, layer, expert) => policy.clear(layer, expert)],
];

function chosen(rule) {
  if (!rule) return 4;
  if (rule.banned) return 0;
  return { 4: 1, 2: 2, "-2": 3 }[rule.bias] ?? -1;
}

export class ExpertMenu {
  #menu = document.getElementById("menu");
  #back = null; // what had the focus
  #close = null;

  constructor(policy) {
    this.policy = policy;
    this.#menu.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", (event) => {
      if (!this.#menu.hidden && !this.#menu.contains(event.target)) this.close(false);
    });
    window.addEventListener("resize", () => this.close(false));
  }

  /** Opens at a point for an expert of a layer, or of all layers where `layer` is null. */
  open({ layer, expert }, { x, y }, closed = () => {}) {
    this.close(false);
    this.#back = document.activeElement;
    this.#close = closed;
    this.#fill(layer, expert, layer === null);
    this.#menu.hidden = false;
    const { width, height } = this.#menu.getBoundingClientRect();
    this.#menu.style.left = `${Math.max(8, Math.min(x + 4, window.innerWidth - width - 8))}px`;
    this.#menu.style.top = `${Math.max(8, Math.min(y + 4, window.innerHeight - height - 8))}px`;
    (this.#menu.querySelector('[aria-checked="true"]') ?? this.#items[0]).focus();
  }

  close(refocus = true) {
    if (this.#menu.hidden) return;
    this.#menu.hidden = true;
    if (refocus) this.#back?.focus({ preventScroll: true });
    this.#close?.();
  }

  get #items() {
    return [...this.#menu.querySelectorAll('[role^="menuitem"]')];
  }

  #fill(layer, expert, all) {
    const scope = all ? null : layer;
    const place = all ? `expert ${expert} of all layers` : `expert ${expert} of layer ${layer}`;
    this.#menu.setAttribute("aria-label", `Router policy for ${place}`);
    const now = chosen(this.policy.rule(scope, expert));
    const items = CHOICES.map(([label, effect, apply], i) =>
      el("button", {
        type: "button", role: "menuitemradio", className: "menu-item", tabIndex: -1, "aria-checked": String(i === now),
        on: {
          click: () => {
            apply(this.policy, scope, expert);
            this.close();
            announce(`${label}: ${place}.`);
          },
        },
      }, el("span", { textContent: label }), el("span", { className: "effect", textContent: effect })));
    const title = el("p", { className: "menu-title", role: "presentation" },
      el("strong", { textContent: all ? `Expert ${expert}` : `Layer ${layer} · Expert ${expert}` }),
      el("span", { textContent: "Numbers are added to its router logit" }));
    const children = [title, ...items];
    if (layer !== null) {
      children.push(el("button", {
        type: "button", role: "menuitemcheckbox", className: "menu-item scope", tabIndex: -1, "aria-checked": String(all),
        on: {
          click: () => {
            this.#fill(layer, expert, !all);
            this.#items.at(-1).focus();
          },
        },
      }, el("span", { textContent: "In all layers" })));
    }
    this.#menu.replaceChildren(...children);
  }

  #key(event) {
    const items = this.#items;
    const here = items.indexOf(document.activeElement);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: items.length - 1 }[event.key];
    if (to !== undefined) items[(to + items.length) % items.length].focus();
    else if (event.key === "Escape" || event.key === "Tab") this.close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
