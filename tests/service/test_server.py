"""The running service: routes, answers, statuses, and that images and options do not touch each other."""

import base64
import concurrent.futures
import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.schemas import ErrorAnswer, ExplainAnswer, ModelAnswer, ModelListing, PredictAnswer
from tests.service.conftest import COVERED, LABELS, Home, files, picture, png
from tests.service.serving import Server, serving

Result = dict[str, Any]

# Twelve pictures, each with options of its own; the same field set for all, as one request carries them.
MIXED = [
    (png(picture(i, (60 + 9 * i, 90))), {"target": target, "quantile": quantile, "gamma": gamma, "method": method,
     "conserve": conserve, "layers": layers, "selection": selection})
    for i, (target, quantile, gamma, method, conserve, layers, selection) in enumerate([
        ("predicted", "0.1", "inf", "gradient", "independent", "*", "class"),
        ("3", "0.1", "inf", "gradient", "independent", "*", "class"),
        ("thing 5", "0.3", "3", "input_x_gradient", "exact", "*", "class"),
        ("0", "0.05", "0.5", "guided_backprop", "none", "features.*", "instance"),
        ("7", "0.9", "inf", "smoothgrad", "independent", "features.0,features.9*", "class"),
        ("1", "0.2", "10", "integrated_gradients", "exact", "*", "class"),
    ] * 2)
]  # fmt: skip


def explain(server: Server, image: bytes, **options: Any) -> Result:
    response = server.client.post("/explain", files=files(image), data={"saliency": "float32", **options})
    assert response.status_code == 200, response.text
    ExplainAnswer.model_validate_json(response.text)
    (result,) = response.json()["results"]
    return dict(result)


def saliency(result: Result) -> np.ndarray:
    packed = result["explanation"]["saliency"]
    assert packed["encoding"] == "base64"
    values = np.frombuffer(base64.b64decode(packed["data"]), np.dtype(packed["dtype"]).newbyteorder("<"))
    return values.reshape(packed["shape"]).astype(np.float64) * packed["scale"]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = ErrorAnswer.model_validate_json(response.text).error
    assert error.code == code
    return error.message


def test_predict_answers_the_library_s_probabilities(server: Server, home: Home) -> None:
    image = picture()
    answer = server.client.post("/predict", files=files(png(image)), data={"top_k": "10"})
    PredictAnswer.model_validate_json(answer.text)
    explainer = home.explainer()
    expected = explainer.predict(explainer.model.preprocessing.apply(image)[0][None]).softmax(dim=1)[0]
    predictions = answer.json()["results"][0]["predictions"]
    assert [one["index"] for one in predictions] == expected.argsort(descending=True).tolist()
    for one in predictions:
        assert one["label"] == LABELS[one["index"]]
        assert one["probability"] == pytest.approx(float(expected[one["index"]]), rel=1e-4)


def test_explain_answers_the_library_s_map(server: Server, home: Home) -> None:
    image, explainer = picture(3, (200, 90)), home.explainer()
    tensor, placement = explainer.model.preprocessing.apply(image)
    expected = explainer.explain(tensor[None], 2, quantile=0.3, gamma=2.0)
    result = explain(server, png(image), target="2", quantile="0.3", gamma="2")
    assert distance(saliency(result), expected.saliency()[0].numpy()) < 1e-4
    explanation = result["explanation"]
    assert explanation["target"]["index"] == 2
    assert explanation["transform"] == {
        "original_size": [200, 90], "exif_orientation": 1, "crop_box": list(placement.crop_box)
    }  # fmt: skip
    assert explanation["quality"]["identity_layers"] == int(expected.identity_layers[0])
    assert 0 < explanation["quality"]["gini"] < 1
    effective = {name: explanation[name] for name in ("method", "quantile", "gamma", "selection", "rule", "conserve")}
    assert effective == {"method": "gradient", "quantile": 0.3, "gamma": 2.0, "selection": "class", "rule": True,
                         "conserve": "independent"}  # fmt: skip


def test_the_answer_names_model_and_table(server: Server, home: Home) -> None:
    explainer = home.explainer()
    model = server.client.post("/predict", content=png(picture()), headers={"Content-Type": "image/png"}).json()[
        "model"
    ]
    assert model == {
        "name": "tiny", "version": "1", "weights_sha256": explainer.model.weights_sha256,
        "table_sha256": explainer.table.table_sha256,
    }  # fmt: skip


