"""How far a map moves where nothing was changed but the order of sums: `python -m benchmarks.replay_tolerance`.

The same images are explained with one torch thread in one batch, with two threads, and one by one; beside it, what the
uint8 encoding of an answer costs, and what a slightly different option does. Distances are relative L2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import parchgrad
from parchgrad.preprocessing import read_image

OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"gamma": 1.0}, {"selection": "instance"}, {"conserve": "exact"}, {"rule": False},
    {"method": "guided_backprop"}, {"method": "integrated_gradients", "steps": 5}, {"quantile": 0.11},
)  # fmt: skip


def distance(maps: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 distance of each map `(B, h, w)`, `(B,)`."""
    return (maps - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def uint8(maps: Tensor) -> Tensor:
    """The maps as an answer with `saliency=uint8` has them."""
    largest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.round(maps / largest * 255) * largest / 255


@click.command(help=__doc__)
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"), show_default=True)
@click.option("--tables-dir", type=click.Path(path_type=Path), default=Path("selection_tables"), show_default=True)
@click.option("--model", "name", default="scenes", show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path, exists=True), default=Path("out"), show_default=True)
@click.option("--count", default=8, show_default=True, help="Pictures taken, evenly among those in the folder.")
def main(models_dir: Path, tables_dir: Path, name: str, pictures: Path, count: int) -> None:
    model = parchgrad.load_model(models_dir / name)
    explainer = parchgrad.Explainer(model, parchgrad.load_table(tables_dir / name, model))
    files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    files = files[:: max(1, len(files) // count)][:count]
    inputs = [model.preprocessing.apply(read_image(path))[0] for path in files]
    images = torch.stack([one for one in inputs if one.shape == inputs[0].shape])
    covered = torch.tensor(explainer.table.classes)
    targets = covered[explainer.predict(images)[:, covered].argmax(dim=1)]

    def maps(threads: int, options: dict[str, Any], batch: int = len(images)) -> Tensor:
        torch.set_num_threads(threads)
        parts = [slice(i, i + batch) for i in range(0, len(images), batch)]
        return torch.cat([explainer.explain(images[part], targets[part], **options).saliency() for part in parts])

    table = Table(
        "options", "2 threads", "one by one", "uint8", "from the defaults, least", title=f"{name}, {len(images)}"
    )
    defaults = maps(1, {})
    for options in OPTIONS:
        exact = maps(1, options)
        found = [distance(other, exact).max() for other in (maps(2, options), maps(1, options, 1), uint8(exact))]
        shown = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
        table.add_row(
            shown, *(f"{float(value):.2g}" for value in found), f"{float(distance(exact, defaults).min()):.2g}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
