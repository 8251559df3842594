"""service/batching.py: batch-mates are independent, and nothing nobody waits for is computed."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching import Batcher, DeadlineError, QueueFullError, Wanted
from tests.service.conftest import counted

FOREVER = 1e9


@dataclass
class Device:
    """Doubles integers; 'bad' ones raise. While `gate` is closed it is busy."""

    batches: list[list[int]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    wrong_length: bool = False
    memory: int = 100  # the largest batch it has memory for

    def run(self, jobs: Sequence[int], wanted: Wanted) -> list[int]:
        self.batches.append(list(jobs))
        self.gate.wait()
        if len(jobs) > self.memory:
            raise MemoryError
        if any(job < 0 for job in jobs):
            raise ValueError(f"bad {min(jobs)}")
        doubled = [2 * job for job in jobs]
        return doubled[:-1] if self.wrong_length else doubled


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def device(executor: ThreadPoolExecutor) -> Iterator[Device]:
    """Its gate is opened at the end, or a failed test would wait for the executor for ever."""
    made = Device()
    yield made
    made.gate.set()


def batcher(device: Device, executor: ThreadPoolExecutor, **options: Any) -> Batcher[int, int]:
    return Batcher(
        device.run,
        lambda job: ("kind", abs(job) // 1000),
        executor,
        **{"capacity": lambda job: 4, "max_queue": 100, **options},
    )


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(scenario())  # type: ignore[arg-type]


async def busy(batcher: Batcher[int, int], device: Device) -> asyncio.Task[int]:
    """A first job on the device, so that what follows queues up."""
    first = asyncio.ensure_future(batcher.submit(0, FOREVER))
    while not device.batches:
        await asyncio.sleep(0.001)
    return first


def test_what_queued_while_the_device_was_busy_is_the_next_batch(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        others = [asyncio.ensure_future(queue.submit(i, FOREVER)) for i in range(1, 7)]
        await asyncio.sleep(0)
        device.gate.set()
        assert await asyncio.gather(first, *others) == [2 * i for i in range(7)]
        assert device.batches == [[0], [1, 2, 3, 4], [5, 6]]
        await queue.close()

    run(scenario)


def test_groups_do_not_mix_and_none_starves(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        jobs = [1, 1001, 2, 1002, 3]
        others = [asyncio.ensure_future(queue.submit(job, FOREVER)) for job in jobs]
        await asyncio.sleep(0)
        device.gate.set()
        assert await asyncio.gather(first, *others) == [0] + [2 * job for job in jobs]
        assert device.batches == [[0], [1, 2, 3], [1001, 1002]]
        await queue.close()

    run(scenario)


def test_a_bad_job_fails_alone(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        others = [asyncio.ensure_future(queue.submit(job, FOREVER)) for job in (1, -7, 3)]
        await asyncio.sleep(0)
        device.gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert [results[0], results[1], results[3]] == [0, 2, 6]
        assert repr(results[2]) == "ValueError('bad -7')"
        await queue.close()

    run(scenario)


def test_a_wrong_number_of_results_is_never_handed_out(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        device.wrong_length = True
        device.gate.set()
        queue = batcher(device, executor)
        results = await asyncio.gather(*(queue.submit(i, FOREVER) for i in range(3)), return_exceptions=True)
        assert all("results for 1 items" in str(result) for result in results)
        await queue.close()

    run(scenario)


def test_the_queue_is_bounded(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor, max_queue=2)
        first = await busy(queue, device)
        waiting = [asyncio.ensure_future(queue.submit(i, FOREVER)) for i in (1, 2)]
        await asyncio.sleep(0)
        third = asyncio.ensure_future(queue.submit(3, FOREVER))
        await asyncio.sleep(0)
        assert isinstance(third.exception(), QueueFullError)
        device.gate.set()
        assert await asyncio.gather(first, *waiting) == [0, 2, 4]
        await queue.close()

    run(scenario)


def test_cancelled_jobs_are_not_computed(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        others = [asyncio.ensure_future(queue.submit(i, FOREVER)) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        others[1].cancel()
        await asyncio.sleep(0)
        device.gate.set()
        assert await asyncio.gather(first, others[0], others[2]) == [0, 2, 6]
        assert device.batches == [[0], [1, 3]]
        await queue.close()

    run(scenario)


def test_expired_jobs_are_answered_on_time_and_not_computed(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        with pytest.raises(DeadlineError):  # while the device is still busy
            await queue.submit(1, asyncio.get_running_loop().time() + 0.01)
        device.gate.set()
        assert await asyncio.gather(first, queue.submit(2, FOREVER)) == [0, 4]
        assert device.batches == [[0], [2]]
        await queue.close()

    run(scenario)


@pytest.mark.parametrize("early", [0.0, 0.05])
def test_what_was_dropped_is_counted_by_what_ended_its_wait(
    executor: ThreadPoolExecutor, device: Device, early: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a timer fires before its time, as uvloop's does by a rounding: late is not the same as left."""
    timeout_at = asyncio.timeout_at

    async def scenario() -> None:
        b = batcher(device, executor)
        running = await busy(b, device)
        now = asyncio.get_running_loop().time()
        with monkeypatch.context() as patched:
            patched.setattr("service.batching.asyncio.timeout_at", lambda deadline: timeout_at(deadline - early))
            late = [asyncio.create_task(b.submit(job, now + 0.1)) for job in (1, 2, 3)]
            left = [asyncio.create_task(b.submit(job, FOREVER)) for job in (4, 5)]
            assert [type(error) for error in await asyncio.gather(*late, return_exceptions=True)] == [DeadlineError] * 3
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        device.gate.set()
        assert await running == 0
        await b.close()

    before = {reason: dropped(reason) for reason in ("expired", "cancelled")}
    run(scenario)
    assert {reason: dropped(reason) - count for reason, count in before.items()} == {"expired": 3, "cancelled": 2}
    assert device.batches == [[0]]


