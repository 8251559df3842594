// The Attack view: a small change of the picture, and what becomes of prediction, map and channels.

import { isAbort } from "../api.js";
import { busy, choice, emptyState, explained, fold, problemBox, slider, tabs } from "../components.js";
import { h, percent, replace } from "../dom.js";
import { decodeMap } from "../map.js";
import { picker } from "../picker.js";
import { defaults } from "../store.js";
import { createChannels } from "./attack/channels.js";
import "./attack/terms.js";
import { effective, METHOD_OF, newestWins } from "./explain/asking.js";
import { createStage, number, reading } from "./explain/stage.js";

const KINDS = [["pgd", "PGD"], ["fgsm", "FGSM"], ["blur", "Blur"], ["noise", "Noise"], ["jpeg", "JPEG"], ["watermark", "Watermark"]];
const BY_GRADIENT = new Set(["pgd", "fgsm"]);
const TERMS = { blur: "attack_blur", noise: "attack_noise", jpeg: "attack_jpeg", watermark: "attack_watermark" };
const PASSES_ONCE = ["gradient", "input_x_gradient", "guided_backprop", "grad_cam"]; // methods that /attack knows
const MAPS = [["old", "Map of the class before"], ["new", "Map of the class after"], ["none", "Pictures alone"]];

// What was chosen last stays while other views are looked at.
const chosen = { kind: "pgd", levels: 2, strength: 0.5, goal: "any", steps: 10, seed: 0, text: "SAMPLE", map: "old" };

export const view = {
  id: "attack",
  title: "Attack",
  mount(root, app) {
    return app.store.get().state?.attacks ? mountOn(root, app) : mountOff(root);
  },
};

function mountOff(root) {
  root.append(
    emptyState(
      "Attacks are switched off here",
      h("p", {}, "This view changes a picture a little, as an attacker or a poor camera would, and shows what becomes of the prediction, the map and the channels behind it."),
      h("p", {}, "Whoever runs the service switches it on with a setting:"),
      h("p", {}, h("code", {}, "PARCHGRAD_ATTACKS=true parchgrad serve")),
      h("p", { class: "muted" }, "PGD and FGSM also need the package captum, which ", h("code", {}, "pip install 'parchgrad[attack]'"), " brings. On the command line ", h("code", {}, "parchgrad attack MODEL --data FOLDER"), " measures a whole folder, with no setting."),
    ),
  );
  return { update() {}, unmount() {} };
}

