"""Which pictures of an evaluation are worth a look, and why: the best, the worst, gains and losses; draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import OptionError
from parchgrad.evaluation.measures import MEASURES
from parchgrad.evaluation.results import REFERENCE, Results, Shown

Floats = NDArray[np.float64]

# The best and the worst of these are shown, and the words for each.
EXTREMES = {"mosaic_mass": "mass on its quarter", "object_mass": "mass on the object", "insertion": "insertion"}
# Where it points wrongly; and the measure that a map of zeros, which points nowhere, has no value of.
MISSES = {"mosaic_hits": "points to a wrong quarter", "object_hits": "points beside the object"}
MASS = {"mosaic_hits": "mosaic_mass", "object_hits": "object_mass"}
SURE = 0.5  # a probability above it: the model means the class, so a miss is a surprise
# Gains and losses are by the first of these that both methods have.
COMPARED_BY = ("mosaic_mass", "object_mass", "insertion")
COMPARED_WITH = (REFERENCE, "Grad-CAM")
APOSTROPHE = "'"  # of ParchGrad's, which its has none of


@dataclass(frozen=True)
class Case:
    """A picture to look at: what was chosen, the maps of every method, and their figures on it.

    pixels: `(h, w, 3)` as the model sees them.  mask: `(h, w)`, where the target is.  maps: `(h, w)` by method; a map
    that is not finite is none.  figures: by method and measure key.
    """

    reason: str
    shown: Shown
    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    maps: Mapping[str, NDArray[np.floating]]
    figures: Mapping[str, Mapping[str, float]]


def choose(results: Results, method: str | None = None, each: int = 2) -> list[tuple[str, int]]:
    """Pictures that show what `method` does, as (reason, index in `results.shown`); none twice.

    By default it is the row that the results are about, without one the first that looks at the model.

    The `each` best and worst by every measure of EXTREMES, the `each` misses of which the model is surest, and the
    largest gain and loss against each of COMPARED_WITH. A picture chosen for two reasons has both. The same results
    give the same pictures; of equal ones the first. Raises OptionError for a method that was not measured.
    """
    if each < 1:
        raise OptionError("each", each, "an integer of at least 1")
    names = [row.name for row in results.rows]
    if method is None:
        rows = [results.ours, *(row for row in results.rows if row.group != "baseline"), *results.rows]
        method = next((row.name for row in rows if row is not None), None)
        if method is None:
            return []
    if method not in names:
        raise OptionError("method", method, ", ".join(names))
    reasons: dict[int, list[str]] = {}
    for reason, index in _wishes(results, method, each):
        reasons.setdefault(index, []).append(reason)
    return [(_sentence(method, found), index) for index, found in reasons.items()]


def _sentence(method: str, reasons: list[str]) -> str:
    """Reasons with their subject, which is named once."""
    first, *others = reasons
    return "; ".join([f"{method}{first}", *(f"it{other.removeprefix(APOSTROPHE)}" for other in others)])


def _wishes(results: Results, method: str, each: int) -> Iterator[tuple[str, int]]:
    """Reasons that go on where the method's name ends: `'s best ...` or ` points ...`."""
    for key in (*EXTREMES, *MISSES):
        values = _values(results, key, method)
        if values is None:
            continue
        pictures = results.pictures[key]
        if key in MISSES:
            sure = np.array([results.shown[index].probability for index in pictures])
            for place in _largest(np.where((values == 0) & _has_mass(results, key, method), sure, np.nan), each):
                but = "though" if sure[place] > SURE else "where"
                yield f" {MISSES[key]}, {but} the model gives the class {sure[place]:.2f}", pictures[place]
            continue
        sign = -1 if _direction(key) == "lower" else 1
        best, worst = _largest(sign * values, each), _largest(-sign * values, each)
        # Of few pictures the best are the worst as well: each is called only one of the two.
        taken = best[: (np.isfinite(values).sum() + 1) // 2]
        for word, places in (("best", taken), ("worst", [place for place in worst if place not in taken])):
            for rank, place in enumerate(places):
                yield f"'s {_ordinal(rank)}{word} {EXTREMES[key]}: {values[place]:.2f}", pictures[place]
    for other in COMPARED_WITH:
        yield from _gain_and_loss(results, method, other)


def _gain_and_loss(results: Results, method: str, other: str) -> Iterator[tuple[str, int]]:
    for key in COMPARED_BY:
        ours, theirs = _values(results, key, method), _values(results, key, other)
        if ours is None or theirs is None or method == other:
            continue
        gain = (ours - theirs) * (-1 if _direction(key) == "lower" else 1)
        for word, amounts in (("gain", gain), ("loss", -gain)):
            for place in _largest(np.where(amounts > 0, amounts, np.nan), 1):
                yield (
                    f"'s largest {word} against {other}: {EXTREMES[key]} {ours[place]:.2f}, "
                    f"{other} {theirs[place]:.2f}",
                    results.pictures[key][place],
                )
        return


def _values(results: Results, key: str, method: str) -> Floats | None:
    values = results.values.get(key, {}).get(method)
    return None if values is None or not np.isfinite(values).any() else values


def _has_mass(results: Results, key: str, method: str) -> NDArray[np.bool_]:
    """Of each picture of `key`, whether the map is other than zeros; all where mass was not measured."""
    mass = results.values.get(MASS[key], {}).get(method)
    if mass is None:
        return np.ones(len(results.pictures[key]), bool)
    found = dict(zip(results.pictures[MASS[key]], np.isfinite(mass).tolist(), strict=True))
    return np.array([found.get(index, True) for index in results.pictures[key]], bool)


def _largest(values: Floats, count: int) -> list[int]:
    """Places of the largest values, the first of equal ones first; NaN is none."""
    order = np.argsort(-values, kind="stable").tolist()
    return [place for place in order if np.isfinite(values[place])][:count]


def _direction(key: str) -> str | None:
    return next(measure.better for measure in MEASURES if measure.key == key)


def _ordinal(rank: int) -> str:
    return ("", "second ", "third ")[rank] if rank < 3 else f"{rank + 1}th "
