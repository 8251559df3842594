"""What is known of a prediction graph's values before it runs: shapes, constants, who makes and who reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from parchgrad.graph.builder import Array

Side = int | str | None  # known, symbolic, unknown


class Values:
    """The values of a shape-inferred graph with the input `images` and the output `logits`."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self._constants = {one.name: one for one in graph.initializer}
        self._shapes: dict[str, tuple[Side, ...]] = {}
        for info in (*graph.input, *graph.value_info, *graph.output):
            tensor = info.type.tensor_type
            if tensor.HasField("shape"):
                self._shapes[info.name] = tuple(_side(one) for one in tensor.shape.dim)
        self._producers: dict[str, onnx.NodeProto] = {}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        of_images = {"images"}
        for node in self.nodes:
            for output in node.output:
                self._producers[output] = node
            for name in node.input:
                self._users.setdefault(name, []).append(node)
            # The shape of an image is no function of its pixels.
            if node.op_type not in ("Shape", "Size") and not of_images.isdisjoint(node.input):
                of_images.update(output for output in node.output if output)
        self.of_images = frozenset(of_images)

    def shape(self, name: str) -> tuple[Side, ...]:
        """Raises KeyError where not even the number of dimensions is known."""
        if name in self._constants:
            return tuple(self._constants[name].dims)
        return self._shapes[name]

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def constant(self, name: str) -> Array | None:
        """The value where it is stored in the graph, else None."""
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name])
        node = self._producers.get(name)
        if node is not None and node.op_type == "Constant":
            (attribute,) = node.attribute
            value = helper.get_attribute_value(attribute)
            return numpy_helper.to_array(value) if attribute.name == "value" else np.array(value)
        return None

    def producer(self, name: str) -> onnx.NodeProto | None:
        return self._producers.get(name)

    def users(self, name: str) -> list[onnx.NodeProto]:
        return self._users.get(name, [])


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes; texts as str."""
    found = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _side(one: onnx.TensorShapeProto.Dimension) -> Side:
    if one.HasField("dim_value"):
        return int(one.dim_value)
    return one.dim_param or None
