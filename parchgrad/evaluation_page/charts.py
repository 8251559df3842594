"""The drawings of an evaluation's page as places and lines, ready to be laid out; no colours and no text sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from parchgrad.evaluation.measures import Measure
from parchgrad.evaluation.results import REFERENCE, Floats, Results, Row
from parchgrad.evaluation_page.verdict import CHEAP, number, span

# Curves that are told apart by colour and dashes; all others are grey, and each once more by itself.
REFERENCES = {REFERENCE: "reference", "Grad-CAM": "cam", "random map": "chance"}
MOST_NAMES = 12  # of layers below the cascade
LETTER = 6.6  # about a letter's width in the scatter's units


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Strip:
    """A mean and its interval, in percent of the scale; None: there is no interval."""

    dot: float
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True)
class DotRow:
    row: Row
    strips: tuple[Strip | None, ...]


@dataclass(frozen=True)
class DotChart:
    """Methods below each other, the best by the first measure on top; the scales of `measures` beside each other."""

    measures: tuple[Measure, ...]
    ticks: tuple[tuple[Tick, ...], ...]
    chances: tuple[float | None, ...]  # in percent of the scale
    rows: tuple[DotRow, ...]


@dataclass(frozen=True)
class Line:
    id: str  # of the page
    name: str
    kind: str  # `ours`, one of REFERENCES' values or `other`
    points: str


@dataclass(frozen=True)
class Mark:
    row: Row
    x: float
    y: float
    low: float | None
    high: float | None
    words: str
    label: tuple[float, float, str] | None  # x, y, anchor; None where there is no room for it


@dataclass(frozen=True)
class Plot:
    """An SVG drawing. Ticks are in its units; `turned`: names below the horizontal axis are slanted."""

    title: str
    x_title: str
    y_title: str
    words: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()  # in the order they are drawn
    marks: tuple[Mark, ...] = ()
    bound: float | None = None  # x of a vertical line
    up: bool = True  # whether higher is better
    turned: bool = False
    width: int = 460
    height: int = 320
    left: int = 52
    right: int = 26
    top: int = 12
    bottom: int = 46

    @property
    def box(self) -> str:
        """The viewBox of the lines alone, with half a stroke's room."""
        return f"{self.left - 3} {self.top - 3} {self.width - self.left - self.right + 6} " + str(
            self.height - self.top - self.bottom + 6
        )

    @property
    def others(self) -> tuple[Line, ...]:
        """Lines that only a drawing of their own tells apart."""
        return tuple(line for line in self.lines if line.kind == "other")

    @property
    def compared(self) -> Line | None:
        """The line that stands beside each of `others`: ours, or the reference."""
        for kind in ("ours", "reference"):
            if found := next((line for line in self.lines if line.kind == kind), None):
                return found
        return None

    def x(self, share: float) -> float:
        return self.left + share * (self.width - self.left - self.right)

    def y(self, share: float) -> float:
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


@dataclass(frozen=True)
class Axis:
    """A scale that holds all its values, with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...] = field(default=())

    @classmethod
    def of(cls, values: Iterable[float], most: int = 6) -> Axis:
        """From 0 unless values are below it. Values that are not finite do not count."""
        finite = [value for value in values if math.isfinite(value)]
        low, high = min([0.0, *finite]), max([0.0, *finite])
        if high == low:
            high = low + 1.0
        rough = (high - low) / (most - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(place * step, 10) for place in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def share(self, value: float) -> float:
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def kind_of(results: Results, name: str) -> str:
    """How a method's curve is drawn."""
    ours = results.ours
    return "ours" if ours is not None and ours.name == name else REFERENCES.get(name, "other")


