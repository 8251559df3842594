// The difference of two maps and its drawing: orange where the first has more of its share, blue where the second has.

import { areaOf, DIMMED, drawPlain, greyOf, percentile, smoothedMap, spread } from "../../map.js";

const MORE = [255, 140, 26]; // orange and blue: apart for every kind of colour blindness, and as bright
const LESS = [64, 150, 255];

// a / sum(a) - b / sum(b): a map like those, of both signs.
export function difference(a, b) {
  const share = (map) => {
    const sum = map.values.reduce((total, value) => total + value, 0);
    return sum > 0 ? 1 / sum : 0;
  };
  const [ofA, ofB] = [share(a), share(b)];
  return { width: a.width, height: a.height, values: a.values.map((value, i) => value * ofA - b.values[i] * ofB) };
}

// Over the grey picture; full strength at the upper percentile of the sizes, whichever the sign.
export function drawDifference(context, image, map, box, drawing) {
  drawPlain(context, image);
  const area = areaOf(box, image, context.canvas.width, context.canvas.height);
  if (!area) return;
  const values = smoothedMap(map);
  const top = percentile(Float32Array.from(values, Math.abs).sort(), drawing.clip_upper) || 1;
  const strong = spread(values.map((value) => Math.max(-1, Math.min(1, value / top))), map, area);
  const pixels = context.getImageData(area.x, area.y, area.width, area.height);
  const { data } = pixels;
  for (let i = 0, p = 0; i < strong.length; i++, p += 4) {
    const colour = strong[i] > 0 ? MORE : LESS;
    const weight = Math.abs(strong[i]) ** 0.7;
    const base = DIMMED * greyOf(data, p);
    for (let c = 0; c < 3; c++) data[p + c] += (base + (colour[c] - base) * weight - data[p + c]) * drawing.opacity;
  }
  context.putImageData(pixels, area.x, area.y);
}
