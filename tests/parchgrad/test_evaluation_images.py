"""The images of an evaluation: mosaics of a folder, and which of its images may be looked at."""

import dataclasses

import numpy as np
import pytest

from parchgrad.errors import DataError
from parchgrad.evaluation import mosaics
from parchgrad.evaluation.images import LeftOut, mosaics_of, usable
from parchgrad.evidence import digest_of
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing, read_image
from parchgrad.sources import ImageFolder
from tests.oracles.tolerance import assert_close, relative_l2
from tests.parchgrad.test_build import write_images


@pytest.fixture
def folder(tmp_path, tiny_model):
    for seed, label in enumerate(("cat", "dog", "tree", "bus", "fish")):
        write_images(tmp_path / label, 3, seed)
    return ImageFolder.scan(tmp_path, tiny_model)


@pytest.fixture
def tiny_model(tmp_path_factory):
    architecture = "tests.parchgrad.factories:small"
    return load_model(
        add_model(
            "net",
            architecture=architecture,
            weights=build_network(architecture, 5).state_dict(),
            labels=["cat", "dog", "tree", "bus", "fish"],
            preprocessing=Preprocessing(size=(12, 10), resize=14),
            models_dir=tmp_path_factory.mktemp("models"),
        )
    )


def by_pixels(folder, model):
    """Each image's index by its preprocessed pixels."""
    found = {}
    for index in range(len(folder)):
        tensor = model.preprocessing.apply(read_image(folder.path(index)))[0]
        found[tensor.numpy().tobytes()] = index
    return found


def images_in(picture, indices):
    """The four images of a 24 x 20 mosaic, in the order of its quarters."""
    quarters = [picture.image[:, r : r + 12, c : c + 10].contiguous() for r in (0, 12) for c in (0, 10)]
    return [indices[quarter.numpy().tobytes()] for quarter in quarters]


