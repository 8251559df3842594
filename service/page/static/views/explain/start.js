// The view before there is a picture: what this is, in a sentence, and every way to begin.

import { explained } from "../../components.js";
import { h } from "../../dom.js";
import { picker } from "../../picker.js";

export function createStart(app) {
  const { info } = app.store.get();
  const some = info.labels.slice(0, 6).join(", ");
  return h(
    "div",
    { class: "start" },
    h(
      "div",
      { class: "pitch" },
      h("h1", {}, "See what the network looks at"),
      h("p", { class: "lead" }, "Give it a picture: it says what it sees, and lights up the parts of the picture that spoke for it."),
      h(
        "ol",
        { class: "steps" },
        h("li", {}, h("strong", {}, "Take a picture"), " of your own, or one of the samples."),
        h("li", {}, h("strong", {}, "Choose a class"), ": the map shows what speaks for it."),
        h("li", {}, h("strong", {}, "Move the sliders"), ": how many channels count, how it is made and drawn."),
      ),
      h("p", { class: "muted" }, `${info.name} knows ${info.labels.length} classes: ${some}${info.labels.length > 6 ? " …" : "."} `, explained("rule", "ParchGrad")),
    ),
    picker(app, { title: "Begin with a picture" }),
  );
}
