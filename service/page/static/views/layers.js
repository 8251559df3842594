// The Layers view: the network from picture to prediction and the gradient's way back, what the rule keeps and drops.

import { isAbort } from "../api.js";
import { bars, busy, choice, emptyState, explained, fold, problemBox, slider, tabs } from "../components.js";
import { announce, h, oncePerFrame, percent, replace, still } from "../dom.js";
import { thumbnail } from "../image.js";
import { picker } from "../picker.js";
import { OF_RULE } from "./explain/asking.js";
import { withoutRow } from "./explain/status.js";
import { energyChart } from "./layers/chart.js";
import { described, inspect, shapeOf } from "./layers/inspector.js";
import { draw, LayerMaps, MODES, signColours, unstack } from "./layers/maps.js";
import "./layers/words.js";

// What /layers takes of the page's options; methods of many passes have no one way back.
const METHODS = ["gradient", "input_x_gradient", "guided_backprop"];

const FRAME = 12; // milliseconds of drawing in one frame

function fields({ model, version, target, options }, order) {
  const rule = options.rule !== false;
  const given = { model, version, target, order };
  if (METHODS.includes(options.method)) given.method = options.method;
  if (!rule) given.rule = "false";
  for (const name of rule ? ["seed", ...OF_RULE] : ["seed"]) given[name] = options[name];
  if (given.alpha !== undefined) delete given.quantile;
  return given;
}

export const view = {
  id: "layers",
  title: "Layers",
  mount(root, app) {
    const shown = new Layers(root, app);
    return { update: (state, changed) => shown.update(state, changed), unmount: () => shown.close() };
  },
};

