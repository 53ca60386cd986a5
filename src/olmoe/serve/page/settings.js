// What the reader set: sampling, system prompt, API key. Remembered by the browser; the key for this tab alone.

import { stored } from "./dom.js";

const NUMBERS = [
  "temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
  "repetition_penalty",
];
const TEXTS = ["system", "stop"];
const DEFAULTS = { temperature: "0.7", top_p: "0.95", max_tokens: "256" };
const MEMORY = "olmoe-settings";
const KEY = "olmoe-api-key";

const field = (name) => document.getElementById(`set-${name}`);

export class Settings extends EventTarget {
  constructor() {
    super();
    this.#fill({ ...DEFAULTS, ...this.#remembered() });
    field("key").value = stored.get("sessionStorage", KEY) ?? "";
    for (const name of [...NUMBERS, ...TEXTS, "k", "source"]) field(name).addEventListener("input", () => this.#changed(name));
    field("key").addEventListener("change", () => {
      stored.set("sessionStorage", KEY, this.key);
      this.dispatchEvent(new Event("key"));
    });
    document.getElementById("settings-defaults").addEventListener("click", () => {
      this.#fill(DEFAULTS);
      this.#changed("source");
      this.#changed("k");
    });
  }

  get key() {
    return field("key").value.trim();
  }

  get system() {
    return field("system").value;
  }

  get source() {
    return field("source").checked;
  }

  get seed() {
    return this.#number("seed");
  }

  get perToken() {
    return this.#number("k");
  }

  set perToken(k) {
    field("k").value = k ?? "";
  }

  /** The number of experts bounds how many a token may have. */
  bound({ experts }) {
    if (experts) field("k").max = experts;
  }

  /** What is wrong with the fields, in a sentence, or null. */
  get problem() {
    for (const name of [...NUMBERS, "k"]) {
      const input = field(name);
      if (input.validity.valid) continue;
      const label = input.labels[0].textContent.trim();
      const { min, max } = input;
      const range = min && max ? `from ${min} to ${max}` : min ? `${min} or more` : "a number";
      return `${label} must be ${input.validity.stepMismatch ? "a whole number" : range}, not ${input.value || "this"}.`;
    }
    return null;
  }

  /** Sampling fields of a request; empty ones are left out. */
  sampling() {
    const fields = {};
    for (const name of NUMBERS) {
      const value = this.#number(name);
      if (value !== null && name !== "seed") fields[name] = value;
    }
    const stop = field("stop").value.split("\n").filter((line) => line !== "").map((s) => s.replaceAll("\\n", "\n"));
    if (stop.length) fields.stop = stop;
    return fields;
  }

  #number(name) {
    const { value } = field(name);
    return value.trim() === "" || !field(name).validity.valid ? null : Number(value);
  }

  #fill(values) {
    for (const name of [...NUMBERS, ...TEXTS]) field(name).value = values[name] ?? "";
    field("source").checked = values.source === "yes";
    field("k").value = "";
  }

  #changed(name) {
    const values = { source: this.source ? "yes" : "" };
    for (const each of [...NUMBERS, ...TEXTS]) values[each] = field(each).value;
    stored.set("localStorage", MEMORY, JSON.stringify(values));
    const said = document.getElementById("settings-error");
    said.textContent = this.problem ?? "";
    said.hidden = this.problem === null;
    this.dispatchEvent(new Event(name === "source" ? "source" : name === "k" ? "k" : "change"));
  }

  #remembered() {
    try {
      return JSON.parse(stored.get("localStorage", MEMORY)) ?? {};
    } catch {
      return {};
    }
  }
}
