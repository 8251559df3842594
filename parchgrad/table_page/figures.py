"""The numbers of a table's page: channels owned and shared, classes alike, strongest channels, p-values.

Arrays only, no drawing. `K` covered classes in the table's order, `C` channels of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import binom, hypergeom

from parchgrad.quantiles import channels_of_quantile
from parchgrad.tables import NORMALITY_LEVEL, LayerTable

# The optimal order of the leaves takes time with the square of the classes and more: 400 take seconds.
OPTIMAL_ORDER_CLASSES = 400

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Ownership:
    """By how many classes each channel of one layer is selected; the four kinds add up to `channels`."""

    channels: int
    selectable: int  # of them, those that the normality filter, if any, lets through
    per_class: int  # channels that the quantile gives each class, before the filter
    owned: int  # selected by exactly one class
    shared: int  # by two or more, up to half of the classes
    common: int  # by more than half of them
    unused: int  # by none
    dead: int  # the GAP feature is the same for every image; such channels are counted above as well
    owned_by_class: Counts  # (K,)
    classes_by_channel: Counts  # (C,) how many classes select each

    @property
    def classes(self) -> int:
        return len(self.owned_by_class)

    @property
    def share(self) -> float:
        """The probability that a class which chooses at random selects a given channel that the filter lets through."""
        return self.per_class / self.channels

    @property
    def chance(self) -> float:
        """The mean Jaccard index of classes that choose at random here, exactly.

        Two choices have t channels in common with the hypergeometric probability, and 2 n - t between them. A filter
        takes from what both select and from what either does alike, so the mean share stays, if anything is left.
        """
        count = self.per_class
        common = np.arange(max(0, 2 * count - self.channels), count + 1)
        either = 2 * count - common
        nothing_left = hypergeom.pmf(0, self.channels, self.selectable, either)
        probability = hypergeom.pmf(common, self.channels, count, count)
        return float((probability * common / either * (1 - nothing_left)).sum())

    @property
    def chance_owned(self) -> float:
        """How many channels exactly one class selects where all choose at random, on average."""
        return self.selectable * self.classes * self.share * (1 - self.share) ** (self.classes - 1)

    @property
    def quarters(self) -> list[int]:
        """By how many classes a channel is selected: least, first quarter, median, third quarter, most."""
        found: list[int] = np.quantile(self.classes_by_channel, np.arange(5) / 4, method="inverted_cdf").tolist()
        return found

    @property
    def chance_quarters(self) -> tuple[int, int]:
        """The first and the third quarter of the same where classes choose at random and nothing is filtered out."""
        return int(binom.ppf(0.25, self.classes, self.share)), int(binom.ppf(0.75, self.classes, self.share))


@dataclass(frozen=True)
class PValues:
    """How the p-values of one layer are spread over [0, 1]."""

    density: Floats  # (bins,) relative to uniform: 1 everywhere if the classes differ by chance only
    below_001: float  # share at p < 0.001; chance alone gives 0.001
    tested: int  # p-values there are
    untested: int  # NaN: classes with too few images


@dataclass(frozen=True)
class Pair:
    """Two classes, by row, and what their selections have in common."""

    first: int
    second: int
    jaccard: float
    in_common: int  # channels that both select


@dataclass(frozen=True)
class Block:
    """Classes side by side in the order of likeness that are a branch of the clustering."""

    start: int  # place of the first in that order
    rows: list[int]
    mean: float  # mean Jaccard index over its pairs


def selectable_channels(layer: LayerTable, normality_filter: bool) -> Mask:
    """`(C,)`: the channels an explanation may select at all."""
    if not normality_filter or layer.normality_p is None:
        return np.ones(layer.channels, bool)
    allowed: Mask = layer.normality_p.numpy() < NORMALITY_LEVEL
    return allowed


def selected_channels(layer: LayerTable, quantile: float, normality_filter: bool) -> Mask:
    """`(K, C)`: the channels each class selects, as an explanation with these options does."""
    selected: Mask = layer.rank.numpy() < channels_of_quantile(quantile, layer.channels)
    return selected & selectable_channels(layer, normality_filter)


def ownership(layer: LayerTable, selected: Mask, quantile: float, normality_filter: bool) -> Ownership:
    """Counts over the `selected` channels `(K, C)` of `layer`."""
    classes, channels = selected.shape
    times = selected.sum(axis=0)
    owned = times == 1
    common = (times > classes / 2) & (times > 1)
    return Ownership(
        channels=channels,
        selectable=int(selectable_channels(layer, normality_filter).sum()),
        per_class=channels_of_quantile(quantile, channels),
        owned=int(owned.sum()),
        shared=int(((times > 1) & ~common).sum()),
        common=int(common.sum()),
        unused=int((times == 0).sum()),
        dead=int((layer.std.numpy() == 0).sum()),
        owned_by_class=(selected & owned).sum(axis=1),
        classes_by_channel=times,
    )


def spread(counts: Counts) -> tuple[int, int, int]:
    """The least, the median (the lower of two) and the most."""
    ordered = np.sort(counts)
    return int(ordered[0]), int(ordered[(len(ordered) - 1) // 2]), int(ordered[-1])


def in_common(selected: Mask) -> Counts:
    """`(K, K)`: how many channels two classes both select; on the diagonal, how many a class selects."""
    # float32 goes through BLAS and counts exactly up to 2^24.
    one = selected.astype(np.float32)
    counts: Counts = np.rint(one @ one.T).astype(np.int64)
    return counts


def jaccard(common: Counts) -> Floats:
    """`(K, K)` from `in_common`: channels that both select over channels that either does; 0 where none does."""
    sizes = common.diagonal()
    either = sizes[:, None] + sizes[None, :] - common
    similarity: Floats = common / np.maximum(either, 1)
    return similarity


def chance_jaccard(layers: Sequence[Ownership]) -> float:
    """The Jaccard index over several layers of classes that choose at random; 0 if the filter lets nothing through.

    Expected channels in common over those of either: a hair below the mean of that ratio, unless very few channels
    are selected; for a single layer `Ownership.chance` is exact.
    """
    one = sum(layer.selectable * layer.share for layer in layers)
    both = sum(layer.selectable * layer.share**2 for layer in layers)
    return both / (2 * one - both) if one else 0.0


def mean_of_pairs(matrix: Floats) -> float:
    """Mean over all pairs of different classes; NaN for a single class."""
    classes = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (classes * (classes - 1))) if classes > 1 else float("nan")


def similarity_order(similarity: Floats) -> NDArray[np.int64]:
    """`(K,)`: rows in the order of a hierarchical clustering (average linkage), so that like stands by like.

    Up to `OPTIMAL_ORDER_CLASSES` the leaves are turned so that neighbours are as alike as the tree allows.
    """
    classes = len(similarity)
    if classes < 3:
        return np.arange(classes)
    return leaves_list(_tree(similarity, optimal_ordering=classes <= OPTIMAL_ORDER_CLASSES)).astype(np.int64)


def blocks(similarity: Floats, order: NDArray[np.int64], count: int) -> list[Block]:
    """The tree of `similarity_order` cut into `count` branches or, at ties, fewer; those of two classes and more.

    In the order of the map: a branch's leaves stand side by side however the tree is turned.
    """
    branch = fcluster(_tree(similarity, optimal_ordering=False), count, criterion="maxclust")[order]
    starts = [0, *(np.flatnonzero(np.diff(branch)) + 1).tolist(), len(order)]
    found = []
    for start, stop in pairwise(starts):
        rows = order[start:stop]
        if len(rows) > 1:
            found.append(Block(start, rows.tolist(), mean_of_pairs(similarity[np.ix_(rows, rows)])))
    return found


def _tree(similarity: Floats, optimal_ordering: bool) -> Floats:
    distance = squareform(1 - similarity, checks=False)
    tree: Floats = linkage(distance, method="average", optimal_ordering=optimal_ordering)
    return tree


def most_similar(similarity: Floats, common: Counts, count: int) -> list[Pair]:
    """The `count` pairs of different classes with the highest Jaccard index; ties in row order."""
    first, second = np.triu_indices(len(similarity), k=1)
    values = similarity[first, second]
    best = np.argsort(-values, kind="stable")[:count]
    return [
        Pair(int(first[i]), int(second[i]), float(values[i]), int(common[first[i], second[i]])) for i in best.tolist()
    ]


def strongest(layer: LayerTable, count: int) -> NDArray[np.int64]:
    """`(K, min(count, C))`: each class's best-ranked channels, the strongest first."""
    rank = layer.rank.numpy()
    rows, channels = np.nonzero(rank < count)
    order = np.empty((len(rank), min(count, layer.channels)), np.int64)
    order[rows, rank[rows, channels]] = channels
    return order


def p_values(layer: LayerTable, bins: int) -> PValues:
    """Histogram of the layer's p-values, all classes and channels together, in `bins` equal parts of [0, 1]."""
    log_p = layer.log_p.numpy()
    log_p = log_p[~np.isnan(log_p)]
    if not len(log_p):
        return PValues(np.zeros(bins), 0.0, 0, layer.log_p.numel())
    # p = 1 belongs to the last bin; rounding may have put log p a hair above 0.
    place = np.minimum((np.exp(np.minimum(log_p, 0)) * bins).astype(np.int64), bins - 1)
    return PValues(
        density=np.bincount(place, minlength=bins).astype(np.float64) * (bins / len(log_p)),
        below_001=float((log_p < np.log(0.001)).mean()),
        tested=len(log_p),
        untested=layer.log_p.numel() - len(log_p),
    )
