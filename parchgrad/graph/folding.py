"""BatchNorm folded into the convolution before it: one layer fewer to compute, and its factor kept for the rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from parchgrad.graph.builder import Array
from parchgrad.graph.values import Values, attributes


@dataclass(frozen=True)
class Folded:
    """A prediction graph without the BatchNorms that follow a convolution alone.

    `scales`: name of a convolution -> what its BatchNorm multiplies each channel by, `(channels,)`. The gradient at the
    convolution's own output is that times the gradient at the folded one's. `shifts`: what it then adds.
    """

    graph: onnx.GraphProto
    scales: Mapping[str, Array]
    shifts: Mapping[str, Array]


def fold_batch_norms(graph: onnx.GraphProto) -> Folded:
    """`graph` itself is not changed."""
    values = Values(graph)
    folded = onnx.GraphProto()
    folded.CopyFrom(graph)
    stored = {one.name: one for one in folded.initializer}
    scales: dict[str, Array] = {}
    shifts: dict[str, Array] = {}
    gone: set[str] = set()
    for conv in folded.node:
        norm = _norm_after(values, conv)
        if norm is None:
            continue
        scale, shift = _scale_and_shift(values, norm)
        weight = values.constant(conv.input[1])
        assert weight is not None  # _norm_after looked
        bias = values.constant(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else np.zeros(len(weight))
        assert bias is not None
        arrays = {
            "weight": weight * scale.reshape(-1, *[1] * (weight.ndim - 1)),
            "bias": bias * scale + shift,
        }
        names = {}
        for what, array in arrays.items():
            names[what] = f"{conv.name}/folded_{what}"
            stored[names[what]] = numpy_helper.from_array(array.astype(weight.dtype), names[what])
        conv.input[:] = [conv.input[0], names["weight"], names["bias"]]
        conv.output[0] = norm.output[0]
        scales[conv.name], shifts[conv.name] = scale, shift
        gone.add(norm.name)
    nodes = [node for node in folded.node if node.name not in gone]
    used = {name for node in nodes for name in node.input}
    del folded.node[:]
    folded.node.extend(nodes)
    del folded.initializer[:]
    folded.initializer.extend(one for name, one in stored.items() if name in used)
    return Folded(folded, scales, shifts)


def _norm_after(values: Values, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """The BatchNorm that alone reads a convolution of stored weights."""
    if conv.op_type != "Conv":
        return None
    users = values.users(conv.output[0])
    if len(users) != 1 or users[0].op_type != "BatchNormalization":
        return None
    names = [*conv.input[1:], *users[0].input[1:]]
    return users[0] if all(values.constant(name) is not None for name in names if name) else None


def _scale_and_shift(values: Values, norm: onnx.NodeProto) -> tuple[Array, Array]:
    found = [values.constant(name) for name in norm.input[1:5]]
    scale, shift, mean, variance = (one.astype(np.float64) for one in found if one is not None)
    factor = scale / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
    return factor, shift - mean * factor
