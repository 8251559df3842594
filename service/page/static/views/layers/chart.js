// The share of each layer's gradient energy that lies in the selected channels, as bars.

import { percent, s } from "../../dom.js";

// `onPick(i)`: a layer's bar was clicked.
export function energyChart(layers, onPick) {
  const wide = 100 / layers.length;
  const mean = (key) => percent(layers.reduce((sum, layer) => sum + layer.selected_share[key], 0) / layers.length, 0);
  const label = `Share of the gradient energy in the selected channels, mean over ${layers.length} layers: ${mean("plain")} of the plain gradient, ${mean("before")} of what arrives, ${mean("after")} after the rule.`;
  return s(
    "svg",
    { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": label, class: "chart" },
    layers.map((layer, i) => {
      const x = i * wide + wide * 0.12;
      const width = wide * 0.76;
      const { plain, before, after } = layer.selected_share;
      return s(
        "g",
        { on: { click: () => onPick(i) }, class: "layer-bar" },
        s("title", {}, `${layer.name}: plain ${percent(plain)}, arriving ${percent(before)}, after ${percent(after)}`),
        s("rect", { class: "whole", x: i * wide, y: 0, width: wide, height: 40 }),
        s("rect", { class: "after", x, y: 40 * (1 - after), width, height: 40 * after }),
        s("rect", { class: "before", x, y: 40 * (1 - before), width, height: 40 * before }),
        s("line", { class: "plain", x1: x - wide * 0.06, x2: x + width + wide * 0.06, y1: 40 * (1 - plain), y2: 40 * (1 - plain) }),
      );
    }),
  );
}
