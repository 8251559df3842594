"""Trains the bundled network on generated scenes and writes its model package; seeded, minutes on two cores.

`python -m scenes.train` (or `make model`). The network learns from class labels alone: the masks are never
shown to it. Part of the training pictures are mosaics of four scenes labelled with the four classes, so that
one object's presence is no evidence against another's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from parchgrad.models import add_model
from parchgrad.preprocessing import Preprocessing
from scenes.generator import Split, sample
from scenes.network import scene_net
from scenes.objects import CLASSES

SIZE = 128
PREPROCESSING = Preprocessing(
    size=(SIZE, SIZE), rule="native", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), min_side=48, max_side=512
)
VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """What training is made of. `scenes` are drawn once and kept; `images` counts how many the network sees."""

    seed: int = 0
    scenes: int = 12_000
    images: int = 120_000
    batch: int = 64
    peak_rate: float = 4e-3
    weight_decay: float = 0.05
    # Mosaics begin after this share of the steps, and are then this share of the batches.
    mosaics_from: float = 0.4
    mosaics: float = 0.4


def _image(index: int) -> NDArray[np.uint8]:
    return sample("train", index, SIZE).image


def draw_scenes(count: int, workers: int, progress: Progress) -> NDArray[np.uint8]:
    """The first `count` training scenes, (count, SIZE, SIZE, 3)."""
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    task = progress.add_task("drawing scenes", total=count)
    with get_context("spawn").Pool(workers) as pool:
        for index, image in enumerate(pool.imap(_image, range(count), chunksize=50)):
            images[index] = image
            progress.advance(task)
    return images


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], (batch, 3, h, w) -> the network's input."""
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def as_mosaics(pixels: Tensor, targets: Tensor, order: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Scenes at half size, put together by fours: (n, 3, h, w) -> (n / 4, 3, h, w), and the mean of their targets."""
    parts = functional.avg_pool2d(pixels, 2)[torch.from_numpy(order)].chunk(4)
    rows = [torch.cat(parts[:2], dim=3), torch.cat(parts[2:], dim=3)]
    return torch.cat(rows, dim=2), torch.stack(targets[torch.from_numpy(order)].chunk(4)).mean(dim=0)


def batches(images: NDArray[np.uint8], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented (pixels in [0, 1], targets (n, classes) that sum to 1): scenes at one of three sizes, or mosaics."""
    rng = np.random.default_rng((recipe.seed, 1))
    steps = recipe.images // recipe.batch
    order = np.concatenate([rng.permutation(len(images)) for _ in range(-(-recipe.images // len(images)))])
    for step in range(steps):
        chosen = order[step * recipe.batch : (step + 1) * recipe.batch]
        pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float() / 255
        targets = functional.one_hot(torch.from_numpy(chosen % len(CLASSES)), len(CLASSES)).float()
        mirror = torch.from_numpy(rng.random(len(pixels)) < 0.5)
        pixels = torch.where(mirror[:, None, None, None], pixels.flip(3), pixels)
        if rng.random() < 0.5:  # swapped colour channels: new hues at no cost
            pixels = pixels[:, torch.from_numpy(rng.permutation(3))]
        kind = rng.random()
        if step >= recipe.mosaics_from * steps and kind < recipe.mosaics:
            pixels, targets = as_mosaics(pixels, targets, rng.permutation(len(pixels)))
        else:
            size = int(rng.choice((SIZE, SIZE * 3 // 4, SIZE // 2), p=(0.6, 0.2, 0.2)))
            pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        yield pixels, targets


def _optimiser(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def fit(network: nn.Module, images: NDArray[np.uint8], recipe: Recipe, bfloat16: bool, progress: Progress) -> None:
    """Trains in place: cross-entropy, AdamW, one cycle of the learning rate."""
    network.train().to(memory_format=torch.channels_last)
    optimiser = _optimiser(network, recipe)
    steps = recipe.images // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak_rate, steps, pct_start=0.2)
    task = progress.add_task("training", total=steps)
    recent = float("nan")
    for pixels, targets in batches(images, recipe):
        inputs = normalised(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = network(inputs)
        loss = functional.cross_entropy(logits.float(), targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        recent = loss.item() if recent != recent else 0.98 * recent + 0.02 * loss.item()
        progress.update(task, advance=1, description=f"training, loss {recent:.3f}")
    network.eval().to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def accuracy(network: nn.Module, split: Split, count: int, size: int = SIZE) -> float:
    """Share of the split's first `count` scenes whose prediction is their label."""
    right = 0
    for start in range(0, count, 50):
        scenes = [sample(split, index, size) for index in range(start, min(start + 50, count))]
        pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor([s.label for s in scenes])
        right += int((network(normalised(pixels)).argmax(dim=1) == labels).sum())
    return right / count


def stored(network: nn.Module) -> dict[str, Tensor]:
    """The state dict with convolution and linear weights in float16, which halves the file; the rest as it is."""
    return {key: value.half() if value.ndim > 1 else value for key, value in network.state_dict().items()}


def save(network: nn.Module, models_dir: Path) -> Path:
    """Writes the package `scenes`, version 1, in place of the one there."""
    target = models_dir / "scenes" / str(VERSION)
    if target.exists():
        shutil.rmtree(target)
    return add_model(
        "scenes",
        architecture="scenes.network:scene_net",
        weights=stored(network),
        labels=CLASSES,
        preprocessing=PREPROCESSING,
        models_dir=models_dir,
        version=VERSION,
    )


@click.command(help="Train the bundled model on generated scenes and write it under MODELS_DIR/scenes/1.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"), show_default=True)
@click.option("--seed", default=Recipe.seed, show_default=True)
@click.option("--scenes", default=Recipe.scenes, show_default=True, help="Different scenes to train on.")
@click.option("--images", default=Recipe.images, show_default=True, help="Scenes seen in all, repeats counted.")
@click.option("--threads", default=1, show_default=True, help="Training threads; two on shared cores are far slower.")
@click.option("--bfloat16/--float32", default=None, help="Arithmetic; by default what the CPU does faster.")
def main(models_dir: Path, seed: int, scenes: int, images: int, threads: int, bfloat16: bool | None) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(seed=seed, scenes=scenes, images=images)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        drawn = draw_scenes(recipe.scenes, os.cpu_count() or 1, progress)
        network = scene_net(len(CLASSES))
        fit(network, drawn, recipe, has_fast_bfloat16() if bfloat16 is None else bfloat16, progress)
    network.load_state_dict(stored(network))  # what is measured is what is saved
    for size in (SIZE, SIZE // 2):
        click.echo(f"held-out accuracy, 1000 scenes of {size}×{size}: {accuracy(network, 'test', 1000, size):.1%}")
    click.echo(f"written: {save(network, models_dir)}")


if __name__ == "__main__":
    main()
