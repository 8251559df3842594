"""Metrics of one saliency map, knowing neither model nor method, and the type `Maps` of what makes maps.

A map is a non-negative `(h, w)` array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

if TYPE_CHECKING:
    from torch import Tensor

# Images (B, 3, h, w), their targets -> saliency maps (B, h, w); NaN for a target that is not answered.
Maps: TypeAlias = "Callable[[Tensor, list[int]], Tensor]"


def mass_share(saliency: ArrayLike, mask: ArrayLike) -> float:
    """Share of the map's mass inside `mask`, bool `(h, w)`; NaN for a map without mass.

    The inside-total relevance ratio of Arras, Osman, Samek 2022 ("relevance mass accuracy"). A map of
    random numbers scores the mask's share of the area.
    """
    values = np.asarray(saliency, np.float64)
    total = values.sum()
    return float(values[np.asarray(mask, bool)].sum() / total) if total > 0 else float("nan")


def area_weighted_mass(saliency: ArrayLike, mask: ArrayLike) -> float:
    """`mass_share` over the mask's share of the area: "relevance mass accuracy, weighted".

    `(mass inside / mass) * (pixels / pixels inside)`, the weighted inside-total relevance ratio of Kohlbrenner,
    Bauer, Nakajima, Binder, Samek, Lapuschkin 2020. A density: how many times denser the mass is inside than over
    the whole map, from 0 to pixels / pixels inside, so that small and large masks count alike. A map of random
    numbers scores 1 whatever the mask. NaN for a map without mass and for an empty mask.
    """
    area = np.asarray(mask, bool).mean()
    return mass_share(saliency, mask) / float(area) if area > 0 else float("nan")


def pointing_hit(saliency: ArrayLike, mask: ArrayLike) -> float:
    """1 if the map's maximum lies in `mask`, else 0; ties count by their share (Zhang et al. 2018).

    NaN for a map without mass.
    """
    values = np.asarray(saliency, np.float64)
    if not values.max() > 0:
        return float("nan")
    return float(np.asarray(mask, bool)[values == values.max()].mean())


def pointing_game(saliency: ArrayLike, mask: ArrayLike, tolerance: float = 15) -> float:
    """1 if the map's maximum lies within `tolerance` pixels of `mask`, else 0; ties count by their share.

    The pointing game of Zhang, Bargal, Lin, Brandt, Shen, Sclaroff 2018, whose tolerance is 15 pixels. The distance
    is the straight one from the middle of the maximum's pixel to that of the mask's nearest, `tolerance` itself
    included, as in the authors' code (TorchRay's asks for less); so 0 is `pointing_hit`. Theirs are pixels of the
    original image, to which they enlarge the map; here they are those of the arrays that are given. A map of random
    numbers scores the share of the area within `tolerance` of the mask, which is more than the mask's. 0 for an
    empty mask. NaN for a map without mass.
    """
    inside = np.asarray(mask, bool)
    if inside.any() and tolerance > 0:
        inside = ndimage.distance_transform_edt(~inside) <= tolerance
    return pointing_hit(saliency, inside)


def gini(saliency: ArrayLike) -> float:
    """Gini index of the map's values: 0 = spread evenly, near 1 = on few pixels (Chalasani et al. 2020).

    NaN for a map without mass.
    """
    values = np.sort(np.abs(np.asarray(saliency, np.float64)), axis=None)
    total = values.sum()
    if not total > 0:
        return float("nan")
    n = len(values)
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float((weights * values).sum() / (n * total))


def hoyer(saliency: ArrayLike) -> float:
    """Hoyer's sparseness of the map's magnitude: 0 = spread evenly, 1 = all on one pixel (Hurley & Rickard 2009).

    `(sqrt(n) - sum |x| / sqrt(sum x^2)) / (sqrt(n) - 1)` over its n pixels. A large map of random numbers, uniform
    from 0, scores 0.134. NaN for a map without mass and for one of a single pixel.
    """
    values = np.abs(np.asarray(saliency, np.float64))
    largest = values.max()
    if not 0 < largest < math.inf or values.size == 1:
        return float("nan")
    values /= largest  # squares of tiny values would vanish
    n = math.sqrt(values.size)
    return float((n - values.sum() / np.sqrt((values**2).sum())) / (n - 1))


def entropy(saliency: ArrayLike, *, normalised: bool = False) -> float:
    """Shannon's entropy of the map's magnitude as shares of its sum, `-sum p log p`, in nats; 0 log 0 is 0.

    From 0 (all on one pixel) to log n (the same on all n pixels); `normalised` divides by log n: 0..1, comparable
    between sizes. Low is sparse: the opposite direction to `gini` and `hoyer`. As "complexity" of explanations:
    Bhatt, Weller, Moura 2020. A large map of random numbers, uniform from 0, scores log n - 0.193. NaN for a map
    without mass, and, normalised, for one of a single pixel.
    """
    values = np.abs(np.asarray(saliency, np.float64))
    total = values.sum()
    if not 0 < total < math.inf or (normalised and values.size == 1):
        return float("nan")
    shares = values / total
    shares = shares[shares > 0]
    nats = max(0.0, -float(shares @ np.log(shares)))
    return nats / math.log(values.size) if normalised else nats


def border_share(saliency: ArrayLike, width: float = 0.1) -> float:
    """Share of the map's magnitude within the outer `width` of each side's length, left, right, above and below.

    A pixel that the line cuts counts by its part. So a uniform map has `1 - (1 - 2 * width)^2`, 0.36 for a tenth,
    whatever its size. NaN for a map without mass.
    """
    values = np.abs(np.asarray(saliency, np.float64))
    total = values.sum()
    if not total > 0:
        return float("nan")
    down, across = (_inside(side, width) for side in values.shape)
    return float(1 - down @ values @ across / total)


def _inside(side: int, width: float) -> NDArray[np.float64]:
    """How much of each pixel of a side lies farther than `width` of its length from both ends."""
    start = np.arange(side)
    within: NDArray[np.float64] = np.minimum(start + 1, side * (1 - width)) - np.maximum(start, side * width)
    return np.maximum(within, 0)


def centroid(saliency: ArrayLike) -> tuple[float, float]:
    """Centre of the map's magnitude as (x, y): 0 is the left or upper edge, 1 the right or lower; 0.5 if uniform.

    NaN for a map without mass.
    """
    values = np.abs(np.asarray(saliency, np.float64))
    total = values.sum()
    if not total > 0:
        return float("nan"), float("nan")
    height, width = values.shape
    x = values.sum(axis=0) @ (np.arange(width) + 0.5) / (width * total)
    y = values.sum(axis=1) @ (np.arange(height) + 0.5) / (height * total)
    return float(x), float(y)


def agreement(saliency: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation of two maps of one shape, -1..1: whether they order the pixels alike.

    NaN where either is the same everywhere or has a value that is not finite.
    """
    a, b = (np.asarray(one, np.float64).ravel() for one in (saliency, other))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else float("nan")


