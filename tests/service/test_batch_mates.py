"""Whoever shares a batch: bad images, impossible options, callers gone and callers late change nobody else's answer."""

import asyncio
import concurrent.futures
import hashlib
import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import Job, Result
from service.errors import ServiceError
from service.pipeline import Origin, Outcome, Pipeline
from service.repository import Served
from service.schemas import parse_options
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.service.conftest import COVERED, LABELS, Home, counted, files, picture, png
from tests.service.serving import Server, serving
from tests.service.test_server import distance, explain, refused, saliency

BATCH = 32
ORIGIN = Origin("/explain", "test")


# --- a device of our own, whose numbers can be compared exactly ------------------------------------------------


class Device:
    """In place of TorchEngine._run: answers of the job alone; busy while `gate` is closed; one image it cannot take."""

    def __init__(self, poison: str) -> None:
        self.gate = threading.Event()
        self.batches: list[list[str]] = []
        self._poison = poison

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        self.batches.append([digest(job) for job in jobs])
        self.gate.wait()
        if self._poison in self.batches[-1]:
            raise ValueError("the device cannot compute this one")
        return [answer(job) for job in jobs]


def digest(job: Job) -> str:
    return hashlib.sha256(job.tensor.tobytes()).hexdigest()


def answer(job: Job) -> Result:
    """Numbers that no other image, target or option gives."""
    rows = job.tensor.reshape(-1)[: 100 * len(LABELS)].reshape(len(LABELS), 100)
    logits = rows.sum(axis=1, dtype=np.float64).astype(np.float32)
    if job.explained is None:
        return Result(logits, logits)
    asked = job.explained
    factor = np.float32(1 + asked.target + float(asked.options.quantile))
    return Result(logits, logits, max(asked.target, 0), job.tensor[0] * factor)


class Bench:
    """A pipeline in this process on one event loop, its device replaced."""

    def __init__(self, home: Home, device: Device, **options: Any) -> None:
        self.device = device
        self.runner = asyncio.Runner()
        chosen = {**home.settings, "max_batch": BATCH, "timeout_ms": 60_000, "self_test": False, **options}
        self.pipeline = self.runner.run(self._made(Settings(**chosen)))  # type: ignore[arg-type]

    async def _made(self, chosen: Settings) -> Pipeline:
        pipeline = Pipeline(chosen)
        await pipeline.start()
        while not pipeline.ready:
            await asyncio.sleep(0.01)
        return pipeline

    def close(self) -> None:
        self.device.gate.set()
        self.runner.run(self.pipeline.close())
        self.runner.close()

    async def ask(self, image: bytes, route: str = "explain", **fields: str) -> Outcome | ServiceError:
        """What one caller with one image gets; raises ServiceError where the options are impossible."""
        with self.pipeline.repository.use() as served:
            return await self._asked(served, image, route, fields)

    async def _asked(self, served: Served, image: bytes, route: str, fields: dict[str, str]) -> Outcome | ServiceError:
        kind: Any = route
        asked = parse_options({name: [value] for name, value in fields.items()}, 1, kind)
        arrival = asyncio.get_running_loop().time()
        requests = self.pipeline.check(
            served, [io.BytesIO(image)], asked, explain=route == "explain", draw=False, arrival=arrival
        )
        (outcome,) = await self.pipeline.run(served, requests, ORIGIN)
        return outcome


POISON = png(picture(999))


