"""Class-wise statistics of GAP features: mergeable moments, Welch log p-values, normality, ranks.

NumPy in float64 only; no model, no files. `K` classes, `C` channels throughout.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]


class ClassMoments:
    """Count, mean and sum of squared deviations of each channel's GAP feature, per class.

    Streaming (`update`) and mergeable (`merge`) by the pairwise formulas of Chan, Golub, LeVeque (1983):
    no cancellation however large the mean, and the same result for any split of the data.

    Attributes: `count` `(K,)`, `mean` `(K, C)`, `m2` `(K, C)`.
    """

    def __init__(self, classes: int, channels: int) -> None:
        self.count: Array = np.zeros(classes)
        self.mean: Array = np.zeros((classes, channels))
        self.m2: Array = np.zeros((classes, channels))

    def update(self, features: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
        """Add images: `features` `(B, C)`, `labels` `(B,)` in `0..K-1`."""
        features = np.asarray(features, dtype=np.float64)
        for label in np.unique(labels):
            rows = features[labels == label]
            # Around the first row, so that a constant channel has exactly no variance.
            mean = rows[0] + (rows - rows[0]).mean(axis=0)
            self._merge_class(int(label), len(rows), mean, ((rows - mean) ** 2).sum(axis=0))

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of both data sets together; neither input changes."""
        merged = ClassMoments(*self.mean.shape)
        for part in (self, other):
            for label in np.flatnonzero(part.count):
                merged._merge_class(int(label), float(part.count[label]), part.mean[label], part.m2[label])
        return merged

    def total(self) -> tuple[float, Array, Array]:
        """Count, mean `(C,)` and m2 `(C,)` over all classes."""
        return _fold(zip(self.count, self.mean, self.m2, strict=True), self.mean.shape[1])[-1]

    def rest(self) -> ClassMoments:
        """For each class the moments of *all other* classes.

        Merged from those before and those after it rather than subtracted from the total: a channel that
        is constant outside one class keeps its exact zero variance there.
        """
        rows = list(zip(self.count, self.mean, self.m2, strict=True))
        channels = self.mean.shape[1]
        before = _fold(rows, channels)
        after = _fold(reversed(rows), channels)[::-1]
        rest = ClassMoments(*self.mean.shape)
        for label in range(len(rows)):
            for count, mean, m2 in (before[label], after[label + 1]):
                rest._merge_class(label, count, mean, m2)
        return rest

    def _merge_class(self, label: int, count: float, mean: Array, m2: Array) -> None:
        here = (float(self.count[label]), self.mean[label], self.m2[label])
        self.count[label], self.mean[label], self.m2[label] = _merge(here, (count, mean, m2))


