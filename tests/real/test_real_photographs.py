"""ImageNet's validation photographs, in a flat folder, with the labels and places of their boxes."""

import csv

import numpy as np
import pytest
import torch

from parchgrad.evaluation.photographs import photographs_of, places_of_boxes
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import open_listed
from tests.real.conftest import DATA

FOLDER, BOXES = DATA / "imagenet_val", DATA / "imagenet_val" / "boxes.csv"

pytestmark = pytest.mark.skipif(
    not BOXES.is_file(), reason="no ../shared/data/imagenet_val/boxes.csv: real boxes are not here"
)


@pytest.fixture(scope="module")
def imagenet():
    """A model of ImageNet's classes and usual preprocessing; its network is not asked."""
    lines = (DATA / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    ids, labels = zip(*(line.split(" ", 1) for line in lines), strict=True)
    return Model(
        name="imagenet", version="1", architecture="none", weights_sha256="", labels=labels, class_ids=ids,
        preprocessing=Preprocessing(size=(224, 224), resize=256), module=torch.nn.Identity(), folder=DATA,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    with BOXES.open(newline="") as file:
        return list(csv.DictReader(file))


def shown(row):
    """A box's edges within the crop, in pixels of the photograph; the crop is 224/256 of the shorter side, central."""
    width, height = int(row["W"]), int(row["H"])
    half = min(width, height) * 224 / 256 / 2
    return [
        min(max(int(row[f"{axis}{end}"]), side / 2 - half), side / 2 + half)
        for end in (1, 2)
        for axis, side in (("x", width), ("y", height))
    ], (2 * half) ** 2


def test_a_flat_folder_has_the_labels_and_places_of_its_boxes(imagenet, rows):
    source = open_listed(FOLDER, imagenet, BOXES)
    said = {row["image_id"]: int(row["class_idx"]) for row in rows}
    assert len(source) == 200
    assert source.unlabelled == ()
    assert {source.name(i): target for i, target in enumerate(source.targets.tolist())} == {
        f"{image}.JPEG": target for image, target in said.items()
    }
    found = photographs_of(source, imagenet.preprocessing, None, 0, places=places_of_boxes(BOXES, source, imagenet))
    placed = found.placed
    assert (placed.without, placed.of_others) == (0, 0)
    assert placed.with_place + placed.unseen == len(found.pictures) == 200
    areas = {}
    for row in rows:
        (x0, y0, x1, y1), crop = shown(row)
        areas.setdefault(row["image_id"], []).append(max(x1 - x0, 0) * max(y1 - y0, 0) / crop)
    assert placed.boxes_outside == sum(area == 0 for boxes in areas.values() for area in boxes)
    assert placed.with_place == sum(max(boxes) > 0 for boxes in areas.values())
    single = []
    for picture in found.pictures:
        assert picture.image.shape == (3, 224, 224)
        boxes = areas[picture.name.removesuffix(".JPEG")]
        if picture.mask is None:
            assert max(boxes) == 0
        elif len(boxes) == 1:
            # Of one box, its pixels are its area; the photograph's sides are rounded when it is resized.
            assert picture.mask.mean() == pytest.approx(boxes[0], abs=0.012)
            single.append((picture.mask.mean(), boxes[0]))
        else:
            assert max(boxes) - 0.012 <= picture.mask.mean() <= sum(boxes) + 0.012
    assert len(single) > 100
    ours, direct = np.mean(single, axis=0)
    assert ours == pytest.approx(direct, abs=0.001)
