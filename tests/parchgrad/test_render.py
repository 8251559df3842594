"""Maps as pictures: strength, colours, overlays."""

import io

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from parchgrad.errors import OptionError
from parchgrad.render import (
    COLORMAPS,
    OVERLAYS,
    REGION_SMOOTH,
    REGION_STRENGTH,
    heatmap,
    inside,
    overlay,
    png,
    regions,
    strength,
)

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


@pytest.mark.parametrize("outline", [False, True])
@pytest.mark.parametrize("mode", OVERLAYS)
def test_opacity_lays_the_drawing_over_the_image(mode, outline):
    saliency, image = example()
    full = overlay(image, saliency, mode=mode, outline=outline).astype(float)
    half = overlay(image, saliency, mode=mode, outline=outline, opacity=0.5)
    np.testing.assert_allclose(half, (full + image) / 2, atol=0.76)  # `full` is rounded, and so is the half
    np.testing.assert_array_equal(overlay(image, saliency, mode=mode, outline=outline, opacity=0), image)


def test_overlay_modes():
    saliency, image = example()
    weight = strength(saliency)[..., None]
    np.testing.assert_array_equal(overlay(image, saliency, mode="none"), heatmap(saliency))
    np.testing.assert_array_equal(
        overlay(image, saliency, mode="mask_black"), np.round(image * np.sqrt(weight)).astype(np.uint8)
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
        ({"opacity": 1.01}, r"Option 'opacity' is 1.01; allowed: a number in \[0, 1\]"),
        ({"opacity": float("nan")}, "opacity"),
    ],
    ids=["colormap", "mode", "order", "above", "below", "nan", "opaque", "opacity-nan"],
)
def test_bad_options_are_refused(change, message):
    saliency, image = example()
    with pytest.raises(OptionError, match=message):
        overlay(image, saliency, **change)


# --- outlines -----------------------------------------------------------------------------------------------


