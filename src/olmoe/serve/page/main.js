// The page: puts its parts together.

import { servedModel } from "./api.js";
import { Conversation } from "./conversation.js";
import { copyFrom, button, stored } from "./dom.js";
import { ExpertsPanel } from "./experts_panel.js";
import { Policy } from "./policy.js";
import { Settings } from "./settings.js";

const byId = (id) => document.getElementById(id);
const SUGGESTIONS = {
  chat: ["Tell me a short story about a fox.", "Explain why the sky is blue, with a list.", "Write a function that reverses a list."],
  complete: ["Once upon a time", "The little girl looked at the sea and", "In the old house there lived"],
};
const MEMORY = "olmoe-theme";

const policy = new Policy();
const settings = new Settings();
const panel = new ExpertsPanel(policy);
const conversation = new Conversation({ settings, policy, panel });
const prompt = byId("prompt");

const mode = () => document.querySelector('input[name="mode"]:checked').value;

function notice(sentence, ...actions) {
  byId("notice").replaceChildren(sentence, ...actions);
  byId("notice").hidden = !sentence;
}

async function connect() {
  try {
    const model = await servedModel(settings.key);
    conversation.model = model;
    byId("model").textContent = model.id;
    byId("model").classList.remove("lost");
    settings.bound(model);
    panel.configure(model);
    if (!model.chat) choose("complete");
    notice("");
  } catch (error) {
    byId("model").textContent = "not connected";
    byId("model").classList.add("lost");
    const locked = error.status === 401 || error.status === 403;
    notice(error.message, locked ? button("Settings", "quiet", openSettings) : button("Try again", "quiet", connect));
  }
  refresh();
}

function choose(which) {
  document.querySelector(`input[name="mode"][value="${which}"]`).checked = true;
  modeChanged();
}

function modeChanged() {
  const complete = mode() === "complete";
  prompt.placeholder = complete ? "A text to continue…" : "Ask something…";
  byId("prompt-label").textContent = complete ? "Text to continue" : "Message";
  const made = SUGGESTIONS[mode()].map((text) => button(text, "suggestion", () => {
    prompt.value = text;
    submit();
  }));
  byId("suggestions").replaceChildren(...made);
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(220, prompt.scrollHeight + 2)}px`;
}

async function submit() {
  if (conversation.busy) return;
  const text = prompt.value;
  if (!text.trim()) {
    prompt.focus();
    return;
  }
  if (conversation.model === null) {
    await connect();
    if (conversation.model === null) return;
  }
  prompt.value = "";
  grow();
  conversation.send(mode(), text);
  prompt.focus();
}

/** What depends on whether an answer is running, and on whether there is one. */
function refresh() {
  const send = byId("send");
  send.textContent = conversation.busy ? "Stop" : "Send";
  send.classList.toggle("stop", conversation.busy);
  byId("rerun").hidden = conversation.busy || !stale();
}

/** Would the last answer come out of another policy than it did? */
function stale() {
  const answer = conversation.last?.versions[conversation.last.shown];
  return Boolean(answer) && answer.policy.join() !== policy.words().join();
}

function openSettings() {
  byId("settings").showModal();
}

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  const said = { light: "light", dark: "dark" }[theme] ?? "system";
  byId("theme").setAttribute("aria-label", `Theme: ${said}`);
  byId("theme").title = `Theme: ${said}`;
}

function nextTheme() {
  const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? null;
  const other = system === "dark" ? "light" : "dark";
  // From the system's to the other one, to the system's again.
  const next = now === null ? other : null;
  stored.set("localStorage", MEMORY, next);
  applyTheme(next);
}

function view(which) {
  byId("columns").dataset.view = which;
  byId("view-chat").setAttribute("aria-pressed", String(which === "chat"));
  byId("view-experts").setAttribute("aria-pressed", String(which === "experts"));
}

applyTheme(["light", "dark"].includes(stored.get("localStorage", MEMORY)) ? stored.get("localStorage", MEMORY) : null);
byId("theme").addEventListener("click", nextTheme);
byId("open-settings").addEventListener("click", openSettings);
byId("close-settings").addEventListener("click", () => byId("settings").close());
byId("settings").addEventListener("click", (event) => {
  if (event.target === byId("settings")) byId("settings").close(); // the backdrop
});
byId("view-chat").addEventListener("click", () => view("chat"));
byId("view-experts").addEventListener("click", () => view("experts"));
byId("modes").addEventListener("change", modeChanged);
byId("new-chat").addEventListener("click", () => {
  conversation.clear();
  notice("");
  prompt.focus();
});
byId("send").addEventListener("click", () => (conversation.busy ? conversation.stop() : submit()));
byId("rerun").addEventListener("click", () => {
  view("chat");
  conversation.again({ sameSeed: true });
  conversation.last.node.focus({ preventScroll: true });
});
byId("unpin").addEventListener("click", () => conversation.unpin());
byId("turns").addEventListener("click", (event) => {
  if (event.target.matches(".copy-code")) {
    copyFrom(event.target, event.target.closest(".code-block").querySelector("code").textContent);
  }
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && prompt.value === "" && conversation.last) {
    event.preventDefault();
    conversation.editLast();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || byId("settings").open) return;
  if (conversation.busy) conversation.stop();
  else conversation.unpin();
});
conversation.addEventListener("change", refresh);
// On a small screen the token's table is in the other view: its button says so.
conversation.addEventListener("pin", ({ detail }) => {
  byId("view-experts").textContent = detail === null ? "Experts" : `Experts of “${detail}”`;
});
policy.addEventListener("change", () => {
  settings.perToken = policy.perToken;
  refresh();
});
settings.addEventListener("k", () => (policy.perToken = settings.perToken));
settings.addEventListener("key", connect);
modeChanged();
connect();
