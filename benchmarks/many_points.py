"""What sharing the entry convolution saves integrated gradients and SmoothGrad: `python -m benchmarks.many_points`.

One image a call, 224 x 224, one thread; the two sides interleaved, process CPU time, random weights and table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import interleaved, ratios
from parchgrad import Explainer, SelectionTable
from parchgrad.architectures import build_network

POINTS = 16
METHODS = ("integrated_gradients", "smoothgrad")


def seconds_of(name: str, runs: int) -> dict[str, list[float]]:
    """Process CPU seconds of a prediction, and of each method with and without sharing."""
    torch.manual_seed(0)
    network = build_network(name, 1000).eval()
    explainer = Explainer(network, SelectionTable.random(network, 1000, 0), backward="pruned")
    image = torch.randn(1, 3, 224, 224)

    def explain(method: str, shares: bool) -> None:
        explainer._runtime._shares = shares
        explainer.explain(image, 1, method=method, steps=POINTS, samples=POINTS)

    calls: dict[str, Callable[[], object]] = {"predict": lambda: explainer.predict(image)}
    for method in METHODS:
        calls[f"{method}, shared"] = partial(explain, method, True)
        calls[f"{method}, unshared"] = partial(explain, method, False)
    return interleaved(calls, runs)


@click.command()
@click.option("--models", default="resnet18,squeezenet1_1", show_default=True)
@click.option("--runs", default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(models: str, runs: int, as_json: bool) -> None:
    """Shared over unshared, medians of `runs` rounds."""
    torch.set_num_threads(1)
    table = Table(title=f"{POINTS} points of one image, process CPU time: medians of {runs} rounds and their spread")
    for column in ("network", "method", "shared / unshared", "shared / predict", "unshared / predict"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    found = {}
    for name in models.split(","):
        seconds = found[name] = seconds_of(name, runs)
        for method in METHODS:
            shared, unshared = seconds[f"{method}, shared"], seconds[f"{method}, unshared"]
            pairs = ((shared, unshared), (shared, seconds["predict"]), (unshared, seconds["predict"]))
            table.add_row(name, method, *(_shown(ratios(one, other)) for one, other in pairs))
    if as_json:
        click.echo(json.dumps(found))
    else:
        Console(width=130).print(table)


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
