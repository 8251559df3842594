"""The gradient rule (method.md section 2) as nodes: what each image's selected and other channels are multiplied by.

The same formulas and the same degenerate cases as parchgrad/rule.py, which explains them. There is one such piece a
layer, so every node counts: what is the same for all layers is computed before them, and the variances, of few numbers,
in float64, where no gradient is too small to be squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from parchgrad.graph.builder import Array, Builder
from parchgrad.rule import NEGLIGIBLE

_EPS = {"float16": 2.0**-23, "float32": 2.0**-23, "float64": 2.0**-52}  # of the side sums


@dataclass(frozen=True)
class Layer:
    """A convolution under the rule: its place in the table, and what a BatchNorm folded into it multiplies by."""

    number: int
    offset: int  # of its first channel among all layers'
    channels: int
    scale: Array | None = None

    @property
    def end(self) -> int:
        return self.offset + self.channels


@dataclass(frozen=True)
class Choice:
    """What is chosen for `b` images of L layers of N channels together, as names of tensors."""

    sides: str  # (b, 2, N): what a channel counts for in either sum; 0 where the rule has nothing to part
    selected: str  # (b, N) bool
    rank: str  # (b, N) int64: of each channel in its layer, 0 the best
    order: str  # (b, N) int64: each layer's channels, the best first
    count: str  # (b, L) int64: how many are selected; 0: the rule does not act
    rows: str  # (b, L) int64: how many of `order` count, after the layers before; all, where gamma is finite
    weights: str  # (b, 2, 1) float64: 1 / sqrt(1 + 1 / gamma^2) and 1 / sqrt(1 + gamma^2)
    gamma: str  # (b, 1, 1) float64
    infinite: str  # (b, 1, 1) bool
    unasked: str  # (b, 2, 1) bool: the variance that infinite gamma does not divide by


def is_choice(b: Builder, quantile: str, gamma: str) -> str:
    """`(b,)` bool: all quantiles lie in 0..1, and gamma is 0 or more; False of NaN."""
    low, high = b.number(0.0), b.number(1.0)
    share = b.op("Cast", quantile, to=int(helper.np_dtype_to_tensor_dtype(b.dtype)))
    within = b.op("And", b.op("GreaterOrEqual", share, low), b.op("LessOrEqual", share, high))
    least = b.op("ReduceMin", b.op("Cast", within, to=TensorProto.INT64), b.ints(1), keepdims=0)
    positive = b.op("GreaterOrEqual", b.op("Cast", gamma, to=int(helper.np_dtype_to_tensor_dtype(b.dtype))), low)
    return b.op("And", b.op("Cast", least, to=TensorProto.BOOL), positive)


@dataclass(frozen=True)
class Factors:
    """Of one layer: `sides` (b, 2, 1) in the graph's type, 1 where not `fine` (b, 1, 1) bool: the identity."""

    sides: str
    fine: str


