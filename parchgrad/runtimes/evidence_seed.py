"""The seed `evidence`: the last map of a network, and the gradient there weighed by the evidence of each position.

Pure functions of tensors and shapes; the engines know where the values come from. docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from parchgrad.errors import OptionError
from parchgrad.options import SEEDS

_Value = TypeVar("_Value", bound=Hashable)


def weighed(grad: Tensor, values: Tensor, which: Tensor | None = None) -> Tensor:
    """The gradient `(B, C, h, w)` at `values` of that shape, each position times its squared relative evidence:

        e(x, y) = max(0, sum over k of grad_k values_k)        (HiResCAM: Draelos and Carin, arXiv:2011.08891)
        weighed = grad * (e / mean of e)^2

    Of global average pooling and a linear layer this is, up to a factor of each image, the gradient of the mean of the
    cubed positive class activation map. An image whose evidence is zero everywhere or not finite keeps its gradient, as
    do those not in `which` `(B,)` bool (default: all are). Out of place, in the gradient's type; scaling a gradient
    scales the result alike. Nothing is read by the host.
    """
    # In float64, so that a product of small numbers is none of zero.
    evidence = (grad.double() * values.double()).sum(dim=1, keepdim=True).clamp(min=0)
    most = evidence.amax(dim=(2, 3), keepdim=True)
    known = (most > 0) & most.isfinite()
    if which is not None:
        known = known & which[:, None, None, None]
    relative = evidence / most
    weights = (relative / relative.mean(dim=(2, 3), keepdim=True)).square()
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad * torch.where(known, weights, 1.0).to(wide)).to(grad.dtype)


def extent(value: object) -> tuple[int, ...] | None:
    """The shape of what carries a gradient; () of a collection that holds such, None of anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape) if value.is_floating_point() else None
    held: Sequence[object] = ()
    if isinstance(value, Mapping):
        held = tuple(value.values())
    elif isinstance(value, (tuple, list)):
        held = value
    return () if any(extent(one) is not None for one in held) else None


def last_map(
    calls: Sequence[tuple[_Value, Sequence[_Value]]],
    extents: Mapping[_Value, tuple[int, ...] | None],
    images: _Value,
    answer: _Value,
) -> _Value | None:
    """The last value `(B, C, h, w)` with h w > 1 that every path from the images to the answer goes through, and that
    comes before the first such value without places.

    `calls` in order: what each gives, and what it is given. None where there is no such value, where something with
    places of its own comes after it (a vision transformer's tokens, into which other values were mixed), and where
    what reads it says that its channels are not the second axis.
    """
    reached = {images}
    for value, given in calls:
        if extents[value] is not None and not reached.isdisjoint(given):
            reached.add(value)
    inputs = {value: [one for one in given if one in reached] for value, given in calls if value in reached}
    needed = {answer} & reached
    for value, _ in reversed(calls):
        if value in needed:
            needed.update(inputs[value])
    path = [images, *(value for value, _ in calls if value in needed)]
    place = {value: i for i, value in enumerate(path)}
    last_reader = list(range(len(path)))
    for value in path[1:]:
        for one in inputs[value]:
            last_reader[place[one]] = max(last_reader[place[one]], place[value])
    found: _Value | None = None
    furthest = 0  # the last reader of anything before
    for i, value in enumerate(path):
        shape = extents[value]
        # In the order of the calls a value is on every path where none leaps over it.
        if furthest <= i and value != images and shape:
            if not _has_places(shape):
                break
            if len(shape) == 4:
                found = value
            elif found is not None and prod(shape[1:]) != prod(_shape(extents[found])[1:]):
                found = None
        furthest = max(furthest, last_reader[i])
    if found is None:
        return None
    readers = [value for value in path[1:] if found in inputs[value]]
    agree = all(_keeps_channels(_shape(extents[found]), _shape(extents[value])) for value in readers)
    return found if agree else None


def _shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape or ()


def _has_places(shape: tuple[int, ...]) -> bool:
    """Whether there is more than one position; (B, 1, 1, C) are channels in the last place."""
    return len(shape) > 2 and prod(shape[2:]) > 1 and not (len(shape) == 4 and shape[1:3] == (1, 1))


def _keeps_channels(shape: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether this may be made of a map whose second axis are the channels: pooled, flattened, or a convolution's."""
    flattened = len(after) == 2 and after[1] == prod(shape[1:])
    return after[1:2] == shape[1:2] or flattened or (len(after) == 4 and after[2:] == (1, 1))


def refusal(reason: str) -> OptionError:
    """The error that this network cannot be explained with the seed `evidence`."""
    others = ", ".join(seed for seed in SEEDS if seed != "evidence")
    return OptionError("seed", "evidence", f"{others}; {reason}")


NO_LAST_MAP = "no value (batch, channels, height, width) of this network lies on every path to its logits"
