"""The gradients of max and average pooling, over overlapping windows too, from operators that run everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx

from parchgrad.graph.backward import Backward, unsupported
from parchgrad.graph.gradients import Whole
from parchgrad.graph.values import attributes

Pair = tuple[int, int]


def max_pooling(w: Backward, node: onnx.NodeProto, grad: str) -> Pooled:
    """Each window's gradient goes to the first of its maxima, in rows: PyTorch's choice.

    The window's places are gone through in order; the first that equals the maximum takes it. Places a stride
    apart (a phase: the row and the column modulo the stride) lie side by side on a coarse grid, as large as windows and
    their reach together. All is done on such grids laid out in one line each: the same place of every window is then a
    piece of a phase's line, from a constant start.
    """
    kernel, stride, pads, dilation = _geometry(node)
    if dilation != (1, 1):
        raise unsupported(node, "there is no rule for dilated windows")
    if len(node.output) > 1 and node.output[1]:
        raise unsupported(node, "there is no rule for its indices")
    b, y = w.b, w.kept(node.output[0])
    relus = _relus_before(w, node)
    if relus:
        # What a window takes from is positive where its maximum is: asked once a window, not once a place.
        grad = b.op("Mul", grad, w.positive(y))
        w.passed.update(relus)
    reach = (-(-kernel[0] // stride[0]) - 1, -(-kernel[1] // stride[1]) - 1)
    pooled = Pooled(w, node, stride, reach, pads, {})
    phases, length = _phases(w, node, stride, reach, pads)
    on_grid = b.ints(0, 0, 0, 0, 0, 0, *reach)
    maxima, grads = (b.op("Reshape", b.op("Pad", one, on_grid) if any(reach) else one, b.ints(-1)) for one in (y, grad))
    places = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    free = ""  # the windows that no place has taken yet; all at first
    for place in places[:-1]:
        line, start = phases[place[0] % stride[0], place[1] % stride[1]]
        first = b.op("Add", start, pooled.shift(place).name)
        equal = b.op("Equal", maxima, b.op("Slice", line, first, b.op("Add", first, length)))
        chosen = b.op("And", equal, free) if free else equal
        free = b.op("Xor", free, chosen) if free else b.op("Not", equal)
        pooled.shares[place] = b.op("Mul", grads, b.op("CastLike", chosen, grads))
    # Somebody is the maximum.
    pooled.shares[places[-1]] = b.op("Mul", grads, b.op("CastLike", free, grads)) if free else grads
    return pooled


@dataclass(frozen=True)
class Pooled:
    """A gradient that windows hand to their maxima, not yet put in place: what each gives to which of its places.

    Sums over channels and single channels can be had of it before, and few planes put in place instead of all.
    """

    w: Backward
    node: onnx.NodeProto
    stride: Pair
    reach: Pair  # coarse places behind a window's first
    pads: tuple[int, ...]
    shares: dict[Pair, str]  # by place in the window: (b * C * grid,), 0 between the windows
    channels: range | None = None  # of the pooled value's channels; None: all

    def of_channels(self, channels: range) -> Pooled:
        """The gradient of a part of what was pooled, as of one of several values joined before."""
        return replace(self, channels=channels)

    def whole(self) -> Whole:
        placed = self._placed(self.shares, self.w.side(self.node.output[0], 1))
        if self.channels is None:
            return Whole(placed)
        b, part = self.w.b, self.channels
        return Whole(b.op("Slice", placed, b.ints(part.start), b.ints(part.stop), b.ints(1)))

    def some(self, channels: str) -> str:
        """These channels `(R,)`, `(1, R, h, w)`, of one image."""
        b = self.w.b
        if self.channels is not None:
            channels = b.op("Add", channels, b.ints(self.channels.start))
        parts = {place: b.op("Gather", one, channels, axis=0) for place, one in self._planes().items()}
        return self._placed(parts, b.op("Shape", channels))

    def sums(self, sides: str) -> str:
        """`sides` `(1, 2, C)` times the gradient, `(1, 2, h * w)`, of one image."""
        b = self.w.b
        flat = b.op("Squeeze", sides, b.ints(0))
        if self.channels is not None:
            # The others count for nothing: quicker than to cut them off.
            behind = b.op("Sub", self.w.side(self.node.output[0], 1), b.ints(self.channels.stop))
            flat = b.op("Pad", flat, b.op("Concat", b.ints(0, self.channels.start, 0), behind, axis=0))
        parts = {place: b.op("MatMul", flat, one) for place, one in self._planes().items()}
        return b.op("Reshape", self._placed(parts, b.ints(2)), b.ints(1, 2, -1))

    def shift(self, place: Pair) -> Length:
        """How far into a grid's line a window's place lies from its first."""
        columns = self._grid(3)
        return columns.times(place[0] // self.stride[0]).plus(place[1] // self.stride[1])

    def _grid(self, axis: int) -> Length:
        return Length(self.w, self.node.output[0], axis).plus(self.reach[axis - 2])

    def _planes(self) -> dict[Pair, str]:
        """Each share as `(C, grid)`."""
        b = self.w.b
        shape = b.op("Concat", self.w.side(self.node.output[0], 1), b.ints(-1), axis=0)
        return {place: b.op("Reshape", one, shape) for place, one in self.shares.items()}

    def _placed(self, parts: dict[Pair, str], channels: str) -> str:
        """Added up by phase, the phases between each other, and the margins cut off."""
        b, (sh, sw) = self.w.b, self.stride
        sums: dict[Pair, str] = {}
        for place, part in parts.items():
            phase, shift = (place[0] % sh, place[1] % sw), self.shift(place)
            part = b.op("Reshape", part, b.ints(-1))
            if shift.known != 0:
                # On the grid's line, further on: what falls off its end is between the windows, and 0.
                part = b.op("Pad", part, b.op("Concat", shift.name, b.op("Neg", shift.name), axis=0))
            sums[phase] = part if phase not in sums else b.op("Add", sums[phase], part)
        rows, columns = self._grid(2), self._grid(3)
        # (b * C, rows, 1, columns) each, side by side (b * C, rows, sh * sw, columns)
        apart = b.op("Concat", b.ints(-1), rows.name, b.ints(1), columns.name, axis=0)
        zero = b.op("Mul", sums[0, 0], b.number(0.0)) if len(sums) < sh * sw else ""  # the stride is the wider
        each = [b.op("Reshape", sums.get((p, q), zero), apart) for p in range(sh) for q in range(sw)]
        joined = b.op("Concat", *each, axis=2) if len(each) > 1 else each[0]
        if sw > 1:
            # The two innermost axes alone are exchanged: several times quicker than one exchange of them all.
            split = b.op("Concat", b.ints(-1, sw), columns.name, axis=0)
            joined = b.op("Transpose", b.op("Reshape", joined, split), perm=[0, 2, 1])
        reached = rows.times(sh), columns.times(sw)
        fine = b.op("Concat", b.ints(-1), channels, *(one.name for one in reached), axis=0)
        return _cropped(self.w, self.node, b.op("Reshape", joined, fine), reached, self.pads)


class Length:
    """A number of places along an axis of a forward value, known now or only when the graph runs."""

    def __init__(self, w: Backward, value: str, axis: int, name: str = "", known: int | None = None) -> None:
        self._w, self._value, self._axis = w, value, axis
        sides = w.known_sides(value, [axis]) if not name and known is None else None
        self.known = sides[0] if sides is not None else known
        self._name = name

    @property
    def name(self) -> str:
        """As a tensor of one integer."""
        if self.known is not None:
            return self._w.b.ints(self.known)
        return self._name or self._w.side(self._value, self._axis)

    def plus(self, number: int) -> Length:
        return self._changed("Add", number, None if self.known is None else self.known + number)

    def times(self, number: int) -> Length:
        return self._changed("Mul", number, None if self.known is None else self.known * number)

    def _changed(self, kind: str, number: int, known: int | None) -> Length:
        name = "" if known is not None else self._w.b.op(kind, self.name, self._w.b.ints(number))
        return Length(self._w, self._value, self._axis, name, known)


def _phases(
    w: Backward, node: onnx.NodeProto, stride: Pair, reach: Pair, pads: tuple[int, ...]
) -> tuple[dict[Pair, tuple[str, str]], str]:
    """Of the input, with margins below every number: each phase's grid in a line and from where in it; its length.

    A line goes on where the furthest place of the last window lies behind its end.
    """
    b, (sh, sw) = w.b, stride
    covered = _padded_to_grid(w, node, stride, reach, pads)
    size = b.op("Size", covered)
    length = b.op("Reshape", b.op("Div", size, b.integer(sh * sw)), b.ints(1))
    places = [(p, q) for p in range(sh) for q in range(sw)]
    columns = Length(w, node.output[0], 3).plus(reach[1])
    rest = b.op("Concat", b.ints(0), columns.times(reach[0]).plus(reach[1]).name, axis=0)

    def longer(line: str) -> str:
        return b.op("Pad", line, rest) if any(reach) else line

    if sh == sw and (w.single or stride == (1, 1)):
        # The channels of a phase lie together: channel (p * stride + q) * C + c. One phase follows another.
        line = b.op("Reshape", b.op("SpaceToDepth", covered, blocksize=sh) if sh > 1 else covered, b.ints(-1))
        kernel = _geometry(node)[0]
        if max(kernel[0] - 2 * sh, kernel[1] - 2 * sw) >= 0 or (sh == 1 and any(reach)):
            line = longer(line)
        return {place: (line, b.op("Mul", length, b.ints(n))) for n, place in enumerate(places)}, length
    every = b.ints(LAST, LAST)
    grids = {(p, q): b.op("Slice", covered, b.ints(p, q), every, b.ints(2, 3), b.ints(sh, sw)) for p, q in places}
    return {place: (longer(b.op("Reshape", grid, b.ints(-1))), b.ints(0)) for place, grid in grids.items()}, length


LAST = 2**62  # behind every end


def _relus_before(w: Backward, node: onnx.NodeProto) -> list[str]:
    """The ReLUs, one or several joined, that make the input, which nobody else reads."""
    made = w.values.producer(node.input[0])
    if made is None or len(w.values.users(node.input[0])) != 1:
        return []
    if made.op_type == "Concat":
        parts = [w.values.producer(name) for name in made.input]
        alone = all(len(w.values.users(name)) == 1 for name in made.input)
    else:
        parts, alone = [made], True
    found = [one.name for one in parts if one is not None and one.op_type == "Relu"]
    return found if alone and len(found) == len(parts) else []


def _padded_to_grid(w: Backward, node: onnx.NodeProto, stride: Pair, reach: Pair, pads: tuple[int, ...]) -> str:
    """The input with margins below every number, as large as all windows' coarse places together."""
    b = w.b
    ends = []
    for axis in (0, 1):
        have = Length(w, node.input[0], axis + 2).plus(pads[axis])
        wanted = Length(w, node.output[0], axis + 2).plus(reach[axis]).times(stride[axis])
        if have.known is not None and wanted.known is not None:
            ends.append(b.ints(wanted.known - have.known))
        else:
            ends.append(b.op("Sub", wanted.name, have.name))
    widths = b.op("Concat", b.ints(0, 0, pads[0], pads[1], 0, 0), *ends, axis=0)
    lowest = b.number(float(np.finfo(b.dtype).min))
    return b.op("Pad", w.kept(node.input[0]), widths, lowest)


