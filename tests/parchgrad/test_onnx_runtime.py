"""The ONNX front door: what the graph is asked and what is made of its answers; then the same as `Explainer`."""

import json
import math
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import parchgrad
from parchgrad.errors import (
    AbandonedError,
    GoldenError,
    ModelError,
    OptionError,
    UncoveredTargetError,
)
from parchgrad.explainer import Explainer
from parchgrad.graph.explanation import explanation_graph
from parchgrad.graph.prediction import trace_prediction
from parchgrad.options import Options
from parchgrad.preprocessing import Preprocessing
from parchgrad.runtimes import onnx_runtime
from parchgrad.runtimes.onnx_runtime import OnnxExplainer
from tests.oracles.tolerance import assert_close
from tests.parchgrad.networks import CLASSES, Branching, Smooth, table_for

LABELS = ["red", "green", "blue", "grey"]
COVERED = [2, 0, 1]  # in the table's order of rows; 'grey' has none
LAYERS = ["one", "two"]  # the table's order; the graph has them the other way round
CHANNELS = {"one": 10, "two": 100}
SIZE = (4, 5)
# What the hand-made graph makes of its inputs: gradient x (1 + quantile of 'two' + 10 x that of 'one' + gamma).
WEIGHT = {"one": 10.0, "two": 1.0}
A = np.random.default_rng(0).normal(size=(3 * 4 * 5, 4)).astype(np.float32)