def dot_chart(results: Results, measures: Sequence[Measure]) -> DotChart:
    """Every method with a value of one of `measures`."""
    axes = []
    for measure in measures:
        ends = [cell.interval for cell in results.cells[measure.key].values()]
        values = [value for one in ends for value in (one.mean, one.low, one.high)]
        axes.append(Axis.of([*values, measure.chance or 0.0]))
    by_name = {row.name: row for row in results.rows}
    names = list(dict.fromkeys(name for measure in measures for name in results.ranking(measure.key)))
    rows = [
        DotRow(
            by_name[name],
            tuple(_strip(results, measure, axis, name) for measure, axis in zip(measures, axes, strict=True)),
        )
        for name in names
    ]
    return DotChart(
        tuple(measures),
        tuple(tuple(Tick(100 * axis.share(tick), _short(tick)) for tick in axis.ticks) for axis in axes),
        tuple(
            None if measure.chance is None else 100 * axis.share(measure.chance)
            for measure, axis in zip(measures, axes, strict=True)
        ),
        tuple(rows),
    )


def scatter(results: Results, measure: Measure) -> Plot | None:
    """Methods by cost and `measure`; None where fewer than two have both."""
    cells = results.cells[measure.key]
    there = [(row, cells[row.name].interval, row.cost) for row in results.rows if row.name in cells]
    points = [(row, interval, cost.passes) for row, interval, cost in there if cost is not None and cost.passes > 0]
    if len(points) < 2:
        return None
    axis = Axis.of(value for _, interval, _ in points for value in (interval.mean, interval.low, interval.high))
    least, most = min(passes for _, _, passes in points), max(CHEAP, *(passes for _, _, passes in points))
    low, high = math.log(min(1.0, least) * 0.92), math.log(most * 1.25)
    ours = results.ours
    blank = Plot(title="", x_title="", y_title="", words="", x_ticks=(), y_ticks=(), width=720, height=400)

    def across(passes: float) -> float:
        return blank.x((math.log(passes) - low) / (high - low))

    def up(value: float) -> float:
        return blank.y(axis.share(value))

    # Names are set where there is room: ours first, then the best.
    sign = 1 if measure.better == "lower" else -1
    points.sort(key=lambda one: (ours is None or one[0].name != ours.name, sign * one[1].mean))
    spots = [(across(passes), up(interval.mean)) for _, interval, passes in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    marks = []
    for (row, interval, passes), (x, y) in zip(points, spots, strict=True):
        label = _room(blank, row.name, x, y, taken)
        known = math.isfinite(interval.low)
        marks.append(
            Mark(
                row, x, y, up(interval.low) if known else None, up(interval.high) if known else None,
                f"{row.name}: {number(interval.mean)} at {passes:.1f} passes", label,
            )
        )  # fmt: skip
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= math.log(tick) <= high]
    return Plot(
        title=f"{measure.title} against cost",
        x_title="cost: prediction and map, in forward passes (logarithmic)",
        y_title=measure.title,
        words=f"{measure.title} of {len(points)} methods against their cost; the tables hold the numbers",
        x_ticks=tuple(Tick(across(tick), str(tick)) for tick in ticks),
        y_ticks=tuple(Tick(up(tick), _short(tick)) for tick in axis.ticks),
        marks=tuple(marks),
        bound=across(CHEAP),
        up=measure.better != "lower",
        width=720,
        height=400,
    )


def curves(results: Results, key: str, title: str, x_title: str) -> Plot | None:
    """Mean probability of the target at fractions of the pixels, by method."""
    by_name = results.curves.get(key, {})
    if not by_name:
        return None
    axis = Axis.of(np.concatenate([curve.mean for curve in by_name.values()]).tolist())
    blank = Plot(title, x_title, "", "", (), ())
    lines = [
        _line(
            results, name, f"line-{key}-{place}", blank, np.asarray(curve.fractions, np.float64),
            np.asarray(curve.mean, np.float64), axis,
        )
        for place, (name, curve) in enumerate(by_name.items())
    ]  # fmt: skip
    return Plot(
        title=title,
        x_title=x_title,
        y_title="target's mean probability",
        words=f"{title}: the target's mean probability by method; the area under each curve is in the tables",
        x_ticks=tuple(Tick(blank.x(share), f"{100 * share:.0f} %") for share in (0, 0.25, 0.5, 0.75, 1)),
        y_ticks=tuple(Tick(blank.y(axis.share(tick)), _short(tick)) for tick in axis.ticks),
        lines=_in_order(lines),
    )