def top_overlap(saliency: ArrayLike, other: ArrayLike, share: float = 0.1) -> float:
    """Of two maps of one shape, how much of their largest values' places is common: intersection over union, 0..1.

    The places of a map are those of its `share` largest values, at least one, as far as they are above 0: a pixel that
    says nothing is in nobody's tenth. Of equal values the first in reading order. Two maps of independent random
    numbers score `share / (2 - share)`, 0.053 for a tenth. NaN where either has no value above 0, or one that is not
    finite.
    """
    a, b = (np.asarray(one, np.float64).ravel() for one in (saliency, other))
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or a.max(initial=0.0) <= 0 or b.max(initial=0.0) <= 0:
        return float("nan")
    count = max(1, round(share * len(a)))
    largest = (np.argsort(-one, kind="stable")[:count] for one in (a, b))
    first, second = (places[one[places] > 0] for places, one in zip(largest, (a, b), strict=True))
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each value, `(n,)`; equal ones share the mean of theirs."""
    order = np.argsort(values)
    sorted_values = values[order]
    first = np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]]))
    length = np.diff(np.append(first, len(values)))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + (length - 1) / 2, length)
    return ranks


@dataclass(frozen=True)
class Figures:
    """What is watched of one map; all NaN for a map without mass or with a value that is not finite."""

    gini: float
    border_share: float
    x: float
    y: float


def figures(saliency: ArrayLike) -> Figures:
    """The figures of one map."""
    if not np.isfinite(saliency).all():
        return Figures(*[float("nan")] * 4)
    return Figures(gini(saliency), border_share(saliency), *centroid(saliency))
