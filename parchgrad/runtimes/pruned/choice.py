"""What each image selects in one layer, and what becomes of its gradient there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parchgrad.rule import image_factors, side_moments


class Choice:
    """The channels one class (at one quantile or alpha) selects in one layer; kept for the next image that does."""

    def __init__(self, selected: Tensor) -> None:
        self.selected = selected  # (C,) bool
        self.numbers = selected.nonzero()[:, 0]  # (k,) long, rising
        self.both_sides = 0 < len(self.numbers) < len(selected)
        self.sides: Tensor | None = None  # (2, C): selected and unselected, in units of the folded output's gradient
        self.rows: Tensor | None = None  # the weights' selected rows, as the convolution wants them


@dataclass
class LayerRule:
    """The rule in one layer for a slice of `B` images; `unchanged` counts where it let a gradient pass unchanged."""

    choices: Sequence[Choice | None]  # None: the rule does not act on this image here
    gammas: Sequence[float]
    conserve: Sequence[str]
    unchanged: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        # Until a gradient comes by: where none does, none is changed.
        self.unchanged = [choice is not None for choice in self.choices]

    def factors(self, image: int, sums: Tensor, channels: int) -> tuple[float, float] | None:
        """The two sides' factors of one image from its side sums `(2, positions)`; None: all pass unchanged."""
        choice = self.choices[image]
        if choice is None:
            return None
        pair = None
        if choice.both_sides:
            pair = image_factors(side_moments(sums, channels), self.gammas[image], self.conserve[image])
        self.unchanged[image] = pair is None
        return pair

    def sides_of(self, image: int, scale: Tensor | None, like: Tensor, channels: int) -> Tensor:
        """`(2, C)`: what sums a folded output's gradient over the selected and the unselected channels of an image."""
        choice, wide = self.choices[image], torch.promote_types(like.dtype, torch.float32)
        if choice is None:
            return torch.zeros((2, channels), dtype=wide, device=like.device)
        if choice.sides is None or choice.sides.dtype != wide:
            sides = torch.stack((choice.selected, ~choice.selected)).to(wide)
            choice.sides = sides if scale is None else sides * scale.to(wide)
        return choice.sides

    def scaled(self, grad: Tensor, images: Sequence[int], scale: Tensor | None) -> Tensor:
        """The rule on whole gradients `(n, C, *spatial)` of these images, out of place."""
        flat, factors = grad.flatten(2), []
        for row, i in enumerate(images):
            sides = self.sides_of(i, scale, grad, grad.shape[1])
            factors.append(self.factors(i, torch.mm(sides, flat[row].to(sides.dtype)), grad.shape[1]))
        return apply_pairs(grad, [self.choices[i] for i in images], factors)

    def of(self, image: int) -> LayerRule:
        """The rule for one image alone, which does its own counting."""
        return LayerRule((self.choices[image],), (self.gammas[image],), (self.conserve[image],))

    def prunes(self, image: int) -> bool:
        """Whether this image may need the selected channels' gradient alone."""
        choice = self.choices[image]
        return choice is not None and choice.both_sides and self.gammas[image] == math.inf


def apply_pairs(
    grad: Tensor, choices: Sequence[Choice | None], factors: Sequence[tuple[float, float] | None]
) -> Tensor:
    """Each channel of each image `(B, C, *spatial)` times its side's factor, out of place."""
    if all(pair is None for pair in factors):
        return grad
    ones = torch.ones(grad.shape[1], dtype=torch.float64, device=grad.device)
    each = [
        ones if choice is None or pair is None else per_channel(choice.selected, pair)
        for choice, pair in zip(choices, factors, strict=True)
    ]
    wide = torch.promote_types(grad.dtype, torch.float32)
    shape = (len(grad), -1) + (1,) * (grad.dim() - 2)
    return (grad * torch.stack(each).to(wide).reshape(shape)).to(grad.dtype)


def per_channel(selected: Tensor, pair: tuple[float, float]) -> Tensor:
    """The factor of each channel, float64 in the shape of `selected`."""
    inside, outside = torch.tensor(pair, dtype=torch.float64, device=selected.device)
    return torch.where(selected, inside, outside)
