"""Metrics of maps against plain loops, and mosaics."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from parchgrad.evaluation.maps import agreement, border_share, centroid, figures, gini, mass_share, pointing_hit
from parchgrad.evaluation.mosaics import four, quarter_mask


def example(seed=0):
    generator = np.random.default_rng(seed)
    return generator.random((5, 7)), generator.random((5, 7)) < 0.3


def test_mass_share_is_the_mass_inside_over_all():
    saliency, mask = example()
    inside = sum(saliency[i, j] for i in range(5) for j in range(7) if mask[i, j])
    assert mass_share(saliency, mask) == pytest.approx(inside / saliency.sum(), rel=1e-12)
    assert mass_share(saliency, np.ones_like(mask)) == pytest.approx(1.0)
    assert mass_share(saliency, np.zeros_like(mask)) == 0.0
    assert mass_share(saliency * 1e-30, mask) == pytest.approx(inside / saliency.sum(), rel=1e-12)
    assert math.isnan(mass_share(np.zeros((5, 7)), mask))


def test_an_even_map_has_the_areas_share():
    _, mask = example()
    assert mass_share(np.ones((5, 7)), mask) == pytest.approx(mask.mean())


def test_pointing_hit_asks_where_the_maximum_is():
    saliency, mask = np.zeros((3, 3)), np.zeros((3, 3), bool)
    mask[0, 0] = True
    saliency[0, 0] = 2.0
    assert pointing_hit(saliency, mask) == 1.0
    saliency[2, 2] = 3.0
    assert pointing_hit(saliency, mask) == 0.0
    saliency[0, 0] = 3.0
    assert pointing_hit(saliency, mask) == 0.5
    assert math.isnan(pointing_hit(np.zeros((3, 3)), mask))


def test_gini_equals_the_mean_difference():
    """Half the relative mean absolute difference over all ordered pairs."""
    values = example()[0].ravel()
    pairs = sum(abs(a - b) for a in values for b in values) / (2 * len(values) ** 2 * values.mean())
    assert gini(values.reshape(5, 7)) == pytest.approx(pairs, rel=1e-12)
    assert gini(np.ones((4, 4))) == pytest.approx(0.0, abs=1e-12)
    one = np.zeros((4, 4))
    one[1, 2] = 5.0
    assert gini(one) == pytest.approx(15 / 16)
    assert math.isnan(gini(np.zeros((4, 4))))


def test_border_share_counts_what_lies_near_the_edges():
    """Pixel by pixel, each cut into 10 x 10: a tenth of 10 and 20 pixels is a whole number of pixels' tenths."""
    saliency = np.random.default_rng(3).normal(size=(7, 20))
    near = 0.0
    for i in range(7):
        for j in range(20):
            for a in range(100):
                for b in range(10):
                    y, x = (i + (a + 0.5) / 100) / 7, (j + (b + 0.5) / 10) / 20
                    near += abs(saliency[i, j]) / 1000 * (min(x, 1 - x, y, 1 - y) < 0.1)
    assert border_share(saliency) == pytest.approx(near / np.abs(saliency).sum(), rel=1e-9)
    for shape in ((224, 224), (5, 3), (1, 1), (17, 128)):
        assert border_share(np.ones(shape)) == pytest.approx(0.36)
    assert border_share(np.ones((9, 9)), 0.25) == pytest.approx(0.75)
    assert border_share(np.pad(np.ones((8, 8)), 1)) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(border_share(np.zeros((4, 4))))


def test_centroid_is_the_mean_place_of_the_mass():
    saliency = example()[0]
    mass = saliency.sum()
    x = sum(saliency[i, j] * (j + 0.5) / 7 for i in range(5) for j in range(7)) / mass
    y = sum(saliency[i, j] * (i + 0.5) / 5 for i in range(5) for j in range(7)) / mass
    assert centroid(saliency) == (pytest.approx(x, rel=1e-12), pytest.approx(y, rel=1e-12))
    assert centroid(-saliency) == centroid(saliency)
    corner = np.zeros((4, 8))
    corner[3, 0] = 2.0
    assert centroid(corner) == (pytest.approx(1 / 16), pytest.approx(7 / 8))
    assert all(math.isnan(value) for value in centroid(np.zeros((4, 4))))


def test_agreement_is_spearmans_correlation():
    generator = np.random.default_rng(5)
    ours = generator.integers(0, 6, (9, 11)).astype(np.float32)  # with ties
    other = ours + generator.normal(size=(9, 11))
    assert agreement(ours, other) == pytest.approx(stats.spearmanr(ours.ravel(), other.ravel()).statistic, rel=1e-12)
    assert agreement(ours, ours**3) == pytest.approx(1.0)
    assert agreement(ours, -ours) == pytest.approx(-1.0)
    assert math.isnan(agreement(ours, np.ones((9, 11))))
    assert math.isnan(agreement(ours, np.full((9, 11), np.nan)))


def test_the_figures_of_a_map_are_one_by_one_and_nothing_of_a_map_that_is_none():
    saliency = example()[0]
    found = figures(saliency)
    assert (found.gini, found.border_share) == (gini(saliency), border_share(saliency))
    assert (found.x, found.y) == centroid(saliency)
    for nothing in (np.zeros((3, 3)), np.full((3, 3), np.nan), np.array([[1.0, np.inf]])):
        assert all(math.isnan(value) for value in vars(figures(nothing)).values())


def test_a_mosaic_and_its_quarters():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 3)
    mosaic = four(images)
    assert mosaic.shape == (3, 4, 6)
    for quarter in range(4):
        mask = quarter_mask(2, 3, quarter)
        assert mask.sum() == 6
        assert (mosaic[:, torch.from_numpy(mask)] == quarter).all()
    assert sum(quarter_mask(2, 3, q) for q in range(4)).min() == 1
    assert mosaic[0, 0, 5] == 1
    assert mosaic[0, 3, 0] == 2
