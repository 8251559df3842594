// Which channels and influences of one class or two are drawn, and where. Arithmetic only: knows no page.

export const ROW = 66; // from one layer to the next
const STEP = [50, 150]; // from one channel to the next, at least and at most
export const SCALE = [0.42, 1.5]; // at which a drawing opens: below, nothing of it can be made out

const keyOf = (layer, channel) => `${layer}/${channel}`;

// The layers take turns, each giving its next one, the best first: the service's own order (`nodes=`).
function inTurn(items, layerOf, worth) {
  const byLayer = new Map();
  for (const item of [...items].sort((x, y) => worth(y) - worth(x))) {
    const layer = layerOf(item);
    byLayer.set(layer, [...(byLayer.get(layer) ?? []), item]);
  }
  const rounds = [];
  for (const list of byLayer.values()) list.forEach((item, turn) => rounds.push([turn, item]));
  return rounds.sort(([turn, x], [other, y]) => turn - other || worth(y) - worth(x)).map(([, item]) => item);
}

// How strong a channel is for whom, and whose it is: {key, layer, channel, side, strength: {a, b}, size, …}.
// `layers`: the graph's; `a`, `b`: answers of a class (`b` null: one alone); `comparison`: the service's.
function channelsOf(layers, a, b, comparison) {
  const place = new Map(layers.map((layer, i) => [layer.name, i]));
  const sides = new Map();
  for (const layer of comparison?.layers ?? [])
    for (const [side, list] of [["shared", layer.shared], ["a", layer.only_a], ["b", layer.only_b]])
      for (const channel of list) sides.set(keyOf(layer.layer, channel), side);
  const found = new Map();
  for (const [whose, answer] of [["a", a], ["b", b]])
    for (const node of answer?.nodes ?? []) {
      const key = keyOf(node.layer, node.channel);
      const known = found.get(key) ?? {
        key, layer: node.layer, channel: node.channel, row: place.get(node.layer), side: b ? sides.get(key) : "one",
        strength: {}, pagerank: 0, size: 0,
      };
      known.strength[whose] = node.strength;
      known.pagerank = Math.max(known.pagerank, node.pagerank);
      known.size = Math.max(known.size, node.strength);
      found.set(key, known);
    }
  return found;
}

// What is drawn: {nodes, edges, rows, width, height}, positions and all. `most`: channels, `mostEdges`: influences;
// `room`: the [width, height] there is for it.
export function picture(layers, a, b, comparison, most, mostEdges, room) {
  const all = channelsOf(layers, a, b, comparison);
  const queues = [a, b].filter(Boolean).map((one) => inTurn(one.nodes, (node) => node.layer, (node) => node.pagerank));
  const kept = new Map();
  for (let i = 0; kept.size < most && queues.some((queue) => i < queue.length); i++)
    for (const queue of queues) {
      if (i >= queue.length || kept.size >= most) continue;
      const key = keyOf(queue[i].layer, queue[i].channel);
      kept.set(key, { ...all.get(key), x: 0, y: 0, up: [], down: [] });
    }
  const rows = layers
    .map((layer, row) => ({ name: layer.name, selected: layer.selected, nodes: [...kept.values()].filter((node) => node.row === row) }))
    .filter((row) => row.nodes.length);
  const edges = edgesOf(a, b, kept, mostEdges);
  const widest = Math.max(...rows.map((row) => row.nodes.length), 1);
  const scale = Math.min(Math.max(SCALE[0], room[1] / (rows.length * ROW)), SCALE[1]);
  const step = Math.min(Math.max(STEP[0], room[0] / scale / widest), STEP[1]);
  place(rows, edges, step);
  const width = widest * step;
  return { nodes: [...kept.values()], edges, rows, width, height: rows.length * ROW };
}

function edgesOf(a, b, kept, most) {
  const found = new Map();
  for (const [whose, answer] of [["a", a], ["b", b]])
    for (const edge of answer?.edges ?? []) {
      const [from, to] = [answer.nodes[edge.source], answer.nodes[edge.target]].map((node) => kept.get(keyOf(node.layer, node.channel)));
      if (!from || !to) continue;
      const key = `${from.key}>${to.key}`;
      const known = found.get(key) ?? { key, from, to, weight: 0, weights: {} };
      known.weights[whose] = edge.weight;
      known.weight = Math.max(known.weight, edge.weight);
      found.set(key, known);
    }
  const chosen = inTurn(found.values(), (edge) => edge.to.row, (edge) => edge.weight).slice(0, most);
  for (const edge of chosen) {
    edge.side = !b ? "one" : edge.weights.a === undefined ? "b" : edge.weights.b === undefined ? "a" : "shared";
    edge.from.down.push(edge);
    edge.to.up.push(edge);
  }
  return chosen;
}

const GROUP = { a: 0, one: 1, shared: 1, b: 2 };

// Rows below each other from the input to the prediction; in a row, first A's own, then shared, then B's, and each
// channel near those it is tied to (the barycentre heuristic of layered drawings, Sugiyama et al. 1981).
function place(rows, edges, step) {
  rows.forEach((row, i) => row.nodes.forEach((node) => (node.y = (i + 0.5) * ROW)));
  for (const row of rows) row.nodes.sort((x, y) => GROUP[x.side] - GROUP[y.side] || y.size - x.size);
  rows.forEach((row) => spread(row, step));
  for (let sweep = 0; sweep < 6; sweep++)
    for (const row of sweep % 2 ? [...rows].reverse() : rows) {
      for (const node of row.nodes) {
        let [sum, total] = [0, 0];
        for (const edge of sweep % 2 ? node.down : node.up) {
          const other = edge.from === node ? edge.to : edge.from;
          sum += other.x * edge.weight;
          total += edge.weight;
        }
        node.pull = total ? sum / total : node.x;
      }
      row.nodes.sort((x, y) => GROUP[x.side] - GROUP[y.side] || x.pull - y.pull);
      spread(row, step);
    }
}

function spread(row, step) {
  row.nodes.forEach((node, i) => (node.x = (i - (row.nodes.length - 1) / 2) * step));
}