def test_a_raw_body_and_query_options_are_the_same_request(server: Server) -> None:
    image = png(picture())
    raw = server.client.post("/explain?target=4&saliency=float32", content=image, headers={"Content-Type": "image/png"})
    assert np.array_equal(saliency(raw.json()["results"][0]), saliency(explain(server, image, target="4")))


def test_target_by_name_index_and_prediction(server: Server) -> None:
    image = png(picture(1))
    predicted = explain(server, image)
    index = predicted["predictions"][0]["index"]
    for target in ("predicted", str(index), LABELS[index]):
        if index < COVERED:
            assert np.array_equal(saliency(explain(server, image, target=target)), saliency(predicted))


def test_top_targets_answer_one_map_each(server: Server) -> None:
    image = png(picture(1))
    result = explain(server, image, target="top:10")
    assert "explanation" not in result
    assert len(result["explanations"]) == 10
    order = server.client.post("/predict", files=files(image), data={"top_k": "10"}).json()["results"][0]["predictions"]
    for prediction, explanation in zip(order, result["explanations"], strict=True):
        if prediction["index"] < COVERED:
            assert explanation["target"]["index"] == prediction["index"]
            assert explanation["target"]["probability"] == pytest.approx(prediction["probability"], rel=1e-4)
            alone = explain(server, image, target=str(prediction["index"]))
            assert distance(saliency({"explanation": explanation}), saliency(alone)) < 1e-4
        else:
            assert explanation["error"]["code"] == "target_not_in_table"


def test_a_target_without_a_row_keeps_its_prediction(server: Server) -> None:
    image = png(picture())
    result = explain(server, image, target=LABELS[-1])
    assert result["status"] == "ok"
    assert len(result["predictions"]) == 5
    assert result["explanation"]["status"] == "error"
    assert result["explanation"]["error"]["code"] == "target_not_in_table"
    assert explain(server, image, target=LABELS[-1], selection="instance")["explanation"]["status"] == "ok"
    assert explain(server, image, target=LABELS[-1], rule="false")["explanation"]["status"] == "ok"
    drawn = server.client.post("/explain?target=9", files=files(image), headers={"Accept": "image/png"})
    refused(drawn, 422, "target_not_in_table")


def test_a_map_that_overflows_is_no_map(server: Server) -> None:
    image, options = png(picture()), {"target": "1", "gamma": "1e6", "conserve": "none"}
    result = explain(server, image, **options)
    assert result["explanation"]["error"]["code"] == "map_not_finite"
    drawn = server.client.post("/explain", files=files(image), data=options, headers={"Accept": "image/png"})
    refused(drawn, 422, "map_not_finite")


def test_the_plain_method_is_another_map(server: Server) -> None:
    image = png(picture())
    assert (
        distance(
            saliency(explain(server, image, target="1", rule="false")), saliency(explain(server, image, target="1"))
        )
        > 0.1
    )


def test_encodings_agree(server: Server) -> None:
    image = png(picture())
    exact = saliency(explain(server, image, target="0"))
    for encoding, tolerance in (("uint8", 0.02), ("float16", 1e-3)):
        assert distance(saliency(explain(server, image, target="0", saliency=encoding)), exact) < tolerance
    listed = explain(server, image, target="0", saliency="list")["explanation"]["saliency"]
    assert distance(np.array(listed["data"]), exact) < 1e-6
    assert "saliency" not in explain(server, image, target="0", saliency="none")["explanation"]
    drawn = explain(server, image, target="0", saliency="png")["explanation"]["saliency"]
    assert Image.open(io.BytesIO(base64.b64decode(drawn["data"]))).size == tuple(reversed(drawn["shape"]))


def test_polarities_partition_the_map(server: Server) -> None:
    image = png(picture())
    positive, negative = (saliency(explain(server, image, target="0", polarity=p)) for p in ("positive", "negative"))
    assert positive.max() > 0
    assert negative.max() > 0
    assert not (positive * negative).any()


@pytest.mark.parametrize("overlay", ["none", "original", "grayscale", "mask_black"])
def test_png_answers_a_picture_of_what_the_model_saw(server: Server, overlay: str) -> None:
    response = server.client.post(
        f"/explain?target=0&overlay={overlay}&colormap=viridis",
        files=files(png(picture(0, (300, 200)))),
        headers={"Accept": "image/png"},
    )
    assert response.headers["content-type"] == "image/png"
    drawn = Image.open(io.BytesIO(response.content))
    assert drawn.mode == "RGB"
    assert drawn.size == (178, 178)  # 64/72 of the shorter side


