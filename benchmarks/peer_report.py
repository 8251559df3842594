"""What `benchmarks.peers` found, and how it is shown: a table with bars, Markdown, a chart."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.measuring import Memory
from benchmarks.peer_methods import EAGER, GRADIENT, PACKAGES

LONGEST = 6.0  # ratio of a full bar; longer ones are cut
COLOURS = {"prediction": "#9aa5b1", "peer": "#c98b4b", "gradient": "#6b7a90", "ours": "#1f8a70"}
BAR_COLOURS = {"prediction": "bright_black", "peer": "yellow", "gradient": "blue", "ours": "green"}


@dataclass(frozen=True)
class Line:
    """One row of one cell: CPU seconds a call and their ratio to the fastest prediction, round by round."""

    name: str
    kind: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    memory: Memory | None = None
    note: str = ""  # why there are no figures

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Cell:
    """One network at one batch size; `fastest` is the prediction that the ratios are to."""

    model: str
    batch: int
    fastest: str
    lines: list[Line]

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def with_memory(self, memory: dict[str, Memory]) -> Cell:
        return replace(self, lines=[replace(line, memory=memory.get(line.name)) for line in self.lines])

    def peak_over(self, line: Line, base: str) -> float | None:
        """Peak memory of a line over that of the row `base`."""
        by = next((other.memory for other in self.lines if other.name == base), None)
        return None if line.memory is None or by is None or by.peak == 0 else line.memory.peak / by.peak


@dataclass(frozen=True)
class Curve:
    """Ratios against something: for each series and each of `values` one list of rounds."""

    model: str
    against: str
    values: tuple[float, ...]
    series: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Report:
    """One run of the benchmark."""

    versions: dict[str, str]
    runs: int
    cells: list[Cell] = field(default_factory=list)
    classes: list[ClassMemory] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def heading(self) -> str:
        peers = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"Process CPU time, one thread, {self.runs} interleaved rounds. {peers}."


@dataclass(frozen=True)
class ClassMemory:
    """Memory of one row of a network of so many classes, after many of them were explained."""

    model: str
    batch: int
    classes: int
    row: str
    memory: Memory


def versions() -> dict[str, str]:
    """Of everything that is compared, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def show(console: Console, cell: Cell) -> None:
    """The table of one cell."""
    base = 1000 * statistics.median(cell.line(cell.fastest).seconds)
    title = f"{cell.model}, batch {cell.batch}: x the fastest prediction ({cell.fastest}, {base:.1f} ms)"
    columns = ("row", "CPU ms", "x predict", "spread", "", "held MiB", "peak MiB", "peak x predict", "peak x gradient")
    view = Table(*columns, title=title)
    kind = cell.lines[0].kind
    for line in cell.lines:
        if line.kind != kind:
            view.add_section()
            kind = line.kind
        if not line.seconds:
            view.add_row(line.name, "", "", "", Text(line.note, style="dim", overflow="fold"))
            continue
        held = "" if line.memory is None else f"{line.memory.held:.0f}"
        peak = "" if line.memory is None else f"{line.memory.peak:.0f}"
        bar = Bar(LONGEST, 0, min(line.ratio, LONGEST), width=30, color=BAR_COLOURS[line.kind])
        view.add_row(
            line.name, f"{1000 * statistics.median(line.seconds):.1f}", f"{line.ratio:.2f}", spread(line.ratios), bar,
            held, peak, number(cell.peak_over(line, EAGER)), number(cell.peak_over(line, GRADIENT)),
        )  # fmt: skip
    console.print(view)


def show_rest(console: Console, report: Report) -> None:
    """The table of classes and the curves."""
    for heading, rows in (*_classes_table(report), *(_curve_table(curve) for curve in report.curves)):
        view = Table(*rows[0], title=heading)
        for row in rows[1:]:
            view.add_row(*row)
        console.print(view)


