"""service/watching.py: what is counted of answers, what is looked at afterwards, and that no answer knows of it."""

import asyncio
import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parchgrad.drift import LayerDrift
from parchgrad.evaluation.maps import agreement, figures
from service import metrics, watching
from service.class_labels import SEEN, ClassLabels
from service.engine import DeviceMemoryError, Job, Result
from service.errors import ServiceError
from service.onnx_engine import OnnxEngine
from service.pipeline import Origin, Outcome, Pipeline
from service.schemas import parse_options
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.service import graphs
from tests.service.conftest import COVERED, LABELS, Home, counted, picture, png

IMAGES = [png(picture(seed)) for seed in range(12)]
RESULTS = ("done", "skipped", "failed")


class Bench:
    """A pipeline in this process, on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.runner = asyncio.Runner()
        self.pipeline = self.runner.run(self._made(settings))
        self.watch = self.pipeline._explanations

    async def _made(self, settings: Settings) -> Pipeline:
        pipeline = Pipeline(settings)
        await pipeline.start()
        while not pipeline.ready:
            await asyncio.sleep(0.01)
        return pipeline

    def close(self) -> None:
        self.runner.run(self.pipeline.close())
        self.runner.close()

    async def ask(self, image: bytes, route: str = "explain", **fields: str) -> Outcome:
        kind: Any = route
        with self.pipeline.repository.use() as served:
            asked = parse_options({name: [value] for name, value in fields.items()}, 1, kind)
            arrival = asyncio.get_running_loop().time()
            requests = self.pipeline.check(
                served, [io.BytesIO(image)], asked, explain=route == "explain", draw=False, arrival=arrival
            )
            (outcome,) = await self.pipeline.run(served, requests, Origin("/explain", "test"))
        assert not isinstance(outcome, ServiceError), outcome
        return outcome

    def answered(self, image: bytes, route: str = "explain", **fields: str) -> Outcome:
        """The answer, once whatever looks at its image or map has ended."""

        async def both() -> Outcome:
            outcome = await self.ask(image, route, **fields)
            for task in (self.watch._task, self.watch._figures):
                if task is not None:
                    await task
            return outcome

        return self.runner.run(both())


@pytest.fixture
def bench(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    monkeypatch.setattr(watching, "REST", 0.0)
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        chosen: Any = {**home.settings, "self_test": False, "timeout_ms": 60_000, **options}
        made.append(Bench(Settings(**chosen)))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Counts:
    """How much metrics rose since this was made."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, tuple[tuple[str, str], ...]], float] = self._now()

    def _now(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in metrics.REGISTRY.collect()
            for sample in family.samples
        }

    def rise(self, name: str, **labels: str) -> float:
        return sum(
            value - self._before.get((found, of), 0.0)
            for (found, of), value in self._now().items()
            if found == name and labels.items() <= dict(of).items()
        )

    def watched(self) -> list[float]:
        return [self.rise("parchgrad_watched_total", result=result) for result in RESULTS]


def test_every_map_is_counted_once_with_its_own_figures(bench: Callable[..., Bench]) -> None:
    one, counts = bench(watch_rate=0), Counts()
    outcome = one.answered(IMAGES[0], target="3")
    saliency = outcome.first.saliency
    assert saliency is not None
    expected = figures(saliency)
    tiny = {"model": "tiny", "version": "1", "options": "default"}
    for name, value in (("gini", expected.gini), ("border_share", expected.border_share)):
        assert counts.rise(f"parchgrad_map_{name}_count", **tiny) == 1
        assert counts.rise(f"parchgrad_map_{name}_sum", **tiny) == pytest.approx(value)
    for axis, value in (("x", expected.x), ("y", expected.y)):
        assert counts.rise("parchgrad_map_centroid_sum", **tiny, axis=axis) == pytest.approx(value)
    assert counts.rise("parchgrad_map_identity_share_count", **tiny) == 1
    assert counts.rise("parchgrad_map_identity_share_sum") == pytest.approx(outcome.first.identity_layers / 26)
    assert counts.rise("parchgrad_predicted_total") == counts.rise("parchgrad_confidence_count") == 1
    top = float(outcome.first.probabilities.max())
    assert counts.rise("parchgrad_confidence_sum") == pytest.approx(top)

    counts = Counts()
    one.answered(IMAGES[0], target="3", quantile="0.3")
    one.answered(IMAGES[0], target="3", polarity="positive")
    assert counts.rise("parchgrad_map_gini_count", options="other") == 2
    assert counts.rise("parchgrad_map_gini_count", options="default") == 0

    counts = Counts()
    one.answered(IMAGES[0], target="3", rule="false")  # no map of the rule's
    one.answered(IMAGES[0], target=str(COVERED))  # no row, no map
    one.answered(IMAGES[0], "predict")
    assert counts.rise("parchgrad_map_gini_count") == 0
    assert counts.rise("parchgrad_predicted_total") == 3
    one.answered(IMAGES[0], target="top:3")
    found = counts.rise("parchgrad_map_gini_count")
    assert 1 <= found <= 3
    assert counts.rise("parchgrad_predicted_total") == 4  # an image, not a map