def described(**changes):
    """The metadata, `changes` by dotted path."""
    data = {
        "format_version": 1,
        "model": {
            "name": "linear", "version": "3", "weights_sha256": "w" * 64, "architecture": "by hand",
            "labels": LABELS, "input": {"size": list(SIZE), "rule": "stretch"},
        },
        "table": {
            "format_version": 2, "name": "by hand", "version": "2", "table_sha256": "t" * 64, "files": {},
            "model": {"name": "linear", "weights_sha256": "w" * 64},
            "layers": [{"name": name, "channels": CHANNELS[name]} for name in LAYERS], "idle_layers": [],
            "left_out": [], "statistics_point": "convolution", "classes": COVERED, "images_per_class": [1] * 3,
            "defaults": {
                "quantile": 0.3, "gamma": "inf", "conserve": "independent", "selection": "class", "layers": ["*"],
                "normality_filter": False,
            },
            "built": {},
        },
        "graph": {
            "backward": "dense", "conserve": "independent", "seed": "logit", "dtype": "float32", "opset": 20,
            "layers": LAYERS[::-1],
        },
        "versions": {"parchgrad": "0"},
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return data


def linear_graph(fails_explaining=False):
    """Logits are a linear function of the image; `identity_layers` counts the layers that the rule acts on."""
    node = helper.make_node
    nodes = [
        node("Flatten", ["images"], ["flat"]),
        node("MatMul", ["flat", "a"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"]),
        node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        node("Less", ["targets", "zero"], ["open"]),
        node("Where", ["open", "best", "targets"], ["target"]),
        node("Gather", ["by_class", "target"], ["rows"]),
        node("Reshape", ["rows", "no_shape" if fails_explaining else "shape"], ["gradient"]),
        node("Mul", ["quantile", "weight"], ["weighted"]),
        node("ReduceSum", ["weighted", "one"], ["by_quantile"], keepdims=0),
        node("IsInf", ["gamma"], ["infinite"]),
        node("Where", ["infinite", "nothing", "gamma"], ["by_gamma"]),
        node("Sum", ["by_quantile", "by_gamma", "unit"], ["factor"]),
        node("Unsqueeze", ["factor", "last"], ["factors"]),
        node("Mul", ["gradient", "factors"], ["attributions"]),
        node("Abs", ["attributions"], ["sizes"]),
        node("ReduceMean", ["sizes", "one"], ["saliency"], keepdims=0),
        node("Greater", ["quantile", "nothing"], ["acts"]),
        node("Cast", ["acts"], ["acting"], to=TensorProto.INT64),
        node("ReduceSum", ["acting", "one"], ["identity_layers"], keepdims=0),
        node("Less", ["target", "three"], ["covered"]),
    ]
    constants = {
        "a": A, "by_class": np.ascontiguousarray(A.T), "zero": np.array(0), "three": np.array(3), "one": np.array([1]),
        "shape": np.array([-1, 3, *SIZE]), "no_shape": np.array([-1, 7]), "last": np.array([1, 2, 3]),
        "weight": np.array([[WEIGHT[name] for name in LAYERS[::-1]]], np.float32),
        "nothing": np.array(0, np.float32), "unit": np.array(1, np.float32),
    }  # fmt: skip
    value, floats, ints = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        value("images", floats, ["batch", 3, *SIZE]),
        value("targets", ints, ["batch"]),
        value("quantile", floats, ["batch", "layers"]),
        value("gamma", floats, ["batch"]),
    ]
    outputs = [
        value("logits", floats, ["batch", 4]),
        value("probabilities", floats, ["batch", 4]),
        value("target", ints, ["batch"]),
        value("saliency", floats, ["batch", *SIZE]),
        value("attributions", floats, ["batch", 3, *SIZE]),
        value("identity_layers", ints, ["batch"]),
        value("covered", TensorProto.BOOL, ["batch"]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write(folder, model=None, metadata=None, **saving):
    folder.mkdir(parents=True, exist_ok=True)
    model = linear_graph() if model is None else model
    if metadata is not False:
        entry = model.metadata_props.add()
        entry.key = "parchgrad"
        entry.value = metadata if isinstance(metadata, str) else json.dumps(metadata or described())
    onnx.save(model, folder / "model.onnx", **saving)
    return folder / "model.onnx"


@pytest.fixture
def linear(tmp_path):
    return OnnxExplainer(write(tmp_path / "linear" / "3"), threads=1)


def pictures(number, seed=0):
    return np.random.default_rng(seed).normal(size=(number, 3, *SIZE)).astype(np.float32)


def gradient_of(target):
    return A[:, target].reshape(3, *SIZE)


def factor(one=0.0, two=0.0, gamma=0.0):
    """By how many of the layers' channels."""
    return 1 + WEIGHT["one"] * one / CHANNELS["one"] + WEIGHT["two"] * two / CHANNELS["two"] + gamma


def test_what_it_says_of_itself(linear, tmp_path):
    assert (linear.model.name, linear.model.version, linear.model.weights_sha256) == ("linear", "3", "w" * 64)
    assert linear.model.labels == tuple(LABELS)
    assert linear.model.preprocessing == Preprocessing(size=SIZE, rule="stretch")
    assert (linear.table.name, linear.table.table_sha256, linear.table.classes) == ("by hand", "t" * 64, (2, 0, 1))
    assert linear.table.defaults.quantile == 0.3
    assert linear.table.defaults.gamma == math.inf
    assert linear.table.manifest() == {**described()["table"], "labels": LABELS}
    assert linear.layer_names == ("one", "two")
    assert linear.device == "cpu"
    assert linear.runtime.startswith("onnxruntime ")
    assert parchgrad.OnnxExplainer is OnnxExplainer


@pytest.mark.parametrize("path", ["linear", "linear/3", "linear/3/model.onnx"])
def test_a_folder_means_its_highest_version(path, tmp_path):
    write(tmp_path / "linear" / "2", metadata=described(model__version="2"))
    write(tmp_path / "linear" / "3")
    assert OnnxExplainer(tmp_path / path, threads=1).model.version == "3"


def test_a_gradient_is_asked_with_the_defaults_of_the_table(linear):
    images = pictures(2)
    found = linear.explain(images, [1, "blue"])
    assert_close(found.logits, images.reshape(2, -1) @ A, 1e-6)
    assert found.targets.tolist() == [1, 2]
    expected = factor(one=3, two=30) * np.stack([gradient_of(1), gradient_of(2)])
    assert_close(found.attributions, expected, 1e-6)
    assert_close(found.saliency(), np.abs(expected).mean(axis=1), 1e-6)
    assert found.layers_used.tolist() == found.identity_layers.tolist() == [2, 2]
    assert found.covered.tolist() == found.complete.tolist() == [True, True]
    assert np.isnan(found.completeness_gap).all()
    assert found.options == (Options(quantile=0.3),) * 2
    logits = found.logits.astype(float)
    assert_close(found.probabilities(), np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 1e-6)


def test_each_image_has_its_own_options(linear):
    images = pictures(6)
    found = linear.explain(
        images, [0, 0, 0, None, -1, "green"],
        method=["gradient", "input_x_gradient", "gradient", "gradient", "gradient", "integrated_gradients"],
        quantile=[0.2, 0.3, {"one": 0.5, "*": 0.29}, None, 1e-60, None],
        layers=[["*"], ["two"], ["*"], ["*"], ["!two"], ["*"]],
        gamma=[math.inf, 2.0, 0.5, math.inf, math.inf, math.inf], rule=[True, True, True, False, True, True], steps=3,
        uncovered="nan",
    )  # fmt: skip
    best = found.logits.argmax(axis=1)
    factors = [
        factor(one=2, two=20), factor(two=30, gamma=2), factor(one=5, two=29, gamma=0.5), factor(), factor(one=1),
        factor(one=3, two=30),
    ]  # fmt: skip
    targets = [0, 0, 0, best[3], best[4], 1]
    times = [1, images[1], 1, 1, 1, images[5]]
    expected = np.stack([f * gradient_of(t) * m for f, t, m in zip(factors, targets, times, strict=True)])
    expected[4] = expected[4] if best[4] in COVERED else math.nan
    assert found.targets.tolist() == targets
    assert_close(found.attributions, expected, 1e-5)
    assert found.layers_used.tolist() == [2, 1, 2, 0, 1, 2]
    for i in range(6):
        alone = linear.explain(
            images[i : i + 1], targets[i], method=found.options[i].method, rule=found.options[i].rule, steps=3,
            quantile=found.options[i].quantile, layers=found.options[i].layers, gamma=found.options[i].gamma,
            uncovered="nan",
        )  # fmt: skip
        assert_close(alone.attributions[0], found.attributions[i], 1e-6)


@pytest.mark.parametrize("quantile", [0.29, 0.3, 1 / 3, 0.07, 1.0, 1e-60, 0.1 - 1e-9, 0.99999])
def test_the_channels_that_a_quantile_means_survive_float32(quantile, linear):
    """What the graph makes of its float32, k = max(1, floor(q C (1 + 1e-6))), is what the library makes of float64."""
    row = linear._quantile_row(Options(quantile=quantile))
    assert row.dtype == np.float32
    for name, share in zip(linear.graph.layers, row, strict=True):
        channels = CHANNELS[name]
        found = max(1, math.floor(np.float64(share) * channels * (1 + 1e-6)))
        assert found == max(1, math.floor(quantile * channels * (1 + 1e-6)))
        assert share > 0


@pytest.mark.parametrize("room", [1, 2, 7, 1000])
def test_integrated_gradients_over_bounded_passes(room, linear, monkeypatch):
    sizes = spied(linear, monkeypatch)
    images, start = pictures(3), pictures(1, seed=1)[0]
    found = linear.explain(
        images, [0, 1, 2], method="integrated_gradients", steps=[3, 4, 2], rule=[False, True, False], baseline=start,
        pixels_per_pass=room * 20 + 19,
    )  # fmt: skip
    factors = np.array([1, factor(one=3, two=30), 1])[:, None, None, None]
    assert_close(found.attributions, np.stack([gradient_of(t) for t in range(3)]) * (images - start) * factors, 1e-5)
    assert sizes == [room] * (9 // room) + [9 % room] * (9 % room > 0)
    assert np.isnan(found.completeness_gap).tolist() == [False, True, False]
    assert np.abs(found.completeness_gap[[0, 2]]).max() < 1e-4
    assert found.identity_layers.tolist() == [0, 2, 0]


def spied(explainer, monkeypatch):
    """The batch of each pass through the whole graph."""
    sizes = []

    class Spy:
        def __init__(self, session):
            self._session = session

        def run(self, outputs, inputs):
            sizes.append(len(inputs["images"]))
            return self._session.run(outputs, inputs)

    monkeypatch.setattr(explainer, "_session", Spy(explainer._session))
    return sizes


def test_an_image_nobody_wants_any_more_is_left_out(linear, monkeypatch):
    sizes = spied(linear, monkeypatch)
    images = pictures(2)
    found = linear.explain(
        images, 0, method="integrated_gradients", steps=4, pixels_per_pass=20, wanted=lambda: [True, len(sizes) < 6]
    )
    assert sizes == [1] * 6
    assert found.complete.tolist() == [True, False]
    assert np.isnan(found.attributions[1]).all()
    assert_close(found.attributions[0], factor(one=3, two=30) * gradient_of(0) * images[0], 1e-5)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_an_explanation_nobody_wants_ends_at_the_next_pass(passes, linear, monkeypatch):
    sizes = spied(linear, monkeypatch)
    with pytest.raises(AbandonedError, match="None of the 2 images is wanted any more"):
        linear.explain(
            pictures(2), 0, method="integrated_gradients", steps=8, pixels_per_pass=20,
            wanted=lambda: [len(sizes) < passes] * 2,
        )  # fmt: skip
    assert len(sizes) == passes


def test_targets_without_a_row(linear, monkeypatch):
    sizes = spied(linear, monkeypatch)
    with pytest.raises(UncoveredTargetError, match=r"covers 3 of the model's 4 classes; .* target 3 \(grey\)"):
        linear.explain(pictures(2), [0, "grey"])
    assert sizes == []  # known before the graph runs
    grey = gradient_of(3)[None]
    assert linear.predict(grey).argmax() == 3
    with pytest.raises(UncoveredTargetError, match="grey"):
        linear.explain(grey)
    found = linear.explain(np.concatenate([grey, pictures(1)]), [None, 0], uncovered="nan")
    assert found.covered.tolist() == [False, True]
    assert np.isnan(found.attributions[0]).all()
    assert np.isfinite(found.attributions[1]).all()
    assert_close(linear.explain(grey, rule=False).attributions[0], gradient_of(3), 1e-6)


NOT_IN_GRAPH = {
    "method": (["guided_backprop", "grad_cam"], "gradient, input_x_gradient, integrated_gradients, with this ONNX"),
    "seed": (["probability_weighted_logit", "evidence"], "allowed: logit, with this ONNX graph"),
    "conserve": (["exact", "none"], "allowed: independent, with this ONNX graph"),
    "selection": (["instance"], "allowed: class, with this ONNX graph"),
    "alpha": ([0.05], "allowed: none: select by quantile, with this ONNX graph"),
    "normality_filter": ([True], "allowed: false, with this ONNX graph"),
}


@pytest.mark.parametrize("option", NOT_IN_GRAPH)
def test_what_the_graph_was_not_exported_for(option, linear):
    values, message = NOT_IN_GRAPH[option]
    for value in values:
        with pytest.raises(OptionError, match=f"Option '{option}' is {value!r}; allowed: .*") as caught:
            linear.explain(pictures(2), 0, **{option: [None, value]})
        assert message in str(caught.value)
        with pytest.raises(OptionError, match=option):
            linear.require_statistics([Options(**{option: value})])
        if option not in ("method", "seed"):
            linear.explain(pictures(1), 0, rule=False, **{option: value})  # of the rule alone


def test_the_exported_conserve_and_seed_are_the_defaults(tmp_path):
    changes = {"graph__conserve": "exact", "graph__seed": "probability_weighted_logit"}
    explainer = OnnxExplainer(write(tmp_path, metadata=described(**changes)), threads=1)
    found = explainer.explain(pictures(2), 0, seed=[None, "probability_weighted_logit"])
    assert {(o.conserve, o.seed) for o in found.options} == {("exact", "probability_weighted_logit")}
    with pytest.raises(OptionError, match="exact, with this ONNX graph"):
        explainer.explain(pictures(1), 0, conserve="independent")
    with pytest.raises(OptionError, match="probability_weighted_logit, with this ONNX graph"):
        explainer.explain(pictures(1), 0, seed="logit")


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(1, 3, *SIZE), "Tensor"),
        (np.zeros((1, 3, *SIZE)), "float64"),
        (np.zeros((0, 3, *SIZE), np.float32), r"\(0, 3, 4, 5\)"),
        (np.zeros((1, 3, 5, 4), np.float32), r"\(1, 3, 5, 4\)"),
        (np.zeros((1, 1, *SIZE), np.float32), r"\(1, 1, 4, 5\)"),
        (np.zeros((3, *SIZE), np.float32), r"\(3, 4, 5\)"),
    ],
    ids=["tensor", "double", "none", "size", "grey", "one"],
)
def test_images_of_another_kind_are_refused(images, found, linear):
    for call in (linear.predict, linear.explain):
        with pytest.raises(OptionError, match=f"'images' is .*{found}"):
            call(images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": "purple"}, "Option 'target' is 'purple'"),
        ({"targets": 4}, r"index in 0\.\.3"),
        ({"targets": [0, 1, 2]}, "one for each of the 2 images"),
        ({"targets": 0, "uncovered": "zero"}, "raise, nan"),
        ({"targets": 0, "pixels_per_pass": 0}, "at least 1"),
        ({"targets": 0, "method": "integrated_gradients", "baseline": np.zeros((3, 1, 1))}, "an array of shape"),
        ({"targets": 0, "wanted": lambda: [True]}, "one bool for each of the 2 images"),
        ({"targets": 0, "layers": "three"}, "names or glob patterns"),
        ({"targets": 0, "quantile": {"one": 0.1}}, "'two' has none"),
    ],
)
def test_wrong_arguments_are_named(given, message, linear):
    with pytest.raises(OptionError, match=message):
        linear.explain(pictures(2), **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0),
        ("threads", True),
        ("threads", 2.0),
        ("providers", []),
        ("providers", ["Abacus"]),
        ("providers", "CPUExecutionProvider"),
    ],
)
def test_an_engine_that_is_not_here(name, value, tmp_path):
    with pytest.raises(OptionError, match=f"Option '{name}' is"):
        OnnxExplainer(write(tmp_path), **{name: value})


