// An answer on the page: its text as Markdown or as tokens, each token a place to point at, and what became of it.

import { el, visible } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";

export class AnswerView {
  #markdown = null;
  #shown = 0; // tokens in the plain view
  #plain;
  #current = 0; // the token that Tab comes to

  /** `tell(kind, token)` hears "look" (pointer or focus on a token), "leave" and "pin". */
  constructor(answer, { plain, tell }) {
    this.answer = answer;
    this.#plain = plain;
    this.tell = tell;
    this.body = el("div", { className: "answer-text", role: "group", "aria-label": "Answer: arrow keys move between tokens" });
    this.notes = el("div", { className: "answer-notes" });
    this.node = el("div", { className: "answer" }, this.body, this.notes);
    this.body.addEventListener("pointerover", (event) => this.#pointed(event));
    this.body.addEventListener("pointerleave", () => this.tell("leave", null));
    this.body.addEventListener("click", (event) => {
      const token = tokenOf(event.target);
      if (token !== null && String(document.getSelection()) === "") this.tell("pin", token);
    });
    this.body.addEventListener("focusin", (event) => {
      const token = tokenOf(event.target);
      if (token !== null) this.#arrived(token);
    });
    this.body.addEventListener("focusout", () => this.tell("leave", null));
    this.body.addEventListener("keydown", (event) => this.#key(event));
    this.rebuild(plain);
  }

  /** Draws all anew, as Markdown or as plain tokens. */
  rebuild(plain = this.#plain) {
    this.#plain = plain;
    this.body.replaceChildren();
    this.body.classList.toggle("plain", plain);
    this.#shown = 0;
    this.#markdown = plain ? null : new GrowingMarkdown(this.body, (text, offsets) => this.#leaf(text, offsets));
    this.update();
  }

  /** Draws what is new. */
  update() {
    const focused = this.body.contains(document.activeElement) ? tokenOf(document.activeElement) : null;
    if (this.#plain) this.#grow();
    else this.#markdown.update(this.answer.text);
    this.#makeReachable();
    if (focused !== null && !this.body.contains(document.activeElement)) this.#focus(focused);
  }

  /** The stream has ended: what differs from the previous answer, and how it ended. */
  finish(actions) {
    this.rebuild();
    const { answer } = this;
    const parts = [];
    if (answer.count) parts.push(`${answer.usage?.completion_tokens ?? answer.count} tokens`);
    if (answer.count > 1 && answer.milliseconds > 0) {
      parts.push(`${Math.round(((answer.count - 1) * 1000) / answer.milliseconds)} tokens/s`);
    }
    parts.push(`seed ${answer.seed}`, ...answer.policy);
    if (answer.finish === "stopped") parts.push("stopped by you");
    const notes = [el("p", { className: "meta", textContent: parts.join(" · ") })];
    if (answer.compared) notes.push(this.#comparison());
    if (answer.finish === "length") {
      notes.push(el("p", { className: "ended", textContent:
        `It was cut off after ${answer.usage?.completion_tokens ?? answer.count} tokens, the most that Max tokens or the context allows.` }));
    }
    if (answer.error) notes.push(el("p", { className: "failed", role: "alert", textContent: answer.error }));
    if (answer.finish === "stop" && answer.text === "") {
      notes.push(el("p", { className: "ended", textContent: "The model ended its answer immediately, without any text." }));
    }
    this.notes.replaceChildren(...notes, el("div", { className: "actions" }, ...actions));
  }

  #comparison() {
    const { changed, count, compared } = this.answer;
    const first = changed.size ? Math.min(...changed) : null;
    const sentence = first !== null
      ? `${changed.size} of ${count} tokens differ from the previous answer; the first is token ${first + 1}.`
      : compared.length === count ? "No token differs from the previous answer."
      : "It ends earlier than the previous answer and is identical up to there.";
    return el("p", { className: "compared" }, el("span", { className: "swatch", "aria-hidden": "true" }), sentence);
  }

  #span(token, text) {
    const span = el("span", { className: "token", tabIndex: -1, textContent: text, data: { token: String(token) } });
    span.classList.toggle("changed", this.answer.changed.has(token));
    return span;
  }

  #leaf(text, offsets) {
    const { owners } = this.answer;
    const fragment = document.createDocumentFragment();
    let start = 0;
    for (let i = 1; i <= text.length; i++) {
      if (i < text.length && owners[offsets[i]] === owners[offsets[start]]) continue;
      const token = owners[offsets[start]];
      const run = text.slice(start, i);
      fragment.append(token === undefined ? document.createTextNode(run) : this.#span(token, run));
      start = i;
    }
    return fragment;
  }

  #grow() {
    const { answer } = this;
    this.rest?.remove();
    for (; this.#shown < answer.placed; this.#shown++) {
      const t = this.#shown;
      const text = answer.text.slice(answer.starts[t], answer.ends[t]);
      const span = this.#span(t, text || visible(answer.pieces[t]));
      if (!text) span.classList.add("unseen"); // an EOS, or a part of a character
      if (/^\n+$/.test(text)) span.classList.add("newline"); // gets a mark to point at
      this.body.append(span);
    }
    const end = answer.placed ? answer.ends[answer.placed - 1] : 0;
    this.rest = document.createTextNode(answer.text.slice(end));
    this.body.append(this.rest);
  }

  #spansOf(token) {
    return this.body.querySelectorAll(`[data-token="${token}"]`);
  }

  #makeReachable() {
    if (this.body.querySelector('[tabindex="0"].token')) return;
    const span = this.#spansOf(this.#current)[0] ?? this.body.querySelector(".token");
    if (span) span.tabIndex = 0;
  }

  #arrived(token) {
    for (const old of this.body.querySelectorAll('[tabindex="0"].token')) old.tabIndex = -1;
    this.#current = token;
    const span = this.#spansOf(token)[0];
    if (span) span.tabIndex = 0;
    this.tell("look", token);
  }

  #focus(token) {
    this.#spansOf(token)[0]?.focus({ preventScroll: false });
  }

  #pointed(event) {
    const token = tokenOf(event.target);
    if (token !== null) this.tell("look", token);
  }

  #key(event) {
    const token = tokenOf(event.target);
    if (token === null) return;
    const shown = [...new Set([...this.body.querySelectorAll(".token")].map((span) => Number(span.dataset.token)))];
    const here = shown.indexOf(token);
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      this.#focus(shown[Math.max(0, Math.min(shown.length - 1, to))]);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.tell("pin", token);
    }
  }

  /** Marks the token that is looked at. */
  mark(token) {
    for (const span of this.body.querySelectorAll(".token.looked")) span.classList.remove("looked");
    if (token !== null) for (const span of this.#spansOf(token)) span.classList.add("looked");
  }
}

function tokenOf(node) {
  const span = node instanceof Element ? node.closest(".token") : null;
  return span ? Number(span.dataset.token) : null;
}

