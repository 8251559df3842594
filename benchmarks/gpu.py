"""Prediction and explanation on a GPU: `python -m benchmarks.gpu`. Needs the library alone; without a GPU it says so.

Images a second of predict, plain gradient and explain (dense and pruned), as a share of the matrix products' rate
that is measured first; host synchronisations; CUDA graphs; staging from pinned memory; and what each form of a
layer's pruned input gradient costs. Weights and tables are random. Figures are wall-clock, by CUDA events.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peer_methods import Case, case_of
from parchgrad import Explainer
from parchgrad.options import per_image
from parchgrad.runtimes.pruned import batched
from parchgrad.runtimes.pruned.batched import BatchRules, Form, Kernel
from parchgrad.runtimes.pruned.engine import PrunedEngine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTILE = 0.1
DEVICE = "cuda"
WARM_UP = 3

Call = Callable[[], object]

# ResNet-50's and VGG16's: input channels, output channels, kernel, stride, input's side.
LAYERS = ((256, 64, 1, 1, 56), (64, 64, 3, 1, 56), (128, 128, 3, 2, 56), (1024, 2048, 1, 2, 14), (512, 512, 3, 1, 28))


def seconds_of(calls: dict[str, Call], runs: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, `runs` interleaved rounds of `repeats` calls after the warm-up."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return found


def product_rate(dtype: torch.dtype, runs: int, side: int = 8192) -> float:
    """Floating-point operations a second of one large matrix product."""
    a, b = (torch.randn(side, side, dtype=dtype, device=DEVICE) for _ in range(2))
    return 2 * side**3 / statistics.median(seconds_of({"product": lambda: a @ b}, runs, 4)["product"])


def on_gpu(case: Case) -> Case:
    network = case.network.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = case.images.to(DEVICE, memory_format=torch.channels_last)
    return Case(network, case.table, images, case.classes, case.cam_layer)


def cell(model: str, batch: int, dtype: str, runs: int, rate: float) -> dict[str, Any]:
    """All that is measured of one network, batch size and type."""
    case = on_gpu(case_of(model, batch))
    explainers = {name: Explainer(case.network, case.table, backward=name) for name in ("dense", "pruned")}
    engine = explainers["pruned"]._runtime._pruned
    assert engine is not None

    def explain(name: str) -> Tensor:
        return explainers[name].explain(case.images, case.targets, quantile=QUANTILE).attributions

    targets = torch.tensor(case.targets, device=DEVICE)
    calls: dict[str, Call] = {
        "predict": lambda: explainers["pruned"].predict(case.images),
        "gradient": lambda: plain_gradient(case.network, case.images, targets),
        "explain dense": lambda: explain("dense"),
        "explain pruned": lambda: explain("pruned"),
    }
    with computed_in(dtype):
        operations = {name: operations_of(call) for name, call in calls.items()}
        waits = {name: synchronisations(partial(explain, name)) for name in explainers}
        before_the_look = first_wait(lambda: queued(engine, explainers["pruned"], case))
        graphs, notes = {}, {}
        for name, make in (("graph predict", graph_of_prediction), ("graph explain pruned", graph_of_explanation)):
            try:
                graphs[name] = make(engine, explainers["pruned"], case)
            except Exception as error:  # a measurement of whether it can be: the reason is its result
                notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                torch.cuda.synchronize()
        seconds = seconds_of(calls | graphs, runs, repeats=max(1, 16 // batch))
        seconds["staged, end to end"] = staged_seconds(explainers["pruned"], case, runs)
    return {
        "model": model, "batch": batch, "dtype": dtype, "runs": runs,
        "seconds": seconds, "operations": operations, "product_rate": rate,
        "synchronisations": waits, "waits_before_the_look": before_the_look, "not_captured": notes,
    }  # fmt: skip


def computed_in(dtype: str) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(DEVICE, DTYPES[dtype])


def plain_gradient(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    score = network(leaf.view_as(leaf)).gather(1, targets[:, None]).sum()  # the counter of operations minds a leaf
    (gradient,) = torch.autograd.grad(score, leaf)
    return gradient


def operations_of(call: Call) -> int:
    """Multiplications and additions of convolutions and matrix products in one call."""
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


# --- host synchronisations ---


@contextlib.contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisations(call: Call) -> int:
    """How often one call waits for the GPU, as far as PyTorch notices."""
    call()
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):
        warnings.simplefilter("always")
        call()
    return sum("synchroniz" in str(one.message) for one in caught)


def first_wait(call: Call) -> str | None:
    """The first wait between images and gradients, the one look left out; None where there is none."""
    call()
    try:
        with sync_debug("error"):
            call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def queued(engine: PrunedEngine, explainer: Explainer, case: Case) -> Tensor:
    with torch.no_grad():
        found, _ = engine._queued(engine._compiled, case.images, torch.tensor(case.targets), plan_of(explainer, case))
    return found.gradients


def plan_of(explainer: Explainer, case: Case) -> Any:
    return explainer._plan(per_image(len(case.images), case.table.defaults, {"quantile": QUANTILE}))


# --- CUDA graphs ---


def graph_of_prediction(engine: PrunedEngine, explainer: Explainer, case: Case) -> Call:
    return captured(lambda: engine._compiled.program.predict(case.images))


def graph_of_explanation(engine: PrunedEngine, explainer: Explainer, case: Case) -> Call:
    """Of given targets: what the rule selects is looked up outside."""
    assert isinstance(engine._batch_rules, BatchRules)
    rules = engine._batch_rules.of(torch.tensor(case.targets, device=DEVICE), plan_of(explainer, case))
    program, seed = engine._compiled.program, torch.zeros(len(case.images), case.classes, device=DEVICE)
    seed[range(len(case.targets)), case.targets] = 1.0

    def explanation() -> Tensor:
        record = program.record(case.images)
        return program.pull(record, seed.to(record.logits.dtype), rules)

    return captured(explanation)


def captured(call: Call) -> Call:
    """The call as one graph, its result compared with the call's own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARM_UP):
            expected = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Autocast would keep weights' casts of the capture for later calls.
    with torch.no_grad(), without_cast_cache(), torch.cuda.graph(graph):
        found = call()
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(torch.as_tensor(expected).abs().max()))
    return graph.replay


