"""A tiny model with a random table, a server that serves it, and pictures to send."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import REGISTRY
from torchvision import models

import parchgrad
from parchgrad import golden
from parchgrad.preprocessing import Preprocessing
from tests.service.serving import PROJECT_ROOT, Server, serving

DATA = PROJECT_ROOT.parent / "shared" / "data"
LABELS = [f"thing {i}" for i in range(10)]
COVERED = 8  # of the ten classes; the table has no row for the last two


@dataclass(frozen=True)
class Home:
    """Folders of a server: models, tables, and BentoML's own."""

    root: Path

    @property
    def settings(self) -> dict[str, object]:
        return {
            "models_dir": self.root / "models", "tables_dir": self.root / "tables", "graphs_dir": self.root / "graphs",
            "model": "tiny", "threads": 1, "drain_ms": 0, "attacks": 1,
            "watch_rate": 0,  # no chance in what a test counts
        }  # fmt: skip

    def explainer(self) -> parchgrad.Explainer:
        model = parchgrad.load_model(self.root / "models" / "tiny")
        return parchgrad.Explainer(model, parchgrad.load_table(self.root / "tables" / "tiny", model))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """SqueezeNet with random weights for ten classes at 64x64, and a random table for eight of them."""
    root = tmp_path_factory.mktemp("service")
    torch.manual_seed(0)
    network = models.squeezenet1_1(weights=None, num_classes=len(LABELS))
    # Wide random logits, so that predictions differ from image to image.
    torch.nn.init.normal_(network.classifier[1].weight, std=0.1)
    parchgrad.add_model(
        "tiny",
        architecture="squeezenet1_1",
        weights=network.state_dict(),
        labels=LABELS,
        preprocessing=Preprocessing(size=(64, 64), rule="shorter_side", resize=72),
        models_dir=root / "models",
    )
    model = parchgrad.load_model(root / "models" / "tiny")
    folder = root / "tables" / "tiny" / "1"
    table = parchgrad.SelectionTable.random(model, COVERED, seed=0).save(folder)
    golden.record(parchgrad.Explainer(model, parchgrad.load_table(folder, model)), table.folder)
    return Home(root)


@pytest.fixture(scope="session")
def server(home: Home) -> Iterator[Server]:
    with serving(home.root / "bentoml", settings=home.settings) as running:
        yield running


@pytest.fixture(scope="session")
def bad_images() -> Path:
    folder = DATA / "bad_images"
    if not folder.is_dir():
        pytest.skip("../shared/data/bad_images is not here")
    return folder


def counted(name: str, **labels: str) -> float:
    """The sum of a metric's samples in this process that carry `labels`; Server.metric has a server's."""
    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def picture(seed: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth coloured picture, (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    """httpx `files=` of several parts named image."""
    return [("image", (f"{i}.png", content, "image/png")) for i, content in enumerate(contents)]
