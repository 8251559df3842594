"""The service under load beside the library alone: `python -m benchmarks.service_load`.

One worker, one torch thread, clients in a process of their own that ask again as soon as they are answered. First
1, 8, 32 and 128 clients: requests a second, latency, batches, how late the event loop runs. Then, in alternation, 32
clients and the library in a process of its own fed the same decoded pictures in batches of the size the service
formed. `native` sends JPEG files to /predict and /explain (`saliency=none`, and `uint8`), `v2` normalised tensors in
binary to …/infer, which leaves out the decoding that the library alone does not do either.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

import parchgrad
from benchmarks.load_clients import Load, closed_loop, in_process_of_its_own, lags, percentile, wire
from benchmarks.served import Counters, Subject, Usage, multipart, open_inference, subject_options
from service.images import ImageLimits, decode
from service.settings import Settings
from tests.service.serving import Server

CLIENTS = (1, 8, 32, 128)
COMPARED = 32  # clients
LEAST = 3  # requests a client
LOOP_LAG = "parchgrad_loop_lag_seconds"
LATE = 0.05  # seconds: an event loop held longer is blocked
FORMS = ("native predict", "native explain none", "native explain uint8", "v2 predict", "v2 explain")


@dataclass(frozen=True)
class Row:
    """One load: requests a second, latency in seconds, images a batch, CPU milliseconds a request.

    `ticks` of the event loop, how many were late by more than LATE, and the same two of a task in a process that does
    nothing else: what comes late there too was the machine's doing.
    """

    form: str
    clients: int
    rate: float
    p50: float
    p99: float
    batch: float
    server_ms: float
    loop_ms: float
    device_ms: float
    client_ms: float
    ticks: int
    late: int
    bystander_ticks: int
    bystander_late: int


@dataclass(frozen=True)
class Alone:
    """The library without a service: images a second, CPU milliseconds an image."""

    rate: float
    cpu_ms: float


@dataclass(frozen=True)
class Round:
    service: Row
    library: Alone
    decoding_ms: float


def requests_of(subject: Subject, url: str, form: str) -> list[bytes]:
    protocol, kind, *saliency = form.split()
    if protocol == "v2":
        return [wire(open_inference(url, subject.model, kind, image[None])) for image in subject.tensors()]
    fields = {"saliency": saliency[0]} if saliency else {}
    return [wire(multipart(url, kind, [data], data=fields)) for data in subject.files()]


@dataclass(frozen=True)
class Processes:
    """One each: for the clients, for the library without a service, and for nothing but keeping time."""

    clients: ProcessPoolExecutor
    library: ProcessPoolExecutor
    bystander: ProcessPoolExecutor


def measure(
    server: Server, processes: Processes, form: str, wires: Sequence[bytes], clients: int, seconds: float
) -> Row:
    """One load. Raises RuntimeError unless every request was answered 200, with its map where it asked for one."""
    counters, usage = Counters.of(server), Usage.of(server)
    beside = processes.bystander.submit(lags, seconds)
    load: Load = processes.clients.submit(closed_loop, server.url, wires, clients, seconds, LEAST * clients).result()
    used, counted = Usage.of(server).since(usage), Counters.of(server).since(counters)
    if set(load.statuses()) != {200}:
        raise RuntimeError(f"{form}, {clients} clients: expected only status 200, found {load.statuses()}.")
    if missing := counted.total("parchgrad_maps_missing_total"):
        raise RuntimeError(f"{form}, {clients} clients: {missing:.0f} answers have no map.")
    number = len(load.replies)
    server_ms, loop_ms, device_ms, client_ms = (
        1000 * spent / number for spent in (used.total, used.loop, used.device, load.cpu)
    )
    return Row(
        form=form,
        clients=clients,
        rate=load.rate(clients),
        p50=percentile(load.replies, 50),
        p99=percentile(load.replies, 99),
        batch=counted.mean("parchgrad_batch_images", kind=form.split()[1]),
        server_ms=server_ms,
        loop_ms=loop_ms,
        device_ms=device_ms,
        client_ms=client_ms,
        ticks=round(counted.total(f"{LOOP_LAG}_count")),
        late=counted.above(LOOP_LAG, LATE),
        bystander_ticks=len(beside.result()),
        bystander_late=sum(late > LATE for late in beside.result()),
    )


def compare(
    server: Server, processes: Processes, subject: Subject, form: str, rounds: int, seconds: float
) -> list[Round]:
    """The service and the library alone in alternation, after one round that is not counted."""
    wires, kind = requests_of(subject, server.url, form), form.split()[1]
    done = []
    for _ in range(rounds + 1):
        service = measure(server, processes, form, wires, COMPARED, seconds)
        library: Alone = processes.library.submit(alone, subject, kind, round(service.batch), seconds / 2).result()
        decoded: float = processes.library.submit(decoding, subject, seconds / 8).result()
        done.append(Round(service, library, decoded))
    return done[1:]


@cache
def _loaded(subject: Subject) -> tuple[parchgrad.Explainer, list[torch.Tensor]]:
    """The model and the decoded pictures, once in this process."""
    torch.set_num_threads(1)
    return subject.explainer(), list(subject.tensors())


def alone(subject: Subject, kind: str, batch: int, seconds: float) -> Alone:
    """What the service asks of the library for one batch, again and again for `seconds`, in this process."""
    explainer, pictures = _loaded(subject)
    images = list(islice(cycle(pictures), batch))

    def call() -> None:
        if kind == "predict":
            explainer.predict(torch.stack(images)).softmax(dim=1).numpy()
        else:
            explanation = explainer.explain(torch.stack(images), uncovered="nan")
            explanation.saliency().numpy(), explanation.probabilities().numpy()

    rate, cpu_ms = _repeated(call, seconds)
    return Alone(rate * batch, cpu_ms / batch)


def decoding(subject: Subject, seconds: float) -> float:
    """CPU milliseconds from one encoded picture to its normalised tensor."""
    preprocessing = parchgrad.load_model(subject.models_dir / subject.model).preprocessing
    limits, files = ImageLimits(2**31, 2**31), subject.files()

    def call() -> None:
        for data in files:
            preprocessing.apply(decode(data, limits).image)

    return _repeated(call, seconds)[1] / len(files)


def _repeated(call: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Calls a second, and CPU milliseconds a call."""
    call()
    begun, cpu, number = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        call()
        number += 1
    return number / (time.perf_counter() - begun), 1000 * (time.process_time() - cpu) / number


