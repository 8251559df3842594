"""The Open Inference Protocol of the running service, asked by the stock clients of Triton and KServe, unchanged."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http.aio
from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import parchgrad
from parchgrad import golden
from parchgrad.preprocessing import Preprocessing
from service.protocols.open_inference import MAX_JSON_ELEMENTS
from tests.service import kserve_client
from tests.service.conftest import COVERED, LABELS, Home, picture, png
from tests.service.serving import Server, serving
from tests.service.test_batch_mates import Busy
from tests.service.test_server import distance, explain, saliency

OUTPUTS = ("logits", "probabilities", "target", "saliency")


@pytest.fixture
def triton(server: Server) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


def tensor(name: str, data: np.ndarray, *, binary: bool = True) -> InferInput:
    made = InferInput(name, list(data.shape), np_to_triton_dtype(data.dtype))
    made.set_data_from_numpy(data, binary_data=binary)
    return made


def encoded(*contents: bytes) -> InferInput:
    return tensor("image_bytes", np.array(contents, np.object_))


def asked(*names: str, binary: bool = True) -> list[InferRequestedOutput]:
    return [InferRequestedOutput(name, binary_data=binary) for name in names]


def names(result: InferResult) -> list[str]:
    return [output["name"] for output in result.get_response()["outputs"]]


def refused(client: InferenceServerClient, status: int, *inputs: InferInput, model: str = "tiny", **fields: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, list(inputs), **fields)
    assert caught.value.status() == str(status), caught.value
    return str(caught.value.message())


@pytest.fixture(scope="module")
def three(home: Home) -> tuple[list[bytes], np.ndarray, parchgrad.Explainer]:
    """Three encoded pictures, the same as normalised tensors, and the library that explains them."""
    explainer = home.explainer()
    pictures = [picture(seed) for seed in (1, 2, 3)]
    normalised = np.stack([explainer.model.preprocessing.apply(one)[0].numpy() for one in pictures])
    return [png(one) for one in pictures], normalised, explainer


Three = tuple[list[bytes], np.ndarray, parchgrad.Explainer]


# --- what serves -------------------------------------------------------------------------------------------


def test_health_and_server_metadata(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert triton.is_model_ready("tiny", "1")
    assert not triton.is_model_ready("no_such_model")
    assert not triton.is_model_ready("tiny", "2")
    about = triton.get_server_metadata()
    assert (about["name"], about["version"]) == ("parchgrad", parchgrad.__version__)
    assert "binary_tensor_data" in about["extensions"]


def test_model_metadata(triton: InferenceServerClient) -> None:
    about = triton.get_model_metadata("tiny")
    assert about == triton.get_model_metadata("tiny", "1")
    assert about["versions"] == ["1"]
    assert about["inputs"] == [
        {"name": "images", "datatype": "FP32", "shape": [-1, 3, 64, 64]},
        {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        {"name": "target", "datatype": "INT64", "shape": [-1]},
        {"name": "quantile", "datatype": "FP32", "shape": [-1]},
        {"name": "gamma", "datatype": "FP32", "shape": [-1]},
    ]
    assert about["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
        {"name": "target", "datatype": "INT64", "shape": [-1]},
        {"name": "saliency", "datatype": "FP32", "shape": [-1, 64, 64]},
    ]


def test_model_config_is_triton_s(triton: InferenceServerClient) -> None:
    config = triton.get_model_config("tiny")
    assert config == triton.get_model_config("tiny", "1")
    parsed = json_format.ParseDict(config, ModelConfig())  # refuses what is not in Triton's own schema
    assert (parsed.name, parsed.max_batch_size) == ("tiny", 16)
    assert [one.name for one in parsed.input] == ["images", "image_bytes", "target", "quantile", "gamma"]
    assert all(one.optional for one in parsed.input)
    assert list(parsed.input[0].dims) == [3, 64, 64]
    assert {one.name: list(one.dims) for one in parsed.output} == {
        "logits": [10], "probabilities": [10], "target": [1], "saliency": [64, 64],
    }  # fmt: skip
    assert json.loads(parsed.parameters["labels"].string_value) == LABELS


# --- inference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_normalised_images_give_the_library_s_values(triton: InferenceServerClient, three: Three, binary: bool) -> None:
    _, normalised, explainer = three
    result = triton.infer("tiny", [tensor("images", normalised, binary=binary)], outputs=asked(*OUTPUTS, binary=binary))
    expected = explainer.explain(torch.from_numpy(normalised), uncovered="nan")
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected.probabilities().numpy(), rtol=1e-4)
    assert result.as_numpy("target").tolist() == expected.targets.tolist()
    for ours, theirs, covered in zip(
        result.as_numpy("saliency"), expected.saliency().numpy(), expected.covered, strict=True
    ):
        if covered:
            assert distance(ours, theirs) < 1e-4
        else:
            assert np.isnan(ours).all()


def test_encoded_images_give_the_map_of_the_native_route(
    triton: InferenceServerClient, server: Server, three: Three
) -> None:
    images, normalised, _ = three
    target = tensor("target", np.array([2, 5, 7]))
    from_files = triton.infer("tiny", [encoded(*images), target])
    from_pixels = triton.infer("tiny", [tensor("images", normalised), target])
    assert from_files.as_numpy("target").tolist() == [2, 5, 7]
    for i, image in enumerate(images):
        native = explain(server, image, target=str([2, 5, 7][i]))
        assert distance(from_files.as_numpy("saliency")[i], saliency(native)) < 1e-4
        assert distance(from_pixels.as_numpy("saliency")[i], saliency(native)) < 1e-4
        for one in native["predictions"]:
            assert from_files.as_numpy("probabilities")[i, one["index"]] == pytest.approx(one["probability"], rel=1e-4)


def test_every_image_has_options_of_its_own(triton: InferenceServerClient, three: Three) -> None:
    images, normalised, explainer = three
    columns = [
        tensor("target", np.array([1, -1, 4])),
        tensor("quantile", np.array([0.1, 0.3, 0.9], np.float32)),
        tensor("gamma", np.array([np.inf, 2.0, 0.5], np.float32)),
    ]
    result = triton.infer("tiny", [encoded(*images), *columns])
    expected = explainer.explain(
        torch.from_numpy(normalised), [1, -1, 4], quantile=[0.1, 0.3, 0.9], gamma=[np.inf, 2.0, 0.5], uncovered="nan"
    )
    for ours, theirs, covered in zip(
        result.as_numpy("saliency"), expected.saliency().numpy(), expected.covered, strict=True
    ):
        assert covered == np.isfinite(ours).all()
        assert not covered or distance(ours, theirs) < 1e-4


def test_float32_options_mean_their_shortest_decimal(triton: InferenceServerClient) -> None:
    result = triton.infer("tiny", [encoded(png(picture())), tensor("quantile", np.array([0.1], np.float32))])
    (options,) = json.loads(result.get_response()["parameters"]["explanation_options"])
    assert options["quantile"] == 0.1


def test_request_parameters_are_the_options_of_all_images(triton: InferenceServerClient, three: Three) -> None:
    images, normalised, explainer = three
    parameters = {
        "method": "input_x_gradient", "layers": "features.0,features.9*", "quantile": 0.25, "rule": True,
        "target": "thing 3", "polarity": "positive",
    }  # fmt: skip
    result = triton.infer("tiny", [encoded(*images)], parameters=parameters, timeout=30_000_000)
    expected = explainer.explain(
        torch.from_numpy(normalised), 3, method="input_x_gradient", layers=("features.0", "features.9*"), quantile=0.25
    )
    for ours, theirs in zip(result.as_numpy("saliency"), expected.saliency("positive").numpy(), strict=True):
        assert distance(ours, theirs) < 1e-4
    options = json.loads(result.get_response()["parameters"]["explanation_options"])
    assert [(one["method"], one["polarity"]) for one in options] == [("input_x_gradient", "positive")] * 3


def test_values_an_image_may_come_as_columns(triton: InferenceServerClient, three: Three) -> None:
    """Triton's clients give every tensor a batch dimension."""
    images, _, _ = three
    rows = [encoded(*images), tensor("target", np.array([1, 2, 3]))]
    columns = [
        tensor("image_bytes", np.array(images, np.object_)[:, None]),
        tensor("target", np.array([[1], [2], [3]])),
    ]
    by_row, by_column = triton.infer("tiny", rows), triton.infer("tiny", columns)
    assert by_column.as_numpy("target").shape == (3,)
    for one, other in zip(by_row.as_numpy("saliency"), by_column.as_numpy("saliency"), strict=True):
        assert distance(one, other) < 1e-5


