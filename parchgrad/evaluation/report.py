"""Results and grids as tables for the terminal, and what has to be said with them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parchgrad.evaluation.images import LeftOut
from parchgrad.evaluation.measures import Measure
from parchgrad.evaluation.results import Cell, Results
from parchgrad.evaluation.tune import FEWEST_IMAGES, Interval, Row, TuneResult, setting_words
from parchgrad.tables import SelectionTable

# Columns a narrow terminal does without, the first to go first.
DISPENSABLE = ("over gradient", "kept", "hits")

# Measures of the terminal's table, the most telling first.
TOLD = (
    "mosaic_mass", "mosaic_hits", "object_mass", "object_hits", "insertion", "deletion", "road", "cascade", "gini",
    "log_odds_gap", "max_sensitivity",
)  # fmt: skip

INTERVALS = "95 % intervals: t, of hits Wilson"


def results_table(results: Results, width: int | None = None) -> Table:
    """One row a method, its cost, and by measure the mean and half of its 95 % interval; * beyond the gradient's.

    Measures are left out, the last ones first, until it is no wider than `width` characters.
    """
    measures = [measure for key in TOLD for measure in results.measures if measure.key == key]
    for count in range(len(measures), 0, -1):
        view = _results(results, measures[:count])
        if width is None or natural_width(view) <= width:
            return view
    return _results(results, measures[:1])


def _results(results: Results, measures: Sequence[Measure]) -> Table:
    caption = (
        "passes: prediction and map over a prediction; ± half of the 95 % interval; * differs from the plain gradient "
        "beyond the interval of the difference"
    )
    view = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("", no_wrap=True)
    for heading in ("passes", *(f"{_kind(measure)}{measure.title}" for measure in measures)):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        cost = "" if row.cost is None else f"{row.cost.passes:.1f}"
        view.add_row(row.name, cost, *(_cell(results.cells[m.key].get(row.name)) for m in measures))
    return view


def _kind(measure: Measure) -> str:
    """Tells apart what has the same name of mosaics and of boxes."""
    return {"mosaics": "mosaic ", "objects": "object "}.get(measure.section, "")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    found = cell.interval
    half = (found.high - found.low) / 2
    return f"{found.mean:.3f}" + (f" ±{half:.3f}" if half == half else "") + ("*" if cell.distinct else " ")


def grid_table(result: TuneResult, names: Sequence[str], width: int | None = None) -> Table:
    """Every setting on the first half of the images; `names` are the table's layers.

    Columns are left out until it is no wider than `width` characters; nothing in it is ever cut.
    """
    title = f"Choosing by {result.criterion}: {result.mosaics} mosaics; chance 0.25; {INTERVALS}"
    return _fitting(result.rows, result, names, title, width)


def measured_table(result: TuneResult, names: Sequence[str], width: int | None = None) -> Table:
    """The chosen setting on the second half: what to expect of it. `width` as for `grid_table`."""
    title = f"Measuring: {result.mosaics} mosaics of images not used for choosing; chance 0.25; {INTERVALS}"
    return _fitting(result.measured, result, names, title, width)


def natural_width(view: Table) -> int:
    """Characters a table's rows need; its title and caption are folded to as many."""
    return Console(width=10_000).measure(view).maximum


def tune_text(result: TuneResult, table: SelectionTable) -> list[str]:
    """What was chosen, why, and what to expect of it: paragraphs, to be folded to any width."""
    names = table.layer_names
    row = next(r for r in result.measured if r.kind == "setting" and r.defaults == result.chosen)
    chosen = ", ".join(f"{name} {value}" for name, value in setting_words(result.chosen, names).items())
    paragraphs = [
        f"defaults {'unchanged' if result.chosen == result.current else 'changed'}",
        f"chosen    {chosen}",
        f"because   {result.reason}",
        f"expected  mass {_mean(row.mass)}; hits {_range(row.hits)} ({INTERVALS}); {result.criterion} over random "
        f"channels {_signed(result.over_random)}, over the plain gradient {_signed(row.over_gradient)}, over the "
        f"defaults before {_signed(row.over_current)}",
    ]
    if result.confirmed:
        paragraphs.append(
            "note      the mosaics of these figures also confirmed the change: had they not, it would not have been "
            "made, and so the figures are a little kind to it"
        )
    first, second = result.images
    paragraphs += [
        f"note      {classes_line(result.classes, table)}",
        f"note      Mosaics share images ({result.mosaics} of four from {first:,} images, and {result.mosaics} from "
        f"{second:,} others): intervals are for mosaics of these images and say nothing of other images.",
    ]
    return paragraphs


