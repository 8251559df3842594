"""What each step of the pruned backward pass is worth: `python -m benchmarks.backward_steps`.

Prediction plus map over prediction, process CPU time on one thread, all rows interleaved in one run, medians. A row is
the engine as it was before the steps under it: they are switched off where they are made, not by options, which is why
this benchmark alone reaches into the package. The floor is what the arithmetic leaves: of each convolution's own time
in prediction the share of its channels that is selected, and once reading each gradient with the output it belongs to.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import interleaved, ratios
from benchmarks.peer_methods import MODELS, Case, case_of
from parchgrad import Explainer
from parchgrad.quantiles import channels_of_quantile
from parchgrad.runtimes.pruned import convolution, engine
from parchgrad.runtimes.pruned.program import Program

QUANTILE = 0.1
FINAL = "image by image"


@contextlib.contextmanager
def unlike(*, packs: bool = True, prunes: bool = True, keeps: bool = True, alone: bool = True) -> Iterator[None]:
    """The engine without some of its steps."""
    with contextlib.ExitStack() as changed:
        if not packs:
            changed.enter_context(mock.patch.object(torch.backends.mkldnn, "is_available", return_value=False))
        if not prunes:
            changed.enter_context(mock.patch.object(engine.LayerRule, "prunes", return_value=False))
        if not keeps:
            changed.enter_context(mock.patch.object(engine, "CACHE_BYTES", 0))
        if not alone:
            changed.enter_context(mock.patch.object(Program, "by_image", property(lambda self: False)))
        yield


STEPS: dict[str, dict[str, bool]] = {
    "no autograd, BatchNorm folded, channels last": {
        "packs": False, "prunes": False, "keeps": False, "alone": False
    },
    "weights packed, activations fused": {"prunes": False, "keeps": False, "alone": False},
    "selected rows only": {"keeps": False, "alone": False},
    "rows kept by class": {"alone": False},
    FINAL: {},
}  # fmt: skip


def step(case: Case, switches: dict[str, bool]) -> Callable[[], object]:
    with unlike(**switches):
        explainer = Explainer(case.network, case.table, backward="pruned")

    def call() -> Tensor:
        with unlike(**switches):
            return explainer.explain(case.images, case.targets, quantile=QUANTILE).attributions

    return call


def floor(case: Case, seconds: float) -> tuple[float, float]:
    """The arithmetic's share and the memory's of a map, over a prediction of `seconds`."""
    explainer = Explainer(case.network, case.table, backward="pruned")
    explainer.predict(case.images)
    compiled = explainer._runtime._pruned._compiled  # type: ignore[union-attr]
    arithmetic, read = 0.0, 0
    values: list[object] = [None] * compiled.program._values
    values[0] = case.images
    with torch.no_grad():
        for line in compiled.program._lines:
            given = [values[i] for i in line.inputs]
            values[line.output] = result = line.step.run(*given)
            if isinstance(line.step, convolution.Convolution):
                times = []
                for _ in range(5):
                    start = time.process_time()
                    line.step.run(*given)
                    times.append(time.process_time() - start)
                assert isinstance(result, Tensor)
                channels = result.shape[1]
                arithmetic += statistics.median(times) * channels_of_quantile(QUANTILE, channels) / channels
                read += 2 * result.numel()
        ones = torch.ones(1 << 24)
        total = torch.empty_like(ones)
        times = []
        for _ in range(7):
            start = time.process_time()
            torch.mul(ones, ones, out=total)
            times.append(time.process_time() - start)
    memory = read * statistics.median(times) / (3 * ones.numel())  # one multiplication reads two and writes one
    return arithmetic / seconds, memory / seconds


@click.command(help="Print what each step of the pruned backward pass is worth.")
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(models: str, batch: int, runs: int, json_file: Path | None) -> None:
    torch.set_num_threads(1)
    console = Console(width=140)
    view = Table("step", *models.split(","), title=f"with a map over without, q = {QUANTILE}, batch {batch}")
    figures: dict[str, dict[str, float]] = {}
    for model in models.split(","):
        case = case_of(model, batch)
        final = Explainer(case.network, case.table, backward="pruned")
        dense = Explainer(case.network, case.table, backward="dense")
        calls: dict[str, Callable[[], object]] = {
            "predict": lambda final=final, case=case: final.predict(case.images),  # type: ignore[misc]
            "autograd and hooks": lambda dense=dense, case=case: dense.explain(  # type: ignore[misc]
                case.images, case.targets, quantile=QUANTILE
            ),
        }
        calls |= {name: step(case, switches) for name, switches in STEPS.items()}
        for call in calls.values():
            call()
        seconds = interleaved(calls, runs)
        found = {name: statistics.median(ratios(v, seconds["predict"])) for name, v in seconds.items()}
        del found["predict"]
        arithmetic, memory = floor(case, statistics.median(seconds["predict"]))
        found["floor: selected arithmetic"] = 1 + arithmetic
        found["floor: and one read of the gradients"] = 1 + arithmetic + memory
        figures[model] = found
    for name in next(iter(figures.values())):
        view.add_row(name, *(f"{found[name]:.2f}" if math.isfinite(found[name]) else "-" for found in figures.values()))
    console.print(view)
    console.print(f"torch {torch.__version__}; each row with the steps above it")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
