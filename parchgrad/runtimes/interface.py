"""What an engine in PyTorch is asked and answers: plans, points and gradients, the interface `Runtime`, its witness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from parchgrad.rule import Factors


@dataclass(frozen=True)
class Plan:
    """What the engine does to each image's backward pass: `B` images, `L` layers of the table.

    All fields are CPU tensors with the image axis first.
    """

    active: Tensor  # (B, L) bool: the rule acts on this layer
    count: Tensor  # (B, L) long: channels to select, from the quantile
    log_alpha: Tensor  # (B,) float64: select by p <= alpha instead; NaN = by count
    gamma: Tensor  # (B,) float64
    conserve: Tensor  # (B,) long: index into rule.CONSERVE
    instance: Tensor  # (B,) bool: instance-wise selection, otherwise class-wise
    normality_filter: Tensor  # (B,) bool
    guided: Tensor  # (B,) bool: clamp the gradient at every ReLU (guided backpropagation)
    probability_weighted: Tensor  # (B,) bool: differentiate probability x logit instead of the logit
    evidence: Tensor  # (B,) bool: weigh the gradient at the network's last map by the evidence there

    def __len__(self) -> int:
        return len(self.gamma)

    def take(self, images: Tensor) -> Plan:
        """The plan of the images at these indices, `(n,)` long; an image may come several times."""
        return Plan(**{field.name: getattr(self, field.name)[images] for field in fields(self)})


@dataclass(frozen=True)
class Gradients:
    """What one backward pass gives, on the engine's device."""

    logits: Tensor  # (B, K)
    targets: Tensor  # (B,) long, predicted classes filled in
    gradients: Tensor  # (B, 3, h, w): of the seed with respect to the images, under the rule
    identity_layers: Tensor  # (B,) long: active layers whose gradient passed unchanged


@dataclass(frozen=True)
class AtLastMap:
    """A network's last map (docs/evidence.md) and the gradient there, on the engine's device."""

    logits: Tensor  # (B, K)
    targets: Tensor  # (B,) long, predicted classes filled in
    values: Tensor  # (B, C, h, w)
    gradients: Tensor  # (B, C, h, w): of the seed with respect to the values; no rule acts


@dataclass(frozen=True)
class Points:
    """Points of several images, `N` of them, at which gradients are taken to be summed image by image."""

    images: Tensor  # (N, 3, h, w): the points
    rows: Sequence[int]  # which image each is of, rising
    weights: Sequence[float]
    fractions: Sequence[float | None]  # how far it is from its image's start to its end; None: not on that line
    starts: Tensor  # (B, 3, h, w): of all images of the explanation
    ends: Tensor  # (B, 3, h, w)
    kept: dict[str, Any] = field(default_factory=dict)  # the runtime's own, from pass to pass of one explanation

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: Sequence[int]) -> Points:
        """These of the points, in rising order."""
        rows, weights, fractions = ([column[i] for i in which] for column in (self.rows, self.weights, self.fractions))
        images = self.images[torch.tensor(which, device=self.images.device)]
        return Points(images, rows, weights, fractions, self.starts, self.ends, self.kept)  # type: ignore[arg-type]


# Told of one call of a layer on the way back: the gradient that arrives at its output, `(B, C, *spatial)`, and, where
# the rule acts there, the channels selected, `(B, C)` bool, and what they are multiplied by. None of it may be changed.
Tell = Callable[[Tensor, "Tensor | None", "Factors | None"], None]


class Witness(Protocol):
    """Whoever wants to see what a pass does in the layers of the table. One pass has one; none is shared by threads."""

    def ran(self, name: str, output: Tensor) -> Tell:
        """Layer `name` returns `output` `(B, C, *spatial)`, which the network may overwrite later: copy it."""
        ...


class Runtime(Protocol):
    """An engine bound to one model and one table. Thread safe."""

    @property
    def layer_names(self) -> tuple[str, ...]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the images."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Logits `(B, K)` of normalised images `(B, 3, h, w)`; nothing is kept for a gradient."""
        ...

    def sums(self, points: Points, targets: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """The gradients times their points' weights, summed over each image, of one pass.

        Returns the sums `(R, 3, h, w)` of the R images that have points here, by rising row, and how many active layers
        each point's gradient passed unchanged, `(N,)` long.
        """
        ...

    def gradients(self, images: Tensor, targets: Tensor, plan: Plan) -> Gradients:
        """One forward and one backward pass; a target of -1 means the predicted class.

        An image whose target has no row in the table passes unchanged through class-wise layers; what that
        means is for the caller to decide.
        """
        ...

    def at_last_map(self, images: Tensor, targets: Tensor, probability_weighted: Tensor) -> AtLastMap:
        """One forward pass, and back to the last map only; a target of -1 means the predicted class.

        `probability_weighted` `(B,)` bool, as in a plan. Raises OptionError where the network has no last map.
        """
        ...
