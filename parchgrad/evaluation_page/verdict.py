"""The findings of an evaluation in plain sentences, none of which says more than its interval bears."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parchgrad.evaluation.intervals import Interval, difference_interval
from parchgrad.evaluation.measures import MEASURES, Measure
from parchgrad.evaluation.results import Results, Row

OURS = "ParchGrad"
CHEAP = 3.0  # forward passes: what a service can pay for a map
# Measures a sentence each, the first pair that was measured.
HEADLINES = (("mosaic_mass", "mosaic_hits"), ("object_mass", "object_hits"), ("insertion", "deletion"))
JUDGED_SECTIONS = ("mosaics", "objects", "perturbation")
PLACES = {"mosaics": " on mosaics", "objects": " on boxes and masks"}
# A rank correlation above it: more alike than not.
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
    """How far ahead of another a method is by one measure; positive is better, whatever the measure's direction."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def ahead(self) -> bool:
        return self.known and self.low > 0

    @property
    def behind(self) -> bool:
        return self.known and self.high < 0


@dataclass(frozen=True)
class Standing:
    """A method among others, which are in the order of their means: those surely ahead of it, those level with it."""

    name: str
    gaps: dict[str, Gap]  # its lead over each

    @property
    def ahead(self) -> list[str]:
        return [other for other, gap in self.gaps.items() if gap.behind]

    @property
    def level(self) -> list[str]:
        return [other for other, gap in self.gaps.items() if not gap.behind and not gap.ahead]

    def words(self, where: str, bound: str, mean: Mapping[str, float]) -> str:
        """One sentence. `bound` says which methods are compared, `mean` holds their means."""
        ours, among = f"{quoted(self.name)} {number(mean[self.name])}", f"{len(self.gaps) + 1} methods{bound}"
        if self.ahead:
            best, gap = self.ahead[0], self.gaps[self.ahead[0]]
            return (
                f"{where}, {quoted(self.name)} is not first of the {among}: {quoted(best)} "
                f"{number(mean[best])}, {ours}; the difference is beyond chance "
                f"(95 % interval {span(-gap.high, -gap.low)})."
            )
        if self.level:
            best, gap = self.level[0], self.gaps[self.level[0]]
            why = (
                f"the interval of {'their' if len(self.level) == 1 else 'the'} difference holds 0 "
                f"(95 % interval {span(gap.low, gap.high)})"
                if gap.known
                else "there are too few photographs for an interval"
            )
            others = listed(self.level) if len(self.level) <= 3 else f"{quoted(best)} and {len(self.level) - 1} others"
            return (
                f"{where}, {quoted(self.name)} cannot be told apart from {others}, of the {among}: {ours}, "
                f"{quoted(best)} {number(mean[best])}; {why}."
            )
        best, gap = next(iter(self.gaps.items()))
        return (
            f"{where}, {quoted(self.name)} is first of the {among}: {number(mean[self.name])}, next {quoted(best)} "
            f"{number(mean[best])}; the difference is beyond chance (95 % interval {span(gap.low, gap.high)})."
        )


def our_row(results: Results) -> Row | None:
    """The row the sentences are about: that called ParchGrad, else the first of its group."""
    rows = [row for row in results.rows if row.group == "parchgrad"]
    return next((row for row in rows if row.name == OURS), rows[0] if rows else None)


def headline(results: Results) -> tuple[Measure, ...]:
    """The measures that the page is about: the first pair of HEADLINES of which something was measured."""
    measured = {measure.key: measure for measure in results.measures if results.cells[measure.key]}
    for pair in HEADLINES:
        if found := tuple(measured[key] for key in pair if key in measured):
            return found
    return ()


def gap(results: Results, key: str, name: str, other: str) -> Gap:
    """The lead of `name` over `other`, picture by picture, with its bootstrap interval over photographs."""
    groups = [results.shown[index].group for index in results.pictures[key]]
    values = results.values[key]
    found = difference_interval(values[name], values[other], groups, resamples=results.resamples)
    if _measure(key).better == "lower":
        return Gap(-found.mean, -found.high, -found.low)
    return Gap(found.mean, found.low, found.high)


def sentences(results: Results) -> list[str]:
    """Who is first and how surely, where ParchGrad is not, and which maps stay when they should change."""
    ours = our_row(results)
    said = [_who_is_first(results, measure, ours) for measure in headline(results)]
    if ours is not None:
        said += _elsewhere(results, ours)
    return said + _sanity(results)


def state(interval: Interval) -> str:
    """Of a rank correlation with the map under chance.

    `blind`: always 1, it was not looked at; `stays`, `changes`; `open` where the interval leaves it.
    """
    if interval.mean > SAME and not interval.low <= SAME:
        return "blind"
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return "open"
    return "stays" if interval.low > ALIKE else "changes" if interval.high < ALIKE else "open"


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


