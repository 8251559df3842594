"""service/metrics.py: each metric moves as it says, over real requests; no label is a caller's; workers add up."""

import asyncio
import base64
import concurrent.futures
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from starlette.routing import Route
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from parchgrad.options import Options
from service import cost, device_memory, metrics
from service.access import Access, Gate
from service.app import BENTOML_ROUTES, OTHER, Envelope, create_app
from service.cost import Cost
from service.engine import DeviceMemoryError, Explained, Job, Result
from service.errors import STATUS
from service.pipeline import Pipeline
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.service.conftest import Home, counted, files, picture, png
from tests.service.serving import PROJECT_ROOT, Server, free_port, serving
from tests.service.test_grpc import asked, encoded

DOCS = PROJECT_ROOT / "docs" / "metrics.md"
IMAGE = png(picture())
B64 = base64.b64encode(IMAGE).decode()
TINY = ("tiny", "1")
SLOW = {"method": "smoothgrad", "samples": "100"}  # of many passes: given up between two of them

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


# --- the list ------------------------------------------------------------------------------------------------


def declared() -> dict[str, MetricWrapperBase]:
    """Every metric that the module holds, by the name that Prometheus shows."""
    found = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    return {one.describe()[0].name + ("_total" if one._type == "counter" else ""): one for one in found}


