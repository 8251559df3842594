"""A replica of the service as queues: what load it carries and how long its answers take. Measures nothing itself.

Requests arrive at random, pass the event loop, a thread that decodes, the device, a thread that renders, and the loop
again. The device takes whatever has queued up, to a bound, as its next call (bulk service); predictions and maps have
a device thread each. All threads share the replica's cores evenly. More admitted than the bound: refused (429).
Simulated event by event; tests/benchmarks/test_queueing.py holds it against the closed forms that exist.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Times = np.ndarray[Any, np.dtype[np.float64]]

WARM_UP = 0.1  # of the requests of a load: not counted, the queues have to fill first
SEARCH_STEPS = 12  # of highest_rate: the interval is then a 4096th of the capacity


@dataclass(frozen=True)
class Lane:
    """What one request of a kind costs, in seconds with a core to itself.

    `calls[b - 1]` is one device call of b images; the most it takes is len(calls). `loop` is the event loop's part,
    half of it before the image is admitted and half with its answer. `travel` costs no core: network, handing over.
    """

    calls: tuple[float, ...]
    decode: float = 0.0
    render: float = 0.0
    loop: float = 0.0
    travel: float = 0.0

    def __post_init__(self) -> None:
        if not self.calls or min(self.calls) <= 0 or min(self.decode, self.render, self.loop, self.travel) < 0:
            raise ValueError(f"{self}: expected at least one call, calls above 0 and no other time below.")

    @property
    def least_call(self) -> float:
        """Device seconds an image, where the batch is the one at which they are least."""
        return min(seconds / images for images, seconds in enumerate(self.calls, 1))

    @property
    def beside(self) -> float:
        """Seconds of a core that a request needs beside the device."""
        return self.decode + self.render + self.loop


@dataclass(frozen=True)
class Replica:
    """One worker: its lanes, and what they share.

    `device_on_cores`: the device is the cores themselves; False for a GPU, whose calls then cost the cores nothing.
    `variation` is the coefficient of variation of every piece of work (gamma distributed; 0: always the same).
    """

    lanes: tuple[Lane, ...]
    cores: float = math.inf
    decoders: int = 2
    max_queue: int = 256
    device_on_cores: bool = True
    variation: float = 0.0

    def __post_init__(self) -> None:
        if not self.lanes or self.cores <= 0 or self.decoders < 1 or self.max_queue < 1 or self.variation < 0:
            raise ValueError(f"{self}: expected a lane, cores above 0, at least one decoder and one place, variation.")


@dataclass(frozen=True)
class Figures:
    """What a load does. Rates a second, latencies in seconds of those answered, means over time.

    `refused` is a share of the requests; `waiting` images for a device, `admitted` in all; `busy` is the share of
    time in which the busiest lane's device thread had a call.
    """

    rate: float
    answered: float
    refused: float
    mean: float
    p50: float
    p95: float
    p99: float
    batch: float
    waiting: float
    admitted: float
    busy: float


def linear_calls(first: float, more: float, most: int) -> tuple[float, ...]:
    """Device calls of 1, 2, ... `most` images: `first` seconds for one, `more` for each further one."""
    return tuple(first + more * images for images in range(most))


def interpolated(measured: dict[int, float], most: int) -> tuple[float, ...]:
    """Device calls of every size from those measured; straight lines in between. 1 and `most` must be among them."""
    if not {1, most} <= measured.keys():
        raise ValueError(f"Calls of {sorted(measured)} images were measured; expected 1 and {most} among them.")
    sizes = sorted(measured)
    return tuple(float(s) for s in np.interp(range(1, most + 1), sizes, [measured[size] for size in sizes]))


def poisson(rate: float, count: int, seed: int) -> Times:
    """`count` times at which requests arrive, `rate` a second, independently of each other."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def capacity(replica: Replica, shares: Sequence[float] = (1.0,)) -> float:
    """Requests a second that the replica can answer at most, batches full; `shares` of the lanes add up to one.

    The least of what the cores, the decoders, the loop and each lane's device thread allow: reached with one core, or
    with more than the threads need; in between a thread that is needed all the time has to share, and it is less.
    """
    mix = list(zip(replica.lanes, shares, strict=True))
    on_cores = sum(share * (lane.beside + (lane.least_call if replica.device_on_cores else 0.0)) for lane, share in mix)
    busiest = max(
        on_cores / replica.cores,
        sum(share * lane.decode for lane, share in mix) / replica.decoders,
        sum(share * lane.loop for lane, share in mix),
        *(share * lane.least_call for lane, share in mix),
    )
    return 1 / busiest


