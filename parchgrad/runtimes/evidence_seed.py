"""A network's last map, and the seed `evidence`: the gradient there weighed by the evidence of each position.

Pure functions of tensors and shapes; the engines know where the values come from. docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from parchgrad.errors import OptionError
from parchgrad.options import METHODS, SEEDS

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

    `calls` in order: what each gives, and what it is given. None where there is no such value, where anything but its
    own flattened positions comes after it in another shape than a map's (a vision transformer's tokens, into which
    other places may be mixed), and where what reads it does not say that its channels are the second axis.
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
        furthest = max(furthest, last_reader[i])
    if found is None:
        return None
    shapes = {value: _shape(extents[value]) for value in path}
    after = path[place[found] + 1 :]
    readers = [value for value in after if found in inputs[value]]
    turned = _may_be_turned(path[1 : place[found] + 1], inputs, shapes, found)
    agree = all((_pools if turned else _keeps_channels)(shapes[found], shapes[value]) for value in readers)
    return found if agree and _only_flattened(found, after, inputs, shapes) else None


def _only_flattened(
    found: _Value,
    after: Sequence[_Value],
    inputs: Mapping[_Value, Sequence[_Value]],
    shapes: Mapping[_Value, tuple[int, ...]],
) -> bool:
    """Whether no value after the map may hold places that were mixed: maps go on being maps, or are flattened.

    From shapes alone a mixing of places is told from none only where it cannot be: `(B, C, N)` made of the map itself,
    and `(B, N, C)` made of that, both read by nothing else that has places. What was pooled has none to mix.
    """
    batch, channels, *sides = shapes[found]
    flat, swapped = (batch, channels, prod(sides)), (batch, prod(sides), channels)
    still = {found}  # values that may hold the map's places
    flattened = set()
    for value in after:
        given, shape = still.intersection(inputs[value]), shapes[value]
        if not given:
            continue
        if not _is_of_places(shape):
            pooled = len(shape) == 2 or shape[2:] == (1, 1)
            if not pooled or prod(shape[1:]) == prod(shapes[found][1:]):  # a collection, or all positions in a row
                still.add(value)
            continue
        still.add(value)
        if len(shape) == 4:
            if any(len(shapes[one]) != 4 for one in given):
                return False
        elif shape == flat and given == {found}:
            flattened.add(value)
        elif not (shape == swapped and given <= flattened and flat != swapped):
            return False
    return True


def _is_of_places(shape: tuple[int, ...]) -> bool:
    """As `_has_places`, also of shapes whose channels are not known: more than one axis beside the batch's counts."""
    return sum(side > 1 for side in shape[1:]) > 1


def _may_be_turned(
    before: Sequence[_Value],
    inputs: Mapping[_Value, Sequence[_Value]],
    shapes: Mapping[_Value, tuple[int, ...]],
    found: _Value,
) -> bool:
    """Whether the map's axes may be in another order than a convolution's: what came before, it included, was
    reshaped, or its sides are all the same, so that nobody could see it."""
    if len(set(shapes[found][1:])) == 1:
        return True
    for value in before:
        shape = shapes[value]
        if len(shape) not in (0, 2, 4) and _is_of_places(shape):
            return True
        for one in inputs[value]:
            other = shapes[one]
            if len(shape) == len(other) == 4 and shape != other and sorted(shape[1:]) == sorted(other[1:]):
                return True
    return False


def _pools(shape: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether what reads a map says by itself that its channels are the second axis: it leaves them, and no other."""
    _, channels, _, width = shape
    return channels > 1 and (after[1:] == (channels, 1, 1) or (after[1:] == (channels,) and channels != width))


def _shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape or ()


def _has_places(shape: tuple[int, ...]) -> bool:
    """Whether there is more than one position; (B, 1, 1, C) are channels in the last place."""
    return len(shape) > 2 and prod(shape[2:]) > 1 and not (len(shape) == 4 and shape[1:3] == (1, 1))


def _keeps_channels(shape: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether this may be made of a map whose second axis are the channels: pooled, flattened, or a convolution's."""
    flattened = len(after) == 2 and after[1] == prod(shape[1:])
    return after[1:2] == shape[1:2] or flattened or (len(after) == 4 and after[2:] == (1, 1))


# Options that need the network's last map: the value that does, and all there are.
OF_LAST_MAP = {"seed": ("evidence", SEEDS), "method": ("grad_cam", METHODS)}


def refusal(reason: str, option: str = "seed") -> OptionError:
    """The error that this network cannot be explained with the value of this one of OF_LAST_MAP."""
    refused, known = OF_LAST_MAP[option]
    return OptionError(option, refused, f"{', '.join(one for one in known if one != refused)}; {reason}")


NO_LAST_MAP = "no value (batch, channels, height, width) of this network lies on every path to its logits"
