"""What an explanation costs beside the prediction alone: `python -m benchmarks.explanation_cost`.

Process CPU time on one thread, all rows interleaved in one run, medians; a row's figure is its ratio to
`predict`. Random weights: the time does not depend on them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from parchgrad import Explainer, SelectionTable
from parchgrad.models import build_network

MODELS = {"squeezenet1_1": 224, "mobilenet_v2": 224, "resnet18": 224, "scenes.network:scene_net": 128}


def rows(architecture: str, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed for one model, by name; each call does the whole of it."""
    from captum.attr import Saliency

    torch.manual_seed(0)
    classes = 10 if ":" in architecture else 1000
    network = build_network(architecture, classes).eval().requires_grad_(False)
    explainer = Explainer(network, SelectionTable.random(network, classes, seed=0))
    images = torch.randn(batch, 3, size, size)
    targets = list(range(batch))
    captum = Saliency(network)
    return {
        "predict": lambda: explainer.predict(images),
        "captum Saliency + predict": lambda: (
            network(images),
            captum.attribute(images.clone().requires_grad_(), torch.tensor(targets)),
        ),
        "gradient": lambda: explainer.explain(images, targets, rule=False),
        "ParchGrad, q = 0.1": lambda: explainer.explain(images, targets),
        "ParchGrad, gamma = 3": lambda: explainer.explain(images, targets, gamma=3.0),
    }


def interleaved(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Process CPU seconds of each call, `runs` rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


@click.command(help="Print the cost of an explanation over that of a prediction.")
@click.option("--runs", type=click.IntRange(7), default=9, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(runs: int, batch: int, json_file: Path | None) -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    view = Table("model", "row", "x predict", "spread", title=f"process CPU time, batch {batch}, {runs} runs, 1 thread")
    figures = {}
    for architecture, size in MODELS.items():
        seconds = interleaved(rows(architecture, size, batch), runs)
        ratios = {name: _ratios(values, seconds["predict"]) for name, values in seconds.items()}
        figures[architecture] = ratios
        for name, values in ratios.items():
            view.add_row(architecture, name, f"{statistics.median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}")
        view.add_section()
    console.print(view)
    console.print(f"torch {torch.__version__}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _ratios(values: list[float], predict: list[float]) -> list[float]:
    """Round by round, so that a slower machine slows both sides."""
    return [value / base for value, base in zip(values, predict, strict=True)]


if __name__ == "__main__":
    main()
