"""The gradient of each ONNX operator that a CNN's prediction is made of: a node and a gradient in, gradients out.

Convolutions are not here (convolution.py). Each rule gives a gradient for each input, None where there is none to give.
Where PyTorch picks a side at a kink (ReLU at 0, clipping at its bounds, the first of equal maxima), so do these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx

from parchgrad.graph.backward import Backward, unsupported
from parchgrad.graph.gradients import Even, Planes, Whole
from parchgrad.graph.pooling import Pooled, average_pooling, max_pooling
from parchgrad.graph.values import attributes

Gradient = Whole | Even | Planes | Pooled
Pulled = list[str | None]  # whole ones but where `pull` says otherwise
Derivative = Callable[[Backward, onnx.NodeProto, str], Pulled]


# Element by element: the gradient is multiplied by what has the value's shape.
_EACH = {
    "Clip",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Max",
    "Min",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Tanh",
}


def is_elementwise(w: Backward, node: onnx.NodeProto) -> bool:
    """Whether a node's rule may be given a gradient that is even along axes, or of some planes."""
    return node.op_type in _EACH or _sigmoid_of_swish(w, node) is not None


def pull(w: Backward, node: onnx.NodeProto, grads: Sequence[Gradient | None]) -> list[Gradient | None]:
    """The gradients at a node's inputs from those at its outputs, None where nothing came back to one.

    Raises UnsupportedModelError naming operator and layer where there is no rule.
    """
    if node.op_type == "Split":
        return _whole(
            _split(
                w, node, [None if one is None else whole(w, one, o) for one, o in zip(grads, node.output, strict=True)]
            )
        )
    if node.op_type not in DERIVATIVES and node.op_type != "MaxPool":
        raise unsupported(node, "there is no rule for its gradient")
    if any(grad is not None for grad in grads[1:]):
        raise unsupported(node, "only its first result has a gradient")
    (grad, *_) = grads
    assert grad is not None  # the caller comes here only where something came back
    if node.op_type == "MaxPool":
        pooled = max_pooling(w, node, whole(w, grad, node.output[0]))
        return [pooled if w.single else pooled.whole()]
    if node.name in w.passed:
        return [grad]
    if isinstance(grad, Pooled) and (joined := _parts(w, node, grad)):
        return joined
    rule = DERIVATIVES[node.op_type]
    if not is_elementwise(w, node):
        found = rule(w, node, whole(w, grad, node.output[0]))
        even = node.op_type in ("GlobalAveragePool", "ReduceMean", "ReduceSum")
        return [None if one is None else Even(one) for one in found] if even else _whole(found)
    if isinstance(grad, Pooled):
        grad = grad.whole()
    if isinstance(grad, Planes):
        parts = rule(w.on_planes(grad.channels), node, grad.name)
        return [None if one is None else replace(grad, name=one) for one in parts]
    return _whole(rule(w, node, grad))


def _parts(w: Backward, node: onnx.NodeProto, grad: Pooled) -> list[Gradient | None]:
    """Of values joined and then pooled, where each comes from a convolution, which can do with the parts; else none."""
    if node.op_type != "Concat" or attributes(node)["axis"] % w.values.rank(node.output[0]) != 1:
        return []
    found: list[Gradient | None] = []
    start = 0
    for name in node.input:
        relu = w.values.producer(name)
        made = None if relu is None else w.values.producer(relu.input[0])
        known = w.known_sides(name, [1])
        if relu is None or relu.name not in w.passed or made is None or made.op_type != "Conv" or known is None:
            return []
        found.append(grad.of_channels(range(start, start + known[0])))
        start += known[0]
    return found


def whole(w: Backward, grad: Gradient, name: str) -> Whole:
    """A gradient in the shape of its value `name`."""
    if isinstance(grad, Planes):
        return grad.whole(w.b)
    if isinstance(grad, Pooled):
        return grad.whole()
    if isinstance(grad, Even):
        sides = w.sides(name)[1:]
        if all(isinstance(side, int) for side in sides):
            return Whole(w.b.op("Expand", grad, w.b.ints(1, *(int(side) for side in sides))))  # type: ignore[arg-type]
        return Whole(w.b.op("Expand", grad, w.b.op("Shape", w.kept(name))))
    return grad


