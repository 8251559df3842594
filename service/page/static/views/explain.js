// The Explain view: one picture, what the network says of it, and the map of what that rests on. It ties its parts
// together; what each shows stands in explain/.

import { isAbort } from "../api.js";
import { busy, explained, fold, problemBox, tabs } from "../components.js";
import { h, oncePerFrame, percent, replace } from "../dom.js";
import { fromFile, thumbnail } from "../image.js";
import { drawPlain } from "../map.js";
import { picker } from "../picker.js";
import { defaults, DRAWING } from "../store.js";
import { createAsker, drawnOf, fieldsOf, newestWins, targetOf } from "./explain/asking.js";
import { backdropOf } from "./explain/backdrop.js";
import { createClasses } from "./explain/classes.js";
import { createFiles } from "./explain/files.js";
import { createLooks, createScale } from "./explain/looks.js";
import { createMaking, createQuantile, METHODS } from "./explain/making.js";
import { createMany } from "./explain/many.js";
import { createMethods } from "./explain/methods.js";
import { createPredictions } from "./explain/predictions.js";
import { createStage, number, reading } from "./explain/stage.js";
import { createStart } from "./explain/start.js";
import { withoutMap } from "./explain/status.js";
import "./explain/terms.js";

const SHOWS = { map: "Map", methods: "Methods side by side", classes: "Two classes", images: "All pictures" };

export const view = { id: "explain", title: "Explain", mount };

function mount(root, app) {
  const { store, api } = app;
  const asker = createAsker(api, () => store.get().info.labels.length);
  let bench = null;

  let info = null; // of the model that is shown

  function show(state) {
    info = state.info;
    bench?.unmount();
    bench = null;
    if (!state.image) return replace(root, createStart(app));
    bench = createBench(app, asker);
    replace(root, bench.node);
    bench.begin();
  }
  show(store.get());
  return {
    update(state, changed) {
      // Of another model everything is other: labels, bounds, defaults.
      if (state.info !== info || (changed.has("image") && !bench !== !state.image)) show(state);
      else bench?.update(state, changed);
    },
    unmount: () => bench?.unmount(),
  };
}

