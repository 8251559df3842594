"""The share of a layer's channels to select: one for all layers or by pattern, and how many channels it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from parchgrad.errors import OptionError
from parchgrad.patterns import match

Quantile = float | Mapping[str, float]


def channels_of_quantile(quantile: float, channels: int) -> int:
    """`k = max(1, floor(q * channels))`.

    The product is taken a millionth larger: 0.29 of 100 channels is 29, though the floats' product is
    28.999999999999996, and a quantile that came as float32 selects what the same decimal does as float64.
    """
    return max(1, min(channels, math.floor(quantile * channels * (1 + 1e-6))))


def quantile_of_layers(quantile: Quantile, names: Sequence[str]) -> dict[str, float]:
    """Each layer's quantile: one number for all, or by glob pattern, the first that fits deciding.

    Raises OptionError for a pattern that fits no layer and for a layer that fits no pattern.
    """
    if not isinstance(quantile, Mapping):
        return dict.fromkeys(names, float(quantile))
    chosen: dict[str, float] = {}
    for pattern, value in quantile.items():
        for name in match(names, [pattern], option="quantile"):
            chosen.setdefault(name, float(value))
    for name in names:
        if name not in chosen:
            raise OptionError("quantile", dict(quantile), f"a value for every layer; '{name}' has none")
    return chosen
