"""Noisy linear imputation: missing pixels from those around them (Rong et al. 2022, ROAD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu
from torch import Tensor

from parchgrad.errors import OptionError

# The eight neighbours and their weights: beside, above and below 1/6, on the diagonals 1/12.
NEIGHBOURS = tuple(
    (dy, dx, 1 / 12 if dy and dx else 1 / 6) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
)
_OUTSIDE, _KNOWN = -2, -1


def impute(image: NDArray[np.float64], missing: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`image` `(channels, h, w)` with each pixel of `missing` `(h, w)` the weighted mean of its neighbours.

    Neighbours that are missing too are unknowns of the same linear system, solved exactly for all channels at once;
    those outside the image do not count. What is known stays as it is; what `image` holds at missing pixels is not
    read. Raises OptionError if every pixel is missing: there is nothing to impute from.
    """
    count = int(missing.sum())
    filled = image.copy()
    if count == 0:
        return filled
    if count == missing.size:
        raise OptionError("missing", f"{count} of {missing.size} pixels", "fewer than all of the image's pixels")
    matrix, known = _system(missing)
    right = known @ image.reshape(len(image), -1).T
    # Symmetric and diagonally dominant: no pivoting is needed, and an order of a symmetric pattern fills in less.
    # What `spsolve` does, with less fill-in where much is missing.
    factors = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    filled[:, missing] = factors.solve(right).T
    return filled


def imputed(
    image: Tensor, order: NDArray[np.int64], counts: Sequence[int], *, noise: float = 0.01, seed: int = 0
) -> Iterator[Tensor]:
    """`image` `(3, h, w)` with its first `count` pixels in `order` `(h * w,)` imputed, for each of `counts`.

    To each imputed value comes normal noise of standard deviation `noise`, in the image's units: without it a network
    could tell from the smoothness where pixels were taken. It is drawn from `seed` for each image alike, so that a
    result does not depend on the images beside it.
    """
    generator = np.random.default_rng(seed)
    values = image.detach().cpu().double().numpy()
    for count in counts:
        missing = np.zeros(values.shape[1:], bool)
        missing.flat[order[:count]] = True
        filled = impute(values, missing)
        filled[:, missing] += noise * generator.standard_normal((len(values), count))
        yield torch.from_numpy(filled).to(image)


def _system(missing: NDArray[np.bool_]) -> tuple[csc_matrix, csc_matrix]:
    """`A` `(n, n)` and `K` `(n, h * w)` with `A @ unknown = K @ image`, the unknowns in row-major order."""
    count = int(missing.sum())
    index = np.full(np.add(missing.shape, 2), _OUTSIDE)
    inner = index[1:-1, 1:-1]
    inner[:] = _KNOWN
    inner[missing] = np.arange(count)
    y, x = np.nonzero(missing)
    numbers = np.arange(count)
    diagonal = np.zeros(count)
    unknown: list[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]] = []
    given: list[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]] = []
    for dy, dx, weight in NEIGHBOURS:
        neighbour = index[y + 1 + dy, x + 1 + dx]
        diagonal += weight * (neighbour != _OUTSIDE)
        rows = numbers[neighbour >= 0]
        unknown.append((np.full(len(rows), -weight), rows, neighbour[rows]))
        rows = numbers[neighbour == _KNOWN]
        given.append((np.full(len(rows), weight), rows, (y[rows] + dy) * missing.shape[1] + x[rows] + dx))
    unknown.append((diagonal, numbers, numbers))
    return _matrix(unknown, (count, count)), _matrix(given, (count, missing.size))


def _matrix(
    entries: Sequence[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]], shape: tuple[int, int]
) -> csc_matrix:
    values, rows, columns = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return csc_matrix((values, (rows, columns)), shape=shape)
