"""`parchgrad evaluate`: methods compared on mosaics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

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


@click.command("evaluate")
@click.argument("model")
@click.option("--data", required=True, type=FOLDER, help="Images the table has not seen, one folder a class.")
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--mosaics", type=click.IntRange(4), default=100, show_default=True, help="Pictures of four images.")
@click.option("--quantile", type=float, help="[default: the table's]")
@click.option("--gamma", type=float, help="[default: the table's]")
@click.option("--layers", type=ListParameter(str), help="[default: the table's]")
@click.option("--cam-layer", help="Module for Grad-CAM, such as layer4; left out without it.")
@click.option("--method", "only", multiple=True, help="Only this row of the table; may come several times.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the mosaics and the random channels.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the scores here."
)
@DEVICE
@MODELS_DIR
@TABLES_DIR
def evaluate(
    model: str, data: Path, table: str | None, mosaics: int, quantile: float | None, gamma: float | None,
    layers: tuple[str, ...] | None, cam_layer: str | None, only: tuple[str, ...], seed: int, batch_size: int,
    json_file: Path | None, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Compare methods on mosaics of four images of different classes (chance: mass and hits 0.25)."""
    from rich.console import Console

    from parchgrad.build import ImageFolder
    from parchgrad.evaluation.compare import compare, mosaics_of, standard_methods
    from parchgrad.evaluation.report import score_table
    from parchgrad.explainer import Explainer
    from parchgrad.tables import load_table

    loaded = load_named_model(model, models_dir)
    explainer = Explainer(
        loaded, load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded), device
    )
    methods = standard_methods(
        explainer, cam_layer=cam_layer, seed=seed, quantile=quantile, gamma=gamma,
        layers=None if layers is None else list(layers),
    )  # fmt: skip
    if unknown := [name for name in only if name not in methods]:
        raise click.UsageError(f"--method is {unknown[0]!r}; the rows are {', '.join(methods)}.")
    methods = {name: maps for name, maps in methods.items() if not only or name in only}
    pictures = mosaics_of(ImageFolder.scan(data, loaded), loaded.preprocessing, mosaics, seed)
    with progress_bar("Evaluating", "maps") as progress:
        scores = compare(methods, pictures, batch_size=batch_size, progress=progress)
    Console().print(score_table(scores, f"{len(pictures)} mosaics; chance 0.25"))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(s) for s in scores], indent=1) + "\n", encoding="utf-8")
