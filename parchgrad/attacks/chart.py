"""A report of attacks as curves over the strength, drawn by matplotlib; no colours of a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parchgrad.attacks.attack import KINDS
from parchgrad.attacks.report import Report, Row
from parchgrad.errors import OptionError
from parchgrad.files import beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")


def require_suffix(path: Path) -> None:
    """Raises OptionError for a file that cannot hold a chart."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError("chart", path.name, f"a file that ends in {', '.join(SUFFIXES)}")


def write_chart(report: Report, path: Path) -> None:
    """One panel an attack: accuracy and agreement of the maps by strength, with 95 % intervals. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    require_suffix(path)
    clean, *rows = report.rows()
    kinds = list(dict.fromkeys(row.attack.kind for row in rows if row.attack is not None))
    across = min(3, len(kinds))
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(3.4 * across, 2.7 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    for kind, panel in zip(kinds, panels, strict=False):
        _panel(panel, kind, clean, [row for row in rows if row.attack is not None and row.attack.kind == kind])
    panels[0].legend(frameon=False, fontsize=8)
    with beside(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def _panel(panel: Axes, kind: str, clean: Row, rows: list[Row]) -> None:
    ordered = sorted(rows, key=lambda row: row.attack.strength if row.attack else 0.0)
    strengths = [0.0, *(row.attack.strength for row in ordered if row.attack)]
    for name, style, marker in (("accuracy", "-", "o"), ("agreement", "--", "s")):
        found = [row.accuracy if name == "accuracy" else row.movement[name] for row in (clean, *ordered)]
        (line,) = panel.plot(
            strengths, [one.mean for one in found], style, marker=marker, markersize=4,
            label="accuracy" if name == "accuracy" else "agreement of the maps",
        )  # fmt: skip
        panel.fill_between(
            strengths, [one.low for one in found], [one.high for one in found], color=line.get_color(), alpha=0.15,
            linewidth=0,
        )  # fmt: skip
    panel.set_title(kind, fontsize=10)
    panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.02)
    panel.set_xlabel("strength, levels of 255" if KINDS[kind].levels else "strength", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