def test_a_large_photograph_is_drawn_small(server: Server) -> None:
    response = server.client.post(
        "/explain", files=files(png(picture(0, (3000, 2500)))), headers={"Accept": "image/png"}
    )
    assert max(Image.open(io.BytesIO(response.content)).size) == 1024


def test_npz_answers_raw_arrays(server: Server) -> None:
    image = png(picture())
    response = server.client.post(
        "/explain", files=files(image, b"junk", image), data={"target": ["0", "1", "top:3"]},
        headers={"Accept": "application/x-npz"},
    )  # fmt: skip
    arrays = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert str(arrays["error_1"]).startswith("image_unsupported: ")
    assert arrays["saliency_0"].shape == (64, 64)
    assert arrays["saliency_2"].shape == (3, 64, 64)
    assert arrays["target_0"] == 0
    assert distance(arrays["saliency_0"], saliency(explain(server, image, target="0"))) < 1e-4
    assert np.allclose(
        np.exp(arrays["logits_0"]) / np.exp(arrays["logits_0"]).sum(), arrays["probabilities_0"], atol=1e-5
    )


def test_mixed_options_in_one_request_equal_requests_of_their_own(server: Server) -> None:
    alone = [explain(server, image, **options) for image, options in MIXED]
    together = server.client.post(
        "/explain",
        files=files(*(image for image, _ in MIXED)),
        data={name: [options[name] for _, options in MIXED] for name in MIXED[0][1]} | {"saliency": "float32"},
    ).json()["results"]
    for one, other in zip(alone, together, strict=True):
        assert other["explanation"]["target"]["index"] == one["explanation"]["target"]["index"]
        assert distance(saliency(other), saliency(one)) < 1e-3


def test_concurrent_callers_get_what_they_get_alone(server: Server) -> None:
    before = server.metric("parchgrad_batch_images_count", kind="explain")
    alone = [explain(server, image, **options) for image, options in MIXED]
    bad = files(b"\xff\xd8 not a jpeg")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(explain, server, image, **options) for image, options in MIXED * 4]
        wrong = [pool.submit(server.client.post, "/explain", files=bad) for _ in range(8)]
        results = [job.result() for job in jobs]
        assert {job.result().status_code for job in wrong} == {400}
    for one, other in zip(alone * 4, results, strict=True):
        assert distance(saliency(other), saliency(one)) < 1e-3
    batches = server.metric("parchgrad_batch_images_count", kind="explain") - before
    assert batches < 5 * len(MIXED)  # some shared a batch


def test_one_image_s_error_is_its_own(server: Server) -> None:
    good = png(picture())
    answer = server.client.post(
        "/explain", files=files(good, b"", b"junk", good[:200], good), data={"saliency": "float32"}
    )
    results = answer.json()["results"]
    assert [one.get("error", {}).get("code") for one in results] == [
        None, "image_empty", "image_unsupported", "image_truncated", None
    ]  # fmt: skip
    assert distance(saliency(results[4]), saliency(explain(server, good))) < 1e-4