def _cropped(
    w: Backward, node: onnx.NodeProto, fine: str, reached: tuple[Length, Length], pads: tuple[int, ...]
) -> str:
    """What lies on the input: the margins before it are cut off, and what is left over behind it.

    `reached` are the two sides of `fine`. Zeros stand where it ends before the input does.
    """
    b = w.b
    ends = [Length(w, node.input[0], axis).plus(pads[axis - 2]) for axis in (2, 3)]
    bound = b.op("Concat", *(end.name for end in ends), axis=0)
    cut = b.op("Slice", fine, b.ints(pads[0], pads[1]), bound, b.ints(2, 3))
    known = [end.known - one.known for end, one in zip(ends, reached, strict=True) if end.known and one.known]
    if len(known) == len(ends):
        missing = [max(0, one) for one in known]
        return b.op("Pad", cut, b.ints(0, 0, 0, 0, 0, 0, *missing)) if any(missing) else cut
    # Of the two sides alone: `cut` may have fewer channels than the input.
    lacking = b.op("Sub", b.op("Shape", w.kept(node.input[0]), start=2), b.op("Shape", cut, start=2))
    return b.op("Pad", cut, b.op("Concat", b.ints(0, 0, 0, 0, 0, 0), lacking, axis=0))


def average_pooling(w: Backward, node: onnx.NodeProto, grad: str) -> list[str | None]:
    """Each place gets its share of every window it lies in: a transposed convolution with one even kernel."""
    kernel, stride, pads, dilation = _geometry(node)
    if dilation != (1, 1):
        raise unsupported(node, "there is no rule for dilated windows")
    sides, windows = w.known_sides(node.input[0], [2, 3]), w.known_sides(node.output[0], [2, 3])
    count = float(math.prod(kernel))
    if sides is not None and windows == (1, 1) and kernel == sides and not any(pads):
        return [w.b.op("Expand", w.b.op("Mul", grad, w.b.number(1 / count)), w.b.ints(1, 1, *sides))]
    if kernel == stride == (1, 1) and not any(pads):
        return [grad]
    ceil, padding_counts = attributes(node).get("ceil_mode", 0), attributes(node).get("count_include_pad", 0)
    if not ceil and (padding_counts or not any(pads)):
        shared = w.b.op("Mul", grad, w.b.number(1 / count))
    else:
        if sides is None or windows is None:
            raise unsupported(node, "how many numbers a window holds depends on the picture's size")
        margins = pads if padding_counts else (0, 0, 0, 0)
        shares = 1.0 / _window_sizes((sides[0], sides[1]), (windows[0], windows[1]), kernel, stride, pads, margins)
        shared = w.b.op("Mul", grad, w.b.constant(shares.astype(w.b.dtype)))
    planes = w.b.op("Reshape", shared, w.b.op("Concat", w.b.ints(-1, 1), w.b.op("Shape", shared, start=2), axis=0))
    ones = w.b.constant(np.ones((1, 1, *kernel), dtype=w.b.dtype))
    spread = w.b.op("ConvTranspose", planes, ones, strides=list(stride), kernel_shape=list(kernel))
    shape = w.b.op("Concat", w.b.op("Shape", shared, end=2), w.b.op("Shape", spread, start=2), axis=0)
    fine = w.b.op("Reshape", spread, shape)
    rows, columns = (Length(w, node.output[0], a + 2).times(stride[a]).plus(kernel[a] - stride[a]) for a in (0, 1))
    return [_cropped(w, node, fine, (rows, columns), pads)]


