"""The findings of an evaluation in plain sentences, none of which says more than its interval bears."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parchgrad.evaluation.intervals import CONFIDENCE, Interval, difference_interval
from parchgrad.evaluation.measures import MEASURES, Measure
from parchgrad.evaluation.results import FEWEST_IMAGES, Results, Row

CHEAP = 3.0  # forward passes: what a service can pay for a map
# Measures a sentence each, the first pair that was measured.
HEADLINES = (("mosaic_mass", "mosaic_hits"), ("object_mass", "object_hits"), ("insertion", "deletion"))
JUDGED_SECTIONS = ("mosaics", "objects", "perturbation")
PLACES = {"mosaics": " on mosaics", "objects": " on boxes and masks"}
# A rank correlation above it: more alike than not. Our reading; nobody has set a limit.
ALIKE = 0.5
SAME = 1 - 1e-9

# What replaced by chance should change a map, and by which measure it is seen.
REPLACED = {
    "cascade": "all weights drawn anew",
    "classes_similarity": "another class's channels for each class",
    "channels_similarity": "random channels for each class",
}


@dataclass(frozen=True)
class Gap:
    """How far ahead of another a method is by one measure; positive is better, whatever the measure's direction.

    pictures, images: that both have a value on, and the photographs these are of.
    """

    mean: float
    low: float
    high: float
    pictures: int
    images: int

    @property
    def known(self) -> bool:
        """Whether it is of enough photographs to be called beyond chance or not."""
        return self.images >= FEWEST_IMAGES and math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def ahead(self) -> bool:
        return self.known and self.low > 0

    @property
    def behind(self) -> bool:
        return self.known and self.high < 0


@dataclass(frozen=True)
class Standing:
    """A method among others by one measure; all names are in the order of their means, the best first.

    better: those with a better mean.  comparisons: made to say so, which the intervals are widened for.  pictures: in
    words.
    """

    name: str
    gaps: dict[str, Gap]  # its lead over each
    better: tuple[str, ...]
    comparisons: int
    pictures: str

    @property
    def ahead(self) -> list[str]:
        return [other for other, gap in self.gaps.items() if gap.behind]

    @property
    def level(self) -> list[str]:
        return [other for other, gap in self.gaps.items() if gap.known and not gap.behind and not gap.ahead]

    @property
    def few(self) -> list[str]:
        """Those of which too few photographs are known."""
        return [other for other, gap in self.gaps.items() if not gap.known]

    @property
    def open(self) -> bool:
        """Whether there are too few photographs for any comparison."""
        return len(self.few) == len(self.gaps)

    def words(self, where: str, bound: str, mean: Mapping[str, float]) -> str:
        """One sentence. `bound` says which methods are compared, `mean` holds their means."""
        where, ours = f"{where} ({self.pictures})", f"{quoted(self.name)} {number(mean[self.name])}"
        if self.open:
            best = next(iter(self.gaps))
            return (
                f"{where}, no method is told from another: these are too few to compare, at least {FEWEST_IMAGES} "
                f"photographs are needed. The means: {ours}, {quoted(best)} {number(mean[best])}."
            )
        among = f"{len(self.gaps) - len(self.few) + 1} methods{bound}"
        if self.ahead:
            said = f"{where}, {quoted(self.name)}, {number(mean[self.name])}, is not first of the {among}: "
            said += _and([f"{quoted(one)} {number(mean[one])}" for one in self.ahead])
            said += f" {'is' if len(self.ahead) == 1 else 'are'} better beyond chance ({self._interval(self.ahead[0])})"
            if also := [one for one in self.better if one in self.level]:
                said += f"; {_and([f'{quoted(one)} {number(mean[one])}' for one in also])}, better too, within chance"
        elif self.level:
            named = [one for one in self.level if one in self.better]
            named += [one for one in self.level if one not in named][: max(0, 3 - len(named))]
            rest = len(self.level) - len(named)
            others = _and([*map(quoted, named), *([f"{rest} other{'s' if rest > 1 else ''}"] if rest else [])])
            said = (
                f"{where}, {quoted(self.name)} cannot be told apart from {others}, of the {among}: {ours}, "
                f"{_and([f'{quoted(one)} {number(mean[one])}' for one in named])}; 0 lies in the "
                f"{self._interval(named[0])}"
            )
        else:
            best = next(one for one, gap in self.gaps.items() if gap.known)
            said = (
                f"{where}, {quoted(self.name)} is first of the {among}: {number(mean[self.name])}, next {quoted(best)} "
                f"{number(mean[best])}; it is ahead of each beyond chance ({self._interval(best)})"
            )
        return said + (f"; too few photographs to compare it with {listed(self.few)}." if self.few else ".")

    def _interval(self, other: str) -> str:
        """The difference from `other` in words, as a positive number where `other` is ahead."""
        gap = self.gaps[other]
        low, high = (-gap.high, -gap.low) if gap.behind else (gap.low, gap.high)
        how = f", widened for {self.comparisons} comparisons" if self.comparisons > 1 else ""
        return f"95 % interval of the difference from {quoted(other)}, {span(low, high)}{how}"


def headline(results: Results) -> tuple[Measure, ...]:
    """The measures that the page is about: the first pair of HEADLINES of which something was measured."""
    measured = {measure.key: measure for measure in results.measures if results.cells[measure.key]}
    for pair in HEADLINES:
        if found := tuple(measured[key] for key in pair if key in measured):
            return found
    return ()


def gap(results: Results, key: str, name: str, other: str, comparisons: int = 1) -> Gap:
    """The lead of `name` over `other`, picture by picture, with its bootstrap interval over photographs.

    The interval is widened so that of `comparisons` such all hold together (Bonferroni).
    """
    groups = [results.shown[index].group for index in results.pictures[key]]
    values = results.values[key]
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    found = difference_interval(
        values[name], values[other], groups, resamples=results.resamples, confidence=confidence
    )  # fmt: skip
    low, high, mean = found.low, found.high, found.mean
    if _measure(key).better == "lower":
        low, high, mean = -high, -low, -mean
    return Gap(mean, low, high, found.maps, found.images)


def sentences(results: Results) -> list[str]:
    """Who is first and how surely, where ParchGrad is not, and which maps stay when they should change."""
    ours = results.ours
    said = [_who_is_first(results, measure, ours) for measure in headline(results)]
    if ours is not None:
        said += _elsewhere(results, ours)
    return said + _sanity(results)


def spoken_of(results: Results) -> tuple[Measure, ...]:
    """The measures that the sentences name, but for the sanity checks."""
    first = headline(results)
    return (*first, *(one for one in _judged(results) if one not in first))


def cheap(row: Row) -> bool:
    """Whether it costs at most about CHEAP: to half a pass, which a busy machine does not change."""
    return row.cost is not None and _halves(row.cost.passes) <= CHEAP


def state(interval: Interval) -> str:
    """Of a rank correlation with the map under chance.

    `blind`: always 1, it was not looked at; `stays`, `changes`: surely above or below ALIKE; `open` where the interval
    leaves it; `few`: of fewer than FEWEST_IMAGES photographs.
    """
    if interval.mean > SAME and not interval.low <= SAME:
        return "blind"
    if interval.images < FEWEST_IMAGES or not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return "few"
    return "stays" if interval.low > ALIKE else "changes" if interval.high < ALIKE else "open"


def counted(results: Results, indices: Sequence[int]) -> str:
    """How many pictures, of what kind and of how many photographs, in words."""
    shown = [results.shown[index] for index in indices]
    kinds, images = {one.kind for one in shown}, len({one.group for one in shown})
    kind = kinds.pop() if len(kinds) == 1 else "picture"
    if kind == "photograph" and images != len(shown):
        kind = "picture"
    return plural(len(shown), kind) + ("" if images == len(shown) else f" of {plural(images, 'photograph')}")


def plural(count: int, word: str) -> str:
    """`1 picture`, `8 pictures`."""
    return f"{count:,} {word}{'s' if count != 1 else ''}"


def number(value: float) -> str:
    """Three decimals while that says something; the sign for minus, not a hyphen."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    spec = next((spec for below, spec in ((10, ".3f"), (1000, ".1f"), (1e6, ",.0f")) if size < below), ".1e")
    text = f"{size:{spec}}"
    return f"−{text}" if value < 0 and float(text.replace(",", "")) else text


