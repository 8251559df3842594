"""`parchgrad explain --replay`: the comparisons of a replay as a table or JSON, and the exit code they mean."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from parchgrad.replay import Comparison


PIPE_WIDTH = 120  # columns, where nobody says how wide it is


def replay_answer(
    answer: Path, images: list[Path], tolerance: float | None, as_json: bool, device: str, models_dir: Path,
    tables_dir: Path,
) -> None:  # fmt: skip
    """Prints a line for each explanation of the answer. Exit code 1 where one differs.

    Raises DataError where none is compared: an answer without maps proves nothing.
    """
    from parchgrad.errors import DataError
    from parchgrad.replay import DIFFERENT, replay

    found = replay(answer, images, models_dir=models_dir, tables_dir=tables_dir, device=device, tolerance=tolerance)
    if as_json:
        for one in found:
            click.echo(json.dumps(asdict(one), ensure_ascii=False))
    else:
        _print_table(found)
        for sentence in dict.fromkeys(one.versions for one in found if one.versions):
            click.echo(sentence)
    if any(one.status == DIFFERENT for one in found):
        sys.exit(1)
    if not any(one.distance is not None for one in found):
        raise DataError(
            f"Answer '{answer}' holds no map that could be compared: {found[0].reason if found else 'none'}."
        )


def _print_table(found: list[Comparison]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # Narrow enough for 80 columns: there only the names of image and target fold.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("image", "target"):
        table.add_column(name, overflow="fold")
    table.add_column("map", no_wrap=True)
    for name in ("distance", "encoding", "allowed", "ranks", "prob."):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        figures = (one.distance, one.quantisation, one.tolerance, one.rank_correlation, one.probability_difference)
        target = "" if one.target is None else one.target.label
        table.add_row(Path(one.image).name, target, one.status, *("" if f is None else f"{f:.4f}" for f in figures))
    console = Console(markup=False)
    console.print(table, width=None if console.is_terminal else PIPE_WIDTH, crop=False)
    for one in found:
        if one.reason:
            click.echo(f"{one.image}: {one.reason}.")