@pytest.fixture(scope="module")
def bench(home: Home) -> Iterator[Bench]:
    tensor = home.explainer().model.preprocessing.apply(picture(999))[0].numpy()
    device = Device(digest(Job(tensor)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "_run", lambda engine, jobs, wanted: device.run(jobs))
        made = Bench(home, device)
        yield made
        made.close()


def queued() -> int:
    """Images that wait for the device, in this process."""
    return round(counted("parchgrad_queue_depth_images"))


def numbers(outcome: Outcome | ServiceError) -> list[np.ndarray]:
    assert isinstance(outcome, Outcome), outcome
    assert outcome.missing is None
    result = outcome.first
    return [result.logits, result.probabilities, *([] if result.saliency is None else [result.saliency])]


GOOD = [
    (png(picture(seed, (60 + 3 * seed, 90))), {"target": str(seed % COVERED), "quantile": str((1 + seed) / 40)})
    for seed in range(BATCH)
]
ENDS = ("good", "predict", "bad", "impossible", "poison", "cancel", "expire")


@settings(max_examples=25, deadline=None)
@given(ends=st.lists(st.sampled_from(ENDS), min_size=BATCH, max_size=BATCH))
def test_every_good_one_gets_exactly_what_it_gets_alone(bench: Bench, ends: list[str]) -> None:
    device = bench.device

    async def caller(number: int, end: str) -> Outcome | ServiceError:
        image, options = GOOD[number]
        if end == "predict":
            return await bench.ask(image, "predict")
        if end == "bad":
            return await bench.ask(image[: len(image) // 2], **options)
        if end == "impossible":
            return await bench.ask(image, **{**options, "quantile": "7"})
        if end == "poison":
            return await bench.ask(POISON, **options)
        if end == "expire":
            return await bench.ask(image, **options, timeout_ms="20")
        return await bench.ask(image, **options)

    async def scenario() -> None:
        device.gate.set()
        alone = [await caller(i, end) if end in ("good", "predict") else None for i, end in enumerate(ends)]
        device.gate.clear()
        device.batches.clear()
        busy = [asyncio.ensure_future(bench.ask(png(picture(1000)), route)) for route in ("explain", "predict")]
        while len(device.batches) < 2:  # explanations wait behind one of them, predictions behind the other
            await asyncio.sleep(0.001)
        before = len(device.batches)
        tasks: dict[int, asyncio.Future[Outcome | ServiceError]] = {}

        def begin(*kinds: str) -> list[asyncio.Future[Outcome | ServiceError]]:
            begun = {i: asyncio.ensure_future(caller(i, end)) for i, end in enumerate(ends) if end in kinds}
            tasks.update(begun)
            return list(begun.values())

        if over := begin("bad", "impossible", "expire"):
            await asyncio.wait(over)
        left = queued()  # the late ones, which nobody waits for, are still in the queue
        waiting = begin("good", "predict", "poison", "cancel")
        while queued() < left + len(waiting):
            await asyncio.sleep(0.001)
        for i, end in enumerate(ends):
            if end == "cancel":
                tasks[i].cancel()
        await asyncio.sleep(0)
        device.gate.set()
        results = await asyncio.gather(*(tasks[i] for i in range(BATCH)), return_exceptions=True)
        await asyncio.gather(*busy)

        for end, result, expected in zip(ends, results, alone, strict=True):
            if end in ("good", "predict"):
                assert not isinstance(result, BaseException)
                for one, other in zip(numbers(result), numbers(expected), strict=True):  # type: ignore[arg-type]
                    assert np.array_equal(one, other)
            elif end == "cancel":
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert isinstance(result, ServiceError)
                codes = {"bad": "image_truncated", "impossible": "option_invalid", "poison": "internal"}
                assert result.code == codes.get(end, "deadline_exceeded")
        computed = Counter(one for batch in device.batches[before:] for one in batch)
        explainer = bench.pipeline.repository.listing()[0].engine
        for (image, _), end in zip(GOOD, ends, strict=True):
            if end in ("cancel", "expire", "impossible", "bad"):
                tensor = explainer.model.preprocessing.apply(_open(image))[0].numpy()
                assert not computed[digest(Job(tensor))], end
        together = ends.count("good") + ends.count("poison")
        assert max(map(len, device.batches[before:]), default=0) >= together

    bench.runner.run(scenario())


def _open(image: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(image))


# --- the running service -------------------------------------------------------------------------------------


SLOW = {"method": "smoothgrad", "samples": "100", "saliency": "none"}
MIXED = [
    (
        png(picture(i, (60 + 9 * i, 90))),
        {
            "target": str(i % COVERED),
            "quantile": str((1 + i) / 40),
            "gamma": ("inf", "3", "0.5")[i % 3],
            "method": ("gradient", "input_x_gradient", "guided_backprop")[i % 3],
            "conserve": ("independent", "exact", "none")[i // 3 % 3],
        },
    )
    for i in range(24)
]


@pytest.fixture(scope="module")
def unhurried(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Long deadlines, so that a slow machine changes no answer; and what is slow is slow in one device call."""
    chosen = {**home.settings, "timeout_ms": 120_000, "max_images": 32, "max_batch_pixels": 20_000_000}
    with serving(tmp_path_factory.mktemp("unhurried"), settings=chosen) as running:
        yield running


BUSY = 32  # images of many passes, before which everybody else waits


class Busy:
    """A request of many passes in a thread of its own; the map thread is at its last batch when the block begins."""

    def __init__(self, server: Server, images: int) -> None:
        self._server, self._images = server, images

    def __enter__(self) -> "concurrent.futures.Future[httpx.Response]":
        taken = self._images + self._server.metric("parchgrad_queue_seconds_count", kind="explain")
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        images = files(*[png(picture(500 + i)) for i in range(self._images)])
        future = self._pool.submit(self._server.client.post, "/explain", files=images, data=SLOW)
        while self._server.metric("parchgrad_queue_seconds_count", kind="explain") < taken:
            assert not future.done() or future.result().status_code == 200, future.result().text
            time.sleep(0.01)
        return future

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


def hung_up(server: Server, image: bytes) -> socket.socket:
    """A connection that has sent a whole request for a map and will not wait for it."""
    request = httpx.Request("POST", f"{server.url}/explain?target=1", files=files(image))
    body = request.read()
    head = f"POST /explain?target=1 HTTP/1.1\r\nHost: x\r\nContent-Type: {request.headers['content-type']}\r\n"
    connection = socket.create_connection((request.url.host, request.url.port), timeout=60)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_mates_of_every_kind_in_one_batch_of_the_running_service(unhurried: Server) -> None:
    """24 good callers with bad, impossible, late and vanished ones between them, all behind a busy map thread."""
    server = unhurried
    alone = [explain(server, image, **options) for image, options in MIXED]
    names = {
        "computed": ("parchgrad_batch_images_sum", {"kind": "explain"}),
        "all": ("parchgrad_batch_images_count", {"kind": "explain"}),
        "small": ("parchgrad_batch_images_bucket", {"kind": "explain", "le": "16.0"}),
        "cancelled": ("parchgrad_dropped_total", {"reason": "cancelled"}),
        "expired": ("parchgrad_dropped_total", {"reason": "expired"}),
    }
    before = {key: server.metric(name, **labels) for key, (name, labels) in names.items()}
    post = server.client.post
    with concurrent.futures.ThreadPoolExecutor(64) as pool, Busy(server, BUSY) as busy:
        good = [pool.submit(explain, server, image, **options) for image, options in MIXED]
        late = [pool.submit(explain, server, MIXED[i][0], explain_timeout_ms="300") for i in range(6)]
        vanished = [hung_up(server, MIXED[i][0]) for i in range(6)]
        bad = [pool.submit(post, "/explain", files=files(MIXED[i][0][:200])) for i in range(6)]
        wrong = [pool.submit(post, "/explain", files=files(MIXED[0][0]), data={"quantile": "7"}) for _ in range(6)]
        for answer in bad:
            refused(answer.result(), 400, "image_truncated")
        for answer in wrong:
            refused(answer.result(), 422, "option_invalid")
        for answer in late:
            explanation = answer.result()["explanation"]
            assert explanation["status"] == "timeout"
        while server.metric("parchgrad_admitted_images") < BUSY + len(MIXED) + len(vanished):
            assert not busy.done(), "the map thread was not busy for long enough"
            time.sleep(0.01)
        for connection in vanished:
            connection.close()
        while server.metric("parchgrad_admitted_images") > BUSY + len(MIXED):
            time.sleep(0.01)
        while server.metric("parchgrad_queue_depth_images") < len(MIXED):  # all are at the map thread's door by now
            assert not busy.done(), "the map thread was not busy for long enough"
            time.sleep(0.01)
        assert not busy.done(), "the map thread was not busy for long enough"
        results = [answer.result() for answer in good]
    after = {key: server.metric(name, **labels) - before[key] for key, (name, labels) in names.items()}
    assert busy.result().status_code == 200
    worst = max(distance(saliency(one), saliency(other)) for one, other in zip(results, alone, strict=True))
    print(f"\nlargest relative L2 distance of {len(MIXED)} maps in company to the same alone: {worst:.1e}")
    assert worst < TOLERANCE
    for one, other in zip(results, alone, strict=True):
        assert one["explanation"]["target"]["index"] == other["explanation"]["target"]["index"]
        for mine, its in zip(one["predictions"], other["predictions"], strict=True):
            assert mine["index"] == its["index"]
            assert mine["probability"] == pytest.approx(its["probability"], rel=1e-4)
    assert after["all"] - after["small"] >= 1  # a batch of more than 16 did form
    assert after["computed"] == BUSY + len(MIXED)  # nobody's who left, nobody's who was late
    assert (after["cancelled"], after["expired"]) == (6, 6)


TOLERANCE = 1e-4  # float32 sums in another order: the CPU computes a batch of another shape by other blocks


# --- two lanes, and maps left out -----------------------------------------------------------------------------


def test_a_prediction_does_not_wait_behind_maps_of_many_passes(unhurried: Server) -> None:
    with Busy(unhurried, 8) as busy:
        answer = unhurried.client.post("/predict", files=files(png(picture(1))))
        assert not busy.done()  # by order, not by the clock
        assert answer.status_code == 200
    assert busy.result().status_code == 200


def test_a_map_out_of_time_leaves_its_prediction(unhurried: Server) -> None:
    image = png(picture(1))
    predicted = unhurried.client.post("/predict", files=files(image)).json()["results"][0]["predictions"]
    with Busy(unhurried, 8) as busy:
        result = explain(unhurried, image, explain_timeout_ms="1")
        drawn = unhurried.client.post(
            "/explain?explain_timeout_ms=1", files=files(image), headers={"Accept": "image/png"}
        )
        assert not busy.done()
    assert result["status"] == "ok"
    assert result["explanation"]["status"] == "timeout"
    assert result["explanation"]["reason"]
    assert [one["index"] for one in result["predictions"]] == [one["index"] for one in predicted]
    refused(drawn, 504, "deadline_exceeded")


def test_conditions_are_each_images_own(unhurried: Server) -> None:
    images = [png(picture(seed)) for seed in range(12)]
    first = [explain(unhurried, image, top_k="1")["predictions"][0] for image in images]
    bound = sorted(one["probability"] for one in first)[len(first) // 2]
    chosen = first[0]["index"]
    sampled = [int(hashlib.sha256(image).hexdigest()[:16], 16) < 0.5 * 2**64 for image in images]
    assert {True, False} <= set(sampled)
    conditions: list[tuple[str, list[bool]]] = [
        ("always", [True] * 12),
        (f"confidence<{bound!r}", [one["probability"] < bound for one in first]),
        (f"class:{chosen}", [one["index"] == chosen for one in first]),
        (f"class:{LABELS[chosen]}", [one["index"] == chosen for one in first]),
        ("sample:0.5", sampled),
        (
            f"class:{chosen};sample:0.5",
            [one["index"] == chosen or is_in for one, is_in in zip(first, sampled, strict=True)],
        ),
    ]
    for text, expected in conditions:
        answer = unhurried.client.post("/explain", files=files(*images), data={"explain_when": text})
        assert answer.status_code == 200, answer.text
        explanations = [one["explanation"] for one in answer.json()["results"]]
        assert [one["status"] == "skipped" for one in explanations] == [not made for made in expected], text
        assert all(one["reason"] for one in explanations if one["status"] == "skipped")
    own = [text for text, _ in conditions] * 2  # one for each image of one request
    answer = unhurried.client.post("/explain", files=files(*images), data={"explain_when": own}).json()
    skipped = [one["explanation"]["status"] == "skipped" for one in answer["results"]]
    assert skipped == [not conditions[i % len(conditions)][1][i] for i in range(12)]


def test_maps_are_left_out_before_predictions_are_refused(home: Home, tmp_path: Path) -> None:
    """Shed above 4, refused above 8: behind four maps in work every further image is predicted, then comes 429."""
    chosen = {**home.settings, "timeout_ms": 120_000, "max_images": 8, "max_queue": 8, "shed_above": 4}
    image = png(picture(2))
    with serving(tmp_path / "home", settings=chosen) as server:
        shed = server.metric("parchgrad_maps_missing_total", status="shed")
        with Busy(server, 4) as busy:
            result = explain(server, image)
            assert result["explanation"]["status"] == "shed"
            assert "4" in result["explanation"]["reason"]
            assert len(result["predictions"]) == 5
            drawn = server.client.post("/explain", files=files(image), headers={"Accept": "image/png"})
            refused(drawn, 503, "map_shed")
            assert int(drawn.headers["retry-after"]) >= 1
            many = server.client.post("/explain", files=files(*[image] * 4))
            assert [one["explanation"]["status"] for one in many.json()["results"]] == ["shed"] * 4
            full = server.client.post("/explain", files=files(*[image] * 5))
            refused(full, 429, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
            refused(server.client.post("/predict", files=files(*[image] * 5)), 429, "queue_full")
            assert not busy.done()
        assert busy.result().status_code == 200
        assert server.metric("parchgrad_maps_missing_total", status="shed") - shed == 6
        assert explain(server, image)["explanation"]["status"] == "ok"
        assert server.metric("parchgrad_admitted_images") == 0
