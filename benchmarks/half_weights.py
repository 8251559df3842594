"""Whether a graph may hold its weights in float16: `python -m benchmarks.half_weights`.

Weights rounded to float16 and nothing else: all is computed in float64, by the dense engine, with a table of random
channels. What is printed is therefore the least that an export in float16 would be off.
"""

from __future__ import annotations

import copy

import click

from benchmarks.graph_cases import CLASSES, QUANTILE, REAL_WEIGHTS, subject
from parchgrad import Explainer

IMAGES = 8


@click.command(help="How far logits and maps are off where the weights are rounded to float16.")
def main() -> None:
    click.echo(f"| network | logits, of their range | maps, relative L2 of {IMAGES} images | allowed |")
    click.echo("| --- | --- | --- | --- |")
    for name in REAL_WEIGHTS:
        one = subject(name)
        images, targets = one.pictures(IMAGES).double(), [index % CLASSES for index in one.targets(IMAGES)]
        found = [
            Explainer(network.double(), one.table, backward="dense").explain(images, targets, quantile=QUANTILE)
            for network in (copy.deepcopy(one.network), copy.deepcopy(one.network).half())
        ]
        right, rounded = (e.logits for e in found)
        spread = right.amax(dim=1) - right.amin(dim=1)
        logits = ((rounded - right).abs().amax(dim=1) / spread).max()
        right, rounded = (e.attributions.flatten(1) for e in found)
        maps = ((rounded - right).norm(dim=1) / right.norm(dim=1)).tolist()
        weights = name if one.trained else f"{name} (random weights)"
        click.echo(f"| {weights} | {logits:.1e} | {min(maps):.3f} to {max(maps):.3f} | 1e-4, 0.001 |")


if __name__ == "__main__":
    main()
