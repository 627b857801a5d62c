// One reply: its text, token by token in the colours of experts, and who got the tokens. Draws at most once a frame.

import { chip, make, markOf, paint, percent, visible } from "./base.js";
import { Trace } from "./trace.js";

const NAMED = 4; // experts named beside the bar; the list of controls has them all
const INDENTS = /\n[^\n]+$/; // such a token begins the line that it indents; one that ends with a line end is the last of its line
const ENDS = {
  done: "",
  length: "Cut at the limit of tokens.",
  stopped: "You stopped it here.",
  cut: "The page was loaded again while this reply came, so it ends here.",
  failed: "",
};

export class Reply {
  // facts: {model, experts, fields}, and what `kept` gave of an earlier one; show({reply, token}) is what a token was pointed at
  constructor(facts, { marks, layer, point }) {
    Object.assign(this, { text: "", words: [], state: "waiting", note: "", count: 0, seconds: 0, ...facts });
    this.trace = new Trace({ experts: this.experts.length, ...facts.trace });
    Object.assign(this, { marks, layer, drawn: 0, due: false, counts: this.trace.counts(layer), now: null });
    this.#build(point);
    this.#draw();
  }

  queued(before) {
    this.note = before ? `Waits its turn: ${before === 1 ? "1 request" : `${before} requests`} before it.` : "";
    this.#end();
  }

  add(text, trace, finish) {
    if (this.state === "waiting") Object.assign(this, { state: "streaming", note: "", started: performance.now() });
    this.text += text;
    spread(text, trace).forEach((word, index) => {
      this.words.push(word);
      this.trace.push(trace[index].layers);
      const first = this.trace.first(this.layer, this.trace.length - 1);
      if (first >= 0) this.counts[first]++;
    });
    this.finish = finish ?? this.finish;
    if (text || trace.length) this.seconds = (performance.now() - this.started) / 1000;
    this.#soon();
  }

  used({ completion_tokens: count }) {
    this.count = count;
  }

  end(state, note = "") {
    this.state = state === "done" && this.finish === "length" ? "length" : state;
    this.note = note;
    this.#draw();
    this.#end();
  }

  get over() {
    return this.state !== "waiting" && this.state !== "streaming";
  }

  colour(layer) {
    this.layer = layer;
    this.counts = this.trace.counts(layer);
    for (const each of this.box.querySelectorAll(".t")) this.#paint(each);
    this.#who();
  }

  // marks the token that the panel shows; null: none
  mark(token) {
    this.#span(this.now)?.classList.remove("now");
    this.now = token;
    this.#span(token)?.classList.add("now");
  }

  focus() {
    this.box.focus({ preventScroll: true });
    this.#span(this.now)?.scrollIntoView({ block: "nearest" });
  }

  kept(whole) {
    const { model, experts, fields, text, words, state, note, count, seconds } = this;
    if (this.over && whole) this.encoded ??= this.trace.kept();
    const trace = whole ? this.encoded ?? this.trace.kept() : null;
    return { model, experts, fields, text, words: trace ? words : [], trace, state, note, count, seconds };
  }

