// The Class view: a class's channels and how they feed each other, beside all classes by their likeness (after Summit).

import { isAbort, path } from "../api.js";
import { busy, check, emptyState, explained, problemBox, slider } from "../components.js";
import { announce, h, oncePerFrame, replace, s } from "../dom.js";
import { define } from "../words.js";
import { channelPanel, strengthWords } from "./class/channel.js";
import { classDrawing, SHAPES } from "./class/graph.js";
import { picture } from "./class/order.js";
import { classPlaces } from "./class/places.js";
import { classSearch } from "./class/search.js";

const MOST = { nodes: 300, edges: 1000 }; // drawn at most

define({
  class_graph: "A class's channels are those that a test over many images ties to it: more active on its images than on others. They are drawn layer by layer, from the input at the top to the prediction at the bottom.",
  class_strength: "How surely the channel is more active on this class's images than on all others, against the strongest channel of the same class and layer, which has 1. It is the root of the ratio of the logarithms of their p-values; for sure channels, the ratio of their t values.",
  influence: "The share of a channel's activity, on this class's images, that comes by way of a channel of an earlier layer: gradient times activation. Above 100 %, others take away what it gives too much.",
  drawn_channels: "How many channels are drawn. Every layer gives its most important one in turn, by personalised PageRank: where a walk along the influences, begun at strong channels, most often is.",
  drawn_influences: "How many influences are drawn: of every layer the largest in turn. The service keeps only those that most walks go along.",
  class_places: "Classes that select the same channels with the same strength lie near each other. Two dimensions of many (classical multidimensional scaling): what is near here may still differ, and the axes have no meaning of their own.",
  exemplars: "The pieces of the images this graph was built with on which the channel was most active, the strongest first. They are pieces of those very images: who sees them sees training data.",
  serves: "The classes that select this channel, and how strong it is for each, against each class's own strongest channel of the layer.",
  class_images: "How many of the class's images the influences were measured on. Which channels are selected comes from the table, which saw more.",
});

export const view = {
  id: "class",
  title: "Class",
  mount(root, app) {
    const life = new AbortController();
    let parts = null; // what shows a graph, once there is one
    const body = h("div", { class: "stack class-body" });
    root.append(h("div", { class: "class-head" }, h("h1", {}, "What a class is made of ", explained("class_graph", "this drawing"))), body);

    async function load() {
      const { model, version } = app.store.get();
      parts?.unmount();
      parts = null;
      replace(body, h("p", { class: "muted" }, "Opening the class graph …"));
      busy(body, true);
      try {
        const graph = await app.api.get(path(["models", model, "class-graph"], version), { signal: life.signal, lane: "class graph" });
        body.replaceChildren();
        parts = shown(body, app, graph, life.signal);
      } catch (error) {
        if (isAbort(error)) return;
        replace(body, error.code === "no_class_graph" ? without(app, error, load) : problemBox(error, load));
      }
      busy(body, false);
    }

    load();
    return {
      update(state, changed) {
        if (["class", "against"].some((key) => changed.has(key))) parts?.choose();
      },
      unmount() {
        life.abort();
        parts?.unmount();
      },
    };
  },
};

const brief = (label) => label.split(",")[0]; // of many names the first, where there is little room
const buildCommand = (app) => `parchgrad class-graph build ${app.store.get().model} --data IMAGES`;

function without(app, problem, retry) {
  const command = buildCommand(app);
  const code = h("code", { tabindex: 0 }, command);
  const copy = h("button", { type: "button", on: { click: copied } }, "Copy");
  async function copied() {
    try {
      await navigator.clipboard.writeText(command);
      announce("The command is copied.");
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard here: it is marked, to be copied by hand
      copy.textContent = "Marked: copy it";
    }
  }
  const stale = !problem.message.includes("has no class graph");
  return h(
    "div",
    { class: "panel" },
    emptyState(
      stale ? "The class graph here is not this model's" : "No class graph yet",
      h("p", {}, stale ? problem.message : "It says which channels each class is made of, and how they feed each other. It is computed once, from a folder of images, into a file beside the table."),
      h("div", { class: "command" }, code, copy),
      h("p", { class: "muted" }, "IMAGES is a folder with a folder of images for each class. Add ", h("code", {}, "--exemplars 9"), " to keep the crops that excite each channel most: pieces of those images, so only where whoever opens this page may see them. The service need not start anew."),
      h("button", { type: "button", class: "primary", on: { click: retry } }, "Look again"),
    ),
  );
}

