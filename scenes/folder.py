"""Scenes written as image files, one folder a class: what `parchgrad table build` and other tools read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
from PIL import Image

from scenes.generator import Split, sample
from scenes.objects import CLASSES


def write_folder(root: Path, split: Split, count: int, size: int) -> Iterator[Path]:
    """Writes scenes 0 to `count` - 1 of a split as `root/<class>/<index>.png`, yielding each path written."""
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        made = sample(split, index, size)
        path = root / CLASSES[made.label] / f"{index:06d}.png"
        Image.fromarray(made.image).save(path)
        yield path


@click.command(help="Write generated scenes to ROOT, one folder a class.")
@click.argument("root", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", type=click.Choice(get_args(Split)), default="table", show_default=True)
@click.option("--count", default=2000, show_default=True, help="Scenes in all; the classes take turns.")
@click.option("--size", default=128, show_default=True, help="Pixels a side.")
def main(root: Path, split: Split, count: int, size: int) -> None:
    written = sum(1 for _ in write_folder(root, split, count, size))
    click.echo(f"{written} scenes in {root}")


if __name__ == "__main__":
    main()
