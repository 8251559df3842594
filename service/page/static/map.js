// A saliency map: from the answer's bytes to numbers, and from numbers to colours; drawn as parchgrad/render.py draws.

export const DIMMED = 0.65; // brightness of the image under the colours, as in render.py
const SMOOTH = 0.008; // sd of the Gaussian over the map, a share of its longer side, as in service/answers.py

// `saliency` of an answer -> {width, height, values: Float32Array}. Any binary dtype but png.
export function decodeMap(saliency) {
  const [height, width] = saliency.shape;
  const bytes = Uint8Array.from(atob(saliency.data), (letter) => letter.charCodeAt(0));
  let values;
  if (saliency.dtype === "uint8") values = Float32Array.from(bytes);
  else if (saliency.dtype === "float16") values = Float32Array.from(new Uint16Array(bytes.buffer), half);
  else if (saliency.dtype === "float32") values = new Float32Array(bytes.buffer);
  else throw new TypeError(`a map of ${saliency.dtype} holds no numbers`);
  if (saliency.scale !== 1) values = values.map((value) => value * saliency.scale);
  return { width, height, values };
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * 2 ** -14 * (fraction / 1024);
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

// Drawing strength in [0, 1], as render.strength: smoothed, then between two percentiles.
function strength(map, drawing) {
  const values = smoothedMap(map);
  const sorted = Float32Array.from(values).sort();
  const low = percentile(sorted, drawing.clip_lower);
  let high = percentile(sorted, drawing.clip_upper);
  if (high <= low) high = sorted[sorted.length - 1];
  const span = high - low;
  return values.map((value) => (span > 0 ? Math.min(1, Math.max(0, (value - low) / span)) : 0));
}

// The map's values as they are drawn: smoothed a little, for single pixels are hard to see on a photograph.
export const smoothedMap = (map) => smoothed(map, SMOOTH * Math.max(map.width, map.height));

// Of sorted numbers, between neighbours in proportion, as numpy has it.
export function percentile(sorted, percent) {
  const place = ((sorted.length - 1) * percent) / 100;
  const below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}

function smoothed({ width, height, values }, sd) {
  const reach = Math.round(4 * sd);
  if (reach < 1) return values;
  const kernel = Float32Array.from({ length: 2 * reach + 1 }, (_, i) => Math.exp(-((i - reach) ** 2) / (2 * sd * sd)));
  const sum = kernel.reduce((total, one) => total + one, 0);
  const across = line(values, width, height, 1, width, kernel, reach, sum);
  return line(across, height, width, width, 1, kernel, reach, sum);
}

// Convolves `count` lines of `length` values; beyond the ends the line is mirrored, as SciPy's default has it.
function line(values, length, count, step, between, kernel, reach, sum) {
  const out = new Float32Array(values.length);
  for (let row = 0; row < count; row++)
    for (let i = 0; i < length; i++) {
      let total = 0;
      for (let k = -reach; k <= reach; k++) {
        let at = i + k;
        while (at < 0 || at >= length) at = at < 0 ? -at - 1 : 2 * length - 1 - at;
        total += kernel[k + reach] * values[row * between + at * step];
      }
      out[row * between + i * step] = total / sum;
    }
  return out;
}

// `palettes`: answer of page/palettes.json -> {name: Uint8Array of 256 x 3}.
export function decodePalettes(palettes) {
  return Object.fromEntries(
    Object.entries(palettes).map(([name, text]) => [name, Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]),
  );
}

// The map over its image: `box` [left, top, right, bottom] is where the map lies on `image` (upright), in its pixels;
// `context` is of a canvas that shows the whole image. Beside the box the image stays as it is.
export function drawOverlay(context, image, map, box, drawing, palette) {
  const { width, height } = context.canvas;
  drawPlain(context, image);
  if (!map || drawing.opacity === 0) return;
  const area = areaOf(box, image, width, height);
  if (!area) return;
  const pixels = context.getImageData(area.x, area.y, area.width, area.height);
  blend(pixels.data, spread(strengthOf(map, drawing), map, area), drawing, palette);
  context.putImageData(pixels, area.x, area.y);
}

// The whole image, on white where it is transparent, as the service sees it. Its last size is kept: the next map of
// the same image is drawn over it.
const plains = new WeakMap();
export function drawPlain(context, image) {
  const { width, height } = context.canvas;
  let plain = plains.get(image);
  if (plain?.width !== width || plain.height !== height) {
    plain = new OffscreenCanvas(width, height);
    const on = plain.getContext("2d", { willReadFrequently: true });
    on.fillStyle = "#fff";
    on.fillRect(0, 0, width, height);
    on.imageSmoothingQuality = "high";
    on.drawImage(image, 0, 0, width, height);
    plains.set(image, plain);
  }
  context.drawImage(plain, 0, 0);
}

// The pixels of a canvas of width x height that the box covers, and where the box lies in them; null if in none.
export function areaOf(box, image, width, height) {
  const [left, top, right, bottom] = box.map((edge, i) => (edge * (i % 2 ? height : width)) / (i % 2 ? image.height : image.width));
  const [x, y] = [Math.max(0, Math.round(left)), Math.max(0, Math.round(top))];
  const area = { x, y, width: Math.min(width, Math.round(right)) - x, height: Math.min(height, Math.round(bottom)) - y, left, top, right, bottom };
  return area.width > 0 && area.height > 0 ? area : null;
}

// Values of a map's pixels at the pixels of an area, between the map's pixels in proportion.
export function spread(values, { width, height }, area) {
  const out = new Float32Array(area.width * area.height);
  const columns = places(area.x, area.width, area.left, area.right, width);
  const rows = places(area.y, area.height, area.top, area.bottom, height);
  for (let j = 0; j < area.height; j++) {
    const [above, below] = [rows.at[j] * width, Math.min(rows.at[j] + 1, height - 1) * width];
    const down = rows.part[j];
    for (let i = 0; i < area.width; i++) {
      const at = columns.at[i];
      const next = at + 1 < width ? at + 1 : at;
      const right = columns.part[i];
      const upper = values[above + at] + (values[above + next] - values[above + at]) * right;
      const lower = values[below + at] + (values[below + next] - values[below + at]) * right;
      out[j * area.width + i] = upper + (lower - upper) * down;
    }
  }
  return out;
}

function places(first, count, start, end, size) {
  const at = new Int32Array(count);
  const part = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const place = Math.min(size - 1, Math.max(0, ((first + i + 0.5 - start) / (end - start)) * size - 0.5));
    at[i] = Math.floor(place);
    part[i] = place - at[i];
  }
  return { at, part };
}

