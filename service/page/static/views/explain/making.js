// How the map is made: method, rule, gamma and the rule's other options; and the quantile, with its sweep.

import { check, choice, explained, slider } from "../../components.js";
import { h, replace } from "../../dom.js";
import { METHOD_OF, OF_RULE, ruled, WITHOUT_RULE } from "./asking.js";

export const METHODS = {
  gradient: "Gradient",
  input_x_gradient: "Input × gradient",
  integrated_gradients: "Integrated gradients",
  smoothgrad: "SmoothGrad",
  guided_backprop: "Guided backpropagation",
  grad_cam: "Grad-CAM",
};
const SELECTIONS = { class: "by class, from the table", instance: "by this picture" };
const CONSERVE = { independent: "independent", exact: "exact", none: "none" };
const WITH_CONTROL = ["method", "rule", "quantile", "gamma", "selection", "conserve", "steps", "samples"];

// The gamma slider: 0, then 10^-2 to 10^6 in equal ratios, then infinite.
const LAST = 100;
const gammaAt = (place) => (place <= 0 ? 0 : place >= LAST ? "inf" : Number((10 ** (-2 + (8 * (place - 1)) / (LAST - 2))).toPrecision(3)));
const placeOf = (gamma) => {
  if (gamma === "inf") return LAST;
  const value = Number(gamma);
  return value <= 0 ? 0 : Math.max(1, Math.min(LAST - 1, Math.round(1 + ((Math.log10(value) + 2) * (LAST - 2)) / 8)));
};
const gammaText = (gamma) => (gamma === "inf" ? "infinite" : String(gamma));

// What the service lets one choose here: an exported graph knows less than a network.
const allowed = (names, bound) => Object.entries(names).filter(([name]) => !bound || bound.split(/[^\w]+/).includes(name));

// `change(patch)`: of the options; null takes one back to the table's default.
export function createMaking({ info, change }) {
  const method = choice({ label: "Method", term: "method", options: allowed(METHODS, info.bounds.method), onChange: (value) => change({ method: value }) });
  const rule = check({ label: "ParchGrad's rule", onChange: (on) => change({ rule: on ? null : false }) });
  const gamma = slider({
    label: "Gamma", term: "gamma", min: 0, max: LAST, step: 1, value: LAST,
    format: (place) => gammaText(gammaAt(place)), onInput: (place) => change({ gamma: gammaAt(place) }),
  });
  const selection = choice({ label: "Channels", term: "selection", options: allowed(SELECTIONS, info.bounds.selection), onChange: (value) => change({ selection: value }) });
  const conserve = choice({ label: "Conserve", term: "conserve", options: allowed(CONSERVE, info.bounds.conserve), onChange: (value) => change({ conserve: value }) });
  const counts = Object.fromEntries(
    [["steps", "Points"], ["samples", "Copies"]].map(([name, label]) => [
      name,
      slider({ label, term: name, min: 1, max: 100, step: 1, value: info.options[name] ?? 25, onInput: (value) => change({ [name]: value }) }),
    ]),
  );
  const others = h("p", { class: "muted" });
  const reset = h("button", { type: "button", class: "ghost", on: { click: () => change(null) } }, "Table's defaults");
  const ofRule = h("div", { class: "stack of-rule" }, gamma.node, selection.node, conserve.node);
  const node = h(
    "section",
    { class: "panel making", "aria-label": "How the map is made" },
    h("h2", {}, "How the map is made"),
    h("div", { class: "stack" }, method.node, counts.steps.node, counts.samples.node, h("div", { class: "row" }, rule.node, explained("rule")), ofRule, others, h("div", { class: "row" }, reset)),
  );
  return {
    node,
    update({ options }) {
      const now = { ...info.options, ...options };
      method.select.value = now.method;
      rule.input.checked = ruled(now);
      rule.input.disabled = WITHOUT_RULE.includes(now.method);
      ofRule.hidden = !ruled(now);
      gamma.set(placeOf(now.gamma));
      gamma.input.setAttribute("aria-valuetext", gammaText(now.gamma));
      gamma.node.querySelector("output").textContent = gammaText(now.gamma);
      selection.select.value = now.selection;
      conserve.select.value = now.conserve;
      for (const [name, one] of Object.entries(counts)) {
        one.node.hidden = METHOD_OF[name] !== now.method;
        one.set(now[name]);
      }
      const more = Object.entries(options).filter(([name, value]) => !WITH_CONTROL.includes(name) && (ruled(now) || !OF_RULE.includes(name)) && (METHOD_OF[name] ?? now.method) === now.method);
      replace(others, more.map(([name, value]) => `${name} = ${value}`).join(", "));
      others.hidden = !more.length;
      reset.disabled = !Object.keys(options).length;
    },
  };
}

