// What one takes along: pictures, numbers, the answer, and the curl line that gives them again.

import { choice, explained, problemBox } from "../../components.js";
import { announce, h, replace } from "../../dom.js";
import { drawnOf } from "./asking.js";
import { curlLine } from "./curl.js";

const FORMS = {
  png: { accept: "image/png", ending: ".map.png", text: "picture (PNG)" },
  json: { accept: "application/json", ending: ".json", text: "answer (JSON)" },
  npz: { accept: "application/x-npz", ending: ".npz", text: "numbers (npz)" },
};

// Every option of a record's map, written out: what the service says it took, not what was left to its defaults.
export function everyOption({ answer, explanation }, drawing) {
  const fields = { model: answer.model.name, version: answer.model.version, target: String(explanation.target.index) };
  for (const [name, value] of Object.entries(explanation)) {
    if (["status", "target", "saliency", "transform", "quality"].includes(name)) continue;
    if (name === "layers") fields.layers = value.join(",");
    else if (name === "quantile" && typeof value === "object") continue; // by layer: only the table can say it
    else fields[name] = value;
  }
  return { ...fields, ...drawnOf(drawing) };
}

export function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export const stem = (name) => name.replace(/\.[A-Za-z0-9]{1,5}$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "_").replace(/^[._-]+/, "") || "picture";

// `record()`: of the map shown, or null; `canvas()`: that shows it.
export function createFiles(app, { record, canvas }) {
  let form = "png";
  const code = h("code", {});
  const trouble = h("div", {});
  const nameOf = (ending) => `${stem(record().image.name)}.${stem(record().explanation.target.label)}${ending}`;
  const button = (text, act) => h("button", { type: "button", on: { click: () => record() && act() } }, text);
  const buttons = [
    button("This view", () => canvas().toBlob((blob) => save(blob, nameOf(".view.png")))),
    ...Object.entries(FORMS).map(([name, { text }]) => button(`Service's ${text}`, () => fetched(name))),
  ];
  const copy = h("button", { type: "button", class: "ghost", on: { click: copied } }, "Copy");
  const as = choice({ label: "that fetches the", options: Object.entries(FORMS).map(([name, { text }]) => [name, text]), value: form, onChange: (value) => ((form = value), update()) });
  const node = h(
    "section",
    { class: "panel files", "aria-label": "Take it along" },
    h("h2", {}, "Take it along"),
    h("div", { class: "row" }, buttons),
    trouble,
    h("div", { class: "row curl-head" }, h("span", { class: "muted" }, "The line", " ", explained("curl", "this line")), as.node, copy),
    h("pre", { class: "curl", tabindex: 0, role: "group", "aria-label": "curl line" }, code),
  );

  async function fetched(name) {
    const { accept, ending } = FORMS[name];
    const one = record();
    replace(trouble);
    try {
      const fields = { ...everyOption(one, app.store.get().drawing), saliency: "float32" };
      save(await app.api.post("explain", one.image.file, fields, { accept, as: "blob", lane: "download" }), nameOf(ending));
    } catch (error) {
      if (error.name !== "AbortError") replace(trouble, problemBox(error, () => fetched(name)));
    }
  }

  async function copied() {
    try {
      await navigator.clipboard.writeText(code.textContent);
      announce("Copied.");
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    } catch {
      getSelection().selectAllChildren(code); // without leave for the clipboard: marked, to be copied by hand
    }
  }

  function update() {
    const one = record();
    const none = !one?.map;
    for (const each of [...buttons, copy]) each.disabled = none;
    const { drawing, state } = app.store.get();
    code.textContent = none
      ? "Once there is a map."
      : curlLine({
          address: new URL("explain", document.baseURI).href,
          file: one.image.name,
          fields: { ...everyOption(one, drawing), saliency: "float32" },
          accept: FORMS[form].accept,
          out: nameOf(FORMS[form].ending),
          keys: Boolean(state?.keys),
        });
  }
  return { node, update };
}