def without_covered():
    model = linear_graph()
    del model.graph.output[-1]
    return model


BAD = {
    "no metadata": ({"metadata": False}, "has no 'parchgrad' in its metadata"),
    "no json": ({"metadata": "{"}, "metadata is not JSON"),
    "a list": ({"metadata": "[]"}, "has format version 'list'; this library reads 1"),
    "version": ({"metadata": described(format_version=2)}, "has format version 2; this library reads 1"),
    "no table": ({"metadata": described(table=...)}, "metadata has no 'table'"),
    "no name": ({"metadata": described(model__name=...)}, "metadata has no 'name'"),
    "input": ({"metadata": described(model__input={"size": [0, 1]})}, "malformed: Preprocessing: size"),
    "layers": ({"metadata": described(graph__layers=["one"])}, "1 layers, not the 2 of its table"),
    "conserve": ({"metadata": described(graph__conserve="some")}, "conserve is 'some', expected one of"),
    "seed": ({"metadata": described(graph__seed="some")}, "seed is 'some', expected one of"),
    "evidence": (
        {"metadata": described(graph__seed="evidence")},
        "seed is 'evidence', expected one of logit, probability_weighted_logit",
    ),
    "classes": ({"metadata": described(table__classes=[0, 4])}, r"class 4 of its table is outside 0\.\.3"),
    "labels": ({"metadata": described(model__labels=LABELS[:3])}, "logits of 4 classes, its metadata has 3 labels"),
    "output": ({"model": without_covered()}, r"has the outputs .*, expected logits float, .*covered bool"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_none_of_ours(what, tmp_path):
    given, message = BAD[what]
    with pytest.raises(ModelError, match=message):
        OnnxExplainer(write(tmp_path, **given), threads=1)


def test_a_file_that_is_no_onnx(tmp_path):
    with pytest.raises(ModelError, match=r"model\.onnx' does not exist"):
        OnnxExplainer(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"neither model\.onnx nor a numbered version folder"):
        OnnxExplainer(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"hello" * 20)
    with pytest.raises(ModelError, match=r"model\.onnx' cannot be opened: "):
        OnnxExplainer(tmp_path / "model.onnx")


@pytest.mark.parametrize("external", [False, True], ids=["weights inside", "weights beside"])
def test_prediction_computes_nothing_of_the_explanation(external, tmp_path, monkeypatch):
    """The graph fails as soon as its explanation is computed; prediction does not."""
    saving = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 200} if external else {}
    path = write(tmp_path, linear_graph(fails_explaining=True), **saving)
    explainer, images = OnnxExplainer(path, threads=1), pictures(3)
    monkeypatch.chdir(Path(__file__).parent)  # the weights lie beside the file, wherever the process is
    with pytest.raises(Exception, match="Reshape"):
        explainer.explain(images, 0)
    assert_close(explainer.predict(images), images.reshape(3, -1) @ A, 1e-6)
    alone = onnx.load_from_string(onnx_runtime._prediction_alone(explainer._read()))
    assert [node.op_type for node in alone.graph.node] == ["Flatten", "MatMul"]
    assert [one.name for one in alone.graph.initializer] == ["a"]


def test_prediction_keeps_what_a_subgraph_reads(tmp_path):
    """Both branches of an If read tensors of the graph around it."""
    model = linear_graph()
    graph = model.graph

    def branch(name, source):
        inner = helper.make_node("Identity", [source], [f"{name}_chosen"])
        return helper.make_graph([inner], name, [], [helper.make_tensor_value_info(f"{name}_chosen", 1, None)])

    graph.node[1].output[0] = "plain"
    graph.node.insert(2, helper.make_node("Mul", ["plain", "two"], ["doubled"]))
    graph.node.insert(
        3,
        helper.make_node(
            "If", ["yes"], ["logits"], then_branch=branch("a_", "doubled"), else_branch=branch("b_", "plain")
        ),
    )
    graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    images = pictures(2)
    assert_close(OnnxExplainer(write(tmp_path, model), threads=1).predict(images), images.reshape(2, -1) @ A * 2, 1e-6)


def test_many_threads_share_one_explainer(linear):
    images = pictures(8)
    expected, found = linear.explain(images, 1).attributions, [None] * 4

    def work(number):
        for _ in range(5):
            linear.predict(images)
            found[number] = linear.explain(images, 1).attributions

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, expected) for one in found)


