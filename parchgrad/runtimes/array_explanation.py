"""Predictions and attributions as numpy arrays: `explainer.Explanation` where there is no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import OptionError
from parchgrad.options import REDUCTIONS, Options


@dataclass(frozen=True)
class ArrayExplanation:
    """Predictions and attributions of `B` images."""

    logits: NDArray[np.float32]  # (B, K)
    targets: NDArray[np.int64]  # (B,): the class explained
    attributions: NDArray[np.float32]  # (B, 3, h, w), signed
    identity_layers: NDArray[np.int64]  # (B,): layers of the rule whose gradient passed unchanged (the worst point)
    layers_used: NDArray[np.int64]  # (B,): layers the rule acts on
    covered: NDArray[np.bool_]  # (B,): False where the target has no row in the table; its attribution is NaN
    completeness_gap: NDArray[np.float32]  # (B,): sum of attribution minus score difference; NaN but for plain IG
    complete: NDArray[np.bool_]  # (B,): False where `wanted` ended it before its last point; its attribution is NaN
    options: tuple[Options, ...]

    def probabilities(self) -> NDArray[np.float32]:
        """Softmax of the logits, `(B, K)`."""
        return softmax(self.logits)

    def saliency(self, reduction: str = "mean_abs") -> NDArray[np.float32]:
        """Saliency maps `(B, h, w)`, non-negative but for `sum`.

        `mean_abs`: mean over colours of |a|; `max_abs`: their maximum; `sum`: signed sum;
        `positive` / `negative`: the positive / negative part of the signed sum, as a magnitude.
        """
        a = self.attributions
        if reduction == "mean_abs":
            found = np.abs(a).mean(axis=1)
        elif reduction == "max_abs":
            found = np.abs(a).max(axis=1)
        elif reduction == "sum":
            found = a.sum(axis=1)
        elif reduction == "positive":
            found = np.maximum(a.sum(axis=1), 0)
        elif reduction == "negative":
            found = np.maximum(-a.sum(axis=1), 0)
        else:
            raise OptionError("reduction", reduction, ", ".join(REDUCTIONS))
        return np.asarray(found, dtype=np.float32)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities `(B, K)` of logits `(B, K)`."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)