def test_several_images_all_bad_are_still_an_answer(server: Server) -> None:
    response = server.client.post("/predict", files=files(b"", b"junk"))
    assert response.status_code == 200
    assert {one["status"] for one in response.json()["results"]} == {"error"}


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [(b"", 400, "image_empty"), (b"junk", 415, "image_unsupported"), (png(picture())[:300], 400, "image_truncated")],
    ids=["empty", "junk", "cut"],
)
def test_a_single_bad_image_is_the_request_s_error(server: Server, content: bytes, status: int, code: str) -> None:
    before = server.metric("parchgrad_rejects_total", reason=code)
    refused(server.client.post("/explain", files=files(content)), status, code)
    assert server.metric("parchgrad_rejects_total", reason=code) == before + 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"quantile": "2"}, "option_invalid", "Option 'quantile' is '2'; allowed: a number in (0, 1]."),
        ({"gamma": "-1"}, "option_invalid", "a number in [0, 1000000], or inf"),
        ({"gamma": "nan"}, "option_invalid", "a number in [0, 1000000], or inf"),
        ({"method": "magic"}, "option_invalid", "gradient, input_x_gradient"),
        ({"layers": "nowhere.*"}, "option_invalid", "'nowhere.*'"),
        ({"target": "10"}, "unknown_class", "0..9"),
        ({"target": "-1"}, "unknown_class", "0..9"),
        ({"target": "a cat"}, "unknown_class", "an index in 0..9, a class name or id"),
        ({"target": "top:11"}, "option_invalid", "10 classes"),
        ({"top_k": "11"}, "option_invalid", "1..10"),
        ({"timeout_ms": "120001"}, "option_invalid", "1..120000"),
        ({"url": "http://127.0.0.1/"}, "unknown_field", "'url' is not an option"),
        ({"outline": "maybe"}, "option_invalid", "true, false, 1 or 0"),
        ({"explain_when": "sometimes"}, "option_invalid", "confidence<"),
        ({"explain_when": "class:a cat"}, "unknown_class", "Option 'explain_when' names 'a cat'"),
    ],
)
def test_wrong_options_are_422(server: Server, options: dict[str, str], code: str, words: str) -> None:
    assert words in refused(server.client.post("/explain", files=files(png(picture())), data=options), 422, code)


def test_requests_without_an_image_are_refused(server: Server) -> None:
    post, client = server.client.post, server.client
    refused(post("/predict", data={"top_k": "1"}), 415, "content_type_unsupported")
    refused(post("/predict", json={"image": "http://127.0.0.1/x.png"}), 415, "content_type_unsupported")
    refused(post("/predict", files={"image": (None, "http://127.0.0.1/x.png")}), 400, "malformed_request")
    refused(post("/predict", files={"file": ("a.png", png(picture()))}), 422, "unknown_field")
    refused(post("/predict", files={"top_k": (None, "1")}), 400, "no_image")
    refused(
        post("/predict", content=b"--x\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=x"}),
        400, "malformed_request",
    )  # fmt: skip
    refused(post("/predict", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "malformed_request")
    whole = server.client.build_request("POST", "/predict", files=files(png(picture()), png(picture())))
    cut = whole.read()[:-2000]  # the first image whole, the second not
    refused(
        post("/predict", content=cut, headers={"Content-Type": whole.headers["Content-Type"]}), 400, "malformed_request"
    )
    gzipped = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
    refused(post("/predict", content=b"x", headers=gzipped), 415, "content_type_unsupported")
    refused(post("/predict?top_k=1", files=files(png(picture())), data={"top_k": "1"}), 422, "option_invalid")
    refused(client.get("/predict"), 405, "method_not_allowed")
    refused(client.get("/nothing/here"), 404, "not_found")


def test_what_cannot_be_answered_is_406(server: Server) -> None:
    image = png(picture())
    for path, images, accept in (
        ("/explain", [image], "text/html"),
        ("/explain", [image, image], "image/png"),
        ("/explain?target=top:2", [image], "image/png"),
        ("/predict", [image], "image/png"),
    ):
        refused(server.client.post(path, files=files(*images), headers={"Accept": accept}), 406, "not_acceptable")


def test_models_are_described(server: Server) -> None:
    listing = ModelListing.model_validate_json(server.client.get("/models").text)
    assert [one.name for one in listing.models] == ["tiny"]
    model = ModelAnswer.model_validate_json(server.client.get("/models/tiny").text)
    assert model.labels == LABELS
    assert model.table["classes"] == list(range(COVERED))
    assert model.options["quantile"] == 0.1
    assert model.limits == {"image_bytes": 20_000_000, "image_pixels": 50_000_000, "images": 16}
    refused(server.client.get("/models/other"), 404, "unknown_model")


def test_open_inference_protocol_metadata(server: Server) -> None:
    def get(path: str, status: int = 200) -> Any:
        response = server.client.get("/v2" + path)
        assert response.status_code == status
        return response.json()

    assert get("")["name"] == "parchgrad"
    assert get("/health/live") == get("/health/ready") == {"live": True, "ready": True}
    metadata = get("/models/tiny")
    assert metadata == get("/models/tiny/versions/1")
    assert {"name": "images", "datatype": "FP32", "shape": [-1, 3, 64, 64]} in metadata["inputs"]
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, 10]} in metadata["outputs"]
    assert get("/models/tiny/ready") == get("/models/tiny/versions/1/ready") == {"name": "tiny", "ready": True}
    assert get("/models/other", 404) == {"error": "There is no model 'other'; there is 'tiny'."}
    assert get("/models/tiny/versions/2", 404) == {"error": "Model 'tiny' has no version '2'; it has '1'."}
    assert get("/nothing", 404) == {"error": "There is nothing at '/v2/nothing'."}


