"""Prometheus' files, by its own programs: checks, unit tests of the rules, and a server over the real service."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import prometheus_client
import promql_parser
import pytest
import yaml

import service.metrics  # noqa: F401  # fills the registry
from deploy.grafana import picture, queries
from deploy.grafana.write import FOLDER
from tests.deploy.traffic import LATE, Traffic
from tests.deploy.watcher import PROMETHEUS, RULES, RUNBOOK, Watcher, program, prometheus
from tests.service.serving import PROJECT_ROOT, Server, serving

DASHBOARDS = sorted(FOLDER.glob("*.json"))
OTHERS = {"up", "ALERTS"}  # Prometheus' own
# What a machine that is too busy brings about by itself, as these alerts wait two seconds here.
SLOW_MACHINE = {"ParchgradEventLoopLags", "ParchgradDeviceBusy", "ParchgradLatencyBudgetBurnsFast"}
TRIES = 1200  # times a tenth of a second, in which a condition must come true


def rules_of(path: Path) -> list[Mapping[str, str]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


EVERY_RULE = [rule for path in RULES for rule in rules_of(path)]
ALERTS = [rule for rule in EVERY_RULE if "alert" in rule]


def expressions() -> dict[str, str]:
    """Every expression there is, by what it is for."""
    found = {rule.get("record") or rule["alert"]: rule["expr"] for rule in EVERY_RULE}
    for path in DASHBOARDS:
        board = queries.read(path)
        for panel in queries.panels(board):
            for number, target in enumerate(panel.targets):
                name = f"{path.stem}: {panel.title} {number}"
                found[name] = queries.substituted(target.expr, board, "1m")
        found |= {f"{path.stem}: ${name}": series for name, series in queries.variable_queries(board).items()}
    return found


def names_in(expr: str) -> set[str]:
    """The metrics an expression reads."""
    found: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def exposed() -> dict[str, set[str]]:
    """Metric -> the names of its samples, from the registry."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
    return {
        family.name: {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
        for family in prometheus_client.REGISTRY.collect()
        if family.name.startswith("parchgrad_")
    }


def test_the_parser_finds_every_name() -> None:
    expr = 'sum by (le) (rate(a_bucket{job=~".*"}[5m])) / on () b:c:d unless max_over_time((e > 1)[1h:1m] offset 1d)'
    assert names_in(expr) == {"a_bucket", "b:c:d", "e"}


def test_what_dashboards_and_rules_read_exists() -> None:
    there = OTHERS | {rule["record"] for rule in EVERY_RULE if "record" in rule}
    there |= {name for names in exposed().values() for name in names}
    missing = {place: names_in(expr) - there for place, expr in expressions().items() if names_in(expr) - there}
    assert not missing


def test_every_metric_is_read_by_a_panel() -> None:
    shown = {
        name
        for place, expr in expressions().items()
        if ": " in place or place.startswith("parchgrad:")  # recorded for panels; other servers' names do not count
        for name in names_in(expr)
    }
    assert len(exposed()) > 20
    assert [metric for metric, names in exposed().items() if not names & shown] == []


def test_every_recorded_series_is_read() -> None:
    read = {name for expr in expressions().values() for name in names_in(expr)}
    recorded = {rule["record"] for rule in EVERY_RULE if rule.get("record", "").startswith("parchgrad:")}
    assert recorded - read == set()


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_is_and_links_to_the_runbook(rule: Mapping[str, Mapping[str, str]]) -> None:
    notes = rule["annotations"]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert notes["summary"].endswith(".")
    assert notes["description"].endswith(".")
    link = re.fullmatch(r"\{\{ \$externalLabels\.runbook \}\}docs/runbook\.md#([a-z-]+)", notes["runbook_url"])
    assert link, notes["runbook_url"]
    headings = re.findall(r"^## (.+)$", (PROJECT_ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert link[1] in {heading.lower().replace(" ", "-") for heading in headings}
    assert f"`{rule['alert']}`" in (PROJECT_ROOT / "docs" / "runbook.md").read_text()


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_configuration_and_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("path", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_rules_do_what_their_tests_say(path: Path) -> None:
    promtool("test", "rules", path)


def raw_names(expr: str) -> set[str]:
    """The service's own metrics behind an expression, through recording rules."""
    recorded = {rule["record"]: rule["expr"] for rule in EVERY_RULE if "record" in rule}
    found: set[str] = set()
    left = names_in(expr)
    while left:
        name = left.pop()
        if name in recorded:
            left |= names_in(recorded[name])
        else:
            found.add(name)
    return found


def meant(expr: str, alert: str) -> bool:
    """Whether an expression over ALERTS would find the alert, where it fires."""
    selector = re.search(r"\bALERTS\b(?:\{([^}]*)\})?", expr)
    if selector is None:
        return False
    wanted = re.search(r'\balertname(=~?)"([^"]*)"', selector[1] or "")
    return wanted is None or (alert == wanted[2] if wanted[1] == "=" else bool(re.fullmatch(wanted[2], alert)))


def cases(alert: Mapping[str, str]) -> set[str]:
    """Of `firing` and `quiet`: what promtool's tests hold of an alert, of those whose series the alert reads."""
    name, found = alert["alert"], set[str]()
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            if not {re.split(r"[{ ]", one["series"])[0] for one in test["input_series"]} & raw_names(alert["expr"]):
                continue
            for one in test.get("alert_rule_test", ()):
                if one["alertname"] == name:
                    found.add("firing" if one["exp_alerts"] else "quiet")
            for one in test.get("promql_expr_test", ()):
                if meant(one["expr"], name):
                    of_it = [
                        sample["labels"]
                        for sample in one["exp_samples"]
                        if re.search(rf'\balertname="{name}"', sample["labels"])
                    ]
                    if not of_it:
                        found.add("quiet")
                    found |= {"firing" for labels in of_it if 'alertstate="firing"' in labels}
    return found


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(alert: Mapping[str, str]) -> None:
    assert cases(alert) == {"firing", "quiet"}


def test_rules_are_tested_in_the_order_they_depend_on_each_other() -> None:
    """promtool evaluates groups that a test does not name in an order of its own."""
    groups = {path: [group["name"] for group in yaml.safe_load(path.read_text())["groups"]] for path in RULES}
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        test = yaml.safe_load(path.read_text())
        files = [(path.parent / name).resolve() for name in test["rule_files"]]
        if len(files) > 1:
            assert test["group_eval_order"] == [name for file in files for name in groups[file]], path.name


def hours(duration: str) -> float:
    """Of one range of PromQL: 30m, 6h, 1d."""
    return int(duration[:-1]) * {"s": 1 / 3600, "m": 1 / 60, "h": 1, "d": 24}[duration[-1]]


def test_long_windows_are_not_read_every_few_seconds() -> None:
    """Nor so seldom that a value counts as gone before the next one (five minutes)."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            ranges = [
                hours(found)
                for rule in group["rules"]
                for found in re.findall(r"\[(\d+[smhd])(?::\w+)?\]", rule["expr"])
            ]
            if max(ranges, default=0) > 1:
                assert 1 / 60 <= hours(group["interval"]) < 5 / 60, group["name"]


def test_rules_tell_namespaces_apart() -> None:
    """On Kubernetes the job is the Service's name, in every namespace."""
    wrong = {
        rule.get("record") or rule["alert"]: found
        for rule in EVERY_RULE
        if (found := re.findall(r"\b(?:by|on) \((?!namespace\b)(?=\w)[^)]*\)", rule["expr"]))
    }
    assert not wrong


def test_the_bounds_of_drift_are_those_of_the_documents() -> None:
    """In the order in which docs/watching.md has them."""
    text = (PROJECT_ROOT / "docs" / "watching.md").read_text()
    said = re.search(r"The alerts' bounds are (.*?);.*total variation of ([\d.]+)\.$", text, re.DOTALL | re.MULTILINE)
    assert said
    names = (
        "SparsityDrifts", "BorderDrifts", "AgreementDrifts", "ActivationsSpread", "ActivationsShift", "LayerSpreads",
        "ConfidenceDrifts", "ClassMixDrifts",
    )  # fmt: skip
    bounds = {alert["alert"]: re.findall(r"> ([\d.]+)$", alert["expr"], re.MULTILINE) for alert in ALERTS}
    documented = [*re.findall(r"[\d.]+", said[1]), said[2]]
    assert [float(bounds[f"Parchgrad{name}"][0]) for name in names] == [float(bound) for bound in documented]


# --- a real server ----------------------------------------------------------------------------------------------


def until(condition: Callable[[], object], failed: Callable[[], object]) -> None:
    """Wait for the condition; `failed()` tells what is there instead."""
    for _ in range(TRIES):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"still not so: {failed()}")


def unanswered(watcher: Watcher) -> list[str]:
    """The queries of panels without data, and the variables without values."""
    found = []
    for path in DASHBOARDS:
        board = queries.read(path)
        asked = {
            f"{path.stem}: {panel.title}: {target.expr}": target.expr
            for panel in queries.panels(board)
            for target in panel.targets
        }
        asked |= {f"{path.stem}: ${name}": series for name, series in queries.variable_queries(board).items()}
        for name, expr in asked.items():
            values = [point for one in watcher.value(queries.substituted(expr, board, "20s")) for point in one.points]
            if not any(value == value for _, value in values):  # NaN is no data
                found.append(name)
    return found


@pytest.fixture
def parchgrad(tmp_path: Path) -> Iterator[Server]:
    """The bundled model, two workers with little room, everything watched; draining takes its time."""
    program("prometheus")
    settings = {
        "workers": 2, "threads": 1, "max_images": 4, "max_queue": 12, "watch_rate": 1, "drain_ms": 12_000,
        "runtime": "torch",
    }  # fmt: skip
    with serving(tmp_path / "bentoml", settings=settings) as server:
        yield server


def test_a_real_server_sees_every_panel_and_every_fault(parchgrad: Server, tmp_path: Path) -> None:
    target = parchgrad.url.removeprefix("http://")
    with Traffic(parchgrad.url) as traffic, prometheus(tmp_path / "prometheus", target) as watcher:

        def firing(*names: str) -> Callable[[], bool]:
            return lambda: set(names) <= watcher.alerts().keys()

        with traffic.mixed():
            assert traffic.once(LATE) == 504
            until(lambda: not unanswered(watcher), lambda: f"no data for {unanswered(watcher)}")
        assert not traffic.wrong
        figure = picture.draw(watcher.url, queries.read(FOLDER / "capacity.json"), time.time() - 15, time.time())
        assert "No data" not in [text.get_text() for axes in figure.axes for text in axes.texts]
        bad = [(rule["name"], rule["lastError"]) for rule in watcher.rules() if rule["health"] != "ok"]
        assert len(watcher.rules()) == len(EVERY_RULE)
        assert not bad
        assert watcher.alerts().keys() <= SLOW_MACHINE

        with traffic.flood(callers=16):
            faults = "ParchgradQueueSaturated", "ParchgradMapsShed", "ParchgradErrorBudgetBurnsFast"
            until(firing(*faults), lambda: f"firing {set(watcher.alerts())}, answers {traffic.flooded}")
        assert traffic.flooded.keys() == {200, 429}
        note = watcher.alerts().get("ParchgradErrorBudgetBurnsFast", {})
        assert note["runbook_url"] == f"{RUNBOOK}docs/runbook.md#error-budget"
        until(
            lambda: "ParchgradQueueSaturated" not in watcher.alerts(),
            lambda: "the queue is empty, and the alert fires on",
        )

        assert (
            not {"ParchgradNoWorkerReady", "ParchgradWorkersNotReady", "ParchgradTargetDown"} & watcher.alerts().keys()
        )
        parchgrad.process.terminate()
        until(firing("ParchgradNoWorkerReady", "ParchgradWorkersNotReady"), lambda: f"firing {set(watcher.alerts())}")
        assert "ParchgradTargetDown" not in watcher.alerts()
        assert parchgrad.process.wait() == 0
        until(firing("ParchgradTargetDown", "ParchgradGone"), lambda: f"firing {set(watcher.alerts())}")