def _window_sizes(
    sides: Pair,
    windows: Pair,
    kernel: Pair,
    stride: Pair,
    pads: tuple[int, ...],
    margins: tuple[int, ...],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """How many numbers of the input, and of the margins that count, lie in each window, `(1, 1, rows, columns)`."""
    along = []
    for axis in (0, 1):
        starts = np.arange(windows[axis]) * stride[axis] - pads[axis]
        along.append(
            np.minimum(starts + kernel[axis], sides[axis] + margins[axis + 2]) - np.maximum(starts, -margins[axis])
        )
    sizes: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.outer(*along).astype(np.float64)[None, None]
    return sizes


def _geometry(node: onnx.NodeProto) -> tuple[Pair, Pair, tuple[int, ...], Pair]:
    """kernel, stride, pads (top, left, bottom, right), dilation."""
    found = attributes(node)
    if found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise unsupported(node, f"there is no rule for auto_pad {found['auto_pad']}")
    kernel = found["kernel_shape"]
    if len(kernel) != 2:
        raise unsupported(node, f"its windows have {len(kernel)} dimensions, not 2")
    stride, dilation = found.get("strides", [1, 1]), found.get("dilations", [1, 1])
    pads = found.get("pads", [0, 0, 0, 0])
    return (kernel[0], kernel[1]), (stride[0], stride[1]), tuple(pads), (dilation[0], dilation[1])