def test_an_image_in_json_is_base64(triton: InferenceServerClient) -> None:
    image = png(picture(1))
    text = tensor("image_bytes", np.array([base64.b64encode(image)], np.object_), binary=False)
    one, other = triton.infer("tiny", [text]), triton.infer("tiny", [encoded(image)])
    np.testing.assert_allclose(one.as_numpy("logits"), other.as_numpy("logits"), rtol=1e-5)


def test_only_the_outputs_asked_for_are_answered(triton: InferenceServerClient, three: Three) -> None:
    images, _, _ = three
    assert names(triton.infer("tiny", [encoded(*images)])) == list(OUTPUTS)
    result = triton.infer("tiny", [encoded(*images)], outputs=asked("probabilities", "logits"))
    assert names(result) == ["logits", "probabilities"]
    assert result.as_numpy("saliency") is None
    assert "explanation_status" not in result.get_response()["parameters"]


def test_outputs_can_be_binary_and_json_in_one_answer(triton: InferenceServerClient, three: Three) -> None:
    images, _, _ = three
    mixed = [*asked("logits", binary=False), *asked("probabilities")]
    result = triton.infer("tiny", [encoded(*images)], outputs=mixed)
    assert "data" in result.get_output("logits")
    assert result.get_output("probabilities")["parameters"] == {"binary_data_size": 3 * 10 * 4}
    logits = result.as_numpy("logits").astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.as_numpy("probabilities"), softmax, rtol=1e-4)


