"""An evaluation's page: one self-contained HTML file, written from `page.html.j2`."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from parchgrad.evaluation.cases import Case
from parchgrad.evaluation.intervals import CONFIDENCE
from parchgrad.evaluation.measures import MEASURES, SECTIONS, Measure, Section
from parchgrad.evaluation.results import FEWEST_IMAGES, REFERENCE, Cell, Results, Row
from parchgrad.evaluation_page import charts, pictures, verdict
from parchgrad.files import write_text

GROUPS = {
    "baseline": "Baselines that look at no model",
    "gradient": "Gradients",
    "peer": "Other libraries' methods",
    "parchgrad": "ParchGrad",
    "control": "Controls: ParchGrad with a table of no meaning",
}
# Sections that share a table: as many columns as a sheet of paper holds.
TABLES = (("mosaics", "objects"), ("perturbation",), ("checks",), ("shape",))
# Figures that stand below each picture of the gallery.
BELOW_PICTURES = ("mosaic_mass", "mosaic_hits", "object_mass", "object_hits", "insertion", "deletion")
HITS = ("mosaic_hits", "object_hits")
# Why a method has no value, where the measure says so itself.
ONLY_SOME = {
    "completeness_gap": "does not claim that its attributions add up",
    "classes_similarity": "has no table, or one of no meaning already",
    "channels_similarity": "has no table, or one of no meaning already",
}
# Of the settings: in a block to be copied, and with each method.
SHOWN_ELSEWHERE = ("command", "methods")
NOT_MEASURED, NO_VALUE = "was not measured", "has no value on any of the pictures"
STATES = {
    "stays": "more alike", "changes": "less alike", "open": "not clear", "few": "too few", "blind": "not looked at",
}  # fmt: skip
# These stand in the table of sanity checks, not in that of all figures.
CHECKS = tuple(verdict.REPLACED)
# Settings that name a place: of it the last part is shown, for a page is passed on, the folders of a machine are not.
PLACES = ("root", "path", "folder", "file")
MOSAIC = "a mosaic is four photographs of different classes in one picture"


@dataclass(frozen=True)
class _Field:
    """A cell of the main tables. `mark`: `better` or `worse` than the plain gradient beyond chance."""

    cell: Cell | None
    missing: str
    mark: str | None
    best: bool


@dataclass(frozen=True)
class _Group:
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Columns:
    """One section's measures. `pictures` says how many there are; `counts` of each measure, where they differ."""

    section: Section
    measures: tuple[Measure, ...]
    pictures: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class _Table:
    """Sections' measures, methods down and measures across; `missing` says whose cells are empty, and why."""

    sections: tuple[_Columns, ...]
    groups: tuple[_Group, ...]
    fields: Mapping[str, Mapping[str, _Field]]  # by method and measure
    missing: tuple[str, ...]

    @property
    def measures(self) -> list[Measure]:
        return [measure for columns in self.sections for measure in columns.measures]

    @property
    def key(self) -> str:
        return self.sections[0].section.key

    @property
    def title(self) -> str:
        return " · ".join(columns.section.title for columns in self.sections)


def write_page(results: Results, cases: Sequence[Case], path: str | os.PathLike[str]) -> None:
    """Write `results` as one HTML file that needs nothing else: no other file, no network, no script.

    `cases` are the pictures of its gallery, `choose` of evaluation/cases.py picks them; the page grows by about 10 kB
    a map shown. Raises OSError.
    """
    write_text(Path(path), _render(_context(results, cases)))


