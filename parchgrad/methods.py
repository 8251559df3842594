"""Methods that average gradients over several points: where those points lie and how they are weighted.

`gradient`, `input_x_gradient` and `guided_backprop` need one backward pass at the image itself, `grad_cam` one to the
last map (parchgrad/grad_cam.py); integrated gradients and SmoothGrad need many, described here as the weighted points
of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parchgrad.options import Options

if TYPE_CHECKING:
    from torch import Tensor

MANY_POINTS = ("integrated_gradients", "smoothgrad")

# Of the points of integrated gradients and SmoothGrad computed in one pass: 16 points of 224 x 224.
PIXELS_PER_PASS = 16 * 224 * 224


class Point(NamedTuple):
    """Where a gradient is taken, and what it counts."""

    image: Tensor  # (3, h, w)
    weight: float
    fraction: float | None = None  # how far it is from the baseline to the image; None: not on that line


def number_of_points(options: Options) -> int:
    """How many points `points` gives."""
    return options.steps if options.method == "integrated_gradients" else options.samples


def points(image: Tensor, options: Options, baseline: Tensor) -> Iterator[Point]:
    """The points at which the gradient of `image` `(3, h, w)` is taken; their weights sum to 1."""
    if options.method == "integrated_gradients":
        return straight_path(image, baseline, options.steps)
    return noisy_copies(image, options.samples, options.noise, options.noise_seed)


def straight_path(image: Tensor, baseline: Tensor, steps: int) -> Iterator[Point]:
    """Integrated gradients (Sundararajan et al. 2017): from `baseline` to `image`, Gauss-Legendre nodes."""
    for fraction, weight in straight_nodes(steps):
        yield Point(baseline + fraction * (image - baseline), weight, fraction)


def straight_nodes(steps: int) -> list[tuple[float, float]]:
    """How far each point of the path is from the baseline to the image, and its weight; the weights sum to 1.

    With `steps` Gauss-Legendre nodes the quadrature is exact for polynomials up to degree `2 * steps - 1`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def noisy_copies(image: Tensor, samples: int, noise: float, seed: int) -> Iterator[Point]:
    """SmoothGrad (Smilkov et al. 2017): normal noise with sd `noise * (max - min)` of the image.

    The noise is `torch.randn` of the image's shape in float32 from a CPU generator with `seed`, drawn
    `samples` times in turn: the same for an image whatever its batch-mates, dtype and device.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    sd = noise * (image.max() - image.min())
    for _ in range(samples):
        drawn = torch.randn(image.shape, generator=generator, dtype=torch.float32)
        yield Point(image + sd * drawn.to(image), 1 / samples)