def choose(b: Builder, layers: Sequence[Layer], ranks: str, row: str, quantile: str, gamma: str) -> Choice:
    """From the rows `(b,)` of the table, the quantiles `(b, 1 or L)` and gammas `(b,)`, for all layers at once.

    `ranks` names the table's, `(rows, N)` int16.
    """
    channels = np.array([layer.channels for layer in layers])
    offsets = np.array([layer.offset for layer in layers])
    # As selection.channels_of_quantile: of the decimal that was written, in float64.
    share = b.op("Cast", quantile, to=TensorProto.DOUBLE)
    floor = b.op("Floor", b.op("Mul", share, b.constant((channels * (1 + 1e-6))[None])))
    within = b.op("Min", b.op("Max", floor, _double(b, 1.0)), b.constant(channels.astype(np.float64)[None]))
    acting = b.op("Where", b.op("Greater", share, _double(b, 0.0)), within, _double(b, 0.0))
    count = b.op("Cast", acting, to=TensorProto.INT64)
    infinite = b.op("IsInf", b.op("Cast", gamma, to=TensorProto.FLOAT))  # IsInf takes no other type everywhere
    some = b.op("Where", b.op("Unsqueeze", infinite, b.ints(1)), count, b.constant(channels[None]))

    rank = b.op("Cast", b.op("Gather", ranks, row, axis=0), to=TensorProto.INT64)
    layer_of = b.constant(np.repeat(np.arange(len(layers)), channels), "layer")
    selected = b.op("Less", rank, b.op("Gather", count, layer_of, axis=1))
    own = np.concatenate([np.arange(layer.channels) for layer in layers])
    shape = b.op("Shape", rank)
    nowhere = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    order = b.op(
        "ScatterElements",
        b.op("ConstantOfShape", shape, value=nowhere),
        b.op("Add", rank, b.constant(np.repeat(offsets, channels)[None], "first")),
        b.op("Expand", b.constant(own[None], "channel"), shape),
        axis=1,
    )

    parted = b.op("And", b.op("Greater", count, b.integer(0)), b.op("Less", count, b.constant(channels[None])))
    scales = [np.ones(layer.channels) if layer.scale is None else layer.scale for layer in layers]
    scale = b.constant(np.concatenate(scales).astype(wide(b))[None], "scales")
    nothing = b.constant(np.zeros((), wide(b)))
    counting = b.op("Where", b.op("Gather", parted, layer_of, axis=1), scale, nothing)
    high = b.op("Where", selected, counting, nothing)
    both = [b.op("Unsqueeze", one, b.ints(1)) for one in (high, b.op("Sub", counting, high))]

    number = b.op("Reshape", b.op("Cast", gamma, to=TensorProto.DOUBLE), b.ints(-1, 1, 1))
    square = b.op("Mul", number, number)
    weights = [
        b.op("Reciprocal", b.op("Sqrt", b.op("Add", _double(b, 1.0), part)))
        for part in (b.op("Reciprocal", square), square)
    ]
    shaped = b.op("Reshape", infinite, b.ints(-1, 1, 1))
    return Choice(
        sides=b.op("Concat", *both, axis=1),
        selected=selected,
        rank=rank,
        order=order,
        count=count,
        rows=b.op("Add", some, b.constant(offsets[None])),
        weights=b.op("Concat", *weights, axis=1),
        gamma=number,
        infinite=shaped,
        unasked=b.op("And", shaped, b.constant(np.array([False, True]).reshape(1, 2, 1))),
    )


def side_sums(b: Builder, sides: str, grad: str) -> str:
    """`(b, 2, h * w)` of `grad` `(b, C, h, w)` at a layer's output and its own `sides` `(b, 2, C)`."""
    flat = b.op("Reshape", grad, b.ints(0, 0, -1))
    if b.dtype != wide(b):
        flat = b.op("Cast", flat, to=int(helper.np_dtype_to_tensor_dtype(wide(b))))
    return b.op("MatMul", sides, flat)


def factors(b: Builder, layer: Layer, sums: str, choice: Choice, positions: int | None, conserve: str) -> Factors:
    """From a layer's side sums `(b, 2, h * w)`; `positions` is h * w, where it is known."""
    if wide(b) != np.float64:
        sums = b.op("Cast", sums, to=TensorProto.DOUBLE)
    centred, squares = _centred(b, layer, sums, positions)
    total = b.op("ReduceSum", squares, b.ints(1), keepdims=1)  # M + N, times the positions
    least = b.op("Mul", total, _double(b, NEGLIGIBLE))
    asked = b.op("Where", choice.unasked, total, squares)
    fine = b.op("Greater", b.op("ReduceMin", asked, b.ints(1), keepdims=1), least)
    if conserve == "independent":
        # A variance that nobody asked for may be none: its side's weight is 0, and must not meet an infinity.
        ratio = b.op("Sqrt", b.op("Div", total, b.op("Max", squares, least)))
        found = b.op("Mul", ratio, choice.weights)
    elif conserve == "none":
        found = _unconserved(b, squares, choice)
    else:
        found, fine = _exact(b, layer, centred, squares, choice, fine)
    chosen = b.op("Where", fine, found, _double(b, 1.0))
    if b.dtype != np.float64:
        chosen = b.op("Cast", chosen, to=int(helper.np_dtype_to_tensor_dtype(b.dtype)))
    return Factors(chosen, fine)


