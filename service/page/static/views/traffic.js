// The Traffic view: activations of recent images beside the table's own, by layer and class, and figures of recent maps.
// Asks GET /traffic again and again while the page is seen; nothing of an image is in its answer.

import { isAbort } from "../api.js";
import { busy, emptyState, explained, problemBox, tabs } from "../components.js";
import { announce, h, replace } from "../dom.js";
import { define } from "../words.js";
import { clock, densityPlot, images, pastPlot, stripPlot, three } from "./traffic/plots.js";

define({
  activation: "How strongly a channel answers, averaged over the picture, in standard deviations from its mean over the images the table was built with: 0 is that mean.",
  divergence: "Jensen-Shannon divergence in bits between the activations of recent images and the reference: 0 where they are spread alike, 1 where they have nothing in common.",
  corrected: "Jensen-Shannon divergence in bits between the activations of recent images and the reference, less what so many images make of it by chance on average: 0 where they are spread alike, 1 where they have nothing in common.",
  chance: "So few images never look exactly like the reference. Of images that are of its kind, at most one layer in a hundred lies above this bound.",
  border_share: "The share of the map that lies within a tenth of each side from its ends. A flat map has 0.36; a watermark or a frame raises it.",
  centroid_x: "Where the map's weight lies across the picture: 0 at the left, 1 at the right.",
  centroid_y: "Where the map's weight lies down the picture: 0 at the top, 1 at the bottom.",
  identity_share: "The share of layers in which the rule changed nothing. More than usual means that the table or the options have stopped to act.",
  gradient_agreement: "Rank correlation of the map with the plain gradient's of the same image: 1 the same order of pixels, 0 none in common. Of images looked at only.",
  concentration: "The Gini coefficient of the map: 0 where every pixel counts the same, near 1 where a few pixels hold everything.",
});

const FIGURES = {
  gini: ["Concentration", "concentration"],
  border_share: ["Border share", "border_share"],
  centroid_x: ["Centre across", "centroid_x"],
  centroid_y: ["Centre down", "centroid_y"],
  identity_share: ["Unchanged layers", "identity_share"],
  gradient_agreement: ["Gradient agreement", "gradient_agreement"],
};
const SPANS = [["hour", "Last hour"], ["day", "Last day"]];
const EVERY = 5000; // ms between two askings
const STRONGEST = 0.25; // bits drawn in the full colour, or the most there are
const two = (value) => value.toFixed(2).replace(/^0\./, ".").replace(/^1\.00$/, "1");
const corrected = (one, i) => (one.divergence[i] === null ? null : Math.max(0, one.divergence[i] - one.expected[i]));

