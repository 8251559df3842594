"""`parchgrad table`: building, keeping and looking at selection tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parchgrad.cli.shared import (
    DEVICE,
    FOLDER,
    MODELS_DIR,
    TABLES_DIR,
    ListParameter,
    load_named_model,
    named,
    progress_bar,
)

if TYPE_CHECKING:
    from parchgrad.tables import SelectionTable


@click.group("table")
def table_group() -> None:
    """Selection tables: which channels belong to which class."""


@table_group.command("build")
@click.argument("model")
@click.option(
    "--data", required=True, type=FOLDER, help="Images: one folder a class, named by class name, id or index."
)
@click.option("--force", is_flag=True, help="Replace the table if the model version has one already.")
@click.option("--quantile", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True,
              help="Default share of a layer's channels to select.")  # fmt: skip
@click.option("--gamma", type=float, default="inf", show_default=True, help="A number in [0, 1e6], or inf.")
@click.option("--layers", type=ListParameter(str), default="*", show_default=True, help="Default glob patterns.")
@click.option("--normality/--no-normality", default=True, show_default=True, help="Run the Shapiro-Wilk test.")
@click.option("--normality-filter/--no-normality-filter", default=False, show_default=True,
              help="Leave normal channels out by default.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Decoding processes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the normality test's images.")
@DEVICE
@MODELS_DIR
@TABLES_DIR
def table_build(
    model: str, data: Path, force: bool, quantile: float, gamma: float,
    layers: tuple[str, ...], normality: bool, normality_filter: bool, batch_size: int, workers: int, seed: int,
    device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Build the selection table of MODEL from images, with its golden record."""
    from parchgrad import golden
    from parchgrad.build import build_table
    from parchgrad.explainer import Explainer
    from parchgrad.tables import Defaults

    loaded = load_named_model(model, models_dir)
    folder = tables_dir / loaded.name / loaded.version
    if folder.exists() and not force:
        raise click.ClickException(f"'{folder}' exists already; --force replaces it.")
    with progress_bar("Building", "images") as progress:
        table = build_table(
            loaded, data,
            defaults=Defaults(quantile=quantile, gamma=gamma, layers=layers, normality_filter=normality_filter),
            normality=normality, seed=seed, batch_size=batch_size, workers=workers, device=device,
            progress=progress,
        )  # fmt: skip
    table = table.save(folder)
    golden.record(Explainer(loaded, table, device), folder)
    _show_table(table)
    click.echo(f"Wrote {folder}")


@table_group.command("show")
@click.argument("table")
@TABLES_DIR
def table_show(table: str, tables_dir: Path) -> None:
    """Summary of TABLE, after checking it."""
    from parchgrad.tables import load_table

    _show_table(load_table(named(table, tables_dir)))


def _show_table(table: SelectionTable) -> None:
    channels = sum(layer.channels for layer in table.layers.values())
    images = table.images_per_class
    click.echo(f"table         {table.name}, version {table.version}, of model {table.model_name}")
    click.echo(f"classes       {len(table.classes)} of the model's {len(table.labels)}")
    click.echo(f"images        {sum(images):,}; {min(images)} to {max(images)} a class")
    click.echo(f"layers        {len(table.layers)}, {channels:,} channels; {len(table.idle_layers)} idle left out")
    click.echo(f"defaults      {table.defaults}")
    click.echo(f"built         {json.dumps(table.built, ensure_ascii=False)}")
    click.echo(f"table_sha256  {table.table_sha256}")
