"""Activation drift: how far the channels a class is explained by are from where the table's images had them.

Arrays only; which features and ranks they are, the runtimes know. `N` channels of all layers side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parchgrad.defaults import Defaults
from parchgrad.patterns import match
from parchgrad.quantiles import channels_of_quantile, quantile_of_layers

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerDrift:
    """One layer of one image, over the channels selected for its class: `z = (gap - mean) / std`."""

    distance: float  # root mean square of z: 0 is the mean of the table's images, about 1 a usual image
    shift: float  # mean of z: below 0 where the class's channels are weaker than on the table's images
    z: Array = field(default_factory=lambda: np.empty(0), compare=False, repr=False)  # of each channel


def layer_drift(gap: ArrayLike, mean: ArrayLike, std: ArrayLike, chosen: ArrayLike) -> LayerDrift | None:
    """From GAP features, the table's means and standard deviations `(C,)` and bool `chosen` `(C,)`.

    A channel with std 0 says nothing and is left out; None where no chosen one is left.
    """
    spread = np.asarray(std, np.float64)
    counts = np.asarray(chosen, bool) & (spread > 0)
    if not counts.any():
        return None
    z = (np.asarray(gap, np.float64)[counts] - np.asarray(mean, np.float64)[counts]) / spread[counts]
    return LayerDrift(distance=float(np.sqrt(np.mean(z * z))), shift=float(z.mean()), z=z)


@dataclass(frozen=True)
class Reference:
    """A table's means and standard deviations, and which channels of a class they are compared in.

    Those are the channels that its defaults select: their quantile, in their layers. `channels` has every layer that
    the features have, in their order; `count` how many are chosen, for the layers of the defaults only.
    """

    channels: Mapping[str, int]
    count: Mapping[str, int]
    mean: Array  # (N,)
    std: Array  # (N,)
    selectable: NDArray[np.bool_] | None = None  # (N,); None: all are

    @classmethod
    def of(
        cls,
        channels: Mapping[str, int],
        defaults: Defaults,
        mean: ArrayLike,
        std: ArrayLike,
        normality_p: ArrayLike | None = None,
        level: float = 0.0,
    ) -> Reference:
        """`channels` of the table's layers. With `normality_p` `(N,)`, those of `level` and more are not selectable."""
        quantiles = quantile_of_layers(defaults.quantile, match(tuple(channels), defaults.layers))
        return cls(
            channels=dict(channels),
            count={name: channels_of_quantile(q, channels[name]) for name, q in quantiles.items()},
            mean=np.asarray(mean, np.float64),
            std=np.asarray(std, np.float64),
            selectable=None if normality_p is None else np.asarray(normality_p, np.float64) < level,
        )

    def drift(self, gap: ArrayLike, rank: ArrayLike) -> dict[str, LayerDrift]:
        """By layer, from an image's GAP features `(N,)` and its class's ranks `(N,)`, 0 the best of a layer."""
        features, chosen = np.asarray(gap), self.selected(rank)
        found: dict[str, LayerDrift] = {}
        for name, here in self.places().items():
            if name not in self.count:
                continue
            one = layer_drift(features[here], self.mean[here], self.std[here], chosen[here])
            if one is not None:
                found[name] = one
        return found

    def places(self) -> dict[str, slice]:
        """Layer -> where its channels lie among the N."""
        starts = np.cumsum([0, *self.channels.values()]).tolist()
        return {name: slice(a, b) for name, a, b in zip(self.channels, starts[:-1], starts[1:], strict=True)}

    def selected(self, rank: ArrayLike) -> NDArray[np.bool_]:
        """Bool `(N,)`: the channels of a class, from its ranks `(N,)`; none in a layer that the defaults leave out."""
        ranks = np.asarray(rank)
        chosen = np.zeros(len(ranks), bool)
        for name, here in self.places().items():
            chosen[here] = ranks[here] < self.count.get(name, 0)
        return chosen if self.selectable is None else chosen & self.selectable