def golden_of(image, **changes):
    tensors = {
        "image": image,
        "target": np.array([1]),
        "logits": image.reshape(1, -1) @ A,
        "saliency": np.abs(factor(one=3, two=30) * gradient_of(1)).mean(axis=0)[None].astype(np.float32),
    }
    return tensors | changes


def test_the_golden_record_proves_the_file(linear, tmp_path):
    path, image = tmp_path / "linear" / "3" / "golden.safetensors", pictures(1)
    with pytest.raises(GoldenError, match=r"has no golden\.safetensors"):
        linear.self_test()
    save_file(golden_of(image), path)
    linear.self_test()
    save_file(golden_of(image, logits=image.reshape(1, -1) @ A * 1.02), path)
    with pytest.raises(GoldenError, match=r"Golden logits is off by 0.0196 \(relative L2\), allowed 0.01"):
        linear.self_test()
    save_file(golden_of(image, saliency=np.abs(gradient_of(2)).mean(axis=0)[None]), path)
    with pytest.raises(GoldenError, match="Golden saliency map is off by"):
        linear.self_test()
    for damage, off in ((1e30, "1 "), (math.inf, "nan")):
        logits = image.reshape(1, -1) @ A
        logits[0, 0] = damage
        save_file(golden_of(image, logits=logits), path)
        with pytest.raises(GoldenError, match=f"Golden logits is off by {off}"):
            linear.self_test()
    save_file(golden_of(image, saliency=np.zeros((1, 2, 2), np.float32)), path)
    with pytest.raises(GoldenError, match=r"has shape \(1, 4, 5\), recorded \(1, 2, 2\)"):
        linear.self_test()
    save_file(golden_of(image), path, metadata={"digests": json.dumps({"table_sha256": "other"})})
    with pytest.raises(GoldenError, match=f"table_sha256 is other, loaded is {'t' * 64}"):
        linear.self_test()
    path.write_bytes(b"hello" * 20)
    with pytest.raises(GoldenError, match="cannot be read"):
        linear.self_test()


