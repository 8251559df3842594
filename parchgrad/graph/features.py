"""Where in an exported graph the GAP features of a table's layers are, and what they are compared with.

What this notes goes into the file's metadata. Nothing is computed by it: a runtime that wants the features cuts the
part of the graph that leads to them (runtimes/onnx_runtime.py); prediction and explanation stay as they are.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from parchgrad.graph.builder import Array
from parchgrad.graph.values import Values

if TYPE_CHECKING:
    from parchgrad.tables import SelectionTable

FEATURES_KEY = "parchgrad_features"

_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Softplus", "Sigmoid", "HardSigmoid", "HardSwish"}
    | {"Tanh", "Gelu", "Mish", "ThresholdedRelu"}
)
_GATES = frozenset({"Sigmoid", "HardSigmoid"})  # x * gate(x), as SiLU is exported


def features_of(
    values: Values,
    table: SelectionTable,
    outputs: Mapping[str, str],
    scales: Mapping[str, Array],
    shifts: Mapping[str, Array],
    ranks: str,
) -> dict[str, Any]:
    """JSON types. `outputs`: layer -> what its convolution gives, with a folded BatchNorm's `scales` and `shifts`.

    For each layer, in the table's order: `tensor`, the name of what is averaged, None where it cannot be told which;
    `positive`, whether only its positive part is. `ranks` names the table's; the arrays are little-endian float32 in
    base64, all layers side by side. A BatchNorm is undone where the feature is taken before it: `(tensor - shift) /
    scale`. A deviation of 0 says that the channel is not compared.
    """
    points = table.built.get("points", {}) if table.statistics_point == "activation" else {}
    layers: list[dict[str, Any]] = []
    arrays: dict[str, list[Array]] = {"mean": [], "std": [], "scale": [], "shift": []}
    for name, layer in table.layers.items():
        point = points.get(name, "convolution")
        tensor: str | None = outputs[name]
        one = np.ones(layer.channels)
        scale, shift = (scales.get(name, one), shifts.get(name, 0 * one)) if point == "convolution" else (one, 0 * one)
        if point == "activation":
            tensor = _activated(values, outputs[name])
        elif point == "normalisation" and name not in scales:
            tensor = None  # a normalisation that was not folded
        known = (scale != 0) & (tensor is not None)  # what was multiplied by 0 cannot be told
        layers.append({"tensor": tensor, "positive": point != "activation"})
        arrays["mean"].append(layer.mean.numpy())
        arrays["std"].append(np.where(known, layer.std.numpy(), 0.0))
        arrays["scale"].append(np.where(scale != 0, scale, 1.0))
        arrays["shift"].append(shift)
    text = {name: b64encode(np.concatenate(each).astype("<f4").tobytes()).decode() for name, each in arrays.items()}
    return {"ranks": ranks, "layers": layers, **text}


def _activated(values: Values, name: str) -> str | None:
    """What the network's own activation, which alone reads `name`, makes of it."""
    users = values.users(name)
    if len(users) == 1 and users[0].op_type in _ACTIVATIONS:
        return str(users[0].output[0])
    gate = next((node for node in users if node.op_type in _GATES), None)
    product = next((node for node in users if node.op_type == "Mul"), None)
    if gate is None or product is None or len(users) != 2:
        return None
    alone = [node.name for node in values.users(gate.output[0])] == [product.name]
    return str(product.output[0]) if alone and set(product.input) == {name, gate.output[0]} else None


def noted(graph: onnx.ModelProto) -> str | None:
    """What was noted in a graph, as JSON."""
    return next((one.value for one in graph.metadata_props if one.key == FEATURES_KEY), None)
