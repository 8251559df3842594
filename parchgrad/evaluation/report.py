"""Scores and grids as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from parchgrad.evaluation.compare import LeftOut, Score
from parchgrad.evaluation.tune import Interval, Row, TuneResult, setting_words


def score_table(scores: Sequence[Score], title: str) -> Table:
    """One row a method: mass and hits with their standard errors, Gini."""
    view = Table("method", "mass", "hits", "Gini", title=title)
    for s in scores:
        mass, hits = f"{s.mass:.3f} ± {s.mass_error:.3f}", f"{s.hits:.3f} ± {s.hits_error:.3f}"
        view.add_row(s.method, mass, hits, f"{s.gini:.2f}")
    return view


def grid_table(result: TuneResult, names: Sequence[str]) -> Table:
    """Every setting on the first half of the images; `names` are the table's layers."""
    title = f"Choosing by {result.criterion}: {result.mosaics} mosaics, 95 % intervals; chance 0.25"
    return _rows(result.rows, result, names, title)


def measured_table(result: TuneResult, names: Sequence[str]) -> Table:
    """The chosen setting on the second half: what to expect of it."""
    title = f"Measuring: {result.mosaics} mosaics of images not used for choosing, 95 % intervals"
    return _rows(result.measured, result, names, title)


def tune_text(result: TuneResult, names: Sequence[str]) -> str:
    """What was chosen, why, and what to expect of it, in lines of text."""
    row = next(r for r in result.measured if r.kind == "setting" and r.defaults == result.chosen)
    chosen = ", ".join(f"{name} {value}" for name, value in setting_words(result.chosen, names).items())
    lines = [
        f"chosen    {chosen}",
        f"because   {result.reason}",
        f"expected  mass {_interval(row.mass)}; hits {_interval(row.hits)}",
        f"          {result.criterion} over random channels {_signed(result.over_random)}",
        f"          {result.criterion} over the plain gradient {_signed(row.over_gradient)}",
    ]
    return "\n".join(lines)


def left_out_line(left_out: LeftOut) -> str | None:
    """How many images were left out and why; None where none was."""
    used, unreadable = len(left_out.used), len(left_out.unreadable)
    if not used + unreadable:
        return None
    reasons = [f"{used:,} that the table was built from"] if used else []
    reasons += [f"{unreadable:,} that cannot be read"] if unreadable else []
    return f"Of {left_out.looked_at:,} images looked at, {' and '.join(reasons)} were left out."


def _rows(rows: Sequence[Row], result: TuneResult, names: Sequence[str], title: str) -> Table:
    several = len({row.defaults.conserve for row in rows if row.defaults is not None}) > 1
    headings = ["quantile", "gamma", "layers", *(["conserve"] if several else [])]
    view = Table("", *headings, "kept", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("mass", "hits", "over current", "over gradient"):
        view.add_column(heading, justify="right")
    for row in rows:
        words = {} if row.defaults is None else setting_words(row.defaults, names)
        figures = [_interval(row.mass), _interval(row.hits), _signed(row.over_current), _signed(row.over_gradient)]
        chosen = row.kind == "setting" and row.defaults == result.chosen
        cells = [_mark(row, result), *(words.get(heading, "") for heading in headings), f"{row.share:.2f}", *figures]
        view.add_row(*cells, style="bold" if chosen else None)
    return view


def _mark(row: Row, result: TuneResult) -> str:
    if row.kind != "setting":
        return {"random": "random channels", "gradient": "gradient"}[row.kind]
    marks = {"chosen": result.chosen, "current": result.rows[0].defaults, "best": result.best}
    return ", ".join([name for name, setting in marks.items() if row.defaults == setting][:2])


def _interval(i: Interval) -> str:
    return f"{i.mean:.3f} {i.low:.2f}..{i.high:.2f}"


def _signed(i: Interval) -> str:
    return f"{i.mean:+.3f} {i.low:+.2f}..{i.high:+.2f}"
