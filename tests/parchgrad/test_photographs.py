"""Photographs of an evaluation: which are drawn, in what order, and where their objects are on the model's input."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from parchgrad.errors import DataError, OptionError
from parchgrad.evaluation import mosaics
from parchgrad.evaluation.images import LeftOut, Picture, mosaics_of
from parchgrad.evaluation.photographs import Placed, photographs_of, places_of_boxes, places_of_masks
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import ImageFolder

# The shorter side of 40 to 20, the middle 16 x 12 (h, w) of it.
PREPROCESSING = Preprocessing(size=(16, 12), resize=20)
WIDTH, HEIGHT = 60, 40
MODEL = Model(
    name="net", version="1", architecture="none", weights_sha256="", labels=("cat", "dog", "tree", "crane", "crane"),
    class_ids=("n01", "n02", "n03", "n04", "n05"), preprocessing=PREPROCESSING, module=nn.Identity(), folder=Path(),
)  # fmt: skip
COUNTS = {"cat": 7, "dog": 4, "tree": 2, "n05": 5}


@pytest.fixture
def source(tmp_path):
    """18 photographs of 60 x 40 pixels, no two alike, of four classes."""
    generator = np.random.default_rng(0)
    for label, count in COUNTS.items():
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{label}{i}.png")
    return ImageFolder.scan(tmp_path / "data", MODEL)


def names(photographs):
    return [picture.name for picture in photographs.pictures]


def by_hand(edges):
    """Of one box: its corners scaled by 20 / 40, and moved by what is cut of 30 x 20 on each side; whole pixels."""
    x0, y0, x1, y1 = (edge / 2 - cut for edge, cut in zip(edges, (9, 2, 9, 2), strict=True))
    assert all(edge.is_integer() for edge in (x0, y0, x1, y1))
    mask = np.zeros((16, 12), bool)
    mask[max(int(y0), 0) : max(int(y1), 0), max(int(x0), 0) : max(int(x1), 0)] = True
    return mask


# Which are drawn


def test_classes_take_turns_as_long_as_they_have_images(source):
    found = photographs_of(source, PREPROCESSING, None, seed=0)
    assert sorted(names(found)) == sorted(source.names), "each once"
    assert found.left_out == LeftOut((), (), 18)
    assert found.placed is None
    targets = source.targets[found.indices].tolist()
    start, left = 0, {source.classes[i]: count for i, count in enumerate(COUNTS.values())}
    while start < 18:
        turn = {target for target, count in left.items() if count}
        assert set(targets[start : start + len(turn)]) == turn
        start += len(turn)
        left = {target: count - (target in turn) for target, count in left.items()}


def test_a_picture_is_the_preprocessed_photograph_of_its_name(source):
    found = photographs_of(source, PREPROCESSING, 6, seed=0)
    assert len(found.pictures) == 6
    for index, picture in zip(found.indices, found.pictures, strict=True):
        expected = PREPROCESSING.apply(Image.open(source.path(index)))[0]
        assert (picture.image == expected).all()
        assert (picture.target, picture.mask) == (source.targets[index], None)
        assert picture.name == picture.group == source.name(index)


@pytest.mark.parametrize("together", [1, 3, 64])
def test_the_first_are_the_same_whatever_the_count(source, together, monkeypatch):
    monkeypatch.setattr("parchgrad.evaluation.photographs.READ_TOGETHER", together)
    broken = [source.path(i) for i in (0, 3, 9, 11, 12)]  # both of the third class among them
    for path in broken:
        path.write_bytes(b"no image")
    everything = names(photographs_of(source, PREPROCESSING, None, seed=1))
    assert len(everything) == 13
    for count in range(1, 18):
        assert names(photographs_of(source, PREPROCESSING, count, seed=1)) == everything[:count]
    assert names(photographs_of(source, PREPROCESSING, 99, seed=1)) == everything
    assert names(photographs_of(source, PREPROCESSING, None, seed=2)) != everything


def test_used_and_unreadable_images_give_their_turn_to_another_and_are_counted(source):
    whole = names(photographs_of(source, PREPROCESSING, 4, seed=0))
    used, broken = whole[0], whole[2]
    digests = {hashlib.blake2b((Path(source.root) / used).read_bytes(), digest_size=16).hexdigest()}
    (Path(source.root) / broken).write_bytes((Path(source.root) / broken).read_bytes()[:500])
    seen = []
    found = photographs_of(source, PREPROCESSING, 4, 0, used=digests, progress=lambda *now: seen.append(now))
    assert found.left_out == LeftOut((used,), (broken,), 6)
    for number, (before, now) in enumerate(zip(whole, names(found), strict=True)):
        assert Path(now).parent == Path(before).parent, "of the same class"
        assert (now == before) == (number in (1, 3))
    assert seen[-1] == (4, 4)


def test_fewer_than_asked_for_are_all_there_are(source):
    seen = []
    source.path(2).unlink()
    found = photographs_of(source, PREPROCESSING, 99, 0, progress=lambda *now: seen.append(now))
    assert (len(found.pictures), found.left_out.looked_at, seen[-1]) == (17, 18, (17, 17))
    for index in range(18):
        source.path(index).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 18 images can be evaluated; 0 were used .*, 18 cannot be read"):
        photographs_of(source, PREPROCESSING, None, 0)
    with pytest.raises(OptionError, match="Option 'count' is 0"):
        photographs_of(source, PREPROCESSING, 0, 0)


# Boxes


@pytest.fixture
def boxed(source, tmp_path):
    """Photographs with the boxes of CSV rows `image: [(x0, y0, x1, y1[, label])]`."""

    def made(rows, size=(WIDTH, HEIGHT), count=None, target=MODEL):
        lines = ["image,x0,y0,x1,y1,label,W,H"]
        for name, boxes in rows.items():
            lines += [",".join(map(str, (name, *box[:4], *(box[4:] or ("",)), *size))) for box in boxes]
        (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
        places = places_of_boxes(tmp_path / "boxes.csv", source, target)
        return photographs_of(source, PREPROCESSING, count, 0, places=places)

    return made


def masks(photographs):
    return {picture.name.split("/")[1].split(".")[0]: picture.mask for picture in photographs.pictures}


# The crop shows 18 <= x < 42, 4 <= y < 36 of the original.
INSIDE, BESIDE, ACROSS, FLAT = (20, 10, 30, 24), (0, 0, 18, 40), (34, 30, 60, 40), (20, 10, 30, 10)


def test_a_mask_is_the_union_of_the_boxes_that_the_input_shows(boxed):
    found = boxed({"cat0": [INSIDE, BESIDE], "cat/cat1": [INSIDE, ACROSS, FLAT], "cat2": [BESIDE], "dog0": [FLAT]})
    by_name = masks(found)
    np.testing.assert_array_equal(by_name["cat0"], by_hand(INSIDE))
    np.testing.assert_array_equal(by_name["cat1"], by_hand(INSIDE) | by_hand(ACROSS))
    assert by_name["cat1"].sum() == 5 * 7 + 4 * 3
    assert {name for name, mask in by_name.items() if mask is not None} == {"cat0", "cat1"}
    assert len(by_name) == 18, "a photograph without a place stays"
    assert found.placed == Placed(with_place=2, without=14, of_others=0, unseen=2, boxes_outside=2, boxes_degenerate=2)


def test_only_drawn_photographs_are_counted(boxed):
    every = {f"{label}{i}": [INSIDE] for label, count in COUNTS.items() for i in range(count)}
    assert boxed(every, count=5).placed == Placed(5, 0, 0, 0, 0, 0)


def test_boxes_of_other_classes_do_not_count(boxed):
    """Of the class, by any of its words; else those of no class of the model; else there is no place."""
    found = boxed(
        {
            "cat0": [(*INSIDE, "cat"), (*ACROSS, "dog"), (*ACROSS, "person")],
            "cat1": [(*INSIDE, "n01"), (*ACROSS, "0"), (*BESIDE, "dog")],
            "cat2": [(*INSIDE, "person"), (*ACROSS, "n02")],
            "cat3": [(*INSIDE, ""), (*ACROSS, "tree")],
            "dog0": [(*INSIDE, "cat"), (*ACROSS, "tree")],
            "n050": [(*INSIDE, "crane"), (*ACROSS, "n04")],
        }
    )
    by_name = masks(found)
    for name in ("cat0", "cat2", "cat3", "n050"):
        np.testing.assert_array_equal(by_name[name], by_hand(INSIDE), err_msg=name)
    np.testing.assert_array_equal(by_name["cat1"], by_hand(INSIDE) | by_hand(ACROSS))
    assert by_name["dog0"] is None
    assert found.placed == Placed(5, 12, of_others=1, unseen=0, boxes_outside=0, boxes_degenerate=0)


def test_boxes_of_an_image_of_another_size_are_refused_by_its_name(boxed):
    with pytest.raises(DataError, match=r"^Image 'tree/tree1\.png': Boxes are of an image of 40 x 60 pixels"):
        boxed({"tree1": [INSIDE]}, size=(40, 60))


def test_no_place_at_all_is_refused(boxed):
    with pytest.raises(DataError, match=r"boxes\.csv' are of none of the 18 images of '.*', such as 'cat/cat0\.png'"):
        boxed({"cow0": [INSIDE]})
    with pytest.raises(
        DataError, match=r"none of the 18 images drawn has a place by .*; 15 have .*, 1 only .*, 2 none"
    ):
        boxed({"cat0": [BESIDE], "cat1": [FLAT], "dog0": [(*INSIDE, "cat")]})


def test_a_name_of_two_images_is_refused(source, boxed):
    source.path(0).rename(source.path(0).with_name("dog0.png"))
    source.names[0] = "cat/dog0.png"
    with pytest.raises(DataError, match=r"Boxes of 'dog0' fit the images 'cat/dog0\.png' and 'dog/dog0\.png'"):
        boxed({"dog0": [INSIDE]})


# Masks


def write_mask(file, edges, size=(WIDTH, HEIGHT), level=255):
    pixels = np.zeros(size[::-1], np.uint8)
    x0, y0, x1, y1 = edges
    pixels[y0:y1, x0:x1] = level
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def test_masks_are_files_of_the_images_names(source, tmp_path):
    folder = tmp_path / "masks"
    write_mask(folder / "cat" / "cat0.png", INSIDE)
    write_mask(folder / "dog2.PNG", ACROSS, level=3)
    write_mask(folder / "deep" / "n051.png", BESIDE)
    write_mask(folder / "nobody.png", INSIDE)
    found = photographs_of(source, PREPROCESSING, None, 0, places=places_of_masks(folder, source))
    by_name = masks(found)
    np.testing.assert_array_equal(by_name["cat0"], by_hand(INSIDE))
    np.testing.assert_array_equal(by_name["dog2"], by_hand(ACROSS))
    assert by_name["n051"] is None
    assert found.placed == Placed(2, 15, of_others=0, unseen=1, boxes_outside=0, boxes_degenerate=0)
    found = photographs_of(source, PREPROCESSING, None, 0, places=places_of_masks(folder, source, value=3))
    assert {name for name, mask in masks(found).items() if mask is not None} == {"dog2"}
    with pytest.raises(DataError, match="none of the 18 images drawn has a place"):
        photographs_of(source, PREPROCESSING, None, 0, places=places_of_masks(folder, source, value=4))


def test_what_is_wrong_with_masks_is_said(source, tmp_path):
    folder = tmp_path / "masks"
    with pytest.raises(DataError, match=r"masks' is no folder with \.png files"):
        places_of_masks(folder, source)
    write_mask(folder / "nobody.png", INSIDE)
    with pytest.raises(DataError, match=r"masks' are of none of the 18 images of '.*', such as 'cat/cat0\.png'"):
        places_of_masks(folder, source)
    write_mask(folder / "cat0.png", INSIDE, size=(40, 60))
    with pytest.raises(DataError, match=r"^Image 'cat/cat0\.png': A mask has 40 x 60 pixels; expected 60 x 40"):
        photographs_of(source, PREPROCESSING, None, 0, places=places_of_masks(folder, source))
    (folder / "cat0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^Image 'cat/cat0\.png': Mask '.*cat0\.png' cannot be read: it is no PNG"):
        photographs_of(source, PREPROCESSING, None, 0, places=places_of_masks(folder, source))
    write_mask(folder / "deep" / "cat0.png", INSIDE)
    with pytest.raises(DataError, match=r"'cat/cat0\.png' fits the masks of 'cat0' and 'deep/cat0'"):
        places_of_masks(folder, source)
    write_mask(folder / "cat0.PNG", INSIDE)
    with pytest.raises(DataError, match=r"two masks of 'cat0', 'cat0\.PNG' and 'cat0\.png'"):
        places_of_masks(folder, source)


# Mosaics as pictures


def test_a_mosaic_is_named_and_grouped_by_the_photograph_of_its_target(source):
    made = mosaics_of(source, PREPROCESSING, 6, seed=0).pictures
    drawn, quarters = mosaics.draw(source.targets, 6, 0)
    assert [picture.name for picture in made] == [f"mosaic {number}" for number in range(6)]
    assert [picture.group for picture in made] == [
        source.name(row[quarter]) for row, quarter in zip(drawn, quarters, strict=True)
    ]


def test_a_picture_without_a_mask_has_no_place():
    with pytest.raises(DataError, match=r"Picture 'a\.png' has no mask; expected one"):
        _ = Picture(None, 0, name="a.png").place


def test_spread_mosaics_use_each_image_of_a_class_before_any_twice(source):
    """Counted over every prefix; an image that cannot be read is made up for by the least used."""
    targets = source.targets
    drawn, _ = mosaics.draw(targets, 30, 0, spread=True)
    for count in range(1, 31):
        times = np.bincount(drawn[:count].ravel(), minlength=18)
        assert all(np.ptp(times[targets == target]) <= 1 for target in source.classes)
    assert all(len(set(targets[row])) == 4 for row in drawn)
    plain = np.bincount(mosaics.draw(targets, 30, 0)[0].ravel(), minlength=18)
    assert any(np.ptp(plain[targets == target]) > 1 for target in source.classes)
    source.path(0).write_bytes(b"no image")
    made = mosaics_of(source, PREPROCESSING, 30, 0, spread=True)
    assert made.left_out.unreadable == (source.name(0),)
    single = {
        PREPROCESSING.apply(Image.open(source.path(i)))[0].numpy().tobytes(): i for i in range(1, 18)
    }  # which image a quarter is
    used = [
        single[picture.image[:, r : r + 16, c : c + 12].numpy().tobytes()]
        for picture in made.pictures
        for r in (0, 16)
        for c in (0, 12)
    ]
    times = np.bincount(used, minlength=18)
    assert times[0] == 0
    assert np.ptp(times[1:7]) <= 1
