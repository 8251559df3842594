"""Choosing a table's defaults on held-out mosaics: a grid of settings measured, one chosen, and measured again.

The images of each class are split in two by a seed. Every setting is measured on the same mosaics of the first
half, and one is proposed; the best of many figures flatters itself, so the proposed one is measured again on
mosaics of the second half, drawn anew, and only figures of these are promised.

The second half decides too: whether a change is confirmed, and whether the table is refused as no better than
random channels. Figures of a confirmed change are therefore of the very mosaics that confirmed it, and a little
kind to it: had they come out otherwise, they would not have been promised. The record says which figures decided.

Intervals are over mosaics, which share images: they hold for mosaics of these images, not for other images.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import product
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

import parchgrad
from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, OptionError, TableError
from parchgrad.evaluation.controls import random_control
from parchgrad.evaluation.images import LeftOut, Picture, Progress, mosaics_of, usable
from parchgrad.evaluation.maps import mass_share, pointing_hit
from parchgrad.explainer import Explainer
from parchgrad.options import Options
from parchgrad.patterns import match
from parchgrad.preprocessing import Preprocessing
from parchgrad.quantiles import Quantile, channels_of_quantile, quantile_of_layers
from parchgrad.sources import Source
from parchgrad.tables import SelectionTable

CRITERIA = ("mass", "hits", "both")
ALL, UPPER_HALF = "all", "upper-half"

CONFIDENCE = 0.95
# A setting is as good as the best if it is shown to lag by less, in the criterion's units.
MARGIN = 0.01
# For a choice to be written: from about here on t intervals hold for means of what is skewed and bounded.
FEWEST_MOSAICS = 30
# Of a class: one in each half.
FEWEST_IMAGES = 2


@dataclass(frozen=True)
class Interval:
    """A mean over mosaics and its 95 % interval: t for masses and differences, Wilson for hits."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Grid:
    """The settings to try: every combination.

    quantiles: numbers, or pairs: one for the lower and one for the upper half of the layers, in the table's
    order.  layers: `all`, `upper-half`, or a tuple of glob patterns.  conserve: empty = the table's default.
    """

    quantiles: tuple[float | tuple[float, float], ...] = (0.05, 0.1, 0.2, 0.5, (0.5, 0.1), (0.3, 0.05))
    gammas: tuple[float, ...] = (math.inf, 3.0)
    layers: tuple[str | tuple[str, ...], ...] = (ALL, UPPER_HALF)
    conserve: tuple[str, ...] = ()

    def settings(self, table: SelectionTable) -> list[Defaults]:
        """The table's own defaults first, then the grid; of settings that select the same, the first.

        Raises OptionError for a value that is no option.
        """
        for name in ("quantiles", "gammas", "layers"):
            if not getattr(self, name):
                raise OptionError(name, getattr(self, name), "at least one value")
        names, current = table.layer_names, table.defaults
        found = {effect_of(current, table): current}
        for quantile, gamma, layers, conserve in product(
            self.quantiles, self.gammas, self.layers, self.conserve or (current.conserve,)
        ):
            patterns = _patterns(layers, names)
            value = _quantile(quantile, match(names, patterns), names)
            # Made to be refused here if it is no option.
            Options(quantile=value, gamma=gamma, layers=patterns, conserve=conserve)
            setting = replace(current, quantile=value, gamma=float(gamma), layers=patterns, conserve=conserve)
            found.setdefault(effect_of(setting, table), setting)
        return list(found.values())


@dataclass(frozen=True)
class Row:
    """One contender over all mosaics of a half; `defaults` is None for the plain gradient.

    `share` is the part of all channels whose gradient an explanation needs: the smaller, the cheaper a
    backward pass that leaves the others out. Differences are of the criterion, paired by mosaic.
    """

    kind: str  # `setting`, `random` (the setting with random channels) or `gradient`
    defaults: Defaults | None
    share: float
    mass: Interval
    hits: Interval
    over_current: Interval
    over_gradient: Interval


