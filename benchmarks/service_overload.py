"""Three times the load the service can carry: `python -m benchmarks.service_overload`.

One worker, one torch thread. First its capacity: as many clients as the queue holds, each asking again as soon as it
is answered. Then requests that arrive three times as fast, whether or not earlier ones were answered, and a request by
itself before and a second after. The queue must stay bounded, what it cannot hold must be refused at once and told when
to come again, and what it holds must not wait longer than at capacity. For /explain the service leaves maps out first.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.load_clients import Load, Reply, closed_loop, in_process_of_its_own, open_loop, percentile, wire
from benchmarks.served import Counters, Subject, multipart, subject_options
from tests.service.serving import Server

KINDS = ("predict", "explain")
TIMES_CAPACITY = 3.0
NORMAL_REQUESTS = 8
LEAST = 3  # requests a client, when the capacity is measured
STATUS_OF_MAPS = ("ok", "skipped", "shed", "timeout")
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Watched:
    """The most that was seen while it was watched: images admitted, images in the queue, bytes of memory."""

    admitted: float
    queued: float
    resident: int
    resident_before: int


@dataclass(frozen=True)
class Overload:
    """A burst; seconds. `alone` are the medians of a few requests by themselves, before and a second after."""

    capacity: float
    p99_at_capacity: float
    arrivals: float
    statuses: dict[int, int]
    maps: dict[str, int]
    p99_admitted: float
    p99_refused: float | None
    refused_without_retry_after: int
    watched_at_capacity: Watched
    watched: Watched
    alone_before: float
    alone_after: float


def requests_of(subject: Subject, url: str, kind: str) -> list[bytes]:
    fields = {"saliency": "none", "selection": "instance"} if kind == "explain" else {}
    return [wire(multipart(url, kind, [data], data=fields)) for data in subject.files()]


def alone(server: Server, clients: ProcessPoolExecutor, wires: Sequence[bytes]) -> float:
    """Median seconds of a request when there is no other."""
    load: Load = clients.submit(closed_loop, server.url, wires, 1, 0.0, NORMAL_REQUESTS).result()
    return statistics.median(reply.seconds for reply in load.replies)


def maps_in(replies: Sequence[Reply]) -> dict[str, int]:
    """How many answers of one image each say which status of its map."""
    found = [json.loads(reply.body)["results"][0].get("explanation", {}).get("status") for reply in replies]
    return {status: found.count(status) for status in STATUS_OF_MAPS if status in found}


@contextmanager
def watching(server: Server) -> Iterator[list[Watched]]:
    """Fills the list with one entry when the block is left."""
    over, seen = threading.Event(), list[tuple[float, float, int]]()
    before = server.resident_bytes()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            counters = Counters.of(server)
            held = (counters.total(f"parchgrad_{name}_images") for name in ("admitted", "queue_depth"))
            seen.append((*held, server.resident_bytes()))  # type: ignore[arg-type]

    thread, found = threading.Thread(target=watch), list[Watched]()
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    admitted, queued, resident = (max(values) for values in zip(*seen, strict=True))
    found.append(Watched(admitted, queued, int(resident), before))


def overload(
    server: Server, clients: ProcessPoolExecutor, wires: Sequence[bytes], held: int, seconds: float
) -> Overload:
    """`held` clients for `seconds`, then arrivals at TIMES_CAPACITY for as long. Raises RuntimeError on other statuses.

    `held` is how many requests the service admits and answers in full.
    """
    warm: Load = clients.submit(closed_loop, server.url, wires, held, seconds / 2, held).result()
    before = alone(server, clients, wires)
    with watching(server) as at_capacity:
        full: Load = clients.submit(closed_loop, server.url, wires, held, seconds, LEAST * held).result()
    capacity = full.rate(held)
    arrivals = TIMES_CAPACITY * capacity
    with watching(server) as watched:
        burst: Load = clients.submit(open_loop, server.url, wires, arrivals, round(arrivals * seconds)).result()
    time.sleep(1)
    after = alone(server, clients, wires)
    for load, right in ((warm, {200}), (full, {200}), (burst, {200, 429})):
        if not set(load.statuses()) <= right:
            raise RuntimeError(f"Expected only statuses {sorted(right)}, found {load.statuses()}.")
    refused, admitted = burst.with_status(429), burst.with_status(200)
    return Overload(
        capacity=capacity,
        p99_at_capacity=percentile(full.replies, 99),
        arrivals=arrivals,
        statuses=burst.statuses(),
        maps=maps_in(admitted),
        p99_admitted=percentile(admitted, 99),
        p99_refused=percentile(refused, 99) if refused else None,
        refused_without_retry_after=sum(reply.retry_after is None for reply in refused),
        watched_at_capacity=at_capacity[0],
        watched=watched[0],
        alone_before=before,
        alone_after=after,
    )


def lines(one: Overload) -> list[tuple[str, str]]:
    """The table's rows: what, and its figure."""
    refused = "none" if one.p99_refused is None else f"{1000 * one.p99_refused:.0f}"
    return [
        ("capacity, requests/s", f"{one.capacity:.1f}"),
        ("arrivals/s", f"{one.arrivals:.1f}"),
        ("statuses", f"{one.statuses}"),
        ("status of the maps", f"{one.maps}"),
        ("most images admitted", f"{one.watched.admitted:.0f}"),
        ("most images in the queue", f"{one.watched.queued:.0f}"),
        ("p99 of a 429, ms", refused),
        ("429 without Retry-After", f"{one.refused_without_retry_after}"),
        ("p99 at capacity, ms", f"{1000 * one.p99_at_capacity:.0f}"),
        ("p99 of the admitted, ms", f"{1000 * one.p99_admitted:.0f}"),
        ("a request alone, before, ms", f"{1000 * one.alone_before:.0f}"),
        ("a request alone, 1 s after, ms", f"{1000 * one.alone_after:.0f}"),
        ("most resident at capacity, MiB", f"{one.watched_at_capacity.resident / 2**20:.0f}"),
        ("most resident in the burst, MiB", f"{one.watched.resident / 2**20:.0f}"),
    ]


@click.command(help="Print what becomes of requests that come three times as fast as they can be answered.")
@click.option("--max-queue", type=click.IntRange(16), default=64, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="Of the burst.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
@subject_options
def main(subject: Subject, max_queue: int, seconds: float, json_file: Path | None) -> None:
    found = {}
    with subject.server(max_queue=max_queue) as server, in_process_of_its_own() as clients:
        for kind in KINDS:
            held = max_queue if kind == "predict" else max_queue // 2  # above that maps are left out
            found[kind] = overload(server, clients, requests_of(subject, server.url, kind), held, seconds)
    title = f"{subject.model}: {TIMES_CAPACITY:g} x capacity for {seconds:g} s, queue {max_queue}"
    view = Table("figure", *found, title=title)
    for row in zip(*(lines(one) for one in found.values()), strict=True):
        view.add_row(row[0][0], *(text for _, text in row))
    Console(width=100).print(view)
    if json_file is not None:
        figures = {kind: asdict(one) for kind, one in found.items()}
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
