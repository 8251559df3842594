"""What the points of one image share at the entry convolution: its outputs on a line, and its input gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parchgrad.runtimes import Points
from parchgrad.runtimes.pruned.convolution import AtOutput, Convolution


class EntryOutputs:
    """The entry convolution's outputs before its activation, for the points of one explanation.

    A convolution is affine: on the straight line from an image's start to its end two outputs give all the others.
    They are kept from pass to pass, for as long as points of that image come.
    """

    def __init__(self, entry: Convolution) -> None:
        self.entry = entry
        self._lines: dict[int, tuple[Tensor, Tensor]] = {}  # of an image: the output at its start, and its rise

    def of(self, points: Points, which: range) -> Tensor:
        """`(n, C, h, w)` of these points."""
        rows = points.rows[which.start : which.stop]
        self._lines = {row: line for row, line in self._lines.items() if row in rows}
        off = [place for place, i in enumerate(which) if points.fractions[i] is None]
        computed = self.entry.output(points.images[[which[place] for place in off]]) if off else None
        if computed is not None and len(off) == len(rows):
            return computed
        first, _ = next(self._line(points, points.rows[i]) for i in which if points.fractions[i] is not None)
        form = torch.channels_last if self.entry.channels_last else torch.contiguous_format
        outputs = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype, device=first.device, memory_format=form)
        if computed is not None:
            outputs[off] = computed
        for place, i in enumerate(which):
            fraction = points.fractions[i]
            if fraction is not None:
                start, rise = self._line(points, points.rows[i])
                torch.add(start, rise, alpha=fraction, out=outputs[place : place + 1])
        return outputs

    def _line(self, points: Points, row: int) -> tuple[Tensor, Tensor]:
        found = self._lines.get(row)
        if found is None:
            both = self.entry.output(torch.stack((points.starts[row], points.ends[row])))
            found = self._lines[row] = both[:1], both[1:] - both[:1]
        return found


class EntryGradients:
    """The weighted sum of gradients at the entry convolution's output, of one image's points in one pass.

    Selected channels are the same for all of them and are summed alone; what is of other channels is summed whole.
    So no more than two go through the convolution, whatever the number of points.
    """

    def __init__(self, entry: Convolution) -> None:
        self._entry = entry
        self._some: AtOutput | None = None
        self._whole: AtOutput | None = None

    def add(self, one: AtOutput, weight: float) -> None:
        """One more point's gradient."""
        if one.numbers is None:
            self._whole = one.times(weight) if self._whole is None else self._whole.plus(one, weight)
        elif self._some is None:
            self._some = one.times(weight)
        elif self._some.numbers is not None and torch.equal(one.numbers, self._some.numbers):
            self._some = self._some.plus(one, weight)
        else:  # under a depthwise convolution whose own gradient passed unchanged at some of the points
            self.add(one.spread(), weight)

    def at_input(self, shape: torch.Size) -> Tensor:
        """The sum's gradient at an image of this shape, `(1, 3, h, w)`."""
        each = [self._entry.at_input(one, shape) for one in (self._some, self._whole) if one is not None]
        return each[0] if len(each) == 1 else each[0] + each[1]


def ends_of(rows: Sequence[int]) -> list[bool]:
    """For each of rising rows, whether it is the last of its number."""
    return [here != after for here, after in zip(rows, [*rows[1:], -1], strict=True)]
