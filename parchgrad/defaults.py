"""What an explanation takes where its caller leaves it out, and which values its rule may have; no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parchgrad.quantiles import Quantile

CONSERVE = ("independent", "exact", "none")
SELECTIONS = ("class", "instance")

# The largest finite gamma an explanation takes: the unselected side then counts for a millionth, and unconserved
# factors, a product over the layers, overflow. The rule's formulas have no such bound.
MAX_GAMMA = 1e6


def is_gamma(value: float) -> bool:
    """Whether an explanation takes this gamma: a number in [0, MAX_GAMMA], or infinity."""
    return 0 <= value <= MAX_GAMMA or value == math.inf


@dataclass(frozen=True)
class Defaults:
    """The options an explanation takes where the caller leaves them out."""

    quantile: Quantile = 0.1
    gamma: float = math.inf
    conserve: str = "independent"
    selection: str = "class"
    layers: tuple[str, ...] = ("*",)
    normality_filter: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gamma": "inf" if math.isinf(self.gamma) else self.gamma, "layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Defaults:
        return cls(**{**data, "gamma": float(data["gamma"]), "layers": tuple(data["layers"])})
