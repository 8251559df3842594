"""Prediction and map as one ONNX graph beside the prediction alone: `python -m benchmarks.one_graph`.

Process CPU time on one thread, all rows interleaved in one run, medians; ratios round by round. Every row does the
whole of it, a forward pass included: logits, and but for the predictions a map, at a quantile of 0.1 in all
convolutions and infinite gamma, a class of its own for every image. Tables are random.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import graph_families
from benchmarks.graph_cases import (
    DATA,
    QUANTILE,
    Subject,
    explained,
    explanation_call,
    prediction_call,
    session,
    subject,
    traced,
)
from benchmarks.graph_families import FAMILIES, Family, family
from benchmarks.graph_profile import PARTS, Profile, profile
from benchmarks.measuring import interleaved, ratios
from parchgrad import Explainer

MODELS = ("vgg16_bn", "resnet18", "resnet50", "squeezenet1_1", "mobilenet_v2", "efficientnet_b0")
ROWS = {
    "a": "ORT prediction",
    "b": "one graph, pruned",
    "c": "one graph, dense",
    "d": "PyTorch prediction, eager",
    "e": "PyTorch Explainer",
}
RATIOS = ("b/a", "c/a", "b/d", "b/e")
AIMS = {
    "b/a": {"vgg16_bn": 1.5, "resnet18": 1.8, "resnet50": 1.8, "squeezenet1_1": 2.5, "efficientnet_b0": 2.5},
    "b/d": {"resnet18": 1.0, "squeezenet1_1": 1.0},
}


@dataclass(frozen=True)
class Cell:
    """CPU seconds of each row, round by round, of one network and one batch size."""

    model: str
    batch: int
    trained: bool
    seconds: dict[str, list[float]]

    def ratios(self, which: str) -> list[float]:
        over, by = which.split("/")
        return ratios(self.seconds[over], self.seconds[by])

    def ratio(self, which: str) -> float:
        return statistics.median(self.ratios(which))

    def aims(self) -> str:
        """Those of this network, and whether they are met."""
        asked = [(which, aims[self.model]) for which, aims in AIMS.items() if self.model in aims]
        return "; ".join(f"{which} <= {aim}: {'met' if self.ratio(which) <= aim else 'missed'}" for which, aim in asked)


@dataclass(frozen=True)
class Report:
    """One run of the benchmark."""

    versions: dict[str, str]
    runs: int
    cells: list[Cell] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)

    def heading(self) -> str:
        used = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"Process CPU time, one thread, {self.runs} interleaved rounds, 224 px, q = {QUANTILE}. {used}."


def cells(found: Subject, batches: tuple[int, ...], runs: int, data: Path) -> list[Cell]:
    """All batch sizes of one network."""
    prediction = traced(found)
    predicting = session(prediction.model)
    pruned, dense = (session(explained(found, prediction, backward)) for backward in ("pruned", "dense"))
    explainer = Explainer(found.network, found.table)
    made = []
    for batch in batches:
        images, targets = found.pictures(batch, data), found.targets(batch)

        def eager(images: torch.Tensor = images) -> torch.Tensor:
            with torch.inference_mode():
                return found.network(images)  # type: ignore[no-any-return]

        def ours(images: torch.Tensor = images, targets: list[int] = targets) -> torch.Tensor:
            return explainer.explain(images, targets, quantile=QUANTILE, gamma=math.inf, layers=["*"]).saliency()

        calls: dict[str, Callable[[], object]] = {
            "a": prediction_call(predicting, images),
            "b": explanation_call(pruned, images, targets),
            "c": explanation_call(dense, images, targets),
            "d": eager,
            "e": ours,
        }
        made.append(Cell(found.name, batch, found.trained, interleaved(calls, runs)))
    return made


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


# --- shown --------------------------------------------------------------------------------------------------------


def tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """Each a title and its rows, the heading first."""
    found = []
    for batch in sorted({cell.batch for cell in report.cells}):
        lines = [["network", *(f"{key}: {name}, ms" for key, name in ROWS.items()), *RATIOS, "aims"]]
        lines += [
            [
                f"{cell.model}{'' if cell.trained else '*'}",
                *(f"{1000 * statistics.median(cell.seconds[key]):.1f}" for key in ROWS),
                *(f"{cell.ratio(which):.2f} ({spread(cell.ratios(which))})" for which in RATIOS),
                cell.aims(),
            ]
            for cell in report.cells
            if cell.batch == batch
        ]
        found.append((f"Batch {batch} (* random weights)", lines))
    for one in report.profiles:
        found.append(
            (f"Where the time goes: {one.model}, batch {one.batch}, ms by ONNX Runtime's profiler", _parts(one))
        )
        found.append((f"The floor: {one.model}, batch {one.batch}, CPU ms", _floor(one)))
    if report.families:
        found.append(("Families, b/a at batch 1", graph_families.rows(report.families)))
    return found


def spread(values: list[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def _parts(one: Profile) -> list[list[str]]:
    lines = [["part", "prediction alone", "one graph, pruned", "difference", "of the prediction"]]
    columns = []
    for whole, parts in ((one.predict, one.prediction_parts), (one.explain, one.explanation_parts)):
        columns.append([*(parts[part] for part in PARTS), whole - sum(parts.values()), whole])
    for name, before, after in zip(
        (*PARTS, "between nodes, less the profiler's own", "all, CPU time"), *columns, strict=True
    ):
        more = after - before
        lines.append([name, f"{before:.2f}", f"{after:.2f}", f"{more:.2f}", f"{more / one.predict:.2f}"])
    more_nodes = one.explanation_nodes - one.prediction_nodes
    lines.append(["nodes run", str(one.prediction_nodes), str(one.explanation_nodes), str(more_nodes), ""])
    return lines


def _floor(one: Profile) -> list[list[str]]:
    return [
        ["", "ms", "over the prediction"],
        ["prediction alone", f"{one.predict:.2f}", "1.00"],
        ["floor: and one pass over each gradient", f"{one.predict + one.passes:.2f}", f"{one.floor:.2f}"],
        ["floor: and the selected channels' arithmetic", f"{one.predict * one.selected:.2f}", f"{one.selected:.2f}"],
        ["one graph, pruned", f"{one.explain:.2f}", f"{one.explain / one.predict:.2f}"],
    ]


def markdown(report: Report) -> str:
    parts = [report.heading()]
    for title, lines in tables(report):
        ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        parts.append(f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in ruled))
    return "\n\n".join(parts) + "\n"


def show(console: Console, report: Report) -> None:
    console.print(report.heading())
    for title, lines in tables(report):
        view = Table(*lines[0], title=title)
        for line in lines[1:]:
            view.add_row(*line)
        console.print(view)


FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(help="Print what prediction and map cost as one ONNX graph, beside the prediction alone and PyTorch.")
@click.option("--models", default=",".join(MODELS), show_default=True, help="Networks, by commas; '' for none.")
@click.option("--batches", default="1,8", show_default=True, help="Images a call, by commas.")
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True, help="Rounds, after one not counted.")
@click.option("--profile", "profiled", multiple=True, metavar="NAME",
              help="Also where this network's time goes, and the floor; may be repeated.")  # fmt: skip
@click.option("--families", "with_families", is_flag=True, help="Also each family: export, parity, ratio at batch 1.")
@click.option("--only", default=",".join(FAMILIES), help="Which of the families, by commas.  [default: all]")
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=DATA,
              help="Real weights and photographs, else random and synthetic.  [default: ../shared/data]")  # fmt: skip
@click.option("--json", "json_file", type=FILE, help="Write every figure here.")
@click.option("--markdown", "markdown_file", type=FILE, help="Write the tables here.")
def main(
    models: str,
    batches: str,
    runs: int,
    profiled: tuple[str, ...],
    with_families: bool,
    only: str,
    data: Path,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    torch.set_num_threads(1)
    sizes = tuple(int(batch) for batch in batches.split(","))
    report = Report(versions(), runs)

    def write() -> None:
        """After each network: what was measured is not lost with what comes."""
        if json_file is not None:
            json_file.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        if markdown_file is not None:
            markdown_file.write_text(markdown(report), encoding="utf-8")
        gc.collect()

    for name in filter(None, models.split(",")):
        click.echo(f"{name}: batches {batches}", err=True)
        report.cells.extend(cells(subject(name, data), sizes, runs, data))
        write()
    for name in profiled:
        click.echo(f"{name}: profile", err=True)
        report.profiles.extend(profile(subject(name, data), batch, runs) for batch in sizes)
        write()
    for name in only.split(",") if with_families else ():
        click.echo(f"{name}: family", err=True)
        report.families.append(family(name, runs, data))
        write()
    show(Console(width=200), report)


if __name__ == "__main__":
    main()
