"""What attacks do to the pictures of a folder: accuracy and how far the maps moved, by attack and strength."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import parchgrad
from parchgrad.attacks.attack import Attack
from parchgrad.attacks.comparison import Floats, Movement
from parchgrad.attacks.gradients import Attacker, require_captum
from parchgrad.errors import ModelError
from parchgrad.evaluation.images import Picture
from parchgrad.evaluation.intervals import Interval, mean_interval
from parchgrad.explainer import Explainer
from parchgrad.files import write_text
from parchgrad.preprocessing import Preprocessing

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Found:
    """One picture under one attack, or under none."""

    prediction: int
    movement: Movement | None  # of the map of the class predicted without the attack; None where it has no row


@dataclass(frozen=True)
class Row:
    """One attack over all pictures; every figure is a mean over them with its bootstrap interval.

    `movement` has the fields of Movement, over the pictures with a map; `movement_kept` the same over those whose
    prediction stayed: what moved there, moved without the prediction.
    """

    attack: Attack | None  # None: the pictures as they are
    accuracy: Interval  # share whose prediction is the label
    kept: Interval  # share whose prediction is the one without the attack
    movement: Mapping[str, Interval]
    movement_kept: Mapping[str, Interval]


@dataclass(frozen=True)
class Report:
    """`found[i]` has the finding without an attack, then one for each of `attacks`, of picture `names[i]`."""

    attacks: tuple[Attack, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    found: tuple[tuple[Found, ...], ...]
    settings: Mapping[str, Any]
    seed: int = 0

    def rows(self) -> list[Row]:
        return [self._row(column, attack) for column, attack in enumerate((None, *self.attacks))]

    def _row(self, column: int, attack: Attack | None) -> Row:
        each = [found[column] for found in self.found]
        kept = [one.prediction == found[0].prediction for one, found in zip(each, self.found, strict=True)]
        correct = [one.prediction == label for one, label in zip(each, self.labels, strict=True)]

        def moved(which: Sequence[bool]) -> dict[str, Interval]:
            some = [one.movement if use else None for one, use in zip(each, which, strict=True)]
            return {
                name: self._interval([math.nan if one is None else getattr(one, name) for one in some])
                for name in FIGURES
            }

        return Row(attack, self._interval(correct), self._interval(kept), moved([True] * len(each)), moved(kept))

    def _interval(self, values: Sequence[float]) -> Interval:
        return mean_interval([float(value) for value in values], seed=self.seed)

    def to_json(self) -> dict[str, Any]:
        """JSON types only; NaN is null. docs/attacks.md has the fields."""
        rows = [
            {
                "attack": None if row.attack is None else asdict(row.attack),
                "accuracy": asdict(row.accuracy),
                "kept": asdict(row.kept),
                "movement": {name: asdict(interval) for name, interval in row.movement.items()},
                "movement_kept": {name: asdict(interval) for name, interval in row.movement_kept.items()},
            }
            for row in self.rows()
        ]
        images = [
            {
                "name": name,
                "label": label,
                "predictions": [one.prediction for one in found],
                **{
                    figure: [None if one.movement is None else getattr(one.movement, figure) for one in found]
                    for figure in FIGURES
                },
            }
            for name, label, found in zip(self.names, self.labels, self.found, strict=True)
        ]
        whole = {"format_version": FORMAT_VERSION, "settings": dict(self.settings), "rows": rows, "images": images}
        plain: dict[str, Any] = _plain(whole)
        return plain

    def write_json(self, path: Path) -> None:
        """Raises OSError."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


FIGURES = tuple(field.name for field in fields(Movement))


def measure(
    explainer: Explainer,
    preprocessing: Preprocessing,
    pictures: Sequence[Picture],
    attacks: Sequence[Attack],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Every attack on every picture, one by one; maps by the table's defaults.

    An attack by the gradient leads away from the picture's label, or to its goal; maps are of the class that is
    predicted without an attack, before and after. `seed` draws the intervals. Pictures of one label and one seed get
    other noise, as the picture's place in the order is added to the attack's seed. Raises MissingPackageError before
    any work.
    """
    if any(attack.by_gradient for attack in attacks):
        require_captum()
    attacker = Attacker(explainer.network, preprocessing)
    found = []
    for number, picture in enumerate(pictures):
        found.append(_of_picture(explainer, preprocessing, attacker, picture, attacks, number))
        if progress is not None:
            progress(number + 1, len(pictures))
    programs = {
        "parchgrad": parchgrad.__version__, "torch": torch.__version__, "numpy": np.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    return Report(
        tuple(attacks),
        tuple(picture.name for picture in pictures),
        tuple(picture.target for picture in pictures),
        tuple(found),
        {**(settings or {}), "programs": programs},
        seed,
    )


def _of_picture(
    explainer: Explainer,
    preprocessing: Preprocessing,
    attacker: Attacker,
    picture: Picture,
    attacks: Sequence[Attack],
    number: int,
) -> tuple[Found, ...]:
    from dataclasses import replace

    clean = preprocessing.restore(picture.image)
    predicted, before = _seen(explainer, picture.image, None)
    found = [Found(predicted, None if before is None else Movement.of(before, before))]
    for attack in attacks:
        changed = attacker.perturbed(clean, replace(attack, seed=attack.seed + number), picture.target)
        prediction, after = _seen(explainer, _tensor(preprocessing, changed), predicted)
        found.append(Found(prediction, None if before is None or after is None else Movement.of(before, after)))
    return tuple(found)


def _seen(explainer: Explainer, image: torch.Tensor, target: int | None) -> tuple[int, Floats | None]:
    """The prediction, and the map of `target` or of the prediction."""
    weights = next(p for p in explainer.network.parameters() if p.is_floating_point())
    one = explainer.explain(image[None].to(weights.dtype), [target], uncovered="nan")
    if not bool(torch.isfinite(one.logits).all()):
        raise ModelError("The network's logits are not finite for one of the pictures; expected finite ones.")
    saliency = one.saliency()[0].double().cpu().numpy() if bool(one.covered[0]) else None
    return int(one.logits[0].argmax()), saliency


def _tensor(preprocessing: Preprocessing, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    import PIL.Image

    return preprocessing.normalise(PIL.Image.fromarray(picture))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
