"""The dashboards' JSON: what its source writes, complete, and laid out without holes or overlaps."""

import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import units
from matplotlib.figure import Figure

from deploy.grafana import picture, queries, runbook
from deploy.grafana.write import FOLDER, dashboards, write
from service.access import HEALTH
from tests.service.serving import PROJECT_ROOT

WATCHED = ("service", "explanations", "capacity")
OWN_UNITS = {"img/s"}  # Grafana prints a unit it does not know behind the number
KNOWN_UNITS = {value for name, value in inspect.getmembers(units) if isinstance(value, str) and name[0] != "_"}


def board(name: str) -> dict[str, Any]:
    return queries.read(FOLDER / f"{name}.json")


def test_the_committed_files_are_what_the_source_writes(tmp_path: Path) -> None:
    write(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert written == committed, "Run `python -m deploy.grafana`."


def test_the_source_writes_the_same_twice() -> None:
    assert dashboards() == dashboards()


@pytest.mark.parametrize("name", WATCHED)
def test_every_panel_says_what_it_shows_in_which_unit(name: str) -> None:
    for panel in queries.panels(board(name)):
        assert re.fullmatch(r"[A-Z].{20,250}\.", str(panel.definition.get("description", ""))), panel.title
        if panel.type != "table":
            assert panel.unit in KNOWN_UNITS | OWN_UNITS, panel.title


@pytest.mark.parametrize("name", WATCHED)
def test_rows_are_full_and_nothing_overlaps(name: str) -> None:
    panels = board(name)["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    places = [one["gridPos"] for one in panels]
    cells = [
        (x, y)
        for place in places
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert {x for x, _ in cells} == set(range(24))
    assert len(cells) == 24 * (1 + max(y for _, y in cells)), "holes"


@pytest.mark.parametrize("name", WATCHED)
def test_every_series_of_a_panel_has_a_name_of_its_own(name: str) -> None:
    for panel in queries.panels(board(name)):
        legends = [target.legend for target in panel.targets]
        assert len(set(legends)) == len(legends), panel.title
        assert all(legends) or panel.type == "table", panel.title


def test_variables_and_links() -> None:
    found = {name: board(name) for name in (*WATCHED, "runbook")}
    assert len({one["uid"] for one in found.values()}) == len(found)
    for name, one in found.items():
        assert one["tags"] == ["parchgrad"]
        assert [link["tags"] for link in one["links"]] == [["parchgrad"]]
        if name in WATCHED:
            variables = [variable["name"] for variable in one["templating"]["list"]]
            assert variables == ["datasource", "namespace", "job", "model", "instance"]


def test_the_runbook_is_in_grafana_as_it_is_in_docs() -> None:
    """But for its links: there are no pages beside a panel, and its headings have no anchors."""
    text = (PROJECT_ROOT / "docs" / "runbook.md").read_text()
    shown = json.loads((FOLDER / "runbook.json").read_text())["panels"][0]["options"]["content"]
    assert re.findall(r"\]\((?!https?:)", shown) == []
    plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text)
    assert shown.replace("docs/", "") == plain.replace("docs/", "")
    assert "(docs/scaling.md)" in shown
    for page in set(re.findall(r"docs/\w+\.md", shown)):
        assert (PROJECT_ROOT / page).is_file()


def test_links_that_stay_and_links_that_go() -> None:
    text = "[a b](#a-b), [scaling.md](scaling.md#room), [Grafana](https://grafana.com/docs)"
    assert runbook.unlinked(text) == "a b, docs/scaling.md, [Grafana](https://grafana.com/docs)"


@pytest.mark.parametrize("name", [*WATCHED, "runbook"])
def test_every_panel_has_options(name: str) -> None:
    """Older Grafanas read members of `options` without looking whether it is null."""
    assert [one["title"] for one in board(name)["panels"] if one["type"] != "row" and one["options"] is None] == []


@pytest.mark.parametrize("name", WATCHED)
def test_numbers_do_not_outlive_their_service(name: str) -> None:
    """Of a range the last value would stay, in green; where nothing is found the number is grey."""
    stats = [panel for panel in queries.panels(board(name)) if panel.type == "stat"]
    assert stats
    for panel in stats:
        assert [target.instant for target in panel.targets] == [True], panel.title
        (mapping,) = panel.definition["fieldConfig"]["defaults"]["mappings"]
        assert mapping["type"] == "special", panel.title
        assert mapping["options"]["match"] == "null+nan", panel.title
        assert mapping["options"]["result"]["color"] == "#808080", panel.title


def test_sampled_figures_are_means_of_an_hour_at_least() -> None:
    """One image in a hundred is watched: in four scrapes mostly none."""
    sampled = r"parchgrad_(map_gradient_agreement|(class_)?activation_\w+)_(sum|count)\{[^}]*\}\[([^]]+)\]"
    windows = [
        found[-1]
        for panel in queries.panels(board("explanations"))
        for target in panel.targets
        for found in re.findall(sampled, target.expr)
    ]
    assert set(windows) == {"1h", "6h"}


def test_probes_are_not_shown_as_refused_requests() -> None:
    """/readyz of a worker that loads says 503 not_ready, which nobody suffers from."""
    panels = {panel.title: panel.targets[0].expr for panel in queries.panels(board("service"))}
    assert 'reason!="not_ready"' in panels["Refused requests and images"]
    (routes,) = re.findall(r'route!~"([^"]*)"', panels["Errors by code"])
    assert all(re.fullmatch(routes, path) for path in HEALTH)
    assert not any(re.fullmatch(routes, route) for route in ("/predict", "/explain", "grpc/ModelInfer"))


def test_provisioning_names_what_is_there() -> None:
    (source,) = yaml.safe_load((FOLDER.parent / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["uid"], source["type"], source["url"]) == ("prometheus", "prometheus", "http://prometheus:9090")
    scrape = yaml.safe_load((PROJECT_ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"][
        "scrape_interval"
    ]
    assert source["jsonData"]["timeInterval"] == scrape  # else $__rate_interval may hold fewer than two scrapes


def test_queries_are_what_grafana_would_send() -> None:
    made = board("service")
    expr = 'rate(a{job=~"$job", instance=~"$instance"}[$__rate_interval]) + $jobs'
    assert queries.substituted(expr, made, "1m") == 'rate(a{job=~".*", instance=~".*"}[1m]) + $jobs'
    assert queries.named("{{model}}/{{ version }} {{other}}", {"model": "m", "version": "1"}) == "m/1 "


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0123, "s", "12.3 ms"), (90, "s", "90 s"), (0.5, "percentunit", "50 %"), (3 * 2**30, "bytes", "3 GiB"),
     (12345, "short", "12345"), (2.5, "img/s", "2.5 img/s")],
)  # fmt: skip
def test_values_are_printed_in_their_unit(value: float, unit: str, text: str) -> None:
    assert picture.scaled(value, unit) == text


def test_a_heat_map_draws_what_each_bucket_adds() -> None:
    """Buckets come cumulative: 3 below 1 and 5 below 2 are 3 and 2."""
    panel = next(one for one in queries.panels(board("service")) if one.type == "heatmap")
    axes = Figure().add_subplot()
    found = [(le, queries.Series({"le": le}, [(0.0, below), (15.0, below)])) for le, below in (("1", 3.0), ("2", 5.0))]
    picture.DRAW["heatmap"](axes, panel, found, 0.0, 15.0)
    (mesh,) = axes.collections
    values = mesh.get_array()
    assert values is not None
    assert [float(row[0]) ** 2 for row in values] == pytest.approx([3, 2])
