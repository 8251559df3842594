// The page's beginning: state, address, navigation, and the view that is shown.

import * as address from "./address.js";
import { createApi, path } from "./api.js";
import { choice, problemBox } from "./components.js";
import { announce, h, replace } from "./dom.js";
import { decodePalettes } from "./map.js";
import { listen } from "./picker.js";
import { createStore, DRAWING } from "./store.js";
import { view as explain } from "./views/explain.js";
import { view as classes } from "./views/class.js";
import { view as layers } from "./views/layers.js";
import { view as attack } from "./views/attack.js";
import { view as traffic } from "./views/traffic.js";

const VIEWS = [explain, classes, layers, attack, traffic];
const KEY = "parchgrad key"; // of sessionStorage: it ends with the tab
const THEME = "parchgrad theme";

const store = createStore({
  view: "explain",
  model: null,
  version: null,
  info: null, // GET /models/{name}
  models: [], // GET /models
  problem: null, // why there is no model
  image: null,
  images: [],
  target: "predicted",
  options: {},
  drawing: { ...DRAWING },
  key: sessionStorage.getItem(KEY),
  state: null, // GET page/state.json
  palettes: null,
  ...given(),
});
const api = createApi(() => store.get().key);
const app = { store, api };

// --- what stands above every view -------------------------------------------------------------------------

// Made once and changed in place: what has the focus keeps it.
const links = VIEWS.map((one) => h("a", {}, one.title));
document.getElementById("views").append(...links);
let models = null; // the choice of a model, where there are several
let offered = ""; // what the settings were made of

function drawNavigation() {
  const state = store.get();
  VIEWS.forEach((one, i) => {
    links[i].href = address.write({ ...state, view: one.id });
    if (one.id === state.view) links[i].setAttribute("aria-current", "page");
    else links[i].removeAttribute("aria-current");
  });
}

function drawSettings() {
  const state = store.get();
  const names = [...new Set(state.models.map((one) => one.name))];
  const offer = JSON.stringify([names, Boolean(state.state?.keys), Boolean(state.key)]);
  if (offer !== offered) {
    offered = offer;
    models = names.length > 1 && choice({ label: "Model", options: names.map((name) => [name, name]), value: state.model, onChange: takeModel });
    replace(
      document.getElementById("settings"),
      models && models.node,
      names.length === 1 && h("span", { class: "muted model" }, names[0]),
      state.state?.keys && h("button", { type: "button", class: "ghost", on: { click: askForKey } }, state.key ? "Change key" : "Enter key"),
      h("button", { type: "button", class: "ghost theme", "aria-label": "Light or dark", on: { click: otherTheme } }, "◐"),
    );
  }
  if (models) models.select.value = state.model;
}

// What is of the model before means nothing to another.
const OF_MODEL = { version: null, info: null, target: "predicted", rival: null, class: null, against: null, options: {} };
const takeModel = (name) => store.set({ ...OF_MODEL, model: name });

function askForKey() {
  const input = h("input", { type: "password", autocomplete: "off", "aria-label": "Key", size: 40 });
  const dialog = h(
    "dialog",
    { "aria-label": "Key" },
    h("h2", {}, "Key"),
    h("p", { class: "muted" }, "The token you were given. It stays in this tab, and goes with every request to this service."),
    input,
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "primary", on: { click: () => { keep(input.value.trim()); dialog.close(); } } }, "Use it"),
      h("button", { type: "button", class: "ghost", on: { click: () => dialog.close() } }, "Cancel"),
    ),
  );
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // the focus goes back to the button that opened this, which it would press
    keep(input.value.trim());
    dialog.close();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function keep(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  store.set({ key: key || null });
  loadModels();
}

function otherTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme ?? "");
}

function drawFoot() {
  const { info, state } = store.get();
  replace(
    document.getElementById("foot"),
    state && h("span", {}, `parchgrad ${state.parchgrad}`),
    info && h("span", {}, `${info.name} ${info.version} · weights ${info.weights_sha256.slice(0, 12)} · table ${info.table_sha256.slice(0, 12)}`),
    h("a", { href: "docs.json" }, "API"),
    h("a", { href: "metrics" }, "Metrics"),
  );
}

// --- the view ---------------------------------------------------------------------------------------------

const main = document.getElementById("view");
let shown = null; // {id, handle}

