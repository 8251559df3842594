"""Images in folders by class -> a selection table, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import parchgrad
from parchgrad.errors import DataError, UnknownTargetError, UnsupportedModelError
from parchgrad.explainer import checked_device
from parchgrad.layers import convolutions
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing, read_image
from parchgrad.runtimes.pytorch import gap_features, private_view
from parchgrad.statistics import ClassMoments
from parchgrad.tables import Defaults, LayerTable, SelectionTable, check_defaults

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

# SciPy's Shapiro-Wilk p-value holds up to here (method.md section 1).
NORMALITY_IMAGES = 5000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """One image file and its row: the position of its class among the covered ones."""

    path: Path
    row: int


@dataclass(frozen=True)
class ImageFolder:
    """Image files in one folder a class, matched to the model's classes."""

    root: Path
    classes: tuple[int, ...]  # the model's class indices that have images, ascending
    samples: tuple[Sample, ...]

    @classmethod
    def scan(cls, root: str | os.PathLike[str], model: Model) -> ImageFolder:
        """Find the images before any work is done.

        A folder is named by a class's name, id or index. Raises DataError: no folders, a folder that is
        no class, two folders of one class, fewer than two images in a class, fewer than two classes.
        """
        root = Path(root)
        folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        if not folders:
            raise DataError(f"'{root}' holds no folders of images, expected one for each class.")
        files: dict[int, list[Path]] = {}
        for folder in folders:
            index = _class_of(folder, model)
            if index in files:
                raise DataError(f"'{folder}' is a second folder of class {index} ({model.labels[index]}).")
            files[index] = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if len(files[index]) < 2:
                found = len(files[index])
                raise DataError(f"Class folder '{folder}' holds {found} image(s); a class needs at least 2.")
        if len(files) < 2:
            raise DataError(f"'{root}' holds 1 class; a table contrasts at least 2.")
        classes = tuple(sorted(files))
        samples = tuple(Sample(path, row) for row, index in enumerate(classes) for path in files[index])
        return cls(root, classes, samples)


def build_table(
    model: Model,
    data: str | os.PathLike[str],
    *,
    defaults: Defaults | None = None,
    normality: bool = True,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> SelectionTable:
    """One pass over the images of `data`, a folder with one folder of images a class.

    Memory does not grow with the number of images. `seed` draws the class-balanced subsample of at most
    5000 images for the normality test; `normality=False` leaves that test out. `progress(done, total)` is
    called after each batch. The table has the model's name and version. Raises DataError and
    UnsupportedModelError, and TableError for defaults that do not fit, before any work where it can.
    """
    folder = ImageFolder.scan(data, model)
    check_defaults(model.name, defaults or Defaults(), convolutions(model.module), tested=normality)
    rows = np.array([sample.row for sample in folder.samples])
    tested = _balanced_subsample(rows, NORMALITY_IMAGES, seed) if normality else np.zeros(len(rows), bool)
    network = GapNetwork(model.module, checked_device(device))
    moments: dict[str, ClassMoments] = {}
    kept: dict[str, list[NDArray[np.float32]]] = {}
    done = 0
    for indices, images in _batches(folder.samples, model.preprocessing, batch_size, workers):
        features = network.features(images)
        for layer, gap in features.items():
            if layer not in moments:
                moments[layer] = ClassMoments(len(folder.classes), gap.shape[1])
                kept[layer] = []
            moments[layer].update(gap, rows[indices])
            if tested[indices].any():
                kept[layer].append(gap[tested[indices]].astype(np.float32))
        done += len(indices)
        if progress is not None:
            progress(done, len(rows))
    layers = {
        layer: LayerTable.from_moments(moments[layer], np.concatenate(kept[layer]) if normality else None)
        for layer in convolutions(model.module)
        if layer in moments
    }
    return SelectionTable(
        name=model.name,
        version=model.version,
        model_name=model.name,
        weights_sha256=model.weights_sha256,
        labels=model.labels,
        classes=folder.classes,
        layers=layers,
        images_per_class=tuple(int(n) for n in np.bincount(rows, minlength=len(folder.classes))),
        defaults=defaults or Defaults(),
        idle_layers=tuple(name for name in convolutions(model.module) if name not in moments),
        built={
            "by": f"parchgrad {parchgrad.__version__}",
            "data": folder.root.name,
            "images": len(rows),
            "feature": "mean of ReLU of the convolution's output, before normalisation",
            "test": "one-sided Welch t, class against all other images",
            "normality": {"images": int(tested.sum()), "seed": seed} if normality else None,
        },
    )


class GapNetwork:
    """A model that answers with the GAP features of its convolutions."""

    def __init__(self, module: nn.Module, device: torch.device | None) -> None:
        self._module = private_view(module, device)
        self._device = device
        self._found: dict[str, Tensor] = {}
        for name in convolutions(module):
            self._module.get_submodule(name).register_forward_hook(self._hook(name))

    def features(self, images: Tensor) -> dict[str, NDArray[np.float64]]:
        """Layer name -> GAP features `(B, C)` of normalised `images` `(B, 3, h, w)`, for layers that ran."""
        self._found = {}
        with torch.inference_mode():
            self._module(images.to(self._device))
        return {name: gap.double().cpu().numpy() for name, gap in self._found.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            if name in self._found:
                raise UnsupportedModelError(
                    f"Layer '{name}' runs twice in one forward pass; its GAP feature would be ambiguous."
                )
            self._found[name] = gap_features(output)

        return hook


class _Images(Dataset[tuple[int, "Tensor | DataError"]]):
    def __init__(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> None:
        self._samples, self._preprocessing = samples, preprocessing

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | DataError]:
        # An error raised in a worker process would arrive wrapped in that process's traceback.
        try:
            return index, self._preprocessing.apply(read_image(self._samples[index].path))[0]
        except DataError as error:
            return index, error


def _batches(
    samples: Sequence[Sample], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Indices and images `(B, 3, h, w)`; images of one size each, where sizes differ."""
    loader: DataLoader[Any] = DataLoader(
        _Images(samples, preprocessing), batch_size=batch_size, num_workers=workers, collate_fn=list
    )
    for batch in loader:
        by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for index, image in batch:
            if isinstance(image, DataError):
                raise image
            by_size.setdefault(image.shape, []).append((index, image))
        for group in by_size.values():
            yield np.array([index for index, _ in group]), torch.stack([image for _, image in group])


def _class_of(folder: Path, model: Model) -> int:
    try:
        return model.class_index(folder.name)
    except UnknownTargetError as error:
        raise DataError(f"Folder '{folder}' is named after no class of model '{model.name}': {error}") from error


def _balanced_subsample(rows: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.bool_]:
    """All images up to `limit`; of more, equal numbers from each class, or all of a class that has fewer."""
    if len(rows) <= limit:
        return np.ones(len(rows), bool)
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(rows), bool)
    quota = max(1, limit // len(np.unique(rows)))
    for row in np.unique(rows):
        members = np.flatnonzero(rows == row)
        chosen[generator.permutation(members)[:quota]] = True
    # More classes than the limit holds: one an image, then cut to the limit at random.
    return chosen if chosen.sum() <= limit else _keep_random(chosen, limit, generator)


def _keep_random(chosen: NDArray[np.bool_], limit: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    kept = np.zeros_like(chosen)
    kept[generator.permutation(np.flatnonzero(chosen))[:limit]] = True
    return kept
