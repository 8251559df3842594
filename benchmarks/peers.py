"""ParchGrad against every peer: `python -m benchmarks.peers`, or `make bench`.

What a prediction with its map costs beside the prediction alone, in time and in memory, for the rows of
`benchmarks.peer_methods`. Process CPU time on one thread, all rows interleaved in one run, medians; a row's figure
is its ratio, round by round, to the fastest way to predict. Weights and tables are random.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks.measuring import interleaved, ratios
from benchmarks.peer_memory import peak_memory
from benchmarks.peer_methods import (
    DENSE,
    GRADIENT,
    MODELS,
    OURS,
    PEERS,
    PREDICTIONS,
    SCENES,
    Call,
    Case,
    Row,
    case_of,
    ours,
    pruned_name,
)
from benchmarks.peer_report import Cell, ClassMemory, Curve, Line, Report, draw, markdown, show, show_rest, versions

CURVE_MODELS = ("resnet18", "squeezenet1_1")
CURVE_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CURVE_QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
CLASS_COUNTS = (10, 1000)
PRUNED = pruned_name(0.1)


def cell(case: Case, rows: tuple[Row, ...], model: str, runs: int, row_seconds: float) -> Cell:
    """All rows of one network and one batch size."""
    calls, notes = calls_of(case, rows, runs, row_seconds)
    seconds = interleaved({name: partial(call, case.targets) for name, call in calls.items()}, runs)
    fastest = min(
        (row.name for row in rows if row.kind == "prediction" and row.name in seconds),
        key=lambda name: statistics.median(seconds[name]),
    )
    lines = [
        Line(row.name, row.kind, seconds[row.name], ratios(seconds[row.name], seconds[fastest]))
        if row.name in seconds
        else Line(row.name, row.kind, note=notes[row.name])
        for row in rows
    ]
    return Cell(model, len(case.images), fastest, lines)


def calls_of(
    case: Case, rows: tuple[Row, ...], runs: int, row_seconds: float
) -> tuple[dict[str, Call], dict[str, str]]:
    """The rows that run, and why the others do not."""
    prediction = seconds_of_prediction(case)
    calls: dict[str, Call] = {}
    notes = {}
    for row in rows:
        needed = row.predictions * prediction * (runs + 1)
        if row.kind == "peer" and needed > row_seconds:
            notes[row.name] = f"left out: {runs + 1} calls take about {needed:.0f} s"
            continue
        try:
            calls[row.name] = row.build(case)
        except ImportError as error:
            notes[row.name] = f"not installed: {error}"
    return calls, notes


def seconds_of_prediction(case: Case) -> float:
    with torch.inference_mode():
        case.network(case.images)
        start = time.process_time()
        case.network(case.images)
    return time.process_time() - start


def with_memory(found: Cell) -> Cell:
    """The same with the memory of every row that ran, but for the compiled prediction, whose compiler is in the way."""
    rows = [line.name for line in found.lines if line.seconds and "compiled" not in line.name]
    memory = peak_memory(found.model, found.batch, rows)
    return found.with_memory(memory)


def classes_memory(models: tuple[str, ...], batch: int) -> list[ClassMemory]:
    """Memory beside the number of classes, after many of them were explained."""
    return [
        ClassMemory(model, batch, classes, name, memory)
        for model in models
        for classes in CLASS_COUNTS
        for name, memory in peak_memory(model, batch, [GRADIENT, DENSE, PRUNED], classes).items()
    ]


def batch_curve(model: str, runs: int) -> Curve:
    """Cost against batch size: ratio to the fastest eager prediction of the same batch."""
    names = (GRADIENT, DENSE, PRUNED)
    rows = PREDICTIONS[:3] + tuple(row for row in OURS if row.name in names)
    cells = [cell(case_of(model, batch), rows, model, runs, float("inf")) for batch in CURVE_BATCHES]
    return Curve(model, "batch", CURVE_BATCHES, {name: [c.line(name).ratios for c in cells] for name in names})


def quantile_curve(model: str, batch: int, runs: int) -> Curve:
    """Cost against quantile, one run."""
    points = {pruned_name(q): Row(pruned_name(q), "ours", 1.5, ours("pruned", q)) for q in CURVE_QUANTILES}
    flat = tuple(row for row in OURS if row.name in (GRADIENT, DENSE))
    found = cell(case_of(model, batch), (*PREDICTIONS[:3], *flat, *points.values()), model, runs, float("inf"))
    values = {row.name: [found.line(row.name).ratios] * len(points) for row in flat}
    values["ours, pruned"] = [found.line(name).ratios for name in points]
    return Curve(model, f"quantile, batch {batch}", CURVE_QUANTILES, values)


@click.command(help="Print what a map costs over the prediction alone, beside every peer.")
@click.option("--models", default=",".join(MODELS), show_default=True, help=f"Also {SCENES}, the bundled network.")
@click.option("--batches", default="1,8", show_default=True)
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True, help="Rounds, after one not counted.")
@click.option("--row-seconds", default=40.0, show_default=True, help="Leave out a peer whose calls would take longer.")
@click.option("--quick", is_flag=True, help="SqueezeNet at batch 1, nothing compiled.")
@click.option("--memory/--no-memory", default=True, show_default=True)
@click.option("--curves", is_flag=True, help="Cost against batch size and against quantile as well.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--chart", "chart_file", type=click.Path(path_type=Path, dir_okay=False), help="SVG or PNG.")
def main(
    models: str,
    batches: str,
    runs: int,
    row_seconds: float,
    quick: bool,
    memory: bool,
    curves: bool,
    json_file: Path | None,
    markdown_file: Path | None,
    chart_file: Path | None,
) -> None:
    torch.set_num_threads(1)
    chosen = ("squeezenet1_1",) if quick else tuple(models.split(","))
    sizes = (1,) if quick else tuple(int(batch) for batch in batches.split(","))
    rows = (*(PREDICTIONS[:3] if quick else PREDICTIONS), *PEERS, *OURS)
    console = Console(width=160)
    report = Report(versions(), runs)
    console.print(report.heading())

    for model in chosen:
        for batch in sizes:
            found = cell(case_of(model, batch), rows, model, runs, row_seconds)
            torch.compiler.reset()
            report.cells.append(with_memory(found) if memory else found)
            show(console, report.cells[-1])
    if memory and not quick:
        report.classes.extend(classes_memory(tuple(model for model in CURVE_MODELS if model in chosen), batch=8))
    if curves:
        for model in CURVE_MODELS:
            report.curves.append(batch_curve(model, runs))
            report.curves.extend(quantile_curve(model, batch, runs) for batch in (1, 8))
    show_rest(console, report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(report), encoding="utf-8")
    if chart_file is not None:
        draw(report, chart_file)


if __name__ == "__main__":
    main()
