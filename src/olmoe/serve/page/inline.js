// The inline part of Markdown: emphasis, code, links, line breaks. Linear in the text but for the search of link ends,
// which is bounded: a model (or who writes into its prompt) must not be able to hang the page.
//
// Nodes are {kind: "text", text, places}, {kind: "break"} and {kind: "element", tag, children, href?, title?}; `places`
// holds for each UTF-16 unit of `text` its place in the string that was parsed.

const LONGEST_LINK = 2000;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const SPACE = /\s/u;

/** The address if a click on it can do no harm, else null. Relative ones would lead into this server: refused too. */
export function safeLink(address) {
  // Browsers drop control characters and spaces: "java\nscript:" is "javascript:" to them.
  const cleaned = [...address].filter((c) => c > "\u0020" && c !== "\u007f").join("");
  if (!/^(?:https?:\/\/|mailto:)/i.test(cleaned)) return null;
  try {
    const url = new URL(cleaned);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const textNode = (text, start) => ({
  kind: "text",
  text,
  places: Array.from({ length: text.length }, (_, k) => start + k),
});

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = [];
    this.brackets = []; // indexes of nodes
    this.unclosed = new Set(); // lengths of backtick runs that nothing closes
  }

  parse() {
    let plain = this.at;
    const { text } = this;
    const flush = () => {
      if (this.at > plain) this.nodes.push(textNode(text.slice(plain, this.at), plain));
    };
    while (this.at < text.length) {
      const start = this.at;
      const take = this.#special(text[start]);
      if (take === null) {
        this.at++;
        continue;
      }
      flush();
      plain = start;
      if (take()) plain = this.at;
      else this.at = Math.max(this.at, start + 1);
    }
    flush();
    return emphasize(this.nodes);
  }

  /** What handles a character: a function that pushes nodes, moves `at` and says true, or changes nothing. */
  #special(c) {
    switch (c) {
      case "\\": return () => this.#escape();
      case "\n": return () => this.#lineBreak();
      case "`": return () => this.#code();
      case "*": case "_": case "~": return () => this.#delimiter(c);
      case "[": return () => this.#open(1);
      case "!": return this.text[this.at + 1] === "[" ? () => this.#open(2) : null;
      case "]": return () => this.#close();
      case "<": return () => this.#angle();
      case "&": return () => this.#entity();
      case "h": return this.text.startsWith("http", this.at) ? () => this.#bareLink() : null;
      default: return null;
    }
  }

  #escape() {
    const next = this.text[this.at + 1];
    if (next === undefined || !/[!-/:-@[-`{-~]/.test(next)) return false;
    this.nodes.push(textNode(next, this.at + 1));
    this.at += 2;
    return true;
  }

  #lineBreak() {
    const last = this.nodes.at(-1);
    if (last?.kind === "text") {
      const kept = last.text.replace(/[ \t]+$/, "");
      last.text = kept;
      last.places.length = kept.length;
    }
    this.nodes.push({ kind: "break" });
    this.at++;
    while (/[ \t]/.test(this.text[this.at] ?? "")) this.at++;
    return true;
  }

  #code() {
    const { text } = this;
    let open = this.at;
    while (text[open] === "`") open++;
    const size = open - this.at;
    if (!this.unclosed.has(size)) {
      for (let i = text.indexOf("`", open); i >= 0; i = text.indexOf("`", i)) {
        const start = i;
        while (text[i] === "`") i++;
        if (i - start !== size) continue;
        let [from, to] = [open, start];
        const body = text.slice(from, to);
        if (body.startsWith(" ") && body.endsWith(" ") && body.trim()) [from, to] = [from + 1, to - 1];
        const inner = textNode(text.slice(from, to).replaceAll("\n", " "), from);
        this.nodes.push({ kind: "element", tag: "code", children: [inner] });
        this.at = i;
        return true;
      }
      this.unclosed.add(size);
    }
    this.nodes.push(textNode("`".repeat(size), this.at));
    this.at = open;
    return true;
  }

  #delimiter(c) {
    const { text } = this;
    let end = this.at;
    while (text[end] === c) end++;
    const before = characterAt(text, isLow(text, this.at - 1) ? this.at - 2 : this.at - 1);
    const after = characterAt(text, end);
    const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const node = textNode(text.slice(this.at, end), this.at);
    if (c !== "~" || end - this.at <= 2) {
      node.run = {
        c,
        size: end - this.at,
        opens: c === "_" ? left && (!right || PUNCTUATION.test(before)) : left,
        closes: c === "_" ? right && (!left || PUNCTUATION.test(after)) : right,
      };
    }
    this.nodes.push(node);
    this.at = end;
    return true;
  }

  #open(size) {
    this.brackets.push(this.nodes.length);
    this.nodes.push(textNode(this.text.slice(this.at, this.at + size), this.at));
    this.at += size;
    return true;
  }

  #close() {
    const opener = this.brackets.pop();
    if (opener === undefined) return false;
    const target = linkTarget(this.text, this.at + 1);
    if (target === null) return false;
    const href = safeLink(target.address);
    const children = emphasize(this.nodes.splice(opener + 1));
    this.nodes.pop();
    // A link with a scheme that could do harm keeps its words, and is no link.
    if (href === null) this.nodes.push(...children);
    else {
      this.nodes.push({ kind: "element", tag: "a", href, title: target.title || href, children });
    }
    this.brackets = []; // links do not hold links
    this.at = target.end;
    return true;
  }

  #angle() {
    const end = this.text.indexOf(">", this.at);
    if (end < 0 || end - this.at > LONGEST_LINK) return false;
    const address = this.text.slice(this.at + 1, end);
    if (/[\s<]/.test(address)) return false;
    const href = safeLink(address);
    if (href === null) return false;
    this.nodes.push({ kind: "element", tag: "a", href, title: href, children: [textNode(address, this.at + 1)] });
    this.at = end + 1;
    return true;
  }

  #bareLink() {
    if (/[\p{L}\p{N}_]/u.test(this.text[this.at - 1] ?? " ") || this.brackets.length) return false;
    const found = /^https?:\/\/[^\s<>"'`*|]+/.exec(this.text.slice(this.at, this.at + LONGEST_LINK));
    if (!found) return false;
    let address = found[0].replace(/[.,;:!?]+$/, "");
    while (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
    if (address.endsWith("]")) address = address.slice(0, -1);
    const href = safeLink(address);
    if (href === null) return false;
    this.nodes.push({ kind: "element", tag: "a", href, title: href, children: [textNode(address, this.at)] });
    this.at += address.length;
    return true;
  }

  #entity() {
    for (const [written, meant] of Object.entries(ENTITIES)) {
      if (this.text.startsWith(written, this.at)) {
        this.nodes.push(textNode(meant, this.at));
        this.at += written.length;
        return true;
      }
    }
    return false;
  }
}

