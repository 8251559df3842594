"""All the statistics of a table of ImageNet's size: `python -m benchmarks.table_from_evidence`.

From evidence of ResNet-50's 26,560 channels and 1000 classes to the finished table: moments, Welch's test, ranks,
means and the Shapiro-Wilk test of 5000 images. Made-up features, five images a class, as the normality sample has
them; how many images the moments sum up does not change the time.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from parchgrad.defaults import Defaults
from parchgrad.evidence import DIGEST_BYTES, NORMALITY_IMAGES, Evidence, Observation, Subject
from parchgrad.layers import convolutions
from parchgrad.models import build_network

CLASSES = 1000


def made_up_evidence(subject: Subject) -> Evidence:
    generator = np.random.default_rng(0)
    evidence = Evidence(subject, range(CLASSES))
    count = NORMALITY_IMAGES // CLASSES
    for target in range(CLASSES):
        features = generator.gamma(2.0, 0.1, (count, subject.channels)).astype(np.float32)
        digests = generator.integers(0, 256, (count, DIGEST_BYTES), dtype=np.uint8)
        names = [f"{target}/{number}" for number in range(count)]
        evidence.observe(Observation(features, np.full(count, target), names, digests))
    return evidence


@click.command(help="Print seconds and memory of all the statistics of a large table, measured once.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(json_file: Path | None) -> None:
    layers = convolutions(build_network("resnet50", CLASSES))
    labels = tuple(str(index) for index in range(CLASSES))
    subject = Subject(
        model_name="made-up", model_version="1", weights_sha256="", labels=labels, preprocessing="", layers=layers,
        idle_layers=(), left_out=(), layer_patterns=("*",), statistics_point="convolution",
        sample_images=NORMALITY_IMAGES, seed=0,
    )  # fmt: skip
    evidence = made_up_evidence(subject)
    wall, cpu = time.perf_counter(), time.process_time()
    evidence.table(Defaults())
    figures = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    view = Table(
        "figure", "value", title=f"{subject.channels:,} channels, {CLASSES} classes, {NORMALITY_IMAGES} tested"
    )
    view.add_row("wall s (CPU s)", f"{figures['wall_seconds']:.1f} ({figures['cpu_seconds']:.1f})")
    view.add_row("peak memory of the process, evidence included", f"{figures['peak_gib']:.2f} GiB")
    Console(width=100).print(view)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