def at_rate(
    replica: Replica, rate: float, shares: Sequence[float] = (1.0,), *, count: int = 20_000, seed: int = 0
) -> Figures:
    """What `rate` requests a second do in the long run; with one seed always the same."""
    drawn = np.random.default_rng((seed, 1)).choice(len(shares), count, p=np.asarray(shares))
    return simulate(replica, poisson(rate, count, seed), drawn.tolist(), seed=seed, warm_up=WARM_UP)


def highest_rate(
    replica: Replica, p99: float, shares: Sequence[float] = (1.0,), *, count: int = 20_000, seed: int = 0
) -> float:
    """Requests a second at which 99 in a hundred are answered within `p99` seconds and at most 1 in 1000 is refused.

    0 where not even a lone request is. Every rate is tried with the same random numbers.
    """
    low, high = 0.0, capacity(replica, shares)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        found = at_rate(replica, middle, shares, count=count, seed=seed)
        low, high = (middle, high) if found.p99 <= p99 and found.refused <= 0.001 else (low, middle)
    return low


def on_gpu(replica: Replica, calls: Sequence[tuple[float, ...]]) -> Replica:
    """The same replica with a device beside its cores; `calls` of each lane."""
    lanes = tuple(replace(lane, calls=own) for lane, own in zip(replica.lanes, calls, strict=True))
    return replace(replica, lanes=lanes, device_on_cores=False)


@dataclass(eq=False, slots=True)
class _Task:
    """Work under way in a thread: seconds left with a core to itself, and what follows."""

    left: float
    on_cores: bool
    then: Callable[[], None]


class _Cores:
    """All that runs at the moment, and the clock."""

    def __init__(self, cores: float) -> None:
        self.now = 0.0
        self._cores = cores
        self._tasks: list[_Task] = []

    def run(self, seconds: float, then: Callable[[], None], *, on_cores: bool = True) -> None:
        if seconds > 0:
            self._tasks.append(_Task(seconds, on_cores, then))
        else:
            then()

    def advance(self, until: float) -> bool:
        """To the next end of a task, or to `until` where that is earlier (then True)."""
        sharing = sum(task.on_cores for task in self._tasks)
        speed = min(1.0, self._cores / sharing) if sharing else 1.0
        first: _Task | None = None
        step = until - self.now
        for task in self._tasks:
            needs = task.left / speed if task.on_cores else task.left
            if needs < step:
                first, step = task, needs
        for task in self._tasks:
            task.left -= step * speed if task.on_cores else step
        if first is None:
            self.now = until
            return True
        self.now += step
        self._tasks.remove(first)
        first.then()
        return False

    @property
    def idle(self) -> bool:
        return not self._tasks


class _Threads:
    """A pool of threads with one queue, first come, first served."""

    def __init__(self, cores: _Cores, number: float) -> None:
        self._cores, self._free = cores, number
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()

    def run(self, seconds: float, then: Callable[[], None]) -> None:
        self._queue.append((seconds, then))
        self._next()

    def _next(self) -> None:
        if not self._queue or self._free < 1:
            return
        seconds, then = self._queue.popleft()
        self._free -= 1

        def done() -> None:
            self._free += 1
            then()
            self._next()

        self._cores.run(seconds, done)


