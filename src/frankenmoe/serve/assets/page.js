// The page: one conversation with a model, or with two side by side, and what changes when its routing does.

import { chip, make, markOf, themed, visible } from "./base.js";
import { Controls } from "./controls.js";
import { askKey, copyDialog, refitDialog } from "./dialogs.js";
import { found, keep } from "./kept.js";
import { Panel } from "./panel.js";
import { Reply } from "./reply.js";
import { Gone, Server } from "./server.js";
import { ALL } from "./trace.js";

const SAME = "="; // beside it: the same model as it is, without the changes made here
const EXAMPLES = 4; // prompts of experts that an empty conversation offers
const byId = (id) => document.getElementById(id);
const { marks } = JSON.parse(byId("data").textContent);
const state = { model: "", beside: "", layer: ALL, draft: "", settings: {}, sampling: { temperature: 0, limit: 200 }, turns: [], ...found() };
const talk = byId("talk"), prompt = byId("prompt"), slider = byId("layer");
let models = [], running = null, stuck = true, leaving = false, pressed = null;

const say = (text) => { byId("say").textContent = text; };
const notice = (text) => {
  byId("notice").hidden = !text;
  byId("notice-text").textContent = text;
};
const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
const modelOf = (id) => models.find((each) => each.id === id);
const besideModel = () => (state.beside === SAME ? modelOf(state.model) : modelOf(state.beside));

// ---- what the server says

const server = new Server({
  askKey,
  seen: ({ alive, waiting, back }) => {
    const text = !alive ? "no answer" : waiting ? `ready, ${waiting} in the queue` : "ready";
    byId("state").className = alive ? "good" : "bad";
    if (byId("state").textContent !== text) byId("state").textContent = text; // else a screen reader might say it again
    byId("send").disabled = !alive || !models.length;
    if (!alive) notice("The server does not answer. This page keeps the conversation and tries again every 2 seconds.");
    if (back || (alive && !models.length)) begin(back);
  },
});

const begin = async (back = false) => {
  try {
    models = await server.models();
    showModels();
    if (back) notice("");
    if (back) say("The server answers again.");
    byId("send").disabled = !models.length;
  } catch (error) {
    if (!(error instanceof Gone)) notice(sentence(error.message));
  }
};

const options = (select, entries, value) => {
  select.replaceChildren(...entries.map(([id, text]) => make("option", { value: id }, text)));
  select.value = entries.some(([id]) => id === value) ? value : entries[0][0];
  return select.value;
};
const showModels = () => {
  state.model = options(byId("model"), models.map(({ id }) => [id, id]), state.model);
  const { controls } = modelOf(state.model).frankenmoe;
  const same = controls.length ? [[SAME, "itself, unchanged"]] : [];
  state.beside = options(byId("beside"), [["", "nothing"], ...same, ...models.filter(({ id }) => id !== state.model).map(({ id }) => [id, id])], state.beside);
  byId("beside-row").hidden = models.length < 2 && !same.length;
  controlsOf.show(modelOf(state.model));
  showPrompts();
  showLayers();
  changed();
};

// ---- the conversation

const draw = () => {
  for (const turn of state.turns) if (!turn.element) {
    const teach = make("button", { type: "button", class: "teach" }, "Refit with this …");
    teach.addEventListener("click", () => refit(modelOf(state.model).frankenmoe, turn.text));
    turn.box = make("div", { class: "replies" });
    turn.element = make("section", { class: "turn" }, make("div", { class: "you" }, make("h3", { class: "hidden" }, "You"), make("p", {}, turn.text), teach), turn.box);
  }
  for (const { box, replies } of state.turns) {
    box.replaceChildren(...replies.map(({ element }) => element));
    box.classList.toggle("two", replies.length > 1);
  }
  talk.replaceChildren(...state.turns.map(({ element }) => element));
  state.turns.forEach(compare);
  byId("hello").hidden = state.turns.length > 0;
  document.body.classList.toggle("wide", state.turns.some(({ replies }) => replies.length > 1));
  byId("again").disabled = byId("new").disabled = !state.turns.length;
  showPrompts();
  showLayers();
};
const showPrompts = () => {
  const { experts, prompts } = modelOf(state.model)?.frankenmoe ?? {}, can = Boolean(prompts);
  byId("examples").replaceChildren(...(can ? experts : []).slice(0, EXAMPLES).map((name, expert) => {
    const text = prompts[name].positive[0];
    const button = make("button", { type: "button" }, chip(markOf(marks, expert)), ` ${text}`);
    button.addEventListener("click", () => { prompt.value = text; prompt.focus(); });
    return button;
  }));
  byId("edit-prompts").hidden = !can;
  document.body.classList.toggle("can-refit", can);
};
const replyOf = (facts) => new Reply(facts, { marks, layer: state.layer, point: (reply, token) => panel.show(reply, token) });
const whole = (kept) => ({ ...kept, state: kept.state === "waiting" || kept.state === "streaming" ? "cut" : kept.state });
const replies = () => state.turns.flatMap((turn) => turn.replies);
const latest = () => state.turns.map((turn) => turn.replies[0]).filter(({ model }) => model === state.model).at(-1);

