// The pieces that several views are made of: bars, sliders, explanations of a word, problems, empty states.

import { asProblem } from "./api.js";
import { h, percent, replace } from "./dom.js";
import { meaning } from "./words.js";

let ids = 0;
export const newId = (prefix) => `${prefix}-${++ids}`;

// A "?" that opens what a word means.
export function explained(term, name = term.replaceAll("_", " ")) {
  const id = newId("word");
  const sentence = h("span", { class: "sentence", id, popover: "auto" }, meaning(term));
  const button = h("button", { class: "why", type: "button", "aria-label": `What is ${name}?`, popovertarget: id }, "?");
  sentence.addEventListener("beforetoggle", (event) => {
    if (event.newState !== "open") return;
    const at = button.getBoundingClientRect();
    // Below or above, where there is more room; a sentence that is longer than that scrolls. It moves with the page.
    const below = at.top + at.bottom < innerHeight;
    Object.assign(sentence.style, {
      left: `${Math.max(8, Math.min(at.left, innerWidth - 316))}px`,
      top: below ? `${scrollY + at.bottom + 6}px` : "auto",
      bottom: below ? "auto" : `${innerHeight - scrollY - at.top + 6}px`,
      maxHeight: `${(below ? innerHeight - at.bottom : at.top) - 14}px`,
    });
  });
  return h("span", { class: "explained" }, button, sentence);
}

// Predictions as bars, each a button: {index, label, probability}. `chosen`: the index shown as pressed.
export function bars(predictions, { onPick, chosen }) {
  return h(
    "ul",
    { class: "bars" },
    predictions.map((one) =>
      h(
        "li",
        {},
        h(
          "button",
          { type: "button", class: "bar", "aria-pressed": String(one.index === chosen), on: { click: () => onPick(one) } },
          h("span", { class: "fill", style: { width: `${100 * one.probability}%` } }),
          h("span", { class: "label" }, one.label),
          h("span", { class: "number" }, percent(one.probability)),
        ),
      ),
    ),
  );
}

// A fold; what it holds is made once it is opened.
export function fold(title, props, make) {
  const node = h("details", props, h("summary", {}, title));
  node.addEventListener("toggle", () => node.append(make()), { once: true });
  return node;
}

// A labelled range with its value beside it: {node, set(value), input}. `format(value)` is what is read of it.
export function slider({ label, min, max, step, value, format = String, onInput, term }) {
  const id = newId("slider");
  const output = h("output", { for: id }, format(value));
  const input = h("input", { id, type: "range", min, max, step, value, "aria-valuetext": format(value) });
  const show = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    show();
    onInput?.(Number(input.value));
  });
  const node = h("div", { class: "slider" }, h("label", { for: id }, label), term && explained(term, label), output, input);
  return {
    node,
    input,
    set(next) {
      input.value = next;
      show();
    },
  };
}

const entry = ([value, text]) => h("option", { value }, text);

// A labelled choice: `options` are [value, text] pairs, or groups {group, options} of them.
export function choice({ label, options, value, onChange, term }) {
  const id = newId("choice");
  const select = h(
    "select",
    { id, on: { change: () => onChange?.(select.value) } },
    options.map((one) => (one.group ? h("optgroup", { label: one.group }, one.options.map(entry)) : entry(one))),
  );
  select.value = value;
  return { node: h("div", { class: "choice" }, h("label", { for: id }, label), term && explained(term, label), select), select };
}

export function check({ label, checked, onChange }) {
  const input = h("input", { type: "checkbox", checked, on: { change: () => onChange?.(input.checked) } });
  return { node: h("label", { class: "check" }, input, " ", label), input };
}

const ADVICE = {
  unreachable: "Nothing of what you chose is lost.",
  queue_full: "The service is busy.",
  rate_limited: "This key has used its share for now.",
  unauthorized: "Enter a key with the button at the top.",
  forbidden: "Enter another key with the button at the top.",
  not_ready: "The service is starting or stopping.",
};

const MISTAKEN = ["option_invalid", "option_unsupported", "unknown_class"];
const ofPicture = (problem) => problem.code.startsWith("image_");

// What asking again would not change: the fault is in the options or in the picture.
export const lasts = (problem) => MISTAKEN.includes(problem.code) || ofPicture(problem);

// What went wrong, in the service's words, and a way on: `retry` asks again, `reset` goes back to the default options.
export function problemBox(error, retry, reset) {
  const problem = asProblem(error);
  const advice = ADVICE[problem.code] ?? (ofPicture(problem) ? "Take another picture." : "");
  const wait = problem.retryAfter ? ` Try again in ${problem.retryAfter} s.` : "";
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("p", {}, h("strong", {}, problem.message), ` ${advice}${wait}`),
    reset && MISTAKEN.includes(problem.code) && h("button", { type: "button", on: { click: reset } }, "Back to the defaults"),
    retry && !lasts(problem) && h("button", { type: "button", on: { click: retry } }, "Try again"),
  );
}

export const emptyState = (title, ...more) => h("div", { class: "empty" }, h("h2", {}, title), ...more);

// Marks a region as being worked on; what it shows stays until the new arrives.
export function busy(node, on) {
  node.classList.toggle("busy", on);
  node.setAttribute("aria-busy", String(on));
}

export function tabs(entries, chosen, onPick) {
  const list = h("div", { class: "tabs", role: "group" });
  const draw = (current) =>
    replace(
      list,
      entries.map(([id, text]) =>
        h("button", { type: "button", "aria-pressed": String(id === current), on: { click: () => { draw(id); onPick(id); } } }, text),
      ),
    );
  draw(chosen);
  return list;
}