  #build(point) {
    this.stack = make("div", { class: "stack", role: "img" }, ...this.experts.map((_, expert) => paint(make("i"), markOf(this.marks, expert))));
    this.names = make("ul", { class: "names" });
    this.box = make("div", { class: "tokens" });
    this.foot = make("p", { class: "foot soft" });
    this.element = make("article", { class: "reply", "aria-label": `Reply of ${this.model}` },
      make("header", {}, make("h3", {}, this.model), make("span", { class: "soft" }, changes(this.fields))), this.stack, this.names, this.box, this.foot);
    this.box.addEventListener("pointerover", ({ target }) => target.dataset.i && point(this, Number(target.dataset.i)));
    this.box.addEventListener("click", ({ target }) => target.dataset.i && point(this, Number(target.dataset.i)));
  }

  #soon() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.due = false;
    if (!this.words.length) this.#plain();
    for (; this.drawn < this.words.length; this.drawn++) this.#token(this.drawn);
    this.#who();
    this.#end();
    this.element.dispatchEvent(new CustomEvent("drawn", { bubbles: true }));
  }

  // a model without experts, or a reply whose routing was not kept
  #plain() {
    if (this.text && !this.box.firstChild) this.box.append("");
    if (this.text) this.box.firstChild.appendData(this.text.slice(this.box.firstChild.length));
  }

  #token(index) {
    const word = this.words[index], before = this.words[index - 1] ?? "";
    if (!this.line || before.endsWith("\n") || INDENTS.test(word)) {
      this.line = make("div", { class: before.endsWith("\n\n") ? "line gap" : "line" });
      this.box.append(this.line); // a line of its own is laid out alone
    }
    const span = make("span", { class: "t", "data-i": index }, word ? visible(word) : "·"); // a part of a letter has no text
    this.line.append(span);
    this.#paint(span);
    if (!index) Object.entries({ tabindex: "0", role: "group", "aria-label": `Tokens of ${this.model}` }).forEach((pair) => this.box.setAttribute(...pair));
  }

  #paint(span) {
    const mark = markOf(this.marks, this.trace.first(this.layer, Number(span.dataset.i)));
    paint(span, mark).dataset.d = mark.digit;
  }

  #span(token) {
    return token === null ? null : this.box.querySelector(`[data-i="${token}"]`);
  }

  #who() {
    const whole = this.counts.reduce((sum, count) => sum + count, 0);
    this.stack.hidden = this.names.hidden = !whole;
    if (!whole) return;
    const ranked = [...this.counts.keys()].sort((one, two) => this.counts[two] - this.counts[one]).filter((expert) => this.counts[expert]);
    this.counts.forEach((count, expert) => { this.stack.children[expert].style.flexGrow = count; });
    const share = (expert) => percent(this.counts[expert] / whole);
    this.stack.setAttribute("aria-label", `Tokens by expert: ${ranked.map((expert) => `${this.experts[expert]} ${share(expert)}`).join(", ")}`);
    this.names.replaceChildren(
      ...ranked.slice(0, NAMED).map((expert) => make("li", {}, chip(markOf(this.marks, expert)), ` ${this.experts[expert]} ${share(expert)}`)),
      ...(ranked.length > NAMED ? [make("li", { class: "soft" }, `and ${ranked.length - NAMED} more`)] : []));
  }

  #end() {
    const tokens = this.count || this.words.length;
    const speed = tokens > 1 && this.seconds ? `, ${((tokens - 1) / this.seconds).toFixed(1)} tokens/s` : "";
    const made = tokens ? `${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}.` : "";
    const wait = this.state === "waiting" ? this.note || "Waits for the first token." : "";
    const lost = this.over && this.text && !this.words.length && this.experts.length ? "Its routing was not kept." : "";
    this.foot.replaceChildren([wait, made, lost, ENDS[this.state]].filter(Boolean).join(" "));
    if (this.state === "failed") this.foot.append(make("strong", { class: "bad" }, this.note));
    this.element.setAttribute("aria-busy", String(!this.over));
  }
}

// the text of a chunk shared out among its tokens. Parts of a letter, and words without the space before them, do not add
// up to it: then the last token has all of it
const spread = (text, trace) => {
  const words = trace.map((token) => token.text);
  return words.join("") === text ? words : words.map((_, index) => (index === words.length - 1 ? text : ""));
};

// what a request changes about the routing, in words
export const changes = ({ experts_per_token: count, disable_experts: off = [], expert_bias: bias = {} }) => [
  ...(count === undefined ? [] : [`top-${count}`]),
  ...(off.length ? [`without ${off.join(", ")}`] : []),
  ...Object.entries(bias).map(([name, value]) => `${name} ${signed(value)}`),
].join(" · ");

export const signed = (value) => (value > 0 ? `+${value}` : value < 0 ? `−${-value}` : "0");
