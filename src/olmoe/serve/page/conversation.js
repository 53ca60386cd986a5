// The conversation: turns with the versions of their answers, sending, stopping, editing, running again.

import { Answer } from "./answer.js";
import { AnswerView } from "./answer_view.js";
import { ServerError, streamAnswer } from "./api.js";
import { changedTokens } from "./diff.js";
import { announce, button, copyFrom, el } from "./dom.js";

const LOGPROBS = 5; // alternatives shown of each token
const freshSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

export class Conversation extends EventTarget {
  #turns = [];
  #list = document.getElementById("turns");
  #running = null; // {turn, controller}
  #pinned = null; // {turn, token}

  constructor({ settings, policy, panel }) {
    super();
    this.settings = settings;
    this.policy = policy;
    this.panel = panel;
    this.model = null;
    settings.addEventListener("source", () => {
      for (const turn of this.#turns) turn.view?.rebuild(this.#plain(turn));
    });
  }

  get busy() {
    return this.#running !== null;
  }

  get last() {
    return this.#turns.at(-1) ?? null;
  }

  /** Sends a message (chat), or a text to continue. */
  send(mode, text) {
    this.#start({ mode, user: text, versions: [], shown: -1, node: null, view: null });
  }

  stop() {
    this.#running?.controller.abort();
  }

  clear() {
    this.stop();
    this.#turns = [];
    this.#pinned = null;
    for (const node of this.#list.querySelectorAll(".turn")) node.remove();
    this.#running = null;
    this.panel.forget();
    this.#tell();
  }

  /** The last answer once more: with its seed, so that only the router policy and settings can change it, or a new one. */
  again({ sameSeed }) {
    const turn = this.last;
    if (!turn || this.busy) return;
    this.#run(turn, sameSeed ? turn.versions[turn.shown]?.seed : undefined);
  }

  editLast() {
    if (this.last && !this.busy) this.#edit(this.last);
  }

  /** Lets go of a token that is pinned. */
  unpin() {
    const pinned = this.#pinned;
    this.#pinned = null;
    pinned?.turn.view.mark(null);
    this.panel.inspect(null);
    this.dispatchEvent(new CustomEvent("pin", { detail: null }));
    return pinned !== null;
  }

  #tell() {
    document.getElementById("welcome").hidden = this.#turns.length > 0;
    this.dispatchEvent(new Event("change"));
  }

  #start(turn) {
    this.#turns.push(turn);
    turn.node = el("article", { tabIndex: -1, className: `turn ${turn.mode}`, "aria-label": turn.mode === "chat" ? "Message and answer" : "Text and continuation" });
    this.#list.append(turn.node);
    this.#run(turn);
  }

