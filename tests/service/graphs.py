"""A small graph that keeps the contract of an exported one, written in a moment and without torch.

Its network is one 1x1 convolution and a mean over the picture: logits are the mean colours times `weights`. Its map is
the target's weights over the picture's size; a layer whose quantile is 0 adds nothing, so that options are seen.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LABELS = ("red", "green", "blue", "grey")
COVERED = 3  # of the four; the table has no row for the last
LAYERS = ("one", "two")
SIZE = (32, 32)
TABLE = {
    "format_version": 2,
    "name": "small",
    "version": "1",
    "files": {},
    "layers": [{"name": name, "channels": 4} for name in LAYERS],
    "idle_layers": [],
    "left_out": [],
    "statistics_point": "convolution",
    "classes": list(range(COVERED)),
    "images_per_class": [10] * COVERED,
    "defaults": {
        "quantile": 0.1, "gamma": "inf", "conserve": "independent", "selection": "class", "layers": ["*"],
        "normality_filter": False,
    },
    "built": {"by": "hand"},
}  # fmt: skip


def weights(seed: int = 0) -> np.ndarray:
    """(3, classes)"""
    return np.random.default_rng(seed).normal(size=(3, len(LABELS))).astype(np.float32)


def metadata(name: str, version: str, weights_sha256: str, table_sha256: str) -> dict[str, Any]:
    preprocessing = {
        "size": SIZE, "rule": "stretch", "resize": None, "mean": [0.5] * 3, "std": [0.25] * 3,
        "interpolation": "bilinear", "min_side": 32, "max_side": 512,
    }  # fmt: skip
    return {
        "format_version": 1,
        "model": {
            "name": name, "version": version, "weights_sha256": weights_sha256, "architecture": "by hand",
            "labels": list(LABELS), "input": preprocessing,
        },
        "table": {
            **TABLE, "model": {"name": name, "weights_sha256": weights_sha256}, "table_sha256": table_sha256,
        },
        "graph": {
            "backward": "dense", "conserve": "independent", "seed": "logit", "dtype": "float32", "opset": 20,
            "layers": list(LAYERS),
        },
        "versions": {"parchgrad": "0", "onnx": onnx.__version__},
    }  # fmt: skip


def write(
    graphs: Path,
    name: str = "small",
    version: str = "1",
    *,
    seed: int = 0,
    weights_sha256: str = "a" * 64,
    table_sha256: str = "b" * 64,
    says: dict[str, Any] | None = None,
) -> Path:
    """`graphs/name/version/` with model.onnx and golden.safetensors; `says` replaces the whole metadata."""
    folder = graphs / name / version
    folder.mkdir(parents=True)
    described = says or metadata(name, version, weights_sha256, table_sha256)
    model = _model(weights(seed))
    entry = model.metadata_props.add()
    entry.key, entry.value = "parchgrad", json.dumps(described)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    record(folder, seed)
    return folder


def record(folder: Path, seed: int) -> None:
    from safetensors.numpy import save_file

    image = np.random.default_rng(1).normal(size=(1, 3, *SIZE)).astype(np.float32)
    logits = image.mean(axis=(2, 3)) @ weights(seed)
    saliency = np.full((1, *SIZE), np.abs(weights(seed)[:, 0]).mean() * len(LAYERS) / np.prod(SIZE), np.float32)
    tensors = {"image": image, "target": np.array([0], np.int64), "logits": logits, "saliency": saliency}
    save_file(tensors, folder / "golden.safetensors")


def served(w: np.ndarray) -> bytes:
    """The graph alone, for ONNX Runtime."""
    return bytes(_model(w).SerializeToString())


def _model(w: np.ndarray) -> onnx.ModelProto:
    node, constant = helper.make_node, numpy_helper.from_array
    nodes = [
        node("ReduceMean", ["images", "sides"], ["means"], keepdims=0),
        node("MatMul", ["means", "weights"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
        node("ArgMax", ["logits"], ["predicted"], axis=1, keepdims=0),
        node("Less", ["targets", "zero"], ["open"]),
        node("Where", ["open", "predicted", "targets"], ["target"]),
        # the map
        node("Gather", ["by_class", "target"], ["chosen"], axis=0),  # (batch, 3)
        node("Cast", ["quantile"], ["acts"], to=TensorProto.BOOL),
        node("Cast", ["acts"], ["acting"], to=TensorProto.FLOAT),
        node("Expand", ["acting", "all_layers"], ["of_layers"]),
        node("ReduceSum", ["of_layers", "one"], ["number"], keepdims=1),  # (batch, 1)
        node("Mul", ["chosen", "number"], ["scaled"]),
        node("Unsqueeze", ["scaled", "sides"], ["pixel"]),
        node("Shape", ["images"], ["shape"]),
        node("Expand", ["pixel", "shape"], ["wide"]),
        node("Shape", ["images"], ["sizes"], start=2),
        node("ReduceProd", ["sizes"], ["size"], keepdims=0),
        node("Cast", ["size"], ["pixels"], to=TensorProto.FLOAT),
        node("Div", ["wide", "pixels"], ["map"]),
        node("Less", ["target", "rows"], ["has_row"]),
        node("ReduceMax", ["of_layers", "one"], ["most"], keepdims=0),
        node("LessOrEqual", ["most", "nothing"], ["plain"]),
        node("Or", ["has_row", "plain"], ["covered"]),
        node("Unsqueeze", ["covered", "behind"], ["covered_pixels"]),
        node("Where", ["covered_pixels", "map", "nan"], ["attributions"]),
        node("Abs", ["attributions"], ["sizes_of"]),
        node("ReduceMean", ["sizes_of", "one"], ["saliency"], keepdims=0),
        node("Mul", ["target", "zero"], ["no_layers"]),
        node("Identity", ["no_layers"], ["identity_layers"]),
        # gamma takes no part
    ]
    constants = {
        "weights": w, "by_class": np.ascontiguousarray(w.T), "sides": np.array([2, 3]), "one": np.array([1]),
        "zero": np.array(0), "all_layers": np.array([1, len(LAYERS)]), "rows": np.array(COVERED),
        "nothing": np.array(0, np.float32), "behind": np.array([1, 2, 3]), "nan": np.array(np.nan, np.float32),
    }  # fmt: skip
    value = helper.make_tensor_value_info
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "small",
        inputs=[
            value("images", floats, ["batch", 3, *SIZE]),
            value("targets", ints, ["batch"]),
            value("quantile", floats, ["batch", "layers"]),
            value("gamma", floats, ["batch"]),
        ],
        outputs=[
            value("logits", floats, ["batch", len(LABELS)]),
            value("probabilities", floats, ["batch", len(LABELS)]),
            value("target", ints, ["batch"]),
            value("saliency", floats, ["batch", *SIZE]),
            value("attributions", floats, ["batch", 3, *SIZE]),
            value("identity_layers", ints, ["batch"]),
            value("covered", TensorProto.BOOL, ["batch"]),
        ],
        initializer=[constant(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