def span(low: float, high: float) -> str:
    """An interval's ends, in a sentence."""
    return f"{number(low)} to {number(high)}"


def brief_span(low: float, high: float) -> str:
    """An interval's ends, in a table: a dash where it cannot be taken for a minus."""
    return f"{number(low)}–{number(high)}" if low >= 0 else span(low, high)


def name_of(measure: Measure) -> str:
    """A measure's title where its section is not to be seen, fit for a list."""
    return f"{quoted(measure.title)}{PLACES.get(measure.section, '')}"


def quoted(name: str) -> str:
    """A name as part of a sentence: in quotation marks where its commas would be taken for the sentence's."""
    return f"“{name}”" if "," in name else name


def listed(names: Sequence[str]) -> str:
    """Names as part of a sentence."""
    return _and([quoted(name) for name in names])


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _brief(results: Results, names: Sequence[str]) -> str:
    """A list of methods in which all of ParchGrad's settings are one entry."""
    settings = [row.name for row in results.rows if row.group == "parchgrad"]
    if len(settings) < 3 or not set(settings) <= set(names):
        return listed(names)
    others = [quoted(name) for name in names if name not in settings]
    return _and([*others, f"ParchGrad in all {len(settings)} settings"])


def _measure(key: str) -> Measure:
    return next(measure for measure in MEASURES if measure.key == key)