def _context(results: Results, cases: Sequence[Case]) -> dict[str, Any]:
    ours = results.ours
    heads = verdict.headline(results)
    measured = [one for one in results.measures if results.cells[one.key]]
    pairs = [found for keys in verdict.HEADLINES[:2] if (found := [one for one in measured if one.key in keys])]
    plots = [
        charts.curves(results, "insertion", "Insertion: higher is better", "pixels given back"),
        charts.curves(results, "deletion", "Deletion: lower is better", "pixels taken away"),
    ]
    shown = {name: value for name, value in results.settings.items() if name not in SHOWN_ELSEWHERE}
    return {
        "results": results,
        "title": _title(results.settings),
        "verdict": verdict.sentences(results),
        "heads": heads,
        "spoken_of": verdict.spoken_of(results),
        "mosaic": MOSAIC if any(one.kind == "mosaic" for one in results.shown) else None,
        "fewest": FEWEST_IMAGES,
        "facts": _facts(results),
        "tables": [table for keys in TABLES if (table := _table(results, keys))],
        "section_titles": {section.key: section.title for section in SECTIONS},
        "dots": [charts.dot_chart(results, pair) for pair in pairs or ([list(heads)] if heads else [])],
        "scatter": charts.scatter(results, heads[0]) if heads else None,
        "curves": [plot for plot in plots if plot is not None],
        "curve_pictures": _range(
            [one.images for by_name in results.curves.values() for one in by_name.values()], "picture"
        ),
        "cascade": charts.cascade(results),
        "checks": _checks(results),
        "cases": [_case(results, case) for case in cases],
        "measures": results.measures,
        "settings": list(_flat(shown)),
        "command": _command(results.settings),
        "groups": _groups(results),
        "ours": ours.name if ours else None,
        "reference": REFERENCE if any(row.name == REFERENCE for row in results.rows) else None,
        "confidence": round(100 * CONFIDENCE),
        "cheap": verdict.CHEAP,
        "alike": verdict.ALIKE,
        "replaced": {
            key: (what, verdict.counted(results, results.pictures[key]))
            for key, what in verdict.REPLACED.items()
            if results.cells.get(key)
        },
        "smooth": pictures.SMOOTH,
    }


def _title(settings: Mapping[str, Any]) -> tuple[str, str]:
    """The model and the data, as far as the settings name them."""
    return _named(settings.get("model"), "a model"), _named(settings.get("data"), "")


def _named(value: Any, otherwise: str) -> str:
    if isinstance(value, Mapping):
        if value.get("name"):
            return str(value["name"])
        place = next((str(value[key]) for key in PLACES if value.get(key)), "")
        return _last_part(place) or otherwise
    if isinstance(value, (list, tuple)):
        return ", ".join(str(one) for one in value) or otherwise
    return str(value) if value not in (None, "") else otherwise


def _facts(results: Results) -> list[tuple[str, str]]:
    facts = [("methods", str(len(results.rows)))]
    for kind, words in (("mosaic", "pictures of four photographs"), ("photograph", "pictures of one")):
        shown = [one for one in results.shown if one.kind == kind]
        if shown:
            targets = len({one.target for one in shown})
            classes = f"{targets:,} class{'es' if targets != 1 else ''}"
            facts.append((words, f"{verdict.plural(len(shown), kind)}, of {classes}"))
    whole = [one for one in results.shown if one.kind == "photograph"]
    if whole:
        right = sum(one.predicted for one in whole) / len(whole)
        facts.append(("photographs whose class the model predicts", f"{100 * right:.0f} %"))
    return facts


def _groups(results: Results) -> tuple[_Group, ...]:
    known = [*GROUPS, *dict.fromkeys(row.group for row in results.rows if row.group not in GROUPS)]
    return tuple(
        _Group(GROUPS.get(group, group), rows)
        for group in known
        if (rows := tuple(row for row in results.rows if row.group == group))
    )


def _table(results: Results, keys: Sequence[str]) -> _Table | None:
    """The table of these sections, None where nothing was measured of them."""
    sections = tuple(columns for one in SECTIONS if one.key in keys and (columns := _columns(results, one)))
    if not sections:
        return None
    measures = [measure for columns in sections for measure in columns.measures]
    best = {measure.key: _best(results, measure) for measure in measures}
    fields = {
        row.name: {measure.key: _field(results, measure, row.name, best[measure.key]) for measure in measures}
        for row in results.rows
    }
    return _Table(sections, _groups(results), fields, tuple(_missing(results, measures, fields)))


def _columns(results: Results, section: Section) -> _Columns | None:
    measures = tuple(
        one
        for one in results.measures
        if one.section == section.key and one.key not in CHECKS and results.cells[one.key]
    )
    if not measures:
        return None
    sizes = {
        measure.key: (len(indices), len({results.shown[index].group for index in indices}))
        for measure in measures
        for indices in (results.pictures[measure.key],)
    }
    if len(set(sizes.values())) > 1:
        words = "How many pictures stands above each column"
        return _Columns(section, measures, words, {key: size for key, (size, _) in sizes.items()})
    return _Columns(section, measures, verdict.counted(results, results.pictures[measures[0].key]), {})


