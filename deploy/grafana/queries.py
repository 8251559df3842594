"""What a dashboard's JSON asks Prometheus, and the answers: as Grafana would send it, without Grafana."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class QueryError(Exception):
    """Prometheus refused a query: says what it said."""


@dataclass(frozen=True)
class Target:
    """One query of a panel. `instant`: asked for one moment, not for a range."""

    expr: str
    legend: str
    instant: bool


@dataclass(frozen=True)
class Shown:
    """A panel that asks something; `place` is (x, y, width, height) on the grid of 24 columns."""

    title: str
    type: str
    unit: str
    place: tuple[int, int, int, int]
    targets: Sequence[Target]
    definition: Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """Labels, and (seconds since the epoch, value) in order."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]


def panels(dashboard: Mapping[str, Any]) -> list[Shown]:
    """The panels of a dashboard that ask something, rows and texts left out."""
    return [
        Shown(
            title=one["title"],
            type=one["type"],
            unit=_unit(one),
            place=tuple(one["gridPos"][side] for side in "xywh"),
            targets=[
                Target(target["expr"], target.get("legendFormat", ""), bool(target.get("instant")))
                for target in one["targets"]
            ],
            definition=one,
        )
        for one in dashboard["panels"]
        if one.get("targets")
    ]


def _unit(panel: Mapping[str, Any]) -> str:
    """Of a panel's values; a heat map has it on its axis."""
    if panel["type"] == "heatmap":
        return str(panel["options"]["yAxis"]["unit"])
    return str(panel["fieldConfig"]["defaults"].get("unit", ""))


def read(path: Path) -> dict[str, Any]:
    """A dashboard's JSON."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def variable_queries(dashboard: Mapping[str, Any]) -> dict[str, str]:
    """The series selector whose labels fill each variable, by its name."""
    found = {}
    for one in dashboard["templating"].get("list", []):
        if one["type"] == "query":
            selector = re.fullmatch(r"label_values\((.*), (\w+)\)", one["query"]["query"])
            if selector is None:
                raise ValueError(
                    f"Variable {one['name']!r} asks {one['query']['query']!r}, expected label_values(series, label)."
                )
            found[one["name"]] = selector[1]
    return found


def substituted(expr: str, dashboard: Mapping[str, Any], rate_interval: str) -> str:
    """The expression with all values of every variable, as a dashboard begins, and with Grafana's own interval."""
    expr = expr.replace("$__rate_interval", rate_interval)
    for one in dashboard["templating"].get("list", []):
        if one["type"] == "query":
            expr = re.sub(rf"\$({one['name']}\b|{{{one['name']}}})", one["allValue"], expr)
    return expr


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A series' name: its legend with the {{labels}} filled in."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), legend)


def ask(address: str, path: str, **parameters: str) -> Any:
    """`data` of the answer of Prometheus' API. Raises QueryError."""
    request = f"{address.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise QueryError(f"{parameters.get('query', path)}: {error.read().decode(errors='replace')}") from None


def now(address: str, expr: str) -> list[Series]:
    """An expression's value at this moment."""
    found = ask(address, "query", query=expr)["result"]
    return [Series(one["metric"], [(float(one["value"][0]), float(one["value"][1]))]) for one in found]


def course(address: str, expr: str, start: float, end: float, step: float) -> list[Series]:
    """An expression's values from `start` to `end`, seconds since the epoch."""
    found = ask(address, "query_range", query=expr, start=str(start), end=str(end), step=str(step))["result"]
    return [Series(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]