def wide(b: Builder) -> np.dtype[np.generic]:
    """Sums over channels are taken in float32 or wider."""
    return np.dtype(np.promote_types(b.dtype, np.float32))


def _centred(b: Builder, layer: Layer, sums: str, positions: int | None) -> tuple[str, str]:
    """Side sums less their means, and the squares of those summed `(b, 2, 1)`; of one position its own square."""
    last = b.ints(2)
    if positions == 1:
        return sums, b.op("Mul", sums, sums)
    mean = b.op("ReduceMean", sums, last, keepdims=1)
    if positions is None:
        count = b.op("Shape", sums, start=2, end=3)
        mean = b.op("Where", b.op("Greater", count, b.ints(1)), mean, _double(b, 0.0))
    centred = b.op("Sub", sums, mean)
    squares = b.op("ReduceSumSquare", centred, last, keepdims=1)
    # The same sum at every position: what varies is its rounding.
    rounding = (8 * _EPS[b.dtype.name]) ** 2 * layer.channels
    if positions is None:
        limit = b.op("Mul", b.op("Cast", count, to=TensorProto.DOUBLE), _double(b, rounding))
    else:
        limit = _double(b, rounding * positions)
    real = b.op("Greater", squares, b.op("Mul", b.op("Mul", mean, mean), limit))
    return centred, b.op("Where", real, squares, _double(b, 0.0))


def _gain(b: Builder, high: str, low: str, choice: Choice) -> tuple[str, str]:
    """`a` and 1, or 1 and 0 for infinite gamma."""
    a = b.op("Mul", choice.gamma, b.op("Sqrt", b.op("Div", low, high)))
    one, none = _double(b, 1.0), _double(b, 0.0)
    return b.op("Where", choice.infinite, one, a), b.op("Where", choice.infinite, none, one)


def _unconserved(b: Builder, squares: str, choice: Choice) -> str:
    high, low = b.ops("Split", (squares, b.ints(1, 1)), 2, axis=1)
    return b.op("Concat", *_gain(b, high, low, choice), axis=1)


def _exact(b: Builder, layer: Layer, centred: str, squares: str, choice: Choice, fine: str) -> tuple[str, str]:
    """The sum's own variance, before and after, with `p = a / max(a, 1)` and `q = 1 / max(a, 1)`."""
    high, low = b.ops("Split", (squares, b.ints(1, 1)), 2, axis=1)
    a, other = _gain(b, high, low, choice)
    larger = b.op("Max", a, _double(b, 1.0))
    p, q = b.op("Div", a, larger), b.op("Div", other, larger)
    # A side whose variance was none adds none to the sum's.
    real = b.op("Greater", squares, _double(b, 0.0))
    left, right = b.ops("Split", (b.op("Where", real, centred, _double(b, 0.0)), b.ints(1, 1)), 2, axis=1)

    def square(value: str) -> str:
        return b.op("ReduceSumSquare", value, b.ints(2), keepdims=1)

    before = square(b.op("Add", left, right))
    after = square(b.op("Add", b.op("Mul", p, left), b.op("Mul", q, right)))
    apart = b.op("Add", b.op("Mul", b.op("Mul", p, p), high), b.op("Mul", b.op("Mul", q, q), low))
    cancels = _double(b, max(NEGLIGIBLE, (8 * _EPS[b.dtype.name]) ** 2 * layer.channels))
    for value, whole in ((before, b.op("Add", high, low)), (after, apart)):
        fine = b.op("And", fine, b.op("Greater", value, b.op("Mul", whole, cancels)))
    both = b.op("Sqrt", b.op("Div", before, after))
    return b.op("Mul", b.op("Concat", p, q, axis=1), both), fine


def _double(b: Builder, value: float) -> str:
    return b.constant(np.array(value, dtype=np.float64))
