"""The saturation curve of one replica beside a queueing model of it: `python -m benchmarks.saturation`.

The service on a core of its own, the callers on another (Linux, two cores at least). In every round: CPU time of
device calls of 1, 2, ... images and of all that is beside them, by thread; the most it answers; then requests that
arrive at random at shares of the capacity. The model (queueing.py) gets the costs of that same run and the very
arrivals that were sent. Latencies count from when a request was due.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from rich.console import Console

from benchmarks.load_clients import Load, at_times, closed_loop, in_process_of_its_own, percentile, wire
from benchmarks.queueing import Times, capacity, interpolated, poisson, simulate
from benchmarks.saturation_report import Costs, Point, Saturation, draw, table_of_costs, table_of_points
from benchmarks.served import Counters, Subject, Usage, multipart, subject_options
from service.engine import Job, Room
from service.settings import Settings
from tests.service.serving import Server

KINDS = ("predict", "explain")
FRACTIONS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
GATHER_MS = 250  # how long the device of the calibrated server waits for a batch of the size wanted
FULL = 4  # times the batch's bound: clients that keep the service full
LEAST = 32  # requests of one load
LEAST_CALLS = 4  # device calls of one calibration
LATE = 0.02  # seconds that the callers were late in one of 100 requests: above it a load is sent again
MOST_TRIES = 2  # the one with the more punctual callers counts
GATHERED = 0.9  # of the size wanted: a mean batch below is no measurement of that size


@dataclass(frozen=True)
class Target:
    """A running server, and one kind of request to send it."""

    server: Server
    kind: str
    wires: list[bytes]


@dataclass(frozen=True)
class Calibration:
    """CPU seconds of one kind of request: device calls by their size, and a request's parts when the service is full.

    `render` is wall-clock time of a lone request; `rest` decoding and rendering; `device` an image's share of the
    calls, whose mean size is `batch`; `highest` requests a second; `lone` from request to
    answer when there is no other.
    """

    calls: dict[int, float]
    render: float
    rest: float
    loop: float
    device: float
    batch: float
    highest: float
    lone: float


@dataclass(frozen=True)
class Sent:
    """Requests sent at `arrivals`, a share of the model's capacity, the mean batch meanwhile, and the share of the
    service's core that other processes had."""

    fraction: float
    arrivals: Times
    load: Load
    batch: float
    others: float

    @property
    def late(self) -> float:
        """Seconds, of the 99th percentile."""
        return float(np.percentile([reply.late for reply in self.load.replies], 99))


