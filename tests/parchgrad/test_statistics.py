"""Streaming moments, Welch log p-values, normality and ranks against SciPy on the whole data and mpmath."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from parchgrad.statistics import ClassMoments, log_t_sf, normality_p, ranks, welch_log_p
from tests.oracles import selection
from tests.oracles.tolerance import assert_close

CLASSES, CHANNELS = 3, 4


def data(images=60, seed=0, shift=0.4):
    """Non-negative GAP-like features with unequal class sizes, means and variances."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(CLASSES, images, p=[0.5, 0.3, 0.2])
    labels[: 2 * CLASSES] = np.arange(2 * CLASSES) % CLASSES
    spread = 0.5 + labels[:, None] + np.arange(CHANNELS)
    features = np.abs(generator.normal(shift * labels[:, None] * np.arange(CHANNELS), spread))
    return features, labels


def moments_of(features, labels, classes=CLASSES):
    moments = ClassMoments(classes, features.shape[1])
    moments.update(features, labels)
    return moments


def assert_moments(moments, features, labels, relative=1e-12):
    """Against numpy on all images of each class at once."""
    for c in range(CLASSES):
        rows = features[labels == c]
        assert moments.count[c] == len(rows)
        if len(rows):
            assert_close(moments.mean[c], rows.mean(0), relative)
            assert_close(moments.m2[c], rows.var(0) * len(rows), relative)


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 60), max_size=5), order_seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_split_in_any_order_gives_the_same_moments(seed, cuts, order_seed):
    features, labels = data(seed=seed)
    shuffle = np.random.default_rng(order_seed).permutation(len(labels))
    pieces = np.split(shuffle, sorted(cuts))
    streamed, merged = ClassMoments(CLASSES, CHANNELS), ClassMoments(CLASSES, CHANNELS)
    for piece in pieces:
        streamed.update(features[piece], labels[piece])
        merged = moments_of(features[piece], labels[piece]).merge(merged)
    assert_moments(streamed, features, labels)
    assert_moments(merged, features, labels)


def test_one_image_at_a_time_equals_all_at_once():
    features, labels = data()
    moments = ClassMoments(CLASSES, CHANNELS)
    for row, label in zip(features, labels, strict=True):
        moments.update(row[None], np.array([label]))
    assert_moments(moments, features, labels)


def test_merge_is_symmetric_and_leaves_its_inputs():
    features, labels = data()
    first, second = moments_of(features[:25], labels[:25]), moments_of(features[25:], labels[25:])
    assert_moments(first.merge(second), features, labels)
    assert_moments(second.merge(first), features, labels)
    assert_moments(first, features[:25], labels[:25])
    assert_moments(second, features[25:], labels[25:])


def test_a_large_mean_costs_no_digits():
    """Sum and sum of squares would cancel: variance 1 on a mean of 1e7 is 1e-14 of the square."""
    features, labels = data()
    features = features + 1e7
    moments = ClassMoments(CLASSES, CHANNELS)
    for start in range(0, 60, 7):
        moments.update(features[start : start + 7], labels[start : start + 7])
    assert_moments(moments, features, labels, 1e-7)


def test_float32_features_are_accumulated_in_float64():
    generator = np.random.default_rng(0)
    features = generator.random((4000, CHANNELS), dtype=np.float32)
    labels = np.zeros(4000, int)
    moments = ClassMoments(1, CHANNELS)
    for start in range(0, 4000, 10):
        moments.update(features[start : start + 10], labels[start : start + 10])
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    assert_close(moments.mean[0], features.astype(np.float64).mean(0), 1e-13)
    assert_close(moments.m2[0], features.astype(np.float64).var(0) * 4000, 1e-12)


def test_rest_is_everyone_else():
    features, labels = data()
    rest = moments_of(features, labels).rest()
    for c in range(CLASSES):
        rows = features[labels != c]
        assert rest.count[c] == len(rows)
        assert_close(rest.mean[c], rows.mean(0), 1e-13)
        assert_close(rest.m2[c], rows.var(0) * len(rows), 1e-12)


