"""Metrics of one saliency map, knowing neither model nor method. Maps are non-negative `(h, w)` arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def mass_share(saliency: ArrayLike, mask: ArrayLike) -> float:
    """Share of the map's mass inside `mask`, bool `(h, w)`; NaN for a map without mass.

    The inside-total relevance ratio of Arras, Osman, Samek 2022 ("relevance mass accuracy"). A map of
    random numbers scores the mask's share of the area.
    """
    values = np.asarray(saliency, np.float64)
    total = values.sum()
    return float(values[np.asarray(mask, bool)].sum() / total) if total > 0 else float("nan")


def pointing_hit(saliency: ArrayLike, mask: ArrayLike) -> float:
    """1 if the map's maximum lies in `mask`, else 0; ties count by their share (Zhang et al. 2018).

    NaN for a map without mass.
    """
    values = np.asarray(saliency, np.float64)
    if not values.max() > 0:
        return float("nan")
    return float(np.asarray(mask, bool)[values == values.max()].mean())


def gini(saliency: ArrayLike) -> float:
    """Gini index of the map's values: 0 = spread evenly, near 1 = on few pixels (Chalasani et al. 2020).

    NaN for a map without mass.
    """
    values = np.sort(np.abs(np.asarray(saliency, np.float64)), axis=None)
    total = values.sum()
    if not total > 0:
        return float("nan")
    n = len(values)
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float((weights * values).sum() / (n * total))