def test_the_document_lists_every_route(server: Server) -> None:
    paths = server.client.get("/docs.json").json()["paths"]
    assert {"/predict", "/explain", "/models", "/models/{name}", "/livez", "/readyz", "/metrics", "/v2"} <= set(paths)


def test_request_ids_are_echoed_or_made(server: Server) -> None:
    get = server.client.get
    assert get("/models", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert get("/livez", headers={"X-Request-Id": "abc-2"}).headers["x-request-id"] == "abc-2"
    assert len(get("/nothing").headers["x-request-id"]) == 32
    assert len(get("/models", headers={"X-Request-Id": "a b" * 99}).headers["x-request-id"]) == 32


def test_metrics_have_closed_labels_and_count(server: Server) -> None:
    for i in range(3):
        server.client.get(f"/made/up/{i}")
    before = server.metric("parchgrad_requests_total", route="/predict", status="200")
    server.client.post("/predict", files=files(png(picture()), png(picture())))
    assert server.metric("parchgrad_requests_total", route="/predict", status="200") == before + 1
    text = server.client.get("/metrics").text
    assert "made/up" not in text
    assert "bentoml_service_request" not in text
    assert server.metric("parchgrad_model_info", model="tiny") == 1
    assert server.metric("parchgrad_ready_workers") == 1
    assert server.metric("parchgrad_queue_depth_images") == 0
    for name in ("request", "decode", "queue", "device", "render"):
        assert server.metric(f"parchgrad_{name}_seconds_count") > 0


def turned(image: Image.Image, orientation: int) -> bytes:
    """A PNG that is `image` once its EXIF orientation is undone."""
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose values
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored = image.transpose(Image.Transpose(method[orientation])) if orientation > 1 else image
    stored.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def test_all_eight_orientations_are_one_picture(server: Server) -> None:
    image = picture(5, (120, 80))
    upright = explain(server, png(image), target="2")
    for orientation in range(1, 9):
        result = explain(server, turned(image, orientation), target="2")
        for one, other in zip(result["predictions"], upright["predictions"], strict=True):
            assert one["index"] == other["index"]
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)
        assert distance(saliency(result), saliency(upright)) < 1e-5
        assert result["explanation"]["transform"] == {
            **upright["explanation"]["transform"],
            "exif_orientation": orientation,
        }


# --- a server with narrow limits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(home: Home) -> Iterator[Server]:
    limits = {
        "max_images": 2,
        "max_queue": 2,
        "shed_above": 2,
        "max_image_bytes": 100_000,
        "max_image_pixels": 1_000_000,
    }
    with serving(home.root / "narrow", settings={**home.settings, **limits}) as running:
        yield running


def test_limits_are_settings(narrow: Server) -> None:
    post, good = narrow.client.post, png(picture())
    refused(post("/predict", files=files(good, good, good)), 413, "too_many_images")
    refused(post("/predict", files=files(bytes(100_001))), 413, "image_too_many_bytes")
    refused(post("/predict", files=files(png(Image.new("RGB", (1001, 1000))))), 413, "image_too_many_pixels")
    refused(post("/predict", files=files(bytes(300_000), bytes(300_000))), 413, "body_too_large")
    results = post("/predict", files=files(bytes(100_001), good)).json()["results"]
    assert [one["status"] for one in results] == ["error", "ok"]