def test_rest_has_exactly_no_spread_where_all_others_are_dead():
    """A channel alive in one class only: subtracting from a total would leave rounding noise as its variance."""
    features, labels = data()
    features[labels != 1, 2] = 0.0
    rest = moments_of(features, labels).rest()
    assert rest.m2[1, 2] == 0.0
    assert rest.mean[1, 2] == 0.0
    assert rest.m2[0, 2] > 0.0


@pytest.mark.parametrize("images", [12, 60, 400])
@pytest.mark.parametrize("seed", range(3))
def test_welch_equals_scipy(images, seed):
    features, labels = data(images, seed)
    t, log_p = welch_log_p(moments_of(features, labels))
    for c in range(CLASSES):
        expected_t, expected = selection.welch(features, labels, c)
        assert_close(t[c], expected_t, 1e-9)
        np.testing.assert_allclose(log_p[c], expected, rtol=1e-9, atol=1e-15)  # p near 1 has no more digits
        direct = scipy.stats.ttest_ind(
            features[labels == c], features[labels != c], equal_var=False, alternative="greater"
        )
        np.testing.assert_allclose(np.exp(log_p[c]), direct.pvalue, rtol=1e-9, atol=1e-300)


def test_welch_is_not_students_test_here():
    """Guards the test above: with equal variances and sizes the two would agree."""
    features, labels = data()
    student = scipy.stats.ttest_ind(features[labels == 2], features[labels != 2], alternative="greater")
    _, log_p = welch_log_p(moments_of(features, labels))
    assert np.all(np.abs(log_p[2] - np.log(student.pvalue)) > 1e-3)


def test_welch_is_one_sided():
    """A class whose mean is lower is no evidence for the channel."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    features = generator.normal(labels[:, None] * 3.0, 1.0, (100, 1))
    t, log_p = welch_log_p(moments_of(features, labels, 2))
    assert t[1, 0] > 5
    assert log_p[1, 0] < -20
    assert t[0, 0] < -5
    assert -1e-6 < log_p[0, 0] <= 0


def test_far_tails_keep_their_order_and_equal_mpmath():
    """Beyond p = 1e-308 the order of channels must come from log p, not from a tie at -inf."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [3000, 3000])
    features = generator.normal(0.0, 1.0, (6000, 3)) + labels[:, None] * np.array([2.0, 2.5, 4.0])
    _, log_p = welch_log_p(moments_of(features, labels, 2))
    _, expected = selection.welch(features, labels, 1)
    assert np.all(np.isfinite(log_p[1]))
    assert log_p[1, 0] > log_p[1, 1] > log_p[1, 2]
    assert log_p[1, 2] < -745
    np.testing.assert_allclose(log_p[1], expected, rtol=1e-9)


@pytest.mark.parametrize("df", [1.0, 1.5, 7.3, 100.0, 5000.0, 250_000.0])
@pytest.mark.parametrize("t", [-40.0, -3.0, 0.0, 1e-3, 0.7, 5.0, 38.0, 38.25, 41.0, 60.0, 400.0, 1e5, 1e30])
def test_log_t_sf_equals_mpmath(t, df):
    actual = float(log_t_sf(np.array([t]), np.array([df]))[0])
    expected = selection.log_t_sf(t, df)
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_log_t_sf_is_continuous_and_falling_across_the_change_of_formula():
    t = np.linspace(30.0, 60.0, 3001)
    log_p = log_t_sf(t, np.full_like(t, 800.0))
    steps = np.diff(log_p)
    assert np.all(steps < 0)
    assert np.all(np.abs(np.diff(steps)) < 1e-3)


def test_log_t_sf_broadcasts_and_leaves_its_inputs():
    t = np.array([[1.0], [90.0]])
    t.setflags(write=False)
    assert log_t_sf(t, np.array([3.0, 50.0, 9e4])).shape == (2, 3)


