// Why there is a prediction and no map, in plain words, and the ways on.

import { h } from "../../dom.js";

const WORDS = {
  skipped: "No map was made",
  shed: "The service has too much to do and left the map out",
  timeout: "The map did not come in time",
  target_not_in_table: "The selection table does not know this class",
  map_not_finite: "The map is too large for its numbers",
  image: "This picture cannot be explained",
};

const codeOf = (explanation) => explanation?.error?.code ?? explanation?.status ?? "skipped";

// The same in one line, where the ways on stand elsewhere.
export const noMap = (explanation) => h("p", { class: "problem" }, `${WORDS[codeOf(explanation)] ?? "There is no map"}.`);

// Where the table has no row for the class.
export const withoutRow = ({ instance, plain }) => [
  h("button", { type: "button", on: { click: instance } }, "Choose channels by this picture"),
  h("button", { type: "button", on: { click: plain } }, "Plain method, no rule"),
];

// `explanation`: one whose status is not ok; `ways`: {again, plain, instance, defaults}, functions.
export function withoutMap(explanation, ways) {
  const code = codeOf(explanation);
  const reason = explanation?.error?.message ?? explanation?.reason ?? "The service sent none.";
  const noRow = code === "target_not_in_table";
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("p", {}, h("strong", {}, `${WORDS[code] ?? "There is no map"}.`), " The prediction stands."),
    h("p", { class: "muted" }, reason),
    h(
      "div",
      { class: "row" },
      noRow && withoutRow(ways),
      code === "map_not_finite" && h("button", { type: "button", on: { click: ways.defaults } }, "Table's defaults"),
      !noRow && h("button", { type: "button", on: { click: ways.again } }, "Try again"),
    ),
  );
}
