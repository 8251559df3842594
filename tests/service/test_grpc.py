"""The Open Inference Protocol over gRPC, asked by the stock client of Triton, and what of it needs no server."""

import asyncio
import concurrent.futures
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc.aio
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import parchgrad
from service.access import Access
from service.errors import STATUS, ServiceError
from service.pipeline import Pipeline
from service.protocols import grpc_calls, grpc_messages, grpc_server
from service.protocols.open_inference import MAX_JSON_ELEMENTS, InferResponse, Tensor, raw_bytes
from service.settings import Settings, SettingsError
from tests.service.conftest import COVERED, LABELS, Home, picture, png
from tests.service.serving import PROJECT_ROOT, Server, free_port, serving
from tests.service.test_open_inference import tensors
from tests.service.test_server import distance, explain, saliency

CALLER, ADMIN = "a caller's token", "an operator's token"
OUTPUTS = ("logits", "probabilities", "target", "saliency")
INFER = "/inference.GRPCInferenceService/ModelInfer"
SLOW = {"method": "smoothgrad"}
BUSY_CALLS = 20  # of 16 images


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(home: Home, port: int) -> Iterator[Server]:
    with serving(home.root / "grpc", settings={**home.settings, "grpc_port": port, "max_queue": 2000}) as running:
        yield running


@pytest.fixture
def triton(server: Server, port: int) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def tensor(name: str, data: np.ndarray) -> InferInput:
    made = InferInput(name, list(data.shape), np_to_triton_dtype(data.dtype))
    made.set_data_from_numpy(data)
    return made


def encoded(*contents: bytes) -> InferInput:
    return tensor("image_bytes", np.array(contents, np.object_))


def asked(*names: str) -> list[InferRequestedOutput]:
    return [InferRequestedOutput(name) for name in names]


def refused(code: str, words: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **named)
    assert caught.value.status() == f"StatusCode.{code}", caught.value
    assert words in caught.value.message()


# --- what serves -------------------------------------------------------------------------------------------


