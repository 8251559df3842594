"""Class-wise statistics of GAP features: mergeable moments, Welch log p-values, normality, ranks.

NumPy in float64 only; no model, no files. `K` classes, `C` channels throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]
Pair = tuple[Array, Array]  # the number `high + low`, unevaluated; |low| is at most half the last place of high

_BLOCK = 8192  # elements worked on at once, so that the temporaries of a step stay in the processor's cache


class ClassMoments:
    """Count, sum and sum of squares of each channel's GAP feature, per class.

    The sums are pairs of float64 (106 bits; Dekker 1971, Knuth's TwoSum), and the square of a float32 is exact
    in float64. So for float32 features every sum is exact while the features of one class and channel, zeros
    aside, lie within about six decimal orders of each other: any order, split or grouping of the images gives
    the same bits. Features spread wider, and float64 features, leave a relative error near 2^-100 in the sum
    of squares, which `mean()` and `m2()` round away.

    Attributes: `count` `(K,)` int64; `sum`, `sum_low`, `squares`, `squares_low` `(K, C)` float64, where
    `sum + sum_low` is the sum and `squares + squares_low` the sum of squares.
    """

    def __init__(self, classes: int, channels: int) -> None:
        self.count: NDArray[np.int64] = np.zeros(classes, np.int64)
        self.sum: Array = np.zeros((classes, channels))
        self.sum_low: Array = np.zeros((classes, channels))
        self.squares: Array = np.zeros((classes, channels))
        self.squares_low: Array = np.zeros((classes, channels))

    def update(self, features: NDArray[np.floating], rows: NDArray[np.integer]) -> None:
        """Add images: `features` `(B, C)`, `rows` `(B,)` in `0..K-1`."""
        features, rows = np.asarray(features), np.asarray(rows)
        groups = [(int(row), np.flatnonzero(rows == row)) for row in np.unique(rows)]
        for row, images in groups:
            self.count[row] += len(images)
        for columns in _slices(self.sum.shape[1], _BLOCK):
            running = _RunningSums(columns.stop - columns.start)
            for row, images in groups:
                here = self._view(slice(row, row + 1), columns)
                running.start(here)
                for image in images:
                    running.add(features[image, columns])
                running.store(here)

    def add(self, other: ClassMoments, rows: NDArray[np.integer]) -> None:
        """Add in place: row `i` of `other` `(R, C)` to the row `rows[i]` of this; `rows` `(R,)` may repeat."""
        everything = slice(None)
        for source in np.flatnonzero(other.count).tolist():
            here = self._view(slice(rows[source], rows[source] + 1), everything)
            here._set(_add(here, other._view(slice(source, source + 1), everything)))

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of both data sets together, row by row; neither input changes."""
        merged = ClassMoments(*self.sum.shape)
        for part in (self, other):
            merged.add(part, np.arange(len(part.count)))
        return merged

    def columns(self, start: int, stop: int) -> ClassMoments:
        """The channels `start..stop-1`, such as one layer's: a view, no copy."""
        return self._view(slice(None), slice(start, stop))

    def mean(self) -> Array:
        """`(K, C)`, rounded once; NaN for a class without images."""
        result = np.empty_like(self.sum)
        for rows in self._row_blocks():
            part = self._view(rows, slice(None))
            result[rows] = _quotient((part.sum, part.sum_low), part.count[:, None])
        return result

    def m2(self) -> Array:
        """Sum of squared deviations from the mean, `(K, C)`, rounded once; exactly 0 for a constant channel."""
        result = np.empty_like(self.sum)
        for rows in self._row_blocks():
            result[rows] = _m2(self._view(rows, slice(None)))
        return result

    def total(self) -> ClassMoments:
        """All classes together, in one row."""
        total = ClassMoments(1, self.sum.shape[1])
        total.add(self, np.zeros(len(self.count), np.int64))
        return total

    def rest(self) -> ClassMoments:
        """For each class the moments of *all other* classes: the total less the class, exactly."""
        total, rest = self.total(), ClassMoments(*self.sum.shape)
        for rows in self._row_blocks():
            rest._view(rows, slice(None))._set(_subtract(total, self._view(rows, slice(None))))
        return rest

    def _view(self, rows: slice, columns: slice) -> ClassMoments:
        return _moments(
            self.count[rows],
            (self.sum[rows, columns], self.sum_low[rows, columns]),
            (self.squares[rows, columns], self.squares_low[rows, columns]),
        )

    def _set(self, other: ClassMoments) -> None:
        """Take over the values of `other`, of the same shape, in place."""
        self.count[...] = other.count
        self.sum[...], self.sum_low[...] = other.sum, other.sum_low
        self.squares[...], self.squares_low[...] = other.squares, other.squares_low

    def _row_blocks(self) -> Iterator[slice]:
        return _slices(len(self.count), max(1, _BLOCK // max(1, self.sum.shape[1])))


def _moments(count: NDArray[np.int64], sums: Pair, squares: Pair) -> ClassMoments:
    moments = ClassMoments(0, 0)
    moments.count = count
    moments.sum, moments.sum_low = sums
    moments.squares, moments.squares_low = squares
    return moments


def _add(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    return _moments(
        a.count + b.count,
        _add_pairs((a.sum, a.sum_low), (b.sum, b.sum_low)),
        _add_pairs((a.squares, a.squares_low), (b.squares, b.squares_low)),
    )


def _subtract(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    return _moments(
        a.count - b.count,
        _add_pairs((a.sum, a.sum_low), (-b.sum, -b.sum_low)),
        _add_pairs((a.squares, a.squares_low), (-b.squares, -b.squares_low)),
    )


def _m2(moments: ClassMoments) -> Array:
    """(n S2 - S1^2) / n in pairs: the cancellation costs none of the 53 bits that are kept."""
    n = moments.count[:, None].astype(np.float64)
    s1, s1_low = moments.sum, moments.sum_low
    s2, s2_low = moments.squares, moments.squares_low
    spread, spread_low = _two_product(n, s2)
    square, square_low = _two_product(s1, s1)
    m2 = _add_pairs(_two_sum(spread, spread_low + n * s2_low), _two_sum(-square, -square_low - 2 * s1 * s1_low))
    # What is left of a constant is at most the rounding of a pair. No float32 variance is as small: one image
    # that differs in its last bit gives 2^-48 / n of the sum of squares.
    return np.where(m2[0] <= 2.0**-96 * spread, 0.0, _quotient(m2, n))


class _RunningSums:
    """The two sums of one class while images are added, side by side in `(2, C)` arrays, without temporaries."""

    def __init__(self, channels: int) -> None:
        self.high, self.low, self.value, self.total, self.shift = (np.empty((2, channels)) for _ in range(5))

    def start(self, moments: ClassMoments) -> None:
        """From the one row of `moments`."""
        self.high[0], self.high[1] = moments.sum[0], moments.squares[0]
        self.low[0], self.low[1] = moments.sum_low[0], moments.squares_low[0]

    def add(self, features: NDArray[np.floating]) -> None:
        """One image, `(C,)`: TwoSum of `high` and (x, x^2), whose error goes to `low`."""
        self.value[0] = features
        np.multiply(self.value[0], self.value[0], out=self.value[1])
        if features.dtype != np.float32:
            self.low[1] += _two_product(self.value[0], self.value[0])[1]
        self._two_sum(self.value)
        np.add(self.low, self.value, out=self.low)

    def store(self, moments: ClassMoments) -> None:
        """Into the one row of `moments`, each pair in its only normal form."""
        self._two_sum(self.low)
        moments.sum[0], moments.squares[0] = self.high
        moments.sum_low[0], moments.squares_low[0] = self.low

    def _two_sum(self, value: Array) -> None:
        """`high += value`, and `value` becomes the rounding error of that (Knuth)."""
        high, total, shift = self.high, self.total, self.shift
        np.add(high, value, out=total)
        np.subtract(total, high, out=shift)
        np.subtract(value, shift, out=value)
        np.subtract(total, shift, out=shift)
        np.subtract(high, shift, out=high)
        np.add(value, high, out=value)
        self.high, self.total = total, high


def _two_sum(a: Array, b: Array) -> Pair:
    """a + b exactly (Knuth)."""
    total = a + b
    shift = total - a
    return total, (a - (total - shift)) + (b - shift)


def _two_product(a: Array, b: Array) -> Pair:
    """a * b exactly (Dekker; factors beyond 1e300 overflow)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Array) -> Pair:
    """a as the sum of two numbers of 26 bits (Veltkamp)."""
    scaled = 134217729.0 * a  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def _add_pairs(a: Pair, b: Pair) -> Pair:
    """a + b; exact where the sum fits a pair."""
    high, error = _two_sum(a[0], b[0])
    low, low_error = _two_sum(a[1], b[1])
    high, error = _two_sum(high, error + low)
    return _two_sum(high, error + low_error)


def _quotient(a: Pair, n: NDArray[np.integer] | Array) -> Array:
    """a / n rounded once; NaN for n = 0."""
    divisor = np.where(n == 0, np.nan, np.asarray(n, np.float64))
    quotient = a[0] / divisor
    product, error = _two_product(quotient, divisor)
    return np.asarray(quotient + ((a[0] - product) - error + a[1]) / divisor)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def welch_log_p(moments: ClassMoments) -> tuple[Array, Array]:
    """One-sided Welch t-test, class against all other images (method.md section 1).

    Returns `t` and `log p`, each `(K, C)`. Where both sides are constant, p is 0 for a larger mean and 1
    otherwise (`scipy.stats.ttest_ind` gives NaN for equal means: no evidence, so we say p = 1).
    A class with fewer than two images, or fewer than two outside it, has NaN throughout.
    """
    total = moments.total()
    t, log_p = np.empty_like(moments.sum), np.empty_like(moments.sum)
    for rows in moments._row_blocks():
        part = moments._view(rows, slice(None))
        t[rows], log_p[rows] = _welch(part, _subtract(total, part))
    return t, log_p


def _welch(inside: ClassMoments, rest: ClassMoments) -> tuple[Array, Array]:
    n1, n2 = inside.count[:, None].astype(np.float64), rest.count[:, None].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        v1, v2 = _m2(inside) / (n1 - 1) / n1, _m2(rest) / (n2 - 1) / n2
        difference = _quotient((inside.sum, inside.sum_low), n1) - _quotient((rest.sum, rest.sum_low), n2)
        t = np.where(difference == 0, 0.0, difference / np.sqrt(v1 + v2))
        df = (v1 + v2) ** 2 / (v1**2 / (n1 - 1) + v2**2 / (n2 - 1))
    constant = v1 + v2 == 0
    log_p = np.where(constant, np.where(difference > 0, -np.inf, 0.0), log_t_sf(t, np.where(constant, 1.0, df)))
    testable = (n1 >= 2) & (n2 >= 2)
    return np.where(testable, t, np.nan), np.where(testable, log_p, np.nan)


def benjamini_hochberg(log_p: Array) -> Array:
    """log of the Benjamini-Hochberg adjusted p-values within each row, `(K, C)` -> `(K, C)`.

    log q of the i-th smallest is the least of `log p_(j) + log(C / j)` over j >= i, so at most 0 (Benjamini and
    Hochberg 1995; `scipy.stats.false_discovery_control`), in logarithms because p underflows. A row of NaN,
    a class without a test, stays NaN.
    """
    channels = log_p.shape[1]
    order = np.argsort(log_p, axis=1, kind="stable")
    adjusted = np.take_along_axis(log_p, order, axis=1)
    adjusted += np.log(channels / np.arange(1.0, channels + 1))
    adjusted = np.minimum.accumulate(adjusted[:, ::-1], axis=1)[:, ::-1]
    result = np.empty_like(log_p)
    np.put_along_axis(result, order, adjusted, axis=1)
    return result


def log_t_sf(t: Array, df: Array) -> Array:
    """log P(T > t) of Student's t, to full relative accuracy also where p underflows or is next to 1.

    SciPy's tail where it is near; beyond, the logarithm of the incomplete beta function (`_log_far_tail`).
    """
    t, df = np.broadcast_arrays(np.asarray(t, np.float64), np.asarray(df, np.float64))
    distance = np.abs(t)
    far = (distance >= _FAR) & np.isfinite(distance)
    log_tail = np.empty(t.shape)
    log_tail[far] = _log_far_tail(distance[far], df[far])
    with np.errstate(divide="ignore"):
        log_tail[~far] = np.log(special.stdtr(df[~far], -distance[~far]))
    below = t < 0
    log_tail[below] = np.log1p(-np.exp(log_tail[below]))
    return log_tail


_FAR = 8.0  # from here on the continued fraction needs few steps, and is faster than SciPy's tail
_STEPS = 20  # its truncation is then below 20! / 8^40 = 2e-18 of p


def _log_far_tail(t: Array, df: Array) -> Array:
    """log P(T > t) for finite t >= _FAR, from P(T > t) = I_x(a, 1/2) / 2 with a = df / 2, x = df / (df + t^2).

    I_x(a, 1/2) = x^a (1 - x)^(-1/2) F(1/2, 1; a + 1; -df / t^2) / (a B(a, 1/2))  (DLMF 8.17.7, 15.8.1), where F is
    Gauss's continued fraction (DLMF 15.7.1 with b = 0), here from its last step to its first.
    """
    a = df / 2
    ratio = t / np.sqrt(df)
    small = np.minimum(ratio, 1 / ratio)  # the square of a large ratio would overflow
    log_1_plus_square = np.log1p(small * small) + 2 * np.log(np.maximum(ratio, 1.0))
    inverse_square = 1 / ratio / ratio
    fraction = a + _STEPS
    for step in range(_STEPS, 0, -1):
        half = step // 2
        factor = (half + 0.5) * (a + half) if step % 2 else half * (a - 0.5 + half)
        fraction = a + (step - 1) + factor * inverse_square / fraction
    # special.poch(a + 1/2, 1/2) is Gamma(a + 1) / Gamma(a + 1/2), so a B(a, 1/2) / sqrt(pi).
    rest = np.log(ratio * (fraction / a) * special.poch(a + 0.5, 0.5)) + 0.5 * np.log(4 * np.pi)
    return np.asarray((0.5 - a) * log_1_plus_square - rest)


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
