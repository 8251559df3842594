// A picture with its map: the canvas, the frame of what the model saw, and the crosshair that all maps share.

import { h, oncePerFrame, replace } from "../../dom.js";
import { drawOverlay, drawPlain } from "../../map.js";

const FAR = 10; // pixels of the map that an arrow key moves with Shift

// `least`, `most`: pixels of the longer side of the canvas. `onPoint(point, how)`: {x, y} in shares of the picture, or
// null; how is "over", "kept" or "key". `pin`: {at}, the point that stays when the pointer leaves; one for all stages
// that show the same point.
export function createStage({ label, pin, least = 512, most = 800, onPoint, onOpen, small = false }) {
  const canvas = h("canvas", { width: 8, height: 8, role: "img", "aria-label": label });
  const across = h("div", { class: "cross across" });
  const down = h("div", { class: "cross down" });
  const frame = h("div", { class: "seen", hidden: true });
  const notice = h("div", { class: "notice" });
  const node = h(
    "div",
    { class: `stage${small ? " small" : ""}`, tabindex: 0, role: "application", "aria-label": `${label}. Arrow keys move the crosshair` },
    canvas, frame, across, down, notice,
  );
  let shown = null; // {bitmap, map, box}
  let point = null;

  function place(next) {
    point = next;
    node.classList.toggle("pointed", Boolean(point));
    if (!point) return;
    across.style.top = `${100 * point.y}%`;
    down.style.left = `${100 * point.x}%`;
  }

  const at = (event) => {
    const rect = canvas.getBoundingClientRect();
    const share = (value) => Math.min(1 - 1e-6, Math.max(0, value));
    return { x: share((event.clientX - rect.left) / rect.width), y: share((event.clientY - rect.top) / rect.height) };
  };
  const over = oncePerFrame((next) => shown && onPoint?.(next, "over"));
  canvas.addEventListener("pointermove", (event) => over(at(event)));
  canvas.addEventListener("pointerleave", () => over(pin.at));
  canvas.addEventListener("click", (event) => {
    if (!shown) return;
    onPoint?.((pin.at = at(event)), "kept");
  });
  node.addEventListener("keydown", (event) => {
    if (!shown || event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
    if (event.key === "Escape" && point) onPoint?.((pin.at = null), "key");
    else if (event.key === "Enter" && event.target === node) onOpen?.();
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const { bitmap, map, box } = shown;
    const wide = (map ? (box[2] - box[0]) / map.width : 1) / bitmap.width;
    const high = (map ? (box[3] - box[1]) / map.height : 1) / bitmap.height;
    const steps = event.shiftKey ? FAR : 1;
    const from = point ?? middle(shown);
    const within = (value) => Math.min(1 - 1e-6, Math.max(0, value));
    pin.at = point ? { x: within(from.x + steps * wide * move[0]), y: within(from.y + steps * high * move[1]) } : from;
    onPoint?.(pin.at, "key");
  });

  return {
    node,
    canvas,
    // `paint(context)`: draws the canvas; without it the map over the picture.
    draw({ bitmap, map = null, box, drawing, palette, paint }) {
      const side = box ? Math.max(box[2] - box[0], box[3] - box[1]) : Math.max(bitmap.width, bitmap.height);
      const whole = Math.max(bitmap.width, bitmap.height);
      // Small pictures in whole multiples: their pixels then stay even.
      let scale = side < least ? Math.max(1, Math.floor(least / side)) : Math.min(1, most / side);
      scale = Math.min(scale, (1.6 * most) / whole);
      const size = [Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale))];
      if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
      // Broad or tall pictures alike stay within the height that the page has for them.
      node.style.setProperty("--aspect", bitmap.width / bitmap.height);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      if (paint) paint(context);
      else if (map) drawOverlay(context, bitmap, map, box, drawing, palette);
      else drawPlain(context, bitmap);
      shown = { bitmap, map, box: box ?? [0, 0, bitmap.width, bitmap.height] };
      showFrame(frame, shown);
    },
    label(text) {
      canvas.setAttribute("aria-label", text);
      node.setAttribute("aria-label", `${text}. Arrow keys move the crosshair`);
    },
    point: place,
    forget() {
      shown = null;
      pin.at = null;
      place(null);
    },
    notice: (...children) => replace(notice, ...children),
  };
}

const middle = ({ bitmap, box }) => ({ x: (box[0] + box[2]) / 2 / bitmap.width, y: (box[1] + box[3]) / 2 / bitmap.height });

function showFrame(frame, { bitmap, box }) {
  const [left, top, right, bottom] = box;
  const all = left <= 0.5 && top <= 0.5 && right >= bitmap.width - 0.5 && bottom >= bitmap.height - 0.5;
  frame.hidden = all;
  const part = (value, of) => `${(100 * Math.min(of, Math.max(0, value))) / of}%`;
  Object.assign(frame.style, {
    left: part(left, bitmap.width),
    top: part(top, bitmap.height),
    width: part(Math.min(right, bitmap.width) - Math.max(0, left), bitmap.width),
    height: part(Math.min(bottom, bitmap.height) - Math.max(0, top), bitmap.height),
  });
}

// What a map says at a point: {value, rank, column, row}, or null beside the map. `rank` is the share of weaker pixels.
export function reading(map, box, bitmap, point) {
  if (!map || !point) return null;
  const [left, top, right, bottom] = box;
  const column = Math.floor(((point.x * bitmap.width - left) / (right - left)) * map.width);
  const row = Math.floor(((point.y * bitmap.height - top) / (bottom - top)) * map.height);
  if (column < 0 || row < 0 || column >= map.width || row >= map.height) return null;
  const value = map.values[row * map.width + column];
  return { value, column, row, rank: below(sortedOf(map), value) };
}

const sorted = new WeakMap();
function sortedOf(map) {
  if (!sorted.has(map)) sorted.set(map, Float32Array.from(map.values).sort());
  return sorted.get(map);
}

function below(values, value) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const half = (low + high) >> 1;
    if (values[half] < value) low = half + 1;
    else high = half;
  }
  return low / values.length;
}

// 0.00123 -> "0.00123", 1.2e-7 -> "1.20e-7"
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e4 ? value.toPrecision(3) : value.toExponential(2);
}