def _compared(results: Results, key: str, ours: Row | None) -> tuple[list[str], bool]:
    """Methods that are compared, best first, without our other settings; whether they are the cheap ones only."""
    bounded = any(row.cost is not None for row in results.rows)
    rows = [row for row in results.rows if not bounded or (row.cost is not None and row.cost.passes <= CHEAP)]
    names = {row.name for row in rows if ours is None or row.group != "parchgrad" or row.name == ours.name}
    return [name for name in results.ranking(key) if name in names], bounded


def _who_is_first(results: Results, measure: Measure, ours: Row | None) -> str:
    ranking, bounded = _compared(results, measure.key, ours)
    where = f"In {name_of(measure)}"
    bound = " that cost at most three forward passes" if bounded else ""
    mean = {name: cell.interval.mean for name, cell in results.cells[measure.key].items()}
    if not ranking:
        return f"{where}, no method{bound} was measured."
    first = ranking[0]
    if len(ranking) == 1:
        said = f"{where}, only {first} was measured of the methods{bound}: {number(mean[first])}."
    else:
        name = ours.name if ours is not None and ours.name in ranking else first
        said = _standing(results, measure.key, name, ranking).words(where, bound, mean)
    if ours is None:
        said += " ParchGrad was not measured."
    elif ours.name not in ranking:
        said += f" {ours.name} is not among them: {_absence(ours, measure, results)}."
    return said + _beyond(results, measure, ours, mean, ranking)


def _standing(results: Results, key: str, name: str, ranking: Sequence[str]) -> Standing:
    return Standing(name, {other: gap(results, key, name, other) for other in ranking if other != name})


def _absence(ours: Row, measure: Measure, results: Results) -> str:
    if ours.name not in results.cells[measure.key]:
        return "it has no value here"
    if ours.cost is None:
        return "its cost was not measured"
    return f"it costs {ours.cost.passes:.1f}"


def _beyond(
    results: Results, measure: Measure, ours: Row | None, mean: dict[str, float], ranking: Sequence[str]
) -> str:
    """What the comparison left out and is better still: another setting of ours, a dearer method."""
    said, best = "", ranking[0]
    sign = -1 if measure.better == "lower" else 1
    rows = {row.name: row for row in results.rows}
    better = [name for name in results.ranking(measure.key) if sign * (mean[name] - mean[best]) > 0]
    settings = [name for name in better if ours is not None and rows[name].group == "parchgrad" and name != ours.name]
    dearer = [
        name for name in better
        if name not in settings and (cost := rows[name].cost) is not None and cost.passes > CHEAP
    ]  # fmt: skip
    if settings:
        said += f" Another of ParchGrad's settings, {quoted(settings[0])}, has {number(mean[settings[0]])}."
    if dearer:
        cost = rows[dearer[0]].cost
        passes = f" at {cost.passes:.0f} passes" if cost is not None else ""
        said += f" {quoted(dearer[0])},{passes}, has {number(mean[dearer[0]])}."
    return said


def _elsewhere(results: Results, ours: Row) -> list[str]:
    """By every other measure with a direction: first, level with the first, or behind whom."""
    told = {measure.key for measure in headline(results)}
    first, level, behind = [], [], []
    bounded = False
    for measure in results.measures:
        if measure.section not in JUDGED_SECTIONS or measure.better is None or measure.key in told:
            continue
        ranking, bounded = _compared(results, measure.key, ours)
        if ours.name not in ranking or len(ranking) < 2:
            continue
        standing, words = _standing(results, measure.key, ours.name, ranking), name_of(measure)
        if standing.ahead:
            behind.append(f"{words} (behind {quoted(standing.ahead[0])})")
        elif standing.level:
            level.append(f"{words} (with {quoted(standing.level[0])})")
        else:
            first.append(words)
    parts = [f"first beyond chance in {_and(first)}"] if first else []
    parts += [f"not to be told apart from others in {_and(level)}"] if level else []
    parts += [f"not first, beyond chance, in {_and(behind)}"] if behind else []
    if not parts:
        return []
    among = "Among the same methods" if bounded else "By the other measures"
    return [f"{among}, {ours.name} is {'; '.join(parts)}."]


def _sanity(results: Results) -> list[str]:
    """Methods that look at the model and whose maps surely stay when it, or their table, is replaced by chance."""
    looking = {row.name for row in results.rows if row.group != "baseline"}
    said, tested = [], False
    for key, what in REPLACED.items():
        cells = {name: cell for name, cell in results.cells.get(key, {}).items() if name in looking}
        tested = tested or bool(cells)
        # Who does not look at the model explains none; a method may do without the table's classes.
        failing = ("stays", "blind") if key == "cascade" else ("stays",)
        stays = [name for name, cell in cells.items() if state(cell.interval) in failing]
        if stays:
            said.append(
                f"Fails a sanity check: {_brief(results, stays)}. With {what}, its maps stay much the same as before "
                f"(rank correlation beyond chance above {ALIKE:g})."
                if len(stays) == 1
                else f"Fail a sanity check: {_brief(results, stays)}. With {what}, their maps stay much the same as "
                f"before (rank correlation beyond chance above {ALIKE:g})."
            )
    if tested and not said:
        said.append("No method that looks at the model surely fails the sanity checks.")
    return said