def classes_line(classes: int, table: SelectionTable) -> str:
    """What mosaics of so many classes can tell."""
    return (
        f"In these mosaics {classes:,} of the model's {len(table.labels):,} classes are contrasted, with each other "
        f"only; the table was built of {len(table.classes):,}, contrasted in the same way."
    )


def classes_left_out_line(left_out: LeftOut, table: SelectionTable) -> str | None:
    """Which classes had too few images; None where none had."""
    if not left_out.classes:
        return None
    shown = ", ".join(f"{index} ({table.labels[index]})" for index in left_out.classes[:5])
    more = f" and {len(left_out.classes) - 5:,} more" if len(left_out.classes) > 5 else ""
    return f"Left out, with fewer than {FEWEST_IMAGES} usable images: class {shown}{more}."


def uncovered_line(targets: Sequence[int], table: SelectionTable) -> str | None:
    """How many photographs, of these targets, class-wise selection can answer; None where it is all."""
    covered = sum(target in table.classes for target in targets)
    if covered == len(targets):
        return None
    return (
        f"The table has rows for the classes of {covered:,} of the {len(targets):,} photographs: class-wise maps are "
        "measured on these only, and are missing elsewhere."
    )


def left_out_line(left_out: LeftOut) -> str | None:
    """How many images were left out and why; None where none was."""
    used, unreadable = len(left_out.used), len(left_out.unreadable)
    if not used + unreadable:
        return None
    reasons = [f"{used:,} that the table was built from"] if used else []
    reasons += [f"{unreadable:,} that cannot be read"] if unreadable else []
    return f"Of {left_out.looked_at:,} images looked at, {' and '.join(reasons)} were left out."


def _fitting(rows: Sequence[Row], result: TuneResult, names: Sequence[str], title: str, width: int | None) -> Table:
    """The rows with as many columns as fit; at the least those that a choice is made by, set close.

    Rather than do without hits, columns are set close.
    """
    attempts = [(DISPENSABLE[:gone], padding) for gone, padding in ((0, 1), (1, 1), (2, 1), (2, 0), (3, 1))]
    for without, padding in attempts:
        view = _rows(rows, result, names, title, without, padding)
        if width is None or natural_width(view) <= width:
            return view
    return _rows(rows, result, names, title, DISPENSABLE, 0)


def _rows(
    rows: Sequence[Row], result: TuneResult, names: Sequence[str], title: str, without: Sequence[str], padding: int
) -> Table:
    several = len({row.defaults.conserve for row in rows if row.defaults is not None}) > 1
    headings = ["quantile", "gamma", "layers", *(["conserve"] if several else [])]
    figures = [name for name in ("kept", "mass", "hits", "over current", "over gradient") if name not in without]
    view = Table(
        title=title,
        caption=_caption(result, figures),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, padding, 0, 0),
    )
    for heading in ("", *headings):
        view.add_column(heading, no_wrap=True)
    for name in figures:
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        words = {} if row.defaults is None else setting_words(row.defaults, names)
        cells = {
            "kept": f"{row.share:.2f}",
            "mass": _mean(row.mass),
            "hits": _range(row.hits),
            "over current": _signed(row.over_current),
            "over gradient": _signed(row.over_gradient),
        }
        chosen = row.kind == "setting" and row.defaults == result.chosen
        view.add_row(
            _mark(row, result),
            *(words.get(heading, "") for heading in headings),
            *(cells[name] for name in figures),
            style="bold" if chosen else None,
        )
    return view


def _caption(result: TuneResult, figures: Sequence[str]) -> str:
    lines = [f"over ...: {result.criterion} minus theirs on the same mosaics."]
    if "kept" in figures:
        lines.append("kept: share of the channels whose gradient an explanation needs; a finite gamma needs all.")
    lines.append("random: the setting with channels drawn at random.")
    return " ".join(lines)


def _mark(row: Row, result: TuneResult) -> str:
    if row.kind != "setting":
        return row.kind
    marks = {"chosen": result.chosen, "current": result.current, "best": result.best}
    return ", ".join([name for name, setting in marks.items() if row.defaults == setting][:2])


def _mean(i: Interval) -> str:
    return f"{i.mean:.3f} ±{i.high - i.mean:.3f}"


def _signed(i: Interval) -> str:
    return f"{i.mean:+.3f} ±{i.high - i.mean:.3f}"


def _range(i: Interval) -> str:
    return f"{i.mean:.2f} {i.low:.2f}-{i.high:.2f}"