def cascade(results: Results) -> Plot | None:
    """What is left of the map as weights are drawn anew from the last layer on; first of all, nothing is."""
    if not results.layers or not results.cascade:
        return None
    count = len(results.layers)
    axis = Axis.of([1.0, *np.concatenate([np.asarray(one) for one in results.cascade.values()]).tolist()])
    names = ["the model", *(_tail(name) for name in results.layers)]
    blank = Plot("", "", "", "", (), (), width=720, height=400, left=60, right=24, bottom=118)
    places = np.linspace(0, count, min(count, MOST_NAMES - 1) + 1).round().astype(int).tolist()
    shares = np.arange(count + 1) / count
    lines = [
        _line(
            results, name, f"line-cascade-{place}", blank, shares,
            np.concatenate([[1.0], np.asarray(one, np.float64)]), axis,
        )
        for place, (name, one) in enumerate(results.cascade.items())
    ]  # fmt: skip
    return Plot(
        title="Similarity with the model's map",
        x_title="",
        y_title="rank correlation",
        words="rank correlation with the model's map as its layers are drawn anew, by method",
        x_ticks=tuple(Tick(blank.x(place / count), names[place]) for place in places),
        y_ticks=tuple(Tick(blank.y(axis.share(tick)), _short(tick)) for tick in axis.ticks),
        lines=_in_order(lines),
        turned=True,
        width=blank.width, height=blank.height, left=blank.left, right=blank.right, bottom=blank.bottom,
    )  # fmt: skip


def _strip(results: Results, measure: Measure, axis: Axis, name: str) -> Strip | None:
    cell = results.cells[measure.key].get(name)
    if cell is None:
        return None
    one = cell.interval
    known = math.isfinite(one.low) and math.isfinite(one.high)
    return Strip(
        100 * axis.share(one.mean),
        100 * axis.share(one.low) if known else None,
        100 * axis.share(one.high) if known else None,
        f"{measure.title} {number(one.mean)}" + (f", 95 % interval {span(one.low, one.high)}" if known else ""),
    )


def _line(results: Results, name: str, ident: str, plot: Plot, x: Floats, y: Floats, axis: Axis) -> Line:
    there = np.isfinite(y)
    points = " ".join(
        f"{plot.x(float(a)):.1f},{plot.y(axis.share(float(b))):.1f}" for a, b in zip(x[there], y[there], strict=True)
    )
    return Line(ident, name, kind_of(results, name), points)


def _in_order(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Ours is drawn last, over the others."""
    order: Mapping[str, int] = {"other": 0, "ours": 2}
    return tuple(sorted(lines, key=lambda line: order.get(line.kind, 1)))


def _room(
    plot: Plot, name: str, x: float, y: float, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str] | None:
    """Where the name stands beside its mark without touching another; the place is then taken."""
    width = LETTER * len(name)
    for dx, dy, anchor in (
        (9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle"),
        (9, -9, "start"), (9, 17, "start"), (-9, -9, "end"), (-9, 17, "end"),
    ):  # fmt: skip
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = left, y + dy - 11, left + width, y + dy + 3
        inside = box[0] > plot.left + 3 and box[2] < plot.width and box[1] > 0 and box[3] < plot.height - plot.bottom
        if inside and not any(_meet(box, other) for other in taken):
            taken.append(box)
            return x + dx, y + dy, anchor
    return None


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tail(name: str, length: int = 20) -> str:
    """The end of a layer's name: its beginning is the same for many."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _short(value: float) -> str:
    return f"{value:.10g}".replace("-", "−")