def test_without_the_saliency_output_nothing_is_explained(triton: InferenceServerClient, server: Server) -> None:
    def explained() -> float:
        return server.metric("parchgrad_batch_images_sum", kind="explain")

    before = explained()
    inputs = [encoded(png(picture())), tensor("target", np.array([3]))]
    result = triton.infer("tiny", inputs, outputs=asked("logits", "target"))
    assert result.as_numpy("target").tolist() == [3]
    assert explained() == before
    triton.infer("tiny", inputs, outputs=asked("saliency"))
    assert explained() == before + 1


def test_the_answer_names_itself(triton: InferenceServerClient, three: Three) -> None:
    explainer = three[2]
    answer = triton.infer("tiny", [encoded(png(picture()))], model_version="1", request_id="request 7").get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("request 7", "tiny", "1")
    assert answer["parameters"]["weights_sha256"] == explainer.model.weights_sha256
    assert answer["parameters"]["table_sha256"] == explainer.table.table_sha256
    assert "id" not in triton.infer("tiny", [encoded(png(picture()))]).get_response()


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_a_map_that_is_missing_is_nan_and_says_why(triton: InferenceServerClient, binary: bool) -> None:
    image = png(picture())
    result = triton.infer(
        "tiny",
        [encoded(image, image), tensor("target", np.array([0, COVERED]))],
        outputs=asked("saliency", "target", binary=binary),
    )
    maps, parameters = result.as_numpy("saliency"), result.get_response()["parameters"]
    assert np.isfinite(maps[0]).all()
    assert np.isnan(maps[1]).all()
    assert result.as_numpy("target").tolist() == [0, COVERED]
    assert parameters["explanation_status"] == "ok,error"
    assert parameters["explanation_reason"].startswith(f"Image 1: Table 'random' has no row for class {COVERED}")


def test_a_map_not_wanted_is_skipped(triton: InferenceServerClient) -> None:
    result = triton.infer("tiny", [encoded(png(picture()))], parameters={"explain_when": "confidence<0.000001"})
    assert result.get_response()["parameters"]["explanation_status"] == "skipped"
    assert np.isnan(result.as_numpy("saliency")).all()
    assert result.as_numpy("target").tolist() == [int(result.as_numpy("logits").argmax())]


def test_async_infer_answers_many_at_once(server: Server, three: Three) -> None:
    images, _, _ = three
    with InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as client:
        pending = [client.async_infer("tiny", [encoded(images[i % 3])], request_id=str(i)) for i in range(24)]
        results = [one.get_result() for one in pending]
    alone = [result.as_numpy("logits")[0] for result in results[:3]]
    for i, result in enumerate(results):
        assert result.get_response()["id"] == str(i)
        np.testing.assert_allclose(result.as_numpy("logits")[0], alone[i % 3], rtol=1e-4, atol=1e-5)
    assert distance(alone[0], alone[1]) > 1e-3