@dataclass(frozen=True)
class TuneResult:
    """What was measured and chosen. `rows` and `measured` are of the first and the second half of the images."""

    rows: tuple[Row, ...]  # the settings, current first; then random channels at the current one; gradient
    measured: tuple[Row, ...]  # the chosen setting; the current one if another; random at each; gradient
    chosen: Defaults
    proposed: Defaults  # by the first half; chosen if it is the current one, or if the second half confirms it
    best: Defaults  # the highest mean in `rows`
    reason: str
    over_random: Interval  # chosen minus random channels at the same setting, second half
    criterion: str
    mosaics: int  # in each half
    images: tuple[int, int]  # from which these were drawn, in the first and the second half
    classes: int  # contrasted in the mosaics
    left_out: LeftOut
    record: dict[str, Any]  # for the table's manifest: JSON types only

    @property
    def current(self) -> Defaults:
        """The defaults before."""
        setting = self.rows[0].defaults
        if setting is None:
            raise ValueError("the first row is the plain gradient, expected the current defaults")
        return setting

    @property
    def confirmed(self) -> bool | None:
        """Whether the second half confirmed the proposed change; None where none was proposed."""
        return None if self.proposed == self.current else self.chosen == self.proposed

    @property
    def beats_control(self) -> bool:
        """Whether the chosen setting is better than the same with random channels."""
        return self.over_random.low > 0

    def require_control(self, table: SelectionTable) -> None:
        """Raises TableError for a table that does no better than random channels."""
        if not self.beats_control:
            found = self.over_random
            raise TableError(
                f"Table '{table.name}' points no better than random channels: {self.criterion} is "
                f"{found.mean:+.3f} above theirs, 95 % interval {found.low:+.3f} to {found.high:+.3f}, "
                "expected an interval above 0."
            )

    def applied(self, table: SelectionTable) -> SelectionTable:
        """The table with the chosen defaults, and how they were chosen as `built["tuned"]`.

        Raises OptionError for fewer than 30 mosaics, and TableError for a table that does no better than random
        channels.
        """
        if self.mosaics < FEWEST_MOSAICS:
            raise OptionError("mosaics", self.mosaics, f"at least {FEWEST_MOSAICS} for a choice to be written")
        self.require_control(table)
        return replace(table, defaults=self.chosen, built={**table.built, "tuned": self.record})


