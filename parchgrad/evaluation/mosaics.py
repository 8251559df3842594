"""Mosaics: four images of different classes in one picture, so that a map has a right and a wrong place.

The grid pointing game of Bohle, Fritz, Schiele 2021, with a 2 x 2 grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def four(images: Tensor | Sequence[Tensor]) -> Tensor:
    """`(4, 3, h, w)` -> `(3, 2h, 2w)`: top left, top right, bottom left, bottom right."""
    a, b, c, d = images
    return torch.cat((torch.cat((a, b), dim=2), torch.cat((c, d), dim=2)), dim=1)


def quarter_mask(height: int, width: int, quarter: int) -> NDArray[np.bool_]:
    """The place of one of the four, bool `(2 * height, 2 * width)`; `height` and `width` of one image."""
    row, column = divmod(quarter, 2)
    mask = np.zeros((2 * height, 2 * width), bool)
    mask[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return mask


def draw(
    rows: NDArray[np.int64], count: int, seed: int, *, spread: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the images of `count` mosaics from images whose classes are `rows` `(n,)`.

    Returns image indices `(count, 4)`, four different classes each, and which of the four is the target,
    `(count,)`, taken in turn so that every place is tested equally often. With `spread`, no image of a class is in a
    second mosaic before all of them are in one; otherwise each is drawn whether or not it was before.
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(rows)
    if len(classes) < 4:
        raise ValueError(f"mosaics need images of at least 4 classes, got {len(classes)}")
    left: dict[int, list[int]] = {}

    def member(target: int) -> int:
        members = np.flatnonzero(rows == target)
        if not spread:
            return int(generator.choice(members))
        if not left.get(target):
            left[target] = generator.permutation(members).tolist()
        return left[target].pop()

    chosen = [[member(c) for c in generator.choice(classes, 4, replace=False)] for _ in range(count)]
    return np.array(chosen), np.arange(count) % 4