def test_an_endless_body_is_cut_off(narrow: Server) -> None:
    """Chunked, without a length: refused when it passes the limit, long before it ends."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 100_000
            yield bytes(100_000)

    # The answer may be lost to a client that is still writing when the server closes the connection.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        answer = narrow.client.post("/predict", content=endless(), headers={"Content-Type": "image/png"})
        refused(answer, 413, "body_too_large")
    assert sent < 100_000_000
    assert narrow.client.get("/readyz").status_code == 200


def test_a_declared_length_is_refused_unread(narrow: Server) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_429_with_retry_after_and_deadlines_are_504(narrow: Server) -> None:
    """SmoothGrad keeps the device busy; two images may be admitted, the others are told to come again."""
    slow = {"method": "smoothgrad", "saliency": "none"}
    image = files(png(picture()))
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        responses = [
            job.result()
            for job in [pool.submit(narrow.client.post, "/explain", files=image, data=slow) for _ in range(12)]
        ]
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 429}
    full = next(response for response in responses if response.status_code == 429)
    refused(full, 429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    refused(narrow.client.post("/explain", files=image, data={**slow, "timeout_ms": "1"}), 504, "deadline_exceeded")
    assert narrow.client.post("/explain", files=image).status_code == 200


def test_a_caller_that_hangs_up_is_not_computed(server: Server) -> None:
    """While SmoothGrad keeps the device busy another caller queues and hangs up: its image is dropped."""
    image, busy = png(picture()), {"method": "smoothgrad", "saliency": "none"}
    begun = server.metric("parchgrad_queue_seconds_count", kind="explain")
    dropped = server.metric("parchgrad_dropped_total", reason="cancelled")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        # Seconds of work on any machine: what hangs up below must not be reached before.
        work = [pool.submit(server.client.post, "/explain", files=files(*[image] * 16), data=busy) for _ in range(4)]
        while server.metric("parchgrad_queue_seconds_count", kind="explain") < begun + 16:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/explain", files=files(image), timeout=httpx.Timeout(60, read=0.2))
        assert [job.result().status_code for job in work] == [200] * 4
    assert server.client.post("/explain", files=files(image)).status_code == 200
    assert server.metric("parchgrad_dropped_total", reason="cancelled") == dropped + 1


# --- lifecycle ---------------------------------------------------------------------------------------------


def test_not_ready_without_the_golden_match(home: Home, tmp_path: Any) -> None:
    """Another table's golden record: alive, not ready, and 503 with the reason."""
    import shutil

    shutil.copytree(home.root / "models", tmp_path / "models")
    shutil.copytree(home.root / "tables", tmp_path / "tables")
    (tmp_path / "tables" / "tiny" / "1" / "golden.safetensors").unlink()
    settings = {**home.settings, "models_dir": tmp_path / "models", "tables_dir": tmp_path / "tables"}
    with serving(tmp_path / "home", settings=settings, wait_ready=False) as server:
        for _ in range(200):
            message = refused(server.client.post("/predict", files=files(png(picture()))), 503, "not_ready")
            if "still loading" not in message:
                break
            time.sleep(0.2)
        assert "golden" in message
        assert str(tmp_path) not in message  # where our folders are is nobody's business
        refused(server.client.get("/readyz"), 503, "not_ready")
        assert server.client.get("/v2/health/ready").json() == {"live": True, "ready": False}
        assert server.client.get("/v2/models/tiny/ready").status_code == 503
        assert server.client.get("/livez").status_code == 200


def test_two_workers_share_one_metrics_page_and_stop_in_peace(home: Home, tmp_path: Any) -> None:
    with serving(tmp_path / "home", settings={**home.settings, "workers": 2}) as server:
        image = files(png(picture()))
        for _ in range(300):
            if server.metric("parchgrad_ready_workers") == 2:
                break
            time.sleep(0.2)
        for _ in range(20):
            with httpx.Client(base_url=server.url, timeout=60) as fresh:  # a connection of its own, so either worker
                assert fresh.post("/predict", files=image).status_code == 200
        for _ in range(50):  # a worker counts a request when it is over: the last may not be there yet
            if (counted := server.metric("parchgrad_requests_total", route="/predict", status="200")) == 20:
                break
            time.sleep(0.1)
        assert counted == 20
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server.client.post, "/explain", files=image * 8, data={"method": "smoothgrad"})
            while server.metric("parchgrad_queue_seconds_count", kind="explain") == 0:
                time.sleep(0.01)
            assert server.stop() == 0
            assert slow.result().status_code == 200  # what was in flight finished
        assert "Traceback" not in server.log.read_text()


def test_a_wrong_setting_stops_the_server_with_its_name(home: Home, tmp_path: Any) -> None:
    wrong = serving(tmp_path, settings={**home.settings, "max_images": "many"})
    with pytest.raises(RuntimeError, match="PARCHGRAD_MAX_IMAGES='many': expected an integer from 1 to 1000"), wrong:
        pass


def test_json_is_the_default_answer(server: Server) -> None:
    answer = server.client.post("/predict", files=files(png(picture())))
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.text)["results"][0]["status"] == "ok"


