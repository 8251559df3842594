"""Streaming moments, Welch log p-values, normality and ranks against SciPy on the whole data and mpmath."""

import math
import warnings
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from parchgrad.statistics import ClassMoments, benjamini_hochberg, log_t_sf, normality_p, ranks, welch_log_p
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
            assert_close(moments.mean()[c], rows.mean(0), relative)
            assert_close(moments.m2()[c], rows.var(0) * len(rows), relative)


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


FIELDS = ("count", "sum", "sum_low", "squares", "squares_low")


def same_bits(a, b):
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def cut_up(features, labels, cuts, generator):
    """The same images shuffled, in pieces: streamed, merged as a left fold, and added in a random order."""
    shuffle = generator.permutation(len(labels))
    pieces = [(features[piece], labels[piece]) for piece in np.split(shuffle, sorted(cuts))]
    streamed = ClassMoments(CLASSES, features.shape[1])
    merged, added = ClassMoments(CLASSES, features.shape[1]), ClassMoments(CLASSES, features.shape[1])
    for piece in pieces:
        streamed.update(*piece)
        merged = moments_of(*piece).merge(merged)
    for number in generator.permutation(len(pieces)):
        rows = generator.permutation(CLASSES)
        places = np.argsort(rows)  # the part's row i is class rows[i]
        part = moments_of(pieces[number][0], places[pieces[number][1]])
        added.add(part, rows)
    return streamed, merged, added


@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_float32_features_give_the_same_bits_however_they_are_cut_up(seed, cuts):
    """Features over nine decimal orders, some zero or constant: mean, m2 and log p know no order."""
    generator = np.random.default_rng(seed)
    _, labels = data(seed=seed)
    features = (10 ** generator.uniform(-6, 3, (60, 6))).astype(np.float32)
    features[:, 1] *= generator.random(60) < 0.3
    features[:, 2] = features[0, 2]
    features[:, 3] = np.where(labels == 1, features[:, 3], features[0, 3])
    features[:, 4] = generator.normal(1e-3, 1, 60)
    whole = moments_of(features, labels)
    t, log_p = welch_log_p(whole)
    for moments in cut_up(features, labels, cuts, generator):
        assert np.array_equal(moments.count, whole.count)
        assert np.array_equal(moments.mean(), whole.mean())
        assert np.array_equal(moments.m2(), whole.m2())
        assert np.array_equal(welch_log_p(moments), (t, log_p))
    assert np.all(whole.m2()[:, 2] == 0)
    assert np.all(whole.rest().m2()[:, 2] == 0)
    assert whole.rest().m2()[1, 3] == 0


@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_sums_themselves_are_the_same_bits_within_five_orders(seed, cuts):
    generator = np.random.default_rng(seed)
    _, labels = data(seed=seed)
    features = (10 ** generator.uniform(-4, 1, (60, 3))).astype(np.float32)
    whole = moments_of(features, labels)
    for moments in cut_up(features, labels, cuts, generator):
        assert same_bits(moments, whole)


def exact(features):
    """Mean and sum of squared deviations of each column in rational arithmetic, each rounded once."""
    means, spreads = [], []
    for column in np.asarray(features, np.float64).T:
        values = [Fraction(value) for value in column.tolist()]
        mean = sum(values) / len(values)
        means.append(float(mean))
        spreads.append(float(sum((value - mean) ** 2 for value in values)))
    return np.array(means), np.array(spreads)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6], ids=lambda offset: f"offset {offset:g}")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_mean_and_m2_are_the_exact_values_rounded_once(seed, dtype, offset):
    """No digit lost to a large mean, in one class or in the rest, whatever the features' type."""
    features, labels = data(40, seed)
    features = (features + offset).astype(dtype)
    moments = moments_of(features, labels)
    for c in range(CLASSES):
        for part, chosen in ((moments, labels == c), (moments.rest(), labels != c)):
            mean, m2 = exact(features[chosen])
            assert np.array_equal(part.mean()[c], mean)
            assert np.array_equal(part.m2()[c], m2)
    mean, m2 = exact(features)
    assert np.array_equal(moments.total().mean()[0], mean)
    assert np.array_equal(moments.total().m2()[0], m2)


def test_signed_features_that_cancel_are_summed_exactly():
    features = np.array([[1e8], [1.0], [-1e8], [1e-6], [-1.0]], np.float32)
    moments = moments_of(features, np.zeros(5, int), 1)
    assert moments.mean()[0, 0] == float(Fraction(float(np.float32(1e-6))) / 5)
    assert same_bits(moments, moments_of(features[::-1], np.zeros(5, int), 1))