// what a side has said so far; a turn that nobody answered is left out
const history = (turns, side) => turns.flatMap(({ text, replies }) => {
  const answer = (replies[side] ?? replies[0])?.text;
  return answer ? [{ role: "user", content: text }, { role: "assistant", content: answer }] : [];
});
const bodyFor = (id, fields, messages) => ({
  model: id, messages, temperature: state.sampling.temperature, max_tokens: state.sampling.limit, ...fields,
});

const send = async (text) => {
  const before = [...state.turns], turn = { text, replies: [] }, stop = new AbortController();
  const sides = [[modelOf(state.model), controlsOf.fields()], ...(state.beside ? [[besideModel(), {}]] : [])];
  turn.replies = sides.map(([{ id, frankenmoe }, fields]) => replyOf({ model: id, experts: frankenmoe.experts, fields }));
  state.turns.push(turn);
  running = stop;
  busy(true);
  draw();
  changed();
  stuck = true;
  await Promise.all(turn.replies.map((reply, side) => answer(reply, bodyFor(reply.model, reply.fields, [...history(before, side), { role: "user", content: text }]), stop.signal)));
  if (running === stop) running = null;
  busy(Boolean(running));
  compare(turn);
  toEnd();
  store();
  server.look();
};
// where two replies part
const compare = ({ box, replies: [one, two] }) => {
  box.nextElementSibling?.remove();
  if (![one, two].every((reply) => reply?.text)) return;
  let at = 0;
  while (at < one.text.length && one.text[at] === two.text[at]) at++;
  const shared = one.text.slice(0, at), from = at > 40 ? `… ${shared.slice(-40)}` : shared;
  const text = one.text === two.text ? "Both say the same." : at ? `They part after ${at} characters: “${visible(from)}”` : "They differ from the first letter on.";
  box.after(make("p", { class: "differ soft" }, text));
};
const answer = async (reply, body, signal) => {
  const { controls } = modelOf(reply.model).frankenmoe;
  try {
    for await (const { queued, text, trace, finish, usage } of server.chat({ ...body, ...(controls.includes("trace") && { trace: true }) }, signal)) {
      if (queued !== undefined) reply.queued(queued);
      else if (usage) reply.used(usage);
      else reply.add(text, trace, finish);
    }
    reply.end("done");
    say(`${reply.model}: ${reply.text}`);
  } catch (error) {
    if (leaving) return; // the browser ends what a page waits for before it says that the page goes
    if (error.name === "AbortError") reply.end("stopped");
    else {
      reply.end("failed", sentence(error.message));
      say(`${reply.model}: ${error.message}`);
    }
  }
};
// the focus goes from the button that was pressed to Stop, and back
const busy = (on) => {
  const from = document.activeElement;
  byId("send").hidden = on;
  byId("stop").hidden = !on;
  for (const id of ["model", "beside"]) byId(id).disabled = on;
  for (const id of ["again", "new"]) byId(id).disabled = on || !state.turns.length;
  if (on && [byId("send"), byId("again")].includes(from)) {
    pressed = from;
    byId("stop").focus();
  }
  if (!on && from === byId("stop")) (pressed ?? prompt).focus();
};
const again = () => {
  if (running || !state.turns.length) return;
  const last = state.turns.pop();
  if (last.replies.includes(panel.reply)) panel.clear();
  send(last.text);
};

// ---- layers, settings, what is kept

