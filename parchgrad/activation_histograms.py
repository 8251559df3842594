"""Histograms of standardised activations `z`, how far two of them diverge, and how far they would by chance alone.

Arrays only; whose activations they are, `drift` and `class_graph` know. Leading axes `...` are several histograms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import jensenshannon
from scipy.special import chdtri, ndtr

Array = NDArray[np.float64]

BINS = 48
EDGES: Array = np.linspace(-4.0, 8.0, BINS + 1)  # of z, in deviations: the channels of a class are high for it
FEWEST_IMAGES = 10  # fewer say too little of how images differ: no divergence is given
LEVEL = 0.01  # share of the histograms from the reference's own images that lie beyond the bound


def counts(z: ArrayLike) -> NDArray[np.int64]:
    """How many of the finite values lie in each bin, `(BINS,)`; what lies beyond the edges counts in the last ones."""
    values = np.asarray(z, np.float64).ravel()
    values = np.clip(values[~np.isnan(values)], EDGES[0], EDGES[-1])
    return np.histogram(values, EDGES)[0].astype(np.int64)


def normal() -> Array:
    """The shares `(BINS,)` of a standard normal: what a mean and a deviation alone say of z."""
    upto = ndtr(EDGES[1:-1])
    return np.diff(np.concatenate([[0.0], upto, [1.0]]))


def divergence(one: ArrayLike, other: ArrayLike) -> Array:
    """Jensen-Shannon divergence in bits `(...)` of two histograms `(..., BINS)`: 0 the same, 1 without a common bin.

    Each is divided by its sum; NaN where one has none. Lin 1991; `scipy.spatial.distance.jensenshannon` is its root.
    """
    p, q = np.broadcast_arrays(np.asarray(one, np.float64), np.asarray(other, np.float64))
    empty = (p.sum(-1) == 0) | (q.sum(-1) == 0)
    p, q = (np.where(empty[..., None], 1.0, values) for values in (p, q))
    bits: Any = np.square(jensenshannon(p, q, base=2, axis=-1))
    return np.where(empty, np.nan, bits)


@dataclass(frozen=True)
class Chance:
    """What sampling alone makes of the divergence of histograms whose images are the reference's own, in bits."""

    expected: Array  # (...): its mean
    bound: Array  # (...): exceeded by at most a share LEVEL of them


def chance(total: ArrayLike, squares: ArrayLike, images: ArrayLike, reference: ArrayLike) -> Chance:
    """From `total` `(..., BINS)`, the sum of `images` `(...)` histograms, one an image; NaN below FEWEST_IMAGES.

    `squares` `(..., BINS)` is the sum of their squares, `reference` `(..., BINS)` the counts that they are compared
    with, or shares (of sum 1), which are taken to be exact.

    The channels of an image rise and fall together, so that 20 images of 50 channels are not 1000 independent values:
    the variance of each bin is taken from how the images differ (ultimate clusters). To second order the divergence is
    `sum((p - q)^2 / m) / (8 ln 2)`, m their mean, so these variances give its mean. Its upper tail depends on how the
    bins vary together, which is not kept; but a quadratic form of normal variables of a given mean has no heavier tail
    than the square of one of them (Szekely and Bakirov 2003), which is the bound: 6.6 times the mean, whatever the
    bins do.
    """
    sums, second = np.asarray(total, np.float64), np.asarray(squares, np.float64)
    n = np.asarray(images, np.float64)[..., None]
    known = np.asarray(reference, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = sums.sum(-1, keepdims=True)
        of_reference = known.sum(-1, keepdims=True)
        middle = (sums / values + known / of_reference) / 2
        variance = np.maximum(second - sums * sums / n, 0.0) * n / (n - 1) / values**2  # of a bin's share
        # The reference is a sample too: of as many images as its values are at as many values an image.
        fewer = np.where(of_reference > 1.5, values / of_reference, 0.0)
        mean = np.where(middle > 0, variance * (1 + fewer) / middle, 0.0).sum(-1) / (8 * np.log(2))
    expected = np.where((n[..., 0] >= FEWEST_IMAGES) & (values[..., 0] > 0), mean, np.nan)
    return Chance(expected, expected * float(chdtri(1, LEVEL)))
