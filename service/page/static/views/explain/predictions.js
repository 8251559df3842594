// The classes of a picture: predictions as bars, more of them, and a search over all that the model knows.

import { bars, explained, newId } from "../../components.js";
import { h, replace } from "../../dom.js";

const FIRST = 5;
const STEPS = [5, 15, 50];
const FOUND = 8;

// `onPick(index)`; `onMore(count)` asks for that many predictions.
export function createPredictions({ onPick, onMore, labels }) {
  const list = h("div", {});
  const more = h("button", { type: "button", class: "ghost more", on: { click: () => onMore(next()) } }, "More classes");
  const search = classSearch({ label: "Any other class", labels, onPick });
  const node = h(
    "section",
    { class: "panel predictions", "aria-label": "Predictions" },
    h("h2", {}, "What the network sees", " ", explained("probability")),
    h("p", { class: "muted hint" }, "Choose a class to see what speaks for it."),
    list,
    h("div", { class: "row" }, more),
    search.node,
  );
  let shown = FIRST;
  const next = () => Math.min(STEPS.find((one) => one > shown) ?? STEPS.at(-1), labels().length);
  return {
    node,
    // `target`: of the map shown, {index, label, probability}.
    draw(predictions, target) {
      shown = predictions.length;
      const other = target && !predictions.some((one) => one.index === target.index) ? [target] : [];
      const focused = list.contains(document.activeElement);
      replace(list, bars([...predictions, ...other], { onPick: (one) => onPick(one.index), chosen: target?.index }));
      if (focused) list.querySelector('[aria-pressed="true"]')?.focus();
      more.hidden = next() <= shown || predictions.length < FIRST;
    },
    reset: () => search.clear(),
  };
}

// A field that finds classes by a part of their name, or by index, and the buttons of what it found.
export function classSearch({ label, labels, onPick }) {
  const id = newId("search");
  const found = h("ul", { class: "found", "aria-label": "Classes found" });
  const input = h("input", { id, type: "search", autocomplete: "off", spellcheck: "false", placeholder: "Search …" });
  const pick = (index) => {
    clear();
    onPick(index);
  };
  const clear = () => {
    input.value = "";
    replace(found);
  };
  input.addEventListener("input", () => {
    const matches = matching(labels(), input.value);
    const rest = matches.length - FOUND;
    replace(
      found,
      matches.slice(0, FOUND).map((index) =>
        h("li", {}, h("button", { type: "button", class: "ghost", on: { click: () => pick(index) } }, labels()[index], h("span", { class: "number muted" }, ` ${index}`))),
      ),
      input.value.trim() && !matches.length && h("li", { class: "muted" }, `None of ${labels().length} classes is called that.`),
      rest > 0 && h("li", { class: "muted" }, `and ${rest} more`),
    );
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") found.querySelector("button")?.click();
    if (event.key === "Escape") clear();
  });
  return { node: h("div", { class: "search" }, h("label", { for: id, class: "muted" }, label), input, found), clear };
}

function matching(labels, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const all = labels.map((_, index) => index);
  if (/^\d+$/.test(wanted)) return all.filter((index) => String(index).startsWith(wanted) && index < labels.length);
  const name = (index) => labels[index].toLowerCase();
  const begins = all.filter((index) => name(index).startsWith(wanted));
  return [...begins, ...all.filter((index) => name(index).includes(wanted) && !name(index).startsWith(wanted))];
}
