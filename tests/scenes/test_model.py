"""The committed model package: small, loadable, and right about scenes it was never trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parchgrad.models import Model, load_model
from scenes.generator import mosaic
from scenes.objects import CLASSES
from scenes.train import PREPROCESSING, accuracy, normalised

FOLDER = Path(__file__).parents[2] / "models" / "scenes"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER)


def test_the_weights_file_is_small():
    (weights,) = FOLDER.glob("*/weights.safetensors")
    assert weights.stat().st_size <= 1_500_000


def test_labels_and_preprocessing_are_the_generators_and_the_trainings(model):
    assert model.labels == CLASSES
    assert model.architecture == "scenes.network:scene_net"
    assert model.preprocessing == PREPROCESSING


def test_held_out_accuracy(model):
    assert accuracy(model.module, "test", 500) >= 0.95


def test_a_mosaics_four_classes_lead_its_logits(model):
    """Chance is 0.4: four of ten classes are in the picture."""
    hits = 0
    for index in range(25):
        four = mosaic(index, size=64)
        pixels = torch.from_numpy(four.image).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            logits = model.module(normalised(pixels))[0]
        hits += len(set(logits.topk(4).indices.tolist()) & set(four.labels))
    assert hits / 100 >= 0.8
