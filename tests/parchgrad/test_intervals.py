"""Bootstrap intervals against a plain loop, and how often they hold what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from parchgrad.errors import DataError, OptionError
from parchgrad.evaluation.intervals import difference_interval, mean_interval


def skewed(count, seed=0):
    return np.random.default_rng(seed).exponential(size=count)


def bca_loop(values, images, seed, resamples, confidence=0.95):
    """Efron's interval of the mean over maps, image by image; the formulas of Efron & Tibshirani 1993, 14.3."""
    groups = [[v for v, image in zip(values, images, strict=True) if image == name] for name in dict.fromkeys(images)]

    def mean(chosen):
        maps = [value for number in chosen for value in groups[number]]
        return math.fsum(maps) / len(maps)

    generator = np.random.default_rng(seed)
    everything = range(len(groups))
    drawn = np.array([mean(generator.integers(0, len(groups), len(groups))) for _ in range(resamples)])
    whole = mean(everything)
    z0 = stats.norm.ppf(((drawn < whole).mean() + (drawn <= whole).mean()) / 2)
    left_one_out = np.array([mean([number for number in everything if number != left]) for left in everything])
    away = left_one_out.mean() - left_one_out
    a = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = []
    for z in stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2]):
        ends.append(np.quantile(drawn, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))
    return whole, *ends


def test_an_interval_is_efrons_bca():
    values = skewed(40)
    found = mean_interval(values, seed=3, resamples=500)
    mean, low, high = bca_loop(values, range(40), 3, 500)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), rel=1e-9)
    assert (found.maps, found.images, found.left_out, found.method) == (40, 40, 0, "bca")
    # Not the percentiles', which a skewed mean's is not: it lies farther to the right.
    plain = stats.bootstrap((values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(3))
    assert found.low > plain.confidence_interval.low
    assert found.high > plain.confidence_interval.high


def test_maps_of_one_image_stay_together():
    images = ["a", "b", "c", "a", "d", "e", "a", "f", "g", "h", "b", "i"]
    values = skewed(12)
    found = mean_interval(values, images, seed=5, resamples=400)
    assert (found.mean, found.low, found.high) == pytest.approx(bca_loop(values, images, 5, 400), rel=1e-9)
    assert found.mean == pytest.approx(values.mean())
    assert (found.maps, found.images) == (12, 9)


def test_four_copies_of_each_image_tell_no_more_than_one():
    values = skewed(30)
    one = mean_interval(values, seed=1)
    copies, images = np.repeat(values, 4), np.repeat(np.arange(30), 4).tolist()
    together = mean_interval(copies, images, seed=1)
    assert (together.mean, together.low, together.high) == pytest.approx((one.mean, one.low, one.high), rel=1e-9)
    apart = mean_interval(copies, seed=1)
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / 2, rel=0.15)


def test_95_percent_of_intervals_hold_the_mean():
    """Of 400, binomial: 0.93 in the long run (skewed, 40 values) may be 0.89 to 0.97 with four standard errors."""
    held = sum(
        found.low <= 1.0 <= found.high
        for found in (mean_interval(skewed(40, seed), seed=seed, resamples=499) for seed in range(400))
    )
    assert 0.89 < held / 400 < 0.97


def test_a_seed_repeats_an_interval():
    values = skewed(25)
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4)
    assert mean_interval(values, seed=4) != mean_interval(values, seed=5)
    assert mean_interval(values, seed=4) == mean_interval(values.tolist(), list(range(25)), seed=4)


def test_a_higher_confidence_is_wider():
    values = skewed(25)
    usual, high = mean_interval(values), mean_interval(values, confidence=0.99)
    assert high.low < usual.low < usual.mean < usual.high < high.high
    shifted = mean_interval(values + 7)
    assert (shifted.low, shifted.high) == pytest.approx((usual.low + 7, usual.high + 7), rel=1e-9)