def test_mosaics_hold_four_classes_and_the_target_in_its_place(folder, tiny_model):
    made = mosaics_of(folder, tiny_model.preprocessing, 8, seed=3)
    single = by_pixels(folder, tiny_model)
    drawn, _ = mosaics.draw(folder.targets, 8, 3)
    assert made.left_out == LeftOut((), (), len(np.unique(drawn)))
    assert len(made.pictures) == 8
    for number, picture in enumerate(made.pictures):
        assert picture.image.shape == (3, 24, 20)
        images = images_in(picture, single)
        assert images == drawn[number].tolist()
        classes = folder.targets[images].tolist()
        assert len(set(classes)) == 4
        place = number % 4
        assert classes[place] == picture.target
        expected = np.zeros((24, 20), bool)
        expected[place // 2 * 12 : place // 2 * 12 + 12, place % 2 * 10 : place % 2 * 10 + 10] = True
        assert np.array_equal(picture.mask, expected)
    again = mosaics_of(folder, tiny_model.preprocessing, 8, seed=3).pictures
    assert_close(again[5].image, made.pictures[5].image, 0.0)
    other = mosaics_of(folder, tiny_model.preprocessing, 8, seed=4).pictures
    assert any(relative_l2(other[i].image, made.pictures[i].image) > 0 for i in range(8))


def test_mosaics_leave_out_used_and_unreadable_images_and_say_so(folder, tiny_model):
    """Others of the same class take their place; every other place is as drawn."""
    count = 30
    drawn, _ = mosaics.draw(folder.targets, count, 0)
    used = [int(drawn[0, 0]), int(drawn[1, 2])]
    bad = next(int(i) for i in drawn.ravel() if folder.targets[i] not in folder.targets[used])
    gone = next(int(i) for i in drawn.ravel() if folder.targets[i] not in folder.targets[[*used, bad]])
    digests = {digest_of(folder.path(i).read_bytes()).hex() for i in used}
    single = by_pixels(folder, tiny_model)
    whole = folder.path(bad).read_bytes()
    folder.path(bad).write_bytes(whole[: len(whole) // 2])
    folder.path(gone).unlink()
    made = mosaics_of(folder, tiny_model.preprocessing, count, 0, used=digests)
    assert set(made.left_out.used) == {folder.name(i) for i in used}
    assert set(made.left_out.unreadable) == {folder.name(bad), folder.name(gone)}
    stand_ins = set()
    for row, picture in zip(drawn, made.pictures, strict=True):
        for index, original in zip(images_in(picture, single), row, strict=True):
            if original in (*used, bad, gone):
                assert folder.targets[index] == folder.targets[original]
                assert index not in (*used, bad, gone)
                stand_ins.add((int(original), index))
            else:
                assert index == original
    assert len({index for original, index in stand_ins if original == bad}) == 2, "one image stands in for all"
    again = mosaics_of(folder, tiny_model.preprocessing, count, 0, used=digests)
    assert_close(again.pictures[0].image, made.pictures[0].image, 0.0)


class Watched:
    """A source that notes which images are read."""

    def __init__(self, source):
        self.source, self.read_images, self.most = source, [], 0
        self.targets, self.classes, self.name, self.take = source.targets, source.classes, source.name, source.take

    def read(self, indices):
        self.read_images += indices
        self.most = max(self.most, len(indices))
        return self.source.read(indices)


def test_usable_images_are_looked_for_no_further_than_needed(folder, monkeypatch):
    used = {digest_of(folder.path(i).read_bytes()).hex() for i in (0, 1, 4)}
    folder.path(9).write_bytes(b"no image")
    watched, seen = Watched(folder), []
    fine, left_out = usable(watched, 2, seed=0, used=used, progress=lambda *now: seen.append(now))
    assert np.bincount(fine.targets, minlength=5).tolist() == [1, 2, 2, 2, 2]
    gone = {folder.name(i) for i in (0, 1, 4, 9)}
    assert not gone & set(fine.names)
    assert (
        len(watched.read_images)
        == left_out.looked_at
        == 3
        + sum(
            2 + len(gone & {folder.name(i) for i in watched.read_images if folder.targets[i] == c}) for c in range(1, 5)
        )
    ), "all of the first class; of each other two and the bad ones met on the way"
    assert set(left_out.used) | set(left_out.unreadable) == gone & {folder.name(i) for i in watched.read_images}
    assert seen[-1] == (9, 9)
    everything, _ = usable(folder, 99, seed=0)
    assert everything.names == [name for name in folder.names if name != folder.name(9)]
    assert usable(folder, 1, seed=0)[0].names != usable(folder, 1, seed=1)[0].names
    monkeypatch.setattr("parchgrad.evaluation.images.READ_TOGETHER", 1)
    watched = Watched(folder)
    assert usable(watched, 2, seed=0, used=used)[0].names == fine.names
    assert watched.most == 1


def test_classes_of_fewer_usable_images_than_the_least_are_left_out(folder):
    used = {digest_of(folder.path(i).read_bytes()).hex() for i in (0, 1, 4)}
    fine, left_out = usable(folder, 3, seed=0, least=2, used=used)
    assert left_out.classes == (int(folder.targets[0]),)
    assert np.bincount(fine.targets, minlength=5).tolist() == [0, 2, 3, 3, 3]


def test_looking_at_drawn_images_is_counted(folder, tiny_model):
    seen = []
    made = mosaics_of(folder, tiny_model.preprocessing, 8, seed=0, progress=lambda *now: seen.append(now))
    assert seen == [(made.left_out.looked_at,) * 2]


def test_a_class_without_an_image_left_is_refused(folder, tiny_model):
    members = np.flatnonzero(folder.targets == 2)
    used = {digest_of(folder.path(i).read_bytes()).hex() for i in members[:2]}
    folder.path(members[2]).write_bytes(b"no image")
    message = "none of the 3 images of class 2 can be in a mosaic; 2 were used to build the table, 1 cannot be read"
    with pytest.raises(DataError, match=message):
        mosaics_of(folder, tiny_model.preprocessing, 8, seed=0, used=used)


def test_mosaics_need_four_classes(folder, tiny_model):
    few = folder.take(np.flatnonzero(folder.targets < 3))
    with pytest.raises(DataError, match="holds images of 3 classes; a mosaic needs 4"):
        mosaics_of(few, tiny_model.preprocessing, 8, seed=0)


def test_native_images_of_different_sizes_fit_into_one_mosaic(folder, tiny_model):
    native = dataclasses.replace(tiny_model.preprocessing, rule="native", min_side=8, max_side=64)
    assert mosaics_of(folder, native, 4, seed=0).pictures[0].image.shape == (3, 24, 20)
