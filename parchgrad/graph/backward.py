"""Where a gradient is being written: nodes go to one builder, values of the forward pass come from elsewhere.

The gradient of one image is written with a batch axis of 1, that of a batch with its own; the rules for the operators
are the same.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx

from parchgrad.errors import UnsupportedModelError
from parchgrad.graph.builder import Builder
from parchgrad.graph.values import Side, Values


class Backward:
    """`kept(name)` is the name, where the gradient is computed, of a value of the forward pass.

    `single`: the batch axis has length 1. `once` is where what depends on no image is computed: a runtime does so when
    it loads the graph, and the file holds the weights but once.
    """

    def __init__(
        self, builder: Builder, values: Values, kept: Callable[[str], str], *, single: bool, once: Builder
    ) -> None:
        self.b, self.once = builder, once
        self.single = single
        self.values = values
        self.kept = kept
        self.passed: set[str] = set()  # ReLUs that what follows them has already seen to

    def on_planes(self, channels: str) -> Backward:
        """The same where values are seen at these channels alone."""
        picked = partial(self._picked, channels)
        return Backward(self.b, self.values, picked, single=True, once=self.once)

    def _picked(self, channels: str, name: str) -> str:
        return self.b.op("Gather", self.kept(name), channels, axis=1)

    # --- shapes ---------------------------------------------------------------------------------------------

    def sides(self, name: str) -> tuple[Side, ...]:
        """Of a forward value, batch first."""
        return self.values.shape(name)

    def known_sides(self, name: str, axes: Sequence[int]) -> tuple[int, ...] | None:
        """These sides of a forward value, where all are known before it runs."""
        shape = self.sides(name)
        found = tuple(side for axis in axes if isinstance(side := shape[axis], int))
        return found if len(found) == len(axes) else None

    def shape(self, name: str) -> str:
        """The shape of a forward value as a tensor; a batch axis of unknown length may stand as -1."""
        shape = self.sides(name)
        if all(isinstance(side, int) for side in shape[1:]):
            return self.b.ints(-1, *(int(side) for side in shape[1:]))  # type: ignore[arg-type]
        return self.b.op("Shape", self.kept(name))

    def side(self, name: str, axis: int) -> str:
        """One side of a forward value, as a tensor of one integer."""
        side = self.sides(name)[axis]
        if isinstance(side, int):
            return self.b.ints(side)
        return self.b.op("Shape", self.kept(name), start=axis, end=axis + 1)

    def like(self, grad: str, name: str) -> str:
        """`grad` in the shape of a forward value of as many numbers."""
        return self.b.op("Reshape", grad, self.shape(name))

    # --- arithmetic -----------------------------------------------------------------------------------------

    def positive(self, x: str) -> str:
        """1 where x > 0, else 0, as a number: one pass, where a comparison, a cast and a choice are three."""
        return self._step(x, 3.0e38 if self.b.dtype != np.float16 else 6.0e4, 0.0)

    def below(self, x: str, bound: float) -> str:
        """1 where x < bound, else 0."""
        return self._step(x, -self._steep, bound)

    def above(self, x: str, bound: float) -> str:
        """1 where x > bound, else 0."""
        return self._step(x, self._steep, bound)

    def _step(self, x: str, slope: float, bound: float) -> str:
        # A beta of nothing: OpenVINO 2026.4 takes 0 for none given, and computes with the default of 0.5.
        return self.b.op("HardSigmoid", x, alpha=slope, beta=-slope * bound or -1e-30)

    @property
    def _steep(self) -> float:
        """A power of two: its product with a bound is exact, and so is the difference that the step sees."""
        return float(2.0 ** (100 if self.b.dtype != np.float16 else 12))

    def unbroadcast(self, grad: str, result: str, name: str) -> str:
        """`grad` at `result` summed to the shape of the operand `name`, both forward values."""
        wide, narrow = self.sides(result), self.sides(name)
        lead = len(wide) - len(narrow)
        axes = [axis for axis in range(len(wide)) if axis < lead or (narrow[axis - lead] == 1 and wide[axis] != 1)]
        if not axes:
            return grad
        summed = self.b.op("ReduceSum", grad, self.b.ints(*axes), keepdims=1)
        return self.b.op("Squeeze", summed, self.b.ints(*range(lead))) if lead else summed


def unsupported(node: onnx.NodeProto, what: str) -> UnsupportedModelError:
    """Names the operator, the node, and the module it came from where that is known."""
    scopes = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), "[]")
    modules = [str(scope) for scope in ast.literal_eval(scopes)[:-1] if scope]  # the last is the node's own name
    where = f" in module '{modules[-1]}'" if modules else ""
    return UnsupportedModelError(f"Operator {node.op_type} at '{node.name}'{where}: {what}.")
