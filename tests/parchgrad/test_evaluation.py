"""Metrics of maps against plain loops, and mosaics."""

import math

import numpy as np
import pytest
import torch

from parchgrad.evaluation.maps import gini, mass_share, pointing_hit
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
