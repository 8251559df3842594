"""The numbers of a table's page: channels owned and shared, classes alike, strongest channels, p-values.

Arrays only, no drawing. `K` covered classes in the table's order, `C` channels of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from parchgrad.selection import channels_of_quantile
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
    per_class: int  # channels that the quantile gives each class
    owned: int  # selected by exactly one class
    shared: int  # by two or more, up to half of the classes
    common: int  # by more than half of them
    unused: int  # by none
    dead: int  # the GAP feature is the same for every image; such channels are counted above as well
    owned_by_class: Counts  # (K,)
    classes_by_channel: Counts  # (C,) how many classes select each

    @property
    def chance(self) -> float:
        """The Jaccard index of classes that choose at random here."""
        return chance_jaccard([self.channels], [self.per_class])


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


def selected_channels(layer: LayerTable, quantile: float, normality_filter: bool) -> Mask:
    """`(K, C)`: the channels each class selects, as an explanation with these options does."""
    selected: Mask = layer.rank.numpy() < channels_of_quantile(quantile, layer.channels)
    if normality_filter and layer.normality_p is not None:
        selected &= layer.normality_p.numpy() < NORMALITY_LEVEL
    return selected


def ownership(layer: LayerTable, selected: Mask, quantile: float) -> Ownership:
    """Counts over the `selected` channels `(K, C)` of `layer`."""
    classes, channels = selected.shape
    times = selected.sum(axis=0)
    owned = times == 1
    common = (times > classes / 2) & (times > 1)
    return Ownership(
        channels=channels,
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


def chance_jaccard(channels: Sequence[int], per_class: Sequence[int]) -> float:
    """The Jaccard index of classes that choose at random: expected channels in common over those of either."""
    both = sum(count * count / width for width, count in zip(channels, per_class, strict=True))
    return both / (2 * sum(per_class) - both)


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
    distance = squareform(1 - similarity, checks=False)
    tree = linkage(distance, method="average", optimal_ordering=classes <= OPTIMAL_ORDER_CLASSES)
    return leaves_list(tree).astype(np.int64)


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