def test_a_class_without_images_has_no_mean():
    moments = ClassMoments(2, 3)
    assert np.all(np.isnan(moments.mean()))
    assert np.all(moments.m2() == 0)


def test_columns_are_a_view_and_know_only_themselves():
    features, labels = data()
    moments = moments_of(features, labels)
    layer = moments.columns(1, 3)
    assert same_bits(layer, moments_of(features[:, 1:3], labels))
    assert np.shares_memory(layer.squares_low, moments.squares_low)
    for of_layer, of_all in zip(welch_log_p(layer), welch_log_p(moments), strict=True):
        assert np.array_equal(of_layer, of_all[:, 1:3])


def test_add_puts_rows_where_it_is_told_and_leaves_its_input():
    features, labels = data()
    moments, other = moments_of(features, labels), moments_of(features, labels)
    moments.add(other, np.array([2, 2, 0]))
    assert same_bits(other, moments_of(features, labels))
    places = np.array([2, 2, 0])
    expected = moments_of(np.tile(features, (2, 1)), np.concatenate([labels, places[labels]]))
    assert moments.count.tolist() == expected.count.tolist()
    assert np.array_equal(moments.mean(), expected.mean())
    assert np.array_equal(moments.m2(), expected.m2())


def test_wide_moments_equal_their_channels_one_by_one():
    """More channels, and more rows, than are worked on at once."""
    generator = np.random.default_rng(0)
    labels = np.arange(24) % 4
    features = generator.random((24, 20_000), dtype=np.float32) + (labels[:, None] == 1)
    moments = moments_of(features, labels, 4)
    chosen = [0, 8191, 8192, 16_384, 19_999]
    few = moments_of(features[:, chosen], labels, 4)
    for wide, narrow in zip(
        (moments.mean(), moments.m2(), *welch_log_p(moments)), (few.mean(), few.m2(), *welch_log_p(few)), strict=True
    ):
        assert np.array_equal(wide[:, chosen], narrow)
    tall = moments_of(features[:, :2].repeat(500, axis=0), np.arange(12_000), 12_000)
    assert np.array_equal(tall.mean(), features[:, :2].repeat(500, axis=0).astype(float))


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
    for c in range(CLASSES):
        mean, m2 = exact(features[labels == c])
        assert np.array_equal(moments.mean()[c], mean)
        assert np.array_equal(moments.m2()[c], m2)


def test_float32_features_are_accumulated_in_float64():
    generator = np.random.default_rng(0)
    features = generator.random((4000, CHANNELS), dtype=np.float32)
    labels = np.zeros(4000, int)
    moments = ClassMoments(1, CHANNELS)
    for start in range(0, 4000, 10):
        moments.update(features[start : start + 10], labels[start : start + 10])
    assert moments.mean().dtype == moments.m2().dtype == np.float64
    assert_close(moments.mean()[0], features.astype(np.float64).mean(0), 1e-13)
    assert_close(moments.m2()[0], features.astype(np.float64).var(0) * 4000, 1e-12)


def test_rest_is_everyone_else():
    features, labels = data()
    rest = moments_of(features, labels).rest()
    for c in range(CLASSES):
        rows = features[labels != c]
        assert rest.count[c] == len(rows)
        assert_close(rest.mean()[c], rows.mean(0), 1e-13)
        assert_close(rest.m2()[c], rows.var(0) * len(rows), 1e-12)


def test_rest_has_exactly_no_spread_where_all_others_are_dead():
    """A channel alive in one class only: subtracting from a total would leave rounding noise as its variance."""
    features, labels = data()
    features[labels != 1, 2] = 0.0
    rest = moments_of(features, labels).rest()
    assert rest.m2()[1, 2] == 0.0
    assert rest.mean()[1, 2] == 0.0
    assert rest.m2()[0, 2] > 0.0


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


def log_tail_by_quadrature(t, df):
    """log P(T > t), t > 0, from the density alone, with s = t exp(w): no formula of the library's."""
    with mpmath.workdps(30):
        t, df = mpmath.mpf(float(t)), mpmath.mpf(float(df))
        scale = (df + t * t) / ((df + 1) * t * t)

        def density(v):
            w = scale * v
            return mpmath.exp(w - (df + 1) / 2 * mpmath.log1p(t * t * mpmath.expm1(2 * w) / (df + t * t)))

        integral = t * scale * mpmath.quad(density, [0, 1, 3, 6, 10, 20, 40, 80, 160, 320])
        at_t = -(df + 1) / 2 * mpmath.log1p(t * t / df) - mpmath.log(df * mpmath.pi) / 2
        gammas = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2)
        return float(mpmath.log(integral) + at_t + gammas)