def ratios(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Service over library, round by round, so that a slower machine slows both sides.

    By wall clock, images a second; by CPU time, images a CPU second of the busiest thread beside the event loop, and
    of the whole worker, the latter also beside what decoding and the library cost together.
    """
    decoding_ms = [0.0 if one.service.form.startswith("v2") else one.decoding_ms for one in rounds]
    pairs = list(zip(rounds, decoding_ms, strict=True))
    return {
        "wall": [one.service.rate / one.library.rate for one, _ in pairs],
        "CPU, device thread": [one.library.cpu_ms / one.service.device_ms for one, _ in pairs],
        "CPU, worker": [one.library.cpu_ms / one.service.server_ms for one, _ in pairs],
        "CPU, worker, with decoding": [
            (one.library.cpu_ms + decoding) / one.service.server_ms for one, decoding in pairs
        ],
    }


def table_of_loads(rows: Sequence[Row], title: str) -> Table:
    view = Table(
        "requests", "clients", "requests/s", "p50 ms", "p99 ms", "p99/p50", "batch", "CPU ms: worker", "its loop",
        "clients", f"loop late > {1000 * LATE:.0f} ms", "bystander late",
        title=title,
    )  # fmt: skip
    for row in rows:
        view.add_row(
            row.form, str(row.clients), f"{row.rate:.1f}", f"{1000 * row.p50:.0f}", f"{1000 * row.p99:.0f}",
            f"{row.p99 / row.p50:.2f}", f"{row.batch:.1f}", f"{row.server_ms:.1f}", f"{row.loop_ms:.2f}",
            f"{row.client_ms:.2f}", f"{row.late} of {row.ticks}", f"{row.bystander_late} of {row.bystander_ticks}",
        )  # fmt: skip
    return view


def table_of_ratios(by_form: dict[str, list[Round]]) -> Table:
    names = ("wall", "CPU, device thread", "CPU, worker", "CPU, worker, with decoding")
    view = Table(
        "requests", "batch", "service, images/s", "library, images/s", "library, CPU ms", *names,
        title=f"service over library, {COMPARED} clients: medians and spread",
    )  # fmt: skip
    for form, rounds in by_form.items():
        found = ratios(rounds)
        spreads = [
            f"{statistics.median(found[name]):.2f} ({min(found[name]):.2f}-{max(found[name]):.2f})" for name in names
        ]
        view.add_row(
            form,
            f"{statistics.median(one.service.batch for one in rounds):.1f}",
            f"{statistics.median(one.service.rate for one in rounds):.1f}",
            f"{statistics.median(one.library.rate for one in rounds):.1f}",
            f"{statistics.median(one.library.cpu_ms for one in rounds):.1f}",
            *spreads,
        )
    return view


@click.command(help="Print the service's throughput, latency and event loop under load, beside the library alone.")
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True, help="Rounds of the comparison.")
@click.option("--seconds", type=click.FloatRange(1), default=6.0, show_default=True, help="Of one load.")
@click.option("--form", "forms", multiple=True, type=click.Choice(FORMS), default=FORMS, help="All by default.")
@click.option("--clients", "clients", multiple=True, type=click.IntRange(1), default=CLIENTS, show_default=True)
@click.option("--max-batch", type=click.IntRange(1), default=Settings().max_batch, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@subject_options
def main(
    subject: Subject,
    runs: int,
    seconds: float,
    forms: tuple[str, ...],
    clients: tuple[int, ...],
    max_batch: int,
    json_file: Path | None,
) -> None:
    rows, by_form = [], {}
    with (
        subject.server(max_batch=max_batch, max_queue=4 * max(clients), timeout_ms=120_000) as server,
        in_process_of_its_own() as callers,
        in_process_of_its_own() as library,
        in_process_of_its_own() as bystander,
    ):
        processes = Processes(callers, library, bystander)
        for form in forms:
            wires = requests_of(subject, server.url, form)
            rows += [measure(server, processes, form, wires, number, seconds) for number in clients]
        for form in forms:
            by_form[form] = compare(server, processes, subject, form, runs, seconds)
    console = Console(width=150)
    console.print(table_of_loads(rows, f"{subject.model}, {seconds:g} s a row, one worker, one torch thread"))
    console.print(table_of_ratios(by_form))
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    if json_file is not None:
        figures = {"loads": [asdict(row) for row in rows],
                   "rounds": {form: [asdict(one) for one in rounds] for form, rounds in by_form.items()}}  # fmt: skip
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