class _Device:
    """One lane's device thread: whatever has queued, up to its bound, is its next call."""

    def __init__(self, cores: _Cores, replica: Replica, lane: Lane, varied: Callable[[float], float]) -> None:
        self._cores, self._calls, self._varied = cores, lane.calls, varied
        self._on_cores = replica.device_on_cores
        self.waiting: deque[Callable[[], None]] = deque()
        self.busy = False
        self.number, self.images = 0, 0

    def take(self, then: Callable[[], None]) -> None:
        self.waiting.append(then)
        self._next()

    def _next(self) -> None:
        if self.busy or not self.waiting:
            return
        batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), len(self._calls)))]
        self.busy = True
        self.number, self.images = self.number + 1, self.images + len(batch)

        def done() -> None:
            self.busy = False
            self._next()  # the device begins again before its last answers are made
            for then in batch:
                then()

        self._cores.run(self._varied(self._calls[len(batch) - 1]), done, on_cores=self._on_cores)


def simulate(
    replica: Replica, arrivals: Times, lanes: Sequence[int] | None = None, *, seed: int = 0, warm_up: float = 0.0
) -> Figures:
    """What becomes of requests that arrive at `arrivals` (n,), seconds in ascending order.

    `lanes` (n,) says whose each is, the first lane's by default; `warm_up` is the share of them left out of the
    latencies. Raises ValueError where there is nothing to count.
    """
    if not len(arrivals):
        raise ValueError("Expected at least one arrival, found none.")
    random = np.random.default_rng((seed, 2))
    shape = 1 / replica.variation**2 if replica.variation else 0.0

    def varied(seconds: float) -> float:
        return seconds * float(random.gamma(shape, 1 / shape)) if shape else seconds

    cores = _Cores(replica.cores)
    loop, decoders = _Threads(cores, 1), _Threads(cores, replica.decoders)
    devices = [_Device(cores, replica, lane, varied) for lane in replica.lanes]
    admitted, refused = 0, 0
    finished = np.full(len(arrivals), np.nan)

    def arrive(turn: int) -> None:
        lane_number = lanes[turn] if lanes is not None else 0
        lane, device = replica.lanes[lane_number], devices[lane_number]

        def admit() -> None:
            nonlocal admitted, refused
            if admitted >= replica.max_queue:
                refused += 1
                return
            admitted += 1
            decoders.run(varied(lane.decode), lambda: device.take(render))

        def render() -> None:
            cores.run(varied(lane.render), lambda: loop.run(varied(lane.loop / 2), answer))

        def answer() -> None:
            nonlocal admitted
            admitted -= 1
            finished[turn] = cores.now + lane.travel

        loop.run(varied(lane.loop / 2), admit)

    turn, end = 0, float(arrivals[-1])
    waiting = held = 0.0
    busy = [0.0] * len(devices)
    while turn < len(arrivals) or not cores.idle:
        before = cores.now
        state = sum(len(device.waiting) for device in devices), admitted, [device.busy for device in devices]
        due = float(arrivals[turn]) if turn < len(arrivals) else math.inf
        arrived = cores.advance(due)
        if before < end:
            step = cores.now - before
            waiting, held = waiting + step * state[0], held + step * state[1]
            busy = [so_far + step * now for so_far, now in zip(busy, state[2], strict=True)]
        if arrived:
            arrive(turn)
            turn += 1
    counted = slice(int(warm_up * len(arrivals)), None)
    seconds = (finished - arrivals)[counted]
    seconds = seconds[~np.isnan(seconds)]
    if not len(seconds):
        raise ValueError(f"All {len(arrivals)} requests were refused: there is no latency to tell.")
    p50, p95, p99 = (float(value) for value in np.percentile(seconds, (50, 95, 99)))
    calls = sum(device.number for device in devices)
    return Figures(
        rate=len(arrivals) / end,
        answered=(len(arrivals) - refused) / cores.now,
        refused=refused / len(arrivals),
        mean=float(seconds.mean()),
        p50=p50,
        p95=p95,
        p99=p99,
        batch=sum(device.images for device in devices) / calls,
        waiting=waiting / end,
        admitted=held / end,
        busy=max(busy) / end,
    )