def _best(results: Results, measure: Measure) -> set[str]:
    """The methods whose mean reads as the best does; none where all read the same.

    No candidates are means of fewer than FEWEST_IMAGES photographs, those no better than chance and, of the checks,
    baselines: they look at no model.
    """
    blind = {row.name for row in results.rows if row.group == "baseline"} if measure.section == "checks" else set()
    intervals = {name: cell.interval for name, cell in results.cells[measure.key].items() if name not in blind}
    if measure.better is None or len({verdict.number(one.mean) for one in intervals.values()}) < 2:
        return set()
    sign = -1 if measure.better == "lower" else 1
    means = {
        name: one.mean
        for name, one in intervals.items()
        if one.images >= FEWEST_IMAGES
        and math.isfinite(one.low)
        and (measure.chance is None or sign * (one.mean - measure.chance) > 0)
    }
    most = verdict.number(max(means.values(), key=lambda mean: sign * mean)) if means else None
    return {name for name, mean in means.items() if verdict.number(mean) == most}


def _field(results: Results, measure: Measure, name: str, best: set[str]) -> _Field:
    cell = results.cells[measure.key].get(name)
    if cell is None:
        given = results.values[measure.key].get(name)
        why = NO_VALUE if given is not None else ONLY_SOME.get(measure.key, NOT_MEASURED)
        return _Field(None, why, None, False)
    mark = None
    if cell.distinct and cell.difference is not None and measure.better is not None:
        mark = "better" if (cell.difference.mean > 0) == (measure.better == "higher") else "worse"
    return _Field(cell, "", mark, name in best)


def _missing(
    results: Results, measures: Sequence[Measure], fields: Mapping[str, Mapping[str, _Field]]
) -> Iterator[str]:
    """A line for each measure and reason."""
    for measure in measures:
        by_reason: dict[str, list[str]] = {}
        for row in results.rows:
            if why := fields[row.name][measure.key].missing:
                by_reason.setdefault(why, []).append(row.name)
        for why, names in by_reason.items():
            methods = verdict.listed(names) if len(names) <= 3 else f"each of {len(names)} methods"
            yield f"{measure.title}: {methods} {why}."


def _checks(results: Results) -> list[tuple[Row, dict[str, Any]]]:
    """Each method's state under every check, by measure key."""
    found = []
    for row in results.rows:
        by_key: dict[str, Any] = {}
        for key in CHECKS:
            if (cell := results.cells.get(key, {}).get(row.name)) is not None:
                state = verdict.state(cell.interval)
                by_key[key] = {"cell": cell, "state": state, "words": STATES[state]}
        if by_key:
            found.append((row, by_key))
    return found


def _case(results: Results, case: Case) -> dict[str, Any]:
    maps = []
    ours = results.ours
    for row in sorted(results.rows, key=lambda row: ours is None or row.name != ours.name):
        saliency = case.maps.get(row.name)
        picture = None
        empty = saliency is not None and not np.any(saliency)
        if saliency is not None and np.isfinite(saliency).all():
            side = pictures.LARGE if ours is not None and row.name == ours.name else pictures.SIDE
            picture = pictures.explained(case.pixels, saliency, case.mask, side)
        figures = case.figures.get(row.name, {})
        maps.append(
            {
                "row": row,
                "picture": picture,
                "figures": ["zeros only"] * empty
                + [
                    _below(measure, figures[measure.key])
                    for measure in MEASURES
                    if measure.key in BELOW_PICTURES
                    and math.isfinite(figures.get(measure.key, math.nan))
                    and not (empty and measure.key in HITS)
                ],
            }
        )
    return {"case": case, "photograph": pictures.photograph(case.pixels, case.mask), "maps": maps}


def _below(measure: Measure, value: float) -> str:
    if measure.key in HITS:
        return "hit" if value else "miss"
    return f"{measure.title} {value:.2f}"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Nested names joined by dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            place = isinstance(value, str) and name in PLACES
            yield f"{before}{name}", _last_part(value) if place else _in_words(value)


def _last_part(place: str) -> str:
    """The name at the end of a path, of either kind of slash."""
    return place.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == {}:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(one) for one in value) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def _range(counts: Sequence[int], word: str) -> str:
    least, most = min(counts, default=0), max(counts, default=0)
    return verdict.plural(most, word) if least == most else f"{least:,} to {verdict.plural(most, word)}"


def _command(settings: Mapping[str, Any]) -> str | None:
    command = settings.get("command")
    if not command:
        return None
    return command if isinstance(command, str) else shlex.join(str(word) for word in command)


def _options(options: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} {text}" for name, text in _flat(options))


def _render(context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("parchgrad.evaluation_page", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": verdict.number, "options": _options}
    environment.globals["span"] = verdict.brief_span
    style = (files("parchgrad.evaluation_page") / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(context, style=style)
