// Many pictures at once: a grid that fills as the answers come, each picture with its own map or its own error.

import { announce, h, percent, replace } from "../../dom.js";
import { asProblem, isAbort } from "../../api.js";
import { lasts } from "../../components.js";
import { decodeMap, drawOverlay, drawPlain } from "../../map.js";
import { drawnOf, fieldsOf } from "./asking.js";
import { save } from "./files.js";

const AT_ONCE = 2; // questions under way
const SIDE = 220; // pixels of a tile's longer side
const PATIENCE = 3; // times a busy service is asked again for one picture
const BUSY = ["queue_full", "rate_limited", "not_ready"];
const BUDGET = 12; // ms of a frame for drawing tiles anew
const SETTLED = 300; // ms without a further change of the options, before all pictures are asked about anew

export function createMany(app, { asker, onOpen }) {
  const grid = h("ul", { class: "grid" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Pictures done" });
  const said = h("span", { class: "summary", "aria-live": "polite" });
  const cancel = h("button", { type: "button", class: "ghost", on: { click: () => stop(true) } }, "Cancel");
  const again = h("button", { type: "button", class: "ghost", on: { click: start } }, "Go on");
  const all = h("button", { type: "button", on: { click: download } }, "All answers (JSON)");
  const node = h("section", { "aria-label": "Many pictures" }, h("div", { class: "row many-head" }, bar, said, cancel, again, all), grid);
  let tiles = [];
  let ends = null;
  let stopped = false;
  let asked = "";
  let settling = 0;
  const stale = new Set(); // tiles whose drawing is an older one
  let redrawing = false;

  // Begins anew where the pictures or the options are other ones; drawing needs no answer.
  function update(state, hurry) {
    const key = JSON.stringify([state.images.map((one) => one.id), fieldsOf(state)]);
    if (key === asked) return redraw();
    clearTimeout(settling);
    if (asked && !hurry) return (settling = setTimeout(() => update(app.store.get(), true), SETTLED));
    asked = key;
    ends?.abort();
    stale.clear();
    tiles = state.images.map(createTile);
    replace(grid, tiles.map((tile) => tile.node));
    start();
  }

  function createTile(image) {
    const canvas = h("canvas", { width: SIDE, height: SIDE * 0.75, role: "img", "aria-label": image.name });
    const text = h("span", { class: "what muted" }, "waiting");
    const name = h("span", { class: "name" }, image.name);
    const button = h("button", { type: "button", class: "ghost", on: { click: () => onOpen(image) } }, canvas, name, text);
    return { image, canvas, text, node: h("li", {}, button), small: undefined, record: null, map: null, problem: null, done: false };
  }

  // A few tiles a frame, however fast a slider moves: each as is chosen when its turn comes.
  async function redraw() {
    for (const tile of tiles) if (tile.record) stale.add(tile);
    if (redrawing) return;
    redrawing = true;
    let began = performance.now();
    for (const tile of stale) {
      stale.delete(tile);
      await draw(tile).catch((error) => isAbort(error) || replace(tile.text, `✕ ${asProblem(error).message}`));
      if (performance.now() - began < BUDGET) continue;
      await new Promise(requestAnimationFrame);
      began = performance.now();
    }
    redrawing = false;
  }

  // Asks about every picture that has no answer yet, or a fault that may have passed.
  async function start() {
    ends?.abort();
    ends = new AbortController();
    stopped = false;
    const { signal } = ends;
    const state = app.store.get();
    const fields = { ...fieldsOf(state), saliency: "float16" };
    const waiting = tiles.filter((tile) => !tile.done || (tile.problem && !lasts(tile.problem)));
    for (const tile of waiting) Object.assign(tile, { done: false, problem: null });
    summary();
    const work = async () => {
      for (let tile = waiting.shift(); tile && !signal.aborted; tile = waiting.shift()) await one(tile, fields, signal);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    if (!signal.aborted) announce(said.textContent);
  }

  async function one(tile, fields, signal) {
    tile.node.classList.add("waiting");
    try {
      const answer = await patiently(tile.image, fields, signal);
      tile.record = answer;
      await draw(tile);
    } catch (error) {
      if (isAbort(error) || signal.aborted) return;
      tile.problem = asProblem(error);
      tile.node.classList.add("failed");
      replace(tile.text, `✕ ${tile.problem.message}`);
      await plainly(tile);
    } finally {
      tile.node.classList.remove("waiting");
    }
    if (signal.aborted) return;
    tile.done = true;
    summary();
  }

  async function patiently(image, fields, signal) {
    for (let time = 1; ; time++) {
      try {
        return await app.api.post("explain", image.file, fields, { signal });
      } catch (error) {
        if (!BUSY.includes(error.code) || time === PATIENCE) throw error;
        await new Promise((done) => setTimeout(done, 1000 * (error.retryAfter ?? 1)));
      }
    }
  }

  async function draw(tile) {
    const [result] = tile.record.results;
    const best = result.predictions[0];
    const { explanation } = result;
    tile.node.classList.remove("failed");
    if (explanation.status !== "ok") {
      replace(tile.text, `${best.label} ${percent(best.probability)} · no map: ${explanation.reason ?? explanation.error.message}`);
      return plainly(tile);
    }
    const { target, transform, saliency } = explanation;
    replace(tile.text, `${target.label} ${percent(target.probability)}${target.index === best.index ? "" : ` (says ${best.label})`}`);
    tile.map ??= decodeMap(saliency);
    const [width, height] = transform.original_size;
    const drawnHere = await shown(tile, (context, small) => {
      const { drawing, palettes } = app.store.get();
      const box = transform.crop_box.map((edge, i) => (i % 2 ? (edge * small.height) / height : (edge * small.width) / width));
      drawOverlay(context, small, tile.map, box, drawing, palettes[drawing.colormap]);
    });
    if (drawnHere) return;
    // A kind of file that the browser cannot show: the service draws it.
    const bitmap = await asker.picture(tile.image, fieldsOf(app.store.get(), { target: target.index }), drawnOf(app.store.get().drawing), ends.signal);
    fit(tile.canvas, bitmap);
    tile.canvas.getContext("2d").drawImage(bitmap, 0, 0, tile.canvas.width, tile.canvas.height);
  }

  const plainly = (tile) => shown(tile, drawPlain);

  // False where the browser cannot decode the picture.
  async function shown(tile, paint) {
    if (tile.small === undefined) tile.small = await smallOf(tile.image).catch(() => null);
    if (!tile.small) return false;
    fit(tile.canvas, tile.small);
    paint(tile.canvas.getContext("2d", { willReadFrequently: true }), tile.small);
    return true;
  }

  function summary() {
    const done = tiles.filter((tile) => tile.done).length;
    const failed = tiles.filter((tile) => tile.problem).length;
    const over = done === tiles.length;
    const passing = tiles.some((tile) => tile.problem && !lasts(tile.problem));
    bar.max = tiles.length;
    bar.value = done;
    said.textContent = `${done} of ${tiles.length} done${failed ? `, ${failed} failed` : ""}${stopped && !over ? ", cancelled" : ""}`;
    cancel.hidden = over || stopped;
    again.hidden = !(stopped && !over) && !(over && passing);
    again.textContent = over ? "Try those that failed again" : "Go on";
    all.disabled = !done;
  }

  function stop(byHand) {
    clearTimeout(settling);
    if (tiles.length && !byHand && !tiles.every((tile) => tile.done)) asked = ""; // begun again when it is next shown
    stopped = true;
    ends?.abort();
    if (byHand) summary();
  }

  function download() {
    const results = tiles.filter((tile) => tile.done).map(({ image, record, problem }) => ({ file: image.name, ...(record ? { answer: record } : { error: { code: problem.code, message: problem.message } }) }));
    save(new Blob([JSON.stringify({ files: results }, null, 1)], { type: "application/json" }), "answers.json");
  }

  return { node, update, stop: () => stop(false) };
}

// The picture in the tile's size, which is kept; the whole is let go: hundreds of photographs would not fit.
async function smallOf({ bitmap, file }) {
  const whole = bitmap ?? (await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" }));
  const small = new OffscreenCanvas(1, 1);
  fit(small, whole);
  const context = small.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(whole, 0, 0, small.width, small.height);
  if (!bitmap) whole.close();
  return small;
}

function fit(canvas, { width, height }) {
  const scale = SIDE / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
}