def tune(
    explainer: Explainer,
    source: Source,
    preprocessing: Preprocessing,
    *,
    grid: Grid | None = None,
    criterion: str = "mass",
    mosaics: int = 100,
    seed: int = 0,
    used: Set[str] = frozenset(),
    batch_size: int = 4,
    reading: Progress | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Choose the defaults of the explainer's table on `mosaics` mosaics of `source`, and measure them on as many.

    A default changes only for evidence, `criterion` (`mass`, `hits`, or `both`: their mean) being the measure:
    where the paired interval of the best setting's lead over the current defaults includes 0, these stay. Else
    the setting of the smallest share of channels, the cheapest, is proposed, of those that are better than the
    current ones and as good as the best: the upper end of the interval of their lag is below MARGIN. Its lead
    must show again on the second half of the images, or the current defaults stay.

    Images whose digest is in `used` are left out, and so are classes that have fewer than 2 others. `seed` splits
    the images and draws random channels and the mosaics, of either half differently. `reading(done, total)`
    counts images looked for, `progress(done, total)` maps. Raises, before any image is read, OptionError,
    UncoveredTargetError for classes without rows, DataError for too few classes, and TableError for tables whose
    default selection is instance-wise, which does not ask the table; then DataError for too few images.
    """
    if criterion not in CRITERIA:
        raise OptionError("criterion", criterion, ", ".join(CRITERIA))
    if mosaics < 4:
        raise OptionError("mosaics", mosaics, "an integer of at least 4")
    table = explainer.table
    if table.defaults.selection != "class":
        raise TableError(f"Table '{table.name}': its default selection is 'instance', tuning expects 'class'.")
    settings = (grid or Grid()).settings(table)
    table.rows(torch.tensor(source.classes))  # raises, naming the classes without a row
    if len(source.classes) < 4:
        raise DataError(f"'{source.root}' holds images of {len(source.classes)} classes; a mosaic needs 4.")
    # As many of each class as places in the mosaics of both halves fall to it.
    enough = max(FEWEST_IMAGES, math.ceil(2 * 4 * mosaics / len(source.classes)))
    fine, left_out = usable(source, enough, seed, least=FEWEST_IMAGES, used=used, progress=reading)
    if len(fine.classes) < 4:
        raise DataError(
            f"'{source.root}' holds usable images of {len(fine.classes)} classes, a mosaic needs 4: "
            f"{len(left_out.classes)} have fewer than {FEWEST_IMAGES} that can be read and that the table was not "
            "built from."
        )
    parts = halves(fine, fine.classes, seed)
    first, second = (
        mosaics_of(half, preprocessing, mosaics, own).pictures
        for half, own in zip(parts, mosaic_seeds(seed), strict=True)
    )
    race = _Race(explainer, random_control(explainer, seed), criterion, batch_size)

    current = settings[0]
    contenders = [*(_Contender("setting", s) for s in settings), _Contender("random", current), _GRADIENT]
    # The second half has three rows if the current defaults win, else five.
    counted = _Counted(progress, (len(contenders) + 3) * mosaics)
    scores = race.run(contenders, first, counted)
    rows = race.rows(contenders, scores)
    values = race.criterion(scores)[: len(settings)]
    best, favoured, reason = choose(values, [row.share for row in rows[: len(settings)]])
    proposed = choice = settings[favoured]

    finalists = _finalists(choice, current)
    counted.total = (len(contenders) + len(finalists)) * mosaics
    scores = race.run(finalists, second, counted)
    measured = race.rows(finalists, scores)
    if choice != current and not measured[0].over_current.low > 0:
        choice, reason = current, "the lead of another setting over the current defaults did not show again"
    result = TuneResult(
        rows=tuple(rows),
        measured=tuple(measured),
        chosen=choice,
        proposed=proposed,
        best=settings[best],
        reason=reason,
        over_random=race.lead(finalists, scores, _Contender("setting", choice), _Contender("random", choice)),
        criterion=criterion,
        mosaics=mosaics,
        images=(len(parts[0]), len(parts[1])),
        classes=len(fine.classes),
        left_out=left_out,
        record={},
    )
    return replace(result, record=_record(result, table, source, seed))


def mosaic_seeds(seed: int) -> tuple[int, int]:
    """Seeds of the mosaics of the two halves: with one seed classes and targets would be the same in both."""
    return seed, int(np.random.SeedSequence([seed, 3]).generate_state(1)[0])


def halves(source: Source, classes: Sequence[int], seed: int) -> tuple[Source, Source]:
    """The images of each of `classes` split in two at random; the first half has the odd one.

    Raises DataError for a class of fewer than two images.
    """
    generator = np.random.default_rng([seed, 2])
    parts: tuple[list[int], list[int]] = ([], [])
    for target in classes:
        members = generator.permutation(np.flatnonzero(source.targets == target))
        if len(members) < 2:
            raise DataError(
                f"'{source.root}' holds {len(members)} image(s) of class {target} that can be read and that the table "
                "was not built from; tuning splits each class in two."
            )
        middle = (len(members) + 1) // 2
        parts[0].extend(members[:middle].tolist())
        parts[1].extend(members[middle:].tolist())
    return source.take(sorted(parts[0])), source.take(sorted(parts[1]))


def choose(values: NDArray[np.float64], shares: Sequence[float]) -> tuple[int, int, str]:
    """The best setting, the one to propose, and why, by the rule of `tune`.

    `values` `(settings, mosaics)` is the criterion, the current defaults first; `shares` are the settings'.
    """
    means = values.mean(axis=-1)
    best = int(means.argmax())  # of equal means the first, and the current defaults are first
    if best == 0:
        return best, 0, "the current defaults are the best"
    ahead = intervals(values - values[0])
    if ahead[best].low <= 0:
        return best, 0, "no setting is shown to be better than the current defaults"
    behind = intervals(values[best] - values)
    as_good = [i for i, lag in enumerate(behind) if i == best or lag.high < MARGIN]
    chosen = min((i for i in as_good if i == 0 or ahead[i].low > 0), key=lambda i: (shares[i], -means[i]))
    cheapest = f"the cheapest of those shown to be less than {MARGIN:g} behind the best"
    if chosen == 0:
        return best, 0, f"the current defaults are {cheapest}"
    return (
        best,
        chosen,
        f"better than the current defaults, on both halves; {'the best' if chosen == best else cheapest}",
    )


def intervals(values: NDArray[np.float64]) -> list[Interval]:
    """Mean and t interval of each row of `(rows, mosaics)`; of paired differences, that of the paired t test."""
    mosaics = values.shape[-1]
    means = values.mean(axis=-1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, mosaics - 1) * stats.sem(values, axis=-1)
    return [Interval(float(m), float(m - h), float(m + h)) for m, h in zip(means, half, strict=True)]


def hit_intervals(hits: NDArray[np.float64]) -> list[Interval]:
    """Mean and Wilson interval of each row of hits `(rows, mosaics)`.

    Unlike the t interval it has a width where all mosaics are hit, or none. Ties hit by their share (maps.py); the
    interval is that of the nearest whole number of hits.
    """
    mosaics = hits.shape[-1]
    found = [
        stats.binomtest(round(float(row.sum())), mosaics).proportion_ci(CONFIDENCE, method="wilson") for row in hits
    ]
    return [Interval(float(row.mean()), float(ci.low), float(ci.high)) for row, ci in zip(hits, found, strict=True)]


def quantile_text(setting: Defaults, names: Sequence[str]) -> str:
    """A setting's quantile in the words of a grid: `0.1`, `0.5/0.1` for the halves, or `by layer`."""
    if not isinstance(setting.quantile, Mapping):
        return f"{setting.quantile:g}"
    values = quantile_of_layers(setting.quantile, match(names, setting.layers))
    lower = {values[name] for name in names[: len(names) // 2] if name in values}
    upper = {values[name] for name in names[len(names) // 2 :] if name in values}
    if len(lower) == len(upper) == 1:
        return f"{lower.pop():g}/{upper.pop():g}"
    return "by layer"


def layers_text(setting: Defaults, names: Sequence[str]) -> str:
    """A setting's layers in the words of a grid: `all`, `upper-half`, or how many of how many."""
    active = match(names, setting.layers)
    if len(active) == len(names):
        return ALL
    return UPPER_HALF if active == tuple(names[len(names) // 2 :]) else f"{len(active)} of {len(names)}"


@dataclass(frozen=True)
class _Contender:
    kind: str
    defaults: Defaults | None


_GRADIENT = _Contender("gradient", None)


def _finalists(choice: Defaults, current: Defaults) -> list[_Contender]:
    """Who is measured on the second half: each setting that may be the last word beside its control."""
    settings = [choice] if choice == current else [choice, current]
    return [*(_Contender(kind, s) for s in settings for kind in ("setting", "random")), _GRADIENT]


class _Counted:
    """Maps done so far, handed on to the caller's progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.total = total
        self._progress, self._done = progress, 0

    def add(self, maps: int) -> None:
        self._done += maps
        if self._progress is not None:
            self._progress(self._done, self.total)


class _Race:
    """Contenders of one table on the same pictures."""

    def __init__(self, explainer: Explainer, control: Explainer, criterion: str, batch_size: int) -> None:
        self._explainer, self._control = explainer, control
        self._criterion, self._batch_size = criterion, batch_size

    def run(
        self, contenders: Sequence[_Contender], pictures: Sequence[Picture], counted: _Counted
    ) -> NDArray[np.float64]:
        """Mass and hit of each contender on each picture, `(contenders, pictures, 2)`.

        A batch is one picture under several contenders' options, so that a picture is made once.
        """
        scores = np.empty((len(contenders), len(pictures), 2))
        sides = [
            (self._explainer, [i for i, c in enumerate(contenders) if c.kind != "random"]),
            (self._control, [i for i, c in enumerate(contenders) if c.kind == "random"]),
        ]
        for number, picture in enumerate(pictures):
            for explainer, members in sides:
                for start in range(0, len(members), self._batch_size):
                    part = members[start : start + self._batch_size]
                    maps = _maps(explainer, picture, [contenders[i].defaults for i in part])
                    for i, saliency in zip(part, maps, strict=True):
                        found = mass_share(saliency, picture.place), pointing_hit(saliency, picture.place)
                        scores[i, number] = np.nan_to_num(found)  # a map without mass has none there
                    counted.add(len(part))
        return scores

    def criterion(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """`(contenders, pictures, 2)` -> what is compared, `(contenders, pictures)`."""
        if self._criterion == "both":
            return np.asarray(scores.mean(axis=-1))
        return scores[..., CRITERIA.index(self._criterion)]

    def lead(
        self, contenders: Sequence[_Contender], scores: NDArray[np.float64], one: _Contender, other: _Contender
    ) -> Interval:
        """The criterion of `one` minus that of `other`, paired."""
        value = self.criterion(scores)
        return intervals(value[[contenders.index(one)]] - value[[contenders.index(other)]])[0]

    def rows(self, contenders: Sequence[_Contender], scores: NDArray[np.float64]) -> list[Row]:
        value = self.criterion(scores)
        table = self._explainer.table
        current = value[contenders.index(_Contender("setting", table.defaults))]
        gradient = value[contenders.index(_GRADIENT)]
        found = [
            intervals(scores[..., 0]),
            hit_intervals(scores[..., 1]),
            intervals(value - current),
            intervals(value - gradient),
        ]
        return [
            Row(c.kind, c.defaults, _share(c.defaults, table), *each)
            for c, *each in zip(contenders, *found, strict=True)
        ]


def _maps(explainer: Explainer, picture: Picture, settings: Sequence[Defaults | None]) -> NDArray[np.float64]:
    """Saliency maps `(settings, h, w)` of one picture; None is the plain gradient."""
    count = len(settings)
    # The gradient takes no notice of the rule's options; the defaults stand in for them.
    options = [setting or explainer.table.defaults for setting in settings]
    explanation = explainer.explain(
        torch.stack([picture.image] * count),
        [picture.target] * count,
        rule=[setting is not None for setting in settings],
        quantile=[o.quantile for o in options],
        gamma=[o.gamma for o in options],
        conserve=[o.conserve for o in options],
        layers=[o.layers for o in options],
    )
    return np.asarray(explanation.saliency().cpu().numpy())


def _patterns(layers: str | tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
    if layers == ALL:
        return ("*",)
    if layers == UPPER_HALF:
        return tuple(glob.escape(name) for name in names[len(names) // 2 :])
    if isinstance(layers, str):
        raise OptionError("layers", layers, f"'{ALL}', '{UPPER_HALF}', or a tuple of glob patterns")
    return layers


def _quantile(quantile: float | tuple[float, float], active: Sequence[str], names: Sequence[str]) -> Quantile:
    if not isinstance(quantile, tuple):
        return quantile
    if len(quantile) != 2:
        raise OptionError("quantiles", quantile, "a number, or a pair for the lower and the upper half of the layers")
    lower, upper = quantile
    below = set(names[: len(names) // 2])
    return {**{glob.escape(name): lower for name in active if name in below}, "*": upper}


def effect_of(setting: Defaults, table: SelectionTable) -> tuple[object, ...]:
    """What a setting comes to: channels selected in each layer (None: the rule does not act), gamma, conserve."""
    return (*_counts(setting, table).values(), float(setting.gamma), setting.conserve)


def _counts(setting: Defaults, table: SelectionTable) -> dict[str, int | None]:
    quantiles = quantile_of_layers(setting.quantile, match(table.layer_names, setting.layers))
    return {
        name: channels_of_quantile(quantiles[name], layer.channels) if name in quantiles else None
        for name, layer in table.layers.items()
    }


def _share(setting: Defaults | None, table: SelectionTable) -> float:
    """Channels whose gradient is needed, over all channels: a finite gamma needs the unselected side too."""
    if setting is None or not math.isinf(setting.gamma):
        return 1.0
    counts = _counts(setting, table)
    needed = sum(layer.channels if counts[n] is None else counts[n] or 0 for n, layer in table.layers.items())
    return needed / sum(layer.channels for layer in table.layers.values())


def _record(result: TuneResult, table: SelectionTable, source: Source, seed: int) -> dict[str, Any]:
    """How the defaults were chosen, for the manifest; `expected` is from the second half of the images alone.

    `decided` names the figures of it that would have led to another end had they been others.
    """
    chosen = next(row for row in result.measured if row.kind == "setting" and row.defaults == result.chosen)
    return {
        "by": f"parchgrad {parchgrad.__version__}",
        "criterion": result.criterion,
        "data": PurePath(source.root).name,
        "data_sha256": source.fingerprint(),
        "images": {"there": len(source), "choosing": result.images[0], "measuring": result.images[1]},
        "classes": result.classes,
        "classes_left_out": list(result.left_out.classes),
        "images_left_out": {"used": len(result.left_out.used), "unreadable": len(result.left_out.unreadable)},
        "mosaics": {"choosing": result.mosaics, "measuring": result.mosaics},
        "seed": seed,
        "confidence": CONFIDENCE,
        "intervals": {"mass": "t", "hits": "wilson", "differences": "paired t"},
        "margin": MARGIN,
        "before": table.defaults.to_json(),
        "proposed": result.proposed.to_json(),
        "confirmed": result.confirmed,
        "chosen": result.chosen.to_json(),
        "reason": result.reason,
        "expected": {
            "mass": chosen.mass.to_json(),
            "hits": chosen.hits.to_json(),
            "over_gradient": chosen.over_gradient.to_json(),
            "over_random": result.over_random.to_json(),
            "over_before": chosen.over_current.to_json(),
            "decided": ["over_random", *(["over_before"] if result.confirmed else [])],
        },
        "grid": [_record_row(row, table.layer_names) for row in result.rows],
    }


def _record_row(row: Row, names: Sequence[str]) -> dict[str, Any]:
    setting = {} if row.defaults is None else setting_words(row.defaults, names)
    figures = {name: getattr(row, name).to_json() for name in ("mass", "hits", "over_current", "over_gradient")}
    return {"kind": row.kind, **setting, "share": round(row.share, 4), **figures}


def setting_words(setting: Defaults, names: Sequence[str]) -> dict[str, str]:
    """A setting in the words of a grid, short enough for a line."""
    return {
        "quantile": quantile_text(setting, names),
        "gamma": f"{setting.gamma:g}",
        "layers": layers_text(setting, names),
        "conserve": setting.conserve,
    }
