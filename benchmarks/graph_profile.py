"""Where the time of an explanation graph goes, by ONNX Runtime's own profiler, and what would remain at best.

Which part of the backward pass a node belongs to is noted while the graph is written: by the function that asked for
it, which is why this benchmark reaches into the package.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.graph_cases import (
    QUANTILE,
    Subject,
    explained,
    explanation_call,
    prediction_call,
    session,
    traced,
)
from benchmarks.measuring import interleaved
from parchgrad.graph import backward, builder, convolution, derivatives, gradients, pooling, rule
from parchgrad.graph.prediction import OPSET, Prediction

FORWARD, REORDERS, FORWARD_REST = "forward: convolutions", "layout reorders", "forward: the rest"
PRODUCTS, ROWS, SUMS = "backward: convolutions, matrix products", "rows gathered and scaled", "side sums, factors"
MASKS, POOLS, REST = "activations' derivatives (ReLU masks)", "pooling", "the rest (gates, joins, outputs)"
PARTS = (FORWARD, REORDERS, FORWARD_REST, PRODUCTS, ROWS, SUMS, MASKS, POOLS, REST)

_HOLDING = ("Scan", "If")
_OURS = ("explain/", "image/")
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FusedConv"}
_WRITERS = {builder.__name__, backward.__name__}  # they write for others
_ACTIVATIONS = {"_relu", "_leaky_relu", "_clip", "_bounded", "_sigmoid", "_tanh", "_hard_sigmoid", "_hard_swish",
                "_erf", "_gelu", "_elu", "_softplus", "_swish"}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Milliseconds a call: of the whole by CPU time, of the parts by ONNX Runtime's profiler, by wall-clock.

    The parts hold some of the profiler's own work, a few microseconds a node, and not what is done between nodes.
    """

    model: str
    batch: int
    predict: float
    explain: float
    passes: float  # one read-modify pass over the gradient of every convolution's output
    prediction_parts: dict[str, float]
    explanation_parts: dict[str, float]
    prediction_nodes: int  # that run in a call
    explanation_nodes: int

    @property
    def floor(self) -> float:
        """Explanation over prediction, were there nothing but those passes."""
        return 1 + self.passes / self.predict

    @property
    def selected(self) -> float:
        """The same with the selected channels' share of the convolutions' arithmetic, and that at their speed."""
        share = self.prediction_parts[FORWARD] / sum(self.prediction_parts.values())
        return self.floor + QUANTILE * share


def profile(found: Subject, batch: int, runs: int) -> Profile:
    """Of the pruned graph."""
    prediction = traced(found)
    with noted_parts() as parts:
        graph = explained(found, prediction, "pruned")
    images, targets = found.pictures(batch), found.targets(batch)
    passes, given = gradient_passes(prediction, batch)
    calls = {
        "predict": prediction_call(session(prediction.model), images),
        "explain": explanation_call(session(graph), images, targets),
        "passes": _passes_call(session(passes), given),
    }
    seconds = {name: 1000 * statistics.median(times) for name, times in interleaved(calls, runs).items()}
    del calls
    before, nodes_before = _parts(prediction.model, {}, lambda s: prediction_call(s, images), runs)
    after, nodes_after = _parts(graph, parts, lambda s: explanation_call(s, images, targets), runs)
    return Profile(
        found.name,
        batch,
        **seconds,
        prediction_parts=before,
        explanation_parts=after,
        prediction_nodes=nodes_before,
        explanation_nodes=nodes_after,
    )


# --- the floor ----------------------------------------------------------------------------------------------------