def test_health_and_metadata(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert triton.is_model_ready("tiny", "1")
    refused("NOT_FOUND", "no model 'other'", triton.is_model_ready, "other")
    about = triton.get_server_metadata()
    assert (about.name, about.version) == ("parchgrad", parchgrad.__version__)
    model = triton.get_model_metadata("tiny", "1")
    assert (model.name, list(model.versions)) == ("tiny", ["1"])
    assert {one.name: (one.datatype, list(one.shape)) for one in model.inputs} == {
        "images": ("FP32", [-1, 3, 64, 64]), "image_bytes": ("BYTES", [-1]), "target": ("INT64", [-1]),
        "quantile": ("FP32", [-1]), "gamma": ("FP32", [-1]),
    }  # fmt: skip
    assert {one.name: (one.datatype, list(one.shape)) for one in model.outputs} == {
        "logits": ("FP32", [-1, 10]), "probabilities": ("FP32", [-1, 10]), "target": ("INT64", [-1]),
        "saliency": ("FP32", [-1, 64, 64]),
    }  # fmt: skip
    config = triton.get_model_config("tiny").config
    assert (config.name, config.max_batch_size) == ("tiny", 16)
    assert json.loads(config.parameters["labels"].string_value) == LABELS
    (listed,) = triton.get_model_repository_index().models
    assert (listed.name, listed.version, listed.state) == ("tiny", "1", "READY")


def test_what_is_not_offered_says_so(triton: InferenceServerClient) -> None:
    refused("UNIMPLEMENTED", "ModelStatistics is not offered", triton.get_inference_statistics)
    refused("UNIMPLEMENTED", "TraceSetting is not offered", triton.get_trace_settings)
    refused("UNIMPLEMENTED", "SystemSharedMemoryStatus is not offered", triton.get_system_shared_memory_status)
    refused("PERMISSION_DENIED", "PARCHGRAD_ADMIN_KEYS", triton.load_model, "tiny")
    said: list[Any] = []
    triton.start_stream(lambda result, error: said.append(error))
    while not said:
        time.sleep(0.01)
    triton.stop_stream()
    assert "ModelStreamInfer is not offered" in str(said[0])


# --- inference ---------------------------------------------------------------------------------------------


def test_encoded_images_give_the_map_of_http(triton: InferenceServerClient, server: Server) -> None:
    images = [png(picture(seed)) for seed in (1, 2, 3)]
    result = triton.infer("tiny", [encoded(*images), tensor("target", np.array([2, 5, 7]))], request_id="mine")
    assert result.get_response().id == "mine"
    assert result.get_response().parameters["explanation_status"].string_param == "ok,ok,ok"
    for i, image in enumerate(images):
        native = explain(server, image, target=str([2, 5, 7][i]))
        assert distance(result.as_numpy("saliency")[i], saliency(native)) < 1e-4
        for one in native["predictions"]:
            assert result.as_numpy("probabilities")[i, one["index"]] == pytest.approx(one["probability"], rel=1e-4)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_normalised_images_give_the_library_s_values(port: int, server: Server, home: Home, raw: bool) -> None:
    explainer = home.explainer()
    pictures = np.stack([explainer.model.preprocessing.apply(picture(seed))[0].numpy() for seed in (1, 2)])
    given = service_pb2.ModelInferRequest(
        model_name="tiny",
        model_version="1",
        inputs=[
            {"name": "images", "datatype": "FP32", "shape": pictures.shape},
            {"name": "quantile", "datatype": "FP32", "shape": [2]},
        ],
        parameters={"target": service_pb2.InferParameter(int64_param=3)},
    )
    if raw:
        given.raw_input_contents.extend([pictures.tobytes(), np.array([0.1, 0.4], np.float32).tobytes()])
    else:
        given.inputs[0].contents.fp32_contents.extend(pictures.ravel())
        given.inputs[1].contents.fp32_contents.extend([0.1, 0.4])
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(
            INFER, service_pb2.ModelInferRequest.SerializeToString, service_pb2.ModelInferResponse.FromString
        )
        result = InferResult(call(given))
    expected = explainer.explain(torch.from_numpy(pictures), 3, quantile=[0.1, 0.4])
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits.numpy(), rtol=1e-4, atol=1e-4)
    assert result.as_numpy("target").tolist() == [3, 3]
    for ours, theirs in zip(result.as_numpy("saliency"), expected.saliency().numpy(), strict=True):
        assert distance(ours, theirs) < 1e-4


def test_only_what_is_asked_for_is_computed(triton: InferenceServerClient, server: Server) -> None:
    before = server.metric("parchgrad_queue_seconds_count", kind="explain")
    result = triton.infer("tiny", [encoded(png(picture()))], outputs=asked("logits"))
    assert [one.name for one in result.get_response().outputs] == ["logits"]
    assert "explanation_status" not in result.get_response().parameters
    assert server.metric("parchgrad_queue_seconds_count", kind="explain") == before
    result = triton.infer("tiny", [encoded(png(picture()))], outputs=asked("saliency", "target"))
    assert [one.name for one in result.get_response().outputs] == ["target", "saliency"]
    assert server.metric("parchgrad_queue_seconds_count", kind="explain") == before + 1


def test_a_target_without_a_row_has_a_map_of_nan(triton: InferenceServerClient) -> None:
    result = triton.infer("tiny", [encoded(png(picture()))], parameters={"target": COVERED + 1})
    assert np.isnan(result.as_numpy("saliency")).all()
    assert result.get_response().parameters["explanation_status"].string_param == "error"