function mountOn(root, app) {
  const queue = newestWins();
  let answer = null;
  let shown = null; // {before, after, change} bitmaps and {old, after, fresh} maps
  let point = null;

  const verdict = h("div", { class: "verdict", "aria-live": "polite" });
  const trouble = h("div", {});
  const stages = {};
  const pin = { at: null };
  for (const [name, label] of [["before", "The picture before"], ["after", "The picture after the attack"], ["change", "The change, magnified"]])
    stages[name] = createStage({ label, pin, least: 256, most: 512, small: true, onPoint: (next) => aim(next) });
  const captions = Object.fromEntries(Object.keys(stages).map((name) => [name, h("figcaption", {})]));
  const readings = h("p", { class: "muted readings" }, "Point at a map to read its values.");
  const pictures = h("div", { class: "pictures" }, Object.entries(stages).map(([name, stage]) => h("figure", { class: "figure" }, stage.node, captions[name])));
  const predictions = h("div", {});
  const movement = h("div", {});
  const channels = createChannels();
  const which = h("div", {});
  const results = h(
    "div",
    { class: "results stack" },
    h("section", { class: "panel stack", "aria-label": "Pictures and maps" }, verdict, which, pictures, readings),
    h("div", { class: "two" }, h("section", { class: "panel", "aria-label": "Predictions" }, h("h2", {}, "Predictions"), predictions), h("section", { class: "panel", "aria-label": "How far the map moved" }, h("h2", {}, "How far the map moved"), movement)),
    channels.node,
  );
  const controls = h("section", { class: "panel stack", "aria-label": "Attack" });
  const aside = h("div", { class: "stack aside" }, controls);
  const empty = h("div", {});
  root.append(h("h1", { class: "unseen" }, "Attack"), h("div", { class: "attack-grid" }, aside, h("div", { class: "stack" }, empty, trouble, results)));

  // --- what can be chosen -----------------------------------------------------------------------------------

  function drawControls() {
    const { info } = app.store.get();
    const byGradient = BY_GRADIENT.has(chosen.kind);
    const pick = (patch, redraw = false) => {
      Object.assign(chosen, patch);
      if (redraw) drawControls();
      ask();
    };
    const strength = byGradient
      ? slider({ label: "Strength", min: 0, max: 16, step: 1, value: chosen.levels, term: "attack_levels", format: (value) => `${value} of 255`, onInput: (levels) => pick({ levels }) })
      : slider({ label: "Strength", min: 0, max: 1, step: 0.05, value: chosen.strength, term: TERMS[chosen.kind], format: (value) => value.toFixed(2), onInput: (value) => pick({ strength: value }) });
    const text = h("input", { type: "text", value: chosen.text, maxlength: 40, "aria-label": "Text of the watermark", on: { change: () => pick({ text: text.value.trim() || "SAMPLE" }) } });
    replace(
      controls,
      h("h2", {}, "Attack ", explained("attack")),
      tabs(KINDS, chosen.kind, (kind) => {
        pick({ kind }, true);
        controls.querySelector(".tabs [aria-pressed=true]")?.focus();
      }),
      strength.node,
      byGradient && choice({ label: "Goal", term: "attack_goal", value: chosen.goal, options: [["any", "any other class"], ...info.labels.map((label, i) => [String(i), label])], onChange: (goal) => pick({ goal }) }).node,
      chosen.kind === "pgd" && slider({ label: "Steps", min: 1, max: 40, step: 1, value: chosen.steps, term: "attack_steps", onInput: (steps) => pick({ steps }) }).node,
      (chosen.kind === "pgd" || chosen.kind === "noise") &&
        h("div", { class: "row" }, h("button", { type: "button", class: "ghost", on: { click: () => pick({ seed: chosen.seed + 1 }) } }, chosen.kind === "pgd" ? "Another start" : "Other noise"), explained("attack_start", "the start")),
      chosen.kind === "watermark" && h("label", { class: "choice" }, "Text ", text),
    );
  }

  function fields() {
    const { model, version, info, options, drawing } = app.store.get();
    const kind = chosen.kind;
    const maps = { ...options };
    if (!PASSES_ONCE.includes(maps.method ?? "gradient")) delete maps.method;
    for (const name of Object.keys(METHOD_OF)) delete maps[name];
    return {
      model,
      version: version ?? info.version,
      attack: kind,
      strength: BY_GRADIENT.has(kind) ? chosen.levels : chosen.strength,
      goal: BY_GRADIENT.has(kind) ? chosen.goal : null,
      attack_steps: kind === "pgd" ? chosen.steps : null,
      attack_seed: kind === "pgd" || kind === "noise" ? chosen.seed : null,
      text: kind === "watermark" ? chosen.text : null,
      top_k: Math.min(3, info.labels.length),
      ...effective(maps),
      polarity: drawing.polarity,
    };
  }

  function ask(hurry = false) {
    const { image, info } = app.store.get();
    if (!image || !info) return;
    if (!answer) replace(empty, emptyState("Attacking …"));
    busy(answer ? results : empty, true);
    queue.run(async (signal) => {
      try {
        const found = await app.api.post("attack", image.file, fields(), { signal });
        const [before, after, change] = await Promise.all([found.picture, found.attacked, found.perturbation.png].map(bitmapOf));
        if (signal.aborted) return;
        answer = found;
        const map = (name) => (found[name] ? decodeMap(found[name]) : null);
        shown = { before, after, change, old: map("map_before"), moved: map("map_after"), fresh: map("map_new") };
        replace(trouble);
        settle();
        results.hidden = false;
        draw();
      } catch (error) {
        if (isAbort(error) || signal.aborted) return;
        settle();
        results.hidden = !answer;
        replace(trouble, problemBox(error, () => ask(true), () => app.store.set(defaults())));
      }
    }, hurry);
  }

  function settle() {
    replace(empty);
    for (const node of [empty, results]) busy(node, false);
  }

  // --- what is shown ----------------------------------------------------------------------------------------

  function draw() {
    drawVerdict();
    const options = MAPS.filter(([id]) => id !== "new" || shown.fresh);
    if (!options.some(([id]) => id === chosen.map)) chosen.map = "old";
    replace(which, tabs(options, chosen.map, (id) => {
      chosen.map = id;
      drawPictures();
    }));
    drawPictures();
    drawPredictions();
    drawMovement();
    channels.show(answer);
  }

  function drawVerdict() {
    const { old, new: fresh, changed, attack } = answer;
    const name = KINDS.find(([id]) => id === attack.kind)[1];
    const strong = BY_GRADIENT.has(attack.kind) ? `${attack.strength} of 255 levels` : `strength ${attack.strength.toFixed(2)}`;
    const goal = attack.goal;
    let text;
    if (changed) {
      const reached = goal ? (goal.index === fresh.index ? ", as was sought" : `, not ${goal.label}, which was sought`) : "";
      text = [h("strong", {}, `${old.label} → ${fresh.label}`), ` ${name}, ${strong}: ${old.label} falls from ${percent(old.before)} to ${percent(old.after)}, ${fresh.label} rises from ${percent(fresh.before)} to ${percent(fresh.after)}${reached}.`];
    } else {
      const other = goal && goal.index !== old.index ? ` ${goal.label}, which was sought, has ${percent(goal.probability)}.` : "";
      text = [h("strong", {}, `${old.label} stays`), ` ${name}, ${strong}: ${old.label} goes from ${percent(old.before)} to ${percent(old.after)}.${other}`];
    }
    verdict.className = `verdict ${changed ? "turned" : "kept"}`;
    replace(verdict, h("p", {}, text));
  }

  const mapsShown = () => ({
    before: chosen.map === "none" ? null : shown.old,
    after: chosen.map === "none" ? null : chosen.map === "new" ? shown.fresh : shown.moved,
    change: null,
  });

  function drawPictures() {
    const { drawing, palettes } = app.store.get();
    const maps = mapsShown();
    const { old, new: fresh, perturbation } = answer;
    for (const [name, stage] of Object.entries(stages)) {
      const bitmap = shown[name];
      stage.draw({ bitmap, map: maps[name], box: [0, 0, bitmap.width, bitmap.height], drawing, palette: palettes[drawing.colormap] });
    }
    const missing = (index) => `${index.label} has no row in the table, and so no map`;
    const of = (map, index) => (map ? `map of ${index.label}` : chosen.map === "none" ? "what the model sees" : missing(index));
    replace(captions.before, h("strong", {}, "Before"), ` · ${of(maps.before, old)}`);
    replace(captions.after, h("strong", {}, "After"), ` · ${of(maps.after, chosen.map === "new" ? fresh : old)}`);
    replace(captions.change, h("strong", {}, "Change"), ` × ${perturbation.factor} · at most ${perturbation.largest}, on average ${perturbation.mean.toFixed(1)} levels `, explained("attack_change", "the change"));
    aim(point);
  }

  function aim(next) {
    point = next;
    for (const stage of Object.values(stages)) stage.point(point);
    if (!shown) return;
    const maps = mapsShown();
    const parts = ["before", "after"].map((name) => {
      const bitmap = shown[name];
      const found = reading(maps[name], [0, 0, bitmap.width, bitmap.height], bitmap, point);
      return found && `${name} ${number(found.value)} (above ${percent(found.rank, 0)} of the pixels)`;
    });
    replace(readings, parts.every(Boolean) ? `Here: ${parts.join(", ")}.` : "Point at a map to read its values.");
  }

  function drawPredictions() {
    const rows = [...answer.predictions].sort((a, b) => Math.max(b.before, b.after) - Math.max(a.before, a.after));
    const mark = (one) => [one.index === answer.old.index && "before", one.index === answer.new.index && answer.changed && "after", one.index === answer.attack.goal?.index && "goal"].filter(Boolean).join(", ");
    const bar = (kind, value) => h("span", { class: "pair" }, h("span", { class: "rail", "aria-hidden": "true" }, h("span", { class: `fill ${kind}`, style: { width: `${100 * value}%` } })), h("span", { class: "number" }, percent(value)));
    replace(
      predictions,
      h(
        "table",
        { class: "pairs" },
        h("caption", { class: "unseen" }, "Probabilities before and after"),
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Class"), h("th", { scope: "col" }, "Before"), h("th", { scope: "col" }, "After"))),
        h("tbody", {}, rows.map((one) => h("tr", {}, h("th", { scope: "row" }, one.label, mark(one) && h("span", { class: "muted" }, ` (${mark(one)})`)), h("td", {}, bar("old", one.before)), h("td", {}, bar("new", one.after))))),
      ),
    );
  }

  function drawMovement() {
    const { movement: moved, movement_to_new: toNew, old, new: fresh } = answer;
    if (!moved) return replace(movement, h("p", { class: "muted" }, `${old.label} has no row in the table, so there is no map of it. With selection “instance”, or without the rule, there is.`));
    const list = (title, one) => [
      h("h3", {}, title),
      h("dl", { class: "moved" }, [
        ["Order of the pixels", "attack_agreement", one.agreement?.toFixed(2), verdictOf(one.agreement)],
        ["Common top tenth", "attack_overlap", one.overlap === undefined ? undefined : percent(one.overlap, 0), ""],
        ["Centre moved by", "attack_shift", one.shift === undefined ? undefined : percent(one.shift), "of the diagonal"],
      ].map(([name, term, value, more]) => [h("dt", {}, name, " ", explained(term, name)), h("dd", {}, h("span", { class: "number" }, value ?? "–"), " ", h("span", { class: "muted" }, value ? more : "a map says nothing"))])),
    ];
    replace(movement, list(`The map of ${old.label}, before and after`, moved), toNew && list(`From ${old.label} before to ${fresh.label} after`, toNew));
  }

  // --- what follows from a change ----------------------------------------------------------------------------

  function takeImage() {
    const { image } = app.store.get();
    aside.querySelector(".picker")?.remove();
    for (const stage of Object.values(stages)) stage.forget();
    results.hidden = !answer;
    if (image) {
      replace(empty);
      aside.append(fold("Another image", { class: "picker" }, () => picker(app)));
      ask(true); // what is under way is of another picture
    } else {
      queue.stop();
      results.hidden = true;
      replace(empty, emptyState("See what a small change does", h("p", {}, "Take an image: the attack changes it by a few levels, and you see the prediction turn, the map move, and which channels rise and fall.")), picker(app, { title: "Take an image" }));
    }
  }

  drawControls();
  takeImage();
  return {
    update(state, changed) {
      if (changed.has("info") && state.info) {
        if (chosen.goal !== "any" && Number(chosen.goal) >= state.info.labels.length) chosen.goal = "any";
        answer = shown = null;
        drawControls();
        takeImage();
      } else if (changed.has("image")) {
        answer = shown = null;
        takeImage();
      } else if (changed.has("options")) ask();
      else if (changed.has("drawing") && shown) drawPictures();
    },
    unmount() {
      queue.stop();
    },
  };
}

const verdictOf = (agreement) =>
  agreement === undefined ? "" : agreement > 0.9 ? "almost the same map" : agreement > 0.6 ? "a similar map" : agreement > 0.3 ? "little alike" : "another map";

async function bitmapOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none" });
}