@contextlib.contextmanager
def without_cast_cache() -> Iterator[None]:
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


# --- staging ---


def staged_seconds(explainer: Explainer, case: Case, runs: int, batches: int = 8) -> list[float]:
    """Seconds a batch from pinned host memory to a map in pinned host memory, the next batch's copy meanwhile."""
    waiting = [case.images.cpu().pin_memory() for _ in range(2)]
    maps = torch.empty(case.images.shape[0], *case.images.shape[2:]).pin_memory()
    copies = torch.cuda.Stream()

    def fetch(number: int) -> Tensor:
        with torch.cuda.stream(copies):
            return waiting[number % 2].to(DEVICE, non_blocking=True)

    def all_batches() -> None:
        following = fetch(0)
        for number in range(batches):
            torch.cuda.current_stream().wait_stream(copies)
            images = following
            images.record_stream(torch.cuda.current_stream())
            following = fetch(number + 1)
            found = explainer.explain(images, case.targets, quantile=QUANTILE).attributions
            maps.copy_(found.abs().mean(dim=1), non_blocking=True)

    return [seconds / batches for seconds in seconds_of({"all": all_batches}, runs)["all"]]


# --- forms of a layer's pruned input gradient ---


def form_seconds(batch: int, dtype: str, runs: int) -> list[dict[str, Any]]:
    """Of each form for some layers, the dense input gradient of a masked gradient beside them."""
    found = []
    for layer in LAYERS:
        wide, out, kernel, stride, side = layer
        with torch.no_grad():
            seconds = seconds_of(form_calls(batch, DTYPES[dtype], *layer), runs, 4)
        name = f"{wide} -> {out}, {kernel} x {kernel}, stride {stride}, {side} x {side}"
        found.append({"layer": name, "batch": batch, "dtype": dtype, "seconds": seconds})
    return found


def form_calls(
    batch: int, dtype: torch.dtype, wide: int, out: int, kernel_side: int, stride: int, side: int
) -> dict[str, Call]:
    reached = (side - 1) // stride + 1
    weight = torch.randn(out, wide, kernel_side, kernel_side, dtype=dtype, device=DEVICE)
    grad = torch.randn(batch, out, reached, reached, dtype=dtype, device=DEVICE)
    weight, grad = (values.contiguous(memory_format=torch.channels_last) for values in (weight, grad))
    padding = kernel_side // 2
    kernel = Kernel(weight, None, (stride, stride), (padding, padding), (1, 1), 1)
    count = max(1, int(QUANTILE * out))
    channels = torch.stack([torch.randperm(out, device=DEVICE)[:count] for _ in range(batch)])
    shape = torch.Size((batch, wide, side, side))

    def pruned(form: Form) -> Tensor:
        return form(kernel, channels, batched.at(grad, channels), shape)

    forms: tuple[Form, ...] = (batched.by_transposed,)
    forms += (batched.by_product,) if kernel_side == 1 else ()
    forms += (batched.by_flipped,) if stride == 1 else ()
    calls: dict[str, Call] = {form.__name__: partial(pruned, form) for form in forms}
    return calls | {"masked": partial(masked, kernel, channels, grad, shape)}


