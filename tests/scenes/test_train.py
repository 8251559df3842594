"""Training's parts, and one tiny training from command to package; what it learns is test_model.py's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from parchgrad.models import load_model
from scenes.folder import main as write_scenes
from scenes.generator import sample
from scenes.objects import CLASSES
from scenes.train import Recipe, as_mosaics, batches, main, normalised


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([sample("train", index, 128).image for index in range(20)])


def test_a_mosaic_keeps_the_order_of_its_parts_and_shares_its_target():
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    targets = torch.eye(10)[[3, 1, 4, 1]]
    mosaics, shares = as_mosaics(pixels, targets, np.array([2, 0, 3, 1]))
    corners = mosaics[0, 0, [0, 0, 7, 7], [0, 7, 0, 7]]
    assert corners.tolist() == [2, 0, 3, 1]
    assert mosaics.shape == (1, 3, 8, 8)
    assert shares[0, [1, 3, 4]].tolist() == [0.5, 0.25, 0.25]


def test_the_same_seed_gives_the_same_batches(images):
    recipe = Recipe(images=96, batch=8)
    first, again = list(batches(images, recipe)), list(batches(images, recipe))
    other = list(batches(images, Recipe(seed=1, images=96, batch=8)))
    assert len(first) == 12
    for (pixels, targets), (same_pixels, same_targets) in zip(first, again, strict=True):
        assert torch.equal(pixels, same_pixels)
        assert torch.equal(targets, same_targets)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True) if a[1].shape == b[1].shape)


def test_every_batch_has_targets_that_sum_to_one_and_a_size_the_network_takes(images):
    kinds = set()
    for pixels, targets in batches(images, Recipe(images=400, batch=8)):
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))
        assert len(pixels) == len(targets)
        kinds.add((len(pixels), pixels.shape[-1]))
    assert kinds == {(8, 128), (8, 96), (8, 64), (2, 128)}


def test_normalising_is_the_packages_preprocessing(images):
    from scenes.train import PREPROCESSING

    expected, placement = PREPROCESSING.apply(Image.fromarray(images[0]))
    torch.testing.assert_close(normalised(torch.from_numpy(images[0]).permute(2, 0, 1).float() / 255), expected)
    assert placement.crop_box == (0, 0, 128, 128)


def test_a_tiny_training_writes_a_package_that_loads_and_replaces_it(tmp_path, monkeypatch):
    monkeypatch.setattr("scenes.train.accuracy", lambda *args: 0.5)
    arguments = ["--models-dir", str(tmp_path), "--scenes", "20", "--images", "128", "--float32"]
    digests = []
    for seed in ("0", "0", "1"):
        result = CliRunner().invoke(main, [*arguments, "--seed", seed], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "held-out accuracy" in result.output
        digests.append(load_model(tmp_path / "scenes").weights_sha256)
    assert digests[0] == digests[1] != digests[2]
    assert load_model(tmp_path / "scenes").labels == CLASSES


def test_scenes_are_written_as_a_folder_of_classes(tmp_path):
    result = CliRunner().invoke(write_scenes, [str(tmp_path), "--split", "test", "--count", "20", "--size", "32"])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == list(CLASSES)
    assert {len(list(p.iterdir())) for p in tmp_path.iterdir()} == {2}
    with Image.open(tmp_path / CLASSES[3] / "000013.png") as image:
        np.testing.assert_array_equal(np.asarray(image), sample("test", 13, 32).image)