REDUCTIONS = {
    "mean_abs": lambda a: np.abs(a).mean(1),
    "max_abs": lambda a: np.abs(a).max(1),
    "sum": lambda a: a.sum(1),
    "positive": lambda a: np.clip(a.sum(1), 0, None),
    "negative": lambda a: np.clip(-a.sum(1), 0, None),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction, linear):
    found = linear.explain(pictures(2), [0, 1])
    assert_close(found.saliency(reduction), REDUCTIONS[reduction](found.attributions.astype(float)), 1e-6)
    with pytest.raises(OptionError, match="mean_abs, sum, max_abs, positive, negative"):
        found.saliency("median")


@dataclass
class Exported:
    """A small network both ways."""

    torch: Explainer
    onnx: OnnxExplainer
    images: np.ndarray = field(repr=False)


@pytest.fixture(scope="module", params=["pruned", "dense"])
def exported(request, tmp_path_factory):
    return {kind: both_ways(kind, request.param, tmp_path_factory.mktemp("exported")) for kind in (Branching, Smooth)}


def both_ways(kind, backward, folder):
    torch.manual_seed(0)
    network, size = kind().eval(), (14, 12)
    table = table_for(network, covered=[2, 0, 4])
    model = explanation_graph(trace_prediction(network, size, native=False), table, backward=backward)
    written = {key: value for key, value in table.manifest().items() if key != "labels"}
    preprocessing = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(Preprocessing(size=size, rule="stretch")).items()
    }
    metadata = described(
        model__labels=list(table.labels), model__input=preprocessing, table=written, graph__backward=backward,
        graph__layers=list(table.layer_names),
    )  # fmt: skip
    images = np.random.default_rng(3).normal(size=(4, 3, *size)).astype(np.float32)
    return Exported(Explainer(network, table), OnnxExplainer(write(folder, model, metadata), threads=1), images)


