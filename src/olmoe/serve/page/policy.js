// What the reader changed about the routers: experts banned or boosted, in one layer or in all.

const keyOf = (layer, expert) => `${layer ?? "all"}:${expert}`;
const signed = (bias) => (bias > 0 ? `+${bias}` : `−${-bias}`);

export class Policy extends EventTarget {
  #rules = new Map(); // key -> {layer, expert, banned, bias}
  #perToken = null;

  get rules() {
    return [...this.#rules.values()];
  }

  get empty() {
    return this.#rules.size === 0 && this.#perToken === null;
  }

  /** Experts per token; null for the model's own number. */
  get perToken() {
    return this.#perToken;
  }

  set perToken(k) {
    if (k === this.#perToken) return;
    this.#perToken = k;
    this.#tell();
  }

  rule(layer, expert) {
    return this.#rules.get(keyOf(layer, expert)) ?? null;
  }

  /** What holds for an expert of a layer, a rule for all layers included: {banned, bias}. */
  effect(layer, expert) {
    const found = [this.rule(layer, expert), this.rule(null, expert)].filter((rule) => rule !== null);
    return { banned: found.some((r) => r.banned), bias: found.reduce((sum, r) => sum + r.bias, 0) };
  }

  ban(layer, expert) {
    this.#set(layer, expert, true, 0);
  }

  boost(layer, expert, bias) {
    if (bias === 0) this.clear(layer, expert);
    else this.#set(layer, expert, false, bias);
  }

  clear(layer, expert) {
    if (this.#rules.delete(keyOf(layer, expert))) this.#tell();
  }

  reset() {
    if (this.empty) return;
    this.#rules.clear();
    this.#perToken = null;
    this.#tell();
  }

  /** `router_policy` of a request, or undefined where nothing is changed. */
  wire() {
    if (this.empty) return undefined;
    const place = ({ layer, expert }) => (layer === null ? { expert } : { layer, expert });
    const policy = {};
    const ban = this.rules.filter((rule) => rule.banned).map(place);
    const boost = this.rules.filter((rule) => !rule.banned).map((rule) => ({ ...place(rule), bias: rule.bias }));
    if (ban.length) policy.ban = ban;
    if (boost.length) policy.boost = boost;
    if (this.#perToken !== null) policy.k = this.#perToken;
    return policy;
  }

  /** Each change in words. */
  words() {
    const all = this.rules.map(describe);
    if (this.#perToken !== null) all.push(`${this.#perToken} experts per token`);
    return all;
  }

  #set(layer, expert, banned, bias) {
    this.#rules.set(keyOf(layer, expert), { layer, expert, banned, bias });
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event("change"));
  }
}

/** A rule in words: "Ban L3 · E17". */
export function describe({ layer, expert, banned, bias }) {
  const place = `${layer === null ? "all layers" : `L${layer}`} · E${expert}`;
  if (banned) return `Ban ${place}`;
  return `${bias > 0 ? "Boost" : "Weaken"} ${place} ${signed(bias)}`;
}
