"""Where a table build's time goes, image by image: `python -m benchmarks.build_parts --data FOLDER`.

CPU milliseconds an image of each part of building ResNet-50's table, one thread, on the photographs below a folder:
the base of docs/full_scale.md. Random weights: the time does not depend on them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import interleaved
from parchgrad.evidence import digest_of
from parchgrad.features import GapNetwork, running_layers
from parchgrad.models import build_network
from parchgrad.preprocessing import Preprocessing, decode_image
from parchgrad.runtimes.view import private_view
from parchgrad.statistics import ClassMoments

BATCH = 32
ARCHITECTURE = "resnet50"


def parts(paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed, by name, each for one batch of images."""
    torch.manual_seed(0)
    network = build_network(ARCHITECTURE, 1000).eval()
    preprocessing = Preprocessing((224, 224), resize=256)
    layers = running_layers(network, torch.zeros(1, 3, 224, 224))
    alone, observed = private_view(network), GapNetwork(network, layers, None)
    encoded = [path.read_bytes() for path in paths]

    def decode() -> list[Tensor]:
        return [
            preprocessing.apply(decode_image(data, path.name))[0] for data, path in zip(encoded, paths, strict=True)
        ]

    images = torch.stack(decode())
    features = observed.features(images).numpy()
    moments = ClassMoments(1000, features.shape[1])
    rows = np.zeros(BATCH, np.int64)

    def forward() -> Tensor:
        with torch.inference_mode():
            return alone(images)  # type: ignore[no-any-return]

    return {
        "read and digest": lambda: [digest_of(path.read_bytes()) for path in paths],
        "decode and fit": decode,
        "network alone": forward,
        "network with features": lambda: observed.features(images),
        "moments, one class a batch": lambda: moments.update(features, rows),
    }


@click.command(help="Print the CPU time of each part of a build.")
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", type=click.IntRange(7), default=9, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(data: Path, runs: int, json_file: Path | None) -> None:
    torch.set_num_threads(1)
    paths = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < BATCH:
        raise click.ClickException(f"'{data}' holds {len(paths)} images; {BATCH} are needed.")
    calls = parts(paths[:BATCH])
    seconds = interleaved(calls, runs)
    milliseconds = {name: [1000 * s / BATCH for s in values] for name, values in seconds.items()}
    alone = statistics.median(milliseconds["network alone"])
    view = Table("part", "CPU ms an image", "spread", "x network alone", title=f"{ARCHITECTURE}, {runs} runs, 1 thread")
    for name, values in milliseconds.items():
        middle = statistics.median(values)
        view.add_row(name, f"{middle:.2f}", f"{min(values):.2f}-{max(values):.2f}", f"{middle / alone:.3f}")
    console = Console(width=100)
    console.print(view)
    console.print(f"{sum(path.stat().st_size for path in paths) / len(paths):,.0f} bytes an image, {len(paths)} images")
    if json_file is not None:
        json_file.write_text(json.dumps(milliseconds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
