"""A picture before and after an attack, compared as the network sees them: predictions, maps and channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parchgrad.attacks.attack import Attack
from parchgrad.attacks.corruptions import Picture
from parchgrad.attacks.gradients import Attacker
from parchgrad.errors import UncoveredTargetError
from parchgrad.evaluation.maps import agreement, centroid, top_overlap
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing

Floats = NDArray[np.float64]

MOST_CHANNELS = 8


@dataclass(frozen=True)
class Movement:
    """How far a map moved from another of the same shape; NaN where a map says nothing."""

    agreement: float  # Spearman's rank correlation of the pixels, -1..1
    overlap: float  # of the largest tenth of the pixels, intersection over union, 0..1
    shift: float  # distance of the centres of mass, in shares of the diagonal, 0..1

    @classmethod
    def of(cls, before: Floats, after: Floats) -> Movement:
        height, width = before.shape
        (x, y), (u, v) = centroid(before), centroid(after)
        moved = math.hypot((u - x) * width, (v - y) * height) / math.hypot(width, height)
        return cls(agreement(before, after), top_overlap(before, after), moved)


@dataclass(frozen=True)
class ChannelChange:
    """One channel; `before` and `after` in standard deviations from the mean of the table's images."""

    channel: int
    before: float
    after: float
    of_old: bool  # selected for the class that was predicted
    of_new: bool  # selected for the class compared with it

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class LayerChange:
    """One layer: its most excited and most inhibited channels, strongest first; a change of 0 is in neither."""

    layer: str
    channels: int
    excited: tuple[ChannelChange, ...]
    inhibited: tuple[ChannelChange, ...]
    size: float  # root mean square of the change of all its channels
    of_old: float  # mean change of the channels selected for the old class alone; NaN where there are none
    of_new: float
    of_both: float


@dataclass(frozen=True)
class View:
    """What the network makes of one picture; arrays on the CPU."""

    logits: Floats  # (K,)
    probabilities: Floats  # (K,)
    maps: Mapping[int, Floats]  # of a class with a row in the table: (h, w)
    features: Floats  # (N,): GAP features, layers side by side

    @property
    def prediction(self) -> int:
        return int(self.logits.argmax())


@dataclass(frozen=True)
class Comparison:
    """A picture and what became of it. `old` is the class predicted of the first; `new` that of the second, or, where
    that is the same, the goal that was not reached: the class its channels are compared with."""

    before: View
    after: View
    old: int
    new: int
    movement: Movement | None  # of the old class's map; None where that class has no row in the table
    layers: tuple[LayerChange, ...]

    @property
    def changed(self) -> bool:
        """Whether another class is predicted."""
        return self.before.prediction != self.after.prediction


def compare(
    explainer: Explainer,
    preprocessing: Preprocessing,
    before: Picture,
    after: Picture,
    *,
    goal: int | None = None,
    reduction: str = "mean_abs",
    options: Mapping[str, Any] | None = None,
    most: int = MOST_CHANNELS,
    wanted: Callable[[], bool] | None = None,
) -> Comparison:
    """Both pictures uint8 `(h, w, 3)`, one by one, so that neither's figures depend on the other.

    `options` of `Explainer.explain`, and `reduction` of `Explanation.saliency`, make the maps; `most` channels a layer
    are named in each direction. `wanted` is asked between the passes. Raises AbandonedError, OptionError, and
    UnsupportedModelError where features cannot be had.
    """
    said = dict(options or {})
    first = _look(explainer, preprocessing, before, None, None, reduction, said, wanted)
    old = first.prediction
    second = _look(explainer, preprocessing, after, old, goal, reduction, said, wanted)
    new = second.prediction
    if new == old and goal is not None:
        new = goal
    movement = None
    if old in first.maps and old in second.maps:
        movement = Movement.of(first.maps[old], second.maps[old])
    return Comparison(first, second, old, new, movement, layer_changes(explainer, first, second, old, new, most))


@dataclass(frozen=True)
class Attacked:
    """A picture before and after an attack, and the two compared; `attack` has the goal, if there was one."""

    attack: Attack
    before: Picture
    after: Picture
    comparison: Comparison


