"""The bundled model's figures: accuracy, and methods compared on held-out mosaics and on scenes with exact masks.

`python -m scenes.evaluate` (or `make figures`).
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID

from parchgrad.evaluation.compare import compare, standard_methods
from parchgrad.evaluation.images import LazyPictures, Picture
from parchgrad.evaluation.mosaics import quarter_mask
from parchgrad.evaluation.report import score_table
from parchgrad.explainer import Explainer
from parchgrad.models import Model, load_model
from parchgrad.tables import load_table
from scenes.generator import mosaic, sample
from scenes.train import accuracy

CAM_LAYER = "features"
ACCURACY_SCENES = 1000


def mosaics(model: Model, count: int, size: int) -> LazyPictures:
    """Mosaics of four held-out scenes, `size` pixels each; the target's place is its quarter."""

    def picture(number: int) -> Picture:
        made, quarter = mosaic(number, "test", size), number % 4
        pixels = model.preprocessing.normalise(Image.fromarray(made.image))
        return Picture(pixels, made.labels[quarter], quarter_mask(size, size, quarter))

    return LazyPictures(count, picture)


def singles(model: Model, count: int, size: int) -> LazyPictures:
    """Held-out scenes; the target's place is the object's visible pixels."""

    def picture(number: int) -> Picture:
        scene = sample("test", number, size)
        return Picture(model.preprocessing.normalise(Image.fromarray(scene.image)), scene.label, scene.mask)

    return LazyPictures(count, picture)


@click.command(help="Print the figures of docs/figures.md for the bundled model.")
@click.option("--count", default=200, show_default=True, help="Pictures of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write them here.")
def main(count: int, json_file: Path | None) -> None:
    console = Console(width=100)
    model = load_model("models/scenes")
    explainer = Explainer(model, load_table("selection_tables/scenes", model))
    methods = standard_methods(explainer, cam_layer=CAM_LAYER)
    figures = {}
    with Progress(console=Console(stderr=True)) as progress:
        for kind, pictures in {"mosaics": mosaics(model, count, 128), "scenes": singles(model, count, 128)}.items():
            update = partial(_show_progress, progress, progress.add_task(kind))
            figures[kind] = compare(methods, pictures, progress=update)
    areas = [float(p.mask.mean()) for p in singles(model, count, 128)]
    for kind, scores in figures.items():
        chance = "0.25" if kind == "mosaics" else f"{sum(areas) / count:.2f}"
        console.print(score_table(scores, f"{count} held-out {kind}; chance {chance}"))
    console.print(
        f"accuracy on {ACCURACY_SCENES} held-out scenes: {accuracy(model.module, 'test', ACCURACY_SCENES):.3f}"
    )
    if json_file is not None:
        plain = {kind: [dataclasses.asdict(s) for s in scores] for kind, scores in figures.items()}
        json_file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _show_progress(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
