"""A map of many passes ends at the next one, once its time is up or its caller has left; its mates notice nothing."""

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from parchgrad.options import Options
from service.engine import Explained, Job, Result, Room
from service.errors import ServiceError
from service.pipeline import Outcome
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.service.conftest import Home, counted, picture, png
from tests.service.test_batch_mates import Bench, Device

PIXELS = 20_000  # of a pass: four points of the model's 64 x 64
LONG = {"method": "smoothgrad", "samples": "40"}  # ten passes
STOP = 3  # the pass in which the wait for it ends


class Passes:
    """Counts the passes of an engine's explanations, by their images; holds the one numbered STOP until `go`."""

    def __init__(self, engine: TorchEngine, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.held, self.go = threading.Event(), threading.Event()
        runtime = engine.explainer._runtime

        def counting(call):  # type: ignore[no-untyped-def]
            def counted(images, targets, plan):  # type: ignore[no-untyped-def]
                self.sizes.append(len(images))
                if len(self.sizes) == STOP:
                    self.held.set()
                    assert self.go.wait(60)
                return call(images, targets, plan)

            return counted

        for name in ("gradients", "sums"):
            patch.setattr(runtime, name, counting(getattr(runtime, name)))


@pytest.fixture
def engine(home: Home) -> TorchEngine:
    kept = {name: value for name, value in home.settings.items() if name != "threads"}
    return TorchEngine(Settings(**kept, max_batch_pixels=PIXELS), "tiny", "1")  # type: ignore[arg-type]


def job(engine: TorchEngine, number: int, samples: int, target: int = 1) -> Job:
    options = Options(method="smoothgrad", samples=samples, quantile=0.3)
    return Job(engine.model.preprocessing.array(picture(number))[0], Explained(target, options, "mean_abs"))


def equal(one: Result | None, other: Result | None) -> None:
    assert one is not None
    assert other is not None
    assert one.saliency is not None
    assert other.saliency is not None
    norm = np.linalg.norm(other.saliency)
    assert np.linalg.norm(one.saliency - other.saliency) <= 1e-4 * norm  # sums in another order
    assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_a_job_nobody_waits_for_costs_no_more_passes(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three jobs of ten points in passes of four; the second is given up after the first pass."""
    jobs = [job(engine, number, 10, target=number) for number in range(3)]
    alone = [engine.run([one])[0] for one in jobs]
    passes = Passes(engine, monkeypatch)
    passes.go.set()
    results = engine.run(jobs, lambda: [True, not passes.sizes, True])
    assert passes.sizes == [4, 4, 4, 4, 4]
    assert results[1] is None
    equal(results[0], alone[0])
    equal(results[2], alone[2])
    passes.sizes.clear()
    assert engine.run(jobs, lambda: [len(passes.sizes) < 2] * 3) == [None] * 3
    assert passes.sizes == [4, 4]
    passes.sizes.clear()
    for one, other in zip(engine.run(jobs, lambda: [True] * 3), alone, strict=True):
        equal(one, other)
    assert sum(passes.sizes) == 30


def test_a_pass_has_no_more_pixels_than_a_batch(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bound for the memory of all methods: MAX_BATCH_PIXELS, down to one point; and no more than the library's."""
    passes = Passes(engine, monkeypatch)
    passes.go.set()
    engine.run([job(engine, 0, 9)])
    assert passes.sizes == [4, 4, 1]
    passes.sizes.clear()
    engine._room = Room(32, 64)
    engine.run([job(engine, 0, 9)])
    assert passes.sizes == [1] * 9
    passes.sizes.clear()
    engine._room = Room(32, 20_000_000)
    engine.run([job(engine, 0, 250)])
    assert passes.sizes == [196, 54]


# --- from the request to the pass ------------------------------------------------------------------------------


@pytest.fixture
def bench(home: Home) -> Iterator[Bench]:
    """The pipeline with its own device, in this process."""
    made = Bench(home, Device("none"), max_batch_pixels=PIXELS)
    yield made
    made.close()


@pytest.fixture
def passes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    """Let go at the end, or a failed test would wait for the map thread for ever."""
    made = Passes(bench.pipeline.repository.listing()[0].engine, monkeypatch)
    yield made
    made.go.set()


def interrupted() -> float:
    return counted("parchgrad_dropped_total", reason="interrupted")


async def held(passes: Passes, asked: "asyncio.Future[Outcome | ServiceError]") -> None:
    while not passes.held.is_set():
        assert not asked.done(), asked.result()
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("end", ["its time is up", "its caller leaves", "it waits"])
def test_a_long_map_ends_at_the_next_pass(bench: Bench, passes: Passes, end: str) -> None:
    before = interrupted()

    async def scenario() -> list[Outcome | ServiceError | BaseException]:
        timeout = {"explain_timeout_ms": "2000"} if end == "its time is up" else {}
        long = asyncio.ensure_future(bench.ask(png(picture(1)), **LONG, **timeout))
        await held(passes, long)
        behind = asyncio.ensure_future(bench.ask(png(picture(2))))
        if end == "its time is up":
            await long  # answered while its pass runs
        elif end == "its caller leaves":
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
        passes.go.set()
        return await asyncio.gather(long, behind, return_exceptions=True)

    long, behind = bench.runner.run(scenario())
    assert isinstance(behind, Outcome)
    assert behind.missing is None
    if end == "it waits":
        assert isinstance(long, Outcome)
        assert long.missing is None
        assert passes.sizes == [4] * 10 + [1]
        assert interrupted() == before
        return
    assert passes.sizes == [4] * STOP + [1]  # then the one behind it
    assert interrupted() == before + 1
    if end == "its time is up":
        assert isinstance(long, Outcome)
        assert long.missing is not None
        assert long.missing.status == "timeout"
        assert long.first.saliency is None
    else:
        assert isinstance(long, asyncio.CancelledError)