def welch_log_p(moments: ClassMoments) -> tuple[Array, Array]:
    """One-sided Welch t-test, class against all other images (method.md section 1).

    Returns `t` and `log p`, each `(K, C)`. Where both sides are constant, p is 0 for a larger mean and 1
    otherwise (`scipy.stats.ttest_ind` gives NaN for equal means: no evidence, so we say p = 1).
    A class with fewer than two images, or fewer than two outside it, has NaN throughout.
    """
    rest = moments.rest()
    n1, n2 = moments.count[:, None], rest.count[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        v1, v2 = moments.m2 / (n1 - 1) / n1, rest.m2 / (n2 - 1) / n2
        difference = moments.mean - rest.mean
        t = np.where(difference == 0, 0.0, difference / np.sqrt(v1 + v2))
        df = (v1 + v2) ** 2 / (v1**2 / (n1 - 1) + v2**2 / (n2 - 1))
    constant = v1 + v2 == 0
    log_p = np.where(constant, np.where(difference > 0, -np.inf, 0.0), log_t_sf(t, np.where(constant, 1.0, df)))
    testable = (n1 >= 2) & (n2 >= 2)
    return np.where(testable, t, np.nan), np.where(testable, log_p, np.nan)


def log_t_sf(t: Array, df: Array) -> Array:
    """log P(T > t) of Student's t, also where `scipy.stats.t.logsf` underflows to -inf.

    The tail is `I_x(df/2, 1/2) / 2` with `x = df / (df + t^2)`; where SciPy's value vanishes, the continued
    fraction of the incomplete beta function (DLMF 8.17.22) is taken in logarithms.
    """
    t, df = np.broadcast_arrays(np.asarray(t, np.float64), np.asarray(df, np.float64))
    with np.errstate(divide="ignore"):
        result = np.log(stats.t.sf(t, df))
    # Below the smallest normal double SciPy's value has lost digits.
    far = np.isfinite(t) & (result < -690.0)
    result[far] = _log_t_sf_far(t[far], df[far])
    return np.asarray(result)


def normality_p(features: NDArray[np.floating]) -> Array:
    """Shapiro-Wilk p-value of each channel, `(n, C)` -> `(C,)`; 3 <= n <= 5000 (SciPy's range).

    A constant channel is not normal: its p-value is 0 (SciPy warns and says 1).
    """
    features = np.asarray(features, np.float64)
    if not 3 <= len(features) <= 5000:
        raise ValueError(f"Shapiro-Wilk needs 3 to 5000 images, got {len(features)}")
    varying = np.ptp(features, axis=0) > 0
    p = np.zeros(features.shape[1])
    if varying.any():
        p[varying] = stats.shapiro(features[:, varying], axis=0).pvalue
    return p


def ranks(log_p: Array, t: Array) -> NDArray[np.int16]:
    """Order of the channels within each class, `(K, C)`; 0 is the smallest log p.

    Ties go to the larger t, then to the lower channel index. int16 holds every real layer's width.
    """
    if log_p.shape[1] > np.iinfo(np.int16).max:
        raise ValueError(f"a layer has {log_p.shape[1]} channels; ranks hold at most {np.iinfo(np.int16).max}")
    order = np.lexsort((-t, log_p), axis=1)  # stable: equal keys keep the channel order
    rank = np.empty(order.shape, np.int16)
    np.put_along_axis(rank, order, np.arange(order.shape[1], dtype=np.int16)[None, :], axis=1)
    return rank


_Moments = tuple[float, Array, Array]


def _merge(a: _Moments, b: _Moments) -> _Moments:
    """Chan et al.: count, mean and m2 of two disjoint sets together."""
    (n1, mean1, m1), (n2, mean2, m2) = a, b
    if n2 == 0:
        return a
    if n1 == 0:
        return b
    n = n1 + n2
    delta = mean2 - mean1
    return n, mean1 + delta * (n2 / n), m1 + m2 + delta**2 * (n1 * n2 / n)


def _fold(rows: Iterable[_Moments], channels: int) -> list[_Moments]:
    """Running merges: element i holds the first i rows."""
    running: list[_Moments] = [(0.0, np.zeros(channels), np.zeros(channels))]
    for row in rows:
        running.append(_merge(running[-1], row))
    return running


def _log_t_sf_far(t: Array, df: Array) -> Array:
    a, b, x = df / 2, 0.5, df / (df + t * t)
    log_front = -a * np.log1p(t * t / df) + b * np.log(t * t / (df + t * t)) - np.log(a) - special.betaln(a, b)
    return np.asarray(log_front + np.log(_beta_fraction(a, b, x)) - np.log(2.0))


def _beta_fraction(a: Array, b: float, x: Array) -> Array:
    """Continued fraction of the incomplete beta function, by the modified Lentz method."""
    tiny = 1e-300
    c = np.ones_like(x)
    d = 1 / _nonzero(1 - (a + b) * x / (a + 1), tiny)
    value = d.copy()
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = np.ones_like(x)
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d, tiny)
            c = _nonzero(1 + term / c, tiny)
            step = c * d
            value *= step
        if np.all(np.abs(step - 1) < 1e-15):
            break
    return value


def _nonzero(value: Array, tiny: float) -> Array:
    return np.where(np.abs(value) < tiny, tiny, value)
