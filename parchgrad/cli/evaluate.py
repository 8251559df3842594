"""`parchgrad evaluate`: methods compared on mosaics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parchgrad.cli.shared import (
    DEVICE,
    MODELS_DIR,
    TABLES_DIR,
    ListParameter,
    load_named_model,
    named,
    progress_bar,
)

if TYPE_CHECKING:
    from parchgrad.tables import SelectionTable

DATA = click.option(
    "--data", required=True, help="Images the table was not built from: a folder of one folder a class, or Parquet."
)
MOSAICS = click.option(
    "--mosaics", type=click.IntRange(4), default=100, show_default=True, help="Pictures of four images."
)
SEED = click.IntRange(0)
ALLOW_USED = click.option(
    "--allow-used", is_flag=True, help="Also take images that the table was built from: figures then flatter it."
)


@click.command("evaluate")
@click.argument("model")
@DATA
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@MOSAICS
@click.option("--quantile", type=float, help="[default: the table's]")
@click.option("--gamma", type=float, help="[default: the table's]")
@click.option("--layers", type=ListParameter(str), help="[default: the table's]")
@click.option("--cam-layer", help="Module for Grad-CAM, such as layer4; left out without it.")
@click.option("--method", "only", multiple=True, help="Only this row of the table; may come several times.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Draws the mosaics and the random channels.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the scores here."
)
@ALLOW_USED
@DEVICE
@MODELS_DIR
@TABLES_DIR
def evaluate(
    model: str, data: str, table: str | None, mosaics: int, quantile: float | None, gamma: float | None,
    layers: tuple[str, ...] | None, cam_layer: str | None, only: tuple[str, ...], seed: int, batch_size: int,
    json_file: Path | None, allow_used: bool, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Compare methods on mosaics of four images of different classes (chance: mass and hits 0.25).

    Images that the table was built from are left out, where the table has a record of them.
    """
    import torch
    from rich.console import Console

    from parchgrad.evaluation.compare import compare, mosaics_of, standard_methods
    from parchgrad.evaluation.report import left_out_line, score_table
    from parchgrad.explainer import Explainer
    from parchgrad.sources import open_source
    from parchgrad.tables import load_table

    loaded = load_named_model(model, models_dir)
    rows = load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded)
    explainer = Explainer(loaded, rows, device)
    methods = standard_methods(
        explainer, cam_layer=cam_layer, seed=seed, quantile=quantile, gamma=gamma,
        layers=None if layers is None else list(layers),
    )  # fmt: skip
    if unknown := [name for name in only if name not in methods]:
        raise click.UsageError(f"--method is {unknown[0]!r}; the rows are {', '.join(methods)}.")
    methods = {name: maps for name, maps in methods.items() if not only or name in only}
    source = open_source(data, loaded)
    if rows.defaults.selection == "class" and any("ParchGrad" in name for name in methods):
        rows.rows(torch.tensor(source.classes))  # a class without a row is refused before any work
    used = images_to_avoid(rows, allow_used)
    drawn = mosaics_of(source, loaded.preprocessing, mosaics, seed, used=used)
    if line := left_out_line(drawn.left_out):
        click.echo(line, err=True)
    with progress_bar("Evaluating", "maps") as progress:
        scores = compare(methods, drawn.pictures, batch_size=batch_size, progress=progress)
    Console().print(score_table(scores, f"{len(drawn.pictures)} mosaics; chance 0.25"))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(s) for s in scores], indent=1) + "\n", encoding="utf-8")


def images_to_avoid(table: SelectionTable, allow_used: bool) -> frozenset[str]:
    """Digests of the images the table was built from; none where they are allowed, or with a word on it unknown."""
    from parchgrad.evidence import used_digests

    if allow_used:
        return frozenset()
    used = used_digests(table.folder)
    if used is None:
        click.echo(
            f"Table '{table.name}' has no record of the images it was built from; they may be among these.", err=True
        )
        return frozenset()
    return used
