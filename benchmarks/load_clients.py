"""Callers of a running service: requests made into bytes beforehand, sent over kept connections.

They share the machine with the service, so they must cost little, and run in a process of their own that says what
it cost. Only what they measure is here; what to send and what to make of it is the benchmark's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from urllib.parse import urlsplit

import httpx
import numpy as np

LOST, HUNG_UP = 0, -1  # instead of a status: the connection closed before the answer; the caller closed it
PATIENCE = 0.02  # seconds that a caller who hangs up waits before


@dataclass(frozen=True)
class Request:
    """Bytes to send, which statuses are right, and after how many bytes the caller hangs up (None: never)."""

    name: str
    content: bytes
    right: frozenset[int]
    hang_up_after: int | None = None


@dataclass(frozen=True)
class Reply:
    """What came of one request; `sent` counts seconds from the start of the load, on the callers' clock.

    `late` says how long after its time it was sent, where it had one.
    """

    sent: float
    seconds: float
    status: int
    retry_after: str | None
    body: bytes
    late: float = 0.0

    @property
    def finished(self) -> float:
        return self.sent + self.seconds


@dataclass(frozen=True)
class Load:
    """All replies, by the time they were finished; seconds of wall clock and of the callers' CPU."""

    replies: list[Reply]
    wall: float
    cpu: float

    def with_status(self, *statuses: int) -> list[Reply]:
        return [reply for reply in self.replies if reply.status in statuses]

    def statuses(self) -> dict[int, int]:
        return {status: len(self.with_status(status)) for status in sorted({one.status for one in self.replies})}

    def rate(self, clients: int) -> float:
        """Replies a second while all clients were busy: after as many as there are clients, until the last was asked.

        Batches are answered together, so both ends are the end of a batch.
        """
        until = max(reply.sent for reply in self.replies)
        steady = [reply.finished for reply in self.replies if reply.finished <= until][clients - 1 :]
        if len(steady) < 2 or steady[-1] <= steady[0]:
            raise ValueError(f"{len(self.replies)} replies to {clients} clients are too few for a rate.")
        return (len(steady) - 1) / (steady[-1] - steady[0])


def percentile(replies: Sequence[Reply], percent: float) -> float:
    """Of the seconds from request to reply."""
    return float(np.percentile([reply.seconds for reply in replies], percent))


def wire(request: httpx.Request) -> bytes:
    """A request as it goes over the connection."""
    body = request.read()
    lines = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1".encode()]
    lines += [name + b": " + value for name, value in request.headers.raw]
    return b"\r\n".join([*lines, b"", body])


class Connection:
    """One connection, opened when it is needed, and again when the server has closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, begun: float) -> Reply:
        """Send and wait; a reply with the status LOST when the connection closes first."""
        sent = time.perf_counter()
        try:
            status, retry_after, body = await self._exchange(request)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            status, retry_after, body = LOST, None, b""
        return Reply(sent - begun, time.perf_counter() - sent, status, retry_after, body)

    async def hang_up(self, request: bytes, begun: float) -> Reply:
        """Send, wait a moment, and close the connection without looking at the answer."""
        sent = time.perf_counter()
        self.close()
        _, writer = await asyncio.open_connection(*self._address)
        writer.write(request)
        await asyncio.sleep(PATIENCE)
        writer.close()
        return Reply(sent - begun, time.perf_counter() - sent, HUNG_UP, None, b"")

    async def _exchange(self, request: bytes) -> tuple[int, str | None, bytes]:
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(head[0].split(" ")[1]), headers.get("retry-after"), body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def closed_loop(
    url: str, requests: Sequence[bytes], clients: int, seconds: float, least: int = 0, most: int = 1_000_000
) -> Load:
    """Each client asks again as soon as it has its reply, for `seconds`; between `least` and `most` requests in all."""

    async def run(begun: float) -> list[Reply]:
        turns, replies = iter(range(most)), list[Reply]()

        async def client() -> None:
            connection = Connection(url)
            for turn in turns:
                if turn >= least and time.perf_counter() - begun > seconds:
                    break
                replies.append(await connection.ask(requests[turn % len(requests)], begun))
            connection.close()

        await asyncio.gather(*(client() for _ in range(clients)))
        return replies

    return _measured(run)


def each_once(url: str, requests: Sequence[Request], clients: int) -> list[Reply]:
    """One reply a request, in their order; each client takes the next as soon as it is done with its last."""

    async def run() -> list[Reply]:
        begun, waiting = time.perf_counter(), iter(enumerate(requests))
        replies: dict[int, Reply] = {}

        async def client() -> None:
            connection = Connection(url)
            for number, request in waiting:
                if request.hang_up_after is None:
                    replies[number] = await connection.ask(request.content, begun)
                else:
                    replies[number] = await connection.hang_up(request.content[: request.hang_up_after], begun)
            connection.close()

        await asyncio.gather(*(client() for _ in range(clients)))
        return [replies[number] for number in range(len(requests))]

    return asyncio.run(run())


def open_loop(url: str, requests: Sequence[bytes], rate: float, count: int) -> Load:
    """`count` requests, `rate` a second at even steps, whether or not earlier ones were answered."""
    return at_times(url, requests, [turn / rate for turn in range(count)])


def at_times(url: str, requests: Sequence[bytes], times: Sequence[float]) -> Load:
    """A request at each of `times`, seconds from the start in ascending order, whatever became of earlier ones."""

    async def run(begun: float) -> list[Reply]:
        idle, replies = list[Connection](), list[Reply]()

        async def arrival(turn: int) -> None:
            connection = idle.pop() if idle else Connection(url)
            reply = await connection.ask(requests[turn % len(requests)], begun)
            replies.append(replace(reply, late=reply.sent - times[turn]))
            idle.append(connection)

        arrivals = []
        for turn, due in enumerate(times):
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            arrivals.append(asyncio.ensure_future(arrival(turn)))
        await asyncio.gather(*arrivals)
        for connection in idle:
            connection.close()
        return replies

    return _measured(run)


def lags(seconds: float, step: float = 0.01) -> list[float]:
    """How late a task wakes that sleeps `step` again and again in a process that does nothing else."""

    async def run() -> list[float]:
        late, end = [], time.perf_counter() + seconds
        while (now := time.perf_counter()) < end:
            await asyncio.sleep(step)
            late.append(time.perf_counter() - now - step)
        return late

    return asyncio.run(run())


def _measured(run: Callable[[float], Awaitable[list[Reply]]]) -> Load:
    async def main() -> Load:
        begun, cpu = time.perf_counter(), time.process_time()
        replies = await run(begun)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        return Load(sorted(replies, key=lambda reply: reply.finished), wall, cpu)

    return asyncio.run(main())


@contextmanager
def in_process_of_its_own(cores: set[int] | None = None) -> Iterator[ProcessPoolExecutor]:
    """An executor with one process, kept to `cores` (Linux) where they are given."""
    pin = (os.sched_setaffinity, (0, cores)) if cores else (None, ())
    with ProcessPoolExecutor(1, get_context("spawn"), *pin) as pool:
        yield pool
