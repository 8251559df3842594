"""`parchgrad evaluate`: methods compared on mosaics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from parchgrad.cli.shared import (
    ALLOW_USED,
    DEVICE,
    HELD_OUT,
    IMAGE_COLUMN,
    LABEL_COLUMN,
    MODELS_DIR,
    MOSAICS,
    SEED,
    TABLES_DIR,
    ListParameter,
    images_to_avoid,
    load_named_model,
    named,
    progress_bar,
)

GRAD_CAM = "Grad-CAM"


@click.command("evaluate")
@click.argument("model")
@HELD_OUT
@IMAGE_COLUMN
@LABEL_COLUMN
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@MOSAICS
@click.option("--quantile", type=click.FloatRange(0, 1, min_open=True), help="[default: the table's]")
@click.option("--gamma", type=click.FloatRange(0), help="A number in [0, 1e6], or inf.  [default: the table's]")
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
    model: str, data: str, image_column: str | None, label_column: str | None, table: str | None, mosaics: int,
    quantile: float | None, gamma: float | None, layers: tuple[str, ...] | None, cam_layer: str | None,
    only: tuple[str, ...], seed: int, batch_size: int, json_file: Path | None, allow_used: bool, device: str,
    models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Compare methods on mosaics of four images of different classes (chance: mass and hits 0.25).

    Images that the table was built from are left out, where the table has a record of them.
    """
    if cam_layer is not None and only and GRAD_CAM not in only:
        raise click.UsageError(f"--cam-layer is for {GRAD_CAM}, which --method leaves out.")
    import torch
    from rich.console import Console

    from parchgrad.evaluation.compare import compare, standard_methods
    from parchgrad.evaluation.images import mosaics_of
    from parchgrad.evaluation.report import classes_line, left_out_line, score_table
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
    source = open_source(data, loaded, image_column=image_column, label_column=label_column)
    if rows.defaults.selection == "class" and any("ParchGrad" in name for name in methods):
        rows.rows(torch.tensor(source.classes))  # a class without a row is refused before any work
    used = images_to_avoid(rows, allow_used)
    with progress_bar("Reading", "images") as reading:
        drawn = mosaics_of(source, loaded.preprocessing, mosaics, seed, used=used, progress=reading)
    if line := left_out_line(drawn.left_out):
        click.echo(line, err=True)
    with progress_bar("Evaluating", "maps") as progress:
        scores = compare(methods, drawn.pictures, batch_size=batch_size, progress=progress)
    Console().print(score_table(scores, f"{len(drawn.pictures)} mosaics; chance 0.25"))
    click.echo(classes_line(len(source.classes), rows))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(s) for s in scores], indent=1) + "\n", encoding="utf-8")