def test_the_asyncio_client(server: Server, three: Three) -> None:
    images, normalised, explainer = three

    async def ask() -> InferResult:
        async with tritonclient.http.aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("tiny")
            assert (await client.get_model_metadata("tiny"))["name"] == "tiny"
            assert (await client.get_model_config("tiny"))["max_batch_size"] == 16
            return await client.infer("tiny", [encoded(*images), tensor("target", np.array([0, 1, 2]))])

    result = asyncio.run(ask())
    expected = explainer.explain(torch.from_numpy(normalised), [0, 1, 2]).saliency().numpy()
    for ours, theirs in zip(result.as_numpy("saliency"), expected, strict=True):
        assert distance(ours, theirs) < 1e-4


def test_the_kserve_client(server: Server, three: Three) -> None:
    _, normalised, explainer = three
    answer = kserve_client.ask(server.url, "v2", images=normalised, target=np.array([0, 1, 2]))
    assert (answer["live"], answer["ready"], answer["models"]) == (True, True, [True, False])
    expected = explainer.explain(torch.from_numpy(normalised), [0, 1, 2]).saliency().numpy()
    for form in ("binary", "json"):
        assert answer[form]["about"] == ["k", "tiny"]
        outputs = answer[form]["outputs"]
        assert outputs["target"] == [0, 1, 2]
        for ours, theirs in zip(outputs["saliency"], expected, strict=True):
            assert distance(np.array(ours), theirs) < 1e-4


# --- a model that keeps each image's own size, in a service that leaves maps out early -----------------------


