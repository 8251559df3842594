"""Curves of a network's score while pixels are taken away or given back in the order of a saliency map.

What all of them share: an order is by the map's values, signed maps included, and ties go by index (`pixel_order`).
A map that is the same everywhere, zero or not, or that holds a value that is not finite orders nothing: its scores
are NaN, and so is all that follows from them, and no picture of it goes through the network. The scores of a random
map depend on the network and the substrate: measure them beside; for a difference of two orders (`gap`) they are 0
on average. Several maps are compared on the same pictures, steps, substrate and score, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from parchgrad.errors import OptionError
from parchgrad.evaluation.imputation import imputed

Predict = Callable[[Tensor], Tensor]  # images (b, 3, h, w) -> logits (b, classes)
Substrate = Callable[[Tensor], Tensor]  # images (b, 3, h, w) -> what stands where they were taken away
Score = Callable[[Tensor, Tensor], Tensor]  # logits (b, classes), targets (b,) -> scores (b,)

TENTHS = tuple(i / 10 for i in range(11))
# A row of a picture of 224 x 224: RISE's step.
STEP = 224


@dataclass(frozen=True)
class Curve:
    """Scores `(B, n)` of B images at `fractions` `(n,)` of their pixels, ascending: those replaced, or given back."""

    fractions: NDArray[np.float64]
    scores: NDArray[np.float64]

    def area(self) -> NDArray[np.float64]:
        """Under each image's curve, `(B,)`, by the trapezium rule; not divided by the fractions' range."""
        means = (self.scores[:, 1:] + self.scores[:, :-1]) / 2
        return np.asarray((means * np.diff(self.fractions)).sum(axis=1))


def zeros(images: Tensor) -> Tensor:
    """The substrate 0: of normalised images, the mean colour."""
    return torch.zeros_like(images)


def blurred(images: Tensor) -> Tensor:
    """The substrate of RISE's insertion: a blur of 11 x 11 pixels, sigma 5.

    As in the authors' code: the kernel is a point filtered within its 11 x 11, whose tails are mirrored back into it
    (so it is flatter than a Gaussian cut off, and sums to 1), and outside the image is 0, the mean colour.
    """
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(point, 5)).to(images)
    channels = images.shape[1]
    return F.conv2d(images, kernel.expand(channels, 1, 11, 11), padding=5, groups=channels)


def probability(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's softmax probability, `(b,)`, 0..1."""
    return logits.double().softmax(dim=1).gather(1, targets[:, None])[:, 0]


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """`log(p / (1 - p))` of the target's probability p, `(b,)`: its logit minus the log-sum-exp of the others.

    With two classes the score of Shrikumar et al. 2017, the difference of their logits. It does not saturate as the
    probability does. Infinite where there is no other class.
    """
    wide = logits.double()
    others = wide.scatter(1, targets[:, None], -math.inf)
    return wide.gather(1, targets[:, None])[:, 0] - others.logsumexp(dim=1)


def insertion(
    predict: Predict,
    images: Tensor,
    saliency: Tensor | ArrayLike,
    targets: Sequence[int],
    *,
    step: int = STEP,
    substrate: Substrate = blurred,
    score: Score = probability,
    batch_size: int = 32,
) -> Curve:
    """Give pixels back to the substrate, most relevant first, `step` at a time (Petsiuk et al. 2018, RISE).

    images: `(B, 3, h, w)`, normalised.  saliency: `(B, h, w)`.  The last step is shorter where `step` does not divide
    h * w. `area()` is the insertion AUC, the larger the better; of a probability 0..1. NaN: see the file's head.
    """
    counts = steps(images.shape[2] * images.shape[3], step)

    def pictures(image: Tensor, order: NDArray[np.int64]) -> Iterator[Tensor]:
        return perturbed(substrate(image[None])[0], image, order, counts)

    orders = pixel_order(saliency)
    return _curve(predict, images, saliency, targets, orders, counts, pictures, score=score, batch_size=batch_size)


def deletion(
    predict: Predict,
    images: Tensor,
    saliency: Tensor | ArrayLike,
    targets: Sequence[int],
    *,
    step: int = STEP,
    substrate: Substrate = zeros,
    score: Score = probability,
    batch_size: int = 32,
) -> Curve:
    """Replace pixels by the substrate's, most relevant first, `step` at a time (Petsiuk et al. 2018, RISE).

    `area()` is the deletion AUC, the smaller the better; of a probability 0..1. The rest as for `insertion`.
    """
    counts = steps(images.shape[2] * images.shape[3], step)

    def pictures(image: Tensor, order: NDArray[np.int64]) -> Iterator[Tensor]:
        return perturbed(image, substrate(image[None])[0], order, counts)

    orders = pixel_order(saliency)
    return _curve(predict, images, saliency, targets, orders, counts, pictures, score=score, batch_size=batch_size)


