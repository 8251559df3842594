"""A picture of each dashboard, drawn from its JSON and a Prometheus' answers with matplotlib. It is not Grafana's own.

`python -m deploy.grafana.picture --prometheus URL --minutes 10 --out docs` writes docs/dashboard_*.png: every panel at
its place, with its title, unit and limits, for looking over a dashboard where no Grafana is.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from deploy.grafana import queries
from deploy.grafana.queries import Series, Shown
from deploy.grafana.write import FOLDER

NAMES = ("service", "explanations", "capacity")
CAPTION = "Drawn from the dashboard's JSON by deploy.grafana.picture, not by Grafana"
COLUMN, ROW = 0.66, 0.36  # inches of a column and a row of Grafana's grid
POINTS = 200  # of a line
COLOURS = {"green": "#2f8f4e", "orange": "#e08a00", "red": "#c4302b", "blue": "#2f6db3"}
LEGEND_LINES = 9  # more are counted, not named


def scaled(value: float, unit: str) -> str:
    """A value as Grafana prints it in this unit, nearly."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        for size, name in ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s")):
            if abs(value) < 1000 * size:
                return f"{value / size:.3g} {name}"
        return f"{value / 60:.3g} min"
    if unit == "bytes":
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value:.0f} B"
    name = {"short": "", "reqps": " req/s", "cps": "/s"}.get(unit, f" {unit}")
    return f"{value:.3g}{name}" if abs(value) < 1000 else f"{value:.0f}{name}"


def thresholds(panel: Shown) -> list[tuple[float, str]]:
    """(from this value on, colour), the first one without a beginning."""
    steps = panel.definition["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    return [(-math.inf if one["value"] is None else one["value"], one["color"]) for one in steps]


def colour(panel: Shown, value: float) -> str:
    """Of a number: what its threshold says."""
    chosen = [name for begins, name in thresholds(panel) if value >= begins]
    return COLOURS[chosen[-1] if chosen else "blue"]


def _time_axis(axes: Axes, start: float, end: float) -> None:
    axes.set_xlim(start, end)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"))


def _times(series: Series) -> list[float]:
    return [at for at, _ in series.points]


def _lines(axes: Axes, panel: Shown, found: Sequence[tuple[str, Series]], start: float, end: float) -> None:
    custom = panel.definition["fieldConfig"]["defaults"].get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    defaults = panel.definition["fieldConfig"]["defaults"]
    if stacked:  # the largest below; lines keep their queries' order, so that one colour means one thing
        found = sorted(found, key=lambda one: -np.nanmean([value for _, value in one[1].points]))
    palette = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    if stacked and found:
        moments = sorted({at for _, one in found for at, _ in one.points})
        rows = [[dict(one.points).get(at, 0.0) for at in moments] for _, one in found]
        axes.stackplot(
            moments,
            np.nan_to_num(np.array(rows)),
            labels=[name for name, _ in found],
            colors=[palette[i % 10] for i in range(len(found))],
            alpha=0.75,
        )
    else:
        for place, (name, one) in enumerate(found):
            axes.plot(_times(one), [value for _, value in one.points], label=name, lw=1.1, color=palette[place % 10])
    low, high = axes.get_ylim()
    axes.set_ylim(
        defaults.get("min", low),
        defaults.get("max", high if any(value for _, one in found for _, value in one.points) else 1.0),
    )
    low, high = axes.get_ylim()
    for begins, name in thresholds(panel):
        if custom.get("thresholdsStyle", {}).get("mode") == "dashed" and low < begins <= high:
            axes.axhline(begins, color=COLOURS[name], ls="--", lw=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value, panel.unit)))
    axes.grid(alpha=0.25, lw=0.5)
    _time_axis(axes, start, end)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > LEGEND_LINES:
        handles, labels = handles[:LEGEND_LINES], labels[:LEGEND_LINES]
        labels[-1] += f"  (+{len(found) - LEGEND_LINES})"
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncols=3, fontsize=5.6, frameon=False,
        handlelength=1.1, columnspacing=0.9, labelspacing=0.25, borderaxespad=0.0,
    )  # fmt: skip


def _heat(axes: Axes, panel: Shown, found: Sequence[tuple[str, Series]], start: float, end: float) -> None:
    """Buckets are cumulative: what each row adds to the one below. Rows are as high as each other, as in Grafana."""
    bounds = sorted((float(name), one) for name, one in found)
    moments = sorted({at for _, one in bounds for at, _ in one.points})
    counts = np.array([[dict(one.points).get(at, 0.0) for at in moments] for _, one in bounds])
    cells = np.diff(np.nan_to_num(counts), axis=0, prepend=0.0).clip(min=0)
    filled = np.flatnonzero(cells.sum(axis=1) > 0)
    first, last = (max(filled[0] - 1, 0), filled[-1] + 1) if filled.size else (0, len(bounds))
    cells = np.sqrt(cells[first:last])
    shown = np.ma.masked_where(cells <= 0, cells)
    edges = [*moments, moments[-1] + moments[-1] - moments[-2]]
    axes.pcolormesh(edges, np.arange(last - first + 1), shown, cmap="Oranges", vmin=0)
    names = ["∞" if math.isinf(bound) else scaled(bound, panel.unit) for bound, _ in bounds[first:last]]
    step = math.ceil(len(names) / 7)
    axes.set_yticks(np.arange(1, len(names) + 1)[::step], names[::step])
    _time_axis(axes, start, end)


