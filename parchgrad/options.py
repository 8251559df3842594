"""The options of an explanation: one frozen, validated set for each image."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from parchgrad.defaults import CONSERVE, SELECTIONS, Defaults, is_gamma
from parchgrad.errors import OptionError
from parchgrad.quantiles import Quantile

METHODS = ("gradient", "input_x_gradient", "integrated_gradients", "smoothgrad", "guided_backprop", "grad_cam")
# Methods that take no gradient back to the image, where the rule could act on it: their `rule` is False.
WITHOUT_RULE = ("grad_cam",)
SEEDS = ("logit", "probability_weighted_logit", "evidence")

# How a map is made of an attribution: `Explanation.saliency`.
REDUCTIONS = ("mean_abs", "sum", "max_abs", "positive", "negative")

MAX_STEPS = 1000


@dataclass(frozen=True)
class Options:
    """How one image is explained. Raises OptionError, naming option, value and what is allowed.

    method: one of METHODS.  rule: False switches ParchGrad off, leaving the plain method; of the methods WITHOUT_RULE
    it is False, whatever was given.
    quantile: share of a layer's channels to select, in (0, 1]; a number, or by layer glob pattern.
    alpha: select by p-value instead of quantile, in (0, 1]; None = by quantile.
    gamma: sd of the selected side's sum in units of the unselected side's; in [0, 1e6], or infinity.
    conserve: `independent`, `exact` or `none`.  selection: `class` or `instance`.
    layers: glob patterns of the layers the rule acts on.  normality_filter: drop normal channels.
    seed: what is differentiated, the target's `logit` or its `probability_weighted_logit`; `evidence`: the logit, its
    gradient at the network's last map weighed by where the evidence is (docs/evidence.md), which is none of grad_cam's.
    steps: points of integrated gradients.  samples, noise, noise_seed: SmoothGrad's noisy copies, their
    sd as a share of the image's value range, and the random seed.
    """

    method: str = "gradient"
    rule: bool = True
    quantile: Quantile = 0.1
    alpha: float | None = None
    gamma: float = math.inf
    conserve: str = "independent"
    selection: str = "class"
    layers: tuple[str, ...] = ("*",)
    normality_filter: bool = False
    seed: str = "logit"
    steps: int = 25
    samples: int = 25
    noise: float = 0.15
    noise_seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("conserve", self.conserve, CONSERVE)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("seed", self.seed, SEEDS)
        values = self.quantile.values() if isinstance(self.quantile, Mapping) else (self.quantile,)
        for value in values:
            _number("quantile", value, lambda v: 0 < v <= 1, "a number in (0, 1]")
        if self.alpha is not None:
            _number("alpha", self.alpha, lambda v: 0 < v <= 1, "a number in (0, 1]")
        _number("gamma", self.gamma, is_gamma, "a number in [0, 1e6], or inf")
        _number("noise", self.noise, lambda v: 0 <= v <= 10, "a number in [0, 10]")
        _integer("steps", self.steps, 1, MAX_STEPS)
        _integer("samples", self.samples, 1, MAX_STEPS)
        _integer("noise_seed", self.noise_seed, 0, 2**63 - 1)
        for name in ("rule", "normality_filter"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(name, getattr(self, name), "true or false")
        if not self.layers or not all(isinstance(pattern, str) for pattern in self.layers):
            raise OptionError("layers", self.layers, "one or more layer names or glob patterns")
        if self.method in WITHOUT_RULE:
            object.__setattr__(self, "rule", False)  # so that nobody has to ask for both
            if self.seed == "evidence":
                others = ", ".join(seed for seed in SEEDS if seed != "evidence")
                raise OptionError("seed", self.seed, f"{others} with method {self.method}")


def per_image(batch: int, defaults: Defaults, given: Mapping[str, Any]) -> list[Options]:
    """One Options for each of `batch` images.

    Each entry of `given` is one value for all or a sequence of `batch` values; None takes the table's
    default. `layers` as a sequence of strings is one set of patterns for all images.
    """
    table_side = {name: getattr(defaults, name) for name in _TABLE_DEFAULTS}
    columns = {name: _column(name, value, batch) for name, value in given.items()}
    rows = []
    for i in range(batch):
        chosen = {name: column[i] for name, column in columns.items() if column[i] is not None}
        if "layers" in chosen:
            chosen["layers"] = _patterns(chosen["layers"])
        rows.append(Options(**{**table_side, **chosen}))
    return rows


_TABLE_DEFAULTS = ("quantile", "gamma", "conserve", "selection", "layers", "normality_filter")


def _column(name: str, given: Any, batch: int) -> Sequence[Any]:
    value: Any = given.tolist() if _is_array(given) else given
    single = not isinstance(value, Sequence) or isinstance(value, str)
    if single or (name == "layers" and all(isinstance(v, str) for v in value)):
        return [value] * batch
    if len(value) != batch:
        raise OptionError(name, value, f"one value, or one for each of the {batch} images")
    return list(value)


def _is_array(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def _patterns(layers: Any) -> tuple[Any, ...]:
    if isinstance(layers, str):
        return (layers,)
    if not isinstance(layers, Sequence):
        raise OptionError("layers", layers, "one or more layer names or glob patterns")
    return tuple(layers)


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(name, value, ", ".join(allowed))


def _number(name: str, value: object, holds: Callable[[float], bool], allowed: str) -> None:
    # NaN fails every comparison, so `holds` refuses it too.
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(float(value)):
        raise OptionError(name, value, allowed)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise OptionError(name, value, f"an integer in {low}..{high}")
