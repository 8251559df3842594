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
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Pow"})  # z * sigmoid(z), as SiLU is exported
_SAME = frozenset({"Identity"})
_UNSURE = frozenset({"Min", "Max", "Erf", "Exp", "Log", "Abs", "Sqrt", "Reciprocal", "Softsign", "Shrink", "Where"})

# A BatchNorm's scale and shift leave a feature's deviation at least this share of the shift, or it is not undone:
# float32 rounds what it adds to the shift by 6e-8 of it, which is then 6e-4 deviations.
_LEFT_BY_SHIFT = 1e-4
_LEFT = 1e-30  # and at least this: far above float32's denormal numbers


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
    scale`, but for channels of which its scale has left too little. A deviation of 0 says that the channel is not
    compared.
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
        # What a scale has left too little of cannot be told; 0 nothing.
        left = np.abs(scale) * layer.std.numpy()
        known = (left > np.maximum(_LEFT_BY_SHIFT * np.abs(shift), _LEFT)) & (tensor is not None)
        layers.append({"tensor": tensor, "positive": point != "activation"})
        arrays["mean"].append(layer.mean.numpy())
        arrays["std"].append(np.where(known, layer.std.numpy(), 0.0))
        arrays["scale"].append(np.where(known, scale, 1.0))
        arrays["shift"].append(np.where(known, shift, 0.0))
    text = {name: b64encode(np.concatenate(each).astype("<f4").tobytes()).decode() for name, each in arrays.items()}
    return {"ranks": ranks, "layers": layers, **text}


def _activated(values: Values, name: str) -> str | None:
    """What the network's own activation makes of `name`: the last of what it becomes that all else is made of.

    Followed are activations, and arithmetic with itself and with numbers, as PyTorch's side follows them (features.py).
    None where there is none, or it cannot be told whether that side would go on: a layer less is better than a wrong
    one.
    """
    made, leads_to, leaves = {name: False}, dict[str, set[str]](), set[str]()  # made: whether it is activated
    for node in values.nodes:
        read = [one for one in node.input if one in made]
        if not read:
            continue
        kind, others = node.op_type, [one for one in node.input if one and one not in made]
        if kind in _ARITHMETIC or kind in _SAME:
            follows = all(_is_number(values, one) for one in others)
            if not follows and all(values.constant(one) is not None and _size(values, one) == 1 for one in others):
                return None  # a parameter of one number, or a number that was given an axis
        else:
            follows = kind in _ACTIVATIONS and read == [node.input[0]]
            if not follows and kind in _UNSURE:
                return None
        if not follows:
            leaves.update(read)
            continue
        output = str(node.output[0])
        made[output] = kind in _ACTIVATIONS or any(made[one] for one in read)
        for one in read:
            leads_to.setdefault(one, set()).add(output)
    reached = [one for one, activated in made.items() if activated and not _passed_by(name, one, leads_to, leaves)]
    return reached[-1] if reached else None


def _passed_by(name: str, without: str, leads_to: Mapping[str, set[str]], leaves: set[str]) -> bool:
    """Whether something is made of `name` that is not made of `without`."""
    waiting, seen = [name], {without}
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in leaves or one not in leads_to:
            return True
        waiting += leads_to[one]
    return False


def _is_number(values: Values, name: str) -> bool:
    constant = values.constant(name)
    return constant is not None and constant.ndim == 0


def _size(values: Values, name: str) -> int:
    constant = values.constant(name)
    return 0 if constant is None else constant.size


def noted(graph: onnx.ModelProto) -> str | None:
    """What was noted in a graph, as JSON."""
    return next((one.value for one in graph.metadata_props if one.key == FEATURES_KEY), None)
