// What an attack did inside the network: an overview over the layers, and each layer's most excited and inhibited channels.

import { explained, tabs } from "../../components.js";
import { h, replace, s } from "../../dom.js";

const MOST_LAYERS = 8; // shown at first
const [WIDTH, HEIGHT] = [720, 190];
const EDGE = { left: 44, right: 12, top: 12, bottom: 26 };

const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;

const KINDS = {
  old: (answer) => `selected for ${answer.old.label}`,
  new: (answer) => `selected for ${answer.new.label}`,
  both: () => "selected for both",
  neither: () => "selected for neither",
};
const kindOf = (channel) => (channel.of_old ? (channel.of_new ? "both" : "old") : channel.of_new ? "new" : "neither");

// Told apart by shape first: circle, diamond, square, dash.
function sign(kind) {
  const shape = {
    old: () => s("circle", { cx: 6, cy: 6, r: 4.2 }),
    new: () => s("path", { d: "M6 0.8 L11.2 6 L6 11.2 L0.8 6 Z" }),
    both: () => s("path", { d: "M1.8 1.8 H10.2 V10.2 H1.8 Z" }),
    neither: () => s("path", { d: "M2.5 5.2 H9.5 V6.8 H2.5 Z" }),
  }[kind];
  return s("svg", { class: `sign ${kind}`, viewBox: "0 0 12 12", "aria-hidden": "true" }, shape());
}

// Whether the table has a row for the class: one has channels in some layer, alone or with the other.
const covered = ({ layers }) =>
  Object.fromEntries(["old", "new"].map((name) => [name, layers.some((one) => one[`of_${name}`] !== undefined || one.of_both !== undefined)]));

export function createChannels() {
  const body = h("div", { class: "layers" });
  const overview = h("div", {});
  const key = h("ul", { class: "key" });
  let [order, answer] = ["most", null];
  const which = tabs([["most", "Most changed"], ["network", "All, in order"]], order, (id) => {
    order = id;
    draw();
  });
  const node = h(
    "section",
    { class: "panel stack", "aria-label": "Channels" },
    h("h2", {}, "Inside the network ", explained("attack_channel", "a channel's change")),
    key, overview,
    h("div", { class: "row" }, which),
    body,
  );

  function draw() {
    if (!answer) return;
    const same = answer.old.index === answer.new.index;
    const rows = covered(answer);
    const kinds = same ? ["both", "neither"] : [rows.old && "old", rows.new && "new", rows.old && rows.new && "both", "neither"];
    replace(
      key,
      kinds.filter((kind) => kind && (kind !== "both" || rows.old)).map((kind) => h("li", {}, sign(kind), ` ${same && kind === "both" ? KINDS.old(answer) : KINDS[kind](answer)}`)),
      ["old", "new"].filter((name, i) => !rows[name] && !(same && i)).map((name) => h("li", { class: "muted" }, `The table has no row for ${answer[name].label}: none of its channels is marked.`)),
    );
    replace(overview, overviewOf(answer, same, (name) => reveal(name)));
    const shown = order === "network" ? answer.layers : [...answer.layers].sort((a, b) => b.size - a.size).slice(0, MOST_LAYERS);
    const largest = Math.max(1e-9, ...shown.flatMap((layer) => [...layer.excited, ...layer.inhibited].map((one) => Math.abs(one.after - one.before))));
    replace(
      body,
      h("div", { class: "layer head", "aria-hidden": "true" }, h("span", {}, "Layer"), h("span", { class: "down" }, "◂ inhibited"), h("span", {}, "excited ▸")),
      shown.map((layer) => rowOf(layer, answer, largest, same)),
    );
  }

  function reveal(name) {
    if (order !== "network") {
      order = "network";
      which.querySelectorAll("button")[1].click();
    }
    const row = [...body.querySelectorAll(".layer")].find((one) => one.dataset.layer === name);
    row?.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    row?.focus({ preventScroll: true });
  }

  return {
    node,
    show(next) {
      answer = next;
      draw();
    },
  };
}

function rowOf(layer, answer, largest, same) {
  const figures = [["all", layer.size.toFixed(2), "attack_size"]];
  if (same && layer.of_both !== undefined) figures.unshift([answer.old.label, signed(layer.of_both), "attack_old"]);
  if (layer.of_new !== undefined) figures.unshift([answer.new.label, signed(layer.of_new), "attack_new"]);
  if (layer.of_old !== undefined) figures.unshift([answer.old.label, signed(layer.of_old), "attack_old"]);
  return h(
    "div",
    { class: "layer", "data-layer": layer.name, tabindex: -1, role: "group", "aria-label": `Layer ${layer.name}` },
    h(
      "div",
      { class: "what" },
      h("h3", {}, layer.name),
      h("p", { class: "muted" }, `${layer.channels} channels`),
      h("dl", {}, figures.map(([name, value, term]) => [h("dt", {}, name), h("dd", { class: "number" }, value, " ", explained(term, name))])),
    ),
    listOf("Most inhibited", "down", layer.inhibited, answer, largest),
    listOf("Most excited", "up", layer.excited, answer, largest),
  );
}