def attacked(
    explainer: Explainer,
    attacker: Attacker,
    preprocessing: Preprocessing,
    picture: Picture,
    attack: Attack,
    *,
    reduction: str = "mean_abs",
    options: Mapping[str, Any] | None = None,
    most: int = MOST_CHANNELS,
    wanted: Callable[[], bool] | None = None,
) -> Attacked:
    """`attack` on `picture` uint8 `(h, w, 3)`, away from the class predicted of it or to its goal, and `compare`."""
    label = int(explainer.predict(_normalised(explainer, preprocessing, picture)).argmax())
    changed = attacker.perturbed(picture, attack, label, wanted)
    comparison = compare(
        explainer, preprocessing, picture, changed, goal=attack.goal, reduction=reduction, options=options, most=most,
        wanted=wanted,
    )  # fmt: skip
    return Attacked(attack, picture, changed, comparison)


def layer_changes(
    explainer: Explainer, before: View, after: View, old: int, new: int, most: int = MOST_CHANNELS
) -> tuple[LayerChange, ...]:
    """By layer of the table, what channels did from one picture to another.

    A change is the difference of the GAP features over the channel's standard deviation on the table's images;
    channels that never varied there are left out. A class without a row in the table selects none.
    """
    reference = explainer.reference
    of_old, of_new = (_selected(explainer, target) for target in (old, new))
    std = np.where(reference.std > 0, reference.std, np.inf)
    z = [(view.features - reference.mean) / std for view in (before, after)]
    changes = z[1] - z[0]

    def named(layer: slice, order: Sequence[int]) -> tuple[ChannelChange, ...]:
        return tuple(
            ChannelChange(
                i, float(z[0][layer][i]), float(z[1][layer][i]), bool(of_old[layer][i]), bool(of_new[layer][i])
            )
            for i in order
        )

    found = []
    for name, here in reference.places().items():
        change = changes[here]
        order = np.argsort(-change, kind="stable")
        up = [int(i) for i in order[:most] if change[i] > 0]
        down = [int(i) for i in order[::-1][:most] if change[i] < 0]
        a, b = of_old[here], of_new[here]
        found.append(
            LayerChange(
                layer=name,
                channels=len(change),
                excited=named(here, up),
                inhibited=named(here, down),
                size=float(np.sqrt(np.mean(change**2))),
                of_old=_mean(change[a & ~b]),
                of_new=_mean(change[b & ~a]),
                of_both=_mean(change[a & b]),
            )
        )
    return tuple(found)


def _look(
    explainer: Explainer,
    preprocessing: Preprocessing,
    picture: Picture,
    target: int | None,
    goal: int | None,
    reduction: str,
    options: Mapping[str, Any],
    wanted: Callable[[], bool] | None,
) -> View:
    """`target`: the class to explain beside the predicted one; `goal`: another one."""
    image = _normalised(explainer, preprocessing, picture)

    def explained(one: int | None) -> Any:
        asked = None if wanted is None else lambda: [wanted()]
        return explainer.explain(image, [one], uncovered="nan", wanted=asked, **options)

    first = explained(target)
    maps = {}
    for one in (first, *(explained(other) for other in _others(first, target, goal))):
        if bool(one.covered[0]):
            maps[int(one.targets[0])] = one.saliency(reduction)[0].double().cpu().numpy()
    return View(
        first.logits[0].double().cpu().numpy(),
        first.probabilities()[0].double().cpu().numpy(),
        maps,
        explainer.gap_features(image)[0].double().numpy(),
    )


def _others(first: Any, target: int | None, goal: int | None) -> list[int]:
    predicted = int(first.logits[0].argmax())
    wished = [predicted] if goal is None or predicted != target else [goal]
    return [one for one in wished if one != int(first.targets[0])]


def _normalised(explainer: Explainer, preprocessing: Preprocessing, picture: Picture) -> torch.Tensor:
    import PIL.Image

    weights = next(p for p in explainer.network.parameters() if p.is_floating_point())
    return preprocessing.normalise(PIL.Image.fromarray(picture))[None].to(weights.dtype)


def _selected(explainer: Explainer, target: int) -> NDArray[np.bool_]:
    try:
        rows = explainer.table.rows(torch.tensor([target]))
    except UncoveredTargetError:
        return np.zeros(len(explainer.reference.mean), bool)
    return explainer.reference.selected(explainer.table.rank[rows][0].numpy())


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
