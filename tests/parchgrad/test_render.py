"""Maps as pictures: strength, colours, overlays."""

import io

import matplotlib
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


def test_a_single_pixel_sparser_than_the_percentile_is_still_drawn():
    saliency = np.zeros((50, 50))
    saliency[3, 4] = 1e-9
    assert strength(saliency).argmax() == 3 * 50 + 4
    assert strength(saliency).max() == 1


def test_smoothing_spreads_a_pixel_over_its_neighbours():
    saliency = np.zeros((9, 9))
    saliency[4, 4] = 1
    value = strength(saliency, clip_upper=100, smooth=1.0)
    assert value[4, 4] == 1
    assert 0.3 < value[4, 5] < 0.9


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


@pytest.mark.parametrize("mode", OVERLAYS)
def test_a_png_reads_back_as_it_was_drawn(mode):
    drawn = overlay(IMAGE, RAMP, mode=mode)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(drawn)))), drawn)


def example(seed=0):
    generator = np.random.default_rng(seed)
    return generator.random((6, 9)) ** 3, generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e20], ids=lambda s: f"x{s:g}")
def test_strength_does_not_know_the_maps_scale(scale):
    saliency, _ = example()
    np.testing.assert_allclose(strength(saliency * scale), strength(saliency), rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan], ids=str)
def test_a_map_without_contrast_is_drawn_empty(value):
    assert not strength(np.full((4, 5), value)).any()
    assert heatmap(np.full((4, 5), value)).shape == (4, 5, 3)


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_heatmap_has_the_colormaps_colours(colormap):
    ramp = np.linspace(0, 1, 256)[None]
    expected = np.round(255 * matplotlib.colormaps[colormap](np.arange(256))[:, :3])
    np.testing.assert_array_equal(heatmap(ramp, colormap, 0, 100)[0], expected)


@pytest.mark.parametrize("mode", OVERLAYS)
def test_overlay_keeps_the_image_and_its_size(mode):
    saliency, image = example()
    before = image.copy()
    drawn = overlay(image, saliency, mode=mode)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert np.array_equal(image, before)


def test_overlay_modes():
    saliency, image = example()
    weight = strength(saliency)[..., None]
    np.testing.assert_array_equal(overlay(image, saliency, mode="none"), heatmap(saliency))
    np.testing.assert_array_equal(
        overlay(image, saliency, mode="mask_black"), np.round(image * weight).astype(np.uint8)
    )
    strongest = np.unravel_index(saliency.argmax(), saliency.shape)
    for mode in ("original", "grayscale"):
        np.testing.assert_array_equal(overlay(image, saliency, mode=mode)[strongest], heatmap(saliency)[strongest])
    empty = overlay(image, np.zeros((6, 9)), mode="grayscale")
    assert (empty == empty[..., :1]).all(), "no colour where the map is empty"
    np.testing.assert_array_equal(overlay(image, np.zeros((6, 9))), np.round(0.65 * image).astype(np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colormap": "rainbow"}, "Option 'colormap' is 'rainbow'; allowed: inferno"),
        ({"mode": "multiply"}, "Option 'overlay' is 'multiply'; allowed: none"),
        ({"clip_lower": 60, "clip_upper": 50}, r"Option 'clip_lower, clip_upper' is \(60, 50\)"),
        ({"clip_upper": 101}, "clip_upper"),
        ({"clip_lower": -1}, "clip_lower"),
        ({"clip_upper": float("nan")}, "clip_upper"),
    ],
    ids=["colormap", "mode", "order", "above", "below", "nan"],
)
def test_bad_options_are_refused(change, message):
    saliency, image = example()
    with pytest.raises(OptionError, match=message):
        overlay(image, saliency, **change)