function shown(root, app, graph, signal) {
  const known = new Map(); // answers by path: what was looked at lately costs nothing
  const byIndex = new Map(graph.classes.map((one) => [one.index, one]));
  const touch = matchMedia("(pointer: coarse)").matches;
  const used = { a: null, b: null, pair: null, picture: null };
  const most = { nodes: Math.min(Math.max(40, 4 * graph.layers.length), 220) };
  most.edges = Math.max(160, 2 * most.nodes);

  const pickFirst = (index) => index !== null && app.store.set({ class: index, ...(app.store.get().against === index ? { against: null } : {}) });
  const pickSecond = (index) => app.store.set({ against: index === current().a ? null : index });
  const first = classSearch({ label: "Class", classes: graph.classes, onPick: pickFirst });
  const second = classSearch({ label: "Compared with", classes: graph.classes, clear: "Compare with none", placeholder: "No other class", onPick: pickSecond });
  const about = h("p", { class: "about-class" });
  const legend = h("div", { class: "class-legend" });
  const nodesSlider = slider({ label: "Channels", min: 5, max: MOST.nodes, step: 1, value: most.nodes, term: "drawn_channels", onInput: (value) => { most.nodes = value; redraw(); } });
  const edgesSlider = slider({ label: "Influences", min: 0, max: MOST.edges, step: 1, value: most.edges, term: "drawn_influences", onInput: (value) => { most.edges = value; redraw(); } });
  const panel = channelPanel(app, { pictures: graph.exemplars, build: buildCommand(app), signal, onClass: pickFirst, onChannel: (key) => drawing.pick(key) });
  const drawing = classDrawing({
    nameOf,
    onLook: (node) => panel.show(node, names(), false),
    onPick: (node) => { if (node) { panel.show(node, names(), true); announce(nameOf(node)); } else hint(); },
  });
  const dresses = new Map(); // blob addresses of strips, by channel
  // At once where it costs nobody anything; a key may have only so many requests a minute.
  const dressed = graph.exemplars && check({ label: "Crops in the drawing", checked: !app.store.get().state?.keys, onChange: () => draw() });
  const places = classPlaces({ classes: graph.classes, onPick: pickFirst, onCompare: pickSecond });
  const table = h("div", { class: "table-room" });
  const details = h("details", { class: "panel as-table", on: { toggle: fillTable } }, h("summary", {}, "The drawing as a table"), table);
  const stage = h("div", { class: "stage" }, drawing.svg, drawing.tools, h("p", { class: "muted how" }, touch ? "Two fingers move and zoom." : "Drag moves, Ctrl and the wheel zoom. In the drawing: arrow keys, Enter, + − 0."));
  const problem = h("div", {});
  root.append(
    h("div", { class: "class-choice" }, first.node, second.node, h("div", { class: "class-sliders" }, nodesSlider.node, edgesSlider.node)),
    h(
      "div",
      { class: "class-grid" },
      h("section", { class: "panel drawing-panel", "aria-label": "Channels and influences" }, about, legend, problem, stage),
      panel.node,
      h("section", { class: "panel places-panel", "aria-label": "All classes" }, h("div", { class: "places-head" }, h("h2", {}, `All ${graph.classes.length} classes by likeness `, explained("class_places", "where a class lies")), places.tools), places.node, h("p", { class: "muted" }, touch ? "Touch a class to see it." : "Click a class to see it; Shift and click to compare with it.")),
    ),
    details,
  );
  hint();

  function hint() {
    const told = "what excites it most, what it feeds, and which classes it serves.";
    panel.hint(touch ? `Touch one: ${told}` : `Point at one, or reach it with Tab and the arrow keys: ${told} A click or Enter keeps it here.`);
  }

  // What the address names, else the target of the other views, else the first that has a row.
  function current() {
    const { class: asked, against, target } = app.store.get();
    const wanted = [asked, /^\d+$/.test(String(target)) ? Number(target) : null].find((index) => byIndex.has(index));
    const a = wanted ?? graph.classes[0]?.index ?? null;
    return { a, b: byIndex.has(against) && against !== a ? against : null };
  }

  const names = () => ({ a: used.a?.label, b: used.b?.label, aIndex: used.a?.index, bIndex: used.b?.index });

  async function ask(parts, lane, query = "") {
    const { model, version } = app.store.get();
    const base = path(["models", model, "class-graph", ...parts], version);
    const where = query ? `${base}${version ? "&" : "?"}${query}` : base;
    if (!known.has(where)) {
      const answer = await app.api.get(where, { signal, lane });
      if (known.size > 40) known.delete(known.keys().next().value);
      known.set(where, answer);
    }
    return known.get(where);
  }

  let asked = 0;
  async function choose() {
    const { a, b } = current();
    const own = ++asked;
    first.set(a);
    second.set(b);
    places.choose(a, b);
    if (a === null) return;
    busy(stage, true);
    try {
      const limits = `nodes=${MOST.nodes}&edges=2000`;
      const [ofA, ofB, pair] = await Promise.all([
        ask(["classes", a], "class a", limits),
        b === null ? null : ask(["classes", b], "class b", limits),
        b === null ? null : ask(["classes", a, "against", b], "class pair"),
      ]);
      if (own !== asked) return;
      Object.assign(used, { a: ofA, b: ofB, pair });
      problem.replaceChildren();
      drawing.release();
      hint();
      draw();
      announce(`${ofA.label}${ofB ? ` compared with ${ofB.label}` : ""}: ${used.picture.nodes.length} channels drawn.`);
    } catch (error) {
      if (own !== asked || isAbort(error)) return; // the newer one ends the waiting
      replace(problem, problemBox(error, choose));
    }
    busy(stage, false);
  }

  const redraw = oncePerFrame(() => used.a && draw());

  function draw() {
    const { a, b, pair } = used;
    const all = [a, b].filter(Boolean);
    const [nodes, edges] = ["nodes", "edges"].map((what) => Math.max(...all.map((one) => one[what].length)) * all.length);
    nodesSlider.input.max = Math.max(5, Math.min(MOST.nodes, nodes));
    edgesSlider.input.max = Math.min(MOST.edges, edges);
    nodesSlider.set(Math.min(most.nodes, nodesSlider.input.max));
    edgesSlider.set(Math.min(most.edges, edgesSlider.input.max));
    used.picture = picture(graph.layers, a, b, pair, Number(nodesSlider.input.value), Number(edgesSlider.input.value), drawing.room());
    drawing.show(used.picture);
    if (dressed?.input.checked) dress(used.picture);
    describe();
    if (details.open) fillTable();
  }

  // A few strips at a time, those of the last drawing only.
  async function dress(drawn) {
    const { model, version } = app.store.get();
    const waiting = [...drawn.nodes].sort((x, y) => y.row - x.row); // what is in sight first
    const work = async () => {
      for (let node = waiting.shift(); node && used.picture === drawn && !signal.aborted; node = waiting.shift()) {
        if (!dresses.has(node.key)) {
          const where = path(["models", model, "class-graph", "exemplars", node.layer, node.channel], version);
          dresses.set(node.key, URL.createObjectURL(await app.api.get(where, { accept: "image/*", signal })));
        }
        drawing.dress(node.key, dresses.get(node.key));
      }
    };
    try {
      await Promise.all(Array.from({ length: 4 }, work));
    } catch (error) {
      if (!isAbort(error)) replace(problem, problemBox(error));
    }
  }

  function describe() {
    const { a, b, pair, picture: drawn } = used;
    const number = (value) => h("span", { class: "number" }, value);
    if (!b)
      replace(about, h("strong", {}, a.label), " selects ", number(a.nodes_in_all), ` channels in ${graph.layers.length} layers; looked at on `, number(a.images), " images", explained("class_images", "looked at"), `. Drawn: ${drawn.nodes.length} channels, ${drawn.edges.length} influences.`);
    else {
      const sum = (part) => d3.sum(pair.layers, (layer) => layer[part].length);
      replace(about, h("strong", {}, a.label), " and ", h("strong", {}, b.label), " share ", number(sum("shared")), " channels; ", number(sum("only_a")), ` are ${brief(a.label)}'s alone, `, number(sum("only_b")), ` ${brief(b.label)}'s. Drawn: ${drawn.nodes.length} channels, ${drawn.edges.length} influences.`);
    }
    const entry = (side, text) => h("span", { class: "entry" }, shape(side), text);
    replace(
      legend,
      b ? [entry("a", `only ${brief(a.label)}`), entry("shared", "both"), entry("b", `only ${brief(b.label)}`)] : entry("one", "a channel; larger is stronger"),
      h("span", { class: "entry" }, "Strength", explained("class_strength", "strength")),
      h("span", { class: "entry" }, "Influence", explained("influence")),
      dressed?.node,
      h("button", { type: "button", class: "ghost", on: { click: () => app.store.set({ view: "explain", target: String(a.index) }) } }, `Explain a picture as ${brief(a.label)}`),
    );
  }

  function whose(node) {
    const { a, b } = used;
    return { one: "", shared: ", of both classes", a: `, only of ${a.label}`, b: `, only of ${b?.label}` }[node.side];
  }

  function nameOf(node) {
    const told = Object.values(node.strength).map((value) => value.toFixed(2)).join(" and ");
    return `Channel ${node.channel} of ${node.layer}, strength ${told}, ${strengthWords(node.size)}${whose(node)}; ${node.up.length} influences from before, ${node.down.length} on later ones`;
  }

  // Filled when it is opened: hundreds of rows that most never ask for.
  function fillTable() {
    if (!details.open || !used.picture) return;
    const { a, b } = used;
    const cell = (value) => h("td", { class: "number" }, value === undefined ? "–" : value.toFixed(3));
    replace(
      table,
      h(
        "table",
        {},
        h("caption", { class: "unseen" }, `Channels drawn of ${a.label}${b ? ` and ${b.label}` : ""}`),
        h("thead", {}, h("tr", {}, ["Layer", "Channel", `Strength for ${a.label}`, ...(b ? [`Strength for ${b.label}`, "Selected by"] : []), "Fed most by"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, used.picture.rows.map((row) => [...row.nodes].sort((x, y) => y.size - x.size).map((node, i) => {
          const strongest = d3.greatest(node.up, (edge) => edge.weight);
          return h("tr", {}, i ? h("td", {}) : h("th", { scope: "rowgroup" }, row.name), h("td", { class: "number" }, String(node.channel)), cell(node.strength.a), b && [cell(node.strength.b), h("td", {}, { shared: "both", a: a.label, b: b.label }[node.side])], h("td", {}, strongest ? `${strongest.from.channel} of ${strongest.from.layer}, ${(100 * strongest.weight).toFixed(0)} %` : "–"));
        }))),
      ),
    );
  }

  choose();
  return {
    choose,
    unmount() {
      for (const url of dresses.values()) URL.revokeObjectURL(url);
      drawing.unmount();
      places.unmount();
      panel.unmount();
    },
  };
}

const shape = (side) => s("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true", class: `node ${side}` }, s("path", { class: "shape", d: d3.symbol(d3[SHAPES[side]], 130)() }));
