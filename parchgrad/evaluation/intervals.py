"""Bootstrap intervals of a mean over maps, and of its difference from a baseline's on the same maps.

Images are drawn, not maps: all maps of an image come along with it, for they resemble each other. Intervals are
for other images drawn as these were.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from parchgrad.errors import DataError, OptionError

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9999
# Numbers drawn at a time: bounds memory, not results.
DRAWN_TOGETHER = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean over maps and its bootstrap interval.

    method: `bca` (bias-corrected and accelerated, Efron 1987), `percentile` (where BCa is not defined: see
    `mean_interval`) or `none`: fewer than two images, so low and high are NaN.
    """

    mean: float
    low: float
    high: float
    maps: int  # values that count
    images: int  # that they come from
    left_out: int  # values that are NaN, or whose baseline's is
    method: str


def mean_interval(
    values: ArrayLike,
    images: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The mean of `values`, `(n,)`, one of each map, and its interval; `images` names the image of each map.

    The mean is over maps. Of each of `resamples` draws of as many images as there are, with repetition, it is the sum
    of the values drawn over their number; without `images` each map is an image of its own. NaN means "not measured":
    such values are left out and counted, not taken as 0; a mean of nothing is NaN. The same seed gives the same
    interval.

    BCa has no value where the values, or the images' means, are all equal, and where the mean lies at or beyond the
    end of what was drawn, as with very few images or resamples. Then the interval is the draws' percentiles. Of
    equal values it has no width: that none was seen to vary, not that none would.

    Raises DataError for values that are infinite or not as many as `images`, OptionError for the options.
    """
    numbers = _numbers("Values", values)
    return _interval(numbers, images, seed, resamples, confidence)


def difference_interval(
    values: ArrayLike,
    baseline: ArrayLike,
    images: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The mean of `values - baseline`, map by map, and its interval: how much better than the baseline.

    Both are of the same maps in the same order; a pair in which either is NaN is left out. An interval without 0
    is a difference beyond chance; two methods' own intervals may overlap all the same, as an image hard for one
    is hard for both. Otherwise as `mean_interval`.
    """
    ours, theirs = _numbers("Values", values), _numbers("Baseline's values", baseline)
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} values and {len(theirs)} of the baseline; expected as many, map by map.")
    return _interval(ours - theirs, images, seed, resamples, confidence)


def _numbers(what: str, values: ArrayLike) -> Floats:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1:
        raise DataError(f"{what} have shape {numbers.shape}; expected (maps,).")
    if np.isinf(numbers).any():
        raise DataError(f"{what} have {int(np.isinf(numbers).sum())} that are infinite; expected finite ones or NaN.")
    return numbers


def _interval(
    values: Floats, images: Sequence[Hashable] | None, seed: int, resamples: int, confidence: float
) -> Interval:
    if not 0 < confidence < 1:
        raise OptionError("confidence", confidence, "between 0 and 1")
    if resamples < 2:
        raise OptionError("resamples", resamples, "an integer from 2")
    if images is not None and len(images) != len(values):
        raise DataError(f"{len(values)} values of {len(images)} images; expected the image of each value.")
    there = ~np.isnan(values)
    left_out = int((~there).sum())
    used = values[there]
    sums, counts = _by_image(used, None if images is None else list(compress(images, there)))
    mean = float(used.mean()) if len(used) else float("nan")
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"), len(used), len(sums), left_out, "none")
    if (used == used[0]).all():
        # Sums of equal values round differently: their draws would differ by that.
        return Interval(float(used[0]), float(used[0]), float(used[0]), len(used), len(sums), left_out, "percentile")
    low, high, method = _drawn(sums, counts, seed, resamples, confidence)
    return Interval(mean, low, high, len(used), len(sums), left_out, method)


def _by_image(values: Floats, images: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Of each image, in the order of their first maps: the sum of its values, and how many they are."""
    if images is None:
        return values, np.ones_like(values)
    numbers: dict[Hashable, int] = {}
    which = np.array([numbers.setdefault(image, len(numbers)) for image in images], np.intp)
    sums = np.bincount(which, values, len(numbers)).astype(np.float64)
    return sums, np.bincount(which, minlength=len(numbers)).astype(np.float64)


def _drawn(sums: Floats, counts: Floats, seed: int, resamples: int, confidence: float) -> tuple[float, float, str]:
    """Low, high and the method."""

    def mean(sums: Floats, counts: Floats, axis: int) -> Floats:
        found: Floats = sums.sum(axis=axis) / counts.sum(axis=axis)
        return found

    settings: dict[str, Any] = {
        "paired": True,
        "vectorized": True,
        "confidence_level": confidence,
        "batch": max(1, DRAWN_TOGETHER // len(sums)),
    }
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # That BCa is not defined is what the method says.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (sums, counts), mean, n_resamples=resamples, method="BCa", rng=np.random.default_rng(seed), **settings
        )
        method = "bca"
        if not np.isfinite(found.confidence_interval).all():
            # Of the same draws.
            found = stats.bootstrap(
                (sums, counts), mean, n_resamples=0, method="percentile", bootstrap_result=found, **settings
            )
            method = "percentile"
    low, high = found.confidence_interval
    return float(low), float(high), method