def test_a_difference_is_map_by_map():
    """Images differ much, methods little: one's interval holds the other's mean, the difference's has no 0."""
    hard = np.random.default_rng(1).normal(0, 1, 60)
    baseline = hard + np.random.default_rng(2).normal(0, 0.05, 60)
    ours = hard + np.random.default_rng(3).normal(0.1, 0.05, 60)
    found = difference_interval(ours, baseline, seed=2)
    assert found == mean_interval(ours - baseline, seed=2)
    assert found.low > 0
    alone = mean_interval(baseline)
    assert alone.low < ours.mean() < alone.high
    back = difference_interval(baseline, ours, seed=2)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.01)


def test_nan_is_left_out_and_counted():
    values = skewed(30)
    holes = np.insert(values, [4, 9, 9], np.nan)
    images = [*range(4), 100, *range(4, 9), 101, 102, *range(9, 30)]
    found = mean_interval(holes, images, seed=6)
    plain = mean_interval(values, seed=6)
    assert (found.mean, found.low, found.high) == (plain.mean, plain.low, plain.high)
    assert (found.maps, found.images, found.left_out) == (30, 30, 3)

    images = ["a", "b", "b", "c", "c", "c", "d", "e"]
    found = mean_interval([math.nan, 1, 2, math.nan, 4, 5, 9, 7], images, seed=6)
    plain = mean_interval([1, 2, 4, 5, 9, 7], ["b", "b", "c", "c", "d", "e"], seed=6)
    assert (found.low, found.high, found.images) == (plain.low, plain.high, 4)

    ours, baseline = skewed(30, 1), skewed(30, 2)
    ours[3], baseline[[3, 8]] = np.nan, np.nan
    there = [i for i in range(30) if i not in (3, 8)]
    found, plain = difference_interval(ours, baseline), mean_interval((ours - baseline)[there])
    assert (found.mean, found.low, found.high) == (plain.mean, plain.low, plain.high)
    assert (found.maps, found.left_out) == (28, 2)


def test_where_bca_has_no_value_it_is_the_percentiles():
    equal = mean_interval([0.1] * 11, ["a"] * 3 + ["b"] * 7 + ["c"])  # whose sums round differently
    assert (equal.mean, equal.low, equal.high, equal.method) == (0.1, 0.1, 0.1, "percentile")
    # Both draws lie on one side of the mean.
    values = skewed(5, 3)
    found = mean_interval(values, resamples=2, seed=3)
    drawn = values[np.random.default_rng(3).integers(0, 5, (2, 5))].mean(axis=1)
    assert (drawn < values.mean()).all() or (drawn > values.mean()).all()
    assert found.method == "percentile"
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    # Images of one mean, though the maps differ.
    found = mean_interval([1.0, 3.0, 0.5, 3.5], ["a", "a", "b", "b"])
    assert (found.mean, found.low, found.high, found.method) == (2.0, 2.0, 2.0, "percentile")
    hits = mean_interval([1.0] * 7 + [0.0] * 3)
    assert hits.method == "bca"
    assert 0 <= hits.low < 0.7 < hits.high <= 1


@pytest.mark.parametrize(
    ("values", "images", "mean"),
    [([], None, math.nan), ([math.nan], None, math.nan), ([2.0], None, 2.0), ([2.0, 4.0], ["a", "a"], 3.0)],
)
def test_fewer_than_two_images_have_no_interval(values, images, mean):
    found = mean_interval(values, images)
    assert found.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.method == "none"
    assert found.images == len(set(images or [])) or found.images == found.maps


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="2 that are infinite"):
        mean_interval([1.0, math.inf, -math.inf])
    with pytest.raises(DataError, match=r"shape \(2, 1\); expected \(maps,\)"):
        mean_interval([[1.0], [2.0]])
    with pytest.raises(DataError, match="3 values of 2 images"):
        mean_interval([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(DataError, match="2 values and 3 of the baseline"):
        difference_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(OptionError, match="confidence"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(OptionError, match="resamples"):
        mean_interval([1.0, 2.0], resamples=1)