  #plain(turn) {
    return turn.mode === "complete" || this.settings.source;
  }

  #request(turn, seed) {
    const body = {
      model: this.model?.id,
      ...this.settings.sampling(),
      seed,
      return_token_ids: true,
      routing: this.model?.layers ? true : undefined,
      router_policy: this.policy.wire(),
    };
    if (turn.mode === "complete") return ["v1/completions", { ...body, prompt: turn.user, logprobs: LOGPROBS }];
    const messages = [];
    if (this.settings.system.trim()) messages.push({ role: "system", content: this.settings.system });
    for (const each of this.#turns) {
      if (each.mode !== "chat") continue;
      messages.push({ role: "user", content: each.user });
      if (each === turn) break;
      const text = each.versions[each.shown]?.text;
      if (text) messages.push({ role: "assistant", content: text });
      else messages.pop(); // what has no answer is not sent: templates want turns in alternation
    }
    return ["v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: LOGPROBS }];
  }

  async #run(turn, seed = this.settings.seed ?? freshSeed()) {
    const { problem } = this.settings;
    const before = turn.versions[turn.shown] ?? null;
    const answer = new Answer({ seed, policy: this.policy.words(), model: this.model?.layers ? this.model : null, before });
    turn.versions.push(answer);
    turn.shown = turn.versions.length - 1;
    this.unpin();
    this.#draw(turn);
    if (problem) {
      this.#close(turn, answer, "error", `${problem} Change it under Settings.`);
      return;
    }
    const controller = new AbortController();
    const run = { turn, controller };
    this.#running = run;
    this.panel.begin(answer);
    turn.view.node.classList.add("streaming");
    turn.view.body.setAttribute("aria-busy", "true");
    announce("The model is answering.");
    this.#tell();
    this.#follow();
    try {
      const [path, body] = this.#request(turn, seed);
      let finish = "stop";
      for await (const part of streamAnswer(path, body, { key: this.settings.key, signal: controller.signal })) {
        if (controller.signal.aborted) break;
        this.panel.take(answer.take(part));
        finish = part.finish ?? finish;
        if (part.usage) answer.usage = part.usage;
        this.#redraw(turn);
      }
      answer.close(controller.signal.aborted ? "stopped" : finish);
    } catch (error) {
      if (controller.signal.aborted) answer.close("stopped");
      else if (error instanceof ServerError) answer.close("error", error.message);
      else {
        answer.close("error", "Something went wrong in this page; the browser’s console has the details.");
        console.error(error);
      }
    }
    const current = this.#running === run;
    if (current) this.#running = null;
    if (!this.#turns.includes(turn)) return; // a new conversation has begun
    if (!answer.count) answer.compared = null;
    if (answer.compared) answer.changed = changedTokens(answer.compared, answer.ids);
    this.#close(turn, answer, answer.finish, answer.error);
  }

  #close(turn, answer, finish, error) {
    answer.finish = finish;
    answer.error = error;
    turn.view.node.classList.remove("streaming");
    turn.view.body.removeAttribute("aria-busy");
    this.panel.end(answer);
    const follow = this.#atEnd;
    this.#drawAll(turn);
    if (follow) this.#follow();
    announce(error ?? (finish === "length" ? "The answer was cut off." : `Answer finished, ${answer.count} tokens.`));
    this.#tell();
  }

  /** At most one drawing a frame, however many parts arrive. */
  #redraw(turn) {
    if (turn.frame) return;
    turn.frame = requestAnimationFrame(() => {
      turn.frame = 0;
      const follow = this.#atEnd;
      if (turn.versions[turn.shown]?.finish === null) turn.view.update();
      if (follow) this.#follow();
    });
  }

  get #atEnd() {
    const list = this.#list;
    return list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  }

  #follow() {
    this.#list.scrollTop = this.#list.scrollHeight;
  }

  #draw(turn) {
    const answer = turn.versions[turn.shown];
    turn.view = new AnswerView(answer, { plain: this.#plain(turn), tell: (kind, token) => this.#heard(turn, kind, token) });
    const user = el("div", { className: "user" }, el("div", { className: "user-text", textContent: turn.user }),
      el("div", { className: "actions" },
        button("Edit", "quiet", () => this.#edit(turn), { title: "Change this and send it again" }),
        button("Copy", "quiet", (event) => copyFrom(event.currentTarget, turn.user))));
    turn.userNode = user;
    const focused = turn.node.contains(document.activeElement);
    turn.node.replaceChildren(user, turn.view.node);
    if (focused) turn.node.focus({ preventScroll: true }); // what had the focus is gone
  }

  /** The turn with all that can be done; earlier turns lose what only the last one has. */
  #drawAll(turn) {
    for (const each of this.#turns) {
      if (each === turn || each.finished) this.#finish(each);
    }
  }

  #finish(turn) {
    turn.finished = true;
    const answer = turn.versions[turn.shown];
    const actions = [button("Copy", "quiet", (event) =>
      copyFrom(event.currentTarget, turn.mode === "complete" ? turn.user + answer.text : answer.text))];
    if (turn === this.last) {
      actions.push(button("Regenerate", "quiet", () => this.again({ sameSeed: false }), { title: "With a new seed, unless one is set in Settings" }));
      actions.push(button("Same seed", "quiet", () => this.again({ sameSeed: true }), { title: "With the same seed, so that only the router policy and the settings make a difference" }));
      if (turn.mode === "complete" && answer.text) {
        actions.push(button("Continue", "quiet", () => this.send("complete", turn.user + answer.text)));
      }
    }
    if (turn.versions.length > 1) actions.push(this.#pager(turn));
    turn.view.finish(actions);
  }

  #pager(turn) {
    const step = (by, label, sign) => button(sign, "quiet", () => {
      turn.shown += by;
      this.unpin();
      this.#draw(turn);
      this.#finish(turn);
      this.panel.end(turn.versions[turn.shown]);
    }, { "aria-label": label, disabled: this.busy || !turn.versions[turn.shown + by] });
    return el("span", { className: "pager" }, step(-1, "Earlier version", "‹"),
      el("span", { textContent: `${turn.shown + 1} / ${turn.versions.length}` }), step(1, "Later version", "›"));
  }

  #edit(turn) {
    if (this.busy) return;
    const area = el("textarea", { value: turn.user, rows: Math.min(12, turn.user.split("\n").length + 1), "aria-label": "Edit the message" });
    const cancel = () => {
      this.#draw(turn);
      this.#finish(turn);
      turn.userNode.querySelector("button").focus();
    };
    const save = () => {
      if (!area.value.trim() || this.busy) return;
      const from = this.#turns.indexOf(turn);
      for (const gone of this.#turns.splice(from)) gone.node.remove();
      this.send(turn.mode, area.value);
      document.getElementById("prompt").focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
      else if (event.key === "Escape") cancel();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    turn.userNode.replaceChildren(el("div", { className: "editor" }, area,
      el("div", { className: "actions" }, button("Send", "primary", save), button("Cancel", "quiet", cancel))));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #heard(turn, kind, token) {
    const answer = turn.versions[turn.shown];
    if (kind === "pin") {
      const same = this.#pinned?.turn === turn && this.#pinned.token === token;
      this.unpin();
      if (same) return;
      this.#pinned = { turn, token };
      turn.view.mark(token);
      this.panel.inspect({ answer, token }, true);
      this.dispatchEvent(new CustomEvent("pin", { detail: answer.pieces[token].trim() || "this token" }));
      return;
    }
    if (this.#pinned) return;
    turn.view.mark(kind === "look" ? token : null);
    this.panel.inspect(kind === "look" ? { answer, token } : null);
  }
}
