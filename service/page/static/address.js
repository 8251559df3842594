// The address of a view: which view, model, target, options and drawing; never the image, never the key.

import { DRAWING } from "./store.js";

const NUMBERS = new Set(["clip_lower", "clip_upper", "opacity", "quantile", "alpha", "steps", "samples", "noise"]);
const SHOWS = ["map", "methods", "classes", "images"];
const CHOICES = { overlay: ["none", "original", "grayscale", "mask_black"], polarity: ["both", "positive", "negative"] };
export const OPTIONS = [
  "method", "rule", "quantile", "alpha", "gamma", "selection", "conserve", "layers", "seed", "normality_filter",
  "steps", "samples", "noise", "noise_seed",
];

// "#/layers?model=scenes&quantile=0.2" -> a patch of the state; what is not known in it is left out.
export function read(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const given = new URLSearchParams(query);
  const patch = { view: path || "explain", options: {}, drawing: { ...DRAWING }, target: given.get("target") ?? "predicted" };
  patch.model = given.get("model");
  patch.version = given.get("version");
  patch.show = SHOWS.includes(given.get("show")) ? given.get("show") : "map"; // what the Explain view shows
  patch.rival = given.get("rival"); // the class beside the target, an index
  // Of the Class view: the class, and the one it is compared with; indices.
  for (const name of ["class", "against"]) patch[name] = /^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null;
  for (const name of OPTIONS) if (given.has(name)) patch.options[name] = value(name, given.get(name));
  for (const name of Object.keys(DRAWING)) {
    const one = given.has(name) ? value(name, given.get(name)) : DRAWING[name];
    if (drawable(name, one)) patch.drawing[name] = one;
  }
  return patch;
}

// Of the drawing nothing goes to the service that could say what is wrong: what makes no sense is left at its default.
function drawable(name, one) {
  if (CHOICES[name]) return CHOICES[name].includes(one);
  return typeof one === typeof DRAWING[name] && (typeof one !== "number" || (one >= 0 && one <= (name === "opacity" ? 1 : 100)));
}

function value(name, text) {
  if (text === "true" || text === "false") return text === "true";
  if (!NUMBERS.has(name)) return text;
  const number = Number(text);
  return Number.isFinite(number) ? number : text; // the service says what is wrong with it
}

export function write(state) {
  const query = new URLSearchParams();
  if (state.model) query.set("model", state.model);
  if (state.version) query.set("version", state.version);
  if (state.target !== "predicted") query.set("target", state.target);
  if (state.show && state.show !== "map") query.set("show", state.show);
  if (state.rival !== null && state.rival !== undefined) query.set("rival", state.rival);
  for (const name of ["class", "against"]) if (state[name] !== null && state[name] !== undefined) query.set(name, state[name]);
  for (const [name, one] of Object.entries(state.options)) if (one !== undefined && one !== null) query.set(name, one);
  for (const [name, one] of Object.entries(state.drawing)) if (one !== DRAWING[name]) query.set(name, one);
  const text = query.toString();
  return `#/${state.view}${text ? `?${text}` : ""}`;
}