const characterAt = (text, i) => (i < 0 || i >= text.length ? " " : String.fromCodePoint(text.codePointAt(i)));
const isLow = (text, i) => i > 0 && text.charCodeAt(i) >= 0xdc00 && text.charCodeAt(i) <= 0xdfff;

/** `(address "title")` at a place: its parts and its end, or null. Parentheses within an address may nest. */
function linkTarget(text, start) {
  if (text[start] !== "(") return null;
  const limit = Math.min(text.length, start + LONGEST_LINK);
  let i = start + 1;
  while (i < limit && SPACE.test(text[i])) i++;
  let address;
  if (text[i] === "<") {
    const end = text.indexOf(">", i);
    if (end < 0 || end >= limit || text.slice(i, end).includes("\n")) return null;
    address = text.slice(i + 1, end);
    i = end + 1;
  } else {
    const from = i;
    let depth = 0;
    for (; i < limit && !SPACE.test(text[i]); i++) {
      if (text[i] === "(") depth++;
      else if (text[i] === ")" && depth-- === 0) break;
    }
    address = text.slice(from, i);
  }
  while (i < limit && SPACE.test(text[i])) i++;
  let title = "";
  if (text[i] === '"' || text[i] === "'") {
    const end = text.indexOf(text[i], i + 1);
    if (end < 0 || end >= limit) return null;
    title = text.slice(i + 1, end);
    i = end + 1;
    while (i < limit && SPACE.test(text[i])) i++;
  }
  return text[i] === ")" ? { address, title, end: i + 1 } : null;
}

/** Pairs the runs of `*`, `_` and `~` among nodes by CommonMark's rules; a stack of open elements, one pass. */
function emphasize(nodes) {
  const stack = [{ children: [], run: null }]; // frames: what is open, and its nodes
  const open = { "*": 0, _: 0, "~": 0 };
  const unwind = (to) => {
    // Frames above `to` stay open without an end: their marks are text.
    while (stack.length - 1 > to) {
      const frame = stack.pop();
      open[frame.run.c]--;
      stack.at(-1).children.push(marks(frame), ...frame.children);
    }
  };
  for (const node of nodes) {
    const { run } = node;
    if (!run) {
      stack.at(-1).children.push(node);
      continue;
    }
    let left = run.size;
    let place = node.places[0];
    while (run.closes && left > 0 && open[run.c] > 0) {
      let k = stack.length - 1;
      while (k > 0 && !matches(stack[k].run, run, left)) k--;
      if (k === 0) break;
      unwind(k);
      const frame = stack.pop();
      open[frame.run.c]--;
      const used = run.c === "~" ? left : Math.min(2, left, frame.left);
      const tag = run.c === "~" ? "del" : used === 2 ? "strong" : "em";
      const made = { kind: "element", tag, children: frame.children };
      left -= used;
      place += used;
      if (frame.left > used) {
        stack.push({ ...frame, left: frame.left - used, children: [made] });
        open[frame.run.c]++;
      } else stack.at(-1).children.push(made);
    }
    if (left === 0) continue;
    if (run.opens && stack.length < 100) {
      stack.push({ run, left, place, children: [] });
      open[run.c]++;
    } else stack.at(-1).children.push(textNode(run.c.repeat(left), place));
  }
  unwind(0);
  return stack[0].children;
}

const marks = (frame) => textNode(frame.run.c.repeat(frame.left), frame.place);

function matches(opener, closer, left) {
  if (opener.c !== closer.c) return false;
  if (opener.c === "~") return opener.size === left;
  // CommonMark's rule of three: "*a**b*" is not two emphases.
  const both = (opener.opens && opener.closes) || (closer.opens && closer.closes);
  return !(both && (opener.size + closer.size) % 3 === 0 && (opener.size % 3 !== 0 || closer.size % 3 !== 0));
}

/** The nodes of a paragraph's text. */
export function parseInline(text) {
  return new Inline(text).parse();
}
