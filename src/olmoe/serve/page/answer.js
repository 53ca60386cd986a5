// One answer of the model: its text, its tokens with their places in the text, their experts, and how it ended.

import { Load } from "./routing.js";

export class Answer {
  constructor({ seed, policy, model, before = null }) {
    this.seed = seed;
    this.policy = policy; // in words
    this.text = "";
    this.ids = [];
    this.pieces = [];
    this.logprobs = [];
    this.tops = []; // for each token [{text, logprob}]
    this.routes = [];
    this.starts = [];
    this.ends = [];
    this.owners = []; // for each UTF-16 unit of the text its token
    this.load = model ? new Load(model.layers, model.experts) : null;
    this.finish = null; // "stop", "length", "stopped" (by the reader) or "error"
    this.error = null; // {message, ...}
    this.usage = null;
    this.compared = before?.count ? before.ids : null; // ids of the previous answer
    this.changed = new Set(); // tokens that differ from it: while they come, all from the first that does
    this.milliseconds = 0; // from the first token to the last
    this.started = performance.now();
    this.firstAt = null;
    this.#decoder = new TextDecoder();
  }

  #decoder;
  #placed = 0; // tokens that have a place
  #end = 0; // of the text that they cover

  get count() {
    return Math.max(this.ids.length, this.pieces.length);
  }

  /** Takes in a part of the stream (see api.js); returns its routes. */
  take(part) {
    if (this.firstAt === null && (part.text || part.tokens.length)) this.firstAt = performance.now();
    this.text += part.text;
    for (const token of part.tokens) {
      const at = this.ids.length;
      this.ids.push(token.id ?? at);
      if (this.compared && (this.changed.size || this.compared[at] !== this.ids[at])) this.changed.add(at);
      this.pieces.push(token.bytes ? this.#decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.text);
      this.logprobs.push(token.logprob);
      this.tops.push(token.top);
    }
    for (const route of part.routes) {
      this.routes.push(route);
      this.load?.add(route);
    }
    if (this.firstAt !== null) this.milliseconds = performance.now() - this.firstAt;
    this.#place(false);
    return part.routes;
  }

  close(finish, error = null) {
    this.finish = finish;
    this.error = error;
    this.#place(true);
    this.#giveTheRest();
  }

  /** A broken character at the very end belongs to its last token, which nothing follows to take it along. */
  #giveTheRest() {
    const broken = this.pieces.findLastIndex((piece, t) => piece.includes("\ufffd") && this.ends[t] === this.#end);
    if (broken < 0 || this.#end >= this.text.length) return;
    this.owners.length = this.#end;
    for (let c = this.#end; c < this.text.length; c++) this.owners.push(broken);
    this.#end = this.text.length;
    this.ends[broken] = this.#end;
    for (let t = broken + 1; t < this.starts.length; t++) this.starts[t] = this.ends[t] = this.#end;
  }

  /**
   * Gives tokens their places in the text. Text may lag behind its tokens (a stop string may be coming), an EOS or a
   * stop string never comes, and a character of several tokens belongs to the one that completes it.
   */
  #place(final) {
    for (; this.#placed < this.pieces.length; this.#placed++) {
      const piece = this.pieces[this.#placed];
      const rest = this.text.slice(this.#end, this.#end + piece.length + 8);
      if (!final && rest.length < piece.length && piece.startsWith(rest)) return;
      const end = this.#end + covered(piece, rest);
      this.starts.push(this.#end);
      this.ends.push(end);
      for (let c = this.#end; c < end; c++) this.owners[c] = this.#placed;
      this.#end = end;
    }
  }

  /** How many tokens have a place. */
  get placed() {
    return this.#placed;
  }
}

/**
 * How much of the text a token's piece covers. Without bytes, the parts of a broken character are U+FFFD: what stands
 * beside them is looked for nearby, and takes the character along. Of a piece that a stop string cut, the start counts.
 */
function covered(piece, rest) {
  let end = 0;
  for (const core of piece.split(/\ufffd+/)) {
    const at = rest.indexOf(core, end);
    if (at < 0 || at > end + 4) return rest !== "" && piece.startsWith(rest) ? rest.length : 0;
    if (core) end = at + core.length;
  }
  return end;
}
