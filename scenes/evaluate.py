"""The bundled model's figures: every method measured on held-out mosaics and on scenes with exact masks; accuracy.

`python -m scenes.evaluate` (or `make figures`). What `parchgrad evaluate` does, on pictures that are made when needed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from rich.console import Console

from parchgrad.cli.shared import progress_bar
from parchgrad.evaluation.images import LazyPictures, Picture
from parchgrad.evaluation.methods import Method, all_methods
from parchgrad.evaluation.mosaics import quarter_mask
from parchgrad.evaluation.report import natural_width, results_table
from parchgrad.evaluation.study import Effort, Subject, cases_of, study
from parchgrad.evaluation_page import write_page
from parchgrad.explainer import Explainer
from parchgrad.models import Model, load_model
from parchgrad.tables import load_table
from scenes.generator import mosaic, sample
from scenes.train import accuracy

MODEL, TABLE = "models/scenes", "selection_tables/scenes"
SIDE = 128
ACCURACY_SCENES = 1000

COUNT = click.IntRange(1)
FEW = click.IntRange(0)
FILE = click.Path(dir_okay=False, path_type=Path)


def mosaics(model: Model, count: int, size: int) -> LazyPictures:
    """Mosaics of four held-out scenes, `size` pixels each; the target's place is its quarter."""

    def picture(number: int) -> Picture:
        made, quarter = mosaic(number, "test", size), number % 4
        pixels = model.preprocessing.normalise(Image.fromarray(made.image))
        # All scenes of all mosaics are different ones: each mosaic is a group of its own.
        name = f"mosaic {number}"
        return Picture(pixels, made.labels[quarter], quarter_mask(size, size, quarter), name=name, group=name)

    return LazyPictures(count, picture)


def singles(model: Model, count: int, size: int) -> LazyPictures:
    """Held-out scenes; the target's place is the object's visible pixels."""

    def picture(number: int) -> Picture:
        scene, name = sample("test", number, size), f"scene {number}"
        pixels = model.preprocessing.normalise(Image.fromarray(scene.image))
        return Picture(pixels, scene.label, scene.mask, name=name, group=name)

    return LazyPictures(count, picture)


def subject_of(
    explainer: Explainer, model: Model, methods: Sequence[Method], count: int, *, batch_size: int = 8, workers: int = 1
) -> Subject:
    """`count` mosaics and as many scenes."""
    return Subject(
        explainer, methods, mosaics(model, count, SIDE), singles(model, count, SIDE), model.labels,
        model.preprocessing, batch_size, workers,
    )  # fmt: skip


@click.command(help="Print the figures of docs/figures.md for the bundled model.")
@click.option("--count", type=COUNT, default=200, show_default=True, help="Mosaics, and as many scenes.")
@click.option("--curves", type=FEW, default=16, show_default=True, help="Scenes that pixels are taken from.")
@click.option("--checks", type=FEW, default=8, show_default=True, help="Scenes of the sanity checks.")
@click.option("--seed", type=FEW, default=0, show_default=True, help="Draws everything random but the scenes.")
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Processes, forked.")
@click.option("--report", type=FILE, help="Also write a page to look at: one HTML file.")
@click.option("--json", "json_file", type=FILE, help="Also write everything as JSON.")
def main(
    count: int, curves: int, checks: int, seed: int, workers: int, report: Path | None, json_file: Path | None
) -> None:
    torch.set_num_threads(1)  # the processes use the processors
    model = load_model(MODEL)
    explainer = Explainer(model, load_table(TABLE, model))
    methods, unavailable = all_methods(explainer, seed=seed)
    for missing in unavailable:
        click.echo(f"{missing.name}: left out. {missing.reason}", err=True)
    effort = Effort(curves=curves, checks=checks)
    subject = subject_of(explainer, model, methods, count, workers=workers)
    settings: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "scenes.evaluate", *sys.argv[1:]]),
        "model": {"name": model.name, "version": model.version, "weights_sha256": model.weights_sha256},
        "table": {"name": explainer.table.name, "table_sha256": explainer.table.table_sha256},
        "data": {"name": "held-out scenes", "mosaics": count, "scenes": count, "seed": seed},
        "effort": asdict(effort),
    }
    with progress_bar("Evaluating", "forward passes") as progress:
        results = study(subject, effort, settings, unavailable=unavailable, progress=progress)
    if json_file is not None:
        results.write_json(json_file)
    if report is not None:
        with progress_bar("Drawing", "pictures") as progress:
            write_page(results, cases_of(subject, results, progress=progress), report)
    view = results_table(results)
    Console(width=natural_width(view)).print(view)
    click.echo(f"accuracy on {ACCURACY_SCENES} held-out scenes: {accuracy(model.module, 'test', ACCURACY_SCENES):.3f}")


if __name__ == "__main__":
    main()