function listOf(name, side, channels, answer, largest) {
  if (!channels.length) return h("p", { class: `muted none ${side}` }, "none");
  return h(
    "ol",
    { class: `channels ${side}`, "aria-label": name },
    channels.map((one) => {
      const change = one.after - one.before;
      const kind = kindOf(one);
      const words = `channel ${one.index}, ${signed(change)}: from ${signed(one.before)} to ${signed(one.after)} standard deviations, ${KINDS[kind](answer)}`;
      return h(
        "li",
        { title: words },
        h("span", { class: "unseen" }, words),
        h("span", { class: "index", "aria-hidden": "true" }, sign(kind), one.index),
        h("span", { class: "rail", "aria-hidden": "true" }, h("span", { class: `fill ${kind}`, style: { width: `${(100 * Math.abs(change)) / largest}%` } })),
        h("span", { class: "number", "aria-hidden": "true" }, signed(change, 1)),
      );
    }),
  );
}

// Mean change of the old class's channels and of the new one's, layer by layer; the rows below have the same as numbers.
function overviewOf(answer, same, onPick) {
  const { layers } = answer;
  const rows = covered(answer);
  const each = same
    ? [["old", (layer) => layer.of_both, answer.old.label]]
    : [["old", (layer) => layer.of_old, answer.old.label], ["new", (layer) => layer.of_new, answer.new.label]];
  const lines = each.filter(([kind]) => rows[kind]);
  const values = layers.flatMap((layer) => [...lines.map(([, of]) => of(layer)), layer.size]).filter((value) => value !== undefined);
  const [low, high] = [Math.min(0, ...values), Math.max(1e-6, ...values)];
  const x = (i) => EDGE.left + ((WIDTH - EDGE.left - EDGE.right) * (i + 0.5)) / layers.length;
  const y = (value) => EDGE.top + ((HEIGHT - EDGE.top - EDGE.bottom) * (high - value)) / (high - low);
  const wide = Math.max(2, ((WIDTH - EDGE.left - EDGE.right) / layers.length) * 0.6);
  const marks = lines.map(([kind, of]) => {
    const points = layers.map((layer, i) => [i, of(layer)]).filter(([, value]) => value !== undefined);
    return s(
      "g",
      { class: `line ${kind}` },
      s("polyline", { points: points.map(([i, value]) => `${x(i)},${y(value)}`).join(" ") }),
      points.map(([i, value]) => mark(kind, x(i), y(value))),
    );
  });
  const words = lines.map(([, of, label]) => {
    const known = layers.filter((layer) => of(layer) !== undefined);
    return known.length ? `${label}: ${signed(of(known[0]))} in the first layer, ${signed(of(known[known.length - 1]))} in the last` : `${label}: no channels`;
  });
  const ticks = d3.ticks(low, high, 4);
  return h(
    "figure",
    { class: "figure overview" },
    s(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Mean change of each class's channels by layer. ${words.join(". ")}.` },
      ticks.map((tick) => [
        s("line", { class: tick === 0 ? "axis" : "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(tick), y2: y(tick) }),
        s("text", { x: EDGE.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick === 0 ? "0" : signed(tick, Math.abs(tick) < 0.1 ? 2 : 1)),
      ]),
      layers.map((layer, i) => s("rect", { class: "size", x: x(i) - wide / 2, width: wide, y: y(layer.size), height: Math.max(0, y(0) - y(layer.size)) })),
      marks,
      layers.map((layer, i) => s("rect", { class: "hit", x: x(i) - wide, width: 2 * wide, y: 0, height: HEIGHT, on: { click: () => onPick(layer.name) } }, s("title", {}, layer.name))),
      s("text", { x: EDGE.left, y: HEIGHT - 6 }, "first layer"),
      s("text", { x: WIDTH - EDGE.right, y: HEIGHT - 6, "text-anchor": "end" }, "last"),
    ),
    h(
      "figcaption",
      {},
      "By layer, in standard deviations: bars, how much all channels changed; ",
      lines.map(([kind, , label], i) => [i ? " and " : "lines, the mean change of the channels of ", sign(same ? "both" : kind), ` ${label}`]),
      ".",
    ),
  );
}

function mark(kind, x, y) {
  if (kind === "old") return s("circle", { cx: x, cy: y, r: 4 });
  return s("path", { d: `M${x} ${y - 5} L${x + 5} ${y} L${x} ${y + 5} L${x - 5} ${y} Z` });
}
