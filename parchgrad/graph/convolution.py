"""The gradient at a convolution's input under the rule: of all channels, or of the selected ones alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from parchgrad.graph.backward import Backward, unsupported
from parchgrad.graph.builder import Array, Builder
from parchgrad.graph.derivatives import Gradient, whole
from parchgrad.graph.gradients import Planes, Whole
from parchgrad.graph.pooling import Pooled
from parchgrad.graph.rule import Choice, Factors, Layer
from parchgrad.graph.values import attributes

LAST = 2**62  # before every beginning, counted from the end


@dataclass(frozen=True)
class Geometry:
    """Of a convolution in two dimensions; pads are top, left, bottom, right."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.pads)

    @property
    def mirror_pads(self) -> list[int]:
        """Of the convolution with the mirrored kernel that goes back, where the stride is 1."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        return [reach[0] - self.pads[0], reach[1] - self.pads[1], reach[0] - self.pads[2], reach[1] - self.pads[3]]

    @property
    def mirrored(self) -> bool:
        return self.stride == (1, 1) and min(self.mirror_pads) >= 0


def geometry(node: onnx.NodeProto, weight: Array) -> Geometry:
    """Raises UnsupportedModelError for what is no convolution in two dimensions with its paddings written down."""
    found = attributes(node)
    if weight.ndim != 4:
        raise unsupported(node, f"it convolves in {weight.ndim - 2} dimensions, not 2")
    if found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise unsupported(node, f"there is no rule for auto_pad {found['auto_pad']}")
    pads = found.get("pads", [0, 0, 0, 0])
    stride, dilation = found.get("strides", [1, 1]), found.get("dilations", [1, 1])
    return Geometry(
        kernel=(weight.shape[2], weight.shape[3]),
        stride=(stride[0], stride[1]),
        pads=(pads[0], pads[1], pads[2], pads[3]),
        dilation=(dilation[0], dilation[1]),
        groups=found.get("group", 1),
    )


@dataclass(frozen=True)
class Own:
    """A layer's part of what was chosen for one image; in `choice` some have a batch axis of 1, and some none."""

    layer: Layer
    choice: Choice
    numbers: str  # (1, N, 1, 1) int64: 0, 1, 2 ... in each layer
    count: str  # (1,) int64
    rows: str  # (1,) int64
    infinite: str  # (1, 1, 1) bool

    def selected(self, b: Builder) -> str:
        """`(1, C)` bool."""
        return b.op("Slice", self.choice.selected, b.ints(self.layer.offset), b.ints(self.layer.end), b.ints(1))


