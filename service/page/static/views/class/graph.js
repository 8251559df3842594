// The drawing of a class's graph: layers as rows, channels as shapes, influences as curves. Asks the service nothing.

import { h, oncePerFrame, replace, s, still } from "../../dom.js";
import { ROW, SCALE } from "./order.js";

const PAD = 26;
const WIDTHS = 6; // of curves that are drawn as one: a thousand elements would be slow
export const SHAPES = { one: "symbolCircle", shared: "symbolCircle", a: "symbolSquare", b: "symbolTriangle" };

// `onLook(node)`: what the pointer or the focus came upon, while nothing is picked; `onPick(node | null)`: what was clicked, Enter or Escape;
// `nameOf(node)`: what a screen reader says of a channel.
export function classDrawing({ onLook, onPick, nameOf }) {
  const rowLines = s("g", { class: "row-lines" });
  const edgeLayer = s("g", { class: "edges", "aria-hidden": "true" });
  const nodeLayer = s("g", { class: "nodes" });
  const lightLayer = s("g", { class: "edges light", "aria-hidden": "true" });
  const world = s("g", {}, rowLines, edgeLayer, lightLayer, nodeLayer);
  const names = s("g", { class: "row-names", "aria-hidden": "true" });
  const svg = s("svg", { class: "class-drawing", role: "group", "aria-label": "Channels of the class, layer by layer" }, world, names);
  let drawn = { nodes: [], edges: [], rows: [], width: 1, height: 1 };
  let [elements, picked, transform, moved, size, widest] = [new Map(), null, d3.zoomIdentity, false, [1, 1], 1];

  const zoom = d3
    .zoom()
    .scaleExtent([0.08, 5])
    // The wheel alone scrolls the page, as does one finger.
    .filter((event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey : event.type.startsWith("touch") ? event.touches.length > 1 : !event.button))
    .on("zoom", (event) => {
      transform = event.transform;
      moved ||= Boolean(event.sourceEvent);
      follow();
    });
  d3.select(svg).call(zoom).on("dblclick.zoom", null);

  const follow = oncePerFrame(() => {
    world.setAttribute("transform", transform.toString());
    svg.classList.toggle("far", transform.k < 0.8);
    const each = Math.max(1, Math.ceil(13 / (ROW * transform.k)));
    [...names.children].forEach((name, i) => {
      name.setAttribute("transform", `translate(10, ${transform.applyY((i + 0.5) * ROW)})`);
      name.classList.toggle("skipped", i % each > 0);
    });
  });

  const moveTo = (next) => (still() ? d3.select(svg) : d3.select(svg).transition().duration(220)).call(zoom.transform, next);

  // What there is beside the names.
  const room = () => [size[0] * 0.75, size[1]];

  // All of it; or, as it opens, where that would be too small, its end, which is next to the prediction.
  function fitted(least = SCALE[0]) {
    const [width, height] = size;
    const side = names.childElementCount ? Math.min(width * 0.36, nameWidth() + 24) : 0;
    const whole = Math.min((width - side - PAD) / (drawn.width + PAD), (height - PAD) / (drawn.height + PAD), SCALE[1]);
    const k = Math.max(whole, least);
    const top = (height - drawn.height * k) / 2;
    return d3.zoomIdentity.translate(side + (width - side) / 2, top < 0 ? height - drawn.height * k - PAD / 2 : top).scale(k);
  }

  const nameWidth = () => Math.max(...drawn.rows.map((row) => row.name.length)) * 6.4;

  function show(picture) {
    drawn = picture;
    widest = d3.max(drawn.edges, (edge) => edge.weight) || 1;
    replace(rowLines, drawn.rows.map((row, i) => s("line", { x1: -drawn.width / 2, x2: drawn.width / 2, y1: (i + 0.5) * ROW, y2: (i + 0.5) * ROW })));
    replace(names, drawn.rows.map((row) => s("text", { dy: "0.32em" }, row.name)));
    const alike = d3.group(drawn.edges, (edge) => edge.side, (edge) => Math.round((WIDTHS * edge.weight) / widest));
    replace(edgeLayer, [...alike].map(([side, byWidth]) => [...byWidth].map(([width, edges]) => s("path", { class: `edge ${side}`, d: edges.map(curve).join(""), "stroke-width": strokeOf(width / WIDTHS) }))));
    const before = elements;
    elements = new Map(drawn.nodes.map((node) => [node.key, before.get(node.key) ?? element(node)]));
    for (const [key, old] of before) if (elements.get(key) !== old) old.remove();
    for (const row of drawn.rows)
      for (const node of row.nodes) {
        const mine = elements.get(node.key);
        mine.setAttribute("transform", `translate(${node.x}, ${node.y})`);
        mine.setAttribute("tabindex", "-1");
        mine.setAttribute("aria-label", nameOf(node));
        if (!before.has(node.key)) nodeLayer.append(mine);
      }
    const first = elements.get(picked) ?? elements.get(drawn.rows[0]?.nodes[0].key);
    first?.setAttribute("tabindex", "0");
    picked = elements.has(picked) ? picked : null;
    light(picked);
    elements.get(picked)?.classList.add("picked");
    if (!moved) d3.select(svg).call(zoom.transform, fitted());
    else follow();
  }

  const strokeOf = (share) => (0.7 + 5.3 * share).toFixed(2);

  function element(node) {
    return s(
      "g",
      { class: `node ${node.side}`, role: "button", "data-key": node.key },
      s("circle", { class: "touch", r: 22 }),
      s("path", { class: "shape", d: d3.symbol(d3[SHAPES[node.side]], 110 + 640 * node.size ** 1.5)() }),
      s("text", { class: "channel", y: 29 }, String(node.channel)),
    );
  }

  // The crop that excites a channel most takes the place of its shape, which goes to its corner. `url`: of its strip,
  // whose first square is seen.
  function dress(key, url) {
    const [element, node] = [elements.get(key), find(key)];
    if (!element || element.querySelector("image")) return;
    const side = 26 + 20 * node.size;
    const at = { x: -side / 2, y: -side / 2, width: side, height: side };
    element.classList.add("dressed");
    element.querySelector(".touch").after(
      s("image", { ...at, href: url, preserveAspectRatio: "xMinYMid slice" }),
      s("rect", { ...at, class: "frame", rx: 3 }),
    );
    element.querySelector(".shape").setAttribute("transform", `translate(${-side / 2}, ${-side / 2}) scale(0.42)`);
    element.querySelector(".channel").setAttribute("y", side / 2 + 12);
  }

  const find = (key) => drawn.nodes.find((node) => node.key === key);

  function light(key) {
    for (const one of svg.querySelectorAll(".near, .here")) one.classList.remove("near", "here");
    const node = key && find(key);
    svg.classList.toggle("lit", Boolean(node));
    const edges = node ? [...node.up, ...node.down] : [];
    replace(lightLayer, edges.map((edge) => s("path", { class: `edge near ${edge.side}`, d: curve(edge), "stroke-width": strokeOf(edge.weight / widest) })));
    if (!node) return;
    elements.get(key).classList.add("near", "here");
    for (const edge of edges) for (const end of [edge.from, edge.to]) elements.get(end.key)?.classList.add("near");
  }

  function pick(key) {
    elements.get(picked)?.classList.remove("picked");
    picked = key;
    elements.get(key)?.classList.add("picked");
    light(key);
    onPick(key ? find(key) : null);
    if (key) bring(find(key));
  }

  // What was clicked stays told of, whatever the pointer passes over.
  function look(key) {
    light(key);
    if (!picked) onLook(find(key));
  }

  const keyAt = (event) => event.target.closest?.(".node")?.dataset.key ?? null;
  svg.addEventListener("pointerover", (event) => { const key = keyAt(event); if (key) look(key); });
  svg.addEventListener("pointerout", (event) => { if (keyAt(event) && !event.relatedTarget?.closest?.(".node")) light(picked); });
  svg.addEventListener("click", (event) => pick(keyAt(event)));
  nodeLayer.addEventListener("focusin", (event) => {
    const key = keyAt(event);
    nodeLayer.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    elements.get(key).setAttribute("tabindex", "0");
    look(key);
  });
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
    const key = keyAt(event);
    const act = { "+": () => by(1.4), "=": () => by(1.4), "-": () => by(1 / 1.4), 0: fit, Escape: () => pick(null) }[event.key];
    if (act) act();
    else if (key && (event.key === "Enter" || event.key === " ")) pick(key);
    else if (key && event.key.startsWith("Arrow")) step(find(key), event.key);
    else return;
    event.preventDefault();
  });

  // Left and right in the layer; up and down to the nearest channel of the layer beside it.
  function step(node, arrow) {
    const at = drawn.rows.findIndex((row) => row.nodes.includes(node));
    const row = drawn.rows[at].nodes;
    let next = null;
    if (arrow === "ArrowLeft" || arrow === "ArrowRight") next = row[row.indexOf(node) + (arrow === "ArrowLeft" ? -1 : 1)];
    else {
      const beside = drawn.rows[at + (arrow === "ArrowUp" ? -1 : 1)]?.nodes ?? [];
      next = d3.least(beside, (other) => Math.abs(other.x - node.x));
    }
    if (!next) return;
    elements.get(next.key).focus({ preventScroll: true });
    bring(next);
  }

  // Keeps what has the focus in sight.
  function bring(node) {
    const [x, y] = transform.apply([node.x, node.y]);
    const [width, height] = size;
    if (x > 60 && x < width - 40 && y > 30 && y < height - 30) return;
    moveTo(d3.zoomIdentity.translate(width / 2 - node.x * transform.k, height / 2 - node.y * transform.k).scale(transform.k));
  }

  const by = (factor) => (still() ? d3.select(svg) : d3.select(svg).transition().duration(160)).call(zoom.scaleBy, factor);
  function fit() {
    moved = true;
    moveTo(fitted(0.08));
  }

  const observer = new ResizeObserver(([entry]) => {
    size = [Math.max(1, entry.contentRect.width), Math.max(1, entry.contentRect.height)];
    if (!moved && drawn.rows.length) d3.select(svg).call(zoom.transform, fitted());
  });
  observer.observe(svg);

  const tool = (label, text, click) => h("button", { type: "button", class: "ghost", "aria-label": label, title: label, on: { click } }, text);
  const tools = h("div", { class: "zoom-tools", role: "group", "aria-label": "Zoom" }, tool("Zoom in", "+", () => by(1.4)), tool("Zoom out", "−", () => by(1 / 1.4)), tool("Show all", "⤢", fit));
  return { svg, tools, show, room, dress, pick, release: () => { [picked, moved, elements] = [null, false, new Map()]; nodeLayer.replaceChildren(); }, unmount: () => observer.disconnect() };
}

function curve({ from, to }) {
  const [x, y, u, v] = [from.x, from.y, to.x, to.y].map(Math.round);
  const bend = Math.round((v - y) * 0.45);
  return `M${x},${y}C${x},${y + bend} ${u},${v - bend} ${u},${v}`;
}
