"""Gradients on their way back: of all channels, or of those alone in which they are not zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """A gradient `(B, C, h, w)`, zero outside a few channels that are each image's own.

    A depthwise convolution under the pruned rule sends back one: it reads an input channel only where the output
    channel of that number is selected.
    """

    shape: torch.Size  # (B, C, h, w)
    numbers: tuple[Tensor | None, ...]  # each image's channels, (k,) long and rising; None = all of them
    values: tuple[Tensor, ...]  # (1, k, h, w) each

    def dense(self) -> Tensor:
        """The same with its zeros, `(B, C, h, w)`."""
        return self._onto(empty_like(self.values[0], self.shape).zero_())

    def added_to(self, other: Tensor) -> Tensor:
        """`other` plus this gradient, out of place."""
        return self._onto(other.clone())

    def _onto(self, whole: Tensor) -> Tensor:
        for row, (numbers, values) in enumerate(zip(self.numbers, self.values, strict=True)):
            if numbers is None:
                whole[row] += values[0]
            else:
                whole[row].index_add_(0, numbers, values[0])
        return whole


Gradient = Tensor | Channels


def dense(grad: Gradient) -> Tensor:
    return grad.dense() if isinstance(grad, Channels) else grad


def total(one: Gradient | None, other: Gradient) -> Gradient:
    """The sum of two gradients of one value; None is nothing yet."""
    if one is None:
        return other
    if isinstance(one, Channels):
        return one.added_to(dense(other))
    if isinstance(other, Channels):
        return other.added_to(one)
    return one + other


def channels_of(values: Tensor, image: int, numbers: Tensor) -> Tensor:
    """Some channels of one image of `(B, C, h, w)`: `(1, k, h, w)`, in the layout of `values`."""
    one = values[image]
    if one.stride(0) != 1 or values.shape[1] == 1:
        return one.index_select(0, numbers)[None]
    height, width = one.shape[1:]
    chosen = one.flatten(1).t().index_select(1, numbers)  # channels side by side in memory
    return chosen.view(1, height, width, -1).permute(0, 3, 1, 2)


def layout(values: Tensor) -> torch.memory_format:
    channels_last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not values.is_contiguous() else torch.contiguous_format


def empty_like(values: Tensor, shape: torch.Size) -> Tensor:
    """Memory for images `(B, C, h, w)`, in the layout of `values`."""
    return torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=layout(values))