function createBench(app, asker) {
  const { store } = app;
  const { info, palettes } = store.get();
  const lane = newestWins();
  const outlines = newestWins(600);
  let record = null; // of the map shown: what asker.explain gives
  let backdrop = null;
  let predictions = [];
  let point = null;
  let drawn = 0;
  let { polarity } = store.get().drawing;

  // --- what the state may be changed to
  const changeOptions = (patch) => {
    const options = patch === null ? {} : { ...store.get().options, ...patch };
    for (const [name, value] of Object.entries(options)) if (value === null || same(value, info.options[name])) delete options[name];
    store.set({ options });
  };
  const changeDrawing = (patch) => store.set({ drawing: { ...store.get().drawing, ...patch } });
  const chooseTarget = (index) => {
    const first = predictions[0]?.index === index;
    store.set({ target: first ? "predicted" : index });
  };
  const ways = {
    again: () => ask(true),
    plain: () => changeOptions({ rule: false }),
    instance: () => changeOptions({ selection: "instance" }),
    defaults: () => changeOptions(null),
  };

  // --- parts
  const says = h("p", { class: "says", "aria-live": "polite" });
  const under = h("p", { class: "under muted" });
  const reads = h("span", {});
  const readout = h("p", { class: "readout" }, reads, " ", explained("reading", "this reading"));
  const scale = createScale();
  const pin = { at: null }; // where the crosshair stays, in every map
  const stage = createStage({ label: "Map", pin, onPoint: pointAt });
  const mapShow = h("div", { class: "one-map" }, stage.node, h("div", { class: "beneath" }, readout, scale.node));
  const methods = createMethods(app, { asker, pin, onPoint: pointAt, onMain: (options) => store.set({ options, show: "map" }) });
  const classes = createClasses(app, { asker, pin, onPoint: pointAt, onRival: (index) => store.set({ rival: index }) });
  const many = createMany(app, { asker, onOpen: open });
  const bar = h("div", { class: "shows" });
  const place = h("div", { class: "place" });
  const trouble = h("div", {});
  const quantile = createQuantile({ info, change: changeOptions, frame: sweepFrame });
  const making = createMaking({ info, change: changeOptions });
  const looks = createLooks({ palettes, change: changeDrawing });
  const foretold = createPredictions({ onPick: chooseTarget, onMore: moreClasses, labels: () => info.labels });
  const files = createFiles(app, { record: () => (store.get().image?.id === record?.image.id ? record : null), canvas: () => parts()[store.get().show]?.canvas?.() ?? stage.canvas });
  const chip = h("div", { class: "chip" });
  const another = fold("Other picture", { class: "another" }, () => picker(app, { title: "Another picture" }));
  const main = h("section", { class: "main panel", "aria-label": "Picture and map" }, h("div", { class: "head" }, says, chip), trouble, place, quantile.node, under);
  const node = h(
    "div",
    { class: "bench" },
    h("h1", { class: "unseen" }, "Explain"),
    h("div", { class: "toolbar" }, bar, another),
    h("div", { class: "columns" }, main, h("div", { class: "side stack" }, foretold.node, making.node), h("div", { class: "side stack" }, looks.node, files.node)),
  );
  const parts = () => ({ methods, classes });

  // --- asking
  function ask(hurry = false) {
    const state = store.get();
    const { image } = state;
    const fields = fieldsOf(state);
    const known = asker.kept(image, fields);
    if (known && backdrop && record?.image.id === image.id) {
      lane.stop();
      busy(main, false);
      return take(known, state);
    }
    busy(main, true);
    lane.run(async (signal) => {
      try {
        const found = await asker.explain(image, fields, signal);
        if (signal.aborted) return;
        if (!backdrop || record?.image.id !== image.id || !backdrop.box) backdrop = await backdropOf(asker, image, found, signal);
        if (!signal.aborted) take(found, store.get());
      } catch (error) {
        if (!isAbort(error) && !signal.aborted) fail(error);
      } finally {
        if (!signal.aborted) busy(main, false);
      }
    }, hurry);
  }

  function take(found, state) {
    const fresh = record?.image.id !== found.image.id;
    record = found;
    if (fresh) {
      predictions = found.result.predictions;
      foretold.reset();
    }
    node.classList.remove("failed");
    replace(trouble, found.map ? null : withoutMap(found.explanation, ways));
    foretold.draw(predictions, targetOf(found, predictions));
    drawWords(found);
    draw(state);
    files.update();
    const { show } = state;
    if (show === "methods") methods.update(state, backdrop, fresh);
    if (show === "classes") classes.update(state, backdrop, found, predictions, fresh);
  }

  async function fail(error) {
    const { image } = store.get();
    record = null;
    backdrop = await backdropOf(asker, image, null).catch(() => null);
    node.classList.add("failed");
    replace(trouble, problemBox(error, () => ask(true), () => store.set(defaults())));
    predictions = [];
    foretold.draw([], null);
    says.replaceChildren();
    under.replaceChildren();
    stage.forget();
    stage.node.hidden = !backdrop;
    if (backdrop) stage.draw({ bitmap: backdrop.bitmap });
    reads.replaceChildren();
    files.update();
  }

  async function moreClasses(count) {
    const { image } = store.get();
    try {
      const found = await asker.predictions(image, fieldsOf(store.get()), count);
      if (store.get().image !== image) return;
      predictions = found;
      foretold.draw(predictions, record && targetOf(record, predictions));
    } catch (error) {
      if (!isAbort(error)) replace(trouble, problemBox(error, () => moreClasses(count)));
    }
  }

  // A frame of the sweep: shown as it comes, kept for the next round; false where it is not to go on.
  async function sweepFrame(value, signal) {
    const state = store.get();
    if (!state.image || state.show === "images") return false;
    const options = { ...state.options, quantile: value };
    delete options.alpha;
    try {
      const found = await asker.explain(state.image, fieldsOf(state, { options }), signal);
      const now = store.get();
      if (signal.aborted || !found.map || now.image !== state.image || !backdrop) return false;
      // Where something else was chosen in between, the next frame is of that.
      if (now.options === state.options && now.target === state.target) take(found, { ...now, options });
      return true;
    } catch (error) {
      if (!isAbort(error) && !signal.aborted) fail(error);
      return false;
    }
  }

  // --- showing
  function draw(state = store.get()) {
    if (!backdrop || !record) return;
    const { drawing } = state;
    stage.node.hidden = false;
    scale.draw(drawing, palettes[drawing.colormap]);
    scale.node.hidden = drawing.outline || !record.map;
    if (drawing.outline && record.map) drawOutline(state);
    else {
      outlines.stop();
      stage.draw({ bitmap: backdrop.bitmap, box: backdrop.boxOf(record), map: record.map, drawing, palette: palettes[drawing.colormap] });
      stage.node.dataset.quantile = record.explanation?.quantile ?? "";
      stage.node.dataset.drawn = ++drawn;
    }
    showPoint();
  }
  const drawSoon = oncePerFrame(() => {
    const state = store.get();
    if (state.show === "methods") methods.redraw(state);
    if (state.show === "classes") classes.redraw(state);
    draw(state);
  });

  // The service draws the outlines: its picture lies where the map lies.
  function drawOutline(state) {
    const { image, drawing } = state;
    const of = record;
    outlines.run(async (signal) => {
      try {
        const picture = await asker.picture(image, of.fields, drawnOf(drawing), signal);
        if (signal.aborted || record !== of || !store.get().drawing.outline) return;
        const box = backdrop.boxOf(of);
        const { bitmap } = backdrop;
        const paint = (context) => {
          drawPlain(context, bitmap);
          const scale = context.canvas.width / bitmap.width;
          const [left, top, right, bottom] = [Math.max(0, box[0]), Math.max(0, box[1]), Math.min(bitmap.width, box[2]), Math.min(bitmap.height, box[3])];
          context.drawImage(picture, left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
        };
        stage.draw({ bitmap, box, map: of.map, paint });
        stage.node.dataset.quantile = of.explanation.quantile ?? "";
        stage.node.dataset.drawn = ++drawn;
      } catch (error) {
        if (!isAbort(error) && !signal.aborted) replace(trouble, problemBox(error, () => draw()));
      }
    });
  }

  function drawWords({ explanation, result, ms, image, map, fields }) {
    const best = result.predictions[0];
    const index = fields.target === "predicted" ? best.index : Number(fields.target);
    const name = h("strong", {}, info.labels[index] ?? fields.target);
    const what = !map ? ["No map of ", name, "."] : index === best.index ? ["Bright: what speaks for it."] : ["Bright: what would speak for ", name, "."];
    replace(says, "It says ", h("strong", {}, best.label), ` (${percent(best.probability)}). `, h("span", { class: "muted" }, what));
    stage.label(map ? `Map of ${name.textContent} over ${image.name}` : image.name);
    const by = explanation?.status === "ok" ? [METHODS[explanation.method], explanation.rule ? "with ParchGrad" : "alone"] : [];
    const { gini, identity_layers: idle } = explanation?.quality ?? {};
    replace(
      under,
      by.join(" "),
      gini !== undefined && [" · gini ", gini.toFixed(3), " ", explained("gini")],
      idle ? [" · rule without effect in ", String(idle), idle === 1 ? " layer " : " layers ", explained("identity_layers")] : null,
      explanation?.status === "ok" && [` · ${ms.toFixed(0)} ms `, explained("time")],
      backdrop?.note && [" · ", h("strong", { class: "note" }, backdrop.note)],
      !stageIsWhole() && [" · inside the frame: what the network saw ", explained("frame")],
    );
  }
  const stageIsWhole = () => {
    const box = backdrop?.boxOf(record);
    if (!box) return true;
    return box[0] <= 0.5 && box[1] <= 0.5 && box[2] >= backdrop.bitmap.width - 0.5 && box[3] >= backdrop.bitmap.height - 0.5;
  };

  function pointAt(next, how) {
    point = next;
    // Read out what the keys reach; a pointer would read without end.
    reads.setAttribute("aria-live", how === "key" ? "polite" : "off");
    showPoint();
    methods.point(point);
    classes.point(point);
  }

  function showPoint() {
    stage.point(point);
    const box = backdrop?.boxOf(record);
    const found = box && reading(record?.map, box, backdrop.bitmap, point);
    if (found)
      replace(reads, h("span", { class: "number" }, number(found.value)), h("span", {}, `, stronger than ${(100 * found.rank).toFixed(1)} %`), h("span", { class: "muted" }, ` · column ${found.column}, row ${found.row}`));
    else replace(reads, h("span", { class: "muted" }, point ? "The network did not see this part." : "Point at the picture, or use the arrow keys, to read the map."));
  }

  function drawBar(state) {
    const { images, show } = state;
    const entries = Object.entries(SHOWS).filter(([id]) => id !== "images" || images.length > 1).map(([id, text]) => [id, id === "images" ? `${text} (${images.length})` : text]);
    replace(bar, tabs(entries, show, (id) => store.set({ show: id })));
  }

  function drawPlace({ show }) {
    const shown = { methods: methods.node, classes: classes.node, images: many.node }[show] ?? mapShow;
    if (place.firstChild !== shown) replace(place, shown);
    node.dataset.show = show;
    for (const [id, part] of Object.entries(parts())) if (id !== show) part.stop();
    if (show !== "images") many.stop();
  }

  function drawChip({ image }) {
    replace(chip, thumbnail(image, 40), h("span", { class: "name" }, image.name));
  }

  // Only the picture that is at hand is kept decoded.
  let opening = null;
  async function open(image) {
    opening = image;
    const whole = image.decoded ? image : await fromFile(image.file, image.name, image.id);
    if (opening === image && store.get().images.includes(image)) store.set({ image: whole, show: "map" });
  }

  function everything(state) {
    drawBar(state);
    drawPlace(state);
    drawChip(state);
    making.update(state);
    looks.update(state);
    quantile.update(state);
    if (state.show === "images") many.update(state);
    else ask(true);
  }

  return {
    node,
    begin() {
      const state = store.get();
      if (!palettes[state.drawing.colormap]) changeDrawing({ colormap: DRAWING.colormap });
      showPoint();
      if (state.images.length > 1 && state.show === "map") store.set({ show: "images" });
      else if (state.show === "images" && state.images.length < 2) store.set({ show: "map" });
      everything(store.get());
      drawnFirst(state.image);
    },
    update(state, changed) {
      const has = (...keys) => keys.some((key) => changed.has(key));
      if (has("image")) {
        quantile.stop();
        another.open = false;
        backdrop = null;
        record = null;
        stage.forget();
        pointAt(null);
        outlines.stop();
      }
      if (has("images") && state.images.length > 1 && has("image") && state.show !== "images" && !has("show")) return store.set({ show: "images" });
      if (has("images") && state.images.length < 2 && state.show === "images") return store.set({ show: "map" });
      if (has("image", "images", "show")) {
        everything(state);
        return has("image") && drawnFirst(state.image);
      }
      if (has("options")) making.update(state);
      if (has("options")) quantile.update(state);
      if (has("drawing")) looks.update(state);
      if (has("options", "target", "drawing", "rival", "key") && state.show === "images") return many.update(state, has("target", "key"));
      if (has("target", "key")) ask(true);
      else if (has("options") || (has("drawing") && polarity !== state.drawing.polarity)) ask();
      else if (has("drawing")) drawSoon();
      else if (has("rival") && record) classes.update(state, backdrop, record, predictions, true);
      if (has("drawing")) files.update();
      polarity = state.drawing.polarity;
    },
    unmount() {
      lane.stop();
      outlines.stop();
      methods.stop();
      classes.stop();
      many.stop();
      quantile.end();
    },
  };

  // The picture itself at once, before the answer.
  function drawnFirst(image) {
    stage.node.hidden = !image.bitmap;
    if (image.bitmap && !record) stage.draw({ bitmap: image.bitmap });
  }
}

const same = (a, b) => a === b || String(a) === String(b);