def documented() -> list[str]:
    """The first column of the page's tables of ours."""
    return re.findall(r"^\| `(parchgrad_[a-z_]+)[`{]", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_metric_has_a_help_and_its_line_in_the_docs_and_the_other_way_round() -> None:
    for name, one in declared().items():
        assert one._documentation.endswith("."), name
    assert len(documented()) == len(set(documented()))
    assert set(documented()) == set(declared())


def test_the_docs_give_the_labels() -> None:
    """`parchgrad_queue_seconds{M,kind}`: M are model and version."""
    text = DOCS.read_text(encoding="utf-8")
    for name, one in declared().items():
        (line,) = re.findall(rf"^\| `{name}(?:{{(.*?)}})?`", text, re.MULTILINE)
        labels = tuple(line.replace("M", "model,version").split(",")) if line else ()
        assert labels == one._labelnames, name


def test_times_share_their_buckets() -> None:
    for name, one in declared().items():
        if name.endswith("_seconds"):
            assert tuple(one._kwargs["buckets"]) == metrics.SECONDS, name


# --- one worker in this process --------------------------------------------------------------------------------


class Device:
    """Around TorchEngine._run: busy while `gate` is closed; raises `fault` where there is one."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self._run = TorchEngine._run

    def run(self, engine: TorchEngine, jobs: Sequence[Job], wanted: Any) -> list[Result | None]:
        self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return self._run(engine, jobs, wanted)


class Front:
    """The app with all that is around it but BentoML, in this process, on one event loop."""

    def __init__(self, home: Home, device: Device) -> None:
        self.device = device
        self._runner = asyncio.Runner()
        chosen: dict[str, Any] = {**home.settings, "self_test": False, "max_queue": 4, "max_images": 4, "shed_above": 3}
        self.settings = Settings(**chosen)
        self.pipeline: Pipeline = self._runner.run(self._started())
        self.app = create_app()
        self.app.state.pipeline = self.pipeline
        outer: Any = Envelope(Gate(self.app, access=Access.from_settings(self.settings)), routes=self.app.routes)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://127.0.0.1")
        self.outer = outer

    async def _started(self) -> Pipeline:
        pipeline = Pipeline(self.settings)
        await pipeline.start()
        while not pipeline.ready:
            await asyncio.sleep(0.01)
        return pipeline

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def send(self, method: str, path: str, **named: Any) -> httpx.Response:
        answer: httpx.Response = self.run(self.client.request(method, path, **named))
        return answer

    async def device_done(self) -> None:
        """Until both lanes have ended what was in them: what nobody waits for any more goes on there."""
        repository = self.pipeline.repository
        for lane in (repository._predict_lane, repository._map_lane):
            await asyncio.get_running_loop().run_in_executor(lane, int)

    def close(self) -> None:
        self.device.gate.set()
        self.run(self.client.aclose())
        self.run(self.pipeline.close())
        self._runner.close()


@pytest.fixture(scope="module")
def front(home: Home) -> Iterator[Front]:
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "_run", lambda engine, jobs, wanted: device.run(engine, jobs, wanted))
        made = Front(home, device)
        yield made
        made.close()


def series(families: Any = None) -> Series:
    """Every sample but those that say when a series was made."""
    found: Series = {}
    for family in families or REGISTRY.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of_server(server: Server) -> Series:
    from prometheus_client.parser import text_string_to_metric_families

    return series(text_string_to_metric_families(server.client.get("/metrics").text))


def added(before: Series, after: Series, name: str) -> dict[tuple[str, ...], float]:
    """By the labels' values in the declared order: what a metric's series have grown by, where they have."""
    family = re.sub("_(count|sum)$", "", name)
    order = declared()[family]._labelnames
    grown = {}
    for (one, labels), value in after.items():
        if one == name and (difference := value - before.get((one, labels), 0.0)):
            values_of = dict(labels)
            grown[tuple(values_of[label] for label in order)] = difference
    return grown


def v2(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [B64]}], **fields}


def v1(**options: Any) -> dict[str, Any]:
    return {"instances": [{"image": {"b64": B64}, **options}]}


NOBODY = ("", "")
LOGITS, MAP = [{"name": "logits"}], [{"name": "saliency"}]
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}

# id: method, path, what is sent; route, model and version, kind, status, code
REQUESTS: dict[str, tuple[str, str, dict[str, Any], str, tuple[str, str], str, int, str]] = {
    "predict": ("POST", "/predict", {"files": files(IMAGE)}, "/predict", TINY, "predict", 200, "ok"),
    "explain": ("POST", "/explain", {"files": files(IMAGE)}, "/explain", TINY, "explain", 200, "ok"),
    "one_bad_of_two": (
        "POST", "/predict", {"files": files(IMAGE, b"no")}, "/predict", TINY, "predict", 200, "ok"),
    "bad_image": (
        "POST", "/explain", {"files": files(b"no")}, "/explain", TINY, "explain", 415, "image_unsupported"),
    "no_image": ("POST", "/predict", {"content": b"--b--\r\n", "headers": MULTIPART},
        "/predict", NOBODY, "predict", 400, "no_image"),
    "unknown_model": (
        "POST", "/explain", {"files": files(IMAGE), "data": {"model": "mine"}},
        "/explain", NOBODY, "explain", 404, "unknown_model"),
    "unknown_version": (
        "POST", "/explain", {"files": files(IMAGE), "data": {"model": "tiny", "version": "7"}},
        "/explain", NOBODY, "explain", 404, "unknown_version"),
    "unknown_class": (
        "POST", "/explain", {"files": files(IMAGE), "data": {"target": "no such thing"}},
        "/explain", TINY, "explain", 422, "unknown_class"),
    "late": (
        "POST", "/explain", {"files": files(IMAGE), "data": {**SLOW, "timeout_ms": "1"}},
        "/explain", TINY, "explain", 504, "deadline_exceeded"),
    "not_acceptable": ("POST", "/predict", {"files": files(IMAGE), "headers": {"Accept": "image/png"}},
        "/predict", NOBODY, "predict", 406, "not_acceptable"),
    "one_model": ("GET", "/models/tiny", {}, "/models/{name}", TINY, "other", 200, "ok"),
    "no_model": ("GET", "/models/mine", {}, "/models/{name}", NOBODY, "other", 404, "unknown_model"),
    "unknown_route": ("GET", "/nothing/here", {}, "other", NOBODY, "other", 404, "not_found"),
    "wrong_method": ("GET", "/predict", {}, "/predict", NOBODY, "other", 405, "method_not_allowed"),
    "slash": ("POST", "/predict/", {}, "other", NOBODY, "other", 404, "not_found"),
    "v1_predict": ("POST", "/v1/models/tiny:predict", {"json": v1()},
        "/v1/models/{name}:predict", TINY, "predict", 200, "ok"),
    "v1_explain": ("POST", "/v1/models/tiny:explain", {"json": v1(target=3)},
        "/v1/models/{name}:explain", TINY, "explain", 200, "ok"),
    "v1_no_json": ("POST", "/v1/models/tiny:explain", {"content": b"{"},
        "/v1/models/{name}:explain", TINY, "explain", 400, "malformed_request"),
    "v1_unknown": ("POST", "/v1/models/mine:explain", {"json": v1()},
        "/v1/models/{name}:explain", NOBODY, "explain", 404, "unknown_model"),
    "v2_map": ("POST", "/v2/models/tiny/infer", {"json": v2(outputs=MAP)},
        "/v2/models/{name}/infer", TINY, "explain", 200, "ok"),
    "v2_all": ("POST", "/v2/models/tiny/versions/1/infer", {"json": v2()},
        "/v2/models/{name}/versions/{version}/infer", TINY, "explain", 200, "ok"),
    "v2_logits": ("POST", "/v2/models/tiny/infer", {"json": v2(outputs=LOGITS)},
        "/v2/models/{name}/infer", TINY, "predict", 200, "ok"),
    "v2_no_json": ("POST", "/v2/models/tiny/infer", {"content": b"{"},
        "/v2/models/{name}/infer", TINY, "other", 400, "malformed_request"),
    "v2_unknown": ("POST", "/v2/models/mine/infer", {"json": v2()},
        "/v2/models/{name}/infer", NOBODY, "other", 404, "unknown_model"),
    "v2_ready": ("GET", "/v2/models/tiny/ready", {}, "/v2/models/{name}/ready", TINY, "other", 200, "ok"),
    "no_admin": ("POST", "/v2/repository/models/tiny/load", {"json": {}},
        "/v2/repository/models/{name}/load", NOBODY, "other", 403, "forbidden"),
}  # fmt: skip


def test_what_counts_against_the_service_begins_with_0() -> None:
    """Else a rate never sees the first ones of a worker."""
    metrics.begin_version("m", "1")
    begun = {
        labels
        for (name, labels), value in series().items()
        if ("model", "m") in labels and name.endswith("requests_total")
    }
    codes = {dict(labels)["code"]: dict(labels)["status"] for labels in begun}
    assert {"ok", "queue_full", "internal", "deadline_exceeded", "out_of_memory"} <= set(codes)
    assert codes == {code: str(STATUS.get(code, 200)) for code in codes}
    there = {(route, kind) for _, _, _, route, _, kind, _, _ in REQUESTS.values() if kind != "other"}
    made = {(dict(labels)["route"], dict(labels)["kind"]) for labels in begun}
    assert there <= made
    templates = {route.path for route in create_app().routes if isinstance(route, Route)} | {"grpc/ModelInfer"}
    assert {route for route, _ in made} <= templates


def test_the_summary_begins_with_0() -> None:
    """A worker opens a file for each type of metric: all at the start, or a soak sees one more open file."""
    metrics.begin_version("m", "1")
    labels = {"model": "m", "version": "1", "class_label": "other"}
    assert REGISTRY.get_sample_value("parchgrad_class_activation_distance_count", labels) is not None
    summaries = [name for name, one in declared().items() if one._type == "summary"]
    assert summaries == ["parchgrad_class_activation_distance"]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_counts_once_under_what_it_was(front: Front, name: str) -> None:
    method, path, sent, route, model, kind, status, code = REQUESTS[name]
    before = series()
    answer = front.send(method, path, **sent)
    after = series()
    assert answer.status_code == status, answer.text[:200]
    assert added(before, after, "parchgrad_requests_total") == {(route, *model, kind, str(status), code): 1}
    assert added(before, after, "parchgrad_request_seconds_count") == {(route, *model, kind): 1}
    refused = {} if name != "one_bad_of_two" else {("image_unsupported",): 1.0}
    assert added(before, after, "parchgrad_rejects_total") == ({(code,): 1} if code != "ok" else refused)
    rendered = code == "ok" and kind != "other"
    assert added(before, after, "parchgrad_render_seconds_count") == ({(*model, kind): 1} if rendered else {})
    assert counted("parchgrad_in_flight_requests") == 0


@pytest.mark.parametrize("kind", ["predict", "explain"])
def test_an_image_is_counted_on_its_whole_way(front: Front, kind: str) -> None:
    before = series()
    assert front.send("POST", f"/{kind}", files=files(IMAGE, IMAGE, b"no")).status_code == 200
    after = series()
    lane = (*TINY, kind)
    assert added(before, after, "parchgrad_decode_seconds_count") == {TINY: 2}
    assert added(before, after, "parchgrad_queue_seconds_count") == {lane: 2}
    assert added(before, after, "parchgrad_batch_images_sum") == {lane: 2}
    batches = added(before, after, "parchgrad_batch_images_count")
    assert batches == added(before, after, "parchgrad_device_seconds_count")
    assert set(batches) == {lane}
    for stage in ("decode", "queue", "device", "render"):
        spent = added(before, after, f"parchgrad_{stage}_seconds_sum")
        assert 0 < sum(spent.values()) < sum(added(before, after, "parchgrad_request_seconds_sum").values()) * 2
    for gauge in ("parchgrad_admitted_images", "parchgrad_queue_depth_images"):
        assert counted(gauge) == 0


def waiting(kind: str) -> float:
    return counted("parchgrad_queue_depth_images", model="tiny", version="1", kind=kind)


async def until(met: Callable[[], bool]) -> None:
    while not met():
        await asyncio.sleep(0.002)


def test_the_queue_s_depth_what_is_shed_and_what_is_refused(front: Front) -> None:
    """The device is busy: one map on it, two more wait; then a map is shed, then a request is refused."""

    async def scenario() -> None:
        post = front.client.post
        front.device.gate.clear()
        tasks = [asyncio.create_task(post("/explain", files=files(IMAGE)))]
        await until(lambda: counted("parchgrad_admitted_images") == 1)
        await until(lambda: counted("parchgrad_queue_seconds_count", kind="explain") > taken)
        tasks += [asyncio.create_task(post("/explain", files=files(IMAGE))) for _ in range(2)]
        await until(lambda: waiting("explain") >= 2)
        assert waiting("explain") == 2
        shed = asyncio.create_task(post("/explain", files=files(IMAGE)))
        await until(lambda: counted("parchgrad_admitted_images") == 4)
        full = await post("/predict", files=files(IMAGE))
        assert full.status_code == 429
        assert counted("parchgrad_in_flight_requests") == 4
        front.device.gate.set()
        assert [one.status_code for one in await asyncio.gather(*tasks)] == [200] * 3
        (result,) = (await shed).json()["results"]
        assert result["explanation"]["status"] == "shed"

    before, taken = series(), counted("parchgrad_queue_seconds_count", kind="explain")
    front.run(scenario())
    after = series()
    assert added(before, after, "parchgrad_maps_missing_total") == {(*TINY, "shed"): 1}
    assert added(before, after, "parchgrad_rejects_total") == {("queue_full",): 1}
    assert added(before, after, "parchgrad_requests_total") == {
        ("/explain", *TINY, "explain", "200", "ok"): 4,
        ("/predict", *TINY, "predict", "429", "queue_full"): 1,
    }
    for gauge in ("parchgrad_admitted_images", "parchgrad_queue_depth_images", "parchgrad_in_flight_requests"):
        assert counted(gauge) == 0


def test_maps_that_are_skipped_or_late_are_counted(front: Front) -> None:
    before = series()
    for options in ({"explain_when": "confidence<0.05"}, {**SLOW, "explain_timeout_ms": "1"}):
        assert front.send("POST", "/explain", files=files(IMAGE), data=options).status_code == 200
    assert added(before, series(), "parchgrad_maps_missing_total") == {(*TINY, "skipped"): 1, (*TINY, "timeout"): 1}


def test_expired_cancelled_and_interrupted_images_are_told_apart(front: Front) -> None:
    async def scenario() -> None:
        front.device.gate.clear()
        taken = counted("parchgrad_queue_seconds_count", kind="explain")
        slow = asyncio.create_task(hung_up(front, SLOW, after))
        await until(lambda: counted("parchgrad_queue_seconds_count", kind="explain") == taken + 1)
        waits = asyncio.create_task(hung_up(front, {}, after))
        late = asyncio.create_task(
            front.client.post("/explain", files=files(IMAGE), data={"explain_timeout_ms": "60", "timeout_ms": "100"})
        )
        await until(lambda: waiting("explain") >= 2)
        assert waiting("explain") == 2
        assert (await late).status_code == 504  # its map's time, then its prediction's
        after.set()
        await asyncio.gather(slow, waits)
        assert waiting("explain") == waiting("predict") == 0
        front.device.gate.set()
        await until(lambda: counted("parchgrad_dropped_total", reason="interrupted") == interrupted + 1)
        await front.device_done()

    after, interrupted = asyncio.Event(), counted("parchgrad_dropped_total", reason="interrupted")
    before = series()
    front.run(scenario())
    moved = series()
    # The late one's prediction is on the device, which was busy, or waits: either is possible, and both are an end.
    gone = added(before, moved, "parchgrad_dropped_total")
    assert gone.pop((*TINY, "predict", "expired"), 1) == 1
    gone.pop((*TINY, "predict", "interrupted"), None)
    assert gone == {(*TINY, "explain", reason): 1 for reason in ("expired", "cancelled", "interrupted")}
    answered = added(before, moved, "parchgrad_requests_total")
    assert answered[("/explain", *TINY, "explain", "499", "client_closed_request")] == 2
    assert added(before, moved, "parchgrad_rejects_total")[("client_closed_request",)] == 2


async def hung_up(front: Front, options: Mapping[str, str], when: asyncio.Event) -> None:
    """A caller that sends all of its request and then goes."""
    request = front.client.build_request("POST", "/explain", files=files(IMAGE), data=dict(options))
    body: bytes | None = await request.aread()

    async def receive() -> dict[str, Any]:
        nonlocal body
        if body is not None:
            content, body = body, None
            return {"type": "http.request", "body": content, "more_body": False}
        await when.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    headers = [(name.lower(), value) for name, value in request.headers.raw]
    path = {"path": "/explain", "raw_path": b"/explain", "query_string": b"", "root_path": ""}
    scope = {"type": "http", "method": "POST", "http_version": "1.1", "headers": headers, "scheme": "http"}
    await front.outer({**scope, **path, "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)}, receive, send)


def test_want_of_memory_is_counted_by_batch_and_request(front: Front) -> None:
    before = series()
    front.device.fault = DeviceMemoryError("no memory")
    try:
        assert front.send("POST", "/explain", files=files(IMAGE)).status_code == 503
    finally:
        front.device.fault = None
    after = series()
    # A batch of one is tried twice; then the prediction alone is.
    lanes = {(*TINY, "explain"): 2, (*TINY, "predict"): 2}
    assert added(before, after, "parchgrad_out_of_memory_total") == lanes
    assert added(before, after, "parchgrad_requests_total") == {
        ("/explain", *TINY, "explain", "503", "out_of_memory"): 1
    }
    assert not added(before, after, "parchgrad_device_seconds_count")


def test_a_fault_of_ours_is_internal(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: Any) -> None:
        raise ZeroDivisionError

    (route,) = (one for one in front.app.routes if getattr(one, "path", "") == "/models")
    monkeypatch.setattr(route, "app", lambda scope, receive, send: broken(scope))
    before = series()
    assert front.send("GET", "/models").status_code == 500
    assert added(before, series(), "parchgrad_requests_total") == {("/models", *NOBODY, "other", "500", "internal"): 1}


def test_a_fault_within_an_answer_keeps_the_status_that_was_sent(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    (route,) = (one for one in front.app.routes if getattr(one, "path", "") == "/models")
    monkeypatch.setattr(route, "app", broken)
    before = series()
    with pytest.raises(AssertionError):  # httpx's transport, which finds the answer without an end
        front.send("GET", "/models")
    assert added(before, series(), "parchgrad_requests_total") == {("/models", *NOBODY, "other", "200", "internal"): 1}


def test_a_readiness_that_says_no_has_a_code(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front.pipeline, "draining", True)
    before = series()
    assert front.send("GET", "/v2/health/ready").status_code == 503
    assert added(before, series(), "parchgrad_requests_total") == {
        ("/v2/health/ready", *NOBODY, "other", "503", "not_ready"): 1
    }


def test_nothing_that_a_caller_writes_is_a_label(front: Front) -> None:
    """200 requests that nobody has sent before make no more series than the ten kinds of them do."""
    draw = random.Random(0)

    def word() -> str:
        return "zq" + "".join(draw.choices("abcXYZ019.-_~", k=draw.randint(1, 60)))

    def sent(number: int) -> None:
        one, two = word(), word()
        data = {"files": files(IMAGE)}
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", f"/{one}/{two}", {}),
            ("POST", "/predict", {**data, "data": {"model": one}}),
            ("POST", "/explain", {**data, "data": {"model": "tiny", "version": str(10 + number)}}),
            ("POST", "/explain", {**data, "data": {"target": one}}),
            ("POST", "/explain", {**data, "data": {one: two}}),
            ("POST", "/explain", {**data, "data": {"method": one}}),
            ("GET", f"/models/{one}", {"headers": {"X-Request-Id": two, "X-Api-Key": one}}),
            ("POST", f"/v1/models/{one}:explain", {"json": v1()}),
            ("POST", f"/v2/models/{one}/versions/{number}/infer", {"json": v2()}),
            ("POST", f"/v2/repository/models/{one}/load", {"json": {}}),
        ]
        method, path, named = calls[number % len(calls)]
        assert front.send(method, path, **named).status_code in (403, 404, 422)

    for number in range(10):
        sent(number)
    before = set(series())
    for number in range(10, 210):
        sent(number)
    assert set(series()) == before
    routes = {getattr(route, "path", "") for route in front.app.routes} | {*BENTOML_ROUTES, OTHER, "grpc/ModelInfer"}
    closed: dict[str, set[str]] = {
        "route": routes,
        "kind": {"predict", "explain", "other", "kind"},
        "status": {"200", *map(str, STATUS.values())} | {"skipped", "shed", "timeout"},
        "code": {"ok", *STATUS},
        "reason": {*STATUS, "cancelled", "expired", "interrupted"},
    }  # fmt: skip
    for name, labels in before:
        for label, value in labels if name.startswith("parchgrad_") else ():
            if label in closed:
                assert value in closed[label], (name, label, value)
            assert label != "version" or value in ("", "v") or int(value) < 10, (name, value)
    assert b"zq" not in metrics.exposition()


# --- what a map costs ------------------------------------------------------------------------------------------


def job(method: str | None = None) -> Job:
    explained = Explained(-1, Options(method=method), "sum") if method else None
    return Job(np.zeros((3, 2, 2), np.float32), explained)


def ratio(model: str) -> float | None:
    return REGISTRY.get_sample_value("parchgrad_explain_cost_ratio", {"model": model, "version": "v"})


def test_the_cost_ratio_is_of_images_of_single_passes_once_both_kinds_were_seen() -> None:
    made = Cost("m", "v")
    made.add([job("gradient")] * 4, 2.0)
    assert ratio("m") in (None, 0)  # a series begins with 0
    made.add([job()] * 2, 0.25)
    assert ratio("m") == pytest.approx(0.5 / 0.125)
    made.add([job("integrated_gradients")], 1000.0)
    made.add([job("smoothgrad")], 1000.0)
    assert ratio("m") == pytest.approx(4)
    made.add([job("gradient")] * 4, 4.0)  # the batch before weighs a little less
    expected = (cost.DECAY * 2 + 4) / (cost.DECAY * 4 + 4)
    assert ratio("m") == pytest.approx(expected / 0.125)
    for _ in range(200):
        made.add([job("gradient")], 1.0)
    assert ratio("m") == pytest.approx(1 / 0.125, rel=1e-3)


def test_the_cost_ratio_is_there_after_real_requests(front: Front) -> None:
    for path in ("/predict", "/explain"):
        assert front.send("POST", path, files=files(IMAGE)).status_code == 200
    assert counted("parchgrad_explain_cost_ratio", model="tiny") > 0


async def retired(front: Front) -> None:
    """Until what was replaced or unloaded has ended."""
    await asyncio.gather(*front.pipeline.repository._retiring)


def test_what_is_unloaded_is_told_no_more(home: Home) -> None:
    front = Front(home, Device())
    try:
        for path in ("/predict", "/explain"):
            assert front.send("POST", path, files=files(IMAGE)).status_code == 200
        assert counted("parchgrad_explain_cost_ratio", model="tiny") > 0
        info = {(name, labels) for (name, labels), value in series().items() if name.endswith("model_info") and value}
        ((_, labels),) = (one for one in info if ("model", "tiny") in one[1])
        assert dict(labels) | {"device": "cpu", "version": "1"} == dict(labels)
        assert dict(labels)["runtime"].startswith("torch ")
        front.run(front.pipeline.repository.unload("tiny"))
        front.run(retired(front))
        assert counted("parchgrad_explain_cost_ratio", model="tiny") == 0
        assert counted("parchgrad_model_info", model="tiny") == 0
        assert counted("parchgrad_queue_depth_images") == 0
        front.run(front.pipeline.repository.load("tiny"))
        assert counted("parchgrad_model_info", model="tiny") == 1
        for path in ("/predict", "/explain"):
            assert front.send("POST", path, files=files(IMAGE)).status_code == 200
        front.run(front.pipeline.repository.load("tiny"))  # again: the same version goes on
        front.run(retired(front))
        assert counted("parchgrad_explain_cost_ratio", model="tiny") > 0
    finally:
        front.close()


# --- memory ----------------------------------------------------------------------------------------------------


def tree(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        file = root / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = "MemTotal:       4000 kB\nMemFree: 1 kB\n"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"proc__meminfo": MEMINFO}, 4_096_000),
        ({"proc__meminfo": MEMINFO, "proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory_dot_max": "max\n"},
         4_096_000),
        ({"proc__meminfo": MEMINFO, "proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory_dot_max": "1000\n"}, 1000),
        (
            {
                "proc__meminfo": MEMINFO,
                "proc__self__cgroup": "0::/a/b\n",
                "sys__fs__cgroup__a__b__memory_dot_max": "3000\n",
                "sys__fs__cgroup__a__memory_dot_max": "2000\n",
            },
            2000,
        ),
        (
            {
                "proc__meminfo": MEMINFO,
                "proc__self__cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
                "sys__fs__cgroup__memory__a__memory_dot_limit_in_bytes": "9223372036854771712\n",
                "sys__fs__cgroup__memory__memory_dot_limit_in_bytes": "5000\n",
            },
            5000,
        ),
        ({}, None),
    ],
    ids=["machine", "v2-unlimited", "v2", "v2-parent", "v1", "nothing"],
)  # fmt: skip
def test_the_limit_is_the_least_there_is(tmp_path: Path, texts: dict[str, str], expected: int | None) -> None:
    assert device_memory.limit_bytes(tree(tmp_path, **texts)) == expected


def test_resident_memory_is_this_process_s(tmp_path: Path) -> None:
    import psutil

    ours = psutil.Process().memory_info().rss
    assert device_memory.resident_bytes() == pytest.approx(ours, rel=0.1)
    assert device_memory.resident_bytes(tmp_path) is None
    device_memory.refresh([])
    assert counted("parchgrad_device_memory_used_bytes", device="cpu") == pytest.approx(ours, rel=0.1)
    assert counted("parchgrad_device_memory_total_bytes", device="cpu") > ours


def test_a_card_is_asked_only_where_torch_runs_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 8000

    class Cuda:
        memory_reserved = staticmethod({"cuda:1": 2000}.__getitem__)
        get_device_properties = staticmethod({"cuda:1": Card}.__getitem__)

    class Torch:
        cuda = Cuda

    monkeypatch.setitem(sys.modules, "torch", Torch)
    device_memory.refresh({"cpu", "cuda:1"})
    assert counted("parchgrad_device_memory_used_bytes", device="cuda:1") == 2000
    assert counted("parchgrad_device_memory_total_bytes", device="cuda:1") == 8000
    monkeypatch.delitem(sys.modules, "torch")
    device_memory.refresh({"cpu"})  # never asks for it


def test_a_card_whose_last_model_is_gone_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([["cuda:7"], ["cpu"], ["cpu"]])
    monkeypatch.setattr(device_memory, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(device_memory, "_of_card", lambda device: (2000, 8000))

    def devices() -> list[str]:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None  # enough seen

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(device_memory.watch(devices))
    assert counted("parchgrad_device_memory_used_bytes", device="cuda:7") == 0
    assert counted("parchgrad_device_memory_total_bytes", device="cuda:7") == 8000
    assert counted("parchgrad_device_memory_used_bytes", device="cpu") > 0


# --- several workers -------------------------------------------------------------------------------------------


def test_a_dead_worker_s_gauges_go_and_its_counters_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(kind: str, pid: int, name: str, sample: str, value: float) -> None:
        file = MmapedDict(str(tmp_path / f"{kind}_{pid}.db"))
        file.write_value(mmap_key(name, sample, [], [], "Help."), value, 0.0)
        file.close()

    dead = 2**22 + 1  # above the largest number of a process
    for pid, value in ((os.getpid(), 1.0), (dead, 5.0)):
        written("gauge_livesum", pid, "parchgrad_workers", "parchgrad_workers", value)
        written("counter", pid, "parchgrad_audit_lost", "parchgrad_audit_lost_total", value)
    monkeypatch.setenv(metrics.MULTIPROCESS_DIR, str(tmp_path))
    text = metrics.exposition().decode()
    assert "\nparchgrad_workers 1.0\n" in text
    assert "\nparchgrad_audit_lost_total 6.0\n" in text


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def pair(home: Home, tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Server]:
    chosen = {**home.settings, "workers": 2, "max_queue": 50, "timeout_ms": 120_000, "grpc_port": port}
    with serving(tmp_path_factory.mktemp("pair"), settings=chosen) as server:
        while server.metric("parchgrad_ready_workers") < 2:
            time.sleep(0.05)
        yield server


def test_two_workers_add_up_to_what_was_sent(pair: Server, port: int) -> None:
    """On connections of their own, so that both workers answer."""
    before = of_server(pair)
    plan = [name for name in REQUESTS if name != "slash"] * 3  # BentoML's own answer to that is looked at below

    def http(name: str) -> int:
        method, path, sent = REQUESTS[name][:3]
        with httpx.Client(base_url=pair.url, timeout=120) as client:
            return client.request(method, path, **sent).status_code

    def grpc(number: int) -> None:
        with InferenceServerClient(f"127.0.0.1:{port}") as client:
            client.infer("tiny", [encoded(IMAGE)], outputs=asked("logits" if number % 2 else "saliency"))
            with pytest.raises(InferenceServerException):
                client.infer("mine", [encoded(IMAGE)])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(grpc, number) for number in range(6)]
        assert list(pool.map(http, plan)) == [REQUESTS[name][6] for name in plan]
        for call in calls:
            call.result()
    after = of_server(pair)
    expected: dict[tuple[str, ...], float] = {
        ("grpc/ModelInfer", *TINY, "predict", "200", "ok"): 3,
        ("grpc/ModelInfer", *TINY, "explain", "200", "ok"): 3,
        ("grpc/ModelInfer", *NOBODY, "other", "404", "unknown_model"): 6,
        ("/metrics", *NOBODY, "other", "200", "ok"): 1,
    }
    for name in plan:
        route, model, kind, status, code = REQUESTS[name][3:]
        key = (route, *model, kind, str(status), code)
        expected[key] = expected.get(key, 0) + 1
    assert added(before, after, "parchgrad_requests_total") == expected
    timed: dict[tuple[str, ...], float] = {}
    for (*key, _, _), number in expected.items():
        timed[tuple(key)] = timed.get(tuple(key), 0) + number
    assert added(before, after, "parchgrad_request_seconds_count") == timed
    decoded = [name for name in plan if REQUESTS[name][7] == "ok" and REQUESTS[name][5] != "other"]
    late = plan.count("late")  # decoded or not: its millisecond may have ended before
    images = sum(added(before, after, "parchgrad_decode_seconds_count").values())
    assert len(decoded) + 6 <= images <= len(decoded) + 6 + late
    for gauge in ("parchgrad_admitted_images", "parchgrad_queue_depth_images"):
        while pair.metric(gauge):
            time.sleep(0.01)
    assert pair.metric("parchgrad_in_flight_requests") == 1  # this one
    assert pair.metric("parchgrad_workers") == pair.metric("parchgrad_ready_workers") == 2
    assert pair.metric("parchgrad_admitted_limit_images") == 100
    assert pair.metric("parchgrad_model_info", model="tiny") == 1
    assert pair.metric("parchgrad_explain_cost_ratio", model="tiny") > 0


def test_bentoml_s_own_routes_are_counted_and_its_metrics_are_not_there(pair: Server) -> None:
    before = of_server(pair)
    assert pair.client.get("/livez").status_code == pair.client.get("/readyz").status_code == 200
    assert pair.client.post("/predict/").status_code == 404
    assert pair.client.get("/zq/zq").status_code == 404
    after = of_server(pair)
    assert added(before, after, "parchgrad_requests_total") == {
        ("/livez", *NOBODY, "other", "200", "ok"): 1,
        ("/readyz", *NOBODY, "other", "200", "ok"): 1,
        ("other", *NOBODY, "other", "404", "not_found"): 2,
        ("/metrics", *NOBODY, "other", "200", "ok"): 1,
    }
    names = {name for name, _ in after}
    assert all(name.startswith("parchgrad_") for name in names)
    assert not any(label in ("endpoint", "path", "http_response_code") for _, labels in after for label, _ in labels)
    assert "zq" not in pair.client.get("/metrics").text


def test_both_workers_memory_is_told(pair: Server) -> None:
    for _ in range(100):  # a look may be some seconds old, and memory grows meanwhile
        told, there = pair.metric("parchgrad_device_memory_used_bytes", device="cpu"), pair.resident_bytes()
        if told == pytest.approx(there, rel=0.3):
            break
        time.sleep(0.2)
    assert told == pytest.approx(there, rel=0.3)
    assert pair.metric("parchgrad_device_memory_total_bytes", device="cpu") >= told


def test_a_killed_worker_takes_its_gauges_and_leaves_its_counts(pair: Server) -> None:
    start = pair.metric("parchgrad_requests_total", route="/predict", code="ok")
    for _ in range(6):
        with httpx.Client(base_url=pair.url, timeout=120) as client:
            assert client.post("/predict", files=files(IMAGE)).status_code == 200
    while pair.metric("parchgrad_requests_total", route="/predict", code="ok") < start + 6:
        time.sleep(0.05)  # a request is counted once its answer has gone
    before = pair.metric("parchgrad_requests_total", route="/predict", code="ok")
    images = pair.metric("parchgrad_batch_images_sum", kind="predict")
    killed, _ = pair.workers()
    killed.kill()
    killed.wait()
    fresh = httpx.Client(base_url=pair.url, timeout=120)
    while len(pair.workers()) < 2:
        time.sleep(0.05)
    while pair.metric("parchgrad_ready_workers") != 2:
        time.sleep(0.05)
    assert killed.pid not in [worker.pid for worker in pair.workers()]
    with fresh:
        assert pair.metric("parchgrad_workers") == 2
        assert pair.metric("parchgrad_admitted_limit_images") == 100
        assert fresh.post("/predict", files=files(IMAGE)).status_code == 200
        assert pair.metric("parchgrad_requests_total", route="/predict", code="ok") == before + 1
        assert pair.metric("parchgrad_batch_images_sum", kind="predict") == images + 1
        assert pair.metric("parchgrad_in_flight_requests") == 1
