"""Where classes lie: similarity by their selected channels, and two dimensions of it. Arrays only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def similarity(layers: Iterable[Array]) -> Array:
    """Of classes `(K, K)`, from the strengths `(K, channels)` of each layer, 0 for channels that are not selected.

    The mean over layers of the cosine between two classes' strengths: 1 for the same channels in the same strength, 0
    for none in common. A layer in which a class has no channel counts as 0.
    """
    total, count = np.zeros(()), 0
    for strength in layers:
        length = np.linalg.norm(strength, axis=1, keepdims=True)
        unit = np.divide(strength, length, out=np.zeros_like(strength), where=length > 0)
        total = total + unit @ unit.T
        count += 1
    return np.asarray(total / max(count, 1))


def positions(similar: Array) -> Array:
    """`(K, 2)` in [-1, 1]: classical multidimensional scaling (Torgerson 1952) of `sqrt(2 - 2 similarity)`.

    As the similarity is a mean of cosines, that is a Euclidean distance, of unit vectors, and the result their two
    principal components. Both axes have one scale; each axis's largest coordinate is positive, so that the same
    classes always lie the same way.
    """
    classes = len(similar)
    squared = np.maximum(np.diag(similar)[:, None] + np.diag(similar)[None, :] - 2 * similar, 0)
    centred = squared - squared.mean(0) - squared.mean(1, keepdims=True) + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    placed = np.zeros((classes, 2))
    for axis, component in enumerate(range(classes - 1, max(classes - 3, -1), -1)):
        # Rounding leaves an empty dimension a value that is hardly above 0, or below.
        if values[component] > 1e-9 * max(values[-1], 0.0):
            vector = vectors[:, component]
            placed[:, axis] = vector * np.sign(vector[np.abs(vector).argmax()]) * np.sqrt(values[component])
    return placed / (np.abs(placed).max() or 1.0)
