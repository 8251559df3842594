"""What a table build costs beside running the network alone: `python -m benchmarks.table_build`.

Both sides take the same decoded batches from the same loader; the build's extra work is the features of every layer,
the exact moments and the sample. Random weights and made-up photographs: the time does not depend on them.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from parchgrad.build import Local, Reader, Work, gather, loader, subject_of
from parchgrad.models import Model, add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.runtimes.view import private_view
from parchgrad.sources import ImageFolder

CLASSES = 10


def made_up_images(root: Path, per_class: int) -> Path:
    """JPEG files of about 400 x 300 pixels, smooth as photographs are, in one folder a class."""
    generator = np.random.default_rng(0)
    for index in range(CLASSES):
        folder = root / str(index)
        folder.mkdir(parents=True)
        for number in range(per_class):
            coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return root


def made_up_model(architecture: str, folder: Path) -> Model:
    torch.manual_seed(0)
    added = add_model(
        architecture, architecture=architecture, weights=build_network(architecture, CLASSES).state_dict(),
        labels=[f"class {index}" for index in range(CLASSES)],
        preprocessing=Preprocessing((224, 224), resize=256), models_dir=folder,
    )  # fmt: skip
    return load_model(added)


def seconds_of(call: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and of the decoding processes it waited for."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    call()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@click.command(help="Print a build's throughput over that of the network alone.")
@click.option("--architecture", "architectures", multiple=True, default=("squeezenet1_1", "mobilenet_v2", "resnet50"))
@click.option("--images", default=160, show_default=True, help="In all, a pass.")
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(
    architectures: tuple[str, ...], images: int, runs: int, workers: int, device: str, json_file: Path | None
) -> None:
    threads = 1 if device == "cpu" else torch.get_num_threads()
    torch.set_num_threads(threads)
    console = Console(width=120)
    view = Table(
        "model", "forward only, images/s", "build, images/s", "throughput, CPU time", "spread", "throughput, wall",
        title=f"{images} images, {runs} interleaved runs, {workers} decoding processes, {threads} thread(s), {device}",
    )  # fmt: skip
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = made_up_images(Path(scratch) / "images", images // CLASSES)
        for architecture in architectures:
            model = made_up_model(architecture, Path(scratch) / "models")
            source = ImageFolder.scan(folder, model)
            work = Work(model, subject_of(model), Reader(source, model.preprocessing, 32))
            network = private_view(model.module, torch.device(device))

            def forward(work: Work = work, network: torch.nn.Module = network) -> None:
                with torch.inference_mode():
                    for batch in loader(work.reader, np.arange(len(work.reader)), workers):
                        for _, pixels in batch.groups:
                            network(pixels.to(device)).cpu()

            def build(work: Work = work) -> None:
                gather(work, Local(workers, device))

            rounds = []
            for number in range(runs + 1):
                alone, built = seconds_of(forward), seconds_of(build)
                if number:
                    rounds.append((alone, built))
            by_cpu = [alone[1] / built[1] for alone, built in rounds]
            by_wall = [alone[0] / built[0] for alone, built in rounds]
            figures[architecture] = {"cpu": by_cpu, "wall": by_wall}
            view.add_row(
                architecture,
                f"{len(source) / statistics.median(alone[0] for alone, _ in rounds):.1f}",
                f"{len(source) / statistics.median(built[0] for _, built in rounds):.1f}",
                f"{statistics.median(by_cpu):.2f}", f"{min(by_cpu):.2f}-{max(by_cpu):.2f}",
                f"{statistics.median(by_wall):.2f}",
            )  # fmt: skip
    console.print(view)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