def dropped(reason: str) -> float:
    return counted("parchgrad_dropped_total", kind="kind", reason=reason)


def test_cancelling_a_job_on_the_device_leaves_its_mates(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        first.cancel()
        other = asyncio.ensure_future(queue.submit(1, FOREVER))
        await asyncio.sleep(0)
        device.gate.set()
        assert await other == 2
        await queue.close()

    run(scenario)


def test_the_loop_runs_while_the_device_works(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not first.done()
        device.gate.set()
        assert await first == 0
        await queue.close()

    run(scenario)


@pytest.mark.parametrize(
    ("memory", "batches"),
    [(3, [[1, 2, 3, 4], [1, 2], [3, 4]]), (1, [[1, 2, 3, 4], [1, 2], [3, 4]])],
    ids=["a half fits", "no half fits"],
)
def test_a_batch_without_memory_is_halved_once(
    executor: ThreadPoolExecutor, device: Device, memory: int, batches: list[list[int]]
) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        first = await busy(queue, device)
        others = [asyncio.ensure_future(queue.submit(i, FOREVER)) for i in range(1, 5)]
        await asyncio.sleep(0)
        device.memory = memory
        device.gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        if memory >= 2:
            assert results == [0, 2, 4, 6, 8]
        else:
            assert results[0] == 0
            assert {type(result) for result in results[1:]} == {MemoryError}
        assert device.batches[1:] == batches
        device.memory = 100
        assert await queue.submit(5, FOREVER) == 10  # and afterwards all is well
        await queue.close()

    run(scenario)


def test_a_single_job_without_memory_is_tried_once_more(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        device.memory = 0
        device.gate.set()
        with pytest.raises(MemoryError):
            await queue.submit(1, FOREVER)
        assert device.batches == [[1], [1]]
        await queue.close()

    run(scenario)


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_callers_who_left_take_no_place(executor: ThreadPoolExecutor, device: Device, end: str) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor, max_queue=3)
        first = await busy(queue, device)
        soon = asyncio.get_running_loop().time() + 0.01
        left = [asyncio.ensure_future(queue.submit(i, soon if end == "expire" else FOREVER)) for i in range(1, 4)]
        await asyncio.sleep(0.02)
        if end == "cancel":
            for task in left:
                task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        others = [asyncio.ensure_future(queue.submit(i, FOREVER)) for i in range(4, 7)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await queue.submit(7, FOREVER)
        device.gate.set()
        assert await asyncio.gather(first, *others) == [0, 8, 10, 12]
        assert device.batches == [[0], [4, 5, 6]]
        await queue.close()

    run(scenario)


def test_a_queue_that_all_have_left_while_it_filled_goes_on(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor, max_delay=0.01)
        device.gate.set()
        left = asyncio.ensure_future(queue.submit(1, FOREVER))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await asyncio.sleep(0.03)
        assert await queue.submit(2, FOREVER) == 4
        await queue.close()

    run(scenario)


def test_closing_cancels_what_waits(executor: ThreadPoolExecutor, device: Device) -> None:
    async def scenario() -> None:
        queue = batcher(device, executor)
        await busy(queue, device)
        waiting = asyncio.ensure_future(queue.submit(1, FOREVER))
        await asyncio.sleep(0)
        device.gate.set()
        await queue.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario)


class Walker:
    """Doubles integers in ten passes, between which it asks who still waits; held in the third one while `gate` is
    closed. `gives_up`: a job it leaves off although somebody waits."""

    def __init__(self, gives_up: int | None = None) -> None:
        self.gate, self.held = threading.Event(), threading.Event()
        self.passes: list[list[int]] = []
        self._gives_up = gives_up

    def run(self, jobs: Sequence[int], wanted: Wanted) -> list[int | None]:
        still = list(jobs)
        for number in range(10):
            still = [job for job, is_wanted in zip(jobs, wanted(), strict=True) if is_wanted]
            if not still:
                break
            self.passes.append(still)
            if number == 2:
                self.held.set()
                self.gate.wait()
        return [2 * job if job in still and job != self._gives_up else None for job in jobs]


@pytest.mark.parametrize("end", ["cancel", "expire"])
@pytest.mark.parametrize("mates", [[], [2], [2, 3]], ids=["alone", "one mate", "two mates"])
def test_the_device_is_told_who_left_and_the_others_get_their_own(
    executor: ThreadPoolExecutor, end: str, mates: list[int]
) -> None:
    device = Walker()

    async def scenario() -> None:
        queue: Batcher[int, int] = Batcher(
            device.run, lambda job: ("kind", 0), executor, capacity=lambda job: 4, max_queue=100
        )
        soon = asyncio.get_running_loop().time() + 0.1
        left = asyncio.ensure_future(queue.submit(1, soon if end == "expire" else FOREVER))
        others = [asyncio.ensure_future(queue.submit(job, FOREVER)) for job in mates]
        while not device.held.is_set():
            await asyncio.sleep(0.001)
        if end == "cancel":
            left.cancel()
        with pytest.raises(DeadlineError if end == "expire" else asyncio.CancelledError):  # while the device works
            await left
        device.gate.set()
        assert await asyncio.gather(*others) == [2 * job for job in mates]
        assert await queue.submit(7, FOREVER) == 14
        await queue.close()

    before = {reason: dropped(reason) for reason in ("expired", "cancelled", "interrupted")}
    try:
        run(scenario)
    finally:
        device.gate.set()
    assert device.passes == [[1, *mates]] * 3 + [mates] * (7 if mates else 0) + [[7]] * 10
    counts = {reason: dropped(reason) - count for reason, count in before.items()}
    assert counts == {"expired": 0, "cancelled": 0, "interrupted": 1}


def test_giving_up_what_somebody_waits_for_is_an_error_of_its_own(executor: ThreadPoolExecutor) -> None:
    async def scenario() -> None:
        device = Walker(gives_up=2)
        device.gate.set()
        queue: Batcher[int, int] = Batcher(
            device.run, lambda job: ("kind", 0), executor, capacity=lambda job: 4, max_queue=100
        )
        soon = asyncio.get_running_loop().time() + 10
        results = await asyncio.gather(*(queue.submit(i, soon) for i in (1, 2, 3)), return_exceptions=True)
        assert [results[0], results[2]] == [2, 6]
        assert "gave up an item that somebody waits for" in str(results[1])
        await queue.close()

    run(scenario)


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(-3, 2999), st.sampled_from(["wait", "cancel", "expire"])), min_size=1, max_size=40
    )
)
def test_every_caller_gets_exactly_its_own(jobs: list[tuple[int, str]]) -> None:
    """Whatever mixes in the queue: the good ones get their own result, the others their own end."""

    async def scenario() -> None:
        device = Device()
        with ThreadPoolExecutor(1) as executor:
            queue = batcher(device, executor)
            first = await busy(queue, device)
            now = asyncio.get_running_loop().time()
            tasks = [
                asyncio.ensure_future(queue.submit(job, now - 1 if end == "expire" else FOREVER)) for job, end in jobs
            ]
            await asyncio.sleep(0)
            for task, (_, end) in zip(tasks, jobs, strict=True):
                if end == "cancel":
                    task.cancel()
            await asyncio.sleep(0)
            device.gate.set()
            results = await asyncio.gather(first, *tasks, return_exceptions=True)
            for (job, end), result in zip(jobs, results[1:], strict=True):
                if end == "cancel":
                    assert isinstance(result, asyncio.CancelledError)
                elif end == "expire":
                    assert isinstance(result, DeadlineError)
                elif job < 0:
                    assert repr(result) == f"ValueError('bad {job}')"
                else:
                    assert result == 2 * job
            computed = [job for batch in device.batches[1:] for job in batch]
            for job, end in jobs:
                if end != "wait" and (job, "wait") not in jobs:
                    assert job not in computed
            await queue.close()

    run(scenario)
