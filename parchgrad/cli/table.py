"""`parchgrad table`: selection tables, built, kept, chosen and looked at."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

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
    QuantileParameter,
    images_to_avoid,
    load_named_model,
    named,
    progress_bar,
    show_table,
    table_and_model,
)
from parchgrad.cli.table_build import table_build, table_extend, table_merge
from parchgrad.errors import ParchGradError

if TYPE_CHECKING:
    from parchgrad.evaluation.tune import TuneResult
    from parchgrad.tables import SelectionTable

# How wide text is where nobody says how wide it may be, as in a pipe.
TEXT_WIDTH = 110


@click.group("table")
def table_group() -> None:
    """Selection tables: which channels belong to which class.

    Exit codes: 0 done; 1 an error; 2 wrong usage; 3 the images or their labels do not do; 130 interrupted (the
    same command goes on where a build was left).
    """


for command in (table_build, table_extend, table_merge):
    table_group.add_command(command)


@table_group.command("show")
@click.argument("table")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page to look at.")
@click.option("--data", help="For the page: images that excite the channels, as for `table build`.")
@click.option("--class", "classes", multiple=True,
              help="For the page: a class whose channels get pictures; several times for several.  "
              "[default: all of a table of up to 20]")  # fmt: skip
@click.option("--quantile", type=click.FloatRange(0, 1, min_open=True),
              help="For the page: share of a layer's channels.  [default: the table's]")  # fmt: skip
@click.option("--channels", type=click.IntRange(1), default=8, show_default=True,
              help="For the page: strongest channels of a class.")  # fmt: skip
@click.option("--crops", type=click.IntRange(1), default=4, show_default=True, help="For the page: pictures a channel.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@DEVICE
@MODELS_DIR
@TABLES_DIR
@click.pass_context
def table_show(
    context: click.Context, table: str, html: Path | None, data: str | None, classes: tuple[str, ...],
    quantile: float | None, channels: int, crops: int, batch_size: int, device: str, models_dir: Path,
    tables_dir: Path,
) -> None:  # fmt: skip
    """Summary of TABLE, as text and as a page: whose channels are whose, which classes are alike."""
    from parchgrad.tables import load_table

    if html is None:
        _refuse_options_of_the_page(context)
    opened = load_table(named(table, tables_dir))
    show_table(opened)
    if html is None:
        return
    from parchgrad.sources import open_source
    from parchgrad.table_page import write_page

    loaded = load_named_model(f"{opened.model_name}/{opened.version}", models_dir) if data or classes else None
    with progress_bar("Looking", "images") as progress:
        write_page(
            opened, html, model=loaded, images=open_source(data, loaded) if data and loaded else None,
            picture_classes=[loaded.class_index(name) for name in classes] if classes and loaded else None,
            quantile=quantile, channels_per_class=channels, crops_per_channel=crops, batch_size=batch_size,
            device=device, progress=progress,
        )  # fmt: skip
    click.echo(f"Wrote {html}")


def _refuse_options_of_the_page(context: click.Context) -> None:
    for name in ("data", "classes", "quantile", "channels", "crops", "batch_size", "device"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = "class" if name == "classes" else name.replace("_", "-")
            raise click.UsageError(f"--{option} is for the page; add --html FILE.")


@table_group.command("verify")
@click.argument("table")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@DEVICE
@MODELS_DIR
@TABLES_DIR
def table_verify(table: str, as_json: bool, device: str, models_dir: Path, tables_dir: Path) -> None:
    """Examine TABLE to the last number; exit code 1 if anything fails."""
    from parchgrad.store import Finding, examine

    try:
        opened, loaded = table_and_model(table, tables_dir, models_dir)
    except ParchGradError as error:
        findings = [Finding("opening", "failed", str(error))]
    else:
        digest = Finding("checksum", "ok", f"table.safetensors is {opened.table_sha256}")
        findings = [digest, *examine(opened, loaded, device)]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        for finding in findings:
            click.echo(f"{finding.state:7}  {finding.what:13}  {finding.detail}")
    if any(finding.state == "failed" for finding in findings):
        sys.exit(1)


@table_group.command("tune")
@click.argument("name")
@HELD_OUT
@IMAGE_COLUMN
@LABEL_COLUMN
@click.option("--quantiles", type=QuantileParameter(), default="0.05,0.1,0.2,0.5,0.5/0.1,0.3/0.05", show_default=True,
              help="Shares to try; LOWER/UPPER is one for each half of the layers.")  # fmt: skip
@click.option("--gammas", type=ListParameter(float), default="inf,3", show_default=True, help="Gammas to try.")
@click.option("--layers", multiple=True, default=("all", "upper-half"), show_default=True,
              help="Layers to try: all, upper-half or glob patterns; several times for several.")  # fmt: skip
@click.option("--conserve", type=ListParameter(str), metavar="WAYS",
              help="Ways to conserve variance to try: independent, exact, none.  [default: the table's]")  # fmt: skip
@click.option("--criterion", type=click.Choice(["mass", "hits", "both"]), default="mass", show_default=True,
              help="What a setting is judged by.")  # fmt: skip
@MOSAICS
@click.option("--seed", type=SEED, default=0, show_default=True, help="Splits the images and draws the mosaics.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print what would be chosen and write nothing.")
@ALLOW_USED
@DEVICE
@MODELS_DIR
@TABLES_DIR
def table_tune(
    name: str, data: str, image_column: str | None, label_column: str | None,
    quantiles: tuple[float | tuple[float, float], ...], gammas: tuple[float, ...], layers: tuple[str, ...],
    conserve: tuple[str, ...] | None, criterion: str, mosaics: int, seed: int, batch_size: int, dry_run: bool,
    allow_used: bool, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Choose the defaults of table NAME on held-out images, and write them into its manifest.

    Every setting is measured on mosaics of four images (chance: mass and hits 0.25), and the one proposed again on
    mosaics of other images. A default changes only where another is better on both; a table that points no
    better than random channels is refused. Fewer than 30 mosaics are enough for --dry-run only.
    """
    from parchgrad.errors import TableError
    from parchgrad.evaluation.report import classes_left_out_line, left_out_line
    from parchgrad.evaluation.tune import ALL, FEWEST_MOSAICS, UPPER_HALF, Grid, tune
    from parchgrad.explainer import Explainer
    from parchgrad.sources import open_source
    from parchgrad.store import write_table

    if mosaics < FEWEST_MOSAICS and not dry_run:
        raise click.UsageError(
            f"--mosaics is {mosaics}, expected at least {FEWEST_MOSAICS} for a choice to be written; --dry-run takes "
            "fewer."
        )
    opened, loaded = table_and_model(name, tables_dir, models_dir)
    if opened.folder is None:
        raise TableError(f"Table '{opened.name}' has no folder, expected one to write the choice into.")
    explainer = Explainer(loaded, opened, device)
    grid = Grid(
        quantiles=quantiles, gammas=gammas, conserve=conserve or (),
        layers=tuple(item if item in (ALL, UPPER_HALF) else tuple(item.split(",")) for item in layers),
    )  # fmt: skip
    used = images_to_avoid(opened, allow_used)
    source = open_source(data, loaded, image_column=image_column, label_column=label_column)
    with ExitStack() as first_bar, progress_bar("Tuning", "maps") as progress:
        reading = first_bar.enter_context(progress_bar("Reading", "images"))

        def tuning(done: int, total: int) -> None:
            first_bar.close()  # one bar at a time
            progress(done, total)

        result = tune(
            explainer, source, loaded.preprocessing, grid=grid, criterion=criterion, mosaics=mosaics, seed=seed,
            used=used, batch_size=batch_size, reading=reading, progress=tuning,
        )  # fmt: skip
    for line in (left_out_line(result.left_out), classes_left_out_line(result.left_out, opened)):
        if line:
            click.echo(line, err=True)
    _print_result(result, opened)
    result.require_control(opened)  # refused where random channels do as well; the grid is printed by then
    if dry_run:
        click.echo("--dry-run: nothing written")
        return
    write_table(result.applied(opened), opened.folder, loaded, device=device)
    click.echo(f"Wrote {opened.folder}")


def _print_result(result: TuneResult, table: SelectionTable) -> None:
    """The grid, the figures and the choice; in a pipe every column, one line a row."""
    from rich.console import Console

    from parchgrad.evaluation.report import grid_table, measured_table, natural_width, tune_text

    console = Console()
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else None
    for view in (grid_table(result, table.layer_names, width), measured_table(result, table.layer_names, width)):
        Console(width=max(width or 0, natural_width(view))).print(view)
        click.echo()
    for paragraph in tune_text(result, table):
        click.echo(textwrap.fill(paragraph, min(width or TEXT_WIDTH, TEXT_WIDTH), subsequent_indent=" " * 10))