function show() {
  const { view, info, problem, state } = store.get();
  const wanted = VIEWS.find((one) => one.id === view) ?? explain;
  const missing = !info;
  const id = missing ? "waiting" : wanted.id;
  if (shown?.id === id && !missing) return;
  shown?.handle?.unmount?.();
  main.replaceChildren();
  main.className = `view ${wanted.id}`;
  document.title = `${wanted.title} · ParchGrad`;
  if (shown) announce(wanted.title);
  shown = { id, handle: null };
  if (!missing) shown.handle = wanted.mount(main, app) ?? {};
  else if (problem) main.append(problemBox(problem, problem.code === "unauthorized" ? null : loadModels), others());
  else main.append(h("p", { class: "muted" }, state ? "Loading the model …" : "Starting …"));
}

// The models there are, where the one of the address is not among them.
function others() {
  const names = [...new Set(store.get().models.map((one) => one.name))];
  return h("p", {}, names.map((name) => h("a", { href: address.write({ ...store.get(), model: name, version: null }) }, `Use ${name} instead`)));
}

// --- what the service has ---------------------------------------------------------------------------------

async function loadModels() {
  try {
    const listed = api.get("models"); // beside what comes first: it needs none of it
    listed.catch(() => {}); // told below, where it is waited for
    if (!store.get().state) {
      const [state, palettes] = await Promise.all([api.get("page/state.json"), api.get("page/palettes.json")]);
      store.set({ state, palettes: decodePalettes(palettes) });
    }
    const listing = await listed;
    const { model } = store.get();
    const serving = listing.models.filter((one) => one.state === "READY");
    const known = serving.some((one) => one.name === model);
    const unknown = model && !known ? { message: `No model '${model}' serves here.`, code: "unknown_model" } : null;
    const chosen = known ? model : listing.default ?? serving[0]?.name ?? null;
    store.set({ models: serving, problem: unknown, model: unknown ? model : chosen });
    if (chosen && !unknown) await loadModel();
    else if (!chosen) store.set({ problem: { message: "No model serves yet.", code: "not_ready" } });
  } catch (error) {
    store.set({ problem: error, info: null }); // also where one was loaded: the key is another now
  }
}

async function loadModel() {
  const { model, version } = store.get();
  try {
    store.set({ info: await api.get(path(["models", model], version), { lane: "model" }), problem: null });
  } catch (error) {
    if (error.name !== "AbortError") store.set({ problem: error, info: null });
  }
}

// --- and what follows from a change -----------------------------------------------------------------------

const IN_ADDRESS = ["view", "model", "version", "target", "show", "rival", "class", "against", "options", "drawing"];
const WRITE_AFTER = 200; // ms: browsers bear a few writings of the address a second, and a slider moves more often
let writing = 0;

function writeAddress() {
  clearTimeout(writing);
  writing = 0;
  const next = address.write(store.get());
  if (next !== location.hash) history.replaceState(null, "", next);
  drawNavigation();
}

store.subscribe((state, changed) => {
  if (IN_ADDRESS.some((key) => changed.has(key))) {
    if (changed.has("view")) {
      clearTimeout(writing);
      writing = 0;
      const next = address.write(state);
      if (next !== location.hash) history.pushState(null, "", next);
      drawNavigation();
    } else writing ||= setTimeout(writeAddress, WRITE_AFTER);
  }
  if (["models", "model", "state", "key"].some((key) => changed.has(key))) drawSettings();
  if ((changed.has("model") || changed.has("version")) && state.info && !changed.has("info")) store.set({ info: null });
  if (["info", "state"].some((key) => changed.has(key))) drawFoot();
  const before = shown;
  if (["view", "info", "problem", "state"].some((key) => changed.has(key))) show();
  if (shown === before) shown?.handle?.update?.(store.get(), changed); // what has just been mounted knows it all
  if ((changed.has("model") || changed.has("version")) && !changed.has("models") && state.models.length) loadModel();
});

// What the address says, of a view that there is.
function given() {
  const said = address.read(location.hash);
  return VIEWS.some((one) => one.id === said.view) ? said : { ...said, view: explain.id };
}

function follow() {
  clearTimeout(writing);
  writing = 0;
  const said = given();
  const { model, version, ...now } = store.get();
  // What says the same is the same: nobody asks anew for it.
  for (const key of ["options", "drawing"]) if (JSON.stringify(said[key]) === JSON.stringify(now[key])) said[key] = now[key];
  store.set({ ...said, model: said.model ?? model, version: said.version ?? (said.model ? null : version) });
}

// Not by its address, which names views.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", follow); // Back and Forward as well: addresses differ behind their #
setTheme(localStorage.getItem(THEME));
listen(app);
drawNavigation();
drawSettings();
drawFoot();
loadModels();