class Convolution:
    """A convolution node, its weights `(C, C_in / groups, kh, kw)` with BatchNorm in them, and how to go back."""

    def __init__(self, w: Backward, node: onnx.NodeProto) -> None:
        weight = w.values.constant(node.input[1])
        if weight is None:
            raise unsupported(node, "its weights are computed")
        self.node, self.weight, self.geometry = node, weight, geometry(node, weight)
        self._w = w

    @property
    def _source(self) -> str:
        return str(self.node.input[0])

    def pull(self, grad: str) -> str:
        """The gradient at the input from the whole of `grad` `(b, C, h, w)`."""
        g = self.geometry
        if g.mirrored:
            return self._mirrored(grad, self._mirror(), g.groups)
        return self._transposed(grad, self._turned(), g.groups)

    def pull_scaled(self, grad: str, selected: str, factors: Factors) -> str:
        """Every channel times its side's factor; `selected` `(b, C)` bool."""
        b = self._w.b
        high, low = b.ops("Split", (factors.sides, b.ints(1, 1)), 2, axis=1)
        each = b.op("Where", b.op("Unsqueeze", selected, b.ints(1)), high, low)  # (b, 1, C)
        return self.pull(b.op("Mul", grad, b.op("Reshape", each, b.ints(-1, len(self.weight), 1, 1))))

    def pull_rows(self, grad: Gradient, own: Own, factors: Factors) -> Gradient:
        """Of one image: only the rows of the weights that the rule leaves something of.

        The best `count`, or, where the other side counts too, all of them in the table's order.
        """
        b, g = self._w.b, self.geometry
        if g.groups == 1:
            end = b.op("Where", b.op("Reshape", factors.fine, b.ints(1)), own.rows, b.ints(own.layer.end))
            some, rows = self._some(grad, own, factors, end)
            return Whole(self._pull_some(some, rows))
        grad = whole(self._w, grad, self.node.output[0])
        if not self._depthwise:
            return Whole(self.pull_scaled(grad, own.selected(b), factors))
        return self._pull_planes(grad, own, factors)

    def _pull_some(self, some: str, rows: str) -> str:
        """From the rows' own gradients `(1, R, h, w)`, the layer's factors in them."""
        b, g = self._w.b, self.geometry
        out, cin = self.weight.shape[:2]
        if g.pointwise:
            matrix = b.op(
                "Gather", self._w.once.op("Reshape", self.node.input[1], self._w.once.ints(out, cin)), rows, axis=0
            )
            product = b.op("Gemm", matrix, b.op("Flatten", some, axis=2), transA=1)
            return self._w.like(product, self._source)
        if g.mirrored and not self._small:
            return self._mirrored(some, b.op("Gather", self._mirror(), rows, axis=1), 1)
        return self._transposed(some, b.op("Gather", self.node.input[1], rows, axis=0), 1)

    def _pull_planes(self, grad: Whole, own: Own, factors: Factors) -> Planes:
        """Of a depthwise convolution: the chosen planes, each by its own kernel; the others get nothing back.

        The kernels stand on the diagonal of an ordinary convolution: R is small, and its matrix product quicker than R
        convolutions of one plane. All planes together are better off with those: which way is chosen as the graph runs.
        """
        layer = own.layer

        def few(c: Convolution) -> Planes:
            b = c._w.b
            some, rows = c._some(grad, own, factors, own.rows)
            weight = c._mirror() if c.geometry.mirrored else c.node.input[1]
            kernels = b.op("Gather", weight, rows, axis=0)  # (R, 1, kh, kw)
            diagonal = b.op("Equal", b.op("Unsqueeze", rows, b.ints(1)), rows)
            matrix = b.op("Mul", kernels, b.op("CastLike", b.op("Unsqueeze", diagonal, b.ints(2, 3)), kernels))
            pulled = c._mirrored(some, matrix, 1) if c.geometry.mirrored else c._transposed(some, matrix, 1)
            rank = b.op("Slice", own.choice.rank, b.ints(layer.offset), b.ints(layer.end), b.ints(0))
            return Planes(pulled, rows, b.op("Min", rank, own.count))

        def every(c: Convolution) -> Planes:
            b = c._w.b
            channels = b.op("Identity", b.constant(np.arange(layer.channels)))
            return Planes(c.pull_scaled(grad, own.selected(b), factors), channels, b.op("Identity", channels))

        b = self._w.b
        return self._either(b.op("And", factors.fine, own.infinite), few, every)

    def _some(self, grad: Gradient, own: Own, factors: Factors, end: str) -> tuple[str, str]:
        """The gradients of the rows that count, times their factors, `(1, R, h, w)`, and the rows' indices `(R,)`."""
        b, layer = self._w.b, own.layer
        first = b.ints(layer.offset)
        rows = b.op("Slice", own.choice.order, first, end, b.ints(0))
        number = b.op("Slice", own.numbers, first, end, b.ints(1))
        high, low = b.ops("Split", (factors.sides, b.ints(1, 1)), 2, axis=1)
        factor = b.op("Where", b.op("Less", number, own.count), high, low)  # (1, R, 1, 1)
        if isinstance(grad, Planes):
            some = grad.some(b, rows)
        elif isinstance(grad, Pooled):
            some = grad.some(rows)
        else:
            some = b.op("Gather", whole(self._w, grad, self.node.output[0]), rows, axis=1)
        return b.op("Mul", some, factor), rows

    def _either(
        self, condition: str, then: Callable[[Convolution], Planes], otherwise: Callable[[Convolution], Planes]
    ) -> Planes:
        """One of two ways to go, chosen when the graph runs."""
        b = self._w.b
        branches = {}
        for name, way in (("then_branch", then), ("else_branch", otherwise)):
            inner = Builder(b.dtype, f"{b.name(name)}/")
            found = way(
                Convolution(
                    Backward(inner, self._w.values, self._w.kept, single=self._w.single, once=self._w.once), self.node
                )
            )
            kinds = {found.name: int(helper.np_dtype_to_tensor_dtype(b.dtype))}
            results = [
                helper.make_tensor_value_info(one, kinds.get(one, onnx.TensorProto.INT64), None)
                for one in (found.name, found.channels, found.place)
            ]
            branches[name] = helper.make_graph(inner.nodes, name, [], results, inner.initializers)
        return Planes(*b.ops("If", (b.op("Reshape", condition, b.ints(1)),), 3, **branches))

    @property
    def _depthwise(self) -> bool:
        return self.weight.shape[1] == 1 and self.geometry.groups == len(self.weight)

    @property
    def _small(self) -> bool:
        """So few positions that the transposed convolution's sums cost less than to pick mirrored kernels singly."""
        sides = self._w.known_sides(self.node.output[0], [2, 3])
        return sides is not None and sides[0] * sides[1] <= 64

    def _turned(self) -> str:
        """The weights again, stored with two axes exchanged and turned back when the graph is loaded.

        OpenVINO 2026.4 gives a Conv and a ConvTranspose of the same weights those of one in the order of the other.
        """
        b, turn = self._w.once, [1, 0, 2, 3]
        return b.op("Transpose", b.constant(self.weight.transpose(turn), "turned"), perm=turn)

    def _mirror(self) -> str:
        """The kernels turned round, inputs and outputs exchanged in each group: `(C_in, C / groups, kh, kw)`."""
        b, g = self._w.once, self.geometry
        out, cin, kh, kw = self.weight.shape
        name = str(self.node.input[1])
        if g.groups == 1:
            name = b.op("Transpose", name, perm=[1, 0, 2, 3])
        elif out > g.groups or cin > 1:
            apart = b.op("Reshape", name, b.ints(g.groups, out // g.groups, cin, kh, kw))
            name = b.op("Transpose", apart, perm=[0, 2, 1, 3, 4])
            name = b.op("Reshape", name, b.ints(g.groups * cin, out // g.groups, kh, kw))
        every = b.ints(-LAST, -LAST)
        return b.op("Slice", name, b.ints(-1, -1), every, b.ints(2, 3), b.ints(-1, -1))

    def _mirrored(self, grad: str, weight: str, groups: int) -> str:
        g = self.geometry
        return self._w.b.op(
            "Conv", grad, weight, kernel_shape=list(g.kernel), pads=g.mirror_pads, dilations=list(g.dilation),
            strides=[1, 1], group=groups,
        )  # fmt: skip

    def _transposed(self, grad: str, weight: str, groups: int) -> str:
        b, g = self._w.b, self.geometry
        sides, outputs = (self._w.known_sides(name, [2, 3]) for name in (self._source, self.node.output[0]))
        known = sides is not None and outputs is not None
        if sides is not None and outputs is not None:
            reached = [
                (outputs[a] - 1) * g.stride[a] - g.pads[a] - g.pads[a + 2] + g.dilation[a] * (g.kernel[a] - 1) + 1
                for a in (0, 1)
            ]
            behind = [side - one for side, one in zip(sides, reached, strict=True)]
        else:
            behind = [step - 1 for step in g.stride]  # as much as there may be
        found = b.op(
            "ConvTranspose", grad, weight, kernel_shape=list(g.kernel), strides=list(g.stride), pads=list(g.pads),
            dilations=list(g.dilation), group=groups, output_padding=behind,
        )  # fmt: skip
        if known or g.stride == (1, 1):
            return found
        return b.op("Slice", found, b.ints(0, 0), b.op("Shape", self._w.kept(self._source), start=2), b.ints(2, 3))
