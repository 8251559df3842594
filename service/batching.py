"""Many requests -> one device batch, each item with its own options. Knows neither HTTP nor torch.

Why not `@bentoml.api(batchable=True)`: docs/service.md. The device works in one thread of its own; while it is busy
items queue up, and whatever has queued (of one group, up to its capacity) is its next batch. A caller whose time is
up, or who has left, is answered at once; what the device still does for it is for the device to end (`wanted`).
"""

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service import logs, metrics, tracing

Job = TypeVar("Job")
Result = TypeVar("Result")
Wanted = Callable[[], list[bool]]  # for each job of a batch, whether somebody still waits for it; from any thread

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The queue holds as many items as it may."""


class DeadlineError(Exception):
    """The item's deadline passed before its result was there."""


@dataclass(eq=False)
class _Entry(Generic[Job, Result]):
    job: Job
    lane: metrics.Lane
    deadline: float  # on the loop's clock
    queued: float
    result: asyncio.Future[Result]
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # of its request
    taken: bool = False  # into a batch: the device has begun it, or is about to
    left: threading.Event = field(default_factory=threading.Event)  # nobody waits; the device's thread asks


class Batcher(Generic[Job, Result]):
    """`run(jobs, wanted)` answers one result a job, in order, on `executor`; None where it gave up one not wanted.

    Jobs of one batch share `group(job)`, which returns (kind, ...): the kind labels the metrics, beside the model
    and version. `capacity(job)` is how many of its group fit in one batch. A batch that raises, or answers too few
    or too many results, is run again one by one, so that only the job at fault fails; one that raises `OutOfMemory`
    is halved once, as all of its jobs are at fault together.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job], Wanted], Sequence[Result | None]],
        group: Callable[[Job], tuple[str, Hashable]],
        executor: Executor,
        *,
        capacity: Callable[[Job], int],
        max_queue: int,
        max_delay: float = 0.0,
        out_of_memory: type[Exception] = MemoryError,
        model: str = "",
        version: str = "",
    ) -> None:
        self._run, self._group, self._executor = run, group, executor
        self._capacity, self._max_queue, self._max_delay = capacity, max_queue, max_delay
        self._out_of_memory = out_of_memory
        self._model, self._version = model, version
        self._lanes: dict[str, metrics.Lane] = {}  # by kind
        self._queue: deque[_Entry[Job, Result]] = deque()
        self._filled = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Jobs that the device has not begun."""
        return len(self._queue)

    async def submit(self, job: Job, deadline: float) -> Result:
        """The job's result. Raises QueueFullError at once, DeadlineError on time, or what `run` raised for this job.

        Cancelling the caller withdraws the job; if the device has not begun it, it is never computed, and if it has,
        its `wanted` says so.
        """
        loop = asyncio.get_running_loop()
        if len(self._queue) >= self._max_queue:
            raise QueueFullError
        if self._worker is None or self._worker.done():
            # It works for every caller, and so in the context of none.
            self._worker = loop.create_task(self._work(), context=contextvars.Context())
        entry = _Entry(job, self._lane(self._group(job)[0]), deadline, loop.time(), loop.create_future())
        self._queue.append(entry)
        entry.lane.queue_depth.inc()
        self._filled.set()
        try:
            async with asyncio.timeout_at(deadline):
                result: Result = await entry.result
                return result
        except TimeoutError:
            self._withdraw(entry, "expired")
            raise DeadlineError from None
        except asyncio.CancelledError:
            self._withdraw(entry, "cancelled")
            raise

    def _lane(self, kind: str) -> metrics.Lane:
        lane = self._lanes.get(kind)
        if lane is None:
            lane = self._lanes[kind] = metrics.Lane(self._model, self._version, kind)
        return lane

    def _withdraw(self, entry: _Entry[Job, Result], reason: str) -> None:
        """Take back what nobody waits for any more: it would fill the queue. Where the device has it, let it know.

        The reason is what ended the wait, not what the clock says: a timer may fire a rounding before its time.
        """
        entry.left.set()
        if entry.taken:
            return
        entry.lane.dropped[reason].inc()
        self._trace_wait(entry, reason)
        if entry in self._queue:
            self._queue.remove(entry)
            entry.lane.queue_depth.dec()

    def _trace_wait(self, entry: _Entry[Job, Result], dropped: str = "") -> None:
        seconds = asyncio.get_running_loop().time() - entry.queued
        tracing.queued(entry.context, seconds, self._model, self._version, self._group(entry.job)[0], dropped)

    async def close(self) -> None:
        """Stop the worker; jobs still waiting are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for entry in self._queue:
            entry.result.cancel()
            entry.lane.queue_depth.dec()
        self._queue.clear()

    async def _work(self) -> None:
        while True:
            await self._filled.wait()
            if self._max_delay and self._queue and len(self._queue) < self._capacity(self._queue[0].job):
                await asyncio.sleep(self._max_delay)
            batch = self._take()
            if batch:
                await self._answer(batch)

    def _take(self) -> list[_Entry[Job, Result]]:
        """The oldest entry and its group's next ones, in order; entries nobody waits for, or whose time is up, go."""
        now = asyncio.get_running_loop().time()
        batch: list[_Entry[Job, Result]] = []
        group, room = None, 0
        others: deque[_Entry[Job, Result]] = deque()
        for entry in self._queue:
            if entry.result.done() or entry.deadline <= now:
                entry.lane.queue_depth.dec()  # counted as dropped where its wait ends
                continue
            if not batch or (len(batch) < room and self._group(entry.job) == group):
                if not batch:
                    group, room = self._group(entry.job), self._capacity(entry.job)
                entry.taken = True
                entry.lane.queue_depth.dec()
                batch.append(entry)
            else:
                others.append(entry)
        self._queue = others
        if not others:
            self._filled.clear()
        return batch

    async def _answer(self, batch: list[_Entry[Job, Result]]) -> None:
        for entry in batch:
            entry.lane.queue_seconds.observe(asyncio.get_running_loop().time() - entry.queued)
            self._trace_wait(entry)
        await self._compute(batch, may_halve=True)

    async def _compute(self, batch: Sequence[_Entry[Job, Result]], *, may_halve: bool) -> None:
        """Run the entries somebody still waits for, and give each its result or its own error."""
        batch = [entry for entry in batch if not entry.result.done()]
        if not batch:
            return
        context = logs.together([entry.context for entry in batch])
        try:
            results = await self._on_device(batch, context)
        except self._out_of_memory as error:
            context.run(log.warning, "A batch of %d had no memory%s.", len(batch), "; halved" if may_halve else "")
            batch[0].lane.out_of_memory.inc()
            if not may_halve:
                _fail(batch, error)
                return
            middle = (len(batch) + 1) // 2
            for half in (batch[:middle], batch[middle:]):
                await self._compute(half, may_halve=False)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            context.run(log.warning, "A batch of %d failed (%r); its items run one by one.", len(batch), error)
            for entry in batch:
                await self._compute([entry], may_halve=may_halve)
        else:
            for entry, result in zip(batch, results, strict=True):
                if result is None:
                    entry.lane.dropped["interrupted"].inc()
                elif not entry.result.done():
                    entry.result.set_result(result)

    async def _on_device(
        self, batch: Sequence[_Entry[Job, Result]], context: contextvars.Context
    ) -> Sequence[Result | None]:
        jobs, lane, kind = [entry.job for entry in batch], batch[0].lane, self._group(batch[0].job)[0]

        def wanted() -> list[bool]:
            return [not entry.left.is_set() for entry in batch]

        def timed() -> Sequence[Result | None]:
            start = time.perf_counter()
            with tracing.device([entry.context for entry in batch], self._model, self._version, kind):
                results = self._run(jobs, wanted)
            lane.device_seconds.observe(time.perf_counter() - start)
            lane.batch_images.observe(len(jobs))
            return results

        results = await asyncio.get_running_loop().run_in_executor(self._executor, context.run, timed)
        if len(results) != len(jobs):
            raise RuntimeError(f"The device answered {len(results)} results for {len(jobs)} items.")
        if any(result is None and wants for result, wants in zip(results, wanted(), strict=True)):
            raise RuntimeError("The device gave up an item that somebody waits for.")
        return results


def _fail(batch: Sequence[_Entry[Job, Result]], error: Exception) -> None:
    for entry in batch:
        if not entry.result.done():
            entry.result.set_exception(error)
