"""Which channels and influences of a class matter: personalised PageRank over its graph. Knows slots and weights only.

After Summit (Hohman et al. 2019), which prunes a class's attribution graph in this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

# networkx's default: a walk goes on with this probability, and else begins anew.
DAMPING = 0.85
TOLERANCE = 1e-9  # of each node's rank
ITERATIONS = 1000


@dataclass(frozen=True)
class Edges:
    """Edges between slots, three arrays of one length: from, to, weight."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float64]

    def take(self, which: NDArray[Any]) -> Edges:
        return Edges(self.source[which], self.target[which], self.weight[which])


def pagerank(strength: NDArray[np.float64], edges: Edges, there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of the walks that each node `(S,)` gets; they sum to 1, and slots where no node is `there` get 0.

    A walk begins at a node drawn by its `strength`; with probability DAMPING it goes on along an edge drawn by weight,
    from a layer to the next, else, or where no edge leads on, it begins anew. All strengths 0 are taken as equal.
    """
    nodes = np.flatnonzero(there)
    graph: Any = networkx.DiGraph()
    graph.add_nodes_from(nodes.tolist())
    graph.add_weighted_edges_from(zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True))
    begins = strength if strength.any() else np.ones(len(strength))
    ranks = networkx.pagerank(
        graph,
        DAMPING,
        dict(zip(nodes.tolist(), begins[nodes].tolist(), strict=True)),
        max_iter=ITERATIONS,
        tol=TOLERANCE,
        weight="weight",
    )
    found = np.zeros(len(strength))
    found[nodes] = [ranks[node] for node in nodes.tolist()]
    return found


def most_walked(ranks: NDArray[np.float64], edges: Edges, group: NDArray[np.int64], per_node: int) -> Edges:
    """The edges that most walks go along: of those into each `group` of nodes, `per_node` times as many as its nodes.

    The walks along an edge are the rank of its source times the edge's share of what leaves it. `group` `(S,)` is each
    node's layer. By group, then most walked first; ties by source and target.
    """
    leaving = np.bincount(edges.source, edges.weight, len(ranks))
    walks = ranks[edges.source] * edges.weight / leaving[edges.source]
    into = group[edges.target]
    order = np.lexsort((edges.target, edges.source, -walks, into))
    sizes = np.bincount(group)
    place = np.arange(len(order)) - np.searchsorted(into[order], into[order])
    return edges.take(order[place < per_node * sizes[into[order]]])
