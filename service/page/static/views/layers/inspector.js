// One layer of the Layers view in full: a channel enlarged, the sums of both sides, and the rule with its numbers.

import { explained } from "../../components.js";
import { h, percent, replace } from "../../dom.js";
import { draw, fullStrength, MODES, signColours, unstack } from "./maps.js";

const number = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return String(Number(value.toPrecision(3)));
  const [digits, power] = value.toExponential(2).split("e");
  return [digits, "·10", h("sup", {}, String(Number(power)).replace("-", "−"))];
};

const times = (numbers) => numbers.join(" × ");

// "3 × 3 convolution, stride 2, in 96 groups"
export function described(layer) {
  const kind = layer.kind.startsWith("ConvTranspose") ? "transposed convolution" : "convolution";
  const parts = [`${times(layer.kernel)} ${kind}`];
  if (layer.stride.some((one) => one !== 1)) parts.push(`stride ${[...new Set(layer.stride)].join(" × ")}`);
  if (layer.groups > 1) parts.push(layer.groups === layer.shape[0] ? "each channel by itself" : `in ${layer.groups} groups`);
  return parts.join(", ");
}

export const shapeOf = (layer) => `${layer.shape[0]} channels of ${times(layer.shape.slice(1))}`;

const row = (name, term, ...value) => h("tr", {}, h("th", { scope: "row" }, name, " ", explained(term, name)), h("td", { class: "number" }, ...value));

const shares = ({ plain, before, after }) =>
  [["plain", plain], ["arriving", before], ["after the rule", after]].map(([text, share]) => h("div", {}, `${text} ${percent(share)}`));

function picture(size, values, full, colours, caption, term) {
  const canvas = h("canvas", { "aria-hidden": "true" });
  draw(canvas, size, values, full, colours);
  return h("figure", { class: "figure" }, canvas, h("figcaption", {}, caption, " ", explained(term, caption)));
}

function channelPart(maps, place, palette) {
  const channel = maps.layer.channels[place];
  const signs = signColours();
  const log10 = channel.log_p === undefined ? null : channel.log_p / Math.LN10;
  return h(
    "section",
    { class: "channel" },
    h("h3", {}, `Channel ${channel.index} `, h("span", { class: channel.selected ? "tag chosen" : "tag" }, channel.selected ? "✓ selected" : "not selected")),
    h(
      "div",
      { class: "enlarged" },
      MODES.map(([mode, text]) => picture(maps.of(mode), maps.of(mode).maps[place], maps.full(mode), mode === "activation" ? { palette } : { signs }, text, `layers_${mode}`)),
    ),
    h(
      "table",
      {},
      row("Feature", "layers_feature", number(channel.feature)),
      channel.deviations !== undefined && row("against the table", "layers_deviations", `${channel.deviations >= 0 ? "+" : "−"}${Math.abs(channel.deviations).toFixed(1)} sd`),
      channel.rank !== undefined && row("Rank for the target", "layers_rank", `${channel.rank + 1} of ${maps.layer.shape[0]}`),
      log10 !== null && row("p-value", "layers_p", log10 > -3 ? number(10 ** log10) : ["10", h("sup", {}, `−${Math.abs(log10).toFixed(0)}`)]),
      row("Share of the energy", "layers_energy", shares(channel.share)),
      maps.layer.active && row("Factor", "layers_factor", "× ", number(channel.factor)),
    ),
  );
}

// The formula of the rule with this layer's numbers in it.
function formula(rule, options) {
  const infinite = options.gamma === "inf";
  const exact = options.conserve === "exact";
  const total = exact ? "M + N + 2K" : "M + N";
  if (rule.identity)
    return [h("p", { class: "unchanged" }, h("strong", {}, "Unchanged. "), "No channel, or every channel, is selected here, or a side of the gradient does not vary from place to place: there is nothing to weigh against each other.")];
  const { m, n, k, a, b } = rule;
  const sum = (...terms) => terms.flatMap((term, i) => [i > 0 && (term < 0 ? " − " : " + "), ...[number(i > 0 ? Math.abs(term) : term)].flat()]);
  const above = sum(m, n, ...(exact ? [2 * k] : []));
  const below = infinite ? "M" : `(a²M + N${exact ? " + 2aK" : ""})`;
  const numbersBelow = infinite ? [number(m)] : ["(", sum(a * a * m, n, ...(exact ? [2 * a * k] : [])), ")"];
  const lines = [];
  if (!infinite) lines.push([explained("layers_a", "a"), " a = γ √(N / M) = ", number(options.gamma), " √(", number(n), " / ", number(m), ") = ", h("strong", {}, number(a))]);
  if (options.conserve === "none") lines.push([explained("layers_b", "b"), " b = 1, as conserve is none"]);
  else lines.push([explained("layers_b", "b"), ` b = √((${total}) / ${below}) = √((`, above, ") / ", numbersBelow, ") = ", h("strong", {}, number(b))]);
  lines.push(["Selected channels × ", infinite ? "b" : "a b", " = ", h("strong", {}, "× ", number(rule.selected_factor))]);
  lines.push(["The others ", infinite ? [h("strong", {}, "× 0"), ", as γ = ∞"] : ["× b = ", h("strong", {}, "× ", number(rule.unselected_factor))]]);
  return [h("ul", { class: "formula" }, lines.map((line) => h("li", {}, line)))];
}

function rulePart(maps, options) {
  const { layer } = maps;
  const signs = signColours();
  const sums = unstack(layer.sums);
  const both = fullStrength(sums.maps.slice(0, 2));
  return h(
    "section",
    { class: "rule" },
    h("h3", {}, "What the rule does here"),
    h(
      "div",
      { class: "sums" },
      picture(sums, sums.maps[0], both, { signs }, "Selected, summed", "layers_high"),
      h("span", { class: "sign", "aria-hidden": "true" }, "+"),
      picture(sums, sums.maps[1], both, { signs }, "Others, summed", "layers_low"),
      h("span", { class: "sign", "aria-hidden": "true" }, "→"),
      picture(sums, sums.maps[2], fullStrength(sums.maps.slice(2)), { signs }, "After the rule", "layers_after_sum"),
    ),
    !layer.rule && h("p", { class: "muted" }, options.rule ? "The rule does not act in this layer." : "The rule is switched off."),
    layer.rule && [
      h(
        "table",
        {},
        row("M", "layers_m", number(layer.rule.m)),
        row("N", "layers_n", number(layer.rule.n)),
        row("K", "layers_k", number(layer.rule.k)),
      ),
      formula(layer.rule, options),
      h("table", {}, row("Spread of the sum", "layers_sd", number(layer.rule.sd_before), " → ", number(layer.rule.sd_after))),
    ],
    h(
      "table",
      {},
      row("Energy in the selected", "layers_share", shares(layer.selected_share)),
    ),
  );
}

// Fills `node` with `place` (a channel, or null) of a layer. `palette`: of activations; `close`: where it lies on top.
export function inspect(node, maps, place, options, palette, close) {
  const { layer } = maps;
  replace(
    node,
    h("button", { type: "button", class: "ghost close", "aria-label": "Close the layer", on: { click: close } }, "×"),
    h("h2", {}, layer.name, layer.calls > 1 && h("span", { class: "muted" }, ` call ${layer.call + 1} of ${layer.calls}`)),
    h("p", { class: "muted" }, `${described(layer)}; ${shapeOf(layer)}.`),
    place !== null && channelPart(maps, place, palette),
    rulePart(maps, options),
  );
}
