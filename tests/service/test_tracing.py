"""service/tracing.py: what a collector gets of the requests to a real server."""

import base64
import secrets
import socket
import timeit
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import httpx
import numpy as np
import pytest
from tritonclient import grpc as tritonclient

from service import tracing
from service.settings import Settings, SettingsError
from tests.service.collector import Arrived, Collector, collecting
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, free_port, serving

PARTS = ("decode", "queue", "device", "render")
OURS = {"parchgrad.model.name": "tiny", "parchgrad.model.version": "1", "parchgrad.kind": "explain"}
SERVER_SPAN = 2  # of the protocol's enumeration of kinds
DELAY_MS = 300  # for two requests to meet in one batch


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def traced(home: Home, collector: Collector, grpc_port: int) -> Iterator[Server]:
    settings = home.settings | {"traces_url": collector.url, "max_delay_ms": DELAY_MS, "grpc_port": grpc_port}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds
        with serving(home.root / "bentoml_traced", settings=settings) as running:
            yield running


def traceparent(sampled: bool = True) -> tuple[str, str, dict[str, str]]:
    """A new trace's id, its caller's span and the header that says so."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, {"traceparent": f"00-{trace}-{span}-{'01' if sampled else '00'}"}


def check_whole(spans: dict[str, list[Arrived]], root: Arrived, parts: tuple[str, ...] = PARTS) -> None:
    """Each part is there, hangs under the root, lies within it, and begins after the one before it."""
    assert set(spans) == {root.name, *parts}
    assert len({span.trace for many in spans.values() for span in many}) == 1
    before = root.start
    for name in parts:
        for span in spans[name]:
            assert span.parent == root.ident
            assert before <= span.start <= span.end <= root.end
        before = spans[name][0].start


def test_a_request_has_its_four_parts(traced: Server, collector: Collector) -> None:
    trace, caller, headers = traceparent()
    answer = traced.client.post("/explain?target=1", files=files(png(picture())), headers=headers)
    assert answer.status_code == 200, answer.text
    spans = collector.trace(trace, "POST /explain")
    (root,) = spans["POST /explain"]
    assert (root.parent, root.kind) == (caller, SERVER_SPAN)  # the caller's trace goes on
    check_whole(spans, root)
    assert root.attributes.items() >= (OURS | {"http.route": "/explain", "parchgrad.code": "ok"}).items()
    assert [len(spans[name]) for name in PARTS] == [1, 1, 1, 1]
    for name in PARTS:
        assert spans[name][0].attributes.items() >= OURS.items()
        assert not spans[name][0].failed
    assert spans["decode"][0].attributes["parchgrad.image.pixels"] == 96 * 80
    (device,) = spans["device"]
    assert device.attributes["parchgrad.batch.images"] == 1
    assert device.attributes["parchgrad.batch.id"] == device.ident
    assert spans["queue"][0].end - spans["queue"][0].start >= DELAY_MS * 1e6 * 0.9  # it waited for a fuller batch
    assert spans["queue"][0].end <= device.start
    assert root.resource["service.name"] == "parchgrad"


@pytest.mark.parametrize(
    ("path", "route", "body"),
    [
        ("/predict", "/predict", None),
        ("/v1/models/tiny:predict", "/v1/models/{name}:predict", "v1"),
        ("/v2/models/tiny/infer", "/v2/models/{name}/infer", "v2"),
    ],
)
def test_every_route_that_takes_images(
    traced: Server, collector: Collector, path: str, route: str, body: str | None
) -> None:
    text = base64.b64encode(png(picture(1))).decode()
    bodies = {
        "v1": {"instances": [{"image": {"b64": text}}]},
        "v2": {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [text]}]},
    }
    trace, _, headers = traceparent()
    if body is None:
        answer = traced.client.post(path, files=files(png(picture(1))), headers=headers)
    else:
        answer = traced.client.post(path, json=bodies[body], headers=headers)
    assert answer.status_code == 200, answer.text[:500]
    spans = collector.trace(trace, f"POST {route}")
    (root,) = spans[f"POST {route}"]
    check_whole(spans, root)


def test_each_image_of_a_request_has_its_own(traced: Server, collector: Collector) -> None:
    trace, _, headers = traceparent()
    answer = traced.client.post("/predict", files=files(png(picture(1)), png(picture(2))), headers=headers)
    assert answer.status_code == 200
    spans = collector.trace(trace, "POST /predict")
    assert [len(spans[name]) for name in PARTS] == [2, 2, 2, 1]
    check_whole(spans, spans["POST /predict"][0])


def test_two_requests_of_one_batch_do_not_mix(traced: Server, collector: Collector) -> None:
    def ask(seed: int) -> str:
        trace, _, headers = traceparent()
        assert httpx.post(f"{traced.url}/explain", files=files(png(picture(seed))), headers=headers).status_code == 200
        return trace

    with ThreadPoolExecutor(2) as pool:
        both = [collector.trace(trace, "POST /explain") for trace in pool.map(ask, (3, 4))]
    for spans in both:
        check_whole(spans, spans["POST /explain"][0])
        assert [len(spans[name]) for name in PARTS] == [1, 1, 1, 1]
    first, second = sorted((spans["device"][0] for spans in both), key=lambda one: len(one.links))
    assert [one.attributes["parchgrad.batch.images"] for one in (first, second)] == [2, 2]
    assert first.attributes["parchgrad.batch.id"] == second.attributes["parchgrad.batch.id"] == first.ident
    assert (first.links, second.links) == ([], [(first.trace, first.ident)])
    assert (first.start, first.end) == (second.start, second.end)


def test_an_image_that_is_none_fails_where_it_fails(traced: Server, collector: Collector) -> None:
    trace, _, headers = traceparent()
    files_ = files(png(picture(1)), b"no image at all")
    assert traced.client.post("/predict", files=files_, headers=headers).status_code == 200
    spans = collector.trace(trace, "POST /predict")
    good, bad = sorted(spans["decode"], key=lambda one: one.failed)
    assert (good.failed, bad.failed) == (False, True)
    assert bad.attributes["error.type"] == "image_unsupported"
    assert len(spans["queue"]) == 1
    assert not spans["POST /predict"][0].failed


def test_a_request_refused_says_its_code(traced: Server, collector: Collector) -> None:
    trace, _, headers = traceparent()
    answer = traced.client.post("/predict?top_k=11", files=files(png(picture())), headers=headers)
    assert answer.status_code == 422
    spans = collector.trace(trace, "POST /predict")
    (root,) = spans["POST /predict"]
    assert root.attributes["parchgrad.code"] == "option_invalid"
    assert (set(spans), root.failed) == ({"POST /predict"}, False)  # the caller's fault, none of the server's


def test_an_image_whose_time_is_up_in_the_queue(traced: Server, collector: Collector) -> None:
    trace, _, headers = traceparent()
    answer = traced.client.post(f"/predict?timeout_ms={DELAY_MS // 2}", files=files(png(picture())), headers=headers)
    assert answer.status_code == 504
    spans = collector.trace(trace, "POST /predict")
    assert spans["queue"][0].failed
    assert spans["queue"][0].attributes["error.type"] in ("expired", "cancelled")
    assert spans["POST /predict"][0].failed
    assert spans["POST /predict"][0].attributes["error.type"] == "deadline_exceeded"


def test_paths_are_no_names_and_probes_are_no_traces(traced: Server, collector: Collector) -> None:
    trace, _, headers = traceparent()
    for path in ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"):
        assert traced.client.get(path, headers=headers).status_code == 200
    assert traced.client.get("/no/such/path", headers=headers).status_code == 404
    assert set(collector.trace(trace, "GET")) == {"GET"}
    assert len(collector.trace(trace, "GET")["GET"]) == 1


def test_a_bad_baggage_is_not_read(traced: Server, collector: Collector) -> None:
    """Each of its entries would be a warning in the log, from callers without any key."""
    trace, _, headers = traceparent()
    before = len(traced.log.read_text().splitlines())
    baggage = ",".join(f"k {i}=v" for i in range(100)).encode() + b",k\xff=v"
    sent = [(name.encode(), value.encode()) for name, value in headers.items()] + [(b"baggage", baggage)]
    assert traced.client.get("/nothing", headers=sent).status_code == 404
    collector.trace(trace, "GET")
    assert len(traced.log.read_text().splitlines()) <= before + 3


def test_a_caller_who_does_not_trace_is_not_traced(traced: Server, collector: Collector) -> None:
    not_sampled, _, headers = traceparent(sampled=False)
    assert traced.client.post("/predict", files=files(png(picture())), headers=headers).status_code == 200
    trace, _, headers = traceparent()
    assert traced.client.post("/predict", files=files(png(picture())), headers=headers).status_code == 200
    collector.trace(trace, "POST /predict")
    assert not [span for span in collector.spans if span.trace == not_sampled]


def test_a_pipelined_request_is_no_part_of_the_one_before(traced: Server, collector: Collector) -> None:
    """Both in one piece: uvicorn begins the second within the first one's task."""
    (one, _, first), (two, _, second) = traceparent(), traceparent()
    host, port = traced.url.removeprefix("http://").split(":")
    asked = "".join(
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\ntraceparent: {headers['traceparent']}\r\nX-Request-Id: {ident}\r\n\r\n"
        for path, headers, ident in (("/models", first, "the-first"), ("/models/tiny", second, "the-second"))
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(asked.encode())
        assert set(collector.trace(one, "GET /models")) == {"GET /models"}
        assert set(collector.trace(two, "GET /models/{name}")) == {"GET /models/{name}"}


def test_a_grpc_call_goes_on_with_its_callers_trace(traced: Server, collector: Collector, grpc_port: int) -> None:
    trace, caller, headers = traceparent()
    root_name = "inference.GRPCInferenceService/ModelInfer"
    client = tritonclient.InferenceServerClient(f"127.0.0.1:{grpc_port}")
    tensor = tritonclient.InferInput("image_bytes", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([png(picture(5))], dtype=np.object_))
    try:
        client.is_server_live(headers=headers)
        client.infer("tiny", [tensor], headers=headers)
        spans = collector.trace(trace, root_name)
        (root,) = spans[root_name]
        assert (root.parent, root.kind) == (caller, SERVER_SPAN)
        assert root.attributes.items() >= (OURS | {"rpc.system": "grpc", "rpc.grpc.status_code": 0}).items()
        check_whole(spans, root)
        trace, _, headers = traceparent()
        with pytest.raises(tritonclient.InferenceServerException, match="NOT_FOUND"):
            client.infer("other", [tensor], headers=headers)
    finally:
        client.close()
    (root,) = collector.trace(trace, root_name)[root_name]
    assert (root.attributes["rpc.grpc.status_code"], root.attributes["parchgrad.code"]) == (5, "unknown_model")


def test_the_last_spans_are_sent_before_the_end(
    home: Home, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter itself would send them ten minutes later."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    settings = home.settings | {"traces_url": f"{collector.url}/v1/traces"}
    trace, _, headers = traceparent()
    with serving(home.root / "bentoml_last", settings=settings) as server:
        assert server.client.post("/predict", files=files(png(picture())), headers=headers).status_code == 200
        assert server.stop() == 0
    assert {span.name for span in collector.spans if span.trace == trace} == {"POST /predict", *PARTS}


def test_sample_0_sends_only_what_a_caller_has_chosen(home: Home) -> None:
    with collecting() as collector:
        settings = home.settings | {"traces_url": collector.url, "traces_sample": 0}
        trace, _, headers = traceparent()
        with serving(home.root / "bentoml_sample", settings=settings) as server:
            assert server.client.post("/predict", files=files(png(picture()))).status_code == 200
            assert server.client.post("/predict", files=files(png(picture())), headers=headers).status_code == 200
            assert server.stop() == 0
    assert {span.trace for span in collector.spans} == {trace}


def test_without_a_collector_answers_are_what_they_were(home: Home) -> None:
    settings = home.settings | {"traces_url": f"http://127.0.0.1:{free_port()}"}
    with serving(home.root / "bentoml_down", settings=settings) as server:
        for seed in range(3):
            assert server.client.post("/explain", files=files(png(picture(seed)))).status_code == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("http://tempo:4318", "http://tempo:4318/v1/traces"),
        ("http://tempo:4318/", "http://tempo:4318/v1/traces"),
        ("https://there/otlp/v1/traces", "https://there/otlp/v1/traces"),
    ],
)
def test_the_collectors_address(url: str, full: str) -> None:
    assert tracing.endpoint(Settings.from_environment({"PARCHGRAD_TRACES_URL": url}).traces_url) == full


