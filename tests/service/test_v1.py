"""KServe's protocol V1 against the running service: its own client, the native routes' values, and what is refused."""

import base64
import json
import random
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from service.errors import ServiceError
from service.protocols.inference import BASE64_PIECE, from_base64
from service.schemas import Prediction
from tests.service import kserve_client
from tests.service.conftest import COVERED, LABELS, Home, picture, png
from tests.service.serving import Server
from tests.service.test_server import distance, explain, saliency


def instance(image: bytes, **options: Any) -> dict[str, Any]:
    return {"image": {"b64": base64.b64encode(image).decode()}, **options}


def ask(server: Server, verb: str, *instances: Any, model: str = "tiny") -> httpx.Response:
    return server.client.post(f"/v1/models/{model}:{verb}", json={"instances": list(instances)})


def answered(server: Server, verb: str, *instances: Any) -> dict[str, Any]:
    response = ask(server, verb, *instances)
    assert response.status_code == 200, response.text
    return dict(response.json())


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    (name, message) = response.json().popitem()
    assert name == "error"
    return str(message)


def test_models_and_their_readiness(server: Server) -> None:
    assert server.client.get("/v1/models").json() == {"models": ["tiny"]}
    assert server.client.get("/v1/models/tiny").json() == {"name": "tiny", "ready": True}
    assert "no model 'other'" in refused(server.client.get("/v1/models/other"), 404)


def test_kserve_s_client(server: Server, home: Home) -> None:
    image, explainer = picture(2), home.explainer()
    tensor = explainer.model.preprocessing.apply(image)[0][None]
    encoded = np.frombuffer(png(image), np.uint8)
    answer = kserve_client.ask(server.url, "v1", image=encoded, target=np.array(3))
    assert answer["ready"] is True
    expected = explainer.explain(tensor, 3)
    probabilities = expected.probabilities()[0]
    for kind in ("predict", "explain"):
        (predictions,) = answer[kind]["predictions"]
        assert [one["index"] for one in predictions] == probabilities.argsort(descending=True).tolist()[:5]
        for one in predictions:
            Prediction.model_validate(one)
            assert one["probability"] == pytest.approx(float(probabilities[one["index"]]), rel=1e-4)
    assert "explanations" not in answer["predict"]
    (explanation,) = answer["explain"]["explanations"]
    assert explanation["target"]["index"] == 3
    assert distance(np.array(explanation["saliency"]["data"]), expected.saliency()[0].numpy()) < 1e-4


def test_every_instance_has_options_of_its_own(server: Server) -> None:
    images = [png(picture(seed)) for seed in (1, 2, 3)]
    options: list[dict[str, Any]] = [
        {"target": 2, "saliency": "float32"},
        {"target": "thing 5", "saliency": "float32", "quantile": 0.3, "gamma": 2, "conserve": "exact", "top_k": 2},
        {"saliency": "float32", "method": "input_x_gradient", "rule": False},
    ]
    answer = answered(server, "explain", *(instance(image, **one) for image, one in zip(images, options, strict=True)))
    assert [len(one) for one in answer["predictions"]] == [5, 2, 5]
    for image, one, explanation in zip(images, options, answer["explanations"], strict=True):
        texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in one.items()}
        native = explain(server, image, **texts)
        assert distance(saliency({"explanation": explanation}), saliency(native)) < 1e-4
        effective = {"target", "quantile", "gamma", "method", "rule", "conserve", "quality", "transform"}
        for name in effective - {"target", "quality"}:
            assert explanation.get(name) == native["explanation"].get(name)
        assert ("quantile" in explanation) == one.get("rule", True)
        assert explanation["target"]["index"] == native["explanation"]["target"]["index"]


def test_top_targets_are_a_list_of_maps(server: Server) -> None:
    image = png(picture(1))
    answer = answered(server, "explain", instance(image, target="top:3"), instance(image, target=1))
    many, one = answer["explanations"]
    assert len(many) == 3
    assert one["target"]["index"] == 1


def test_the_answer_names_model_and_table(server: Server, home: Home) -> None:
    explainer = home.explainer()
    answer = answered(server, "predict", instance(png(picture())))
    assert answer["model"]["weights_sha256"] == explainer.model.weights_sha256
    assert answer["model"]["table_sha256"] == explainer.table.table_sha256
    assert answer["software"]["runtime"] == f"torch {torch.__version__}"