def gradient_passes(prediction: Prediction, batch: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]]]:
    """A graph that multiplies two tensors of the shape of every convolution's output, and its inputs."""
    graph = prediction.model.graph
    made = {node.output[0] for node in graph.node if node.op_type == "Conv"}
    shapes = [
        (batch, *(side.dim_value for side in info.type.tensor_type.shape.dim[1:]))
        for info in graph.value_info
        if info.name in made
    ]
    given: dict[str, np.ndarray[Any, Any]] = {}
    nodes, outputs = [], []
    for number, shape in enumerate(shapes):
        names = [f"gradient_{number}", f"value_{number}"]
        given |= {name: np.ones(shape, dtype=np.float32) for name in names}
        nodes.append(helper.make_node("Mul", names, [f"product_{number}"], name=f"Mul_{number}"))
        outputs.append(helper.make_tensor_value_info(f"product_{number}", TensorProto.FLOAT, shape))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in given.items()]
    body = helper.make_graph(nodes, "passes", inputs, outputs)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), given


def _passes_call(running: onnxruntime.InferenceSession, given: dict[str, np.ndarray[Any, Any]]) -> Callable[[], object]:
    # All is computed whatever is asked for; the last product is a small one.
    last = running.get_outputs()[-1].name
    return lambda: running.run([last], given)


# --- the parts ----------------------------------------------------------------------------------------------------


@contextmanager
def noted_parts() -> Iterator[dict[str, str]]:
    """The part of each node that is written meanwhile, by name."""
    parts: dict[str, str] = {}
    write = builder.Builder.ops

    def noting(self: builder.Builder, kind: str, *given: Any, **attributes: Any) -> list[str]:
        outputs = write(self, kind, *given, **attributes)
        parts[outputs[0]] = _part_of(kind)
        return outputs

    with mock.patch.object(builder.Builder, "ops", noting):
        yield parts


def _part_of(kind: str) -> str:
    """By the first function above that writes for itself."""
    frame: Any = sys._getframe(2)
    while frame.f_globals["__name__"] in _WRITERS:
        frame = frame.f_back
    module, function = frame.f_globals["__name__"], frame.f_code.co_name
    if module == rule.__name__:
        return SUMS
    if module == pooling.__name__:
        return SUMS if function == "sums" else POOLS
    if kind in _PRODUCTS:
        return PRODUCTS
    if module in (convolution.__name__, gradients.__name__):
        return ROWS
    if module == derivatives.__name__ and function in _ACTIVATIONS:
        return MASKS
    return REST


def _parts(
    model: onnx.ModelProto,
    noted: Mapping[str, str],
    call_of: Callable[[onnxruntime.InferenceSession], Callable[[], object]],
    runs: int,
) -> tuple[dict[str, float], int]:
    """Milliseconds of each part, and how many nodes run.

    A node's time is the least of the runs after the first two: the profiler's clock does not stop while others work.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = session(model, profile=Path(folder) / "profile")
        call = call_of(running)
        for _ in range(2 * runs + 2):
            call()
        events = json.loads(Path(running.end_profiling()).read_text(encoding="utf-8"))
    spans = [(one["ts"], one["ts"] + one["dur"]) for one in events if one["name"] == "model_run"][2:]
    found: list[Counter[str]] = [Counter() for _ in spans]  # microseconds of each node
    parts: dict[str, str] = {}
    nodes = 0
    for one in events:
        number = next((i for i, (start, end) in enumerate(spans) if start <= one["ts"] <= end), None)
        if number is None or one["cat"] != "Node" or not one["name"].endswith("_kernel_time"):
            continue
        name, kind = one["name"].removesuffix("_kernel_time"), one["args"]["op_name"]
        if kind in _HOLDING:
            continue  # the nodes inside are here themselves
        nodes += 1
        parts[name] = _part(name, kind, noted)
        found[number][name] += one["dur"]
    total = dict.fromkeys(PARTS, 0.0)
    for name, part in parts.items():
        total[part] += min(one[name] for one in found) / 1000
    return total, nodes // len(spans)


def _part(name: str, kind: str, noted: Mapping[str, str]) -> str:
    if kind.startswith("Reorder"):
        return REORDERS
    if not name.startswith(_OURS):
        return FORWARD if kind in ("Conv", "FusedConv") else FORWARD_REST
    if name in noted:
        return noted[name]
    return PRODUCTS if kind in _PRODUCTS else REST  # made by ONNX Runtime out of several
