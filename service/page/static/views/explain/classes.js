// Two classes of one picture: the map of A, the map of B, and where their shares differ.

import { explained } from "../../components.js";
import { h, percent, replace } from "../../dom.js";
import { asProblem, isAbort } from "../../api.js";
import { fieldsOf, newestWins, targetOf } from "./asking.js";
import { difference, drawDifference } from "./contrast.js";
import { classSearch } from "./predictions.js";
import { createStage, number, reading } from "./stage.js";
import { noMap } from "./status.js";

export function createClasses(app, { asker, pin, onPoint, onRival }) {
  const lane = newestWins();
  const labels = () => app.store.get().info.labels;
  const kinds = ["A", "B", "A − B"].map((name) => {
    const stage = createStage({ label: `Map of ${name}`, least: 256, most: 420, small: true, pin, onPoint });
    const title = h("span", {});
    const figures = h("p", { class: "at muted" });
    return { name, stage, title, figures, node: h("figure", { class: "tile figure" }, h("figcaption", {}, h("strong", { class: "letter" }, name), " ", title), stage.node, figures) };
  });
  const [a, b, c] = kinds;
  const choices = h("div", { class: "row rivals" });
  const search = classSearch({ label: "Any other class as B", labels, onPick: (index) => onRival(index) });
  const node = h(
    "section",
    { "aria-label": "Two classes" },
    h("div", { class: "row" }, h("span", { class: "muted" }, "B is"), choices),
    h("div", { class: "tiles three" }, kinds.map((kind) => kind.node)),
    h("p", { class: "keys muted" }, h("span", { class: "swatch less" }), " more of B", h("span", { class: "swatch more" }), " more of A, each as a share of its own map ", explained("shares")),
    search.node,
  );
  let last = null;
  let records = null; // {first, second, third: the map of differences}
  let point = null;

  // `first`: the record of A, which the view has; B is the best of the other predictions where none is chosen.
  function update(state, backdrop, first, predictions, hurry) {
    const target = targetOf(first, predictions);
    const best = predictions.find((one) => one.index !== target?.index);
    const chosen = state.rival === null || state.rival === undefined ? best?.index : Number(state.rival);
    last = { state, backdrop };
    replace(
      choices,
      predictions
        .filter((one) => one.index !== target?.index)
        .slice(0, 4)
        .map((one) => h("button", { type: "button", class: "ghost", "aria-pressed": String(one.index === chosen), on: { click: () => onRival(one.index) } }, one.label)),
    );
    if (chosen === undefined) return;
    lane.run(async (signal) => {
      try {
        node.classList.add("waiting");
        const fields = fieldsOf(state, { target: chosen });
        const second = await asker.explain(state.image, fields, signal);
        if (signal.aborted) return;
        records = { first, second, third: first.map && second.map ? difference(first.map, second.map) : null };
        draw();
      } catch (error) {
        if (isAbort(error) || signal.aborted) return;
        records = null;
        b.stage.draw({ bitmap: backdrop.bitmap, box: backdrop.box });
        b.stage.notice(h("p", { class: "problem", role: "alert" }, asProblem(error).message));
      } finally {
        if (!signal.aborted) node.classList.remove("waiting");
      }
    }, hurry);
  }

  function draw() {
    if (!records) return;
    const { state, backdrop } = last;
    const { drawing, palettes } = state;
    const { first, second, third } = records;
    for (const [kind, record] of [[a, first], [b, second]]) {
      const target = targetOf(record, record.result.predictions);
      kind.stage.draw({ bitmap: backdrop.bitmap, box: backdrop.boxOf(record), map: record.map, drawing, palette: palettes[drawing.colormap] });
      kind.stage.notice(record.map ? null : noMap(record.explanation));
      replace(kind.title, target ? `${target.label}, ${percent(target.probability)}` : labels()[Number(record.fields.target)]);
      kind.stage.label(`Map of ${kind.name}, ${kind.title.textContent}`);
    }
    const box = backdrop.boxOf(first);
    c.stage.draw({ bitmap: backdrop.bitmap, box, map: third, paint: third ? (context) => drawDifference(context, backdrop.bitmap, third, box, drawing) : undefined, drawing });
    c.stage.notice(third ? null : h("p", { class: "problem" }, "There is no difference without both maps."));
    replace(c.title, third ? "shares" : "");
    showPoint();
  }

  function showPoint() {
    const { first, second, third } = records ?? {};
    for (const [kind, map] of [[a, first?.map], [b, second?.map], [c, third]]) {
      kind.stage.point(point);
      const found = map && reading(map, last.backdrop.boxOf(first), last.backdrop.bitmap, point);
      const value = found && (kind === c ? `${found.value > 0 ? "A " : found.value < 0 ? "B " : ""}${number(Math.abs(found.value))}` : number(found.value));
      replace(kind.figures, found ? (kind === c ? value : `${value}, above ${(100 * found.rank).toFixed(1)} %`) : "\u00a0");
    }
  }

  return {
    node,
    update,
    redraw(state) {
      last = { ...last, state };
      draw();
    },
    point(next) {
      point = next;
      if (last) showPoint();
    },
    stop: () => lane.stop(),
    canvas: () => c.stage.canvas,
  };
}
