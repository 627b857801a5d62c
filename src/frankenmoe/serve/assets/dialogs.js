// The three dialogs: the API key, the request for other programs, the prompts that routers are fitted to.

import { chip, make, markOf } from "./base.js";
import { key } from "./kept.js";
import { curl, python, recipe } from "./written.js";

const byId = (id) => document.getElementById(id);

// a promise of the key, or of null if the dialog was closed without one
export const askKey = (wrong) => new Promise((resolve) => {
  const dialog = byId("key-dialog"), input = byId("key");
  byId("key-wrong").hidden = !wrong;
  input.value = "";
  dialog.returnValue = "";
  dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? input.value.trim() : null), { once: true });
  dialog.showModal();
});

export const copyDialog = (say) => {
  const shown = byId("written"), forms = byId("forms");
  let texts = {};
  const show = () => { shown.textContent = texts[forms.elements.form.value]; };
  forms.addEventListener("change", show);
  byId("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(shown.textContent);
      byId("copied").textContent = "Copied.";
    } catch { // a browser may forbid it, and does over plain http
      getSelection().selectAllChildren(shown);
      byId("copied").textContent = "The browser does not allow it. The text is selected: press Ctrl+C.";
    }
    say(byId("copied").textContent);
  });
  return (facts, body, fields) => {
    const hasKey = Boolean(key.get());
    texts = { curl: curl(location.origin, body, hasKey), python: python(location.origin, body, hasKey), recipe: recipe(facts, fields) };
    for (const each of forms.elements.form) each.closest("label").hidden = each.value === "recipe" && !facts.experts.length;
    if (!facts.experts.length && forms.elements.form.value === "recipe") forms.elements.form.value = "curl";
    byId("copied").textContent = "";
    show();
    byId("copy-dialog").showModal();
  };
};

// refit(prompts, signal) -> a promise; its error is shown here
export const refitDialog = ({ marks, refit }) => {
  const dialog = byId("refit-dialog"), box = byId("prompts"), problem = byId("refit-problem"), go = byId("refit"), close = byId("refit-close");
  let fitting = null;
  const line = (list, kind, text) => {
    const area = make("textarea", { rows: 2, "aria-label": `${kind} prompt`, "data-kind": kind });
    area.value = text;
    const remove = make("button", { type: "button", "aria-label": `remove this ${kind} prompt` }, "✕");
    const item = make("li", {}, area, remove);
    remove.addEventListener("click", () => { item.remove(); list.querySelector("textarea")?.focus(); });
    list.append(item);
    return area;
  };
  const group = (kind, texts) => {
    const list = make("ul", { class: "lines" });
    for (const text of texts) line(list, kind, text);
    const add = make("button", { type: "button" }, `Add a ${kind} prompt`);
    add.addEventListener("click", () => line(list, kind, "").focus());
    return [make("h4", {}, kind === "positive" ? "Prompts that should go to it" : "Prompts that should not"), list, add];
  };
  const read = () => Object.fromEntries([...box.children].map((each) => {
    const of = (kind) => [...each.querySelectorAll(`[data-kind="${kind}"]`)].map(({ value }) => value).filter((text) => text.trim());
    return [each.dataset.expert, { positive: of("positive"), negative: of("negative") }];
  }));
  go.addEventListener("click", async () => {
    fitting = new AbortController();
    problem.textContent = "";
    go.disabled = true;
    go.textContent = "Fitting the routers …";
    close.textContent = "Cancel";
    try {
      await refit(read(), fitting.signal);
      dialog.close();
    } catch (error) {
      problem.textContent = error.name === "AbortError" ? "The refit was cancelled. The routers are as before." : error.message;
    }
    fitting = null;
    go.disabled = false;
    go.textContent = "Refit the routers";
    close.textContent = "Close";
  });
  const cancel = (event) => {
    if (!fitting) return;
    event.preventDefault();
    fitting.abort();
  };
  close.addEventListener("click", cancel);
  dialog.addEventListener("cancel", cancel); // Escape; a browser lets the second one close the dialog
  dialog.addEventListener("close", () => fitting?.abort());
  // `message`: a text of the user that goes to the prompts of an expert
  return ({ experts, prompts }, message = "") => {
    problem.textContent = "";
    const parts = experts.map((name, expert) => {
      const { positive, negative } = prompts[name];
      return make("details", { "data-expert": name },
        make("summary", {}, chip(markOf(marks, expert)), ` ${name} `, make("span", { class: "soft" }, `${positive.length} for, ${negative.length} against`)),
        ...group("positive", positive), ...group("negative", negative));
    });
    box.replaceChildren(...parts);
    const to = byId("refit-to"), row = byId("refit-message");
    row.hidden = !message;
    byId("refit-text").textContent = `“${message}”`;
    to.replaceChildren(make("option", { value: "" }, "choose an expert"), ...experts.map((name) => make("option", { value: name }, name)));
    let added;
    to.onchange = () => {
      added?.closest("li").remove();
      const part = parts.find((each) => each.dataset.expert === to.value);
      added = part && line(part.querySelector("ul"), "positive", message);
      if (part) part.open = true;
    };
    if (!message) parts[0].open = true;
    dialog.showModal();
  };
};
