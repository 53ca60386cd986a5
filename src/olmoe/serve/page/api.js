// Talking to the server: what it serves, and streams of answers. Every failure becomes a sentence.

import { decodeRouting } from "./routing.js";
import { readEvents } from "./sse.js";

/** What went wrong, in a sentence for the reader; `status` is HTTP's, 0 where there was no answer. */
export class ServerError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});
const UNREACHABLE = "The server cannot be reached. Is it running, and on this address?";

async function failure(response) {
  let told = "";
  let details = {};
  try {
    const { error } = await response.json();
    told = typeof error === "string" ? error : (error?.message ?? "");
    details = { param: error?.param ?? null, code: error?.code ?? null };
  } catch {
    // A proxy's page, perhaps.
  }
  const { status } = response;
  let sentence = told || `The server answered with status ${status}.`;
  if (status === 401 || status === 403) sentence = `${told || "The server requires an API key."} Enter it under Settings.`;
  else if (status === 503 || status === 429) {
    const wait = response.headers.get("retry-after");
    sentence = told || "The server is busy.";
    if (wait) sentence += ` Try again in ${wait} ${wait === "1" ? "second" : "seconds"}.`;
  }
  return new ServerError(sentence, { status, ...details });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(UNREACHABLE);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** The model served: {id, context, layers, experts, perToken}; numbers are null where the server does not say. */
export async function servedModel(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  const { data } = await response.json();
  if (!data?.length) throw new ServerError("The server serves no model.");
  const { id, max_model_len: context, olmoe } = data[0];
  return {
    id,
    context: context ?? null,
    layers: olmoe?.layers ?? null,
    experts: olmoe?.experts ?? null,
    perToken: olmoe?.experts_per_token ?? null,
    chat: olmoe?.chat_template ?? true,
  };
}

/** The tokens of a choice: {id, text, bytes, logprob, top}. The two endpoints tell log-probabilities differently. */
function tokensOf(choice) {
  const ids = choice.token_ids ?? [];
  const told = choice.logprobs;
  if (told?.content) {
    return told.content.map((entry, i) => ({
      id: ids[i],
      text: entry.token,
      bytes: entry.bytes ?? null,
      logprob: entry.logprob,
      top: (entry.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  if (told?.tokens) {
    return told.tokens.map((text, i) => ({
      id: ids[i],
      text,
      bytes: null,
      logprob: told.token_logprobs?.[i] ?? null,
      top: Object.entries(told.top_logprobs?.[i] ?? {})
        .map(([other, logprob]) => ({ text: other, logprob }))
        .sort((a, b) => b.logprob - a.logprob),
    }));
  }
  const text = choice.delta?.content ?? choice.text ?? "";
  return ids.map((id, i) => ({ id, text: i === 0 ? text : "", bytes: null, logprob: null, top: [] }));
}

/** A chunk of either endpoint as {text, tokens, routes, finish, usage}. */
export function partOf(chunk) {
  if (chunk.error) {
    throw new ServerError(chunk.error.message ?? String(chunk.error), { status: 200, code: chunk.error.code ?? null });
  }
  const choice = chunk.choices?.[0];
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    tokens: choice ? tokensOf(choice) : [],
    routes: choice?.routing ? decodeRouting(choice.routing) : [],
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
  };
}

/** Parts of an answer as they arrive. Throws `ServerError`, also where the stream breaks off before its end. */
export async function* streamAnswer(path, body, { key, signal }) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  try {
    for await (const { data } of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const part = partOf(JSON.parse(data));
      finished ||= part.finish !== null;
      yield part;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    if (error instanceof SyntaxError) throw new ServerError("The server sent something that is not JSON.");
    if (error instanceof TypeError) throw new ServerError("The connection to the server was lost.");
    throw error;
  }
  if (!finished) throw new ServerError("The connection ended before the answer did.");
}
