// Markdown to DOM nodes. What a model writes is never trusted: nodes are made with createElement and textContent alone,
// HTML stays text, links have harmless schemes, and images become links, so nothing is ever fetched.
//
// Every character keeps its offset in the source, so a caller can wrap the visible text in spans of tokens:
// `leaf(text, offsets)` returns the node for a run of text; without one it is a text node.

import { parseInline } from "./inline.js";

const MAX_DEPTH = 10; // of lists and quotes within each other; deeper ones are shown as paragraphs
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const blank = (line) => line.text.trim() === "";
const indent = (text) => text.length - text.trimStart().length;
const drop = (line, n) => ({ text: line.text.slice(n), at: line.at + n });

function linesOf(source) {
  const lines = [];
  let at = 0;
  for (const text of source.split("\n")) {
    lines.push({ text: text.endsWith("\r") ? text.slice(0, -1) : text, at });
    at += text.length + 1;
  }
  return lines;
}

/** Does this line end a paragraph above it? */
function interrupts(text) {
  if (FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text)) return true;
  const item = ITEM.exec(text);
  return item !== null && item[1].length < 4 && item[3] !== undefined && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
}

function fence(lines, i) {
  const [, margin, marks, info] = FENCE.exec(lines[i].text);
  const end = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  const body = [];
  let j = i + 1;
  while (j < lines.length && !end.test(lines[j].text)) {
    body.push(drop(lines[j], Math.min(margin.length, indent(lines[j].text))));
    j++;
  }
  return { kind: "code", language: info.trim().split(/\s+/)[0], lines: body, next: Math.min(j + 1, lines.length) };
}

function quote(lines, i, depth) {
  const body = [];
  while (i < lines.length && !blank(lines[i])) {
    const mark = QUOTE.exec(lines[i].text);
    if (!mark && (body.length === 0 || interrupts(lines[i].text))) break;
    body.push(drop(lines[i], mark ? mark[0].length : 0));
    i++;
  }
  return { kind: "quote", blocks: parseBlocks(body, depth + 1), next: i };
}

const listType = (mark) => (/\d/.test(mark) ? mark.at(-1) : mark);

function list(lines, i, depth) {
  const first = ITEM.exec(lines[i].text);
  const type = listType(first[2]);
  const items = [];
  let loose = false;
  while (i < lines.length) {
    const mark = ITEM.exec(lines[i].text);
    if (!mark || listType(mark[2]) !== type || mark[1].length > first[1].length + 3 || RULE.test(lines[i].text)) break;
    const space = mark[3] === undefined || mark[3].length > 4 ? 1 : mark[3].length;
    const width = mark[1].length + mark[2].length + space;
    const body = [drop(lines[i], Math.min(width, lines[i].text.length))];
    i++;
    while (i < lines.length) {
      const { text } = lines[i];
      if (blank(lines[i])) {
        let j = i;
        while (j < lines.length && blank(lines[j])) j++;
        if (j === lines.length || indent(lines[j].text) < width) break;
        for (; i < j; i++) body.push(drop(lines[i], lines[i].text.length));
        loose = true;
        continue;
      }
      if (indent(text) < width && (ITEM.test(text) || interrupts(text) || blank(lines[i - 1]))) break;
      body.push(drop(lines[i], Math.min(width, indent(text))));
      i++;
    }
    items.push(parseBlocks(body, depth + 1));
    let j = i;
    while (j < lines.length && blank(lines[j])) j++;
    const following = j < lines.length ? ITEM.exec(lines[j].text) : null;
    if (!following || listType(following[2]) !== type || following[1].length > first[1].length + 3) break;
    if (j > i) loose = true;
    i = j;
  }
  const number = /\d/.test(first[2]) ? parseInt(first[2], 10) : null;
  return { kind: "list", number, loose, items, next: i };
}

function cells(line) {
  const found = [];
  let start = 0;
  const { text } = line;
  for (let i = 0; i <= text.length; i++) {
    if (text[i] === "\\") i++;
    else if (i >= text.length || text[i] === "|") {
      const raw = text.slice(start, i);
      found.push({ text: raw.trim(), at: line.at + start + indent(raw) });
      start = i + 1;
    }
  }
  if (found.length && found[0].text === "") found.shift();
  if (found.length && found.at(-1).text === "") found.pop();
  return found;
}

function table(lines, i) {
  if (i + 1 >= lines.length || !lines[i].text.includes("|") || !TABLE_RULE.test(lines[i + 1].text)) return null;
  const head = cells(lines[i]);
  const rules = cells(lines[i + 1]);
  if (head.length === 0 || head.length !== rules.length) return null;
  const align = rules.map(({ text }) => {
    if (text.endsWith(":")) return text.startsWith(":") ? "center" : "right";
    return "left";
  });
  const rows = [];
  let j = i + 2;
  while (j < lines.length && !blank(lines[j]) && lines[j].text.includes("|")) {
    const row = cells(lines[j]).slice(0, head.length);
    while (row.length < head.length) row.push({ text: "", at: lines[j].at });
    rows.push(row);
    j++;
  }
  return { kind: "table", head, align, rows, next: j };
}

function paragraph(lines, i) {
  const body = [];
  do {
    const left = indent(lines[i].text);
    body.push(drop(lines[i], left));
    i++;
  } while (i < lines.length && !blank(lines[i]) && !interrupts(lines[i].text) && !table(lines, i));
  return { kind: "paragraph", lines: body, next: i };
}