def test_the_identity_share_is_of_the_layers_asked_for(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two layers that the options name, one passed: a half."""
    run = TorchEngine._run

    def passing(engine: TorchEngine, jobs: Sequence[Job], wanted: Any) -> list[Result | None]:
        from dataclasses import replace

        return [one and replace(one, identity_layers=1) for one in run(engine, jobs, wanted)]

    monkeypatch.setattr(TorchEngine, "_run", passing)
    one, counts = bench(watch_rate=0), Counts()
    one.answered(IMAGES[0], target="3", layers="features.3.squeeze,features.4.squeeze")
    one.answered(IMAGES[0], target="3")
    assert counts.rise("parchgrad_map_identity_share_sum", options="other") == pytest.approx(1 / 2)
    assert counts.rise("parchgrad_map_identity_share_sum", options="default") == pytest.approx(1 / 26)


def test_each_image_is_looked_at_once_at_rate_one(bench: Callable[..., Bench]) -> None:
    one, counts = bench(watch_rate=1), Counts()
    explainer = one.pipeline.repository.listing()[0].engine
    layers = explainer.layer_names
    before = total(metrics.map_gradient_agreement), {name: total(metrics.activation_shift, name) for name in layers}
    outcome = one.answered(IMAGES[1], target="2")
    assert counts.watched() == [1, 0, 0]
    (plain,) = explainer.run([Job(outcome.prepared.tensor, watching.Explained(2, _plain(explainer), "mean_abs"))])
    assert plain is not None
    assert plain.saliency is not None
    assert outcome.first.saliency is not None
    alike = agreement(outcome.first.saliency, plain.saliency)
    assert counts.rise("parchgrad_map_gradient_agreement_count", model="tiny", version="1") == 1
    assert total(metrics.map_gradient_agreement) - before[0] == pytest.approx(alike, abs=1e-6)
    expected = explainer.drift(outcome.prepared.tensor, 2)
    assert len(expected) == 26
    for layer, drift in expected.items():
        assert counts.rise("parchgrad_activation_distance_count", layer=layer) == 1
        assert counts.rise("parchgrad_activation_distance_sum", layer=layer) == pytest.approx(drift.distance, rel=1e-6)
        rise = total(metrics.activation_shift, layer) - before[1][layer]
        assert rise == pytest.approx(drift.shift, abs=1e-6)
    mean = sum(drift.distance for drift in expected.values()) / 26
    assert counts.rise("parchgrad_class_activation_distance_count", class_label="other") == 1
    assert counts.rise("parchgrad_class_activation_distance_sum") == pytest.approx(mean, rel=1e-6)

    counts = Counts()  # of a prediction, or a map of other options, there is nothing to agree with
    one.answered(IMAGES[1], target="2", quantile="0.3")
    assert counts.watched() == [1, 0, 0]
    assert counts.rise("parchgrad_map_gradient_agreement_count") == 0
    assert counts.rise("parchgrad_activation_distance_count") == 26

    counts = Counts()
    one.answered(IMAGES[1], target=str(COVERED))  # the table has no row for this class
    assert counts.watched() == [0, 1, 0]
    assert counts.rise("parchgrad_activation_distance_count") == 0


def total(histogram: metrics.Histogram, *labels: str) -> float:
    """A sum that /metrics does not show outside of `bentoml serve`, as it may fall."""
    child: Any = histogram.labels("tiny", "1", *labels)
    return float(child._sum.get())


def _plain(engine: Any) -> Any:
    return engine.options({"rule": False})


def test_a_prediction_is_compared_in_its_own_class(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(TorchEngine, "drift", lambda engine, tensor, target: asked.append(target) or {})
    one = bench(watch_rate=1)
    expected = []
    for image in IMAGES[:4]:
        outcome = one.answered(image, "predict")
        predicted = int(outcome.first.probabilities.argmax())
        expected += [predicted] if predicted < COVERED else []
    assert asked == expected != []


def test_nothing_is_looked_at_at_rate_nought(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = TorchEngine.run

    def counting(engine: TorchEngine, jobs: Sequence[Job], wanted: Any = None) -> list[Result | None]:
        calls.append(len(jobs))
        return run(engine, jobs, wanted)

    monkeypatch.setattr(TorchEngine, "run", counting)
    monkeypatch.setattr(TorchEngine, "drift", lambda *_: pytest.fail("looked at"))
    one, counts = bench(watch_rate=0), Counts()
    for image in IMAGES[:3]:
        one.answered(image, target="1")
    assert calls == [1, 1, 1]
    assert counts.watched() == [0, 0, 0]
    assert one.watch._task is None


def test_the_share_looked_at_is_the_rate_and_no_images_own(bench: Callable[..., Bench]) -> None:
    """The same image again and again is drawn now and then: its content decides nothing."""
    one, counts = bench(watch_rate=0.5), Counts()
    for _ in range(60):
        one.answered(IMAGES[0], "predict")
    drawn = sum(counts.watched())
    assert 10 < drawn < 50  # outside once in a million


def test_it_is_skipped_where_images_wait_or_the_worker_drains(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "drift", lambda *_: pytest.fail("looked at"))
    one, counts = bench(watch_rate=1), Counts()
    served = one.pipeline.repository.listing()[0]
    with monkeypatch.context() as patch:
        patch.setattr(type(served), "waiting", 1)
        one.answered(IMAGES[0], target="1")
    assert counts.watched() == [0, 1, 0]
    one.pipeline.drain()
    one.answered(IMAGES[0], target="1")
    assert counts.watched() == [0, 2, 0]


def test_waiting_is_what_the_device_has_not_begun(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    run = TorchEngine._run
    monkeypatch.setattr(TorchEngine, "_run", lambda *given: gate.wait() and run(*given))
    one = bench(watch_rate=0, max_batch=1)

    async def three() -> None:
        served = one.pipeline.repository.listing()[0]
        assert not one.pipeline._busy()
        asking = [asyncio.ensure_future(one.ask(image, target="1")) for image in IMAGES[:3]]
        while served.waiting < 2:
            await asyncio.sleep(0.001)
        assert one.pipeline._busy()
        gate.set()
        await asyncio.gather(*asking)
        assert served.waiting == 0
        assert not one.pipeline._busy()

    one.runner.run(three())


def test_one_is_looked_at_at_a_time(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    looking: list[int] = []

    def drift(engine: TorchEngine, tensor: Any, target: int) -> dict[str, LayerDrift]:
        looking.append(target)
        gate.wait()
        return {}

    monkeypatch.setattr(TorchEngine, "drift", drift)
    one, counts = bench(watch_rate=1), Counts()

    async def two() -> None:
        await one.ask(IMAGES[0], "predict", top_k="1")
        while not looking:
            await asyncio.sleep(0.001)
        await one.ask(IMAGES[1], "predict")  # answered, though the first is being looked at
        gate.set()
        assert one.watch._task is not None
        await one.watch._task

    monkeypatch.setattr(one.watch, "_version", _all_rows(one.watch._version))
    one.runner.run(two())
    assert len(looking) == 1
    assert counts.watched() == [1, 1, 0]


def _all_rows(version: Any) -> Any:
    from dataclasses import replace

    return lambda served: replace(version(served), rows=frozenset(range(len(LABELS))))


def test_a_failure_is_counted_and_logged_once_and_no_answer_knows(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> Any:
        raise ValueError("no features today")

    monkeypatch.setattr(TorchEngine, "drift", failing)
    one, counts = bench(watch_rate=1), Counts()
    with caplog.at_level(logging.WARNING, "service.watching"):
        for image in IMAGES[:3]:
            assert one.answered(image, target="1").first.saliency is not None
    assert counts.watched() == [0, 0, 3]
    (record,) = caplog.records
    assert "could not be looked at" in record.message
    assert record.exc_info is not None
    assert "no features today" in str(record.exc_info[1])

    caplog.clear()
    monkeypatch.setattr(watching, "_observe_maps", failing)
    with caplog.at_level(logging.WARNING, "service.watching"):
        for image in IMAGES[:2]:
            assert one.answered(image, target="1").first.saliency is not None
    (record,) = caplog.records
    assert "figures of maps that were answered could not be observed" in record.message
    assert record.exc_info is not None


def test_what_there_was_no_memory_for_is_left_for_a_while(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    released: list[int] = []

    def failing(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("service.torch_engine._release_cached_memory", lambda: released.append(1))
    monkeypatch.setattr("parchgrad.explainer.Explainer.drift", failing)
    one, counts = bench(watch_rate=1), Counts()
    with pytest.raises(DeviceMemoryError):
        one.pipeline.repository.listing()[0].engine.drift(np.zeros((3, 224, 224), np.float32), 1)
    assert (len(tried), len(released)) == (1, 1)
    for image in IMAGES[:3]:
        one.answered(image, "predict")
    assert (len(tried), len(released)) == (2, 2)
    assert counts.watched() == [0, 2, 1]
    monkeypatch.setattr(watching, "NO_MEMORY_REST", 0.0)
    (served,) = one.pipeline.repository.listing()
    one.watch._resting[served] = 0.0
    one.answered(IMAGES[0], "predict")
    one.answered(IMAGES[0], "predict")
    assert len(tried) == 4


def test_drift_is_left_out_where_somebody_came_during_the_plain_gradient(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "drift", lambda *_: pytest.fail("callers wait"))
    one, counts = bench(watch_rate=1), Counts()
    asked = iter([False, True])
    monkeypatch.setattr(one.watch, "_busy", lambda: next(asked))
    one.answered(IMAGES[0], target="1")
    assert counts.watched() == [1, 0, 0]
    assert counts.rise("parchgrad_map_gradient_agreement_count") == 1


def test_the_figures_of_maps_are_computed_after_their_answer(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REST", 1e6)
    monkeypatch.setattr("service.engine.figures", lambda *_: pytest.fail("computed"))
    one = bench(watch_rate=0)
    for _ in range(2):
        one.runner.run(one.ask(IMAGES[0], target="1"))
    assert len(one.watch._maps) == 2


def test_maps_whose_figures_wait_are_bounded(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "REST", 1e6)
    one = bench(watch_rate=0)
    first = one.runner.run(one.ask(IMAGES[0], target="1")).first.saliency
    assert first is not None
    monkeypatch.setattr(watching, "MOST_PIXELS", 3 * first.size)
    with caplog.at_level(logging.WARNING, "service.watching"):
        for _ in range(5):
            one.runner.run(one.ask(IMAGES[0], target="1"))
    assert len(one.watch._maps) == 3
    (record,) = caplog.records
    assert "those of some are left out" in record.message


def test_answers_are_bit_identical_with_and_without(bench: Callable[..., Bench]) -> None:
    with_, without = bench(watch_rate=1), bench(watch_rate=0)
    for image in IMAGES[:4]:
        for fields in ({}, {"quantile": "0.2"}):
            mine, theirs = with_.answered(image, target="4", **fields), without.answered(image, target="4", **fields)
            assert np.array_equal(mine.first.logits, theirs.first.logits)
            assert mine.first.saliency is not None
            assert theirs.first.saliency is not None
            assert np.array_equal(mine.first.saliency, theirs.first.saliency)
        mine, theirs = with_.answered(image, "predict"), without.answered(image, "predict")
        assert np.array_equal(mine.first.probabilities, theirs.first.probabilities)


def test_a_version_that_is_being_looked_at_is_kept_and_retired_after(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = threading.Event(), threading.Event()

    def drift(*_: Any) -> dict[str, LayerDrift]:
        begun.set()
        gate.wait()
        return {}

    monkeypatch.setattr(TorchEngine, "drift", drift)
    one = bench(watch_rate=1)
    served = one.pipeline.repository.listing()[0]

    async def retired() -> None:
        await one.ask(IMAGES[0], target="1")
        while not begun.is_set():
            await asyncio.sleep(0.001)
        retiring = asyncio.ensure_future(served.retire())
        await asyncio.sleep(0.05)
        early = retiring.done()
        gate.set()
        await retiring
        assert not early

    one.runner.run(retired())


def test_stopping_waits_for_nothing_that_is_looked_at(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REST", 1e6)
    one, counts = bench(watch_rate=1), Counts()

    async def stopped() -> None:
        await one.ask(IMAGES[0], target="1")
        await one.pipeline.close()

    one.runner.run(stopped())
    assert counts.watched() == [0, 1, 0]


def test_absurd_tensors_do_not_decide_a_mean(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    far = {"a": LayerDrift(1e30, -1e30), "b": LayerDrift(float("nan"), float("nan")), "c": LayerDrift(1.0, 0.5)}
    monkeypatch.setattr(TorchEngine, "drift", lambda *_: far)
    one, counts = bench(watch_rate=1), Counts()
    one.answered(IMAGES[0], target="1")
    assert counts.rise("parchgrad_activation_distance_sum", layer="a") == watching.FARTHEST
    assert total(metrics.activation_shift, "a") == -watching.FARTHEST
    assert counts.rise("parchgrad_activation_distance_count", layer="b") == 0
    assert total(metrics.activation_distance, "b") == total(metrics.activation_shift, "b") == 0
    assert counts.rise("parchgrad_activation_distance_sum", layer="c") == 1.0
    assert counts.rise("parchgrad_class_activation_distance_count") == 0


def test_class_labels_are_a_closed_set() -> None:
    labels = ClassLabels(("cat", "dog", "cat", "other", *map(str, range(100))), 3)
    assert [labels.seen(1) for _ in range(10)] == ["other"] * 9 + ["dog"]
    assert {labels.of(1), labels.seen(1)} == {"dog"}
    for _ in range(10):
        labels.seen(2)
        labels.seen(3)
    assert (labels.of(2), labels.of(3), labels.of(0)) == ("cat (2)", "other (3)", "other")
    seen = {labels.seen(index) for index in range(104) for _ in range(50)}
    assert seen == {"other", "dog", "cat (2)", "other (3)"}
    none = ClassLabels(("cat",), 0)
    assert {none.seen(0) for _ in range(50)} == {"other"}


def test_workers_name_the_same_classes(tmp_path: Path) -> None:
    """Two workers, then one in the place of a dead one: all three have the same two labels."""
    names = tuple("abcdef")
    one, two = (ClassLabels(names, 2, "net/1", tmp_path) for _ in range(2))
    assert [one.seen(0) for _ in range(SEEN)][-1] == "a"
    assert two.of(0) == "other"
    assert [two.seen(1) for _ in range(SEEN)][-1] == "b"
    assert two.of(0) == "a"
    assert {one.seen(2) for _ in range(3 * SEEN)} == {"other"}
    assert (one.of(0), one.of(1)) == ("a", "b")
    three = ClassLabels(names, 2, "net/1", tmp_path)
    assert [{worker.seen(index) for _ in range(3 * SEEN) for worker in (one, two, three)} for index in range(4)] == [
        {"a"}, {"b"}, {"other"}, {"other"},
    ]  # fmt: skip
    another = ClassLabels(names, 2, "net/2", tmp_path)
    assert [another.seen(5) for _ in range(SEEN)][-1] == "f"
    assert three.of(1) == "b"


def test_predicted_classes_have_at_most_so_many_labels(bench: Callable[..., Bench]) -> None:
    one, counts = bench(watch_rate=0, watch_classes=1), Counts()
    for image in IMAGES:
        for _ in range(SEEN):
            one.answered(image, "predict")
    asked = len(IMAGES) * SEEN
    shown = {label: counts.rise("parchgrad_predicted_total", class_label=label) for label in (*LABELS, "other")}
    assert sum(shown.values()) == asked
    assert sum(count > 0 for count in shown.values()) == 2
    assert shown["other"] < asked


def test_a_graph_without_its_features_is_said_once_and_agreement_goes_on(
    bench: Callable[..., Bench], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graphs.write(tmp_path / "graphs")
    one = bench(graphs_dir=tmp_path / "graphs", model="small", runtime="onnx", watch_rate=1)
    counts = Counts()
    with caplog.at_level(logging.WARNING, "service.watching"):
        for image in IMAGES[:2]:
            one.answered(image, target="1")
    (record,) = caplog.records
    assert "export it again" in record.message
    assert isinstance(one.pipeline.repository.listing()[0].engine, OnnxEngine)
    assert counts.watched()[2] == 0
    assert counts.rise("parchgrad_activation_distance_count") == 0


def test_the_metrics_of_a_server_are_there_from_the_start() -> None:
    metrics.begin_version("new", "7")
    for result in RESULTS:
        assert counted("parchgrad_watched_total", model="new", version="7", result=result) == 0.0
