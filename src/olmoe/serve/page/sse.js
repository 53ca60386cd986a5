// Server-sent events from a fetch body, whatever way the network splits it. EventSource cannot POST.

/**
 * Turns bytes into events. `push` takes a chunk and returns the events that it completes; lines end with LF, CR or
 * CRLF, also where CR and LF come in different chunks; comments (keep-alives) yield nothing.
 */
export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];
  #event = "";
  #skipLineFeed = false;

  push(bytes) {
    return this.#take(this.#decoder.decode(bytes, { stream: true }));
  }

  /** What was complete but for its blank line when the stream ended. */
  end() {
    const events = this.#take(`${this.#decoder.decode()}\n\n`);
    this.#rest = "";
    return events;
  }

  #take(text) {
    const events = [];
    if (this.#skipLineFeed && text) {
      if (text[0] === "\n") text = text.slice(1);
      this.#skipLineFeed = false;
    }
    text = this.#rest + text;
    let start = 0;
    for (let i = this.#rest.length; i < text.length; i++) {
      const c = text[i];
      if (c !== "\n" && c !== "\r") continue;
      this.#line(text.slice(start, i), events);
      if (c === "\r") {
        if (i + 1 === text.length) this.#skipLineFeed = true;
        else if (text[i + 1] === "\n") i++;
      }
      start = i + 1;
    }
    this.#rest = text.slice(start);
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
      this.#data = [];
      this.#event = "";
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return;
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
  }
}

/** The events of a response body, as they arrive. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      yield* parser.push(value);
    }
    yield* parser.end();
  } finally {
    reader.cancel().catch(() => {});
  }
}