SETTINGS = {
    "defaults": {},
    "plain": {"rule": False},
    "mixed": {
        "quantile": [0.2, {"stem": 0.5, "*": 0.3}, 1.0, 1e-9], "gamma": [math.inf, 2.0, 0.0, 1e6],
        "layers": [["*"], ["!join"], ["join", "stem"], ["*"]], "rule": [True, True, True, True],
    },
    "times input": {"method": ["gradient", "input_x_gradient", "input_x_gradient", "gradient"]},
    "integrated": {"method": "integrated_gradients", "steps": [5, 3, 8, 2], "rule": [True, False, True, False]},
    "both": {"method": ["integrated_gradients", "gradient"] * 2, "steps": 4, "rule": [True, False, True, True]},
}  # fmt: skip


@pytest.mark.parametrize("kind", [Branching, Smooth])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_as_the_explainer(settings, kind, exported):
    both = exported[kind]
    targets = [0, None, 4, 3]
    given = SETTINGS[settings] | {"uncovered": "nan", "pixels_per_pass": 3 * 14 * 12}
    expected = both.torch.explain(torch.from_numpy(both.images), targets, **given)
    found = both.onnx.explain(both.images, targets, **given)
    assert_close(both.onnx.predict(both.images), expected.logits, 1e-5)
    assert_close(found.logits, expected.logits, 1e-5)
    assert_close(found.probabilities(), expected.probabilities(), 1e-5)
    for name in ("targets", "covered", "complete", "layers_used", "identity_layers"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    for i in range(len(targets)):
        assert_close(found.attributions[i], expected.attributions[i], 1e-4)
        assert_close(found.saliency()[i], expected.saliency()[i], 1e-4)
    assert np.isnan(found.completeness_gap).tolist() == expected.completeness_gap.isnan().tolist()
    assert np.abs(np.nan_to_num(found.completeness_gap) - expected.completeness_gap.nan_to_num().numpy()).max() < 1e-4
    assert found.options == expected.options
    assert len(expected.logits[0]) == CLASSES