def markdown(report: Report) -> str:
    """Every table as Markdown: time and memory for each batch size, a column for each network."""
    parts = [report.heading()]
    for batch in sorted({cell.batch for cell in report.cells}):
        cells = [cell for cell in report.cells if cell.batch == batch]
        names = [(line.name, line.kind) for line in cells[0].lines]
        times = [["row", *(cell.model for cell in cells)]]
        times.append(
            [
                "fastest prediction, CPU ms",
                *(f"{1000 * statistics.median(c.line(c.fastest).seconds):.1f}" for c in cells),
            ]
        )
        times += [[name, *(_time(cell.line(name)) for cell in cells)] for name, _ in names]
        parts += [f"**Time, batch {batch}**: x the fastest prediction, median (least-most)", _table(times)]
        if any(line.memory for cell in cells for line in cell.lines):
            rows = [["row", *(cell.model for cell in cells)]]
            rows += [
                [name, *(_memory(cell, cell.line(name)) for cell in cells)]
                for name, _ in names
                if any(cell.line(name).memory for cell in cells)
            ]
            parts += [f"**Peak memory, batch {batch}**: MiB; x eager prediction; x {GRADIENT}", _table(rows)]
    for heading, rows in (*_classes_table(report), *(_curve_table(curve) for curve in report.curves)):
        parts += [f"**{heading}**", _table(rows)]
    left_out = [
        f"- {c.model}, batch {c.batch}: {line.name}: {line.note}" for c in report.cells for line in c.lines if line.note
    ]
    if left_out:
        parts += ["Without figures:", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def draw(report: Report, path: Path) -> None:
    """Bars for every cell, then the curves; the format is the file's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({cell.batch for cell in report.cells})
    models = list(dict.fromkeys(cell.model for cell in report.cells))
    names = [line.name for line in report.cells[0].lines if line.kind != "prediction"]
    columns = 3
    bar_rows = -(-len(models) // columns)
    curve_rows = -(-len(report.curves) // columns)
    heights = [0.25 * len(names) * len(batches) ** 0.6 + 0.9] * bar_rows + [3.2] * curve_rows
    figure = Figure(figsize=(15, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(bar_rows + curve_rows, columns, height_ratios=heights)
    for index, model in enumerate(models):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        cells = [cell for cell in report.cells if cell.model == model]
        _bars(axes, cells, names, labelled=index % columns == 0)
        axes.set_title(model)
    for index, curve in enumerate(report.curves):
        axes = figure.add_subplot(grid[bar_rows + index // columns, index % columns])
        _curve(axes, curve)
    figure.suptitle(
        "Prediction and map, in units of the fastest prediction (process CPU time, one thread)", fontsize=13
    )
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _time(line: Line) -> str:
    return f"{line.ratio:.2f} ({spread(line.ratios)})" if line.ratios else "-"


def _memory(cell: Cell, line: Line) -> str:
    if line.memory is None:
        return "-"
    ratios = "; ".join(number(cell.peak_over(line, base)) or "-" for base in (EAGER, GRADIENT))
    return f"{line.memory.peak:.0f}; {ratios}"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _classes_table(report: Report) -> list[tuple[str, list[list[str]]]]:
    if not report.classes:
        return []
    rows = [["network", "classes", "row", "held MiB", "peak MiB"]]
    rows += [
        [f"{c.model}, batch {c.batch}", f"{c.classes}", c.row, f"{c.memory.held:.1f}", f"{c.memory.peak:.1f}"]
        for c in report.classes
    ]
    return [("Memory and the number of classes", rows)]


def _curve_table(curve: Curve) -> tuple[str, list[list[str]]]:
    rows = [[curve.against.partition(",")[0], *(f"{value:g}" for value in curve.values)]]
    rows += [
        [name, *(f"{statistics.median(r):.2f} ({spread(r)})" for r in ratios)] for name, ratios in curve.series.items()
    ]
    return f"{curve.model}: x the fastest eager prediction, against {curve.against}", rows


def _bars(axes, cells: list[Cell], names: list[str], labelled: bool) -> None:  # type: ignore[no-untyped-def]
    height = 0.8 / len(cells)
    for number_of_cell, cell in enumerate(cells):
        for position, name in enumerate(names):
            line = cell.line(name)
            y = position + (number_of_cell - (len(cells) - 1) / 2) * height
            label_style = {"va": "center", "fontsize": 7, "color": "#333333"}
            if not line.ratios:
                axes.text(0.06, y, f"batch {cell.batch}: {line.note.partition(':')[0]}", **label_style)
                continue
            shade = 1.0 if number_of_cell == 0 else 0.55
            axes.barh(y, min(line.ratio, LONGEST), height, color=COLOURS[line.kind], alpha=shade)
            beyond = " (cut)" if line.ratio > LONGEST else ""
            axes.text(min(line.ratio, LONGEST) + 0.06, y, f"{line.ratio:.2f}{beyond}", **label_style)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8)
    axes.set_xlim(0, LONGEST * 1.2)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    batches = ", then lighter ".join(str(cell.batch) for cell in cells)
    axes.set_xlabel(f"x predict, batch {batches}", fontsize=8)


def _curve(axes, curve: Curve) -> None:  # type: ignore[no-untyped-def]
    for name, rounds in curve.series.items():
        (line,) = axes.plot(curve.values, [statistics.median(r) for r in rounds], marker=".", label=name)
        axes.fill_between(
            curve.values, [min(r) for r in rounds], [max(r) for r in rounds], alpha=0.15, color=line.get_color()
        )
    if curve.against == "batch":
        axes.set_xscale("log", base=2)
        axes.set_xticks(curve.values, [f"{value:g}" for value in curve.values])
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{curve.model}, against {curve.against}", fontsize=10)
    axes.set_xlabel(curve.against.partition(",")[0], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
