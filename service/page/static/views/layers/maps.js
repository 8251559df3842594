// Maps of the Layers view: from the answer's bytes to numbers, and from numbers to small pictures.

import { percentile } from "../../map.js";

// The answer's stack -> {width, height, maps: [Float32Array]}.
export function unstack({ shape, dtype, scales, data }) {
  const [count, height, width] = shape;
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const steps = dtype === "int8" ? new Int8Array(bytes.buffer) : bytes;
  const size = width * height;
  const maps = Array.from({ length: count }, (_, i) =>
    Float32Array.from(steps.subarray(i * size, (i + 1) * size), (step) => step * scales[i]),
  );
  return { width, height, maps };
}

// What is drawn at full strength: the magnitude that half a percent of the values of several maps reach.
export function fullStrength(maps) {
  const all = new Float32Array(maps.reduce((size, map) => size + map.length, 0));
  let at = 0;
  for (const map of maps) for (const value of map) all[at++] = Math.abs(value);
  all.sort();
  return percentile(all, 99.5) || all[all.length - 1];
}

// A power below 1 lifts what is weak: most of a gradient is.
const LIFT = 0.5;

// Zero is the paper itself, in the light and in the dark; the two ends of d3's purple-orange, which colour-blind
// people tell apart, are the signs.
export function signColours() {
  const [plus, minus] = isDark() ? [0.76, 0.24] : [0.9, 0.1];
  return [d3.interpolatePuOr(plus), d3.interpolatePuOr(minus)].map((text) => {
    const { r, g, b } = d3.rgb(text);
    return [r, g, b];
  });
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Draws `values` onto a canvas at their own size; CSS makes it larger. Signed ones by `signs`, others by `palette`.
export function draw(canvas, { width, height }, values, full, { signs, palette }) {
  canvas.width = width;
  canvas.height = height;
  const picture = new ImageData(width, height);
  const pixels = picture.data;
  for (let i = 0; i < values.length; i++) {
    const share = full > 0 ? Math.min(1, Math.abs(values[i]) / full) : 0;
    if (signs) {
      const colour = signs[values[i] < 0 ? 1 : 0];
      pixels[4 * i] = colour[0];
      pixels[4 * i + 1] = colour[1];
      pixels[4 * i + 2] = colour[2];
      pixels[4 * i + 3] = Math.round(255 * share ** LIFT);
    } else {
      const at = 3 * Math.round(255 * share ** LIFT);
      pixels[4 * i] = palette[at];
      pixels[4 * i + 1] = palette[at + 1];
      pixels[4 * i + 2] = palette[at + 2];
      pixels[4 * i + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

export const MODES = [
  ["activation", "Activation"],
  ["plain", "Plain gradient"],
  ["before", "Gradient arriving"],
  ["after", "Gradient after the rule"],
];

// One layer of the answer with its maps, decoded when they are first asked for.
export class LayerMaps {
  constructor(layer) {
    this.layer = layer;
    this.decoded = {};
  }

  // {width, height, maps}: those of the shown channels in their order.
  of(mode) {
    if (!this.decoded[mode]) {
      if (mode === "after") {
        const before = this.of("before");
        const factors = this.layer.channels.map((channel) => channel.factor);
        this.decoded.after = { ...before, maps: before.maps.map((map, i) => map.map((value) => value * factors[i])) };
      } else this.decoded[mode] = unstack(this.layer[mode]);
    }
    return this.decoded[mode];
  }

  // What all pictures of the layer are drawn against.
  full(mode) {
    this.decoded[`${mode} full`] ??= fullStrength(this.of(mode).maps);
    return this.decoded[`${mode} full`];
  }
}