@pytest.fixture(scope="module")
def any_size_server(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same network; while two images or more are waiting, maps are shed."""
    root = tmp_path_factory.mktemp("any_size")
    tiny = home.explainer().model
    parchgrad.add_model(
        "any_size",
        architecture="squeezenet1_1",
        weights=tiny.module.state_dict(),
        labels=LABELS,
        preprocessing=Preprocessing(size=(64, 64), rule="native", min_side=48, max_side=96),
        models_dir=root / "models",
    )
    model = parchgrad.load_model(root / "models" / "any_size")
    folder = root / "tables" / "any_size" / "1"
    table = parchgrad.SelectionTable.random(model, len(LABELS), seed=0).save(folder)
    golden.record(parchgrad.Explainer(model, parchgrad.load_table(folder, model)), table.folder)
    given = {"models_dir": root / "models", "tables_dir": root / "tables", "model": "any_size", "shed_above": 2}
    with serving(root / "bentoml", settings={**home.settings, **given}) as running:
        yield running


@pytest.fixture(scope="module")
def any_size(any_size_server: Server) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(any_size_server.url.removeprefix("http://"))
    yield client
    client.close()


def test_any_size_is_said_as_minus_one(any_size: InferenceServerClient) -> None:
    about = any_size.get_model_metadata("any_size")
    assert about["inputs"][0]["shape"] == [-1, 3, -1, -1]
    assert about["outputs"][3]["shape"] == [-1, -1, -1]
    json_format.ParseDict(any_size.get_model_config("any_size"), ModelConfig())


def test_images_of_one_size_have_one_tensor_of_maps(any_size: InferenceServerClient) -> None:
    wide = picture(1, (80, 50))
    result = any_size.infer("any_size", [encoded(png(wide), png(wide))])
    assert result.as_numpy("saliency").shape == (2, 50, 80)
    assert np.isfinite(result.as_numpy("saliency")).all()


def test_images_of_different_sizes_have_predictions_and_no_tensor_of_maps(any_size: InferenceServerClient) -> None:
    images = encoded(png(picture(1, (80, 50))), png(picture(2, (50, 80))))
    assert any_size.infer("any_size", [images], outputs=asked("logits")).as_numpy("logits").shape == (2, 10)
    message = refused(any_size, 400, images, model="any_size")
    assert message == (
        "Output 'saliency' is one tensor, and the images' maps are 50 x 80, 80 x 50; send images of one size together."
    )


def test_a_tensor_s_sides_are_held_to_the_model_s(any_size: InferenceServerClient) -> None:
    fits = tensor("images", np.zeros((1, 3, 48, 96), np.float32))
    assert any_size.infer("any_size", [fits]).as_numpy("saliency").shape == (1, 48, 96)
    small = tensor("images", np.zeros((1, 3, 47, 96), np.float32))
    assert "is 47 x 96; allowed: sides in 48..96" in refused(any_size, 400, small, model="any_size")


def test_shed_maps_are_nan_and_the_predictions_arrive(any_size_server: Server, any_size: InferenceServerClient) -> None:
    image = png(picture(1, (80, 50)))
    with Busy(any_size_server, 2):
        result = any_size.infer("any_size", [encoded(image, image, image), tensor("target", np.array([4, -1, 5]))])
    parameters = result.get_response()["parameters"]
    assert parameters["explanation_status"] == "shed,shed,shed"
    assert parameters["explanation_reason"].startswith("Image 0: 2 images or maps are waiting. Image 1: ")
    assert np.isnan(result.as_numpy("saliency")).all()
    logits = any_size.infer("any_size", [encoded(image)]).as_numpy("logits")
    np.testing.assert_allclose(result.as_numpy("logits"), np.repeat(logits, 3, axis=0), rtol=1e-4)
    assert result.as_numpy("target").tolist() == [4, int(logits.argmax()), 5]


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_unknown_model_or_version_is_404(triton: InferenceServerClient) -> None:
    image = encoded(png(picture()))
    assert "no model 'other'" in refused(triton, 404, image, model="other")
    assert "has no version '9'" in refused(triton, 404, image, model_version="9")
    for ask in (triton.get_model_metadata, triton.get_model_config):
        with pytest.raises(InferenceServerException, match=r"\[404\] There is no model"):
            ask("other")
        with pytest.raises(InferenceServerException, match=r"\[404\] Model 'tiny' has no version"):
            ask("tiny", "9")


IMAGES = np.zeros((2, 3, 64, 64), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "Give one of the inputs 'images' and 'image_bytes'"),
        ([("images", IMAGES), ("image_bytes", np.array([b"", b""], np.object_))], "Give one of"),
        ([("images", IMAGES), ("labels", IMAGES)], "no input 'labels'; its inputs are images, image_bytes, target"),
        ([("images", IMAGES.astype(np.float64))], "'images' has datatype FP64; expected FP32"),
        ([("image_bytes", IMAGES)], "'image_bytes' has datatype FP32; expected BYTES"),
        ([("images", IMAGES), ("target", np.array([1, 2], np.int32))], "'target' has datatype INT32; expected INT64"),
        ([("images", IMAGES[0])], r"'images' has shape [3, 64, 64]; expected [-1, 3, 64, 64]"),
        ([("images", IMAGES[:, :, :, :32])], "has shape [2, 3, 64, 32]"),
        ([("images", IMAGES[:, :1])], "has shape [2, 1, 64, 64]"),
        ([("images", IMAGES[:0])], "'images' holds no image"),
        ([("images", np.full_like(IMAGES, np.nan))], "values that are not finite"),
        ([("images", IMAGES), ("gamma", np.zeros((2, 2), np.float32))], "'gamma' has shape [2, 2]; expected [-1]"),
    ],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_400(
    triton: InferenceServerClient, inputs: list[tuple[str, np.ndarray]], message: str
) -> None:
    assert message in refused(triton, 400, *(tensor(name, data) for name, data in inputs))


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([("target", np.array([1, 2, 3]))], {}, "Option 'target' is given 3 times"),
        ([("target", np.array([10, 0]))], {}, "10"),
        ([("target", np.array([-2, 0]))], {}, "-2"),
        ([("quantile", np.array([0.5, 1.5], np.float32))], {}, "'quantile' is '1.5'; allowed: a number in (0, 1]"),
        ([("gamma", np.array([np.nan, 1], np.float32))], {}, "Option 'gamma' is 'nan'"),
        ([("quantile", np.array([0.5], np.float32))], {"quantile": 0.5}, "given as parameter and as input"),
        ([], {"quantile": "much"}, "Option 'quantile' is 'much'"),
        ([], {"method": "lime"}, "Option 'method' is 'lime'"),
        ([], {"target": "top:3"}, "several maps of an image"),
        ([], {"timeout_ms": 10**9}, "Option 'timeout_ms'"),
        ([], {"colormap": "inferno"}, "Parameter 'colormap' is not known"),
        ([], {"surprise": 1}, "Parameter 'surprise' is not known"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_422(
    triton: InferenceServerClient, inputs: list[tuple[str, np.ndarray]], parameters: dict[str, Any], message: str
) -> None:
    columns = [tensor(name, data) for name, data in inputs]
    assert message in refused(triton, 422, tensor("images", IMAGES), *columns, parameters=parameters)


def test_sequences_and_priorities_are_422(triton: InferenceServerClient) -> None:
    images = tensor("images", IMAGES)
    assert "sequence_id" in refused(triton, 422, images, sequence_id=5, sequence_start=True)
    assert "priority" in refused(triton, 422, images, priority=2)


def test_an_unknown_output_is_400(triton: InferenceServerClient) -> None:
    message = refused(triton, 400, tensor("images", IMAGES), outputs=asked("logits", "heat"))
    assert "no output 'heat'; its outputs are logits, probabilities, target, saliency" in message


def test_classification_is_422(triton: InferenceServerClient) -> None:
    outputs = [InferRequestedOutput("probabilities", class_count=3)]
    assert "classification" in refused(triton, 422, tensor("images", IMAGES), outputs=outputs)


def test_a_bad_image_fails_the_request_and_is_named(triton: InferenceServerClient) -> None:
    good = png(picture())
    assert refused(triton, 415, encoded(good, b"not an image", good)).startswith("Image 1: ")
    assert not refused(triton, 400, encoded(b"")).startswith("Image")


def test_text_that_is_not_base64_is_400(triton: InferenceServerClient) -> None:
    text = tensor("image_bytes", np.array([b"not base64!"], np.object_), binary=False)
    assert "image 0 is not base64" in refused(triton, 400, text)


def test_too_many_images_are_413(triton: InferenceServerClient) -> None:
    assert "17 images; at most 16" in refused(triton, 413, encoded(*[b"x"] * 17))


def test_a_deadline_in_microseconds_is_kept(triton: InferenceServerClient) -> None:
    slow = {"method": "integrated_gradients", "steps": 100}
    images = tensor("images", np.zeros((16, 3, 64, 64), np.float32))
    message = refused(triton, 504, images, parameters=slow, timeout=1500)
    assert message.endswith("No answer within 2 ms.")


def test_large_json_is_refused_and_binary_is_named(triton: InferenceServerClient) -> None:
    many = np.zeros((MAX_JSON_ELEMENTS // IMAGES[0].size + 1, 3, 64, 64), np.float32)
    assert "send binary data" in refused(triton, 400, tensor("images", many, binary=False))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_415(triton: InferenceServerClient, algorithm: str) -> None:
    message = refused(triton, 415, tensor("images", IMAGES), request_compression_algorithm=algorithm)
    assert "Content-Encoding" in message


def test_another_model_s_name_in_the_body_is_400(server: Server) -> None:
    response = server.client.post("/v2/models/tiny/infer", json={"model_name": "other", "inputs": []})
    assert response.status_code == 400
    assert response.json() == {"error": "The body names another model than the address, 'tiny'."}


def test_a_body_that_lies_is_400(server: Server) -> None:
    headers = {"Inference-Header-Content-Length": "99"}
    response = server.client.post("/v2/models/tiny/infer", content=b"{}", headers=headers)
    assert response.status_code == 400
    assert response.json() == {"error": "Inference-Header-Content-Length is '99'; allowed: 0..2, the body's length."}


def test_an_address_that_is_none_is_404(server: Server) -> None:
    for address in ("/v2/models/tiny/stats", "/v2/models/a%2Fb", "/v2/"):
        response: httpx.Response = server.client.get(address)
        assert response.status_code == 404
        assert isinstance(response.json()["error"], str)
    assert server.client.get("/v2/models/tiny/infer").status_code == 405


# --- what a review sent ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(home: Home) -> Iterator[Server]:
    with serving(home.root / "many", settings={**home.settings, "max_images": 100}) as running:
        yield running


def test_outputs_too_long_for_json_are_refused_before_anything_is_computed(many: Server) -> None:
    client = InferenceServerClient(many.url.removeprefix("http://"))
    images = encoded(*[png(picture())] * 100)  # 100 maps of 64 x 64
    before = many.metric("parchgrad_device_seconds_count")
    message = refused(client, 400, images, outputs=asked("saliency", binary=False))
    assert f"409600 elements in JSON; at most {MAX_JSON_ELEMENTS}" in message
    assert many.metric("parchgrad_device_seconds_count") == before
    assert client.infer("tiny", [images], outputs=asked("saliency")).as_numpy("saliency").shape == (100, 64, 64)
    client.close()


def test_a_prediction_that_overflows_is_no_class(triton: InferenceServerClient) -> None:
    huge = tensor("images", np.full((1, 3, 64, 64), 3e38, np.float32))
    assert "overflows" in refused(triton, 422, huge, outputs=asked("target"))
