"""What a table of ImageNet's size costs a server: `python -m benchmarks.table_serving`.

A random table over ResNet-50's 26,560 channels and 1000 classes: seconds to open, memory that a worker adds by opening
it and by choosing channels for every class, and CPU time of choosing them for a mixed batch, one thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from parchgrad import SelectionTable, load_table
from parchgrad.models import build_network
from parchgrad.quantiles import channels_of_quantile
from parchgrad.selection import best_ranked

BATCH = 32


def resident_bytes() -> int:
    """This process's memory, pages of mapped files among it (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def serve_all_classes(folder: str, rounds: int) -> dict[str, object]:
    """One worker's life, in a process of its own: open the table, choose channels for every class."""
    torch.set_num_threads(1)
    load_table(folder)  # code and libraries are loaded; the pages of this one go with it
    before = resident_bytes()
    start = time.perf_counter()
    table = load_table(folder)
    opened = time.perf_counter() - start
    after_opening = resident_bytes()
    widths = [layer.channels for layer in table.layers.values()]
    quantiles = torch.linspace(0.01, 0.5, BATCH).tolist()
    count = torch.tensor([[channels_of_quantile(q, width) for width in widths] for q in quantiles])
    seconds = []
    for number in range(rounds):
        for start_class in range(0, len(table.classes), BATCH):
            targets = torch.arange(start_class, start_class + BATCH) % len(table.classes)
            begun = time.process_time()
            best_ranked(table.rank, table.rows(targets), count, widths)
            if number:
                seconds.append(time.process_time() - begun)
    return {
        "open_seconds": opened,
        "opening_adds_mib": (after_opening - before) / 2**20,
        "serving_adds_mib": (resident_bytes() - before) / 2**20,
        "choosing_ms": [1000 * second for second in seconds],
    }


@click.command(help="Print what a table of ImageNet's size costs a server.")
@click.option("--rounds", type=click.IntRange(2), default=8, show_default=True, help="Over all classes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--worker", hidden=True)
def main(rounds: int, json_file: Path | None, worker: str | None) -> None:
    if worker:
        print(json.dumps(serve_all_classes(worker, rounds)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        saved = SelectionTable.random(build_network("resnet50", 1000), 1000, seed=0).save(Path(scratch) / "1")
        size = sum(path.stat().st_size for path in Path(scratch, "1").iterdir())
        command = [sys.executable, "-m", "benchmarks.table_serving", "--rounds", str(rounds), "--worker", scratch]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    choosing = found["choosing_ms"]
    channels = sum(layer.channels for layer in saved.layers.values())
    view = Table("what", "figure", title=f"{len(saved.layers)} layers, {channels:,} channels, 1000 classes")
    view.add_row("files", f"{size / 2**20:.0f} MiB")
    view.add_row("opening", f"{found['open_seconds']:.2f} s")
    view.add_row("memory added by opening", f"{found['opening_adds_mib']:.0f} MiB")
    view.add_row("memory added, all classes served", f"{found['serving_adds_mib']:.0f} MiB")
    view.add_row(
        f"choosing channels, {BATCH} images, {BATCH} targets and quantiles, all layers",
        f"{statistics.median(choosing):.2f} ms ({min(choosing):.2f}-{max(choosing):.2f})",
    )
    Console(width=120).print(view)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
