// How the map is drawn: colours, opacity, percentiles, polarity, what lies beneath; and the scale of its colours.

import { check, choice, explained, slider } from "../../components.js";
import { h } from "../../dom.js";
import { DRAWING } from "../../store.js";

const SAFE = ["inferno", "magma", "plasma", "viridis", "cividis", "gray"]; // steadily lighter, apart for all eyes
const OVERLAYS = [["original", "Photograph"], ["grayscale", "Photograph in grey"], ["mask_black", "Black where weak"], ["none", "Nothing"]];
const POLARITIES = [["both", "both, by size"], ["positive", "what raises the score"], ["negative", "what lowers it"]];
const FINEST = 0.5; // between the percentiles, so that they never meet

export function createLooks({ palettes, change }) {
  const names = Object.keys(palettes);
  const safe = [...SAFE.filter((name) => names.includes(name))];
  const colormap = choice({
    label: "Colours", term: "colormap",
    options: [
      { group: "Safe for colour-blind eyes", options: safe.map((name) => [name, name]) },
      { group: "Not safe", options: names.filter((name) => !safe.includes(name)).map((name) => [name, name]) },
    ],
    onChange: (value) => change({ colormap: value }),
  });
  const overlay = choice({ label: "Beneath", term: "overlay", options: OVERLAYS, onChange: (value) => change({ overlay: value }) });
  const polarity = choice({ label: "Sign", term: "polarity", options: POLARITIES, onChange: (value) => change({ polarity: value }) });
  const whole = (value) => `${Number(value.toFixed(1))} %`;
  const opacity = slider({ label: "Opacity", term: "opacity", min: 0, max: 1, step: 0.05, value: 1, format: (value) => whole(100 * value), onInput: (value) => change({ opacity: value }) });
  const lower = slider({
    label: "Nothing below", term: "clip_lower", min: 0, max: 99, step: 0.5, value: 0, format: whole,
    onInput: (value) => change({ clip_lower: Math.min(value, Number(upper.input.value) - FINEST) }),
  });
  const upper = slider({
    label: "Full above", term: "clip_upper", min: 50, max: 100, step: 0.1, value: 99.5, format: whole,
    onInput: (value) => change({ clip_upper: Math.max(value, Number(lower.input.value) + FINEST) }),
  });
  const outline = check({ label: "Outlines only", onChange: (on) => change({ outline: on }) });
  const reset = h("button", { type: "button", class: "ghost", on: { click: () => change({ ...DRAWING }) } }, "As at first");
  const node = h(
    "section",
    { class: "panel looks", "aria-label": "How it is drawn" },
    h("h2", {}, "How it is drawn"),
    h(
      "div",
      { class: "stack" },
      opacity.node, colormap.node, overlay.node, polarity.node, lower.node, upper.node,
      h("div", { class: "row" }, outline.node, explained("outline")),
      h("div", { class: "row" }, reset),
    ),
  );
  return {
    node,
    update({ drawing }) {
      colormap.select.value = drawing.colormap;
      overlay.select.value = drawing.overlay;
      polarity.select.value = drawing.polarity;
      opacity.set(drawing.opacity);
      lower.set(drawing.clip_lower);
      upper.set(drawing.clip_upper);
      outline.input.checked = drawing.outline;
      reset.disabled = Object.entries(DRAWING).every(([name, value]) => drawing[name] === value);
    },
  };
}

// The scale of the colours, weak to strong: {node, draw(drawing, palette)}.
export function createScale() {
  const canvas = h("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const [low, high] = [h("span", {}), h("span", {})];
  const node = h("p", { class: "scale muted" }, low, canvas, high, explained("clip", "the scale"));
  return {
    node,
    draw({ overlay, clip_lower, clip_upper }, palette) {
      const context = canvas.getContext("2d");
      const row = context.createImageData(256, 1);
      for (let i = 0; i < 256; i++) {
        const grey = overlay === "mask_black" ? 255 * (i / 255) ** 0.5 : null;
        for (let c = 0; c < 3; c++) row.data[4 * i + c] = grey ?? palette[3 * i + c];
        row.data[4 * i + 3] = 255;
      }
      context.putImageData(row, 0, 0);
      low.textContent = `weak${clip_lower ? ` (below ${clip_lower} %)` : ""}`;
      high.textContent = `strong${clip_upper < 100 ? ` (above ${clip_upper} %)` : ""}`;
    },
  };
}
