// The methods side by side: the same picture and class, one crosshair in all.

import { explained } from "../../components.js";
import { h, replace } from "../../dom.js";
import { asProblem, isAbort } from "../../api.js";
import { fieldsOf, newestWins, WITHOUT_RULE } from "./asking.js";
import { METHODS } from "./making.js";
import { createStage, number, reading } from "./stage.js";
import { noMap } from "./status.js";

const plain = (method) => ({ id: method, title: METHODS[method], options: () => ({ method, rule: false }) });
// The rule with the options at hand, on the gradient where the method at hand has none.
const parchgrad = {
  id: "parchgrad",
  title: "ParchGrad",
  options: ({ rule, method, ...rest }) => (method && !WITHOUT_RULE.includes(method) ? { ...rest, method } : rest),
};
const FEW = [plain("gradient"), plain("integrated_gradients"), plain("grad_cam"), parchgrad];
const MANY = [...FEW, plain("input_x_gradient"), plain("smoothgrad"), plain("guided_backprop")];
const SLOW = ["integrated_gradients", "smoothgrad"]; // asked last: many passes

// `onMain(options)`: a method is chosen.
export function createMethods(app, { asker, pin, onPoint, onMain }) {
  const lane = newestWins();
  const list = h("div", { class: "tiles" });
  const more = h("button", { type: "button", class: "ghost", on: { click: () => build(MANY) } }, "All methods");
  const node = h(
    "section",
    { "aria-label": "Methods side by side" },
    h("p", { class: "muted" }, "The same class by each method, each map on its own scale. A click on a name makes it the main one. Beneath each: the value at the crosshair, and how much of the map it exceeds. ", explained("crosshair"), explained("gini"), explained("time")),
    list,
    h("div", { class: "row" }, more),
  );
  let tiles = [];
  let last = null; // {state, backdrop}
  let point = null;

  function build(kinds) {
    tiles = kinds.map(createTile);
    replace(list, tiles.map((tile) => tile.node));
    more.hidden = kinds === MANY;
    if (last) update(last.state, last.backdrop, true);
  }

  function createTile(kind) {
    const stage = createStage({ label: `Map by ${kind.title}`, least: 256, most: 420, small: true, pin, onPoint, onOpen: () => open() });
    const figures = h("p", { class: "figures muted" });
    const at = h("p", { class: "at muted" });
    const open = () => onMain(kind.options(app.store.get().options));
    const node = h("figure", { class: "tile figure" }, h("figcaption", {}, h("button", { type: "button", class: "ghost title", on: { click: open } }, kind.title)), stage.node, figures, at);
    return { kind, stage, figures, at, node, record: null, open };
  }

  function update(state, backdrop, hurry) {
    last = { state, backdrop };
    const order = [...tiles].sort((a, b) => SLOW.includes(a.kind.id) - SLOW.includes(b.kind.id));
    lane.run(async (signal) => {
      for (const tile of order) {
        const fields = fieldsOf(state, { options: tile.kind.options(state.options) });
        try {
          const known = asker.kept(state.image, fields);
          if (!known) tile.node.classList.add("waiting");
          tile.record = known ?? (await asker.explain(state.image, fields, signal));
          if (signal.aborted) return;
          draw(tile);
        } catch (error) {
          if (isAbort(error) || signal.aborted) return;
          tile.record = null;
          tile.stage.draw({ bitmap: backdrop.bitmap, box: backdrop.box });
          tile.stage.notice(h("p", { class: "problem" }, asProblem(error).message));
          replace(tile.figures, "no map");
          replace(tile.at);
        } finally {
          if (!signal.aborted) tile.node.classList.remove("waiting");
        }
      }
    }, hurry);
  }

  function draw(tile) {
    const { state, backdrop } = last;
    const { record } = tile;
    tile.stage.draw({ bitmap: backdrop.bitmap, box: backdrop.boxOf(record), map: record.map, drawing: state.drawing, palette: state.palettes[state.drawing.colormap] });
    tile.stage.notice(record.map ? null : noMap(record.explanation));
    const gini = record.explanation?.quality?.gini;
    replace(tile.figures, record.map ? `gini ${gini === undefined ? "none" : gini.toFixed(3)} · ${record.ms.toFixed(0)} ms` : "no map");
    showAt(tile);
  }

  function showAt(tile) {
    tile.stage.point(point);
    const found = tile.record?.map && reading(tile.record.map, last.backdrop.boxOf(tile.record), last.backdrop.bitmap, point);
    replace(tile.at, found ? `${number(found.value)}, above ${(100 * found.rank).toFixed(1)} %` : "\u00a0");
  }

  build(FEW);
  return {
    node,
    update,
    redraw(state) {
      last = { ...last, state };
      for (const tile of tiles) if (tile.record) draw(tile);
    },
    point(next) {
      point = next;
      for (const tile of tiles) showAt(tile);
    },
    stop: () => lane.stop(),
    canvas: () => tiles.find((tile) => tile.kind.id === "parchgrad").stage.canvas,
  };
}
