"""The generator: a pure function of its arguments, ten classes, masks that hold the object's visible pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from scenes.generator import SPLITS, mosaic, sample, scene
from scenes.objects import CLASSES

LABELS = pytest.mark.parametrize("label", range(len(CLASSES)), ids=CLASSES)


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(h, w) bool: pixels that differ in any colour."""
    return (a != b).any(axis=2)


def test_there_are_ten_classes_in_alphabetical_order():
    assert len(CLASSES) == 10
    assert list(CLASSES) == sorted(set(CLASSES))


@LABELS
def test_a_scene_made_again_is_the_same(label):
    first, again = scene(label, 77, 64), scene(label, 77, 64)
    assert (first.image.dtype, first.image.shape) == (np.uint8, (64, 64, 3))
    assert (first.mask.dtype, first.mask.shape) == (np.bool_, (64, 64))
    assert first.label == again.label == label
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)


def test_scenes_made_in_another_order_are_the_same():
    forward = [sample("test", index).image for index in range(10)]
    backward = [sample("test", index).image for index in reversed(range(10))]
    np.testing.assert_array_equal(forward, backward[::-1])


def test_the_global_random_state_plays_no_part():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    one = scene(3, 5)
    np.random.seed(1)
    np.testing.assert_array_equal(one.image, scene(3, 5).image)
    np.random.seed(0)
    scene(3, 5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_another_seed_and_another_label_give_another_picture():
    assert changed(scene(0, 1).image, scene(0, 2).image).mean() > 0.9
    assert changed(scene(0, 1).image, scene(1, 1).image).any()


@LABELS
def test_a_scene_without_its_object_differs_where_the_mask_is(label):
    for seed in range(8):
        whole = scene(label, seed, 64)
        without = scene(label, seed, 64, stages=("clutter", "occluders"))
        differs = changed(whole.image, without.image)
        # A pixel of the object may by chance have the very colour it hides.
        assert differs[whole.mask].mean() > 0.97
        np.testing.assert_array_equal(whole.mask, without.mask)


@LABELS
def test_the_label_changes_nothing_far_from_the_two_objects(label):
    """Background, clutter and light come from the seed alone: none of them can give the class away."""
    for seed in range(5):
        one = scene(label, seed, 64, stages=("clutter",))
        other = scene((label + 1) % 10, seed, 64, stages=("clutter",))
        np.testing.assert_array_equal(one.image, other.image)


@LABELS
def test_the_mask_is_the_visible_part(label):
    """Pixels of the object that an occluder covers are not in the mask, and those it leaves are."""
    covered_pixels = 0
    for seed in range(12):
        whole = scene(label, seed, 64)
        bare = scene(label, seed, 64, stages=("object",))
        alone = scene(label, seed, 64, stages=())
        drawn = changed(bare.image, alone.image)
        assert (whole.mask & ~ndimage.binary_dilation(drawn)).sum() == 0
        # An occluder's own pixels: what it changes on an empty background, but for its faint shadow.
        occluders = scene(label, seed, 64, stages=("occluders",)).image.astype(int)
        over = scene(label, seed, 64, stages=("object", "occluders")).image.astype(int)
        same = (occluders == over).all(axis=2) & changed(occluders, alone.image)
        inside = ndimage.binary_erosion(same & drawn, iterations=2)
        covered_pixels += int(inside.sum())
        assert not (whole.mask & inside).any()
    assert covered_pixels > 0


@pytest.mark.parametrize("size", [48, 64, 128])
def test_no_mask_is_empty_and_none_fills_the_picture(size):
    areas = [sample("test", index, size).mask.mean() for index in range(100)]
    assert min(areas) > 0.01
    assert max(areas) < 0.5
    assert 0.07 < np.mean(areas) < 0.16


def test_a_larger_size_shows_the_same_scene():
    for index in range(10):
        small, large = sample("test", index, 64), sample("test", index, 128)
        shrunk = large.mask.reshape(64, 2, 64, 2).mean(axis=(1, 3)) >= 0.5
        overlap = (shrunk & small.mask).sum() / (shrunk | small.mask).sum()
        assert overlap > 0.85
        blurred = [
            ndimage.uniform_filter(image.mean(axis=2), 5)
            for image in (
                small.image.astype(float),
                large.image.astype(float).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)),
            )
        ]
        assert np.corrcoef(blurred[0].ravel(), blurred[1].ravel())[0, 1] > 0.9


def test_colours_do_not_give_the_class_away():
    """The mean colour under the mask, by nearest class mean, is right little oftener than one time in ten."""
    scenes = [sample("train", index, 32) for index in range(600)]
    colours = np.array([s.image[s.mask].mean(axis=0) for s in scenes])
    labels = np.array([s.label for s in scenes])
    means = np.array([colours[:300][labels[:300] == label].mean(axis=0) for label in range(10)])
    nearest = np.argmin(((colours[300:, None] - means) ** 2).sum(axis=2), axis=1)
    assert (nearest == labels[300:]).mean() < 0.25


def test_splits_share_no_seed():
    starts = sorted(SPLITS.values())
    assert len(SPLITS) == 3
    assert all(b - a >= 1_000_000 for a, b in pairwise(starts))


def test_ten_samples_in_a_row_hold_every_class():
    assert sorted(sample("table", index, 16).label for index in range(30, 40)) == list(range(10))


def test_a_mosaic_is_four_scenes_of_four_classes():
    for index in range(10):
        four = mosaic(index, size=48)
        assert (four.image.shape, four.masks.shape) == ((96, 96, 3), (4, 96, 96))
        assert len(set(four.labels)) == 4
        quarters = [
            (slice(0, 48), slice(0, 48)),
            (slice(0, 48), slice(48, 96)),
            (slice(48, 96), slice(0, 48)),
            (slice(48, 96), slice(48, 96)),
        ]
        for place, quarter in enumerate(quarters):
            assert four.masks[place].any()
            assert four.masks[place].sum() == four.masks[place][quarter].sum()
        np.testing.assert_array_equal(four.image, mosaic(index, size=48).image)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scene(10, 0), "label must be 0 to 9, not 10"),
        (lambda: scene(-1, 0), "label must be 0 to 9, not -1"),
        (lambda: scene(0, 0, 15), "size must be 16 pixels or more, not 15"),
        (lambda: sample("test", 1_000_000), "index must be 0 to 999999, not 1000000"),
    ],
    ids=["label too large", "label negative", "size", "index"],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