FREEDOM = [1.0, 2.0, 7.3, 60.0, 1299.3, 10_259.3, 2.1e4, 2.5e5, 1.28e6, 2e6]
# With few degrees of freedom no float64 t lies far enough out.
FAR = [(df, p) for df in FREEDOM for p in (-40.0, -689.0, -691.0, -2e3, -3e4, -3e5, -3e6) if -2 * p / df < 1400]


@pytest.mark.parametrize(("df", "log_p"), FAR)
def test_far_tails_equal_the_integrated_density(df, log_p):
    exponent = -2 * log_p / df
    t = math.exp(exponent / 2) * math.sqrt(df * -math.expm1(-exponent))
    expected = log_tail_by_quadrature(t, df)
    assert expected == pytest.approx(log_p, rel=0.1)
    assert float(log_t_sf(np.array(t), np.array(df))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("df", [1.0, 3.0, 30.0, 1299.3, 2.1e4, 1.28e6])
def test_log_t_sf_has_no_seam_where_the_formula_changes(df):
    for t in (np.nextafter(8.0, 0.0), 8.0):
        assert float(log_t_sf(np.array(t), np.array(df))) == pytest.approx(log_tail_by_quadrature(t, df), rel=1e-12)


@pytest.mark.parametrize("df", [1.0, 30.0, 1299.3, 1.28e6])
@pytest.mark.parametrize("t", [1.0, 7.9, 8.1, 12.0, 30.0])
def test_log_p_next_to_zero_keeps_its_digits(t, df):
    """p a hair below 1: log p is that hair, not 0."""
    tail = math.exp(log_tail_by_quadrature(t, df))
    assert float(log_t_sf(np.array(-t), np.array(df))) == pytest.approx(math.log1p(-tail), rel=1e-10, abs=0)


def test_log_t_sf_of_infinite_t():
    assert log_t_sf(np.array([np.inf, -np.inf]), np.array([5.0, 5.0])).tolist() == [-np.inf, 0.0]


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


def adjusted_by_a_loop(log_p):
    """Benjamini-Hochberg of one row, in logarithms: the least p_(j) C / j over the places j from i on."""
    order = sorted(range(len(log_p)), key=lambda channel: float(log_p[channel]))
    adjusted = [0.0] * len(log_p)
    least = 0.0
    for place in range(len(log_p), 0, -1):
        channel = order[place - 1]
        least = min(least, float(log_p[channel]) + math.log(len(log_p) / place))
        adjusted[channel] = least
    return adjusted


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_benjamini_hochberg_equals_scipy_where_p_does_not_underflow(seed):
    generator = np.random.default_rng(seed)
    log_p = -(10 ** generator.uniform(-3, 2.8, (3, 40)))
    log_p[:, ::7] = log_p[:, 1:2]  # ties
    log_p[:, 3] = 0.0
    before = log_p.copy()
    expected = scipy.stats.false_discovery_control(np.exp(log_p), axis=1)
    np.testing.assert_allclose(np.exp(benjamini_hochberg(log_p)), expected, rtol=1e-12)
    assert np.array_equal(log_p, before)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_benjamini_hochberg_equals_the_loop_where_p_underflows(seed):
    generator = np.random.default_rng(seed)
    log_p = -(10 ** generator.uniform(-2, 6, (2, 30)))
    log_p[0, :4] = [-np.inf, -np.inf, 0.0, log_p[0, 9]]
    adjusted = benjamini_hochberg(log_p)
    expected = [adjusted_by_a_loop(row) for row in log_p]
    np.testing.assert_allclose(adjusted, expected, rtol=1e-14)
    assert np.all(adjusted >= log_p)
    assert np.all(adjusted <= 0)
    assert np.any(log_p < -1e4)


def test_benjamini_hochberg_of_extremes():
    assert benjamini_hochberg(np.array([[-np.inf] * 3, [0.0] * 3])).tolist() == [[-np.inf] * 3, [0.0] * 3]
    assert benjamini_hochberg(np.array([[-5.0]])).tolist() == [[-5.0]]
    log_p = np.array([[math.nan] * 2, [-1.0, -900.0]])
    adjusted = benjamini_hochberg(log_p)
    assert np.all(np.isnan(adjusted[0]))
    assert adjusted[1].tolist() == [-1.0, -900.0 + math.log(2)]