def _number(axes: Axes, panel: Shown, found: Sequence[tuple[str, Series]], start: float, end: float) -> None:
    axes.axis("off")
    values = [value for _, one in found for _, value in one.points[-1:] if not math.isnan(value)]
    text = scaled(values[0], panel.unit) if values else panel.definition["fieldConfig"]["defaults"].get("noValue", "–")
    shade = colour(panel, values[0]) if values else "grey"
    size = 17 if values else 9
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=size, color=shade, transform=axes.transAxes)


def _bars(axes: Axes, panel: Shown, found: Sequence[tuple[str, Series]], start: float, end: float) -> None:
    latest = sorted((one.points[-1][1], name) for name, one in found if one.points)
    shades = [colour(panel, value) for value, _ in latest]
    axes.barh([name for _, name in latest], [value for value, _ in latest], color=shades, height=0.65)
    top = max((value for value, _ in latest), default=1.0) or 1.0
    for place, (value, _) in enumerate(latest):
        axes.text(value + 0.015 * top, place, scaled(value, panel.unit), va="center", fontsize=6)
    axes.set_xlim(0, 1.18 * top)
    axes.set_ylim(len(latest) - max(len(latest), 6) - 0.5, len(latest) - 0.5)  # a few bars stay slim
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def _table(axes: Axes, panel: Shown, found: Sequence[tuple[str, Series]], start: float, end: float) -> None:
    axes.axis("off")
    order = panel.definition["transformations"][0]["options"]["indexByName"]
    columns = sorted(order, key=lambda name: int(order[name]))
    rows = [[one.labels.get(name, "") for name in columns] for _, one in found]
    made = axes.table(cellText=rows or [[""] * len(columns)], colLabels=columns, loc="upper center", cellLoc="left")
    made.auto_set_font_size(False)
    made.set_fontsize(7)
    for cell in made.get_celld().values():
        cell.set_linewidth(0.3)


Draw = Callable[[Axes, Shown, Sequence[tuple[str, Series]], float, float], None]
DRAW: Mapping[str, Draw] = {"timeseries": _lines, "heatmap": _heat, "stat": _number, "bargauge": _bars, "table": _table}


def answers(
    prometheus: str, board: Mapping[str, Any], panel: Shown, start: float, end: float
) -> list[tuple[str, Series]]:
    """Every series of a panel with its name. A heat map's cells do not overlap, so its step is its interval."""
    step = (end - start) / (60 if panel.type == "heatmap" else POINTS)
    interval = f"{math.ceil(step if panel.type == 'heatmap' else max(4 * step, 20.0))}s"
    found = []
    for target in panel.targets:
        expr = queries.substituted(target.expr, board, interval)
        series = queries.now(prometheus, expr) if target.instant else queries.course(prometheus, expr, start, end, step)
        found += [(queries.named(target.legend, one.labels), one) for one in series]
    return [(name, one) for name, one in found if any(not math.isnan(value) for _, value in one.points)]


def draw(prometheus: str, board: Mapping[str, Any], start: float, end: float) -> Figure:
    """The whole dashboard, panels that found nothing with a note."""
    everything = board["panels"]
    height = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in everything)
    inches = 24 * COLUMN, (height + 2) * ROW
    figure = Figure(figsize=inches, facecolor="white")

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """Grid units from the top left -> figure fractions from the bottom left."""
        return x / 24, 1 - (y + 1.6 + h) / (height + 2), w / 24, h / (height + 2)

    figure.text(0.01, 1 - 0.5 / (height + 2), board["title"], fontsize=13, weight="bold", va="center")
    figure.text(0.99, 1 - 0.5 / (height + 2), CAPTION, fontsize=8, ha="right", va="center", color="grey")
    for one in everything:
        if one["type"] == "row":
            left, bottom, _, tall = box(*(one["gridPos"][side] for side in "xywh"))
            figure.text(left + 0.008, bottom + tall / 2, one["title"], fontsize=9, weight="bold", va="center")
    for panel in queries.panels(board):
        x, y, w, h = panel.place
        found = answers(prometheus, board, panel, start, end)
        margin = {
            "timeseries": (1.0, 1.0, 0.25, 2.0),
            "heatmap": (1.0, 1.0, 0.25, 0.9),
            "bargauge": (2.6, 1.0, 0.2, 0.2),
        }
        before, above, after, below = margin.get(panel.type, (0.2, 1.0, 0.2, 0.2))
        axes = figure.add_axes(box(x + before, y + above, w - before - after, h - above - below))
        axes.tick_params(labelsize=6, length=2, pad=1.5)
        axes.spines[:].set_linewidth(0.4)
        left, bottom, _, tall = box(x, y, w, h)
        figure.text(left + 0.008, bottom + tall - 0.45 / (height + 2), panel.title, fontsize=8, va="center")
        if found or panel.type == "stat":
            DRAW[panel.type](axes, panel, found, start, end)
        else:
            axes.axis("off")
            axes.text(0.5, 0.5, "No data", ha="center", va="center", color="grey", transform=axes.transAxes)
    return figure


def save(figure: Figure, path: Path, dpi: int = 92) -> None:
    """As a PNG of 64 colours: a third of the size, and no eye sees it on a chart."""
    figure.savefig(path, dpi=dpi)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(64).save(path, optimize=True)


@click.command(help=__doc__)
@click.option("--prometheus", required=True, help="address of a Prometheus that scrapes the service with our rules")
@click.option("--minutes", default=15.0, show_default=True, help="how far back the pictures go")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder of the pictures")
def main(prometheus: str, minutes: float, out: Path) -> None:
    end = time.time()
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = out / f"dashboard_{name}.png"
        save(draw(prometheus, queries.read(FOLDER / f"{name}.json"), end - 60 * minutes, end), path)
        click.echo(f"{path} {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