// The quantile, below the picture: {node, update(state), stop(), end()}. `frame(quantile,
// signal)` resolves once that frame is drawn.
const SWEEP = [0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.26, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1];
const FRAME = 140; // ms of a frame; the first time the service's answer may take longer

export function createQuantile({ info, change, frame }) {
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const control = slider({
    label: "Channels kept", term: "quantile", min: 0.01, max: 1, step: 0.01, value: 0.1,
    format: (value) => `${Number((100 * value).toFixed(1))} %`,
    onInput: (value) => {
      stop();
      change({ quantile: value, alpha: null });
    },
  });
  control.input.dataset.option = "quantile";
  const play = h("button", { type: "button", class: "play", on: { click: () => (playing ? pause() : start()) } });
  const why = h("p", { class: "muted why-not", hidden: true });
  const node = h("div", { class: "quantile" }, play, control.node, why);
  let playing = false;
  let at = 0;
  let ends = null; // of the sweep that plays

  function show() {
    play.textContent = playing ? "❚❚" : "▶";
    play.setAttribute("aria-label", playing ? "Pause" : still.matches ? "Next quantile" : "Play through all quantiles");
    play.title = play.getAttribute("aria-label");
  }
  // Without motion a press shows the next frame and no more.
  async function start() {
    const current = Number(control.input.value);
    at = SWEEP.findIndex((one) => one > current + 1e-9);
    if (at < 0) at = 0;
    if (still.matches) return settle(SWEEP[at]);
    playing = true;
    show();
    const { signal } = (ends = new AbortController());
    while (!signal.aborted) {
      const began = performance.now();
      const drawn = await frame(SWEEP[at], signal);
      if (!drawn || signal.aborted) break;
      control.set(SWEEP[at]);
      await new Promise((done) => setTimeout(done, Math.max(0, FRAME - (performance.now() - began))));
      at = (at + 1) % SWEEP.length;
    }
    if (!signal.aborted) stop();
  }
  function settle(quantile) {
    control.set(quantile);
    change({ quantile, alpha: null });
  }
  function pause() {
    stop();
    settle(Number(control.input.value));
  }
  function stop() {
    ends?.abort();
    playing = false;
    show();
  }
  still.addEventListener("change", stop);
  show();
  return {
    node,
    stop,
    end: () => {
      still.removeEventListener("change", stop);
      stop();
    },
    update({ options }) {
      const now = { ...info.options, ...options };
      const off = !ruled(now);
      if (off && playing) stop();
      control.input.disabled = play.disabled = off;
      node.classList.toggle("off", off);
      const byLayer = typeof now.quantile === "object" && options.quantile === undefined;
      why.hidden = !(off || byLayer || options.alpha !== undefined);
      why.textContent = off
        ? "The plain method keeps every channel; switch ParchGrad's rule on to choose."
        : byLayer
          ? "The table's default differs by layer."
          : `Chosen by p-value, at most ${options.alpha}.`;
      if (!playing && typeof now.quantile !== "object") control.set(now.quantile);
    },
  };
}
