// A field that finds a class by its name or number: type, choose from the list with the arrows, Enter.

import { newId } from "../../components.js";
import { h, replace } from "../../dom.js";

const SHOWN = 12;

// `classes`: [{index, label}]; `clear`: what a button that empties the field is called, if there is to be one;
// `onPick(index)`, null where it is emptied.
export function classSearch({ label, classes, value = null, clear = null, placeholder = "Search a class", onPick }) {
  const [inputId, listId] = [newId("find"), newId("found")];
  const input = h("input", {
    id: inputId, type: "text", role: "combobox", autocomplete: "off", spellcheck: "false", placeholder,
    "aria-expanded": "false", "aria-controls": listId, "aria-autocomplete": "list",
  });
  const list = h("ul", { id: listId, class: "found", role: "listbox", "aria-label": label, hidden: true });
  const empty = clear && h("button", { type: "button", class: "ghost clear", "aria-label": clear, title: clear, on: { click: () => { pick(null); input.focus(); } } }, "×");
  const node = h("div", { class: "class-search" }, h("label", { for: inputId }, label), h("div", { class: "field" }, input, empty), list);
  let [shown, active, chosen] = [[], -1, value];

  function matches(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = classes.filter((one) => words.every((word) => one.label.toLowerCase().includes(word) || String(one.index) === word));
    const begins = (one) => (words.length && one.label.toLowerCase().startsWith(words[0]) ? 0 : 1);
    return hits.sort((x, y) => begins(x) - begins(y));
  }

  function open(text) {
    const hits = matches(text);
    shown = hits.slice(0, SHOWN);
    active = shown.length && text ? 0 : -1;
    replace(
      list,
      shown.map((one, i) =>
        h("li", { id: `${listId}-${i}`, role: "option", "aria-selected": "false", on: { pointerdown: (event) => { event.preventDefault(); pick(one.index); } } }, one.label, h("span", { class: "number" }, one.index)),
      ),
      hits.length > SHOWN && h("li", { class: "muted", role: "presentation" }, `and ${hits.length - SHOWN} more: type on`),
      !hits.length && h("li", { class: "muted", role: "presentation" }, "No class has such a name."),
    );
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    mark();
  }

  function mark() {
    [...list.querySelectorAll("[role=option]")].forEach((one, i) => one.setAttribute("aria-selected", String(i === active)));
    if (active >= 0) input.setAttribute("aria-activedescendant", `${listId}-${active}`);
    else input.removeAttribute("aria-activedescendant");
    list.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  }

  function close() {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function write() {
    input.value = classes.find((one) => one.index === chosen)?.label ?? "";
    if (empty) empty.hidden = chosen === null;
  }

  function pick(index) {
    chosen = index;
    write();
    close();
    onPick(index);
  }

  input.addEventListener("focus", () => input.select());
  input.addEventListener("click", () => list.hidden && open(""));
  input.addEventListener("input", () => open(input.value.trim()));
  input.addEventListener("blur", () => { close(); write(); });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) open("");
      else active = (active + (event.key === "ArrowDown" ? 1 : -1) + shown.length) % Math.max(1, shown.length);
      mark();
    } else if (event.key === "Enter" && !list.hidden && shown[active]) {
      event.preventDefault();
      pick(shown[active].index);
    } else if (event.key === "Escape" && !list.hidden) {
      event.stopPropagation();
      close();
      write();
    }
  });
  write();
  return { node, input, set(index) { chosen = index; write(); } };
}
