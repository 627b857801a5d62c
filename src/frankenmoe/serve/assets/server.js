// Talks to the server: requests with a key, streams, and whether it still answers.

import { key } from "./kept.js";

export class Refused extends Error {} // the server said no, and why
export class Gone extends Error {} // the server does not answer, or stopped in the middle

const QUIET = 5000, AWAY = 2000, PATIENCE = 8000; // milliseconds between looks, and until a look is given up

const reason = async (response) => {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
};

// lines of an event stream, as {comment} or {data}
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split(/\r?\n/);
    rest = found.pop();
    for (const line of found) {
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      else if (line.startsWith("data:")) yield { data: line.slice(5).trim() };
    }
  }
}

export class Server {
  // askKey(wrong) -> a promise of a key, or null; seen({alive, waiting, back}) hears about each look at the server
  constructor({ askKey, seen }) {
    Object.assign(this, { askKey, seen, alive: true });
  }

  async models() {
    return (await (await this.#request("/v1/models")).json()).data;
  }

  async refit(model, prompts, signal) {
    return (await this.#request("/v1/frankenmoe/refit", { model, prompts }, signal)).json();
  }

  // yields {queued}, {text, trace} and at the end {usage}
  async *chat(body, signal) {
    const response = await this.#request("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
    try {
      for await (const { comment, data } of lines(response)) {
        const queued = comment?.match(/^queued (\d+)/);
        if (queued) yield { queued: Number(queued[1]) };
        if (data === "[DONE]") return;
        if (data) yield* this.#chunk(JSON.parse(data));
      }
    } catch (error) {
      if (error instanceof Refused || error.name === "AbortError") throw error;
      this.look();
      throw new Gone("the server stopped in the middle of the reply");
    }
    this.look();
    throw new Gone("the server stopped in the middle of the reply");
  }

  *#chunk({ error, choices = [], usage }) {
    if (error) throw new Refused(error.message);
    for (const { delta = {}, trace, finish_reason } of choices) yield { text: delta.content ?? "", trace: trace ?? [], finish: finish_reason };
    if (usage) yield { usage };
  }

  async #request(path, body, signal) {
    for (let wrong = false; ; wrong = true) {
      const headers = { ...(body && { "Content-Type": "application/json" }), ...(key.get() && { Authorization: `Bearer ${key.get()}` }) };
      let response;
      try {
        response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
      } catch (error) {
        if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
        this.#is(false);
        throw new Gone("the server does not answer");
      }
      if (response.ok) return response;
      if (response.status !== 401) throw new Refused(await reason(response));
      const given = await this.#asked(wrong && Boolean(key.get()));
      if (!given) throw new Refused("the server wants its API key; load this page again to enter it");
      key.set(given);
    }
  }

  // asked for once, also if several requests need it; and not again if the answer was none
  async #asked(wrong) {
    this.asking ??= this.askKey(wrong).then((given) => {
      if (given) this.asking = null;
      return given;
    });
    return this.asking;
  }

  #is(alive, waiting = 0) {
    const back = alive && !this.alive;
    this.alive = alive;
    this.seen({ alive, waiting, back });
  }

  async look() {
    clearTimeout(this.timer);
    try {
      if (document.visibilityState === "visible" || !this.alive) {
        const { waiting } = await (await this.#request("/health", undefined, AbortSignal.timeout(PATIENCE))).json();
        this.#is(true, waiting);
      }
    } catch (error) {
      if (error instanceof Refused) this.#is(true); // it answers
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), this.alive ? QUIET : AWAY);
  }
}