export const view = {
  id: "traffic",
  title: "Traffic",
  mount(root, app) {
    const own = { span: "hour", index: null, layer: null, paused: false, answer: null, timer: 0, open: false, parts: {} };
    const stop = new AbortController();

    // --- what stands still ----------------------------------------------------------------------------------
    const status = h("p", { class: "muted status" });
    const pause = h("button", { type: "button", class: "ghost", on: { click: () => setPaused(!own.paused) } }, "Pause");
    const trouble = h("div");
    const notes = h("div", { class: "stack" });
    const body = h("div", { class: "stack" }, h("p", { class: "muted" }, "Reading what was seen …"));
    root.append(
      h(
        "header",
        { class: "row head" },
        h("h1", {}, "Traffic"),
        tabs(SPANS, own.span, (span) => { own.span = span; ask(); }),
        pause,
        status,
      ),
      trouble,
      notes,
      body,
    );
    const resized = new ResizeObserver(() => own.answer && drawPlots());

    // --- asking ---------------------------------------------------------------------------------------------
    async function ask() {
      clearTimeout(own.timer);
      const { model, version, info } = app.store.get();
      const query = new URLSearchParams({ model, version: version ?? info.version, span: own.span });
      if (own.index !== null) query.set("class", own.index);
      try {
        const answer = await app.api.get(`traffic?${query}`, { lane: "traffic", signal: stop.signal });
        trouble.replaceChildren();
        own.failed = null;
        show(answer);
        again();
      } catch (error) {
        if (isAbort(error)) return;
        fail(error);
        again(1000 * error.retryAfter);
      }
      busy(body, false);
      if (own.parts.chosen) busy(own.parts.chosen, false);
    }

    function again(wait = 0) {
      clearTimeout(own.timer);
      const goes = !own.paused && document.visibilityState === "visible" && !stop.signal.aborted;
      if (goes) own.timer = setTimeout(ask, Math.max(EVERY, wait));
    }

    // Said once, however often it fails: its button may be about to be pressed.
    function fail(error) {
      if (!own.answer) body.replaceChildren();
      const said = `${error.message} ${error.retryAfter}`;
      if (own.failed === said) return;
      own.failed = said;
      replace(trouble, problemBox(error, () => { busy(body, true); ask(); }));
    }

    function setPaused(paused) {
      own.paused = paused;
      pause.textContent = paused ? "Go on" : "Pause";
      pause.setAttribute("aria-pressed", String(paused));
      if (own.answer) drawStatus();
      if (paused) clearTimeout(own.timer);
      else ask();
    }

    function pick(index, layer) {
      const other = index !== own.index;
      own.index = index;
      own.layer = layer ?? own.layer;
      drawHeat();
      if (other) {
        busy(own.parts.chosen, true);
        ask();
      } else drawPlots();
      const seen = own.answer.classes.find((one) => (one.index ?? null) === index);
      announce(described(seen, own.answer.layers.indexOf(own.layer)));
    }

    // --- showing --------------------------------------------------------------------------------------------
    function show(answer) {
      own.answer = answer;
      if (!answer.layers.includes(own.layer)) own.layer = strongest(answer) ?? answer.layers.at(-1);
      drawStatus();
      drawNotes();
      const seen = answer.images > 0;
      const mapped = answer.figures.some((one) => one.maps > 0);
      const kind = seen ? "all" : mapped ? "maps" : "none";
      if (own.kind !== kind) {
        own.kind = kind;
        build(kind);
      }
      if (seen) drawHeat();
      drawPlots();
    }

    function build(kind) {
      resized.disconnect();
      own.parts = { figures: h("div", { class: "strips" }) };
      own.strips = new Map();
      const figures = h(
        "section",
        { class: "panel" },
        h("h2", {}, "Maps under the table's own options"),
        h("p", { class: "muted" }, "The median of each piece of time, and the middle half as a band."),
        own.parts.figures,
      );
      if (kind === "none") {
        replace(body, emptyState("Nothing seen yet", ...howToBegin()));
        return;
      }
      if (kind === "maps") {
        replace(body, h("section", { class: "panel" }, emptyState("No image looked at yet", ...howToBegin())), figures);
      } else {
        own.parts.heat = h("div", { class: "heat", tabindex: "-1" });
        own.parts.title = h("h2");
        own.parts.verdict = h("p");
        own.parts.density = h("div", { class: "plot" });
        own.parts.past = h("div", { class: "plot" });
        own.parts.small = h("div", { class: "small", role: "group", "aria-label": "Layers of this class" });
        own.parts.numbers = h("div", { class: "numbers" });
        own.parts.few = h("span");
        own.parts.others = h("p", { class: "muted" });
        const table = h("details", { on: { toggle: (event) => { own.open = event.target.open; drawNumbers(); } } }, h("summary", {}, "As a table"), own.parts.numbers);
        own.parts.chosen = h(
          "section",
          { class: "panel chosen", "aria-label": "The chosen layer and class" },
          own.parts.title,
          own.parts.verdict,
          h("h3", {}, "Activations ", explained("activation")),
          own.parts.density,
          h("h3", {}, "Divergence over time ", explained("divergence", "divergence")),
          own.parts.past,
          table,
        );
        replace(
          body,
          h(
            "div",
            { class: "columns" },
            h(
              "section",
              { class: "panel", "aria-label": "Divergence by layer and class" },
              h("h2", {}, "Divergence less chance, bits ", explained("corrected", "divergence less chance")),
              own.parts.heat,
              h("p", { class: "muted legend" }, h("span", { class: "key beyond" }, "▲"), "beyond chance ", explained("chance"), own.parts.few),
              own.parts.others,
            ),
            own.parts.chosen,
          ),
          h("section", { class: "panel" }, h("h2", {}, "All layers ", explained("activation")), own.parts.small),
          figures,
        );
      }
      resized.observe(body);
    }

    function howToBegin() {
      const { watch_rate: rate, note, no_activations: none } = own.answer;
      if (none) return [h("p", {}, none)];
      if (note) return [h("p", {}, note)];
      const share = rate === 1 ? "every image" : `one image in ${Math.round(1 / rate)}`;
      return [
        h("p", {}, `Of all that are sent to this service, ${share} is looked at once it is answered (PARCHGRAD_WATCH_RATE is ${rate}), where no other waits.`),
        h("p", {}, h("a", { href: "#/explain" }, "Explain an image"), " and come back; this page asks again by itself."),
      ];
    }

    function drawStatus() {
      const { answer } = own;
      const at = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
      const workers = answer.workers > 1 ? `${answer.workers} workers` : "one worker";
      const state = own.paused ? "paused" : `as of ${at}`;
      status.textContent = `${images(answer.images)} looked at by ${workers}, no image kept · ${state}`;
    }

    function drawNotes() {
      const { answer } = own;
      const normal = answer.images > 0 && answer.chosen.reference !== "table's images";
      const said = JSON.stringify([answer.images > 0 && answer.note, answer.no_activations, answer.reference_note, normal]);
      if (own.noted === said) return; // its command may be marked, to be copied
      own.noted = said;
      const command = `parchgrad class-graph build ${answer.name} --data IMAGES`;
      replace(
        notes,
        answer.note && answer.images > 0 && h("p", { class: "note" }, answer.note),
        answer.no_activations && h("p", { class: "note" }, answer.no_activations),
        answer.reference_note && h("p", { class: "note" }, answer.reference_note),
        normal &&
          h(
            "p",
            { class: "note" },
            h("strong", {}, "Compared with a normal distribution, as the table's mean and deviation are all that is known. "),
            "The channels of a class are those that are high for it, so that good images diverge from it too: watch how the numbers change, not how large they are. For the table's own images as the reference: ",
            h("code", {}, command),
          ),
      );
    }

    // --- layers x classes -----------------------------------------------------------------------------------
    function drawHeat() {
      const { answer } = own;
      const { classes, layers } = answer;
      const key = JSON.stringify([layers, classes.map((one) => one.label)]);
      if (own.heatOf !== key || !own.parts.heat.firstChild) {
        own.heatOf = key;
        const focused = document.activeElement?.dataset?.cell;
        own.cells = new Map();
        const head = h("tr", {}, h("th", { scope: "col" }, h("span", { class: "unseen" }, "Layer")), classes.map((one) => h("th", { scope: "col", class: "class" }, h("span", {}, one.label))));
        const rows = layers.map((layer, i) =>
          h("tr", {}, h("th", { scope: "row", title: layer }, layer), classes.map((one, k) => h("td", {}, cell(one, k, layer, i)))),
        );
        replace(own.parts.heat, h("table", { "aria-label": "Divergence by layer and class; arrow keys move" }, h("thead", {}, head), h("tbody", {}, rows)));
        own.cells.get(focused)?.focus();
      }
      const most = Math.max(STRONGEST, ...classes.flatMap((one) => layers.map((_, i) => corrected(one, i) ?? 0)));
      classes.forEach((one, k) => layers.forEach((layer, i) => paint(own.cells.get(`${i},${k}`), one, i, most)));
      const few = classes.slice(1).filter((one) => one.images < answer.fewest_images).length;
      own.parts.few.textContent = `· – fewer than ${answer.fewest_images} images${few ? ` (${few} ${few === 1 ? "class" : "classes"} so far)` : ""}`;
      own.parts.others.hidden = !answer.images_of_others;
      own.parts.others.textContent = `${images(answer.images_of_others)} of classes not kept apart count in “all classes” only (PARCHGRAD_WATCH_CLASSES).`;
    }

    function cell(one, k, layer, i) {
      const button = h("button", { type: "button", class: "cell", tabindex: "-1", "data-cell": `${i},${k}`, on: { click: () => pick(own.answer.classes[k].index ?? null, layer), keydown: (event) => move(event, i, k) } });
      own.cells.set(`${i},${k}`, button);
      return button;
    }

    function paint(button, one, i, most) {
      const value = corrected(one, i);
      const chosen = (one.index ?? null) === own.index && own.answer.layers[i] === own.layer;
      const marked = beyond(one, i);
      button.textContent = value === null ? "–" : two(value);
      button.classList.toggle("beyond", marked);
      button.classList.toggle("none", value === null);
      button.style.background = value === null ? "" : `color-mix(in srgb, var(--accent) ${Math.round(45 * Math.min(1, value / most))}%, var(--paper-2))`;
      button.setAttribute("aria-label", described(one, i));
      button.setAttribute("aria-pressed", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    }

    function move(event, i, k) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      own.cells.get(`${i + step[0]},${k + step[1]}`)?.focus();
    }

    // With a normal as the reference every class of high channels diverges: nothing is marked.
    const beyond = (one, i) => one.reference === "table's images" && one.divergence[i] !== null && one.divergence[i] > one.bound[i];

    function described(one, i) {
      if (!one || i < 0) return "";
      const where = `${own.answer.layers[i]}, ${one.label}`;
      if (one.divergence[i] === null) return `${where}: ${images(one.images)}, too few to compare`;
      const verdict = one.reference !== "table's images" ? "" : beyond(one, i) ? ", beyond chance" : ", within chance";
      return `${where}: ${three(one.divergence[i])} bits${verdict}`;
    }

    const strongest = ({ layers, classes }) => {
      const values = layers.map((_, i) => corrected(classes[0], i) ?? -1);
      const at = values.indexOf(Math.max(...values));
      return values[at] >= 0 ? layers[at] : null;
    };

    // --- the chosen one -------------------------------------------------------------------------------------
    function drawPlots() {
      if (own.parts.figures.isConnected) drawFigures();
      if (own.kind !== "all") return;
      const { answer } = own;
      const i = answer.layers.indexOf(own.layer);
      const { chosen } = answer;
      replace(own.parts.title, h("span", { class: "number" }, own.layer), ` · ${chosen.label}`);
      replace(own.parts.verdict, ...verdict(chosen, i));
      replace(own.parts.density, densityPlot(answer, i, own.parts.density.clientWidth, 190, described(chosen, i)), keys(chosen));
      replace(own.parts.past, pastPlot(answer, i, own.parts.past.clientWidth, 130));
      drawSmall();
      drawNumbers();
    }

    function verdict(one, i) {
      const value = one.divergence[i];
      if (value === null) return [`${images(one.images)} so far; from ${own.answer.fewest_images} on they are compared.`];
      const said = h("strong", {}, `${three(value)} bits`);
      if (one.reference !== "table's images") return [said, ` over ${images(one.images)}, from a normal distribution.`];
      if (beyond(one, i)) return [h("strong", { class: "beyond" }, `▲ ${three(value)} bits`), ` over ${images(one.images)}: more than chance makes of them (up to ${three(one.bound[i])}). The images, or their light, size or place, are not those of the table.`];
      return [said, ` over ${images(one.images)}: within what chance makes of them (${three(one.expected[i])} on average, up to ${three(one.bound[i])}).`];
    }

    const keys = (one) =>
      h(
        "p",
        { class: "muted legend" },
        h("span", { class: "key live" }), "recent images ",
        h("span", { class: "key known" }), one.reference === "table's images" ? "the table's images" : "reference",
      );

    function drawSmall() {
      const { answer } = own;
      const focused = document.activeElement?.dataset?.layer;
      replace(
        own.parts.small,
        answer.layers.map((layer, i) => {
          const marked = beyond(answer.chosen, i);
          return h(
            "button",
            { type: "button", class: "one", "data-layer": layer, "aria-pressed": String(layer === own.layer), "aria-label": described(answer.chosen, i), on: { click: () => pick(own.index, layer) } },
            densityPlot(answer, i, 132, 52, null),
            marked && h("span", { class: "mark" }, "▲"),
            h("span", { class: "name" }, layer),
          );
        }),
      );
      if (focused !== undefined) [...own.parts.small.children].find((one) => one.dataset.layer === focused)?.focus({ preventScroll: true });
    }

    function drawNumbers() {
      if (!own.open || own.kind !== "all") return;
      const { answer } = own;
      const i = answer.layers.indexOf(own.layer);
      const { live, reference, values } = answer.distributions[i];
      const bins = live.map((count, bin) => [binName(answer.edges, bin), values ? count / values : 0, reference[bin]]);
      const past = answer.history.filter((one) => one.images);
      replace(
        own.parts.numbers,
        h("table", {}, h("caption", {}, "Activations"), row("th", "Deviations", "Recent", "Reference"), bins.filter(([, a, b]) => a > 0 || b >= 0.0005).map(([name, a, b]) => row("td", name, three(a), three(b)))),
        h("table", {}, h("caption", {}, "Over time"), row("th", "From", "Images", "Bits", "Chance up to"), past.map((one) => row("td", clock(one.start), one.images, one.divergence[i] === null ? "–" : three(one.divergence[i]), one.bound[i] === null ? "–" : three(one.bound[i])))),
      );
    }

    function drawFigures() {
      const { answer } = own;
      for (const figure of answer.figures) {
        const [name] = FIGURES[figure.name];
        if (!own.strips.has(figure.name)) own.strips.set(figure.name, strip(...FIGURES[figure.name]));
        const parts = own.strips.get(figure.name);
        const last = figure.history.at(-1);
        replace(parts.last, h("span", { class: "number" }, last ? three(last.quantiles[2]) : "–"), h("span", { class: "muted" }, last ? ` last, of ${last.maps} ${last.maps === 1 ? "map" : "maps"}` : " no map yet"));
        replace(parts.plot, stripPlot(figure, answer, name));
      }
    }

    // Made once: its "?" may be open when the next answer comes.
    function strip(name, term) {
      const parts = { last: h("p", { class: "last" }), plot: h("div") };
      own.parts.figures.append(h("div", { class: "strip" }, h("h3", {}, name, " ", explained(term, name)), parts.last, parts.plot));
      return parts;
    }

    const seen = () => (document.visibilityState === "visible" && !own.paused ? ask() : clearTimeout(own.timer));
    document.addEventListener("visibilitychange", seen);
    busy(body, true);
    ask();
    return {
      update(state, changed) {
        if (changed.has("key")) ask();
      },
      unmount() {
        stop.abort();
        clearTimeout(own.timer);
        resized.disconnect();
        document.removeEventListener("visibilitychange", seen);
      },
    };
  },
};

const row = (tag, ...cells) => h("tr", {}, cells.map((one, i) => h(tag, i && tag === "td" ? { class: "number" } : {}, String(one))));

function binName(edges, bin) {
  if (bin === 0) return `below ${edges[1]}`;
  if (bin === edges.length - 2) return `above ${edges[bin]}`;
  return `${edges[bin]} to ${edges[bin + 1]}`;
}
