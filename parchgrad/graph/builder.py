"""Writing ONNX nodes one after another: fresh names, constants stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]


SMALL = 4096  # numbers


class Builder:
    """The nodes and constants of one graph, or of one graph inside another.

    `dtype` is the floating point type of the graph. Names begin with `prefix`, so that two builders' do not meet.
    """

    def __init__(self, dtype: np.dtype[Any], prefix: str) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[Any, ...] | None, str] = {}
        self._values: dict[str, Array] = {}

    def name(self, hint: str) -> str:
        self._count += 1
        return f"{self._prefix}{hint}_{self._count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node of one result, whose name it returns."""
        return self.ops(kind, inputs, 1, **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], results: int, **attributes: Any) -> list[str]:
        """One node of several results."""
        outputs = [self.name(kind) for _ in range(results)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, array: Array, hint: str = "constant") -> str:
        """Small ones are stored once, however often the same values are asked for."""
        array = array.copy(order="C")  # ascontiguousarray would make a number a vector
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= SMALL else None
        if key in self._constants:
            return self._constants[key]
        name = self.name(hint)
        self.initializers.append(numpy_helper.from_array(array, name))
        if key is not None:
            self._constants[key] = name
            self._values[name] = array
        return name

    def known(self, name: str) -> Array | None:
        """A small constant's value; None of anything else."""
        return self._values.get(name)

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        return self.constant(np.array(value, dtype=np.int64))

    def floats(self, *values: float) -> str:
        return self.constant(np.array(values, dtype=self.dtype))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=self.dtype))

    def reshape(self, value: str, *sides: int) -> str:
        """0 keeps a side, -1 is what remains."""
        return self.op("Reshape", value, self.ints(*sides))
