"""The running service on exported graphs: what it says of them, answers, refuses and reloads. The graphs are small."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
from tritonclient.http import InferenceServerClient

from tests.service import graphs
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, free_port, serving
from tests.service.test_protocol import asked, refused, tensor
from tests.service.test_repository import ADMIN, TOKEN, change, index
from tests.service.test_server import refused as refused_natively

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
IMAGE = files(png(picture()))
GRPC_PORT = free_port()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    graphs.write(root / "graphs")
    return root


@pytest.fixture(scope="module")
def small(shelf: Path) -> Iterator[Server]:
    """Nothing but the folder of graphs: there are neither models nor tables."""
    settings = {
        "graphs_dir": shelf / "graphs", "models_dir": shelf / "nowhere", "tables_dir": shelf / "nowhere",
        "model": "small", "runtime": "onnx", "threads": 1, "drain_ms": 0, "grpc_port": GRPC_PORT,
        "admin_keys": f"ops:{hashlib.sha256(TOKEN.encode()).hexdigest()}",
    }  # fmt: skip
    with serving(shelf / "home", settings=settings) as running:
        yield running


@pytest.fixture
def triton(small: Server) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(small.url.removeprefix("http://"))
    yield client
    client.close()


def explained(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.client.post("/explain", files=IMAGE, data=fields)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def images(count: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 3, *graphs.SIZE)).astype(np.float32)


def flat(target: int, layers: int) -> np.ndarray:
    """The map of one image."""
    value = np.abs(graphs.weights()[:, target]).mean() * layers / np.prod(graphs.SIZE)
    return np.full(graphs.SIZE, value, np.float32)


# --- what is said of it ----------------------------------------------------------------------------------------


def test_answers_say_what_computed_them(small: Server) -> None:
    answer = explained(small, target="green")
    assert answer["software"]["runtime"] == RUNTIME
    assert answer["software"]["device"] == "cpu"
    assert answer["model"] == {
        "name": "small", "version": "1", "weights_sha256": "a" * 64, "table_sha256": "b" * 64
    }  # fmt: skip
    (result,) = answer["results"]
    assert result["explanation"]["status"] == "ok"
    assert result["explanation"]["target"]["label"] == "green"


def test_the_model_says_what_its_graph_can_do(small: Server) -> None:
    about = small.client.get("/models/small").json()
    assert about["labels"] == list(graphs.LABELS)
    assert about["table"]["classes"] == [0, 1, 2]
    assert about["bounds"]["method"] == "gradient, input_x_gradient, integrated_gradients"
    assert about["bounds"]["layers"].endswith("one, two")
    assert about["options"]["seed"] == "logit"
    assert about["input"]["size"] == list(graphs.SIZE)


def test_the_protocol_says_so_too(triton: InferenceServerClient) -> None:
    about = triton.get_model_metadata("small")
    assert about["platform"] == triton.get_model_config("small")["platform"] == "onnxruntime_onnx"
    assert [one["name"] for one in about["inputs"]] == ["images", "image_bytes", "target", "quantile", "gamma"]


# --- options that a graph does not have ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("selection", "instance"),
        ("alpha", "0.05"),
        ("normality_filter", "true"),
        ("method", "guided_backprop"),
        ("method", "grad_cam"),
        ("conserve", "none"),
        ("seed", "probability_weighted_logit"),
        ("seed", "evidence"),
    ],
)
def test_what_the_graph_cannot_do_is_422_before_anything_is_decoded(small: Server, option: str, value: str) -> None:
    batches = small.metric("parchgrad_batch_images_count")
    response = small.client.post("/explain", files=files(b"no image at all"), data={option: value})
    message = refused_natively(response, 422, "option_invalid")
    assert f"'{option}'" in message
    assert "ONNX graph" in message
    assert small.metric("parchgrad_batch_images_count") == batches


def test_a_class_without_a_row_has_no_map(small: Server) -> None:
    (result,) = explained(small, target="grey")["results"]
    assert result["explanation"]["error"]["code"] == "target_not_in_table"
    (result,) = explained(small, target="grey", rule="false")["results"]
    assert result["explanation"]["status"] == "ok"


# --- the Open Inference Protocol -------------------------------------------------------------------------------


def test_what_a_graph_takes_from_triton_is_taken_here(triton: InferenceServerClient) -> None:
    """The inputs by the graph's own names and shapes: `targets`, one `quantile` a layer, `gamma`."""
    given = images(4)
    quantile = np.array([[0.5, 0.25], [0.5, 0], [0, 0], [0.5, 0.5]], np.float32)
    inputs = [
        tensor("images", given),
        tensor("targets", np.array([0, 2, graphs.COVERED, graphs.COVERED])),
        tensor("quantile", quantile),
        tensor("gamma", np.array([np.inf, 1, np.inf, 1], np.float32)),
    ]
    result = triton.infer("small", inputs, outputs=asked("logits", "target", "saliency"))
    session = onnxruntime.InferenceSession(graphs.served(graphs.weights()), providers=["CPUExecutionProvider"])
    logits, target, saliency = session.run(
        ["logits", "target", "saliency"],
        {"images": given, "targets": np.array([0, 2, 3, 3]), "quantile": quantile, "gamma": np.ones(4, np.float32)},
    )
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-5)
    np.testing.assert_array_equal(result.as_numpy("target"), target)
    np.testing.assert_allclose(result.as_numpy("saliency"), saliency, rtol=1e-5)
    np.testing.assert_allclose(saliency[:3], [flat(0, 2), flat(2, 1), flat(graphs.COVERED, 0)], rtol=1e-5)
    assert np.isnan(saliency[3]).all()  # the class has no row


