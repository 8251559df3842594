// The plots of the Traffic view: activations of a layer, its divergence over time, a figure of the maps. Ask nothing.

import { h, s } from "../../dom.js";

export const three = (value) => value.toFixed(3);
export const images = (count) => `${count} ${count === 1 ? "image" : "images"}`;
export const clock = (start) => new Date(1000 * start).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });

// Shares of the bins as filled steps: the reference, and over it what was seen. `label` null: without axis, for a button.
export function densityPlot(answer, i, width, height, label) {
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

export function pastPlot(answer, i, width, height) {
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

export function stripPlot(figure, answer, name) {
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