@contextmanager
def kept_to(cores: set[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, on `cores` only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def most_in_a_call(subject: Subject, settings: Settings) -> int:
    """How many of the subject's pictures the service puts into one device call."""
    shapes = {tuple(tensor.shape) for tensor in subject.tensors()}
    return min(Room(settings.max_batch, settings.batch_pixels).capacity(Job(np.empty(shape))) for shape in shapes)


def thread_times(server: Server) -> Usage:
    """As Usage.of, to the nanosecond by the scheduler's own clock: a few calls are less than psutil's hundredths."""
    (worker,) = server.workers()
    tasks = Path(f"/proc/{worker.pid}/task").iterdir()
    spent = {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}
    return Usage(spent, worker.pid)


def requests_of(subject: Subject, server: Server, kind: str) -> list[bytes]:
    return [wire(multipart(server.url, kind, [data])) for data in subject.files()]


def sizes(most: int) -> list[int]:
    """Batches that are measured: all up to 8, then powers of two, and the largest."""
    return sorted({*range(1, min(most, 8) + 1), *(2**power for power in range(4, 13) if 2**power < most), most})


def call_seconds(target: Target, clients: ProcessPoolExecutor, images: int, seconds: float) -> tuple[float, float]:
    """CPU seconds of one device call of `images`, and wall-clock seconds of rendering one answer.

    Raises RuntimeError where the batches did not come together.
    """
    counters, usage = Counters.of(target.server), thread_times(target.server)
    load: Load = clients.submit(
        closed_loop, target.server.url, target.wires, images, seconds, LEAST_CALLS * images
    ).result()
    used, counted = thread_times(target.server).since(usage), Counters.of(target.server).since(counters)
    _require(load, {200})
    mean = counted.mean("parchgrad_batch_images", kind=target.kind)
    if mean < GATHERED * images:
        raise RuntimeError(
            f"{target.kind}: batches of {images} were wanted, the mean was {mean:.2f}; decoding is slow."
        )
    number = counted.total("parchgrad_batch_images_count", kind=target.kind)
    return used.device / number * images / mean, counted.mean("parchgrad_render_seconds")


def calibrate(gathering: Target, plain: Target, clients: ProcessPoolExecutor, most: int, seconds: float) -> Calibration:
    """`seconds` for each size of a call, and four times as many for the full service."""
    calls = {
        images: call_seconds(plain if images == 1 else gathering, clients, images, seconds) for images in sizes(most)
    }
    lone: Load = clients.submit(closed_loop, plain.server.url, plain.wires, 1, seconds, LEAST_CALLS).result()
    _require(lone, {200})
    counters, usage = Counters.of(plain.server), thread_times(plain.server)
    held = FULL * most
    full: Load = clients.submit(
        closed_loop, plain.server.url, plain.wires, held, 4 * seconds, LEAST_CALLS * held
    ).result()
    used, counted = thread_times(plain.server).since(usage), Counters.of(plain.server).since(counters)
    _require(full, {200})
    number = len(full.replies)
    return Calibration(
        calls={images: cost for images, (cost, _) in calls.items()},
        render=calls[1][1],
        rest=(used.total - used.loop - used.device) / number,
        loop=used.loop / number,
        device=used.device / number,
        batch=counted.mean("parchgrad_batch_images", kind=plain.kind),
        highest=full.rate(held),
        lone=percentile(lone.replies, 50),
    )


def send(plain: Target, clients: ProcessPoolExecutor, core: int, fraction: float, arrivals: Times) -> Sent:
    """One load; where the callers were late it says nothing of the service and is sent again."""
    tries = list[Sent]()
    while len(tries) < MOST_TRIES and (not tries or tries[-1].late > LATE):
        counters, usage, busy = Counters.of(plain.server), thread_times(plain.server), _busy(core)
        load: Load = clients.submit(at_times, plain.server.url, plain.wires, arrivals.tolist()).result()
        own, all_of_it = thread_times(plain.server).since(usage).total, _busy(core) - busy
        _require(load, {200, 429})
        batch = Counters.of(plain.server).since(counters).mean("parchgrad_batch_images", kind=plain.kind)
        tries.append(Sent(fraction, arrivals, load, batch, max(0.0, all_of_it - own) / load.wall))
    return min(tries, key=lambda one: one.late)


def _busy(core: int) -> float:
    """Seconds since the machine started in which a core had work."""
    times = psutil.cpu_times(percpu=True)[core]
    return float(sum(times[:-2]) - times.idle - getattr(times, "iowait", 0.0))  # the last two are among the first


def _require(load: Load, right: set[int]) -> None:
    if not set(load.statuses()) <= right:
        raise RuntimeError(f"Expected only statuses {sorted(right)}, found {load.statuses()}.")


def costs_of(rounds: Sequence[Calibration], most: int) -> Costs:
    """Medians over the rounds."""
    calls = interpolated({size: statistics.median(one.calls[size] for one in rounds) for size in sizes(most)}, most)
    render = statistics.median(one.render for one in rounds)
    rest = statistics.median(one.rest for one in rounds)
    loop = statistics.median(one.loop for one in rounds)
    lone = statistics.median(one.lone for one in rounds)
    got = statistics.median(one.highest * (one.rest + one.loop + one.device) for one in rounds)
    full = [one.device / float(np.interp(one.batch, range(1, most + 1), calls)) * one.batch for one in rounds]
    return Costs(
        calls=tuple(1000 * seconds for seconds in calls),
        decode=1000 * max(0.0, rest - render),
        render=1000 * min(render, rest),
        loop=1000 * loop,
        travel=1000 * max(0.0, lone - calls[0] - rest - loop),
        cores=min(got, 1.0),
        call_when_full=statistics.median(full),
        highest=statistics.median(one.highest for one in rounds),
    )


def point_of(kind: str, sent: Sent, run: Saturation) -> Point:
    """One load, and what the model makes of its arrivals. Raises RuntimeError where no request was answered."""
    answered = [reply.late + reply.seconds for reply in sent.load.with_status(200)]
    if not answered:
        raise RuntimeError(f"{kind} at {sent.fraction:g} of the capacity: no request was answered.")
    return Point(
        kind=kind,
        fraction=sent.fraction,
        rate=len(sent.arrivals) / float(sent.arrivals[-1]),
        p50=float(np.percentile(answered, 50)),
        p99=float(np.percentile(answered, 99)),
        batch=sent.batch,
        refused=len(sent.load.with_status(429)) / len(sent.load.replies),
        late=sent.late,
        others=sent.others,
        client_ms=1000 * sent.load.cpu / len(sent.load.replies),
        model=simulate(run.replica(kind), sent.arrivals),
    )


@click.command(help="Print what one replica does under random arrivals, beside what a queueing model says of it.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=12.0, show_default=True, help="Of one load.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS, help="Both by default.")
@click.option(
    "--load", "fractions", multiple=True, type=click.FloatRange(0.01, 3), default=FRACTIONS, help="Of the capacity."
)
@click.option("--max-queue", type=click.IntRange(16), default=64, show_default=True)
@click.option("--service-core", type=click.IntRange(0), help="The machine's last by default; callers have the others.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the arrivals.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="A .svg or .png file.")
@subject_options
def main(
    subject: Subject,
    rounds: int,
    seconds: float,
    kinds: tuple[str, ...],
    fractions: tuple[float, ...],
    max_queue: int,
    service_core: int | None,
    seed: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    core = max(allowed, default=0) if service_core is None else service_core
    callers = allowed - {core}
    if core not in allowed or not callers:
        raise click.UsageError(f"Needs Linux and two cores, one of them {core}; found {sorted(allowed)}.")
    settings = Settings()
    most = most_in_a_call(subject, settings)
    # A map that is left out when the queue is long would be another request than the one measured.
    own: dict[str, object] = {"max_queue": max_queue, "shed_above": max_queue, "timeout_ms": 120_000}
    gather = {**own, "max_queue": max(max_queue, FULL * most), "max_delay_ms": GATHER_MS}
    random = np.random.default_rng(seed)
    costs: dict[str, Costs] = {}
    loads: dict[str, list[Sent]] = {}
    with (
        kept_to({core}),
        subject.server(**gather) as first,
        subject.server(**own) as second,
        kept_to(callers),
        in_process_of_its_own(callers) as clients,
    ):
        for kind in kinds:
            gathering, plain = (Target(server, kind, requests_of(subject, server, kind)) for server in (first, second))
            calibrate(gathering, plain, clients, most, seconds / 16)  # warms up
            found: list[Calibration] = []
            loads[kind] = []
            for _ in range(rounds):
                found.append(calibrate(gathering, plain, clients, most, seconds / 8))
                run = Saturation("", settings.decode_workers, max_queue, {kind: costs_of(found[:1], most)}, [])
                highest = capacity(run.replica())
                for fraction in random.permutation(fractions).tolist():
                    rate = fraction * highest
                    arrivals = poisson(rate, max(LEAST, round(rate * seconds)), int(random.integers(2**32)))
                    loads[kind].append(send(plain, clients, core, fraction, arrivals))
            costs[kind] = costs_of(found, most)
    machine = f"{subject.model}, one core, one worker, torch {torch.__version__}, {rounds} rounds, {seconds:g} s a load"
    run = Saturation(machine, settings.decode_workers, max_queue, costs, [])
    points = [point_of(kind, sent, run) for kind, all_sent in loads.items() for sent in all_sent]
    run = replace(run, points=points)
    console = Console(width=170)
    console.print(table_of_costs(run))
    console.print(table_of_points(run))
    console.print(machine)
    if json_file is not None:
        run.save(json_file)
    if picture is not None:
        draw(run, picture)


if __name__ == "__main__":
    main()
