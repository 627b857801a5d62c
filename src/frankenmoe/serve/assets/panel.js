// What one token saw: its experts, their weights and the runner-up, in one layer or in the whole model.

import { chip, make, markOf, paint, visible } from "./base.js";
import { ALL } from "./trace.js";

const MOST = 6; // experts of the whole model that the panel lists; each layer lists all it chose

export class Panel {
  constructor({ marks, setLayer, say }) {
    Object.assign(this, { marks, setLayer, say, reply: null, token: 0 });
    this.box = document.getElementById("token");
    this.slider = document.getElementById("which");
    this.slider.addEventListener("input", () => this.show(this.reply, Number(this.slider.value) - 1));
    document.getElementById("unpoint").addEventListener("click", () => this.clear());
  }

  show(reply, token) {
    if (reply !== this.reply) this.reply?.mark(null);
    Object.assign(this, { reply, token });
    reply.mark(token);
    this.draw();
  }

  // while its reply grows
  follow() {
    if (this.reply) this.slider.max = this.reply.trace.length;
  }

  clear() {
    this.reply?.mark(null);
    this.reply = null;
    document.body.classList.remove("pointed");
    document.getElementById("token-controls").hidden = true;
    this.box.replaceChildren(make("p", { class: "soft" }, "Point at a token of a reply, or go to the reply with Tab: ← → move through its tokens, ↑ ↓ through the layers."));
  }

  // moves by keys; the new token is said, since the focus stays where it is
  step(reply, key) {
    if (key === "ArrowUp" || key === "ArrowDown") this.setLayer(reply.layer + (key === "ArrowUp" ? 1 : -1));
    else {
      const last = reply.trace.length - 1, now = this.reply === reply ? this.token : -1;
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[key];
      this.show(reply, Math.min(last, Math.max(0, to)));
      reply.focus();
    }
    if (this.reply) this.say(this.sentence());
  }

  sentence() {
    const { reply, token } = this, shown = reply.words[token].trim() || visible(reply.words[token]);
    const where = reply.layer === ALL ? "all layers" : `layer ${reply.layer}`;
    const experts = reply.trace.chosen(reply.layer, token).slice(0, 3).map(({ expert, weight }) => `${this.#name(expert)} ${weight.toFixed(2)}`);
    const next = reply.layer === ALL ? -1 : reply.trace.next(reply.layer, token);
    return `${shown}, ${where}: ${experts.join(", ")}${next >= 0 ? `; next ${this.#name(next)}` : ""}`;
  }

  draw() {
    const { reply, token } = this;
    if (!reply) return;
    const { trace, layer } = reply, count = trace.length;
    document.body.classList.add("pointed");
    document.getElementById("token-controls").hidden = false;
    Object.assign(this.slider, { max: count, value: token + 1 });
    this.slider.setAttribute("aria-valuetext", `token ${token + 1} of ${count}: ${this.sentence()}`);
    const open = this.box.querySelector("details")?.open;
    const all = make("details", {}, make("summary", {}, `All ${trace.layers} layers`));
    all.addEventListener("toggle", () => { if (all.open && !all.querySelector("table")) all.append(this.#layers()); });
    all.open = Boolean(open);
    this.box.replaceChildren(
      make("h3", {}, `“${visible(reply.words[token])}”`),
      make("p", { class: "soft" }, `Token ${token + 1} of ${count}, ${layer === ALL ? "share of the weight in all layers" : `layer ${layer}`}`),
      this.#table(), ...(trace.layers > 1 ? [make("p", { class: "soft" }, "First expert in each layer:"), this.#strip(), all] : []));
  }

  #name(expert) {
    return this.reply.experts[expert] ?? "dropped";
  }

  #named(expert) {
    return make("td", {}, chip(markOf(this.marks, expert)), ` ${this.#name(expert)}`);
  }

  #table() {
    const { reply: { trace, layer }, token } = this, chosen = trace.chosen(layer, token);
    const table = make("table", {}, make("tr", {}, make("th", { scope: "col" }, "expert"), make("th", { scope: "col" }, layer === ALL ? "share" : "weight")));
    for (const { expert, weight } of layer === ALL ? chosen.slice(0, MOST) : chosen) {
      const bar = paint(make("span", { class: "meter", style: `width:${5 * Math.min(1, weight)}rem` }), markOf(this.marks, expert));
      table.append(make("tr", {}, this.#named(expert), make("td", {}, bar, ` ${weight.toFixed(3)}`)));
    }
    if (layer !== ALL) {
      const next = trace.next(layer, token);
      if (next >= 0) table.append(make("tr", { class: "other" }, this.#named(next), make("td", {}, "runner-up")));
    } else if (chosen.length > MOST) table.append(make("tr", { class: "other" }, make("td", {}, `${chosen.length - MOST} more`), make("td")));
    return table;
  }

  #strip() {
    const { trace, layer } = this.reply;
    return make("div", { class: "strip" }, ...Array.from({ length: trace.layers }, (_, index) => {
      const first = trace.first(index, this.token), mark = markOf(this.marks, first);
      const button = paint(make("button", { type: "button", class: "chip", "aria-label": `layer ${index}: ${this.#name(first)}` }, mark.digit), mark);
      if (index === layer) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => {
        this.setLayer(index === layer ? ALL : index);
        this.box.querySelectorAll(".strip button")[index].focus();
      });
      return button;
    }));
  }

  #layers() {
    const { trace } = this.reply, cells = (expert, weight) => make("span", { class: "pair" }, chip(markOf(this.marks, expert)), ` ${weight.toFixed(2)} `);
    const table = make("table", {}, make("tr", {}, ...["layer", "experts and weights", "next"].map((name) => make("th", { scope: "col" }, name))));
    for (let layer = 0; layer < trace.layers; layer++) {
      const next = trace.next(layer, this.token);
      table.append(make("tr", {}, make("th", { scope: "row" }, String(layer)),
        make("td", {}, ...trace.chosen(layer, this.token).map(({ expert, weight }) => cells(expert, weight))),
        make("td", {}, next >= 0 ? chip(markOf(this.marks, next)) : "–")));
    }
    return table;
  }
}
