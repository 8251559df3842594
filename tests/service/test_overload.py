"""More than the service can carry: the queue stays bounded, nothing is lost, maps go before predictions."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.load_clients import Load, Reply, in_process_of_its_own, open_loop, wire
from benchmarks.served import multipart
from benchmarks.service_overload import maps_in, watching
from tests.service.conftest import Home, picture, png
from tests.service.serving import Server, serving

MAX_QUEUE = 16
COUNT = 160
AT_ONCE = 1e6  # requests a second


@pytest.fixture(scope="module")
def small(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Sixteen images may be admitted; above eight, maps are left out."""
    settings = {**home.settings, "max_queue": MAX_QUEUE}
    with serving(tmp_path_factory.mktemp("overload"), settings=settings) as running:
        yield running


def burst(server: Server, kind: str, **options: str) -> Load:
    """COUNT requests of two images at once, from a process of their own."""
    images = [png(picture(seed, (400, 300))) for seed in range(2)]
    request = wire(multipart(server.url, kind, images, data=options))
    with in_process_of_its_own() as clients:
        load: Load = clients.submit(open_loop, server.url, [request], AT_ONCE, COUNT).result()
    return load


@pytest.mark.parametrize("kind", ["predict", "explain"])
def test_a_burst_is_answered_or_refused_and_leaves_nothing(small: Server, kind: str) -> None:
    before = small.metric("parchgrad_rejects_total", reason="queue_full")
    with watching(small) as watched:
        load = burst(small, kind)
    assert len(load.replies) == COUNT  # every one of them was answered
    assert set(load.statuses()) == {200, 429}
    refused = load.with_status(429)
    assert {reply.retry_after for reply in refused} == {"1"}
    assert {json.loads(reply.body)["error"]["code"] for reply in refused} == {"queue_full"}
    assert small.metric("parchgrad_rejects_total", reason="queue_full") == before + len(refused)
    assert 0 < watched[0].admitted <= MAX_QUEUE
    assert watched[0].queued <= MAX_QUEUE
    for reply in load.with_status(200):
        results = json.loads(reply.body)["results"]
        assert [len(one["predictions"]) for one in results] == [5, 5]
    for name in ("admitted", "queue_depth"):
        assert small.metric(f"parchgrad_{name}_images") == 0
    after = small.client.post(f"/{kind}", files={"image": ("x", png(picture()))}).json()["results"][0]
    assert after["status"] == "ok"
    if kind == "explain":
        assert after["explanation"]["status"] == "ok"


def test_maps_are_left_out_before_predictions(small: Server) -> None:
    """Slow maps: first they are made, then only predictions are answered, and only then requests refused."""
    shed_before = small.metric("parchgrad_maps_missing_total", status="shed")
    load = burst(small, "explain", method="smoothgrad", selection="instance")
    answered = [json.loads(reply.body)["results"] for reply in load.with_status(200)]
    statuses = [{one["explanation"]["status"] for one in results} for results in answered]
    assert {"ok"} in statuses
    assert {"shed"} in statuses
    assert all(len(one) == 1 for one in statuses)  # a request keeps or loses all its maps
    shed = [one for results in answered for one in results if one["explanation"]["status"] == "shed"]
    reasons = {one["explanation"]["reason"] for one in shed}
    assert all(re.fullmatch(r"\d+ images or maps are waiting\.", reason) for reason in reasons), reasons
    assert min(int(reason.split()[0]) for reason in reasons) >= 8
    assert all(len(one["predictions"]) == 5 for one in shed)
    assert small.metric("parchgrad_maps_missing_total", status="shed") == shed_before + len(shed)


def test_maps_are_counted_by_their_status() -> None:
    bodies = [{"explanation": {"status": status}} for status in ("ok", "shed", "shed")] + [{}]
    replies = [Reply(0, 0, 200, None, json.dumps({"results": [body]}).encode()) for body in bodies]
    assert maps_in(replies) == {"ok": 1, "shed": 2}


def test_watching_sees_what_is_held(small: Server, tmp_path: Path) -> None:
    with watching(small) as watched:
        time.sleep(0.3)
    (found,) = watched
    assert (found.admitted, found.queued) == (0, 0)
    assert found.resident >= found.resident_before > 10_000_000
