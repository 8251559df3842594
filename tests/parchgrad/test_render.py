"""Maps as pictures: strength, colours, overlays."""

import io

import numpy as np
import pytest
from PIL import Image

from parchgrad.errors import OptionError
from parchgrad.render import COLORMAPS, OVERLAYS, heatmap, overlay, png, strength

RAMP = np.linspace(0, 1, 100).reshape(10, 10)
IMAGE = np.full((10, 10, 3), (200, 100, 50), np.uint8)


def test_strength_runs_from_nothing_at_the_lower_percentile_to_full_at_the_upper():
    value = strength(RAMP, clip_lower=20, clip_upper=80)
    low, high = np.percentile(RAMP, [20, 80])
    np.testing.assert_allclose(value, np.clip((RAMP - low) / (high - low), 0, 1))


def test_strength_does_not_depend_on_the_maps_scale():
    np.testing.assert_allclose(strength(RAMP * 1e-12), strength(RAMP), atol=1e-12)


def test_a_single_pixel_sparser_than_the_percentile_is_still_drawn():
    saliency = np.zeros((50, 50))
    saliency[3, 4] = 1e-9
    assert strength(saliency).argmax() == 3 * 50 + 4
    assert strength(saliency).max() == 1


@pytest.mark.parametrize("saliency", [np.zeros((4, 4)), np.full((4, 4), 7.0)], ids=["zero", "constant"])
def test_a_map_that_says_nothing_draws_nothing(saliency):
    assert strength(saliency).max() == 0


def test_smoothing_spreads_a_pixel_over_its_neighbours():
    saliency = np.zeros((9, 9))
    saliency[4, 4] = 1
    value = strength(saliency, clip_upper=100, smooth=1.0)
    assert value[4, 4] == 1
    assert 0.3 < value[4, 5] < 0.9


@pytest.mark.parametrize(("lower", "upper"), [(50, 50), (60, 40), (-1, 50), (0, 101)])
def test_percentiles_out_of_order_are_refused(lower, upper):
    with pytest.raises(OptionError, match="clip_lower < clip_upper"):
        strength(RAMP, lower, upper)


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_every_colormap_goes_from_one_end_to_the_other(colormap):
    import matplotlib

    drawn = heatmap(RAMP, colormap, clip_upper=100)
    ends = np.round(255 * np.array(matplotlib.colormaps[colormap]([0.0, 1.0]))[:, :3])
    np.testing.assert_array_equal([drawn[0, 0], drawn[-1, -1]], ends)


def test_an_overlay_shows_the_image_where_the_map_is_weak_and_the_colour_where_it_is_strong():
    saliency = np.zeros((10, 10))
    saliency[:, 5:] = 1
    drawn = overlay(IMAGE, saliency, clip_upper=100)
    np.testing.assert_array_equal(drawn[0, 0], np.round(0.65 * IMAGE[0, 0]))
    np.testing.assert_array_equal(drawn[0, 9], heatmap(saliency, clip_upper=100)[0, 9])


def test_a_mask_leaves_the_image_only_where_the_map_is_strong():
    saliency = np.zeros((10, 10))
    saliency[:, 5:] = 1
    drawn = overlay(IMAGE, saliency, mode="mask_black", clip_upper=100)
    assert drawn[:, :5].max() == 0
    np.testing.assert_array_equal(drawn[:, 5:], IMAGE[:, 5:])


def test_a_grayscale_overlay_has_no_colour_of_the_image():
    drawn = overlay(IMAGE, np.zeros((10, 10)), mode="grayscale")
    assert np.ptp(drawn[0, 0]) == 0


def test_unknown_names_are_refused_with_what_is_allowed():
    with pytest.raises(OptionError, match="'neon'.*inferno"):
        heatmap(RAMP, "neon")
    with pytest.raises(OptionError, match="'sepia'.*mask_black"):
        overlay(IMAGE, RAMP, mode="sepia")


@pytest.mark.parametrize("mode", OVERLAYS)
def test_a_png_reads_back_as_it_was_drawn(mode):
    drawn = overlay(IMAGE, RAMP, mode=mode)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(drawn)))), drawn)
