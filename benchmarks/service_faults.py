"""What faults of the running service cost its callers: answers lost, and seconds until all is as before.

Run: python -m benchmarks.service_faults [--models-dir … --tables-dir … --model …]
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise

import click
import httpx

from benchmarks.served import Counters, Subject, subject_options
from tests.service.serving import Server

CALLERS = 6
PAUSE = 0.02  # seconds that a caller who found nobody waits before it asks again
STEADY = 20  # answers before a fault and after it
LAGS = (0.06, 0.25, 1.0)  # seconds, buckets of the metric
ADMIN = "benchmark"  # the key of the operator, here of nobody else


@dataclass
class Calls:
    """What the callers got: moments and statuses of the answers, moments of connections lost."""

    answers: list[tuple[float, int]] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def wait_for(self, more: int) -> None:
        enough = len(self.answers) + more
        while len(self.answers) < enough:
            time.sleep(0.01)

    def longest_silence(self) -> float:
        """Seconds between two answers with status 200."""
        moments = sorted(moment for moment, status in self.answers if status == 200)
        return max(later - earlier for earlier, later in pairwise(moments))

    def __str__(self) -> str:
        statuses = Counter(status for _, status in self.answers)
        return f"{dict(sorted(statuses.items()))}, {len(self.lost)} connections lost"


@contextmanager
def calling(server: Server, image: bytes) -> Iterator[Calls]:
    """Maps asked for without end by CALLERS threads, each call on a connection of its own; told to wait, they do."""
    calls, over = Calls(), threading.Event()

    def call() -> None:
        with httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not over.is_set():
                try:
                    answer = client.post(f"{server.url}/explain", files={"image": image})
                    calls.answers.append((time.perf_counter(), answer.status_code))
                    time.sleep(int(answer.headers.get("Retry-After", 0)))
                except httpx.TransportError:
                    calls.lost.append(time.perf_counter())
                    time.sleep(PAUSE)

    with ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(call) for _ in range(CALLERS)]
        try:
            yield calls
        finally:
            over.set()
        for caller in callers:
            caller.result()


def worker_killed(subject: Subject, image: bytes, workers: int) -> str:
    with subject.server(workers=workers) as server:
        wait_for_workers(server, workers)
        with calling(server, image) as calls:
            calls.wait_for(STEADY)
            worker = server.workers()[0]
            start = time.perf_counter()
            worker.kill()
            worker.wait()
            wait_for_workers(server, workers)
            seconds = time.perf_counter() - start
            calls.wait_for(STEADY)
        return f"{calls}; longest silence {calls.longest_silence():.2f} s; all ready again after {seconds:.2f} s"


def wait_for_workers(server: Server, count: int) -> None:
    while True:
        try:
            if len(server.workers()) == count and server.metric("parchgrad_ready_workers") == count:
                return
        except httpx.TransportError:  # there may be no worker at all
            pass
        time.sleep(0.02)


def terminated(subject: Subject, image: bytes) -> str:
    with subject.server(workers=2, drain_ms=1000) as server:
        wait_for_workers(server, 2)
        with calling(server, image) as calls:
            calls.wait_for(STEADY)
            start = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/readyz").status_code == 200:
                time.sleep(0.001)
            unready = time.perf_counter() - start
            status = server.process.wait()
            ended = time.perf_counter() - start
        last = max(moment for moment, _ in calls.answers) - start
        early = sum(moment < start + 1 for moment in calls.lost)
        statuses = dict(Counter(status for _, status in calls.answers))
        return (
            f"{statuses}, {early} connections lost while it drained; not ready after {unready:.3f} s, "
            f"last answer at {last:.2f} s, exit status {status} at {ended:.2f} s"
        )


def reloaded(subject: Subject, image: bytes) -> str:
    with (
        subject.server(admin_keys=f"benchmark:{sha256(ADMIN.encode()).hexdigest()}") as server,
        calling(server, image) as calls,
    ):
        calls.wait_for(STEADY)
        before, start = Counters.of(server), time.perf_counter()
        url = f"/v2/repository/models/{subject.model}/load"
        answer = server.client.post(url, headers={"Authorization": f"Bearer {ADMIN}"})
        seconds = time.perf_counter() - start
        during = Counters.of(server).since(before)
        calls.wait_for(STEADY)
        lags = ", ".join(f"{during.above('parchgrad_loop_lag_seconds', bound)} above {bound:g} s" for bound in LAGS)
        return f"{calls}; load answered {answer.status_code} after {seconds:.2f} s; event loop late: {lags}"


@click.command()
@subject_options
def main(subject: Subject) -> None:
    """Faults under load, and what the callers saw."""
    image = subject.files()[0]
    for name, line in (
        ("one of 2 workers killed", lambda: worker_killed(subject, image, 2)),
        ("the only worker killed", lambda: worker_killed(subject, image, 1)),
        ("SIGTERM, 2 workers, drain 1 s", lambda: terminated(subject, image)),
        ("model loaded again", lambda: reloaded(subject, image)),
    ):
        click.echo(f"{name:32}{line()}")


if __name__ == "__main__":
    main()
