// Questions to /explain and the answers that are kept: a view that was seen before needs no second answer.

import { decodeMap } from "../../map.js";

// Options that take part in a map only under the rule, or only under one method: elsewhere the service refuses them.
export const OF_RULE = ["quantile", "alpha", "gamma", "selection", "conserve", "layers", "normality_filter"];
export const METHOD_OF = {
  steps: "integrated_gradients",
  samples: "smoothgrad",
  noise: "smoothgrad",
  noise_seed: "smoothgrad",
};
export const WITHOUT_RULE = ["grad_cam"];
const DRAWN = ["colormap", "overlay", "clip_lower", "clip_upper", "outline", "opacity"];
const SHOWN = 5; // predictions of an answer
const MOST_VALUES = 12e6; // of the maps kept, 48 MB: 730 of the bundled model's, 240 of 224 x 224

export const ruled = ({ rule, method }) => rule !== false && !WITHOUT_RULE.includes(method);

// The options that have an effect together; the others stay in the state for when they have one again.
export function effective(options) {
  const { method = "gradient" } = options;
  const acts = ruled(options);
  const out = {};
  for (const [name, value] of Object.entries(options)) {
    if (name === "rule" && WITHOUT_RULE.includes(method)) continue;
    if (!acts && OF_RULE.includes(name)) continue;
    if (METHOD_OF[name] && METHOD_OF[name] !== method) continue;
    if (name === "quantile" && options.alpha !== undefined) continue;
    out[name] = value;
  }
  return out;
}

// Fields of the map that the state shows, with another target or other options where given.
export function fieldsOf(state, { target = state.target, options = state.options } = {}) {
  return {
    model: state.model,
    version: state.version ?? state.info.version,
    target: String(target),
    ...effective(options),
    polarity: state.drawing.polarity,
  };
}

// The class that a record's map is of, or would be; undefined where the answer does not name it.
export const targetOf = ({ explanation, fields }, predictions) =>
  explanation?.target ?? (fields.target === "predicted" ? predictions[0] : predictions.find((one) => String(one.index) === fields.target));

// {explain(image, fields, signal), kept(image, fields), picture(image, fields, drawing, signal), predictions(image, fields, count)}
// `labels`: a function that gives the number of classes of the model.
export function createAsker(api, labels) {
  const kept = new Map(); // oldest first
  const pictures = new Map();
  let values = 0;
  const keyOf = (image, fields) => `${image.id} ${JSON.stringify(fields)}`;

  function keep(key, record) {
    kept.set(key, record);
    values += record.map.values.length;
    for (const [old, one] of kept) {
      if (values <= MOST_VALUES) break;
      kept.delete(old);
      values -= one.map.values.length;
    }
  }

  return {
    kept: (image, fields) => kept.get(keyOf(image, fields)) ?? null,

    // {answer, result, explanation, map, ms, fields, image}; `map` is null where the explanation's status is not ok. Of
    // the image what names it: its pixels would be kept as long as the map.
    async explain(image, fields, signal) {
      const key = keyOf(image, fields);
      if (kept.has(key)) return kept.get(key);
      const start = performance.now();
      const answer = await api.post("explain", image.file, { ...fields, saliency: "float16", top_k: Math.min(SHOWN, labels()) }, { signal });
      const ms = performance.now() - start;
      const [result] = answer.results;
      const { explanation } = result;
      const map = explanation?.status === "ok" ? decodeMap(explanation.saliency) : null;
      const { id, file, name } = image;
      const record = { answer, result, explanation, map, ms, fields, image: { id, file, name } };
      if (map) keep(key, record);
      return record;
    },

    // The service's own drawing of what the model saw, as an ImageBitmap; `drawing`: its options.
    async picture(image, fields, drawing, signal) {
      const all = { ...fields, ...drawing };
      const key = keyOf(image, all);
      if (!pictures.has(key)) {
        const bitmap = await createImageBitmap(await api.post("explain", image.file, all, { accept: "image/png", signal }));
        pictures.set(key, bitmap);
        if (pictures.size > 40) pictures.delete(pictures.keys().next().value);
      }
      return pictures.get(key);
    },

    async predictions(image, { model, version }, count, signal) {
      const answer = await api.post("predict", image.file, { model, version, top_k: count }, { signal });
      return answer.results[0].predictions;
    },
  };
}

export const drawnOf = (drawing) => Object.fromEntries(DRAWN.map((name) => [name, drawing[name]]));

// Of many questions one is under way and one waits, the newest. A younger one does not end the one under way unless
// that takes long, or `hurry`: a slider that moves faster than the service answers would otherwise never show anything.
export function newestWins(patience = 250) {
  let running = null;
  let waiting = null;
  let timer = 0;

  function start(job) {
    const own = { ends: new AbortController(), since: performance.now() };
    running?.ends.abort();
    running = own;
    waiting = null;
    clearTimeout(timer);
    job(own.ends.signal).finally(() => {
      if (running !== own) return;
      running = null;
      if (waiting) start(waiting);
    });
  }

  return {
    run(job, hurry = false) {
      const left = running ? patience - (performance.now() - running.since) : 0;
      if (!running || hurry || left <= 0) return start(job);
      waiting = job;
      clearTimeout(timer);
      timer = setTimeout(() => waiting && start(waiting), left);
    },
    stop() {
      clearTimeout(timer);
      waiting = null;
      running?.ends.abort();
      running = null;
    },
  };
}
