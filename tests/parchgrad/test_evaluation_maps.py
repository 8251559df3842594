"""Measures of place and of sparsity against plain loops, and what they keep to."""

import math

import numpy as np
import pytest
from scipy import stats

from parchgrad.evaluation.maps import area_weighted_mass, entropy, hoyer, mass_share, pointing_game, pointing_hit


def example(seed=0, shape=(9, 13)):
    generator = np.random.default_rng(seed)
    return generator.random(shape), generator.random(shape) < 0.2


def test_area_weighted_mass_is_the_mean_inside_over_the_mean_of_all():
    saliency, mask = example()
    inside = [saliency[i, j] for i in range(9) for j in range(13) if mask[i, j]]
    everywhere = [saliency[i, j] for i in range(9) for j in range(13)]
    expected = (math.fsum(inside) / len(inside)) / (math.fsum(everywhere) / len(everywhere))
    assert area_weighted_mass(saliency, mask) == pytest.approx(expected, rel=1e-12)
    assert area_weighted_mass(saliency * 1e-30, mask) == pytest.approx(expected, rel=1e-12)


def test_area_weighted_mass_of_an_even_map_is_1_and_its_bound_is_the_areas_inverse():
    saliency, mask = example()
    for part in (mask, ~mask, np.ones_like(mask)):
        assert area_weighted_mass(np.full((9, 13), 0.3), part) == pytest.approx(1.0)
    assert area_weighted_mass(saliency * mask, mask) == pytest.approx(1 / mask.mean())
    assert area_weighted_mass(saliency * ~mask, mask) == 0.0
    # Each pixel drawn twice over, the share and the weight are the same.
    twice = np.repeat(np.repeat(saliency, 2, 0), 2, 1), np.repeat(np.repeat(mask, 2, 0), 2, 1)
    assert area_weighted_mass(*twice) == pytest.approx(area_weighted_mass(saliency, mask), rel=1e-12)
    assert mass_share(saliency, mask) == pytest.approx(area_weighted_mass(saliency, mask) * mask.mean(), rel=1e-12)
    assert math.isnan(area_weighted_mass(np.zeros((9, 13)), mask))
    assert math.isnan(area_weighted_mass(saliency, np.zeros((9, 13), bool)))


def pointing_loop(saliency, mask, tolerance):
    """Of the pixels that have the maximum, the share with a pixel of the mask in the circle around."""
    maxima = [(i, j) for i, j in np.ndindex(saliency.shape) if saliency[i, j] == saliency.max()]
    places = [(i, j) for i, j in np.ndindex(mask.shape) if mask[i, j]]
    hits = [any((i - k) ** 2 + (j - m) ** 2 <= tolerance**2 for k, m in places) for i, j in maxima]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("tolerance", [0, 1, 2, 2.5, 5, 15])
def test_pointing_game_looks_in_a_circle_around_the_maximum(tolerance):
    generator = np.random.default_rng(7)
    found = []
    for _ in range(40):
        saliency = generator.integers(1, 60, (9, 31)).astype(np.float64)  # with ties
        mask = np.zeros((9, 31), bool)
        mask[generator.integers(9), generator.integers(31)] = True
        found.append(pointing_game(saliency, mask, tolerance))
        assert found[-1] == pytest.approx(pointing_loop(saliency, mask, tolerance))
        if tolerance == 0:
            assert found[-1] == pointing_hit(saliency, mask)
    assert min(found) < max(found)


def test_pointing_games_tolerance_is_15_pixels_itself_included_and_round():
    saliency, mask = np.zeros((60, 60)), np.zeros((60, 60), bool)
    mask[30, 30] = True

    def at(i, j):
        one = saliency.copy()
        one[i, j] = 1.0
        return pointing_game(one, mask)

    assert [at(30, 45), at(15, 30), at(39, 42), at(30, 30)] == [1.0] * 4  # 15, 15, 15 and 0 pixels away
    assert [at(30, 46), at(41, 41), at(14, 30)] == [0.0] * 3  # 16, 15.6, 16
    one = saliency.copy()
    one[30, 31] = one[0, 0] = 2.0
    assert pointing_game(one, mask) == 0.5
    assert pointing_game(one, np.zeros_like(mask)) == 0.0
    assert math.isnan(pointing_game(saliency, mask))


def test_hoyer_is_its_formula():
    saliency = example()[0] - 0.5
    values = [abs(saliency[i, j]) for i in range(9) for j in range(13)]
    n = math.sqrt(len(values))
    expected = (n - math.fsum(values) / math.sqrt(math.fsum(v * v for v in values))) / (n - 1)
    assert hoyer(saliency) == pytest.approx(expected, rel=1e-12)
    for scale in (1e-200, 1e-30, 1e200):
        assert hoyer(saliency * scale) == pytest.approx(expected, rel=1e-12)
    assert hoyer(saliency.ravel()[np.random.default_rng(1).permutation(117)].reshape(9, 13)) == pytest.approx(expected)


def test_hoyers_bounds_and_chance():
    one = np.zeros((4, 5))
    one[1, 2] = 5.0
    assert hoyer(one) == pytest.approx(1.0)
    assert hoyer(np.full((4, 5), 0.1)) == pytest.approx(0.0, abs=1e-12)
    assert hoyer(np.random.default_rng(2).random((700, 700))) == pytest.approx(0.134, abs=1e-3)
    for nothing in (np.zeros((4, 4)), np.ones((1, 1)), np.full((2, 2), np.nan), np.array([[1.0, np.inf]])):
        assert math.isnan(hoyer(nothing))


def test_entropy_is_scipys():
    saliency = example()[0]
    saliency[2:5] = 0.0
    expected = stats.entropy(saliency.ravel())
    assert entropy(saliency) == pytest.approx(expected, rel=1e-12)
    assert entropy(saliency, normalised=True) == pytest.approx(expected / math.log(117), rel=1e-12)
    assert entropy(-saliency * 1e-200) == pytest.approx(expected, rel=1e-12)


def test_entropys_bounds_and_chance():
    assert entropy(np.full((4, 5), 0.1)) == pytest.approx(math.log(20))
    assert entropy(np.full((4, 5), 0.1), normalised=True) == pytest.approx(1.0)
    one = np.zeros((4, 5))
    one[1, 2] = 5.0
    assert entropy(one) == entropy(one, normalised=True) == 0.0
    one[0, 0] = 1e-320
    assert entropy(one) == pytest.approx(0.0, abs=1e-12)
    random = np.random.default_rng(2).random((700, 700))
    assert entropy(random) == pytest.approx(math.log(490_000) - 0.193, abs=1e-3)
    assert entropy(np.ones((1, 1))) == 0.0
    assert math.isnan(entropy(np.ones((1, 1)), normalised=True))
    for nothing in (np.zeros((4, 4)), np.full((2, 2), np.nan), np.array([[1.0, np.inf]])):
        assert math.isnan(entropy(nothing))
        assert math.isnan(entropy(nothing, normalised=True))
