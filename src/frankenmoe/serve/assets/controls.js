// The controls of a model's routing, its experts with what they got, and of sampling. Settings belong to a model's name.

import { chip, make, markOf, paint, percent } from "./base.js";
import { signed } from "./reply.js";

const BIAS = 8, STEP = 0.5; // of router logits; fitted gates have a scale of a few

export class Controls {
  // `settings`: {model id: {count, off: [names], bias: {name: value}}}; changed() hears about every change
  constructor({ marks, settings, sampling, changed }) {
    Object.assign(this, { marks, settings, sampling, changed, rows: [] });
    this.body = document.getElementById("experts");
    this.count = document.getElementById("count");
    this.reset = document.getElementById("reset");
    this.count.addEventListener("input", () => { this.mine.count = Number(this.count.value); this.#renew(); });
    this.reset.addEventListener("click", () => { delete this.settings[this.model.id]; this.show(this.model); this.changed(); this.count.focus(); });
    for (const [name, value] of Object.entries(sampling)) {
      const input = document.getElementById(name);
      input.value = value;
      input.addEventListener("input", () => { if (input.value && input.validity.valid) sampling[name] = Number(input.value); this.#renew(); });
    }
  }

  get mine() {
    return (this.settings[this.model.id] ??= { count: this.facts.experts_per_token, off: [], bias: {} });
  }

  show(model) {
    Object.assign(this, { model, facts: model.frankenmoe });
    const { experts, controls, max_experts: most } = this.facts;
    const can = (control) => controls.includes(control);
    this.can = can;
    this.#forget(experts, most);
    document.getElementById("routing").hidden = !experts.length;
    document.getElementById("no-routing").hidden = experts.length > 0 && controls.length > 0;
    document.getElementById("no-routing").textContent = this.facts.kind === "gguf"
      ? "A GGUF file runs in llama.cpp, which cannot change or show its routing."
      : "This model has no experts, so there is no routing to change.";
    document.getElementById("count-row").hidden = !can("experts_per_token");
    this.count.max = most;
    this.rows = experts.map((name, expert) => this.#row(name, expert));
    const heads = [["on", "on", can("disable_experts")], ["", "expert", true], ["got", "tokens", can("trace")], ["bias", "added to its score", can("expert_bias")]];
    this.body.replaceChildren(
      make("thead", {}, make("tr", {}, ...heads.filter(([, , shown]) => shown).map(([name, text]) => make("th", { scope: "col", class: name }, text)))),
      make("tbody", {}, ...this.rows.map(({ row }) => row)));
    this.#renew(false);
  }

  // the extension fields of a request; nothing for what is as the model has it
  fields() {
    const { count, off, bias } = this.mine, on = this.facts.experts.length - off.length;
    const used = Math.min(count, on), moved = Object.entries(bias).filter(([name, value]) => value && !off.includes(name));
    return {
      ...(this.can("experts_per_token") && used !== this.facts.experts_per_token && { experts_per_token: used }),
      ...(this.can("disable_experts") && off.length && { disable_experts: off }),
      ...(this.can("expert_bias") && moved.length && { expert_bias: Object.fromEntries(moved) }),
    };
  }

  // counts: tokens that went first to each expert
  load(counts) {
    const whole = counts.reduce((sum, count) => sum + count, 0), most = Math.max(...counts, 1);
    this.rows.forEach(({ meter, share }, expert) => {
      meter.style.width = `${(100 * (counts[expert] ?? 0)) / most}%`;
      share.textContent = whole ? percent((counts[expert] ?? 0) / whole) : "–";
    });
  }

  // what an earlier server knew and this one does not
  #forget(experts, most) {
    const mine = this.mine, known = (name) => experts.includes(name);
    mine.off = mine.off.filter(known);
    if (mine.off.length >= experts.length) mine.off = [];
    mine.bias = Object.fromEntries(Object.entries(mine.bias).filter(([name]) => known(name)));
    mine.count = Math.min(mine.count, most);
  }

  #row(name, expert) {
    const mark = markOf(this.marks, expert);
    const on = make("input", { type: "checkbox", role: "switch", "aria-label": `${name} on`, class: "switch" });
    on.addEventListener("change", () => {
      const { off } = this.mine;
      this.mine.off = on.checked ? off.filter((each) => each !== name) : [...off, name];
      this.#renew();
    });
    const bias = make("input", { type: "range", min: -BIAS, max: BIAS, step: STEP, "aria-label": `added to the score of ${name}` });
    bias.addEventListener("input", () => { this.mine.bias[name] = Number(bias.value); this.#renew(); });
    const value = make("output"), meter = paint(make("span", { class: "meter" }), mark), share = make("span", { class: "share" }, "–");
    const cell = (...children) => make("td", {}, ...children);
    const row = make("tr", {},
      ...(this.can("disable_experts") ? [cell(on)] : []),
      make("th", { scope: "row", title: name }, make("span", { class: "name" }, chip(mark), make("span", {}, name))),
      ...(this.can("trace") ? [make("td", { class: "load" }, make("span", { class: "rail" }, meter), share)] : []),
      ...(this.can("expert_bias") ? [make("td", { class: "bias" }, bias, value)] : []));
    return { row, name, on, bias, value, meter, share };
  }

  #renew(told = true) {
    const { count, off, bias } = this.mine, on = this.facts.experts.length - off.length;
    for (const row of this.rows) {
      row.on.checked = !off.includes(row.name);
      row.on.disabled = row.on.checked && on === 1; // a token needs an expert
      row.bias.value = bias[row.name] ?? 0;
      row.bias.disabled = !row.on.checked;
      row.value.textContent = signed(bias[row.name] ?? 0);
      row.bias.setAttribute("aria-valuetext", row.value.textContent);
      row.row.classList.toggle("off", !row.on.checked);
    }
    this.count.value = count;
    document.getElementById("count-value").textContent = `${Math.min(count, on)} of ${on}`;
    document.getElementById("temperature-value").textContent = this.sampling.temperature ? this.sampling.temperature.toFixed(2) : "0 (the likeliest)";
    this.reset.hidden = !Object.keys(this.fields()).length;
    if (told) this.changed();
  }
}
