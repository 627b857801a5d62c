import { chip, fixed, make, markOf, paint, percent, themed, visible } from "./base.js";
// Shows one layer of every audit on the page, and what each token saw; numbers come ready from the JSON in the page.
(() => {
  const PAGE = 500; // tokens on the screen at once: more would be as many stops for the tab key
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("layer");
  const layerName = document.getElementById("layer-name");
  // names beside rows, chips over columns: names there would be too wide for half a page or a phone
  const whole = (audit, names) => names.length === audit.experts.length;
  const heads = (audit, names) => (whole(audit, names) ? names.map((_, expert) => chip(markOf(audit.marks, expert))) : names);
  const named = (audit, names) => (whole(audit, names) ? names.map((name, expert) => make("span", {}, chip(markOf(audit.marks, expert)), ` ${name}`)) : names);
  const fill = (id, ...children) => document.getElementById(id)?.replaceChildren(...children);

  // ---- what a layer's routers did

  const ROOM = 16; // columns with numbers that a page's width holds
  const matrix = (rows, columns, values, show, share) => {
    const dense = columns.length > ROOM; // then colour says it, and a number is there to be pointed at
    const table = make("table", { class: dense ? "matrix dense" : "matrix" });
    table.append(make("tr", {}, make("td"), ...columns.map((name) => make("th", { scope: "col" }, name))));
    rows.forEach((name, row) => {
      const cells = values[row].map((value) =>
        make("td", dense ? { title: show(value, row) } : {}, make("i", { style: `opacity:${0.6 * Math.min(1, Math.max(0, share(value, row)))}` }), make("span", {}, show(value, row))));
      table.append(make("tr", {}, make("th", { scope: "row" }, name), ...cells));
    });
    return make("div", { class: "scroll", tabindex: "0" }, table);
  };
  const caption = (text, ...children) => make("figure", {}, make("figcaption", {}, text), ...children);

  const showLoad = (audit, facts) => {
    const most = Math.max(...facts.load.share, 1e-9);
    const bars = make("div", { class: "bars" });
    facts.load.share.forEach((share, expert) => {
      const bar = paint(make("span", { class: "meter", style: `width:${(100 * share) / most}%` }), markOf(audit.marks, expert));
      bars.append(make("span", {}, chip(markOf(audit.marks, expert)), ` ${audit.experts[expert]}`), make("span", {}, bar),
        make("span", {}, facts.load.dead.includes(expert) ? "dead" : `${percent(share)}`));
    });
    return caption(`Assignments by expert in layer ${facts.layer} (even is ${percent(1 / facts.experts)})`, bars);
  };
  const showDomains = (audit, facts) => {
    if (!facts.domains) return "";
    const names = Object.keys(facts.domains.first).map((name) => {
      const expert = audit.experts.indexOf(name); // a label is the name of its expert
      return expert < 0 ? name : make("span", {}, chip(markOf(audit.marks, expert)), ` ${name}`);
    });
    const counts = Object.values(facts.domains.first);
    const totals = counts.map((row) => row.reduce((sum, count) => sum + count, 0) || 1);
    return caption("Rows are domains, columns experts: where a domain's tokens go first, in percent",
      matrix(names, heads(audit, audit.experts), counts, (count, row) => percent(count / totals[row]), (count, row) => count / totals[row]));
  };
  const showApart = (audit, facts) => {
    const apart = facts.apart;
    if (!apart || apart.paths.length < 2) return "";
    const names = apart.paths.map((path) => audit.paths[path] ?? path);
    return caption(`Distance of expert pairs in layer ${facts.layer}; the last row is the distance from the ${apart.reference === "base" ? "base" : "experts' mean"}`,
      matrix([...named(audit, names), apart.reference], heads(audit, names), [...apart.pairs, apart.to_reference], (value) => fixed(value), (value) => value / (Math.max(apart.farthest, ...apart.to_reference) || 1)));
  };
  const showGate = (audit, facts) =>
    facts.experts < 2 ? "" : caption(`Cosines between the gate's rows in layer ${facts.layer}`,
      matrix(named(audit, audit.experts), heads(audit, audit.experts), facts.gate.cosines, (value) => fixed(value), (value) => Math.abs(value)));
  const showCapacity = (audit, facts) => {
    const counts = [Math.min, Math.max].map((most) => most(...facts.load.assignments).toLocaleString("en"));
    return caption("Fewest and most assignments of an expert, and what a capacity drops",
      matrix(["fewest", "most", ...Object.keys(facts.capacity.over).map((factor) => `over ${factor}`)], [`layer ${facts.layer}`],
        [...counts, ...Object.values(facts.capacity.over).map(percent)].map((shown) => [shown]), (shown) => shown, () => 0));
  };
  const SHOW = { moe: showApart, load: showLoad, domain: showDomains, gate: showGate, survive: showCapacity };

  // ---- tokens

  const inflated = async (text, bytes) => {
    if (!text) return new Uint8Array();
    const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    return bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer);
  };
  const opened = async (trace) => {
    const [weights, dropped, best, logits] = await Promise.all([
      inflated(trace.weights, 1), inflated(trace.dropped, 1), inflated(trace.best, 1), inflated(trace.logits, trace.bytes)]);
    const size = trace.layers.length * trace.tokens; // arrays are [column, layer, token]
    const at = (column, layer, token) => column * size + layer * trace.tokens + token;
    const expert = (k, layer, token) => (dropped.length && dropped[at(k, layer, token)] ? -1 : best[at(k, layer, token)]);
    return {
      first: (layer, token) => expert(0, layer, token),
      chosen: (layer, token) => {
        let left = 1;
        return Array.from({ length: trace.top_k }, (_, k) => {
          const last = trace.weights_sum_to_one && k === trace.top_k - 1;
          const weight = last ? left : weights[at(k, layer, token)] / 255;
          left -= weight;
          return { expert: expert(k, layer, token), weight };
        });
      },
      best: (layer, token) => Array.from({ length: trace.kept }, (_, k) => ({
        expert: best[at(k, layer, token)], logit: trace.low[layer] + trace.unit[layer] * logits[at(k, layer, token)] })),
    };
  };

  class Tokens {
    constructor(audit, number) {
      Object.assign(this, { audit, number, page: 0, current: null });
      this.text = audit.passages.flatMap((passage) => passage.tokens);
      this.starts = new Map();
      let at = 0;
      for (const passage of audit.passages) { this.starts.set(at, passage.label); at += passage.tokens.length; }
      this.box = document.getElementById(`tokens-${number}`);
      this.panel = document.getElementById(`panel-${number}`);
      this.box.addEventListener("pointerover", (event) => this.point(event));
      this.box.addEventListener("focusin", (event) => this.point(event));
      this.box.addEventListener("click", (event) => this.point(event));
      this.box.addEventListener("keydown", (event) => this.key(event));
    }
    point(event) {
      const element = event.target.closest(".t");
      if (element) this.show(Number(element.dataset.i));
    }
    key(event) {
      const element = event.target.closest(".t");
      const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      const sideways = { ArrowRight: "next", ArrowLeft: "previous" }[event.key];
      if (!element || (step === undefined && !sideways)) return;
      event.preventDefault();
      if (step !== undefined) { setLayer(Number(slider.value) + step); return; }
      const all = [...this.box.querySelectorAll(".t")];
      all[all.indexOf(element) + (sideways === "next" ? 1 : -1)]?.focus();
    }
    draw() {
      const from = this.page * PAGE, to = Math.min(this.text.length, from + PAGE);
      const parts = [];
      for (let token = from; token < to; token++) {
        if (this.starts.has(token)) parts.push(make("h3", {}, this.starts.get(token)));
        parts.push(make("button", { type: "button", class: "t", "data-i": token }, visible(this.text[token])));
        if (this.text[token].includes("\n") && !this.text[token + 1]?.includes("\n")) parts.push(make("br"));
      }
      this.box.replaceChildren(...parts);
      const pages = Math.ceil(this.text.length / PAGE);
      const turn = (text, step) => {
        const button = make("button", { type: "button" }, text);
        button.disabled = this.page + step < 0 || this.page + step >= pages;
        button.addEventListener("click", () => { this.page += step; this.current = null; this.draw(); });
        return button;
      };
      if (pages > 1) fill(`pages-${this.number}`, turn("earlier tokens", -1), `tokens ${from + 1} to ${to} of ${this.text.length.toLocaleString("en")}`, turn("later tokens", 1));
      this.colour();
    }
    colour() {
      const layer = rowOf(this.audit);
      for (const element of this.box.querySelectorAll(".t")) {
        const token = Number(element.dataset.i), first = this.trace.first(layer, token), mark = markOf(this.audit.marks, first);
        paint(element, mark).dataset.d = mark.digit;
        element.classList.toggle("now", token === this.current);
        element.setAttribute("aria-label", `${this.text[token].trim() || "space"}, ${first < 0 ? "dropped" : this.audit.experts[first]}`);
      }
      if (this.current !== null) this.detail();
    }
    show(token) {
      if (token === this.current) return;
      this.box.querySelector(".t.now")?.classList.remove("now");
      this.box.querySelector(`[data-i="${token}"]`)?.classList.add("now");
      this.current = token;
      this.detail();
    }
    detail() {
      const { audit, trace, current } = this, row = rowOf(audit);
      const logit = new Map(trace.best(row, current).map(({ expert, logit }) => [expert, logit]));
      const table = make("table", {}, make("tr", {}, ...["expert", "weight", "logit"].map((name) => make("th", { scope: "col" }, name))));
      const chosen = trace.chosen(row, current);
      for (const { expert, weight } of chosen) {
        const bar = paint(make("span", { class: "meter", style: `width:${3.2 * weight}rem` }), markOf(audit.marks, expert));
        table.append(make("tr", {}, make("td", {}, chip(markOf(audit.marks, expert)), ` ${audit.experts[expert] ?? "dropped"}`), make("td", {}, bar, ` ${weight.toFixed(2)}`), make("td", {}, fixed(logit.get(expert)))));
      }
      const taken = new Set(chosen.map(({ expert }) => expert));
      for (const [expert, value] of logit) {
        if (!taken.has(expert)) table.append(make("tr", { class: "other" }, make("td", {}, chip(markOf(audit.marks, expert)), ` ${audit.experts[expert]}`), make("td", {}, "not chosen"), make("td", {}, fixed(value))));
      }
      const left = audit.experts.length - logit.size;
      const strip = make("div", { class: "strip" });
      audit.routers.forEach((facts, index) => {
        const first = trace.first(index, current), mark = markOf(audit.marks, first);
        const button = paint(make("button", { type: "button", class: "chip", "aria-label": `layer ${facts.layer}: ${audit.experts[first] ?? "dropped"}` }, mark.digit), mark);
        if (index === row) button.setAttribute("aria-current", "true");
        button.addEventListener("click", () => setLayer(index));
        strip.append(button);
      });
      this.panel.replaceChildren(
        make("h3", {}, `“${visible(this.text[current]).trimEnd()}”`),
        make("p", { class: "soft" }, `token ${current + 1} of ${this.text.length.toLocaleString("en")}, layer ${audit.routers[row].layer}`),
        make("p", { class: "soft" }, "first expert in every layer:"), strip,
        table, ...(left > 0 ? [make("p", { class: "soft" }, `${left} lower logits are left out to keep this page small`)] : []));
    }
  }

  // ---- one layer for the whole page

  const rowOf = (audit) => Math.min(Number(slider.value), audit.routers.length - 1);
  const tokens = [];
  const draw = () => {
    const names = new Set(data.audits.map((audit) => audit.routers[rowOf(audit)].layer));
    layerName.textContent = `Layer ${[...names].join(" / ")}`;
    slider.setAttribute("aria-valuetext", layerName.textContent);
    data.audits.forEach((audit, number) => {
      const facts = audit.routers[rowOf(audit)];
      for (const [question, sentence] of Object.entries(facts.sentences)) {
        const shown = SHOW[question]?.(audit, facts);
        fill(`here-${question}-${number}`, make("p", {}, make("strong", {}, `Layer ${facts.layer}. `), sentence), ...(shown ? [shown] : []));
      }
    });
    for (const each of tokens) each.colour();
  };
  const setLayer = (row) => {
    slider.value = Math.min(Number(slider.max), Math.max(0, row));
    draw();
  };
  slider.addEventListener("input", draw);
  themed(document.getElementById("theme"));
  // what sticks below the bar must know how high it is: the legend takes one line or several
  const bar = document.querySelector(".bar");
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
  const NAMESPACE = "http://www.w3.org/2000/svg";
  for (const point of document.querySelectorAll(".chart [role='graphics-symbol'][aria-label]")) {
    const title = document.createElementNS(NAMESPACE, "title"); // what a mouse gets to see on a mark
    title.textContent = point.getAttribute("aria-label");
    point.append(title);
  }
  draw();
  Promise.all(data.audits.map(async (audit, number) => {
    const each = new Tokens(audit, number);
    each.trace = await opened(audit.trace);
    tokens[number] = each;
    each.draw();
  })).then(() => document.documentElement.setAttribute("data-ready", "true"));
})();
