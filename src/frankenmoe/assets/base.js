// What every page shares: elements out of text, the mark of an expert, letters that nobody sees. Text never becomes HTML.

export const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") element.style.cssText = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};

export const percent = (share) => (share > 0 && share < 0.005 ? "<1%" : `${Math.round(share * 100)}%`);
export const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));

// marks are frankenmoe.palette's; a dropped choice has none
const PATTERNS = ["plain", "rising", "falling", "level", "upright", "dotted", "crossed", "edged"];
const NONE = { colour: "#999999", ink: "#000000", pattern: "plain", digit: "-" };
export const markOf = (marks, expert) => marks[expert] ?? NONE;
export const paint = (element, mark) => {
  element.classList.remove(...PATTERNS);
  element.classList.add(mark.pattern);
  element.style.backgroundColor = mark.colour;
  element.style.color = mark.ink;
  element.style.setProperty("--stroke", mark.ink === "#FFFFFF" ? "rgb(255 255 255 / .38)" : "rgb(0 0 0 / .24)");
  return element;
};
export const chip = (mark) => paint(make("span", { class: "chip" }, mark.digit), mark);

export const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") // others that nobody sees, or that turn the line around
  .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (letter) => `\\u${letter.codePointAt(0).toString(16).padStart(4, "0")}`)
  .replace(/^ +$/, (blank) => "␣".repeat(blank.length)) || "∅";

// the button changes from what the system asks for to the other, and back
export const themed = (button) => button.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