def _halves(passes: float) -> float:
    return round(2 * passes) / 2


def _compared(results: Results, key: str, ours: Row | None) -> tuple[list[str], bool]:
    """Methods that are compared, best first, without our other settings; whether they are the cheap ones only.

    Ours is always one of them, whatever it costs.
    """
    bounded = any(row.cost is not None for row in results.rows)
    names = {
        row.name
        for row in results.rows
        if (ours is not None and row.name == ours.name)
        or ((not bounded or cheap(row)) and (ours is None or row.group != "parchgrad"))
    }
    return [name for name in results.ranking(key) if name in names], bounded


def _who_is_first(results: Results, measure: Measure, ours: Row | None) -> str:
    ranking, bounded = _compared(results, measure.key, ours)
    where = f"In {name_of(measure)}"
    bound = " that cost at most about three forward passes" if bounded else ""
    mean = {name: cell.interval.mean for name, cell in results.cells[measure.key].items()}
    if not ranking:
        return f"{where}, no method{bound} was measured."
    first, compared = ranking[0], True
    if len(ranking) == 1:
        pictures = _pictures(results, measure.key, [first])
        said = f"{where} ({pictures}), only {first} was measured of the methods{bound}: {number(mean[first])}."
    else:
        name = ours.name if ours is not None and ours.name in ranking else first
        standing = _standing(results, measure, name, ranking, ours)
        said = standing.words(where, bound, mean)
        compared = not standing.open
    if ours is None:
        said += " ParchGrad was not measured."
    elif ours.name not in ranking:
        said += f" {ours.name} is not among them: it has no value here."
    elif compared and bounded and not cheap(ours):
        said += f" {_price(ours)}"
    return said if not compared else said + _beyond(results, measure, ours, mean, ranking)


def _standing(results: Results, measure: Measure, name: str, ranking: Sequence[str], ours: Row | None) -> Standing:
    others = [other for other in ranking if other != name]
    # A method that is looked at because it is first is one of all pairs.
    chosen = ours is not None and name == ours.name
    comparisons = len(others) if chosen else len(others) * len(ranking) // 2
    gaps = {other: gap(results, measure.key, name, other, comparisons) for other in others}
    mean = {one: results.cells[measure.key][one].interval.mean for one in ranking}
    sign = -1 if measure.better == "lower" else 1
    better = tuple(other for other in others if sign * (mean[other] - mean[name]) > 0)
    return Standing(name, gaps, better, comparisons, _pictures(results, measure.key, [name]))


def _pictures(results: Results, key: str, names: Sequence[str]) -> str:
    """The pictures of a measure that any of `names` has a value on, in words."""
    values = [results.values[key][name] for name in names]
    there = [any(np.isfinite(one[place]) for one in values) for place in range(len(results.pictures[key]))]
    return counted(results, [index for index, found in zip(results.pictures[key], there, strict=True) if found])


def _price(ours: Row) -> str:
    if ours.cost is None:
        return f"The cost of {quoted(ours.name)} was not measured."
    return f"{quoted(ours.name)} itself costs more, about {_halves(ours.cost.passes):g}."