@pytest.mark.parametrize("url", ["tempo:4318", "ftp://tempo", "http://me:secret@tempo", "http://tempo\nX", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="expected http"):
        Settings.from_environment({"PARCHGRAD_TRACES_URL": url})


def test_without_the_exporter_it_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EXPORTER", "opentelemetry.exporter.not_there.http")
    tracing.check(Settings())
    with pytest.raises(SettingsError, match=r"PARCHGRAD_TRACES_URL='http://tempo': .*parchgrad\[tracing\]"):
        tracing.check(Settings(traces_url="http://tempo"))


def test_nothing_is_made_where_traces_are_off() -> None:
    """And it costs next to nothing; the figures are in docs/tracing.md."""
    context, calls = copy_context(), 10_000
    assert tracing.install(Settings()) == {}
    parts = {
        "called": lambda: tracing.called("decode", int),
        "note": lambda: tracing.note("image.pixels", 1),
        "queued": lambda: tracing.queued(context, 0.0, "m", "1", "predict"),
        "device": lambda: tracing.device([context], "m", "1", "predict").__exit__(None, None, None),
        "copy_context": copy_context,
    }
    for name, part in parts.items():
        print(f"{name}: {min(timeit.repeat(part, number=calls, repeat=5)) / calls * 1e9:.0f} ns")
    assert tracing.called("decode", int, "7") == 7
