// The Traffic view: activations of recent images beside the table's own, by layer and class, and figures of recent maps.
// Asks GET /traffic again and again while the page is seen; nothing of an image is in its answer.

import { isAbort } from "../api.js";
import { busy, emptyState, explained, problemBox, tabs } from "../components.js";
import { announce, h, replace, s } from "../dom.js";
import { define } from "../words.js";

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
const three = (value) => value.toFixed(3);
const images = (count) => `${count} ${count === 1 ? "image" : "images"}`;

export const view = {
  id: "traffic",
  title: "Traffic",
  mount(root, app) {
    const own = { span: "hour", index: null, layer: null, paused: false, answer: null, timer: 0, open: false };
    const stop = new AbortController();

    // --- what stands still ----------------------------------------------------------------------------------
    const status = h("p", { class: "muted status" });
    const pause = h("button", { type: "button", class: "ghost", on: { click: () => setPaused(!own.paused) } }, "Pause");
    const trouble = h("div");
    const notes = h("div", { class: "stack" });
    const body = h("div", { class: "stack" });
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
        show(answer);
      } catch (error) {
        if (isAbort(error)) return;
        replace(trouble, problemBox(error, ask));
        busy(body, false);
      }
      again();
    }

    function again() {
      clearTimeout(own.timer);
      const goes = !own.paused && document.visibilityState === "visible" && !stop.signal.aborted;
      if (goes) own.timer = setTimeout(ask, EVERY);
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
      if (own.parts.chosen) busy(own.parts.chosen, false);
    }

    function build(kind) {
      resized.disconnect();
      own.parts = { figures: h("div", { class: "strips" }) };
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
        own.parts.classes = h("div");
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
              own.parts.classes,
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
      const command = `parchgrad class-graph build ${answer.name} --data IMAGES`;
      replace(
        notes,
        answer.note && answer.images > 0 && h("p", { class: "note" }, answer.note),
        answer.no_activations && h("p", { class: "note" }, answer.no_activations),
        answer.reference_note && h("p", { class: "note" }, answer.reference_note),
        answer.images > 0 && answer.chosen.reference !== "table's images" &&
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
      replace(
        own.parts.classes,
        h("p", { class: "muted legend" }, h("span", { class: "key beyond" }, "▲"), "beyond chance ", explained("chance"), " · – fewer than ", String(answer.fewest_images), " images", few ? ` (${few} ${few === 1 ? "class" : "classes"} so far)` : ""),
        answer.images_of_others > 0 && h("p", { class: "muted" }, `${images(answer.images_of_others)} of classes not kept apart count in “all classes” only (PARCHGRAD_WATCH_CLASSES).`),
      );
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
      replace(
        own.parts.figures,
        answer.figures.map((figure) => {
          const [name, term] = FIGURES[figure.name];
          const last = figure.history.at(-1);
          const said = last ? three(last.quantiles[2]) : "–";
          return h(
            "div",
            { class: "strip" },
            h("h3", {}, name, " ", explained(term, name)),
            h("p", { class: "last" }, h("span", { class: "number" }, said), h("span", { class: "muted" }, last ? ` last, of ${last.maps} ${last.maps === 1 ? "map" : "maps"}` : " no map yet")),
            stripPlot(figure, answer, name),
          );
        }),
      );
    }

    const seen = () => (document.visibilityState === "visible" && !own.paused ? ask() : clearTimeout(own.timer));
    document.addEventListener("visibilitychange", seen);
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

// --- plots --------------------------------------------------------------------------------------------------

const clock = (start) => new Date(1000 * start).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
const row = (tag, ...cells) => h("tr", {}, cells.map((one, i) => h(tag, i && tag === "td" ? { class: "number" } : {}, String(one))));

function binName(edges, bin) {
  if (bin === 0) return `below ${edges[1]}`;
  if (bin === edges.length - 2) return `above ${edges[bin]}`;
  return `${edges[bin]} to ${edges[bin + 1]}`;
}

// Shares of the bins as filled steps: the reference, and over it what was seen. `label` null: without axis, for a button.
function densityPlot(answer, i, width, height, label) {
  const { live, reference, values } = answer.distributions[i];
  const shares = live.map((count) => (values ? count / values : 0));
  const below = label === null ? 2 : 34;
  const x = d3.scaleLinear([answer.edges[0], answer.edges.at(-1)], [2, width - 2]);
  const y = d3.scaleLinear([0, Math.max(...shares, ...reference) || 1], [height - below, 4]);
  const stepped = (of) => answer.edges.map((edge, bin) => [edge, of[Math.min(bin, of.length - 1)]]);
  const area = d3.area().x((d) => x(d[0])).y0(y(0)).y1((d) => y(d[1])).curve(d3.curveStepAfter);
  const line = d3.line().x((d) => x(d[0])).y((d) => y(d[1])).curve(d3.curveStepAfter);
  const plot = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: label === null ? "presentation" : "img", "aria-label": label && `Activations of recent images and of the reference. ${label}` });
  plot.append(s("path", { class: "known", d: area(stepped(reference)) }), s("path", { class: "known-line", d: line(stepped(reference)) }));
  if (values) plot.append(s("path", { class: "live", d: area(stepped(shares)) }), s("path", { class: "live-line", d: line(stepped(shares)) }));
  if (label === null) return plot;
  const axis = s("g", { class: "axis", transform: `translate(0 ${height - below})` });
  d3.select(axis).call(d3.axisBottom(x).ticks(Math.max(4, width / 80)).tickSizeOuter(0));
  plot.append(axis, s("text", { class: "caption", x: width / 2, y: height - 4, "text-anchor": "middle" }, "deviations from the table's mean"));
  return plot;
}

