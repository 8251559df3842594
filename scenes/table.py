"""Builds the bundled model's selection table and class graph from generated scenes: `python -m scenes.table`.

Part of `make model`. The class graph keeps exemplars: scenes are nobody's photographs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.progress import Progress

from parchgrad.build import build_table
from parchgrad.class_graph.build import Options, build
from parchgrad.models import load_model
from parchgrad.sources import open_source
from parchgrad.store import write_table
from scenes.folder import write_folder

NAME = "scenes"
# Small, as it is part of the repository.
CLASS_GRAPH = Options(images_per_class=50, exemplars=3, crop_pixels=48)


@click.command(help="Build the selection table and class graph of the bundled model from generated scenes.")
@click.option("--scenes", "count", default=4000, show_default=True, help="Scenes in all, of the split 'table'.")
@click.option("--size", default=128, show_default=True, help="Pixels a side.")
@click.option("--models-dir", default="models", show_default=True, type=click.Path(path_type=Path))
@click.option("--tables-dir", default="selection_tables", show_default=True, type=click.Path(path_type=Path))
def main(count: int, size: int, models_dir: Path, tables_dir: Path) -> None:
    model = load_model(models_dir / NAME)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("drawing scenes", total=count)
        for _ in write_folder(Path(folder), "table", count, size):
            progress.advance(task)
        task = progress.add_task("building the table", total=count)
        table = build_table(model, folder, progress=lambda pass_: progress.update(task, completed=pass_.done))
        # The folder's name is random; the scenes are what the table is made of.
        data = table.built["data"] = f"scenes, split 'table', 0 to {count - 1}, {size} pixels"
        saved = write_table(table, tables_dir / NAME / model.version, model)
        task = progress.add_task("building the class graph", total=None)
        build(
            model, saved, open_source(folder, model), CLASS_GRAPH, data=data,
            progress=lambda pass_: progress.update(task, total=pass_.total, completed=pass_.done),
        )  # fmt: skip
    click.echo(f"wrote {saved.folder}")


if __name__ == "__main__":
    main()