def blobs(shape=(120, 160), sizes=((30, 40, 9.0, 1.0), (80, 110, 12.0, 1.0))):
    """Gaussian hills at (row, column), of an sd and a height."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return sum(h * np.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * sd**2)) for r, c, sd, h in sizes)


def components(mask):
    return ndimage.label(mask)[1]


def test_regions_are_where_the_map_is_strong():
    saliency = blobs()
    found = regions(saliency, clip_upper=100)
    assert components(found) == 2
    assert found[30, 40]
    assert found[80, 110]
    smoothed = strength(saliency, clip_upper=100, smooth=REGION_SMOOTH * 160)
    np.testing.assert_array_equal(found[smoothed > REGION_STRENGTH + 0.1], True)
    np.testing.assert_array_equal(found[smoothed < REGION_STRENGTH - 0.1], False)


def test_regions_leave_out_the_lightest_beyond_nine_tenths_of_the_attribution():
    one = (60, 30, 15.0, 1.0)
    light = (60, 120, 5.0, 0.9)  # a ninth of the other's area
    found = regions(blobs(sizes=(one, light)), clip_upper=100)
    assert found[60, 30]
    assert not found[60, 120]
    assert components(found) == 1
    alike = regions(blobs(sizes=(one, (60, 120, 15.0, 0.9))), clip_upper=100)
    assert components(alike) == 2


def test_single_pixels_join_to_a_region_and_specks_vanish():
    generator = np.random.default_rng(0)
    saliency = np.zeros((128, 128))
    cloud = generator.integers(30, 60, (200, 2))
    saliency[cloud[:, 0], cloud[:, 1]] = 1
    saliency[100, 100] = 1
    found = regions(saliency)
    assert components(found) == 1
    assert found[45, 45]
    assert not found[90:110, 90:110].any()


def test_cracks_close_and_thin_lines_vanish():
    saliency = blobs(shape=(128, 128), sizes=((40, 64, 15.0, 1.0),))
    saliency[110, 10:118] = 3.8
    saliency[:, 62:66] = 0
    strong = strength(saliency, clip_upper=100, smooth=REGION_SMOOTH * 128) >= REGION_STRENGTH
    assert components(strong) > 1
    assert strong[110, 30]
    found = regions(saliency, clip_upper=100)
    assert components(found) == 1
    assert not found[100:].any()


def test_a_region_at_the_edge_reaches_the_edge():
    saliency = blobs(sizes=((60, 0, 15.0, 1.0),))
    strong = strength(saliency, clip_upper=100, smooth=REGION_SMOOTH * 160) >= REGION_STRENGTH
    assert strong[:, 0].any()
    np.testing.assert_array_equal(regions(saliency, clip_upper=100)[:, 0], strong[:, 0])


def test_raising_the_lower_percentile_shrinks_regions():
    saliency = blobs()
    wide, narrow = (regions(saliency, clip_lower=low, clip_upper=100).sum() for low in (0, 95))
    assert 0 < narrow < 0.8 * wide


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan], ids=str)
def test_a_map_without_contrast_has_no_regions(value):
    flat = np.full((40, 50), value)
    assert not regions(flat).any()
    image = np.full((40, 50, 3), 100, np.uint8)
    np.testing.assert_array_equal(overlay(image, flat, outline=True), 65)


@pytest.mark.parametrize("scale", [1e-30, 1e20], ids=lambda s: f"x{s:g}")
def test_regions_do_not_know_the_maps_scale(scale):
    np.testing.assert_array_equal(regions(blobs() * scale), regions(blobs()))
    np.testing.assert_allclose(inside(blobs() * scale), inside(blobs()), atol=1e-5)


def test_inside_falls_from_one_through_a_half_on_the_outline_to_none():
    depth = inside(blobs(shape=(600, 800), sizes=((300, 400, 80.0, 1.0),)), clip_upper=100)
    assert depth[300, 400] == pytest.approx(1, abs=0.01)
    assert depth[0, 0] == pytest.approx(0, abs=0.01)
    radius = 80 * np.sqrt(2 * np.log(1 / REGION_STRENGTH))
    assert depth[300, 400 + round(radius)] == pytest.approx(0.5, abs=0.15)


OUTLINED = (blobs(shape=(300, 400), sizes=((150, 200, 40.0, 1.0),)), np.full((300, 400, 3), (200, 100, 50), np.uint8))


def test_outlines_lie_on_the_edge_of_the_region_in_the_colormaps_colour():
    saliency, image = OUTLINED
    drawn = overlay(image, saliency, outline=True, clip_upper=100, colormap="viridis")
    line = np.round(255 * np.array(matplotlib.colormaps["viridis"](204)[:3]))
    on_line = np.abs(drawn.astype(float) - line).max(axis=-1) <= 2
    depth = inside(saliency, clip_upper=100)
    assert on_line.any()
    assert np.abs(depth[on_line] - 0.5).max() < 0.25
    # All round: on every ray from the centre.
    y, x = np.nonzero(on_line)
    assert len(np.unique(np.floor(np.degrees(np.arctan2(y - 150, x - 200)) / 10) % 36)) == 36


@pytest.mark.parametrize(
    ("mode", "within", "without"),
    [
        ("original", (200, 100, 50), (130, 65, 32)),
        ("grayscale", (124, 124, 124), (81, 81, 81)),
        ("mask_black", (200, 100, 50), (0, 0, 0)),
    ],
)
def test_an_outlined_picture_is_whole_within_and_dim_without(mode, within, without):
    saliency, image = OUTLINED
    drawn = overlay(image, saliency, mode=mode, outline=True, clip_upper=100)
    np.testing.assert_allclose(drawn[150, 200], within, atol=1)
    np.testing.assert_allclose(drawn[5, 5], without, atol=1)


def test_outlines_alone_do_not_show_the_image():
    saliency, image = OUTLINED
    drawn = [overlay(one, saliency, mode="none", outline=True) for one in (image, 255 - image)]
    np.testing.assert_array_equal(*drawn)
    np.testing.assert_array_equal(drawn[0][5, 5], np.round(255 * np.array(matplotlib.colormaps["inferno"](0)[:3])))


def test_outlines_look_the_same_at_every_resolution():
    """The lines of a picture twice the size lie at the same places, twice as wide."""
    small, large = (
        overlay(
            np.full((side, side, 3), 128, np.uint8),
            blobs(shape=(side, side), sizes=((side / 2, side / 2, side / 8, 1.0),)),
            outline=True,
            clip_upper=100,
        )
        for side in (400, 800)
    )
    halved = np.asarray(Image.fromarray(large).resize((400, 400), Image.Resampling.BOX))
    line = np.round(255 * np.array(matplotlib.colormaps["inferno"](204)[:3]))
    lit = [(np.abs(one - line).max(axis=-1) < 60).sum() for one in (small, large)]
    assert lit[1] / lit[0] == pytest.approx(4, rel=0.25)
    assert np.abs(small.astype(float) - halved).mean() < 1.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2), (1, 2000)], ids=str)
@pytest.mark.parametrize("mode", OVERLAYS)
def test_the_smallest_pictures_are_drawn(shape, mode):
    saliency = np.arange(np.prod(shape), dtype=float).reshape(shape)
    drawn = overlay(np.zeros((*shape, 3), np.uint8), saliency, mode=mode, outline=True, smooth=0.008 * max(shape))
    assert drawn.shape == (*shape, 3)


def test_bad_options_are_refused_for_outlines_too():
    saliency, image = OUTLINED
    with pytest.raises(OptionError, match="Option 'colormap' is 'rainbow'"):
        overlay(image, saliency, colormap="rainbow", outline=True)
    with pytest.raises(OptionError, match="clip_lower"):
        overlay(image, saliency, clip_lower=50, clip_upper=40, outline=True)