class Layers {
  constructor(root, app) {
    Object.assign(this, { root, app, mode: "activation", order: "activation", answer: null, at: null, held: null });
    this.leaving = new AbortController(); // ends listeners and requests
    this.askSoon = oncePerFrame(() => this.ask());
    this.redrawSoon = oncePerFrame(() => this.redraw());
    this.paintSoon = oncePerFrame(() => this.paintSome());
    const { signal } = this.leaving;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.redrawSoon, { signal });
    addEventListener("beforeprint", () => this.answer && this.cards.forEach((card, i) => card.drawn === this.mode || this.paint(i)), { signal });
    this.themes = new MutationObserver(this.redrawSoon);
    this.themes.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    this.seen = new IntersectionObserver((entries) => this.came(entries), { rootMargin: "300px" });
    this.build();
    if (app.store.get().image) this.ask();
  }

  close() {
    this.leaving.abort();
    this.themes.disconnect();
    this.seen.disconnect();
  }

  update(state, changed) {
    if (changed.has("image")) this.answer = this.at = this.held = null;
    if (changed.has("image")) this.build();
    if (["image", "info", "target", "options"].some((key) => changed.has(key)) && state.image && state.info) this.askSoon();
    if (changed.has("options")) this.quantile?.set(this.share());
    if (changed.has("drawing") && this.answer) this.redrawSoon();
  }

  // --- asking ---------------------------------------------------------------------------------------------

  async ask() {
    const state = this.app.store.get();
    if (!state.image || this.leaving.signal.aborted) return;
    busy(this.body, true);
    try {
      const answer = await this.app.api.post("layers", state.image.file, fields(state, this.order), {
        lane: "layers",
        signal: this.leaving.signal,
      });
      replace(this.problem);
      this.answer = answer;
      this.maps = answer.layers.map((layer) => new LayerMaps(layer));
      this.show();
    } catch (error) {
      if (isAbort(error)) return; // a newer one is on its way, and ends the waiting
      this.fail(error);
    }
    busy(this.body, false);
  }

  fail(error) {
    const { store } = this.app;
    const change = (patch) => () => store.set({ options: { ...store.get().options, ...patch } });
    const noRow = error.code === "target_not_in_table";
    if (!this.answer) this.body.replaceChildren();
    replace(
      this.problem,
      problemBox(error, noRow ? null : () => this.ask(), () => store.set({ options: {}, target: "predicted" })),
      noRow && h("div", { class: "row" }, withoutRow({ instance: change({ selection: "instance" }), plain: change({ rule: false }) })),
    );
  }

  // --- the frame ------------------------------------------------------------------------------------------

  build() {
    const { image } = this.app.store.get();
    this.problem = h("div", { class: "trouble" });
    this.body = h("div", { class: "network stack" });
    if (!image) {
      replace(
        this.root,
        emptyState(
          "See how a picture travels through the network",
          h("p", {}, "Layer by layer: the strongest channels, which of them the class owns, and the gradient on its way back, before and after the rule."),
        ),
        picker(this.app),
      );
      return;
    }
    replace(
      this.root,
      h("h1", { class: "unseen" }, "Layers"),
      this.problem,
      this.body,
      fold("Another image", { class: "another" }, () => picker(this.app)),
    );
    replace(this.body, h("p", { class: "muted first" }, "Looking into the network …"));
  }

  show() {
    const { answer } = this;
    if (this.at && !answer.layers[this.at.layer]) this.at = this.held = null;
    this.seen.disconnect();
    const focused = this.flow?.contains(document.activeElement);
    this.cards = answer.layers.map((layer, i) => this.card(layer, i));
    this.inspector = h("aside", { class: "panel inspector", "aria-label": "The layer in full", tabindex: -1 });
    this.flow = h(
      "div",
      { class: "flow", role: "group", "aria-label": "Layers from input to prediction. Arrow keys move between layers and channels.", on: { keydown: (event) => this.move(event) } },
      this.inputCard(),
      this.cards.map((card) => card.node),
      this.outputCard(),
    );
    if (this.body.querySelector(".flow")) {
      // The controls stay: one of them may be held.
      this.body.querySelector(".flow").replaceWith(this.flow);
      this.body.querySelector(".inspector").replaceWith(this.inspector);
      this.showPredictions();
      replace(this.energy, this.energyChart());
      this.showOptions();
    } else replace(this.body, this.controls(), this.energyPanel(), h("div", { class: "field" }, this.flow, this.inspector));
    this.showMode();
    for (const card of this.cards) this.seen.observe(card.node);
    this.select(this.at?.layer ?? this.widest(), this.at?.place ?? null);
    this.hold(this.held);
    if (focused) this.current().focus({ preventScroll: true });
    announce(`${answer.layers.length} layers for ${answer.target.label}.`);
  }

  // The layer looked at first: the last one with a map worth seeing.
  widest() {
    const found = this.answer.layers.findLastIndex((layer) => layer.active && layer.shape.at(-1) >= 7);
    return found < 0 ? this.answer.layers.length - 1 : found;
  }

  controls() {
    const state = this.app.store.get();
    this.predictions = h("div", {});
    this.options = h("p", { class: "muted" });
    this.quantile = slider({
      label: "Share of channels selected",
      min: 0.01,
      max: 1,
      step: 0.01,
      value: this.share(),
      format: (value) => percent(value, 0),
      onInput: (value) => this.app.store.set({ options: { ...this.app.store.get().options, quantile: value, alpha: undefined } }),
      term: "quantile",
    });
    const order = choice({
      label: "Strongest by",
      options: [["activation", "activation"], ["gradient", "gradient"], ["table", "the table"]],
      value: this.order,
      onChange: (value) => {
        this.order = value;
        this.ask();
      },
      term: "layers_order",
    });
    this.legend = h("div", { class: "legend" });
    const picture = thumbnail(state.image, 112);
    this.showPredictions();
    this.showOptions();
    return h(
      "section",
      { class: "panel controls", "aria-label": "What is looked at" },
      h("div", { class: "at-hand" }, picture),
      h("div", { class: "classes" }, h("h2", {}, "For which class?"), this.predictions),
      h(
        "div",
        { class: "stack choices" },
        h("div", {}, h("h2", {}, "Pictures show"), tabs(MODES, this.mode, (mode) => { this.mode = mode; this.showMode(); })),
        this.legend,
        h("div", { class: "row settings-row" }, order.node, this.quantile.node),
        this.options,
      ),
    );
  }

  // What the slider stands at.
  share() {
    const { options, info } = this.app.store.get();
    const byDefault = info.options.quantile;
    return options.quantile ?? (typeof byDefault === "number" ? byDefault : 0.1);
  }

  showPredictions() {
    const { predictions, target } = this.answer;
    const listed = predictions.some((one) => one.index === target.index) ? predictions : [...predictions, target];
    const focused = this.predictions.contains(document.activeElement);
    replace(this.predictions, bars(listed, { chosen: target.index, onPick: (one) => this.app.store.set({ target: String(one.index) }) }));
    if (focused) this.predictions.querySelector('[aria-pressed="true"]').focus();
  }

  showOptions() {
    const { options } = this.answer;
    const { method } = this.app.store.get().options;
    const parts = options.rule
      ? [`γ = ${options.gamma === "inf" ? "∞" : options.gamma}`, `conserve ${options.conserve}`, `by ${options.selection}`]
      : ["without the rule"];
    if (options.seed !== "logit") parts.push(`seed ${options.seed}`);
    const instead = method && method !== options.method ? ` The way back of ${options.method} is shown: ${method} has more than one, or none.` : "";
    this.options.textContent = `${parts.join(" · ")}.${instead}`;
  }

  energyPanel() {
    this.energy = h("div", {}, this.energyChart());
    return h(
      "section",
      { class: "panel energy", "aria-label": "Gradient energy by layer" },
      h("h2", {}, "How much of the gradient is the class's own? ", explained("layers_share", "the share of energy")),
      this.energy,
      h("p", { class: "muted key" }, h("span", { class: "swatch before" }), "of what arrives ", h("span", { class: "swatch plain" }), "of the plain gradient ", h("span", { class: "swatch after" }), "after the rule"),
    );
  }

  energyChart() {
    return energyChart(this.answer.layers, (i) => this.goTo(i));
  }

  // --- the flow -------------------------------------------------------------------------------------------

  inputCard() {
    const { image } = this.app.store.get();
    const maps = unstack(this.answer.maps);
    const figure = (i, text) => {
      const canvas = h("canvas", { "aria-hidden": "true", class: "map" });
      draw(canvas, maps, maps.maps[i], Math.max(...maps.maps[i]), { palette: this.palette() });
      return h("figure", { class: "figure" }, canvas, h("figcaption", {}, text));
    };
    return h(
      "section",
      { class: "card end", "aria-label": "The picture" },
      h("h3", {}, "Picture"),
      thumbnail(image, 120),
      h("div", { class: "pair" }, figure(1, "map, with the rule"), figure(0, "without it")),
    );
  }

  outputCard() {
    const { target } = this.answer;
    return h(
      "section",
      { class: "card end", "aria-label": "The prediction" },
      h("h3", {}, "Prediction"),
      h("p", { class: "target" }, target.label),
      h("p", { class: "number" }, percent(target.probability)),
      h("p", { class: "muted" }, "Its logit is what the gradient starts from, on the way back."),
    );
  }

  card(layer, i) {
    const canvases = layer.channels.map(() => h("canvas", { "aria-hidden": "true" }));
    const thumbs = layer.channels.map((channel, place) =>
      h(
        "button",
        {
          type: "button",
          class: `thumb ${channel.selected ? "chosen" : "other"}${channel.factor === 0 ? " dropped" : ""}`,
          tabindex: -1,
          "data-at": `${i},${place}`,
          "aria-label": `Channel ${channel.index} of ${layer.name}, ${channel.selected ? "selected" : "not selected"}, factor ${Number(channel.factor.toPrecision(3))}`,
          on: {
            click: () => this.pin(i, place),
            focus: () => this.select(i, place),
            pointerenter: (event) => event.pointerType === "mouse" && !this.held && this.select(i, place),
          },
        },
        canvases[place],
      ),
    );
    const side = (chosen, text) => {
      const mine = thumbs.filter((_, place) => layer.channels[place].selected === chosen);
      return mine.length > 0 && h("div", { class: "side" }, h("p", { class: "muted" }, text), h("div", { class: "thumbs" }, mine));
    };
    const selected = layer.selected.length;
    const head = h(
      "button",
      { type: "button", class: "head", tabindex: i === 0 ? 0 : -1, "data-at": `${i},-1`, on: { click: () => this.pin(i, null), focus: () => this.select(i, null) } },
      h("span", { class: "name" }, layer.name),
      h("span", { class: "muted" }, `${layer.shape.join(" × ")}${layer.rule?.identity ? " · unchanged" : ""}`),
    );
    const node = h(
      "section",
      { class: "card", "aria-label": `${layer.name}: ${described(layer)}, ${shapeOf(layer)}` },
      head,
      side(true, `✓ ${selected} selected`),
      side(false, layer.active ? `${layer.shape[0] - selected} others` : `${layer.shape[0]} channels`),
    );
    node.dataset.layer = i;
    return { node, head, thumbs, canvases, drawn: null };
  }

  palette() {
    const { palettes, drawing } = this.app.store.get();
    return palettes[drawing.colormap];
  }

  came(entries) {
    for (const { target, isIntersecting } of entries) {
      const card = this.cards[target.dataset.layer];
      if (card?.node !== target) continue;
      card.near = isIntersecting;
    }
    this.paintSoon();
  }

  // Draws what is near the window, as much as fits into a frame, and the rest in the next ones.
  paintSome() {
    const end = performance.now() + FRAME;
    for (let i = 0; i < this.cards.length && !this.leaving.signal.aborted; i++) {
      if (!this.cards[i].near || this.cards[i].drawn === this.mode) continue;
      if (performance.now() > end) return this.paintSoon();
      this.paint(i);
    }
  }

  paint(i) {
    const card = this.cards[i];
    card.node.dataset.drawn = card.drawn = this.mode;
    const maps = this.maps[i];
    const found = maps.of(this.mode);
    const colours = this.mode === "activation" ? { palette: this.palette() } : { signs: this.signs };
    card.canvases.forEach((canvas, place) => draw(canvas, found, found.maps[place], maps.full(this.mode), colours));
  }

  showMode() {
    this.signs = signColours();
    this.flow.dataset.mode = this.mode;
    this.flow.classList.toggle("back", this.mode !== "activation");
    const ends = this.mode === "activation" ? ["none", "strongest"] : ["lowers the logit", "raises it"];
    const strip = h("canvas", { "aria-hidden": "true" });
    const values = Float32Array.from({ length: 64 }, (_, x) => (this.mode === "activation" ? x / 63 : x / 31.5 - 1));
    draw(strip, { width: 64, height: 1 }, values, 1, this.mode === "activation" ? { palette: this.palette() } : { signs: this.signs });
    replace(this.legend, h("span", {}, ends[0]), strip, h("span", {}, ends[1]), explained(`layers_${this.mode}`, MODES.find(([one]) => one === this.mode)[1]));
    this.paintSoon();
  }

  redraw() {
    if (!this.answer || this.leaving.signal.aborted) return;
    for (const card of this.cards) card.drawn = null;
    this.flow.firstChild.replaceWith(this.inputCard());
    this.showMode();
    if (this.at) this.select(this.at.layer, this.at.place);
  }

  // --- what is looked at ----------------------------------------------------------------------------------

  select(layer, place) {
    this.at = { layer, place };
    for (const node of this.flow.querySelectorAll("[data-current]")) delete node.dataset.current;
    const node = this.current();
    this.cards[layer].node.dataset.current = "";
    node.dataset.current = "";
    for (const other of this.flow.querySelectorAll('[data-at][tabindex="0"]')) other.tabIndex = -1;
    node.tabIndex = 0;
    inspect(this.inspector, this.maps[layer], place, this.answer.options, this.palette(), () => this.shut());
  }

  current() {
    const card = this.cards[this.at.layer];
    return this.at.place === null ? card.head : card.thumbs[this.at.place];
  }

  // A click holds what is looked at until the next one of it, or Escape. Its focus has selected it before.
  pin(layer, place) {
    const same = this.held?.layer === layer && this.held.place === place;
    this.select(layer, place);
    this.hold(same ? null : this.at);
  }

  hold(held) {
    this.held = held;
    this.inspector.classList.toggle("pinned", Boolean(held));
  }

  // Where the layer in full lies on top: what it was opened from has the focus again.
  shut() {
    this.hold(null);
    this.current().focus();
  }

  goTo(layer) {
    this.select(layer, null);
    this.hold(this.held && this.at);
    this.current().focus({ preventScroll: true });
    this.cards[layer].node.scrollIntoView({ block: "nearest", behavior: still() ? "auto" : "smooth" });
  }

  move(event) {
    const at = event.target.dataset?.at?.split(",").map(Number);
    if (!at || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return this.hold(null);
    const [layer, place] = at;
    const last = this.cards.length - 1;
    const next = {
      ArrowRight: [Math.min(layer + 1, last), place],
      ArrowLeft: [Math.max(layer - 1, 0), place],
      ArrowDown: [layer, place + 1],
      ArrowUp: [layer, place - 1],
      Home: [0, -1],
      End: [last, -1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const card = this.cards[next[0]];
    const found = Math.max(-1, Math.min(next[1], card.thumbs.length - 1));
    (found < 0 ? card.head : card.thumbs[found]).focus();
    this.hold(this.held && this.at); // goes along
  }
}