@pytest.mark.parametrize("batch", [1, 3, 30])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1e-5, 7.7])
def test_a_channel_constant_everywhere_is_no_evidence(value, batch):
    """Dead channels, however the stream was cut: no NaN, and no significance out of rounding."""
    features, labels = data()
    features[:, 1] = value
    moments = ClassMoments(CLASSES, CHANNELS)
    for start in range(0, len(labels), batch):
        moments.update(features[start : start + batch], labels[start : start + batch])
    _, log_p = welch_log_p(moments)
    assert log_p[:, 1].tolist() == [0.0] * CLASSES


def test_constant_on_both_sides_with_a_larger_mean_is_certain():
    labels = np.repeat([0, 1], 4)
    features = np.tile((labels == 1).astype(float)[:, None], (1, CHANNELS))
    t, log_p = welch_log_p(moments_of(features, labels, 2))
    assert np.all(log_p[1] == -np.inf)
    assert np.all(log_p[0] == 0.0)
    assert not np.any(np.isnan(t))


def test_a_class_of_one_image_has_no_test():
    features, labels = data()
    labels[labels == 2] = 0
    labels[5] = 2
    t, log_p = welch_log_p(moments_of(features, labels))
    assert np.all(np.isnan(log_p[2]))
    assert np.all(np.isnan(t[2]))
    assert np.all(np.isfinite(log_p[:2]))


@pytest.mark.parametrize("scale", [1e-12, 1e9], ids=lambda s: f"x{s:g}")
def test_welch_does_not_know_the_features_scale(scale):
    features, labels = data()
    _, expected = welch_log_p(moments_of(features, labels))
    _, log_p = welch_log_p(moments_of(features * scale, labels))
    np.testing.assert_allclose(log_p, expected, rtol=1e-9)


@pytest.mark.parametrize("images", [3, 20, 500])
def test_normality_equals_shapiro_channel_by_channel(images):
    generator = np.random.default_rng(1)
    features = np.stack([generator.normal(5, 1, images), generator.exponential(1, images), generator.random(images)], 1)
    np.testing.assert_allclose(normality_p(features), selection.normality_p(features), rtol=1e-9)
    if images == 500:
        assert normality_p(features)[0] > 0.05 > normality_p(features)[1]


def test_a_constant_channel_is_not_normal_and_does_not_warn():
    features = np.concatenate([np.zeros((30, 1)), np.random.default_rng(0).normal(size=(30, 1))], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = normality_p(features)
    assert p[0] == 0.0
    assert p[1] > 0.0


@pytest.mark.parametrize("images", [2, 5001])
def test_normality_refuses_counts_scipy_cannot_judge(images):
    with pytest.raises(ValueError, match=f"3 to 5000 images, got {images}"):
        normality_p(np.ones((images, 2)))


def test_ranks_break_ties_by_t_then_by_channel():
    log_p = np.array([[-1.0, -5.0, -5.0, -5.0, 0.0, 0.0]])
    t = np.array([[1.0, 7.0, 9.0, 7.0, 0.0, 0.0]])
    assert ranks(log_p, t).tolist() == [[3, 1, 0, 2, 4, 5]]


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ranks_equal_the_sorted_loop(seed):
    generator = np.random.default_rng(seed)
    log_p = -generator.integers(0, 4, (3, 12)).astype(float)
    t = generator.integers(0, 3, (3, 12)).astype(float)
    expected = [selection.ranks(log_p[c], t[c]) for c in range(3)]
    assert ranks(log_p, t).tolist() == expected


def test_ranks_put_minus_infinity_first_and_channels_without_a_test_last():
    log_p = np.array([[math.nan, -3.0, -math.inf, 0.0]])
    t = np.array([[math.nan, 2.0, math.inf, 0.0]])
    assert ranks(log_p, t).tolist() == [[3, 1, 0, 2]]
