// All classes on a plane, near where their channels are alike: points on a canvas, names where there is room for them.

import { announce, h, oncePerFrame, replace, still } from "../../dom.js";

const PAD = 22;
const NAMES = 40; // drawn at once beside those that are chosen or pointed at
const REACH = 22; // pixels from which a point is hit

// `classes`: [{index, label, x, y}]; `onPick(index)`, `onCompare(index)`: clicked, or clicked with Shift.
export function classPlaces({ classes, onPick, onCompare }) {
  const canvas = h("canvas", {
    tabindex: 0, role: "application",
    "aria-label": `${classes.length} classes, near each other where their channels are alike. Arrow keys move to the next class, Enter chooses it, C compares with it.`,
  });
  const tip = h("div", { class: "place-tip", hidden: true, "aria-hidden": "true" });
  const node = h("div", { class: "places" }, canvas, tip);
  const context = canvas.getContext("2d");
  const widths = new Map();
  let [transform, hover, cursor, a, b, size, colours] = [d3.zoomIdentity, null, null, null, null, [0, 0], null];

  const base = (one) => [PAD + ((one.x + 1) / 2) * (size[0] - 2 * PAD), PAD + ((1 - one.y) / 2) * (size[1] - 2 * PAD)];
  const at = (one) => transform.apply(base(one));
  let tree = null;

  // Canvas colours are the page's tokens, which only an element can resolve.
  function palette() {
    const found = {};
    for (const name of ["ink", "ink-2", "paper", "paper-2", "accent", "accent-2", "line"]) {
      canvas.style.color = `var(--${name})`;
      found[name] = getComputedStyle(canvas).color;
    }
    canvas.style.color = "";
    return found;
  }

  const draw = oncePerFrame(() => {
    if (!size[0]) return;
    colours ??= palette();
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, ...size);
    const radius = Math.min(6, (classes.length > 200 ? 2.6 : 4.5) * Math.sqrt(transform.k));
    const stamp = dot(radius, ratio);
    const seen = [];
    for (const one of classes) {
      const [x, y] = at(one);
      if (x < -9 || y < -9 || x > size[0] + 9 || y > size[1] + 9) continue;
      context.drawImage(stamp, x - radius - 1, y - radius - 1, 2 * radius + 2, 2 * radius + 2);
      if (seen.length < 6 * NAMES) seen.push(one);
    }
    names(radius, seen);
    if (b) mark(b, "B", colours["accent-2"]);
    if (a) mark(a, "A", colours.accent);
    if (hover && hover !== a && hover !== b) mark(hover, null, colours.ink);
  });

  // One point, to be stamped a thousand times: a path of as many circles takes long to fill.
  function dot(radius, ratio) {
    const side = Math.ceil((2 * radius + 2) * ratio);
    const stamp = new OffscreenCanvas(side, side);
    const pen = stamp.getContext("2d");
    pen.fillStyle = colours["ink-2"];
    pen.globalAlpha = 0.55;
    pen.arc(side / 2, side / 2, radius * ratio, 0, 2 * Math.PI);
    pen.fill();
    return stamp;
  }

  // Names where none lies on another.
  function names(radius, seen) {
    context.font = '12px system-ui, "Noto Sans", sans-serif';
    context.textBaseline = "middle";
    const taken = [a, b].filter(Boolean).map((one) => box(one, radius));
    let drawn = 0;
    context.lineWidth = 3;
    context.strokeStyle = colours.paper;
    context.fillStyle = colours["ink-2"];
    for (const one of seen) {
      if (drawn >= NAMES) break;
      if (one === a || one === b || one === hover) continue;
      const mine = box(one, radius);
      if (mine[0] < 0 || mine[1] < 0 || mine[2] > size[0] || mine[3] > size[1]) continue;
      if (taken.some((other) => mine[0] < other[2] && other[0] < mine[2] && mine[1] < other[3] && other[1] < mine[3])) continue;
      taken.push(mine);
      context.strokeText(short(one.label), mine[0] + radius + 5, (mine[1] + mine[3]) / 2);
      context.fillText(short(one.label), mine[0] + radius + 5, (mine[1] + mine[3]) / 2);
      drawn++;
    }
  }

  const short = (label) => (label.length > 24 ? `${label.slice(0, 23)}…` : label);
  function box(one, radius) {
    if (!widths.has(one)) widths.set(one, context.measureText(short(one.label)).width);
    const [x, y] = at(one);
    const wide = widths.get(one) + radius + 8;
    return x + wide + 4 > size[0] ? [x - wide - radius, y - 8, x - radius, y + 8] : [x, y - 8, x + wide, y + 8];
  }

  function mark(one, letter, colour) {
    const [x, y] = at(one);
    context.lineWidth = 2;
    context.strokeStyle = colours.paper;
    context.fillStyle = colour;
    context.beginPath();
    if (letter === "A") context.rect(x - 7, y - 7, 14, 14);
    else if (letter === "B") { context.moveTo(x, y - 9); context.lineTo(x + 9, y + 7); context.lineTo(x - 9, y + 7); context.closePath(); }
    else context.arc(x, y, 6, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
    const text = short(one.label);
    context.font = '600 12.5px system-ui, "Noto Sans", sans-serif';
    const wide = context.measureText(text).width;
    const left = x + 12 + wide > size[0] ? Math.max(4, x - 12 - wide) : x + 12;
    context.lineWidth = 4;
    context.strokeText(text, left, y);
    context.fillStyle = colours.ink;
    context.fillText(text, left, y);
  }

  function nearest(px, py, reach = REACH) {
    const [x, y] = transform.invert([px, py]);
    tree ??= d3.quadtree(classes, (one) => base(one)[0], (one) => base(one)[1]);
    return tree.find(x, y, reach / transform.k) ?? null;
  }

  function look(one) {
    if (hover === one) return;
    hover = one;
    canvas.style.cursor = one ? "pointer" : "";
    tip.hidden = !one;
    if (one) {
      const [x, y] = at(one);
      replace(tip, one.label, h("span", { class: "muted" }, ` ${one.index}`));
      tip.style.left = `${Math.min(Math.max(x, 70), size[0] - 70)}px`;
      tip.style.top = `${y > 46 ? y - 34 : y + 14}px`;
    }
    draw();
  }

  const zoom = d3
    .zoom()
    .scaleExtent([1, 40])
    .filter((event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey : event.type.startsWith("touch") ? event.touches.length > 1 : !event.button && !event.shiftKey))
    .on("zoom", (event) => { transform = event.transform; look(null); draw(); });
  d3.select(canvas).call(zoom).on("dblclick.zoom", null);
  canvas.addEventListener("pointermove", (event) => event.buttons || look(nearest(event.offsetX, event.offsetY)));
  canvas.addEventListener("pointerleave", () => look(null));
  canvas.addEventListener("click", (event) => {
    const one = nearest(event.offsetX, event.offsetY);
    if (one) (event.shiftKey ? onCompare : onPick)(one.index);
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (direction) go(direction);
    else if (event.key === "+" || event.key === "=") by(1.5);
    else if (event.key === "-") by(1 / 1.5);
    else if (event.key === "0") all();
    else if (event.key === "Enter" && cursor) onPick(cursor.index);
    else if (event.key.toLowerCase() === "c" && cursor) onCompare(cursor.index);
    else return;
    event.preventDefault();
  });

  // The next class that way: near, and not much to the side.
  function go([dx, dy]) {
    const from = cursor ?? a ?? classes[0];
    const [x, y] = base(from);
    cursor = d3.least(classes, (one) => {
      const [ox, oy] = base(one);
      const [ahead, aside] = [(ox - x) * dx + (oy - y) * dy, Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx)];
      return one !== from && ahead > 0 ? ahead + 2 * aside : NaN;
    }) ?? from;
    look(cursor);
    announce(cursor.label);
  }

  const by = (factor) => (still() ? d3.select(canvas) : d3.select(canvas).transition().duration(160)).call(zoom.scaleBy, factor);
  const all = () => (still() ? d3.select(canvas) : d3.select(canvas).transition().duration(220)).call(zoom.transform, d3.zoomIdentity);

  const observer = new ResizeObserver(() => {
    const ratio = devicePixelRatio || 1;
    size = [node.clientWidth, node.clientHeight];
    [canvas.width, canvas.height] = size.map((side) => Math.round(side * ratio));
    zoom.extent([[0, 0], size]).translateExtent([[0, 0], size]);
    tree = null;
    draw();
  });
  observer.observe(node);
  const recolour = () => { colours = null; draw(); };
  const theme = new MutationObserver(recolour);
  theme.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", recolour);

  const tool = (label, text, click) => h("button", { type: "button", class: "ghost", "aria-label": label, title: label, on: { click } }, text);
  const tools = h("div", { class: "zoom-tools", role: "group", "aria-label": "Zoom of the classes" }, tool("Zoom in", "+", () => by(1.5)), tool("Zoom out", "−", () => by(1 / 1.5)), tool("Show all classes", "⤢", all));
  return {
    node, tools,
    choose(first, second) {
      const before = a;
      [a, b] = [first, second].map((index) => classes.find((one) => one.index === index) ?? null);
      if (a !== before) cursor = a; // what is compared leaves the keyboard's place where it is
      draw();
    },
    unmount() { observer.disconnect(); theme.disconnect(); dark.removeEventListener("change", recolour); },
  };
}
