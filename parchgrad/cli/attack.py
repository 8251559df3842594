"""`parchgrad attack`: what attacks and corruptions do to accuracy and maps, over a folder of images."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parchgrad.cli.shared import (
    ALLOW_USED,
    DEVICE,
    HELD_OUT,
    IMAGE_COLUMN,
    LABEL_COLUMN,
    MODELS_DIR,
    TABLES_DIR,
    ListParameter,
    images_to_avoid,
    load_named_model,
    named,
    progress_bar,
)

if TYPE_CHECKING:
    from rich.table import Table

    from parchgrad.attacks.attack import Attack
    from parchgrad.attacks.report import Report
    from parchgrad.evaluation.intervals import Interval

MOST_SEED = 2**31 - 1  # each image has one of its own, counted from it
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("attack")
@click.argument("model")
@HELD_OUT
@IMAGE_COLUMN
@LABEL_COLUMN
@click.option("--attacks", type=ListParameter(str), default="fgsm,pgd,blur,noise,jpeg,watermark", show_default=True,
              metavar="KINDS", help="Which, comma-separated.")  # fmt: skip
@click.option("--levels", type=ListParameter(float), default="1,2,4,8", show_default=True,
              help="Strengths of fgsm and pgd: the most a colour value may change, of 255.")  # fmt: skip
@click.option("--strengths", type=ListParameter(float), default="0.25,0.5,0.75,1", show_default=True,
              help="Strengths of the others, 0 to 1.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Steps of pgd.")
@click.option("--goal", help="Class that fgsm and pgd lead to, by index, name or id.  [default: away from the label]")
@click.option("--images", type=click.IntRange(1), default=50, show_default=True, help="Images, the classes in turns.")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True,
              help="Draws images, starts and noise.")  # fmt: skip
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--json", "json_file", type=FILE, help="Write everything as JSON.")
@click.option("--chart", type=FILE, help="Draw accuracy and maps by strength: a .svg, .png or .pdf file.")
@ALLOW_USED
@DEVICE
@MODELS_DIR
@TABLES_DIR
def attack(
    model: str, data: str, image_column: str | None, label_column: str | None, attacks: tuple[str, ...],
    levels: tuple[float, ...], strengths: tuple[float, ...], steps: int, goal: str | None, images: int, seed: int,
    table: str | None, json_file: Path | None, chart: Path | None, allow_used: bool, device: str,
    models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Attack a model's images, and see what becomes of accuracy and maps, by strength.

    fgsm and pgd follow the model's own gradient and need captum; blur, noise, jpeg and watermark need nothing. Maps
    are of the class predicted without the attack, by the table's defaults. Intervals are 95 %, bootstrapped over
    images.

    \b
    parchgrad attack scenes --data held_out --attacks fgsm,pgd --levels 1,2,4,8 --json attacks.json
    """
    from parchgrad.attacks.attack import KINDS, Attack

    if unknown := [kind for kind in attacks if kind not in KINDS]:
        raise click.UsageError(f"--attacks names {unknown[0]!r}; expected of {', '.join(KINDS)}.")
    for path in (json_file, chart):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise click.UsageError(f"'{path.parent}' cannot be written to, expected a folder for '{path.name}'.")
    if chart is not None and json_file is not None and chart.absolute() == json_file.absolute():
        raise click.UsageError(f"--json and --chart both name '{chart}'.")
    if chart is not None:
        from parchgrad.attacks.chart import require_suffix

        require_suffix(chart)
    # Refused here, before anything is loaded; the goal's index is known later.
    chosen = [
        Attack(kind, strength, steps=steps, seed=seed)
        for kind in dict.fromkeys(attacks)
        for strength in dict.fromkeys(levels if KINDS[kind].levels else strengths)
    ]
    report = _measured(
        model, data, image_column, label_column, chosen, goal, images, seed, table, allow_used, device, models_dir,
        tables_dir,
    )  # fmt: skip
    from rich.console import Console

    from parchgrad.evaluation.report import natural_width

    view, console = _table(report), Console()
    Console(width=max(console.width if console.is_terminal else 0, natural_width(view))).print(view)
    if json_file is not None:
        report.write_json(json_file)
        click.echo(f"Wrote {json_file}")
    if chart is not None:
        from parchgrad.attacks.chart import write_chart

        write_chart(report, chart)
        click.echo(f"Wrote {chart}")


def _measured(
    model: str, data: str, image_column: str | None, label_column: str | None, attacks: list[Attack], goal: str | None,
    images: int, seed: int, table: str | None, allow_used: bool, device: str, models_dir: Path, tables_dir: Path,
) -> Report:  # fmt: skip
    from dataclasses import replace

    from parchgrad.attacks.gradients import require_captum
    from parchgrad.attacks.report import measure
    from parchgrad.evaluation.photographs import photographs_of
    from parchgrad.evaluation.report import left_out_line
    from parchgrad.explainer import Explainer
    from parchgrad.sources import open_source
    from parchgrad.tables import load_table

    if any(one.by_gradient for one in attacks):
        require_captum()
    elif goal is not None:
        raise click.UsageError("--goal is for fgsm and pgd, which --attacks leaves out.")
    loaded = load_named_model(model, models_dir)
    rows = load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded)
    if goal is not None:
        index = loaded.class_index(goal)
        attacks = [replace(one, goal=index) if one.by_gradient else one for one in attacks]
    source = open_source(
        data, loaded, image_column=image_column, label_column=label_column, least_classes=1, least_images=1
    )
    with progress_bar("Looking at images", "images") as progress:
        photographs = photographs_of(
            source, loaded.preprocessing, images, seed, used=images_to_avoid(rows, allow_used), progress=progress
        )
    if line := left_out_line(photographs.left_out):
        click.echo(line, err=True)
    settings = {
        "command": shlex.join(["parchgrad", *sys.argv[1:]]),
        "model": {"name": loaded.name, "version": loaded.version, "weights_sha256": loaded.weights_sha256},
        "table": {"name": rows.name, "table_sha256": rows.table_sha256, "defaults": rows.defaults.to_json()},
        "data": str(source.root), "images": len(photographs.pictures), "allow_used": allow_used, "seed": seed,
        "device": device,
    }  # fmt: skip
    explainer = Explainer(loaded, rows, device)
    with progress_bar("Attacking", "images") as progress:
        return measure(
            explainer, loaded.preprocessing, photographs.pictures, attacks, settings=settings, seed=seed,
            progress=progress,
        )  # fmt: skip


def _table(report: Report) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = (
        "accuracy: prediction is the label; kept: prediction is the one without attack; of the map of that class: "
        "agreement (Spearman), overlap of the largest tenth, shift of its centre in diagonals; kept only: agreement "
        "where the prediction is kept. 95 % intervals."
    )
    view = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("attack", no_wrap=True)
    for heading in ("strength", "accuracy", "kept", "agreement", "kept only", "overlap", "shift"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows():
        moved = [row.movement["agreement"], row.movement_kept["agreement"], row.movement["overlap"]]
        view.add_row(
            "none" if row.attack is None else row.attack.kind,
            "" if row.attack is None else f"{row.attack.strength:g}",
            *(_cell(one) for one in (row.accuracy, row.kept, *moved, row.movement["shift"])),
        )
    return view


def _cell(found: Interval) -> str:
    if found.mean != found.mean:
        return "-"
    if found.low != found.low or found.low == found.high:
        return f"{found.mean:.2f}"
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