def test_the_async_client_asks_side_by_side(server: Server, port: int) -> None:
    images = [png(picture(seed)) for seed in range(12)]

    async def all_of_them() -> list[Any]:
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            return await asyncio.gather(*(client.infer("tiny", [encoded(image)]) for image in images))

    for image, result in zip(images, asyncio.run(all_of_them()), strict=True):
        native = explain(server, image)
        if "saliency" in native["explanation"]:
            assert distance(result.as_numpy("saliency")[0], saliency(native)) < 1e-4
        else:
            assert np.isnan(result.as_numpy("saliency")).all()


# --- errors ------------------------------------------------------------------------------------------------

GOOD = encoded(png(picture()))


@pytest.mark.parametrize(
    ("inputs", "named", "code", "words"),
    [
        ([GOOD], {"model_name": "other"}, "NOT_FOUND", "no model 'other'"),
        ([GOOD], {"model_version": "7"}, "NOT_FOUND", "no version '7'"),
        ([tensor("images", np.zeros((1, 3, 64, 63), np.float32))], {}, "INVALID_ARGUMENT", "shape [1, 3, 64, 63]"),
        ([tensor("images", np.zeros((1, 3, 64, 64)))], {}, "INVALID_ARGUMENT", "has datatype FP64; expected FP32"),
        ([tensor("pictures", np.zeros(1))], {}, "INVALID_ARGUMENT", "Give one of the inputs"),
        ([GOOD, tensor("mask", np.zeros(1))], {}, "INVALID_ARGUMENT", "no input 'mask'"),
        ([GOOD, GOOD], {}, "INVALID_ARGUMENT", "Input 'image_bytes' is given twice"),
        ([GOOD], {"outputs": asked("heat")}, "INVALID_ARGUMENT", "no output 'heat'"),
        ([GOOD], {"outputs": [InferRequestedOutput("logits", 3)]}, "INVALID_ARGUMENT", "'classification' is not"),
        ([GOOD], {"parameters": {"quantile": 2.5}}, "INVALID_ARGUMENT", "Option 'quantile' is '2.5'"),
        ([GOOD], {"parameters": {"target": "no such thing"}}, "INVALID_ARGUMENT", "no such thing"),
        ([GOOD], {"parameters": {"colormap": "jet"}}, "INVALID_ARGUMENT", "Parameter 'colormap' is not known"),
        ([encoded(b"no picture")], {}, "INVALID_ARGUMENT", "not an image of a known format"),
        ([encoded(png(picture()), b"")], {}, "INVALID_ARGUMENT", "Image 1: "),
        ([encoded(*[png(picture())] * 17)], {}, "RESOURCE_EXHAUSTED", "at most 16"),
        ([GOOD], {"compression_algorithm": "gzip"}, "UNIMPLEMENTED", "gzip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(triton: InferenceServerClient, inputs: list[InferInput], named: Any, code: str, words: str) -> None:
    refused(code, words, triton.infer, inputs=inputs, **{"model_name": "tiny", **named})


def test_errors_carry_the_request_s_id_and_our_code(port: int, server: Server) -> None:
    before = server.metric("parchgrad_requests_total", route="grpc/ModelInfer", status="404")
    message = service_pb2.ModelInferRequest(model_name="other").SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(message, metadata=(("x-request-id", "abc-1"),))
        assert dict(caught.value.trailing_metadata()) == {"x-request-id": "abc-1", "error-code": "unknown_model"}
        _, call = channel.unary_unary(INFER.replace("ModelInfer", "ServerLive")).with_call(b"")
        assert len(dict(call.trailing_metadata())["x-request-id"]) == 32
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "The message is no ModelInferRequest."
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(INFER)(iter(()))
        assert caught.value.details() == "The call ended without a message."
    assert server.metric("parchgrad_requests_total", route="grpc/ModelInfer", status="404") == before + 1


def test_every_error_of_ours_has_a_code() -> None:
    assert set(grpc_calls.CODE_OF_STATUS) == set(STATUS.values())


# --- deadlines and cancelling ------------------------------------------------------------------------------


@pytest.fixture
def busy(server: Server, triton: InferenceServerClient) -> Iterator[None]:
    """The maps' lane has more to do than any test waits for; withdrawn at the end."""
    images, ended = encoded(*[png(picture())] * 16), []
    parameters = {**SLOW, "samples": 100, "timeout_ms": 120_000}
    calls = [
        triton.async_infer("tiny", [images], lambda result, error: ended.append((result, error)), parameters=parameters)
        for _ in range(BUSY_CALLS)
    ]
    while server.metric("parchgrad_admitted_images") < 16 * BUSY_CALLS:
        assert not ended, ended
        time.sleep(0.05)
    yield
    for call in calls:
        call.cancel()
    while server.metric("parchgrad_admitted_images"):
        time.sleep(0.1)


@pytest.mark.usefixtures("busy")
def test_a_cancelled_call_is_not_computed(server: Server, triton: InferenceServerClient) -> None:
    def admitted() -> float:
        return server.metric("parchgrad_admitted_images")

    before, closed = admitted(), server.metric("parchgrad_requests_total", route="grpc/ModelInfer", status="499")
    ended: list[Any] = []
    call = triton.async_infer("tiny", [GOOD], lambda result, error: ended.append(error))
    while admitted() != before + 1:
        time.sleep(0.01)
    call.cancel()
    while admitted() != before:
        time.sleep(0.01)
    while not ended:
        time.sleep(0.01)
    assert ended[0].status() == "StatusCode.CANCELLED"
    assert server.metric("parchgrad_requests_total", route="grpc/ModelInfer", status="499") == closed + 1


@pytest.mark.usefixtures("busy")
def test_the_call_s_deadline_is_the_images_(server: Server, triton: InferenceServerClient) -> None:
    """The map is late and the prediction comes in time; a client that gives less gets neither."""
    result = triton.infer("tiny", [GOOD], client_timeout=8)
    assert result.get_response().parameters["explanation_status"].string_param == "timeout"
    assert np.isnan(result.as_numpy("saliency")).all()
    assert result.as_numpy("probabilities").sum() == pytest.approx(1, rel=1e-5)
    before = server.metric("parchgrad_admitted_images")
    refused("DEADLINE_EXCEEDED", "", triton.infer, "tiny", [GOOD], client_timeout=0.001)
    refused("DEADLINE_EXCEEDED", "", triton.infer, "tiny", [GOOD], parameters={"timeout_ms": 1})
    while server.metric("parchgrad_admitted_images") > before:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("parameters", "seconds", "expected"),
    [
        ({"quantile": 0.1}, None, {"quantile": 0.1}),
        ({}, 1.2345, {"timeout_ms": 1234}),
        ({"timeout": 0}, 2.0, {"timeout": 0, "timeout_ms": 2000}),
        ({"timeout": 5000}, 2.0, {"timeout": 5000}),
        ({"timeout_ms": 7}, 2.0, {"timeout_ms": 7}),
        ({}, 1e9, {"timeout_ms": 120_000}),
        ({}, 0.0, {"timeout_ms": 1}),
    ],
)
def test_a_deadline_is_a_timeout(parameters: dict[str, Any], seconds: float | None, expected: dict[str, Any]) -> None:
    assert grpc_calls.timed(parameters, seconds, Settings()) == expected


# --- keys and limits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """Keys, an audit log, and limits soon reached."""

    def entry(name: str, token: str, rate: str = "") -> str:
        return f"{name}:{hashlib.sha256(token.encode()).hexdigest()}{rate}"

    root, port = tmp_path_factory.mktemp("guarded"), free_port()
    narrow = {"max_images": 2, "max_queue": 2, "shed_above": 2, "max_image_bytes": 100_000, "body_timeout_ms": 500}
    keys = {
        "api_keys": f"{entry('caller', CALLER)},{entry('rare', 'seldom', ':2')}",
        "admin_keys": entry("operator", ADMIN),
    }
    settings = {**home.settings, **narrow, **keys, "grpc_port": port, "audit_log": root / "audit.jsonl"}
    with serving(root, settings=settings) as running:
        yield running, port


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_keys_are_asked_for(guarded: tuple[Server, int]) -> None:
    with InferenceServerClient(f"127.0.0.1:{guarded[1]}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        refused("UNAUTHENTICATED", "A key is needed", client.infer, "tiny", [GOOD])
        refused("UNAUTHENTICATED", "A key is needed", client.is_model_ready, "tiny")
        refused("UNAUTHENTICATED", "not known", client.infer, "tiny", [GOOD], headers=bearer("wrong"))
        assert client.infer("tiny", [GOOD], headers={"x-api-key": CALLER}).as_numpy("logits").shape == (1, 10)
        refused("PERMISSION_DENIED", "Key 'caller' may not", client.load_model, "tiny", headers=bearer(CALLER))


def test_a_caller_without_a_key_is_refused_before_its_message(guarded: tuple[Server, int]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{guarded[1]}") as channel:
        with held() as messages, pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(INFER)(messages)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with held() as messages, pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(INFER)(messages, metadata=tuple(bearer(CALLER).items()))
        assert caught.value.details() == "The message did not arrive within 500 ms."


def test_a_key_s_rate_is_said(guarded: tuple[Server, int]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{guarded[1]}") as channel:
        call, metadata = channel.unary_unary(INFER.replace("ModelInfer", "ServerMetadata")), bearer("seldom").items()
        for _ in range(2):
            call(b"", metadata=tuple(metadata))
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", metadata=tuple(metadata))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    said = dict(caught.value.trailing_metadata())
    assert said["error-code"] == "rate_limited"
    assert 1 <= int(said["retry-after"]) <= 60


def test_models_are_loaded_and_unloaded(guarded: tuple[Server, int]) -> None:
    with InferenceServerClient(f"127.0.0.1:{guarded[1]}") as client:
        operator, caller = bearer(ADMIN), bearer(CALLER)
        refused("INVALID_ARGUMENT", "'config' is refused", client.load_model, "tiny", operator, "{}")
        refused("NOT_FOUND", "no model 'other'", client.load_model, "other", operator)
        client.unload_model("tiny", operator)
        refused("NOT_FOUND", "Model 'tiny' was unloaded", client.infer, "tiny", [GOOD], headers=caller)
        assert not client.get_model_repository_index(caller).models
        client.load_model("tiny", operator)
        assert client.is_model_ready("tiny", headers=caller)


def test_each_answer_is_in_the_audit_log(guarded: tuple[Server, int]) -> None:
    server, port = guarded
    with InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.infer("tiny", [GOOD], headers={**bearer(CALLER), "x-request-id": "audited"})
    lines = [json.loads(line) for line in (server.log.parent / "audit.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["request_id"] == "audited")
    assert (line["route"], line["caller"]) == ("grpc/ModelInfer", "caller")
    assert line["image_sha256"] == hashlib.sha256(png(picture())).hexdigest()


def test_messages_and_queue_are_bounded(guarded: tuple[Server, int]) -> None:
    with InferenceServerClient(f"127.0.0.1:{guarded[1]}") as client:
        caller = bearer(CALLER)
        refused(
            "RESOURCE_EXHAUSTED", "larger than max", client.infer, "tiny", [encoded(bytes(300_000))], headers=caller
        )
        refused("RESOURCE_EXHAUSTED", "100000", client.infer, "tiny", [encoded(bytes(100_001))], headers=caller)

        def ask(_: int) -> str:
            try:
                client.infer("tiny", [GOOD], headers=caller, parameters=SLOW)
            except InferenceServerException as error:
                return str(error.status())
            return "OK"

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            assert set(pool.map(ask, range(12))) == {"OK", "StatusCode.RESOURCE_EXHAUSTED"}
        assert client.infer("tiny", [GOOD], headers=caller).as_numpy("logits").shape == (1, 10)


@contextmanager
def held() -> Iterator[Iterator[bytes]]:
    """A client's stream of messages that brings none, until the block ends."""
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait()
        yield from ()

    try:
        yield nothing()
    finally:
        end.set()


# --- lifecycle ---------------------------------------------------------------------------------------------


def test_two_workers_share_the_port_and_stop_in_peace(home: Home, tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, settings={**home.settings, "grpc_port": port, "workers": 2}) as server, ExitStack() as stack:
        while server.metric("parchgrad_ready_workers") < 2:
            time.sleep(0.2)
        alone = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        clients = [
            stack.enter_context(InferenceServerClient(f"127.0.0.1:{port}", channel_args=alone)) for _ in range(24)
        ]
        for client in clients:
            assert client.infer("tiny", [GOOD], outputs=asked("logits")).as_numpy("logits").shape == (1, 10)
        there = [one.pid for one in psutil.net_connections("tcp") if one.laddr.port == port and one.raddr]
        connections = [there.count(worker.pid) for worker in server.workers()]
        assert len(connections) == 2
        assert sum(connections) == 24
        assert min(connections) > 0
        ended: list[Any] = []
        clients[0].async_infer(
            "tiny",
            [encoded(*[png(picture())] * 8)],
            lambda result, error: ended.append((result, error)),
            parameters=SLOW,
        )
        while server.metric("parchgrad_queue_seconds_count", kind="explain") == 0:
            time.sleep(0.01)
        assert server.stop() == 0
        while not ended:
            time.sleep(0.01)
        ((result, error),) = ended
        assert error is None  # what was in flight finished
        assert np.isfinite(result.as_numpy("logits")).all()
        refused("UNAVAILABLE", "", clients[0].infer, "tiny", [GOOD])
        assert "Traceback" not in server.log.read_text()


def test_a_port_in_use_is_refused_at_start(home: Home, tmp_path: Path) -> None:
    """The workers' way of sharing would else split the callers between two services."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        wrong = serving(tmp_path, settings={**home.settings, "grpc_port": port})
        with pytest.raises(RuntimeError, match=f"PARCHGRAD_GRPC_PORT='{port}': expected a port that is free"), wrong:
            pass


def test_nothing_is_asked_for_where_it_is_off() -> None:
    grpc_server.check(Settings(), "127.0.0.1")
    server = grpc_server.GrpcServer(Pipeline.__new__(Pipeline), Access(()))
    server._pipeline.settings = Settings()
    asyncio.run(server.start())
    asyncio.run(server.close())


def test_grpc_is_imported_only_where_it_is_on() -> None:
    code = "import sys, service.service; print([m for m in ('torch', 'grpc') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"PARCHGRAD_GRPC_PORT='8001': .*parchgrad\[grpc\]"):
        grpc_server.check(Settings(grpc_port=8001), None)


@click.command()
@click.option("--fd", type=int)
@click.option("--ssl-certfile")
def bentoml(**options: Any) -> None:
    """A command line as BentoML's."""


def test_tls_is_not_left_out_in_silence() -> None:
    with bentoml.make_context("serve", ["--ssl-certfile", "a.pem"]), pytest.raises(SettingsError, match="no TLS"):
        grpc_server.check(Settings(grpc_port=8001), "127.0.0.1")


def test_the_address_is_that_of_http() -> None:
    with socket.socket() as http:
        http.bind(("127.0.0.3", 0))
        with bentoml.make_context("worker", ["--fd", str(http.fileno())]):
            assert grpc_server.http_host() == "127.0.0.3"
        assert http.getsockname()[0] == "127.0.0.3"  # still open
    assert grpc_server.http_host() == "127.0.0.1"


# --- messages ----------------------------------------------------------------------------------------------


def written(tensors: list[np.ndarray], *, raw: bool) -> "service_pb2.ModelInferRequest":
    message = service_pb2.ModelInferRequest(id="i")
    for i, data in enumerate(tensors):
        datatype = np_to_triton_dtype(data.dtype)
        one = message.inputs.add(name=f"x{i}", datatype=datatype, shape=data.shape)
        if raw:
            message.raw_input_contents.append(raw_bytes(Tensor("", datatype, data)))
        else:
            getattr(one.contents, grpc_messages.CONTENTS[datatype]).extend(data.ravel().tolist())
    return message


@settings(deadline=None)
@given(st.lists(tensors(), max_size=4), st.booleans())
def test_tensors_survive(given: list[np.ndarray], raw: bool) -> None:
    if not raw:
        given = [data for data in given if data.dtype != np.float16]  # which the protocol has only as raw bytes
    request = grpc_messages.decode(written(given, raw=raw))
    assert request.id == "i"
    for i, data in enumerate(given):
        read = request.inputs[f"x{i}"].data
        assert (read.shape, read.dtype) == (data.shape, data.dtype)
        assert read.tolist() == data.tolist()


@settings(deadline=None)
@given(st.lists(tensors(), max_size=4))
def test_the_stock_client_reads_what_is_written(given: list[np.ndarray]) -> None:
    outputs = [Tensor(f"y{i}", np_to_triton_dtype(data.dtype), data) for i, data in enumerate(given)]
    said = {"yes": True, "n": 3, "x": 0.1, "text": "ja"}
    message = grpc_messages.encode(InferResponse("m", "3", outputs, "i", said))
    message = service_pb2.ModelInferResponse.FromString(message.SerializeToString())
    assert (message.model_name, message.model_version, message.id) == ("m", "3", "i")
    assert grpc_messages.parameters(message.parameters) == said
    for one in outputs:
        assert InferResult(message).as_numpy(one.name).tolist() == one.data.tolist()


def one_input(datatype: str = "FP32", shape: tuple[int, ...] = (2,), **contents: Any) -> dict[str, Any]:
    described = {"name": "x", "datatype": datatype, "shape": shape}
    return {"inputs": [{**described, "contents": contents} if contents else described]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (one_input(fp64_contents=[1, 2]), "is FP32 and has fp64_contents; allowed: fp32_contents"),
        (one_input("FP16", fp32_contents=[1, 2]), "is FP16 and has fp32_contents; allowed: raw_input_contents"),
        (one_input(fp32_contents=[1]), "not 2 elements"),
        (one_input(), "not 2 elements"),
        (one_input("INT8", int_contents=[1, 128]), "a number that INT8 does not hold"),
        (one_input("FP31", fp32_contents=[1, 2]), "is FP31 and has fp32_contents"),
        (one_input(shape=(-1, 2), fp32_contents=[1, 2]), "negative side"),
        (one_input(fp32_contents=[0] * (MAX_JSON_ELEMENTS + 1)), "send raw_input_contents"),
        (one_input() | {"raw_input_contents": [bytes(7)]}, "8 bytes; it carries 7"),
        (one_input(fp32_contents=[1, 2]) | {"raw_input_contents": [bytes(8)]}, "no contents, or none at all"),
        (one_input() | {"raw_input_contents": [bytes(8), bytes(8)]}, "has 1 inputs and 2 raw_input_contents"),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, "Output 'y' is given twice"),
        ({"parameters": {"p": service_pb2.InferParameter()}}, "Parameter 'p' has no value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_that_contradict_themselves(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ServiceError) as caught:
        grpc_messages.decode(service_pb2.ModelInferRequest(**fields))
    assert caught.value.code == "malformed_request"
    assert words in caught.value.message


def test_shared_memory_is_refused() -> None:
    one = {"name": "x", "parameters": {"shared_memory_region": service_pb2.InferParameter(string_param="r")}}
    with pytest.raises(ServiceError, match="'shared_memory_region' is not supported") as caught:
        grpc_messages.decode(service_pb2.ModelInferRequest(inputs=[one]))
    assert caught.value.code == "option_unsupported"