# --- what a review sent ------------------------------------------------------------------------------------


def test_thousands_of_digits_are_no_class(server: Server) -> None:
    answer = server.client.post("/explain", params={"target": "1" * 1000}, files=files(png(picture())))
    refused(answer, 422, "unknown_class")
    assert len(answer.content) < 1000


@pytest.mark.parametrize("charset", ["undefined", "punycode", "no-such-charset"])
def test_a_strange_charset_is_the_callers_fault(server: Server, charset: str) -> None:
    body = b'--BB\r\nContent-Disposition: form-data; name="target"\r\n\r\nx..a\xff\r\n--BB--\r\n'
    kind = f"multipart/form-data; boundary=BB; charset={charset}"
    answer = server.client.post("/explain", content=body, headers={"Content-Type": kind})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["code"] in ("malformed_request", "no_image", "option_invalid")


def test_bytes_that_are_no_text_in_a_header_do_not_cost_the_answer(server: Server) -> None:
    headers = [(b"Content-Type", b"image/png; x=\xe9")]
    answer = server.client.post("/predict", content=png(picture()), headers=headers)
    assert answer.status_code == 200
    assert answer.json()["results"][0]["status"] == "ok"


def test_several_accept_lines_count_as_one(server: Server) -> None:
    headers = [("Accept", "text/html"), ("Accept", "image/png")]
    answer = server.client.post("/explain", files=files(png(picture())), headers=headers)
    assert answer.headers["content-type"] == "image/png"


def test_nothing_is_redirected(server: Server) -> None:
    refused(server.client.post("/predict/", headers={"Host": "evil.example"}, follow_redirects=False), 404, "not_found")


def test_an_early_refusal_closes_the_connection(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /explain HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head + b"\r\n5\r\nhello\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 415")
    assert b"connection: close" in answer.lower()


def test_lists_are_capped_and_the_binary_forms_named(server: Server) -> None:
    many = files(*[png(picture())] * 16)
    options = {"saliency": "list", "target": "top:8"}
    answer = server.client.post("/explain", files=many, data=options)
    refused(answer, 422, "option_invalid")
    assert "float32" in answer.json()["error"]["message"]


def test_more_maps_than_the_queue_holds_are_refused_by_name(narrow: Server) -> None:
    """Two may be admitted: five maps of one image would be told to come again for ever."""
    answer = narrow.client.post("/explain", files=files(png(picture())), data={"target": "top:5"})
    refused(answer, 422, "option_invalid")
    assert "5 maps; allowed: at most 2" in answer.json()["error"]["message"]


def test_images_that_are_all_late_are_504(server: Server) -> None:
    slow = {"method": "smoothgrad", "timeout_ms": "1"}
    refused(server.client.post("/explain", files=files(*[png(picture())] * 3), data=slow), 504, "deadline_exceeded")


def test_an_idle_service_leaves_out_no_map(server: Server) -> None:
    """144 maps, more than half the queue: there is room for all of them."""
    answer = server.client.post(
        "/explain",
        files=files(*[png(picture())] * 16),
        data={"target": "top:9", "saliency": "none", "timeout_ms": "120000"},
    ).json()
    statuses = {one["status"] for result in answer["results"] for one in result["explanations"]}
    assert statuses <= {"ok", "error"}  # two classes have no row
    assert "ok" in statuses


def test_what_the_table_does_not_hold_fails_the_request_before_anything_is_computed(server: Server) -> None:
    before = server.metric("parchgrad_batch_images_count")
    answer = server.client.post("/explain", files=files(*[png(picture())] * 2), data={"normality_filter": "true"})
    assert "normality_filter" in refused(answer, 422, "option_invalid")
    assert server.metric("parchgrad_batch_images_count") == before


@pytest.mark.parametrize(
    "options",
    [
        {"layers": ",".join(["*"] * 5000)},
        {"layers": ",".join(f"a{i}" for i in range(60))},
        {"explain_when": "class:" + "1|" * 2000 + "1"},
    ],
    ids=["long", "many", "classes"],
)
def test_options_are_bounded_in_length(server: Server, options: dict[str, str]) -> None:
    answer = server.client.post("/explain", params=options, files=files(png(picture())))
    refused(answer, 422, "option_invalid")
    assert len(answer.content) < 1000