def masked(kernel: Kernel, channels: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(grad.shape[:2], dtype=grad.dtype, device=grad.device).scatter_(1, channels, 1.0)
    like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    answer: Tensor
    (answer, _, _) = torch.ops.aten.convolution_backward(
        grad * mask[:, :, None, None], like, kernel.weight, None, kernel.stride, kernel.padding, kernel.dilation,
        False, (0, 0), 1, (True, False, False),
    )  # fmt: skip
    return answer


# --- report ---


def show(console: Console, found: dict[str, Any]) -> None:
    medians = {name: statistics.median(values) for name, values in found["seconds"].items()}
    table = Table(title=f"{found['model']}, batch {found['batch']}, {found['dtype']}")
    for column in ("", "images/s", "spread", "over predict", "of the product rate"):
        table.add_column(column, justify="right" if column else "left")
    for name, median in medians.items():
        values = found["seconds"][name]
        operations = found["operations"].get(name.removeprefix("graph "))
        share = "" if operations is None else f"{operations / median / found['product_rate']:.1%}"
        spread = f"{(max(values) - min(values)) / median:.0%}"
        over = f"{median / medians['predict']:.2f}"
        table.add_row(name, f"{found['batch'] / median:,.0f}", spread, over, share)
    console.print(table)
    waits = ", ".join(f"{name} {count}" for name, count in found["synchronisations"].items())
    before = found["waits_before_the_look"] or "none"
    console.print(f"Host synchronisations of a call: {waits}; between images and gradients, pruned: {before}.")
    for name, reason in found["not_captured"].items():
        console.print(f"{name}: not captured: {reason}")


def show_forms(console: Console, found: list[dict[str, Any]]) -> None:
    table = Table(title=f"Input gradients at quantile {QUANTILE}, microseconds")
    for column in ("layer", "batch", "type", "masked", "by_product", "by_flipped", "by_transposed"):
        table.add_column(column)
    for one in found:
        each = [one["seconds"].get(name) for name in ("masked", "by_product", "by_flipped", "by_transposed")]
        cells = ["" if values is None else f"{1e6 * statistics.median(values):,.0f}" for values in each]
        table.add_row(one["layer"], str(one["batch"]), one["dtype"], *cells)
    console.print(table)


@click.command(help="Print images a second of predictions and explanations on this machine's GPU.")
@click.option("--models", default="resnet50,vgg16_bn", show_default=True)
@click.option("--batches", default="1,8,32,128", show_default=True)
@click.option("--dtypes", default=",".join(DTYPES), show_default=True, help="bfloat16 is by autocast.")
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(models: str, batches: str, dtypes: str, runs: int, json_file: Path | None) -> None:
    console = Console()
    if not torch.cuda.is_available():
        console.print("No CUDA device here: nothing was measured.")
        return
    # float32 means float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device, version = torch.cuda.get_device_name(), torch.__version__
    console.print(f"{device}, torch {version}, TF32 off, channels last, quantile {QUANTILE}, medians of {runs}")
    cells, forms, rates = [], [], {}
    for dtype in dtypes.split(","):
        rates[dtype] = product_rate(DTYPES[dtype], runs)
        console.print(f"One large matrix product in {dtype}: {rates[dtype] / 1e12:,.1f} Tflop/s")
        for model in models.split(","):
            for batch in map(int, batches.split(",")):
                cells.append(cell(model, batch, dtype, runs, rates[dtype]))
                show(console, cells[-1])
        for batch in map(int, batches.split(",")):
            forms += form_seconds(batch, dtype, runs)
    show_forms(console, forms)
    if json_file is not None:
        whole = {"device": device, "torch": version, "product_rates": rates, "cells": cells, "forms": forms}
        json_file.write_text(json.dumps(whole, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