def removal(
    predict: Predict,
    images: Tensor,
    saliency: Tensor | ArrayLike,
    targets: Sequence[int],
    *,
    least_first: bool = False,
    fractions: Sequence[float] | None = TENTHS,
    patch: int = 1,
    substrate: Substrate = zeros,
    score: Score = probability,
    batch_size: int = 32,
) -> Curve:
    """Replace patches by the substrate's, most relevant first (MoRF) or `least_first` (LeRF) (Samek et al. 2017).

    patch: side of a patch in pixels; it divides h and w.  fractions: of the patches, 0..1 and ascending, each
    rounded down to whole patches; None is a curve with every patch a step. The paper's own are 100 patches of 9 x 9
    with random colours for a substrate. `aopc` is what a curve comes to, `gap` what MoRF and LeRF do together.
    images, saliency and NaN as for `insertion`.
    """
    orders = pixel_order(saliency, patch=patch, least_first=least_first)
    size = patch * patch
    patches = images.shape[2] * images.shape[3] // size
    counts = [size * n for n in (range(patches + 1) if fractions is None else counts_of(fractions, patches))]

    def pictures(image: Tensor, order: NDArray[np.int64]) -> Iterator[Tensor]:
        return perturbed(image, substrate(image[None])[0], order, counts)

    return _curve(predict, images, saliency, targets, orders, counts, pictures, score=score, batch_size=batch_size)


def road(
    predict: Predict,
    images: Tensor,
    saliency: Tensor | ArrayLike,
    targets: Sequence[int],
    *,
    least_first: bool = False,
    fractions: Sequence[float] = TENTHS[1:-1],
    noise: float = 0.01,
    seed: int = 0,
    score: Score = probability,
    batch_size: int = 32,
) -> Curve:
    """Impute pixels from their neighbours, most relevant first or `least_first` (Rong et al. 2022, ROAD).

    fractions: of the pixels, below 1 and ascending, each rounded down to whole pixels.  noise: standard deviation, in
    the images' units, drawn from `seed` (`imputed`).  The paper scores whether the class is still found, over many
    images; this scores each image. `gap` of the two orders is twice pytorch-grad-cam's `ROADCombined`, which halves
    it. images, saliency and NaN as for `insertion`.
    """
    if not all(0 <= fraction < 1 for fraction in fractions):
        raise OptionError("fractions", fractions, "numbers from 0 to below 1: something must be left to impute from")
    if not (noise >= 0 and math.isfinite(noise)):
        raise OptionError("noise", noise, "a finite number, at least 0")
    orders = pixel_order(saliency, least_first=least_first)
    counts = counts_of(fractions, images.shape[2] * images.shape[3])

    def pictures(image: Tensor, order: NDArray[np.int64]) -> Iterator[Tensor]:
        return imputed(image, order, counts, noise=noise, seed=seed)

    return _curve(predict, images, saliency, targets, orders, counts, pictures, score=score, batch_size=batch_size)


def aopc(curve: Curve) -> NDArray[np.float64]:
    """Area over the perturbation curve, `(B,)`: the mean over all steps, the untouched image among them, of its score
    minus the step's (Samek et al. 2017). For MoRF the larger the better, for LeRF the smaller.

    Raises OptionError for a curve that does not begin with the untouched image.
    """
    if not curve.fractions[0] == 0:
        raise OptionError("fractions", curve.fractions.tolist(), "a curve that begins at 0")
    return np.asarray((curve.scores[:, :1] - curve.scores).mean(axis=1))


def gap(morf: Curve, lerf: Curve) -> NDArray[np.float64]:
    """How far least-first lies above most-first, `(B,)`: the mean over the steps; the larger the better.

    A random map has 0 on average; of probabilities it is within -1..1. Raises OptionError for curves of other steps.
    """
    if not np.array_equal(morf.fractions, lerf.fractions):
        raise OptionError("fractions", lerf.fractions.tolist(), f"those of the other curve, {morf.fractions.tolist()}")
    return np.asarray((lerf.scores - morf.scores).mean(axis=1))


def ordered(saliency: Tensor | ArrayLike) -> NDArray[np.bool_]:
    """Which maps of `(B, h, w)` order anything, `(B,)`: all values finite, and not all of them the same."""
    maps = _maps(saliency)
    flat = maps.reshape(len(maps), -1)
    return np.asarray(np.isfinite(flat).all(axis=1) & (flat != flat[:, :1]).any(axis=1))