def _beyond(
    results: Results, measure: Measure, ours: Row | None, mean: dict[str, float], ranking: Sequence[str]
) -> str:
    """What the comparison left out and is better still: another setting of ours, a dearer method."""
    best = ranking[0]
    sign = -1 if measure.better == "lower" else 1
    rows = {row.name: row for row in results.rows}
    better = [name for name in results.ranking(measure.key) if sign * (mean[name] - mean[best]) > 0]
    settings = [name for name in better if ours is not None and rows[name].group == "parchgrad"]
    dearer = [name for name in better if name not in settings and rows[name].cost is not None]
    said = []
    if settings:
        said.append(f"ParchGrad in another setting, {quoted(settings[0])}, {number(mean[settings[0]])}")
    if dearer and (cost := rows[dearer[0]].cost) is not None:
        said.append(f"{quoted(dearer[0])}, at {cost.passes:.0f} passes, {number(mean[dearer[0]])}")
    return f" Not compared, the best of several: {_and(said)}." if said else ""


def _judged(results: Results) -> list[Measure]:
    """Measures with a direction beside the headline's."""
    told = {measure.key for measure in headline(results)}
    return [
        one for one in results.measures
        if one.section in JUDGED_SECTIONS and one.better is not None and one.key not in told and results.cells[one.key]
    ]  # fmt: skip


def _elsewhere(results: Results, ours: Row) -> list[str]:
    """By every other measure with a direction: first, level with the first, or behind whom; too few pictures to say."""
    first: list[str] = []
    level: list[str] = []
    behind: list[str] = []
    few: dict[str, list[str]] = {}
    bounded = False
    for measure in _judged(results):
        ranking, bounded = _compared(results, measure.key, ours)
        if ours.name not in ranking or len(ranking) < 2:
            continue
        standing, words = _standing(results, measure, ours.name, ranking, ours), name_of(measure)
        if standing.open:
            few.setdefault(standing.pictures, []).append(words)
            continue
        more = f"; better mean: {listed(standing.better)}" if standing.better else ""
        words = f"{words} ({standing.pictures}{more})"
        (behind if standing.ahead else level if standing.level else first).append(words)
    parts = [f"first beyond chance in {_and(first)}"] if first else []
    parts += [f"not to be told apart from the best of the others in {_and(level)}"] if level else []
    parts += [f"not first, beyond chance, in {_and(behind)}"] if behind else []
    among = "Among the same methods" if bounded else "By the other measures"
    said = [f"{among}, {quoted(ours.name)} is {'; '.join(parts)}."] if parts else []
    for pictures, names in few.items():
        measures = _and(names if len(names) <= 3 else [names[0], f"{len(names) - 1} other measures"])
        said.append(f"{measures[0].upper()}{measures[1:]}: of {pictures}, too few to compare.")
    return said


def _sanity(results: Results) -> list[str]:
    """Under each check, how the methods that look at the model come out, and which surely stay as they were."""
    looking = {row.name for row in results.rows if row.group != "baseline"}
    said: list[str] = []
    few: dict[str, list[str]] = {}
    for key, what in REPLACED.items():
        cells = {name: cell for name, cell in results.cells.get(key, {}).items() if name in looking}
        if not cells:
            if looking & set(results.values.get(key, {})):
                said.append(f"Sanity check, {what}: could not be made, no method has a map left to compare.")
            continue
        by_state: dict[str, list[str]] = {}
        for name, cell in cells.items():
            by_state.setdefault(state(cell.interval), []).append(name)
        pictures = _pictures(results, key, list(cells))
        if set(by_state) == {"few"}:
            few.setdefault(pictures, []).append(what)
            continue
        parts = []
        # Who does not look at the model explains none; a method may do without the table's classes.
        if "blind" in by_state and key != "cascade":
            parts.append(f"not looked at by {_brief(results, by_state.pop('blind'))}")
        for one, words in (("blind", "the same"), ("stays", "more alike than not")):
            if names := by_state.get(one, []):
                fails = "fails: its map stays" if len(names) == 1 else "fail: their maps stay"
                parts.append(f"{_brief(results, names)} {fails} {words}")
        parts += [
            f"{plural(len(by_state[one]), 'method')} {words}"
            for one, words in (
                ("changes", "less alike than not"),
                ("open", "not clear"),
                ("few", "with too few photographs to tell"),
            )
            if one in by_state
        ]
        said.append(f"Sanity check, {what} ({pictures}): {'; '.join(parts)}.")
    return said + [
        f"Sanity checks with {_and(whats)}: of {pictures}, too few to tell of any method whether its map changes."
        for pictures, whats in few.items()
    ]
