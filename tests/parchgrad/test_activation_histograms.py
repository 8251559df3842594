"""Histograms of activations: counts, divergence and what chance makes of it, against loops and simulations."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from parchgrad.activation_histograms import BINS, EDGES, FEWEST_IMAGES, chance, counts, divergence, normal

RNG = np.random.default_rng(0)


def test_every_value_is_counted_in_its_bin_and_what_lies_beyond_in_the_last():
    values = [*RNG.normal(1, 3, 200), -4.0, 8.0, -1e30, 1e30, math.inf, -math.inf, *EDGES[1:-1]]
    expected = [0] * BINS
    for value in values:
        expected[min(max(math.floor((value + 4) / 0.25), 0), BINS - 1) if math.isfinite(value) else -(value > 0)] += 1
    assert counts([*values, math.nan]).tolist() == expected
    assert counts([]).tolist() == [0] * BINS


def test_the_shares_of_a_normal():
    edges = [-math.inf, *EDGES[1:-1], math.inf]
    expected = [NormalDist().cdf(b) - NormalDist().cdf(a) for a, b in pairwise(edges)]
    assert normal() == pytest.approx(expected, abs=1e-12)


def entropy(shares):
    return -sum(share * math.log2(share) for share in shares if share > 0)


def test_the_divergence_is_the_entropy_of_the_mean_over_the_mean_of_entropies():
    ones, others = RNG.integers(0, 5, (2, 6, BINS)).astype(float)
    ones[0], others[0] = np.eye(BINS)[3], np.eye(BINS)[4]  # without a common bin
    others[1] = 7 * ones[1]  # the same, of seven times the values
    found = divergence(ones, others)
    for p, q, bits in zip(
        ones / ones.sum(-1, keepdims=True), others / others.sum(-1, keepdims=True), found, strict=True
    ):
        assert bits == pytest.approx(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, abs=1e-9)
    assert found[:2].tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert divergence(others, ones) == pytest.approx(found)
    assert np.isnan(divergence(np.zeros(BINS), ones)).all()


def drawn(images, channels, together, shift=0.0):
    """Histograms `(images, BINS)` of standard normal channels, of which a share is common to an image's channels."""
    common = RNG.normal(size=(images, 1)) * math.sqrt(together)
    return np.array([counts(z + shift) for z in common + RNG.normal(size=(images, channels)) * math.sqrt(1 - together)])


def test_what_chance_makes_of_independent_values_is_known():
    """A multinomial's: `(bins - 1) / (8 n ln 2)`, here of the bins that have any share to speak of."""
    images, shares = 400, np.zeros(BINS)
    shares[10:30] = 1 / 20
    one = RNG.multinomial(50, shares, images)
    found = chance(one.sum(0), (one**2).sum(0), images, shares)
    assert found.expected == pytest.approx(19 / (8 * images * 50 * math.log(2)), rel=0.05)
    of_as_many = chance(one.sum(0), (one**2).sum(0), images, shares * images * 50)
    assert of_as_many.expected == pytest.approx(2 * found.expected, rel=0.02)
    assert found.bound / found.expected == pytest.approx(NormalDist().inv_cdf(0.995) ** 2)


@pytest.mark.parametrize(("images", "together"), [(20, 0.0), (20, 0.5), (80, 0.5)])
def test_images_of_the_references_own_are_not_beyond_chance_and_others_are(images, together):
    reference = drawn(300, 64, together).sum(0)
    beyond, ratios = {0.0: 0, 1.5: 0}, []
    for shift in beyond:
        for _ in range(30):
            one = drawn(images, 64, together, shift)
            found = chance(one.sum(0), (one**2).sum(0), images, reference)
            bits = divergence(one.sum(0), reference)
            beyond[shift] += bool(bits > found.bound)
            ratios += [bits / found.expected] if shift == 0 else []
    assert beyond[0.0] <= 1
    assert beyond[1.5] == 30
    assert 0.6 < np.mean(ratios) < 2.2


def test_of_few_images_nothing_is_said():
    one = drawn(FEWEST_IMAGES, 8, 0.0)
    for images, said in ((FEWEST_IMAGES, True), (FEWEST_IMAGES - 1, False), (1, False)):
        some = one[:images]
        found = chance(some.sum(0), (some**2).sum(0), images, normal())
        assert np.isfinite([found.expected, found.bound]).tolist() == [said, said]
    nothing = chance(np.zeros(BINS), np.zeros(BINS), 0, normal())
    assert np.isnan(nothing.expected)
    alike = np.tile(one[0], (20, 1))  # images that do not differ
    assert chance(alike.sum(0), (alike**2).sum(0), 20, normal()).bound == 0