def pixel_order(saliency: Tensor | ArrayLike, *, patch: int = 1, least_first: bool = False) -> NDArray[np.int64]:
    """Flat indices of each map's pixels, `(B, h * w)`, most relevant first or `least_first`.

    By value; of equal values the lower index first, in both orders, so that neither gains from where a map is flat.
    With `patch` the map is cut into squares of that side, ordered by their sums, and the pixels of one follow each
    other. Raises OptionError where `patch` does not divide h and w: a cut patch would have a smaller sum.
    """
    maps = _maps(saliency)
    count, height, width = maps.shape
    if patch < 1 or height % patch or width % patch:
        raise OptionError("patch", patch, f"a divisor of the map's sides, {height} and {width}")
    shape = (height // patch, patch, width // patch, patch)
    with np.errstate(invalid="ignore"):  # Infinities of both signs: `ordered` leaves such a map out.
        values = maps.reshape(count, *shape).sum(axis=(2, 4)).reshape(count, -1)
    members = np.arange(height * width).reshape(shape).transpose(0, 2, 1, 3).reshape(-1, patch * patch)
    order = np.argsort(values if least_first else -values, axis=1, kind="stable")
    return members[order].reshape(count, -1)


def steps(pixels: int, step: int) -> list[int]:
    """0, `step`, twice `step` ... `pixels`: the last step is shorter where `step` does not divide."""
    if step < 1:
        raise OptionError("step", step, "a number of pixels, at least 1")
    return [*range(0, pixels, step), pixels]


def counts_of(fractions: Sequence[float], units: int) -> list[int]:
    """Whole numbers of `units`, each fraction rounded down."""
    if not fractions or not all(0 <= f <= 1 for f in fractions) or list(fractions) != sorted(fractions):
        raise OptionError("fractions", fractions, "ascending numbers from 0 to 1")
    # 0.29 * 100 is a little below 29.
    return [math.floor(fraction * units + 1e-6) for fraction in fractions]


def perturbed(start: Tensor, end: Tensor, order: NDArray[np.int64], counts: Sequence[int]) -> Iterator[Tensor]:
    """Picture `start` `(3, h, w)` with its first `count` pixels in `order` those of `end`, for each of `counts`.

    `counts` ascend. One picture at a time is made, from the one before.
    """
    flat, source = start.detach().flatten(1).clone(), end.detach().flatten(1)
    places = torch.from_numpy(order).to(flat.device)
    done = 0
    for count in counts:
        part = places[done:count]
        flat[:, part] = source[:, part]
        done = count
        yield flat.clone().reshape(start.shape)


def scores_of(
    predict: Predict,
    pictures: Iterable[tuple[Tensor, int]],
    *,
    score: Score = probability,
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """Scores `(n,)` of pictures `(3, h, w)` with their targets, `batch_size` at once through the network."""
    if batch_size < 1:
        raise OptionError("batch_size", batch_size, "a number of pictures, at least 1")
    rest = iter(pictures)
    found = []
    while batch := list(islice(rest, batch_size)):
        logits = predict(torch.stack([picture for picture, _ in batch])).detach()
        targets = torch.tensor([target for _, target in batch], device=logits.device)
        found.append(score(logits, targets).double().cpu().numpy())
    return np.concatenate(found) if found else np.empty(0)


def _curve(
    predict: Predict,
    images: Tensor,
    saliency: Tensor | ArrayLike,
    targets: Sequence[int],
    orders: NDArray[np.int64],
    counts: Sequence[int],
    pictures: Callable[[Tensor, NDArray[np.int64]], Iterator[Tensor]],
    *,
    score: Score,
    batch_size: int,
) -> Curve:
    """Score what `pictures` makes of each image and its order, one per count; NaN for maps that order nothing."""
    shape = (len(images), *images.shape[2:])
    if _maps(saliency).shape != shape:
        raise OptionError("saliency", f"maps {_maps(saliency).shape}", f"maps of the images' shape, {shape}")
    if len(targets) != len(images):
        raise OptionError("targets", targets, f"one for each of {len(images)} images")
    there = ordered(saliency)
    stream = (
        (picture, targets[row])
        for row in np.flatnonzero(there).tolist()
        for picture in pictures(images[row], orders[row])
    )
    scores = np.full((len(images), len(counts)), np.nan)
    scores[there] = scores_of(predict, stream, score=score, batch_size=batch_size).reshape(-1, len(counts))
    return Curve(np.array(counts) / (shape[1] * shape[2]), scores)


def _maps(saliency: Tensor | ArrayLike) -> NDArray[np.float64]:
    values = saliency.detach().cpu().double().numpy() if isinstance(saliency, Tensor) else saliency
    maps = np.asarray(values, np.float64)
    if maps.ndim != 3:
        raise OptionError("saliency", f"an array of shape {maps.shape}", "maps of shape (B, h, w)")
    return maps