def test_the_same_over_grpc(small: Server) -> None:
    inputs = []
    for name, data in (
        ("images", images(1)), ("targets", np.array([1])), ("quantile", np.array([[0.5, 0.0]], np.float32)),
    ):  # fmt: skip
        made = tritonclient.grpc.InferInput(name, list(data.shape), "INT64" if name == "targets" else "FP32")
        made.set_data_from_numpy(data)
        inputs.append(made)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{GRPC_PORT}") as client:
        assert client.get_model_metadata("small").platform == "onnxruntime_onnx"
        result = client.infer("small", inputs)
    assert result.as_numpy("target").tolist() == [1]
    np.testing.assert_allclose(result.as_numpy("saliency")[0], flat(1, 1), rtol=1e-5)


def test_one_quantile_for_all_layers_and_the_predicted_class(triton: InferenceServerClient) -> None:
    inputs = [tensor("images", images(1)), tensor("targets", np.array([[-1]])), tensor("quantile", _column(0.5))]
    result = triton.infer("small", inputs)
    assert result.as_numpy("target").tolist() == [int(result.as_numpy("logits").argmax())]


def _column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize(
    ("status", "names", "fields", "message"),
    [
        (400, ("target", "targets"), {}, "Inputs 'target' and 'targets' are one"),
        (400, ("target", "wrong quantile"), {}, r"Input 'quantile' has shape \[2, 3\]"),
        (422, ("quantile",), {"parameters": {"quantile": 0.5}}, "'quantile' is given as parameter and as input"),
        (422, ("quantile",), {"parameters": {"layers": "one"}}, "Option 'layers' has no effect where 'quantile' is"),
        (422, ("quantile",), {"parameters": {"method": "grad_cam"}}, "'quantile' has no effect with method=grad_cam"),
        (422, ("negative quantile",), {}, r"Option 'quantile' is \[-0.5, 0.5\]; allowed: a number in \[0, 1\] a layer"),
        (422, ("nan quantile",), {}, "Option 'quantile' is"),
        (422, ("short quantile",), {}, "Input 'quantile' has 1 rows; allowed: one an image, 2"),
        (422, (), {"parameters": {"selection": "instance"}}, "'selection' is 'instance'.*ONNX graph"),
    ],
)
def test_what_does_not_fit_is_refused(
    triton: InferenceServerClient, status: int, names: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    of_layers = np.full((2, 2), 0.5, np.float32)
    known = {
        "target": ("target", np.array([0, 1])),
        "targets": ("targets", np.array([0, 1])),
        "quantile": ("quantile", of_layers),
        "wrong quantile": ("quantile", np.full((2, 3), 0.5, np.float32)),
        "negative quantile": ("quantile", of_layers * np.array([[-1, 1]], np.float32)),
        "nan quantile": ("quantile", of_layers * np.float32(np.nan)),
        "short quantile": ("quantile", of_layers[:1]),
    }
    inputs = [tensor("images", images(2)), *(tensor(*known[name]) for name in names)]
    assert re.search(message, refused(triton, status, *inputs, model="small", **fields))


def test_targets_and_layers_on_torch_as_well(server: Server, home: Home) -> None:
    """The inputs are the protocol's and not the runtime's: the same request may be sent to either."""
    explainer = home.explainer()
    names = explainer.layer_names
    pixels = explainer.model.preprocessing.apply(picture())[0][None]
    row = {name: 0.25 * (i % 3) for i, name in enumerate(names)}
    acting = {name: value for name, value in row.items() if value}
    expected = explainer.explain(pixels, 2, quantile=acting, layers=[*acting]).saliency()[0].numpy()
    quantile = np.array([[*row.values()]], np.float32)
    client = InferenceServerClient(server.url.removeprefix("http://"))
    try:
        result = client.infer(
            "tiny",
            [tensor("images", pixels.numpy()), tensor("targets", np.array([2])), tensor("quantile", quantile)],
        )
    finally:
        client.close()
    np.testing.assert_allclose(result.as_numpy("saliency")[0], expected, rtol=1e-4, atol=1e-6 * expected.max())


# --- loading ---------------------------------------------------------------------------------------------------


def test_versions_come_and_go(small: Server, shelf: Path) -> None:
    folder = graphs.write(shelf / "graphs", version="2", seed=7, weights_sha256="d" * 64)
    try:
        assert change(small, "small", "load").status_code == 200
        assert index(small) == {("small", "2"): "READY"}
        assert explained(small)["model"]["weights_sha256"] == "d" * 64
        graphs.record(folder, seed=8)  # the golden map of another network
        answer = change(small, "small", "load")
        assert answer.status_code == 409
        assert "olden" in answer.json()["error"]
        (folder / "model.onnx").write_bytes(b"no graph")
        answer = change(small, "small", "load")
        assert answer.status_code == 409
        assert "graphs/small/2/model.onnx' cannot be opened" in answer.json()["error"]
        assert str(shelf) not in answer.json()["error"]  # where our folders are is nobody's business
        assert explained(small)["model"]["version"] == "2"  # what served goes on
    finally:
        shutil.rmtree(folder)
    assert change(small, "small", "load").status_code == 200
    assert index(small) == {("small", "1"): "READY"}
    assert change(small, "small", "unload").status_code == 200
    assert index(small) == {}
    assert change(small, "small", "load").status_code == 200
    assert small.client.post("/v2/repository/models/absent/load", headers=ADMIN).status_code == 404