// The strength of a map is worked out once for each pair of percentiles: opacity and colours need no other.
const strengths = new WeakMap();
function strengthOf(map, drawing) {
  const key = `${drawing.clip_lower} ${drawing.clip_upper}`;
  let kept = strengths.get(map);
  if (kept?.key !== key) strengths.set(map, (kept = { key, values: strength(map, drawing) }));
  return kept.values;
}

// PIL's grey of the RGBA at `p`, of integers (ITU-R 601-2).
export const greyOf = (data, p) => (data[p] * 19595 + data[p + 1] * 38470 + data[p + 2] * 7471 + 32768) >> 16;

// Draws `value`, a strength a pixel, into `data`, the image's RGBA: render.overlay's formulas, by a table of 1024 weights.
const LEVELS = 1023;
function blend(data, value, drawing, palette) {
  const { overlay, opacity } = drawing;
  const weight = Float32Array.from({ length: LEVELS + 1 }, (_, i) => (i / LEVELS) ** (overlay === "mask_black" ? 0.5 : 0.7));
  for (let i = 0, p = 0; i < value.length; i++, p += 4) {
    const strong = weight[Math.round(LEVELS * value[i])];
    const colour = 3 * Math.round(255 * value[i]);
    const grey = overlay === "grayscale" ? greyOf(data, p) : 0;
    for (let c = 0; c < 3; c++) {
      const own = data[p + c];
      let drawn;
      if (overlay === "mask_black") drawn = own * strong;
      else if (overlay === "none") drawn = palette[colour + c];
      else {
        const base = DIMMED * (overlay === "grayscale" ? grey : own);
        drawn = base + (palette[colour + c] - base) * strong;
      }
      data[p + c] = own + (drawn - own) * opacity; // rounded by the array itself
    }
  }
}