def test_a_target_without_a_row_keeps_its_prediction(server: Server) -> None:
    answer = answered(server, "explain", instance(png(picture()), target=COVERED))
    assert answer["predictions"][0]
    assert answer["explanations"][0]["error"]["code"] == "target_not_in_table"


def test_a_map_not_wanted_is_skipped(server: Server) -> None:
    answer = answered(server, "explain", instance(png(picture()), explain_when="confidence<0.000001"))
    assert answer["explanations"][0]["status"] == "skipped"


IMAGE = png(picture())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "valid dictionary"),
        (b"{}", "instances: Field required"),
        (b'{"instances": []}', "instances: List should have at least 1 item"),
        (b'{"instances": [{}]}', "instances.0.image: Field required"),
        (b'{"instances": [{"image": "abcd"}]}', "instances.0.image: "),
        (b'{"instances": [{"image": {"b64": 3}}]}', "instances.0.image.b64: "),
        (b'{"instances": [{"image": {"url": "http://127.0.0.1/"}}]}', "instances.0.image.b64: Field required"),
        (b'{"instances": [{"image": {"b64": "a", "url": "b"}}]}', "instances.0.image.url: Extra inputs"),
        (b'{"instances": [{"image": {"b64": "no base64!"}}]}', "instances.0.image.b64 is not base64"),
        (b'{"instances": [{"image": {"b64": "\xc3\xa9"}}]}', "instances.0.image.b64 is not base64"),
        (b'{"instances": [{"image": {"b64": ""}, "layers": ["a"]}]}', "instances.0.layers"),
        (b'{"instances": [{"image": {"b64": ""}, "gamma": Infinity}]}', "no Infinity"),
        (b'{"instances": [], "signature_name": "x"}', "instances: |signature_name: Extra inputs"),
        (b'{"instances": [' + b"1," * 1000 + b"1]}", "instances: List should have at most 1000 items"),
        (b'{"instances": ' + b"[" * 10_000, "recursion limit"),
    ],
)  # fmt: skip
def test_a_malformed_body_is_400_and_says_where(server: Server, body: bytes, message: str) -> None:
    response = server.client.post("/v1/models/tiny:predict", content=body)
    assert any(one in refused(response, 400) for one in message.split("|"))


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("explain", {"quantile": 2}, "Option 'quantile' is '2'"),
        ("explain", {"target": "no such class"}, "no such class"),
        ("explain", {"surprise": 1}, "Field 'surprise' is not an option"),
        ("explain", {"model": "tiny"}, "Field 'model' is not an option"),
        ("predict", {"quantile": 0.1}, "Field 'quantile' is not an option of /predict"),
        ("predict", {"top_k": len(LABELS) + 1}, "Option 'top_k'"),
    ],
)
def test_a_wrong_option_is_422(server: Server, verb: str, options: dict[str, Any], message: str) -> None:
    assert message in refused(ask(server, verb, instance(IMAGE), instance(IMAGE, **options)), 422)


def test_a_bad_image_fails_the_request_and_is_named(server: Server) -> None:
    response = ask(server, "explain", instance(IMAGE), instance(b"not an image"), instance(IMAGE))
    assert refused(response, 415).startswith("Image 1: ")


def test_too_many_instances_are_413(server: Server) -> None:
    assert "17 instances; at most 16" in refused(ask(server, "predict", *[instance(b"")] * 17), 413)


def test_a_large_body_is_413(server: Server) -> None:
    response = server.client.post("/v1/models/tiny:predict", content=b" " * (32 * 1024 * 1024 + 1))
    assert "at most 33554432" in refused(response, 413)


def test_an_unknown_model_is_404(server: Server) -> None:
    for verb in ("predict", "explain"):
        assert "no model 'other'" in refused(ask(server, verb, instance(IMAGE), model="other"), 404)


def test_an_address_that_is_none_is_404(server: Server) -> None:
    refused(server.client.post("/v1/models/tiny:train", content=json.dumps({})), 405)
    refused(server.client.get("/v1/models/tiny/versions/1"), 404)
    refused(server.client.get("/v1"), 404)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 786_432, 786_433, 2_000_000])
def test_base64_is_read_in_pieces_as_in_one(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert from_base64(base64.b64encode(data), "it") == data
    assert from_base64(base64.b64encode(data).decode(), "it") == data


@pytest.mark.parametrize(
    "text", ["A", "AAA", "AA=A", "A" * (BASE64_PIECE - 2) + "==" + "AAAA", "A" * BASE64_PIECE + "AAA", "AAA\n"]
)
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(ServiceError, match="it is not base64"):
        from_base64(text, "it")