def added(w: Backward, first: Gradient, second: Gradient, name: str) -> Gradient:
    """Both gradients of the value `name` together."""
    if not isinstance(first, Whole | Even) or not isinstance(second, Whole | Even):
        first, second = whole(w, first, name), whole(w, second, name)
    total = w.b.op("Add", first, second)
    return Even(total) if isinstance(first, Even) and isinstance(second, Even) else Whole(total)


def _whole(found: Pulled) -> list[Gradient | None]:
    return [None if one is None else Whole(one) for one in found]


# --- element by element --------------------------------------------------------------------------------------


def _relu(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.b.op("Mul", grad, w.positive(w.kept(node.output[0])))]


def _leaky_relu(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    slope = attributes(node).get("alpha", 0.01)
    positive = w.positive(w.kept(node.input[0]))
    # slope + (1 - slope) [x > 0]
    factor = w.b.op("Add", w.b.op("Mul", positive, w.b.number(1 - slope)), w.b.number(slope))
    return [w.b.op("Mul", grad, factor)]


def _clip(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    bounds = []
    for name in (*node.input[1:], "", "")[:2]:
        bound = w.values.constant(name) if name else None
        if name and bound is None:
            raise unsupported(node, "its bounds are computed")
        bounds.append(None if bound is None else float(bound))
    y = w.kept(node.output[0])
    low, high = bounds
    if low is not None and low > -3e38:
        grad = w.b.op("Mul", grad, w.positive(y) if low == 0 else w.above(y, low))
    if high is not None and high < 3e38:
        grad = w.b.op("Mul", grad, w.below(y, high))
    return [grad]


def _bounded(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """The larger, or the smaller, of a number and a bound, as of PyTorch's clamp: at the bound the gradient passes."""
    bounds = [w.values.constant(name) for name in node.input]
    known = [float(one.reshape(())) for one in bounds if one is not None and one.size == 1]
    if len(node.input) != 2 or len(known) != 1:
        raise unsupported(node, "there is a rule for one number as its bound alone")
    (x,) = (name for name, one in zip(node.input, bounds, strict=True) if one is None)
    outside = w.below(w.kept(x), known[0]) if node.op_type == "Max" else w.above(w.kept(x), known[0])
    inside = w.b.op("Sub", w.b.number(1.0), outside)
    return [w.b.op("Mul", grad, inside) if one is None else None for one in bounds]


def _sigmoid(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    y = w.kept(node.output[0])
    slope = w.b.op("Mul", y, w.b.op("Sub", w.b.number(1.0), y))
    return [w.b.op("Mul", grad, slope)]


def _tanh(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    y = w.kept(node.output[0])
    return [w.b.op("Mul", grad, w.b.op("Sub", w.b.number(1.0), w.b.op("Mul", y, y)))]


def _hard_sigmoid(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    y = w.kept(node.output[0])
    inside = w.b.op("Mul", w.positive(y), w.below(y, 1.0))
    slope = w.b.number(attributes(node).get("alpha", 0.2))
    return [w.b.op("Mul", grad, w.b.op("Mul", inside, slope))]


def _hard_swish(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """x HardSigmoid(x): 0 below -3, 1 above 3, (2x + 3) / 6 between."""
    x = w.kept(node.input[0])
    line = w.b.op("Add", w.b.op("Mul", x, w.b.number(1 / 3)), w.b.number(0.5))
    inner = w.b.op("Mul", line, w.above(x, -3.0))
    slope = w.b.op("Where", w.b.op("Less", x, w.b.number(3.0)), inner, w.b.number(1.0))
    return [w.b.op("Mul", grad, slope)]


def _erf(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    x = w.kept(node.input[0])
    bell = w.b.op("Exp", w.b.op("Neg", w.b.op("Mul", x, x)))
    return [w.b.op("Mul", grad, w.b.op("Mul", bell, w.b.number(2 / math.sqrt(math.pi))))]


def _gelu(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """Phi(x) + x phi(x), the normal distribution and its density."""
    if attributes(node).get("approximate", "none") != "none":
        raise unsupported(node, "there is no rule for its approximation by tanh")
    x = w.kept(node.input[0])
    erf = w.b.op("Erf", w.b.op("Mul", x, w.b.number(math.sqrt(0.5))))
    phi = w.b.op("Mul", w.b.op("Add", erf, w.b.number(1.0)), w.b.number(0.5))
    bell = w.b.op("Exp", w.b.op("Mul", w.b.op("Mul", x, x), w.b.number(-0.5)))
    density = w.b.op("Mul", w.b.op("Mul", x, bell), w.b.number(1 / math.sqrt(2 * math.pi)))
    return [w.b.op("Mul", grad, w.b.op("Add", phi, density))]


def _elu(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """1 above 0, else y + alpha, which is alpha exp(x)."""
    alpha = attributes(node).get("alpha", 1.0)
    x, y = w.kept(node.input[0]), w.kept(node.output[0])
    above = w.b.op("Greater", x, w.b.number(0.0))
    slope = w.b.op("Where", above, w.b.number(1.0), w.b.op("Add", y, w.b.number(alpha)))
    return [w.b.op("Mul", grad, slope)]


def _softplus(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.b.op("Mul", grad, w.b.op("Sigmoid", w.kept(node.input[0])))]


def _sqrt(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.b.op("Div", w.b.op("Mul", grad, w.b.number(0.5)), w.kept(node.output[0]))]


def _exp(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.b.op("Mul", grad, w.kept(node.output[0]))]


def _reciprocal(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    y = w.kept(node.output[0])
    return [w.b.op("Neg", w.b.op("Mul", grad, w.b.op("Mul", y, y)))]


def _pow(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    exponent = w.values.constant(node.input[1])
    if exponent is None or exponent.size != 1:
        raise unsupported(node, "its exponent is no constant number")
    e = float(exponent.reshape(()))
    slope = w.b.op("Pow", w.kept(node.input[0]), w.b.number(e - 1))
    return [w.b.op("Mul", grad, w.b.op("Mul", slope, w.b.number(e))), None]


def _neg(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.b.op("Neg", grad)]


def _same(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [grad]


# --- arithmetic of two ---------------------------------------------------------------------------------------


def _operand(w: Backward, node: onnx.NodeProto, name: str) -> str:
    """An operand where the gradient is computed; constants are seen from everywhere."""
    return w.kept(name) if name in w.values.of_images else name


def _add(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.unbroadcast(grad, node.output[0], name) if name in w.values.of_images else None for name in node.input]


def _sub(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    left, right = node.input
    second = w.unbroadcast(w.b.op("Neg", grad), node.output[0], right) if right in w.values.of_images else None
    return [w.unbroadcast(grad, node.output[0], left) if left in w.values.of_images else None, second]


def _mul(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    swish = _swish(w, node, grad)
    if swish is not None:
        return swish
    found: Pulled = []
    for mine, other in (tuple(node.input), tuple(reversed(node.input))):
        part = w.b.op("Mul", grad, _operand(w, node, other)) if mine in w.values.of_images else None
        found.append(None if part is None else w.unbroadcast(part, node.output[0], mine))
    return found


def _swish(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled | None:
    """x sigmoid(x) as one: s + x s (1 - s), in fewer passes. The sigmoid gets nothing back of its own."""
    s = _sigmoid_of_swish(w, node)
    if s is None:
        return None
    (x,) = (name for name in node.input if name != s)
    z = w.kept(x)
    sigmoid = w.b.op("Sigmoid", z)  # to compute it again costs less than to lay it out for reading
    rest = w.b.op("Mul", w.b.op("Mul", z, sigmoid), w.b.op("Sub", w.b.number(1.0), sigmoid))
    slope = w.b.op("Add", sigmoid, rest)
    back = w.b.op("Mul", grad, slope)
    return [None if name == s else back for name in node.input]


def _sigmoid_of_swish(w: Backward, node: onnx.NodeProto) -> str | None:
    if node.op_type != "Mul":
        return None
    for x, s in (tuple(node.input), tuple(reversed(node.input))):
        made = w.values.producer(s)
        if made is not None and made.op_type == "Sigmoid" and made.input[0] == x:
            return str(s)
    return None


def _div(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    left, right = node.input
    below = _operand(w, node, right)
    over = w.b.op("Div", grad, below)
    first = w.unbroadcast(over, node.output[0], left) if left in w.values.of_images else None
    if right not in w.values.of_images:
        return [first, None]
    second = w.b.op("Neg", w.b.op("Mul", over, w.kept(node.output[0])))
    return [first, w.unbroadcast(second, node.output[0], right)]


# --- matrices ------------------------------------------------------------------------------------------------


def _gemm(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    found = attributes(node)
    if found.get("transA", 0) or node.input[1] in w.values.of_images:
        raise unsupported(node, "only its first operand may depend on the image, and not transposed")
    pulled = w.b.op("Gemm", grad, node.input[1], alpha=found.get("alpha", 1.0), transB=1 - found.get("transB", 0))
    return [pulled, *[None] * (len(node.input) - 1)]


def _matmul(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    left, right = node.input
    found: Pulled = [None, None]
    if left in w.values.of_images:
        found[0] = w.b.op("MatMul", grad, _transposed(w, node, right))
        if w.values.rank(left) < w.values.rank(node.output[0]):
            raise unsupported(node, "it broadcasts the image's operand")
    if right in w.values.of_images:
        if w.values.rank(left) != w.values.rank(right):
            raise unsupported(node, "its operands have different numbers of dimensions")
        found[1] = w.b.op("MatMul", _transposed(w, node, left), grad)
    return found


def _transposed(w: Backward, node: onnx.NodeProto, name: str) -> str:
    rank = w.values.rank(name)
    if rank < 2:
        raise unsupported(node, "an operand is a vector")
    return w.b.op("Transpose", _operand(w, node, name), perm=[*range(rank - 2), rank - 1, rank - 2])


def _softmax(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    y, axis = w.kept(node.output[0]), attributes(node).get("axis", -1)
    weighted = w.b.op("Mul", grad, y)
    total = w.b.op("ReduceSum", weighted, w.b.ints(axis), keepdims=1)
    return [w.b.op("Sub", weighted, w.b.op("Mul", y, total))]


# --- shape and place -----------------------------------------------------------------------------------------


def _reshaped(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.like(grad, node.input[0]), *[None] * (len(node.input) - 1)]


def _transpose(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    perm = attributes(node)["perm"]
    return [w.b.op("Transpose", grad, perm=[perm.index(axis) for axis in range(len(perm))])]


def _concat(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    axis = attributes(node)["axis"] % w.values.rank(node.output[0])
    if axis == 0:
        raise unsupported(node, "it joins along the batch axis")
    sides = [w.side(name, axis) for name in node.input]
    if len(sides) == 1:
        return [grad]
    known = [w.known_sides(name, [axis]) for name in node.input]
    sizes = w.b.ints(*(one[0] for one in known if one)) if all(known) else w.b.op("Concat", *sides, axis=0)
    return [*w.b.ops("Split", (grad, sizes), len(sides), axis=axis)]


def _split(w: Backward, node: onnx.NodeProto, grads: Sequence[str | None]) -> Pulled:
    axis = attributes(node).get("axis", 0) % w.values.rank(node.input[0])
    parts = [
        w.b.op("ConstantOfShape", w.b.op("Shape", w.kept(output)), value=_zero(w)) if grad is None else grad
        for grad, output in zip(grads, node.output, strict=True)
    ]
    return [w.b.op("Concat", *parts, axis=axis), *[None] * (len(node.input) - 1)]


def _zero(w: Backward) -> onnx.TensorProto:
    return onnx.helper.make_tensor("zero", onnx.helper.np_dtype_to_tensor_dtype(w.b.dtype), [1], [0])


def _slice(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """Zeros around what was cut out, along axes of known length."""
    starts, ends, axes, steps = ([*node.input[1:], "", ""])[:4]
    constants = [w.values.constant(name) if name else None for name in (starts, ends, axes, steps)]
    rank = w.values.rank(node.input[0])
    if constants[0] is None or constants[1] is None or (axes and constants[2] is None):
        raise unsupported(node, "its bounds are computed")
    if steps and (constants[3] is None or set(constants[3].tolist()) != {1}):
        raise unsupported(node, "its steps are not 1")
    which = range(len(constants[0])) if constants[2] is None else [int(a) % rank for a in constants[2]]
    before, after = [0] * rank, [0] * rank
    for axis, start, end in zip(which, constants[0].tolist(), constants[1].tolist(), strict=True):
        length = w.known_sides(node.input[0], [axis])
        if length is None:
            raise unsupported(node, "the length of the axis it cuts is not known")
        first, last, _ = slice(start, end).indices(length[0])
        before[axis], after[axis] = first, length[0] - last
    return [w.b.op("Pad", grad, w.b.ints(*before, *after)), *[None] * (len(node.input) - 1)]


def _gather(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """One plane cut out, or planes in a new order: as a product with what chose them."""
    found = attributes(node)
    axis = found.get("axis", 0) % w.values.rank(node.input[0])
    indices, length = w.values.constant(node.input[1]), w.known_sides(node.input[0], [axis])
    if indices is None or indices.ndim > 1 or length is None or axis == 0:
        raise unsupported(node, "what it gathers is computed, or along the batch axis")
    if indices.ndim == 0:
        grad = w.b.op("Unsqueeze", grad, w.b.ints(axis))
    (side,) = length
    places = [int(i) % side for i in indices.reshape(-1)]
    if len(set(places)) < len(places):
        raise unsupported(node, "it gathers a plane twice")
    # Behind the gradient's planes stands one of zeros, which is what the planes not chosen get.
    order = [places.index(i) if i in places else len(places) for i in range(side)]
    pads = [0] * (2 * w.values.rank(node.input[0]))
    pads[w.values.rank(node.input[0]) + axis] = 1
    return [w.b.op("Gather", w.b.op("Pad", grad, w.b.ints(*pads)), w.b.ints(*order), axis=axis), None]


def _pad(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    mode, pads = attributes(node).get("mode", "constant"), w.values.constant(node.input[1])
    rank = w.values.rank(node.input[0])
    axes = w.values.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    if pads is None:
        raise unsupported(node, "its widths are computed")
    which = [int(a) % rank for a in axes] if axes is not None else list(range(rank))
    before, after = pads[: len(which)].tolist(), pads[len(which) :].tolist()
    for axis, low, high in zip(which, before, after, strict=True):
        if low or high:
            if mode != "constant" and min(low, high) < 0:
                raise unsupported(node, f"it cuts in mode '{mode}'")
            fold = {"constant": _cut, "reflect": _reflected, "edge": _edges, "wrap": _wrapped}
            if mode not in fold:
                raise unsupported(node, f"there is no rule for mode '{mode}'")
            grad = fold[mode](w, node, grad, axis, low, high)
    return [grad, *[None] * (len(node.input) - 1)]


def _between(w: Backward, grad: str, axis: int, start: str, end: str) -> str:
    return w.b.op("Slice", grad, start, end, w.b.ints(axis))


def _cut(w: Backward, node: onnx.NodeProto, grad: str, axis: int, low: int, high: int) -> str:
    inner = _between(w, grad, axis, w.b.ints(max(low, 0)), w.b.ints(-high if high > 0 else LAST))
    if low >= 0 and high >= 0:
        return inner
    pads = [0] * (2 * w.values.rank(node.input[0]))
    pads[axis], pads[w.values.rank(node.input[0]) + axis] = max(-low, 0), max(-high, 0)
    return w.b.op("Pad", inner, w.b.ints(*pads))


LAST = 2**62  # behind every end


def _reflected(w: Backward, node: onnx.NodeProto, grad: str, axis: int, low: int, high: int) -> str:
    """What lies in the margins goes to where it was mirrored from, the edge itself left out."""
    return _folded(w, node, grad, axis, low, high, mirror=True, offset=1)


def _edges(w: Backward, node: onnx.NodeProto, grad: str, axis: int, low: int, high: int) -> str:
    """What lies in a margin goes to the edge beside it."""
    return _folded(w, node, grad, axis, low, high, mirror=False, offset=0)


def _wrapped(w: Backward, node: onnx.NodeProto, grad: str, axis: int, low: int, high: int) -> str:
    raise unsupported(node, "there is no rule for mode 'wrap'")


def _folded(
    w: Backward, node: onnx.NodeProto, grad: str, axis: int, low: int, high: int, mirror: bool, offset: int
) -> str:
    """The inner part, and each margin, mirrored or summed up, put to its edge."""
    rank = w.values.rank(node.input[0])
    total = _between(w, grad, axis, w.b.ints(low), w.b.ints(-high if high else LAST))
    length = w.side(node.input[0], axis)
    for width, at_end in ((low, False), (high, True)):
        if not width:
            continue
        margin = _between(w, grad, axis, w.b.ints(-width if at_end else 0), w.b.ints(LAST if at_end else width))
        if mirror:
            margin = w.b.op("Slice", margin, w.b.ints(-1), w.b.ints(-LAST), w.b.ints(axis), w.b.ints(-1))
        else:
            margin, width = w.b.op("ReduceSum", margin, w.b.ints(axis), keepdims=1), 1
        rest = w.b.op("Sub", length, w.b.ints(width + offset))
        near, far = w.b.ints(offset), rest
        if at_end:
            near, far = far, near
        zeros = [w.b.ints(*[0] * axis), near, w.b.ints(*[0] * (rank - 1)), far, w.b.ints(*[0] * (rank - 1 - axis))]
        total = w.b.op("Add", total, w.b.op("Pad", margin, w.b.op("Concat", *zeros, axis=0)))
    return total


def _expand(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    return [w.unbroadcast(grad, node.output[0], node.input[0]), None]


# --- sums over axes ------------------------------------------------------------------------------------------


def _axes(w: Backward, node: onnx.NodeProto) -> list[int]:
    rank = w.values.rank(node.input[0])
    given = w.values.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    found = attributes(node).get("axes") if given is None else given.tolist()
    axes = sorted(int(a) % rank for a in found) if found else list(range(rank))
    if 0 in axes:
        raise unsupported(node, "it reduces the batch axis")
    return axes


def _reduce_sum(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    axes = _axes(w, node)
    if not attributes(node).get("keepdims", 1):
        grad = w.b.op("Unsqueeze", grad, w.b.ints(*axes))
    return [grad, *[None] * (len(node.input) - 1)]


def _reduce_mean(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    axes = _axes(w, node)
    return _reduce_sum(w, node, w.b.op("Div", grad, _count(w, node.input[0], axes)))


def _global_average(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    axes = list(range(2, w.values.rank(node.input[0])))
    return [w.b.op("Div", grad, _count(w, node.input[0], axes))]


def _count(w: Backward, name: str, axes: Sequence[int]) -> str:
    """How many numbers lie along these axes of a forward value."""
    known = w.known_sides(name, axes)
    if known is not None:
        return w.b.number(math.prod(known))
    sides = w.b.op("Gather", w.b.op("Shape", w.kept(name)), w.b.ints(*axes))
    return w.b.op("CastLike", w.b.op("ReduceProd", sides, keepdims=0), w.b.number(1.0))


# --- normalisation -------------------------------------------------------------------------------------------


def _batch_norm(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """One that no convolution took in: a factor a channel."""
    scale, _, _, variance = (w.values.constant(name) for name in node.input[1:5])
    if scale is None or variance is None:
        raise unsupported(node, "its statistics are computed")
    factor = scale / (variance + attributes(node).get("epsilon", 1e-5)) ** 0.5
    shaped = factor.astype(w.b.dtype).reshape(-1, *[1] * (w.values.rank(node.input[0]) - 2))
    return [w.b.op("Mul", grad, w.b.constant(shaped)), None, None, None, None]


def _layer_norm(w: Backward, node: onnx.NodeProto, grad: str) -> Pulled:
    """With x' the normalised input and g the gradient at it: (g - mean(g) - x' mean(g x')) / sd."""
    found = attributes(node)
    x, rank = w.kept(node.input[0]), w.values.rank(node.input[0])
    axes = w.b.ints(*range(found.get("axis", -1) % rank, rank))

    def mean(value: str) -> str:
        return w.b.op("ReduceMean", value, axes, keepdims=1)

    centred = w.b.op("Sub", x, mean(x))
    variance = w.b.op("Add", mean(w.b.op("Mul", centred, centred)), w.b.number(found.get("epsilon", 1e-5)))
    inverse = w.b.op("Reciprocal", w.b.op("Sqrt", variance))
    normal = w.b.op("Mul", centred, inverse)
    inner = w.b.op("Mul", grad, node.input[1])
    along = w.b.op("Mul", normal, mean(w.b.op("Mul", inner, normal)))
    left = w.b.op("Sub", w.b.op("Sub", inner, mean(inner)), along)
    return [w.b.op("Mul", left, inverse), *[None] * (len(node.input) - 1)]


DERIVATIVES: dict[str, Derivative] = {
    "Add": _add,
    "AveragePool": average_pooling,
    "BatchNormalization": _batch_norm,
    "Cast": _same,
    "CastLike": _same,
    "Clip": _clip,
    "Concat": _concat,
    "Div": _div,
    "Elu": _elu,
    "Erf": _erf,
    "Exp": _exp,
    "Expand": _expand,
    "Flatten": _reshaped,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _same,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "MatMul": _matmul,
    "Max": _bounded,
    "Min": _bounded,
    "Mul": _mul,
    "Neg": _neg,
    "Pad": _pad,
    "Pow": _pow,
    "Reciprocal": _reciprocal,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Relu": _relu,
    "Reshape": _reshaped,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Sqrt": _sqrt,
    "Squeeze": _reshaped,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _reshaped,
}