const showLayers = () => {
  const most = Math.max(0, ...replies().map(({ trace }) => trace.layers), ...models.filter(({ id }) => id === state.model).map(({ frankenmoe }) => frankenmoe.layers));
  slider.max = most - 1;
  slider.value = state.layer;
  byId("layer-row").hidden = !most;
  byId("layer-name").textContent = state.layer === ALL ? "All layers" : `Layer ${state.layer}`;
  slider.setAttribute("aria-valuetext", byId("layer-name").textContent);
};
const setLayer = (layer) => {
  state.layer = Math.max(ALL, Math.min(Number(slider.max), layer));
  for (const reply of replies()) reply.colour(state.layer);
  showLayers();
  panel.draw();
  showLoad();
};
const showLoad = () => controlsOf.load(latest()?.counts ?? []);
const changed = () => {
  const last = latest(), now = JSON.stringify(controlsOf.fields());
  byId("again").classList.toggle("call", Boolean(last) && JSON.stringify(last.fields) !== now);
  showLoad();
};
const store = () => keep((without) => ({
  ...state, draft: prompt.value, turns: state.turns.map(({ text, replies }, index) => ({ text, replies: replies.map((reply) => reply.kept(index >= without)) })),
}), state.turns.length);

const panel = new Panel({ marks, setLayer, say });
const controlsOf = new Controls({ marks, settings: state.settings, sampling: state.sampling, changed });
const showCopy = copyDialog(say);
const refit = refitDialog({
  marks,
  refit: async (prompts, signal) => {
    modelOf(state.model).frankenmoe = (await server.refit(state.model, prompts, signal)).frankenmoe;
    controlsOf.show(modelOf(state.model));
    byId("again").classList.add("call");
    say("The routers are fitted to these prompts from now on.");
  },
});

// ---- buttons and keys

byId("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running || byId("send").disabled) return;
  prompt.value = "";
  send(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("compose").requestSubmit();
});
talk.addEventListener("keydown", (event) => {
  const reply = replies().find(({ box }) => box === event.target);
  if (!reply?.trace.length || !/^(Arrow|Home|End)/.test(event.key)) return;
  event.preventDefault();
  panel.step(reply, event.key);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("drawer")) byId("drawer").click();
  else if (panel.reply) panel.clear();
  prompt.focus();
});
byId("stop").addEventListener("click", () => { running?.abort(); prompt.focus(); });
byId("again").addEventListener("click", again);
byId("new").addEventListener("click", () => { panel.clear(); state.turns = []; draw(); changed(); prompt.focus(); });
byId("model").addEventListener("change", (event) => { state.model = event.target.value; showModels(); });
byId("beside").addEventListener("change", (event) => { state.beside = event.target.value; changed(); });
byId("edit-prompts").addEventListener("click", () => refit(modelOf(state.model).frankenmoe));
byId("as").addEventListener("click", () => {
  const text = prompt.value.trim(), last = state.turns.at(-1);
  const messages = text || !last ? [...history(state.turns, 0), { role: "user", content: text || "Hello" }] : [...history(state.turns.slice(0, -1), 0), { role: "user", content: last.text }];
  showCopy(modelOf(state.model).frankenmoe, bodyFor(state.model, controlsOf.fields(), messages), controlsOf.fields());
});
byId("drawer").addEventListener("click", () => byId("drawer").setAttribute("aria-expanded", String(document.body.classList.toggle("drawer"))));
slider.addEventListener("input", () => setLayer(Number(slider.value)));
const scroller = byId("scroller");
const toEnd = () => { if (stuck) scroller.scrollTop = scroller.scrollHeight; };
scroller.addEventListener("scroll", () => { stuck = scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 40; }, { passive: true });
talk.addEventListener("drawn", () => {
  toEnd();
  showLoad();
  panel.follow();
});
addEventListener("beforeunload", () => { leaving = true; });
addEventListener("pagehide", store);
addEventListener("pageshow", () => { leaving = false; });
addEventListener("visibilitychange", () => document.visibilityState === "visible" && server.look());
themed(byId("theme"));

prompt.value = state.draft;
state.turns = state.turns.map(({ text, replies }) => ({ text, replies: replies.map((kept) => replyOf(whole(kept))) }));
panel.clear();
draw();
begin().then(() => server.look()).then(() => document.documentElement.setAttribute("data-ready", "true"));