function block(lines, i, depth) {
  const { text } = lines[i];
  if (FENCE.test(text)) return fence(lines, i);
  const heading = HEADING.exec(text);
  if (heading) {
    const rest = drop(lines[i], heading[0].length);
    const left = drop(rest, indent(rest.text));
    const words = left.text.trimEnd();
    const marks = words.length - words.replace(/#+$/, "").length; // of a closing "##"
    const closed = marks > 0 && /[ \t]/.test(words[words.length - marks - 1] ?? " ");
    const kept = closed ? words.slice(0, words.length - marks).trimEnd() : words;
    return { kind: "heading", level: heading[1].length, lines: [{ text: kept, at: left.at }], next: i + 1 };
  }
  if (RULE.test(text)) return { kind: "rule", next: i + 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(text)) return quote(lines, i, depth);
    const item = ITEM.exec(text);
    if (item && item[1].length < 4) return list(lines, i, depth);
  }
  return table(lines, i) ?? paragraph(lines, i);
}

function parseBlocks(lines, depth) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (blank(lines[i])) {
      i++;
      continue;
    }
    const found = block(lines, i, depth);
    blocks.push({ ...found, start: lines[i].at, end: lines[found.next - 1].at + lines[found.next - 1].text.length });
    i = found.next;
  }
  return blocks;
}

function joined(lines) {
  const offsets = [];
  for (const line of lines) {
    for (let k = 0; k <= line.text.length; k++) offsets.push(line.at + k); // the last one is its line end
  }
  return { text: lines.map((line) => line.text).join("\n"), offsets };
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function inlineInto(parent, lines, leaf) {
  const { text, offsets } = joined(lines);
  const trimmed = text.trimEnd();
  build(parent, parseInline(trimmed), offsets, leaf);
}

function build(parent, nodes, offsets, leaf) {
  for (const node of nodes) {
    if (node.kind === "text") parent.append(leaf(node.text, node.places.map((p) => offsets[p])));
    else if (node.kind === "break") parent.append(document.createElement("br"));
    else {
      const made = document.createElement(node.tag);
      if (node.tag === "a") {
        made.href = node.href;
        made.rel = "noopener noreferrer nofollow";
        made.target = "_blank";
        if (node.title) made.title = node.title;
      }
      build(made, node.children, offsets, leaf);
      parent.append(made);
    }
  }
}

function codeBlock(found, leaf) {
  const { text, offsets } = joined(found.lines);
  const code = element("code");
  if (text) code.append(leaf(text, offsets));
  const bar = element("div", "code-bar", element("span", "", found.language || "text"));
  const copy = element("button", "quiet copy-code", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", "Copy this code");
  bar.append(copy);
  const pre = element("pre", "", code);
  pre.tabIndex = 0; // a keyboard can scroll it
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", found.language ? `Code, ${found.language}` : "Code");
  return element("div", "code-block", bar, pre);
}

function tableNode(found, leaf) {
  const row = (columns, name) => {
    const made = element("tr");
    columns.forEach((cell, c) => {
      const node = element(name, `align-${found.align[c]}`);
      inlineInto(node, [cell], leaf);
      made.append(node);
    });
    return made;
  };
  const head = element("thead", "", row(found.head, "th"));
  const body = element("tbody", "", ...found.rows.map((cellsOfRow) => row(cellsOfRow, "td")));
  return element("div", "table-scroll", element("table", "", head, body));
}

function render(found, leaf, tight = false) {
  if (found.kind === "code") return codeBlock(found, leaf);
  if (found.kind === "rule") return element("hr");
  if (found.kind === "table") return tableNode(found, leaf);
  if (found.kind === "quote") return element("blockquote", "", ...found.blocks.map((b) => render(b, leaf)));
  if (found.kind === "list") {
    const made = element(found.number === null ? "ul" : "ol");
    if (found.number !== null && found.number !== 1) made.start = found.number;
    for (const item of found.items) {
      const li = element("li", "", ...item.map((b) => render(b, leaf, !found.loose)));
      made.append(li);
    }
    return made;
  }
  // Headings of an answer stand below those of the page.
  const name = found.kind === "heading" ? `h${Math.min(6, found.level + 2)}` : "p";
  const made = element(name, found.kind === "heading" ? `level-${found.level}` : tight ? "tight" : "");
  inlineInto(made, found.lines, leaf);
  return made;
}

const textLeaf = (text) => document.createTextNode(text);

/** The nodes of a whole text. */
export function renderMarkdown(source, leaf = textLeaf) {
  const fragment = document.createDocumentFragment();
  for (const found of parseBlocks(linesOf(source), 0)) fragment.append(render(found, leaf));
  return fragment;
}

/** A text that grows: blocks that have not changed keep their nodes, so selections and focus outlive the stream. */
export class GrowingMarkdown {
  #container;
  #leaf;
  #sources = [];

  constructor(container, leaf = textLeaf) {
    this.#container = container;
    this.#leaf = leaf;
  }

  update(source) {
    const blocks = parseBlocks(linesOf(source), 0);
    // A block's offsets are part of it; the text between blocks does not matter.
    const sources = blocks.map((b) => `${b.start}:${source.slice(b.start, b.end)}`);
    let same = 0;
    while (same < sources.length && sources[same] === this.#sources[same]) same++;
    while (this.#container.childNodes.length > same) this.#container.lastChild.remove();
    for (const found of blocks.slice(same)) this.#container.append(render(found, this.#leaf));
    this.#sources = sources;
  }
}
