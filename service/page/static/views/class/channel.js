// What is told of one channel: how strong it is for the class, the crops that excite it most, the classes it serves.

import { isAbort, path } from "../../api.js";
import { busy, explained, problemBox } from "../../components.js";
import { h, replace } from "../../dom.js";

const FEW = 8;

export function strengthWords(strength) {
  if (strength >= 0.995) return "the strongest of its layer";
  if (strength >= 0.75) return "among the strongest of its layer";
  if (strength >= 0.45) return "of middling strength in its layer";
  return "one of the weaker in its layer";
}

// `pictures`: what the graph keeps of exemplars, or undefined; `build`: the command that makes the graph.
export function channelPanel(app, { pictures, build, signal, onClass, onChannel }) {
  const node = h("section", { class: "panel channel-panel", "aria-label": "Channel" });
  const known = new Map();
  let [timer, shown] = [null, null];

  function hint(text) {
    clearTimeout(timer);
    shown = null;
    busy(node, false);
    put(h("h2", { tabindex: -1 }, "A channel"), h("p", { class: "muted" }, text));
  }

  // What is replaced may hold the focus: the heading then takes it.
  function put(title, ...rest) {
    const focused = node.contains(document.activeElement);
    replace(node, title, ...rest);
    if (focused) title.focus();
  }

  // `at once`: chosen, and not only passed over by the pointer.
  function show(channel, classes, atOnce) {
    clearTimeout(timer);
    if (shown === channel.key) return;
    timer = setTimeout(() => load(channel, classes), atOnce ? 0 : 140);
  }

  async function load(channel, classes) {
    const { model, version } = app.store.get();
    shown = channel.key;
    const body = h("div", { class: "stack" });
    put(heading(channel), strengths(channel, classes), influences(channel), body);
    busy(node, true);
    try {
      const answer = known.get(channel.key) ?? (await app.api.get(path(["models", model, "class-graph", "channels", channel.layer, channel.channel], version), { signal, lane: "class channel" }));
      known.set(channel.key, answer);
      if (shown !== channel.key) return;
      replace(body, crops(channel, answer), serves(answer, classes));
    } catch (error) {
      if (!isAbort(error) && shown === channel.key) replace(body, problemBox(error, () => load(channel, classes)));
    } finally {
      if (shown === channel.key) busy(node, false);
    }
  }

  const heading = (channel) => h("h2", { tabindex: -1 }, `Channel ${channel.channel}`, h("span", { class: "muted" }, ` of ${channel.layer}`));

  function strengths(channel, classes) {
    return h(
      "ul",
      { class: "strengths" },
      [["a", classes.a], ["b", classes.b]].map(([side, name]) => {
        if (!name) return null;
        const strength = channel.strength[side];
        const selected = strength !== undefined || channel.side === "shared";
        return h(
          "li",
          {},
          h("span", { class: `whose ${classes.b ? side : "one"}` }, name),
          strength !== undefined && h("meter", { min: 0, max: 1, value: strength.toFixed(3), "aria-label": `Strength for ${name}` }),
          strength !== undefined && h("span", { class: "number" }, strength.toFixed(2)),
          h("span", { class: "muted words" }, strength !== undefined ? strengthWords(strength) : selected ? "selected too" : "does not select it"),
        );
      }),
      h("li", { class: "about" }, "Strength", explained("class_strength", "strength")),
    );
  }

  function influences(channel) {
    const list = (title, edges, end) =>
      edges.length > 0 &&
      h(
        "div",
        {},
        h("h3", {}, `${title} `, explained("influence")),
        h("ul", {}, [...edges].sort((x, y) => y.weight - x.weight).slice(0, 3).map((edge) =>
          h("li", {}, h("button", { type: "button", class: "ghost", on: { click: () => onChannel(end(edge).key) } }, `${end(edge).channel}`, h("span", { class: "muted" }, ` of ${end(edge).layer}`)), h("span", { class: "number" }, `${(100 * edge.weight).toFixed(0)} %`)),
        )),
      );
    return h("div", { class: "influences" }, list("Fed most by", channel.up, (edge) => edge.from), list("Feeds most", channel.down, (edge) => edge.to));
  }

  function crops(channel, answer) {
    if (!answer.exemplars) {
      return h(
        "div",
        {},
        h("h3", {}, "What excites it"),
        h("p", { class: "muted" }, pictures ? "No crops of it are stored: no class selects it." : ["No crops are stored. Exemplars are pieces of the images the graph was built with; ", h("code", {}, `${build} --exemplars 9`), " stores them beside the table."]),
      );
    }
    const strip = h("div", { class: "crops", role: "img", "aria-label": `The ${answer.exemplars} crops of training images that excite channel ${channel.channel} of ${channel.layer} most` });
    const { model, version } = app.store.get();
    app.api
      .get(path(["models", model, "class-graph", "exemplars", channel.layer, channel.channel], version), { accept: "image/*", signal, lane: "class crops" })
      .then(createImageBitmap)
      .then((bitmap) => {
        const side = bitmap.height;
        for (let i = 0; i < Math.round(bitmap.width / side); i++) {
          const crop = h("canvas", { width: side, height: side });
          crop.getContext("2d").drawImage(bitmap, i * side, 0, side, side, 0, 0, side, side);
          strip.append(crop);
        }
        bitmap.close();
      })
      .catch((error) => isAbort(error) || replace(strip, problemBox(error)));
    return h("div", {}, h("h3", {}, "What excites it most ", explained("exemplars")), strip);
  }

  function serves(answer, classes) {
    const list = h("ol", { class: "serves" });
    const draw = (most) =>
      replace(
        list,
        answer.classes.slice(0, most).map((one) =>
          h("li", {}, h("button", { type: "button", class: "bar", "aria-current": [classes.aIndex, classes.bIndex].includes(one.index) && "true", on: { click: () => onClass(one.index) } }, h("span", { class: "fill", style: { width: `${100 * one.strength}%` } }), h("span", { class: "label" }, one.label), h("span", { class: "number" }, one.strength.toFixed(2)))),
        ),
        most < answer.classes.length && h("li", {}, h("button", { type: "button", class: "ghost", on: { click: showAll } }, `Show all ${answer.classes.length}`)),
      );
    const showAll = () => {
      draw(answer.classes.length);
      list.children[FEW].firstChild.focus();
    };
    draw(FEW);
    const all = answer.classes_in_all;
    return h("div", {}, h("h3", {}, `Serves ${all} ${all === 1 ? "class" : "classes"} `, explained("serves")), list, all > answer.classes.length && h("p", { class: "muted" }, `The ${answer.classes.length} strongest of ${all}.`));
  }

  return { node, show, hint, unmount: () => clearTimeout(timer) };
}