// From the first piece of time in which anything was seen, and over six pieces at least, to now.
function timeScale(answer, left, right) {
  const seen = [...answer.history.filter((one) => one.images), ...answer.figures.flatMap((one) => one.history)];
  const now = answer.history.at(-1).start + answer.bucket_seconds;
  const from = Math.min(now - 6 * answer.bucket_seconds, ...seen.map((one) => one.start));
  return d3.scaleTime([new Date(1000 * from), new Date(1000 * now)], [left, right]);
}

const middle = (one, answer) => new Date(1000 * (one.start + answer.bucket_seconds / 2));

function pastPlot(answer, i, width, height) {
  const said = answer.history.filter((one) => one.divergence[i] !== null);
  if (!said.length)
    return h("p", { class: "muted" }, `No ${answer.bucket_seconds === 3600 ? "hour" : `${answer.bucket_seconds / 60} minutes`} yet in which ${answer.fewest_images} images of it were looked at.`);
  const bounded = answer.chosen.reference === "table's images";
  const [left, below] = [34, 22];
  const x = timeScale(answer, left, width - 6);
  const top = Math.max(0.02, ...said.map((one) => Math.max(one.divergence[i], bounded ? one.bound[i] : 0)));
  const y = d3.scaleLinear([0, top], [height - below, 8]).nice(4);
  const last = said.at(-1);
  const plot = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Divergence over time: ${said.length} values, the last ${three(last.divergence[i])} bits at ${clock(last.start)}; the table below has all.` });
  const of = (value) => d3.line().defined((one) => one.divergence[i] !== null).x((one) => x(middle(one, answer))).y(value);
  const bottom = s("g", { class: "axis", transform: `translate(0 ${height - below})` });
  const side = s("g", { class: "axis", transform: `translate(${left} 0)` });
  d3.select(bottom).call(d3.axisBottom(x).ticks(Math.max(2, width / 110)).tickFormat((date) => clock(date / 1000)).tickSizeOuter(0));
  d3.select(side).call(d3.axisLeft(y).ticks(3).tickSizeOuter(0));
  plot.append(bottom, side);
  if (bounded) {
    const reach = d3.area().defined((one) => one.divergence[i] !== null).x((one) => x(middle(one, answer))).y0(y(0)).y1((one) => y(one.bound[i]));
    plot.append(s("path", { class: "chance", d: reach(answer.history) }));
    plot.append(...said.map((one) => s("line", { class: "chance-line", x1: x(middle(one, answer)) - 4, x2: x(middle(one, answer)) + 4, y1: y(one.bound[i]), y2: y(one.bound[i]) })));
  }
  plot.append(s("path", { class: "past", d: of((one) => y(one.divergence[i]))(answer.history) }));
  for (const one of said)
    plot.append(s("circle", { class: bounded && one.divergence[i] > one.bound[i] ? "dot beyond" : "dot", cx: x(middle(one, answer)), cy: y(one.divergence[i]), r: 3 }, s("title", {}, `${clock(one.start)}: ${three(one.divergence[i])} bits, ${images(one.images)}`)));
  return plot;
}

function stripPlot(figure, answer, name) {
  const [width, height] = [240, 56];
  if (!figure.history.length) return s("svg", { viewBox: `0 0 ${width} ${height}`, role: "presentation" });
  const x = timeScale(answer, 4, width - 4);
  const all = figure.history.flatMap((one) => one.quantiles.slice(1, 4));
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const room = Math.max(0.05, high - low) * 0.15;
  const y = d3.scaleLinear([Math.max(figure.lowest, low - room), Math.min(figure.highest, high + room)], [height - 5, 5]);
  const at = (one) => x(middle(one, answer));
  const band = d3.area().x(at).y0((one) => y(one.quantiles[1])).y1((one) => y(one.quantiles[3]));
  const line = d3.line().x(at).y((one) => y(one.quantiles[2]));
  const [a, b] = y.domain();
  return h(
    "div",
    { class: "range" },
    s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name} over time: median ${three(figure.quantiles[2])} of ${figure.maps} maps, the middle half from ${three(figure.quantiles[1])} to ${three(figure.quantiles[3])}.` },
      s("path", { class: "band", d: band(figure.history) }),
      s("path", { class: "past", d: line(figure.history) }),
      figure.history.map((one) => [
        s("line", { class: "spread", x1: at(one), x2: at(one), y1: y(one.quantiles[1]), y2: y(one.quantiles[3]) }),
        s("circle", { class: "dot", cx: at(one), cy: y(one.quantiles[2]), r: 2.5 }, s("title", {}, `${clock(one.start)}: ${three(one.quantiles[2])}`)),
      ]),
    ),
    h("span", { class: "ends muted", "aria-hidden": "true" }, h("span", {}, b.toFixed(2)), h("span", {}, a.toFixed(2))),
  );
}
