"""A real Prometheus on a free loopback port, with the project's configuration and rules at a test's pace."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deploy.grafana import queries
from tests.service.serving import PROJECT_ROOT, free_port

PROMETHEUS = PROJECT_ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RUNBOOK = "https://docs.example.org/"
START_TRIES = 600  # times a tenth of a second


@dataclass(frozen=True)
class Watcher:
    """A running Prometheus."""

    url: str
    log: Path

    def value(self, expr: str) -> list[queries.Series]:
        return queries.now(self.url, expr)

    def alerts(self, state: str = "firing") -> dict[str, Mapping[str, str]]:
        """Annotations of the alerts in this state, by name."""
        found = queries.ask(self.url, "alerts")["alerts"]
        return {one["labels"]["alertname"]: one["annotations"] for one in found if one["state"] == state}

    def rules(self) -> list[Mapping[str, str]]:
        return [rule for group in queries.ask(self.url, "rules")["groups"] for rule in group["rules"]]


def program(name: str) -> str:
    """Where a program of Debian's package `prometheus` is; the test is skipped where it is not."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install prometheus)")
    return found


def hastened(rules: str) -> str:
    """Rules for a test: groups run each second, alerts wait two, means take five; the day before is a minute."""
    rules = re.sub(r"^( +for:) \w+$", r"\1 2s", rules, flags=re.MULTILINE)
    rules = re.sub(r"^( +interval:) \w+$", r"\1 1s", rules, flags=re.MULTILINE)
    rules = re.sub(r"(avg_over_time\([\w:]+)\[\w+\]", r"\1[5s]", rules)
    rules = re.sub(r"\[(\w+):\w+\]", r"[\1:1s]", rules)
    return re.sub(r"\[1d\] offset \w+", "[1m] offset 1s", rules)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Watcher]:
    """Scrapes `target` (host:port) every second."""
    server = program("prometheus")
    (folder / "rules").mkdir(parents=True)
    for path in RULES:
        (folder / "rules" / path.name).write_text(hastened(path.read_text()))
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    configuration["global"] |= {
        "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s",
        "external_labels": {"runbook": RUNBOOK},
    }  # fmt: skip
    configuration["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port, log = free_port(), folder / "prometheus.log"
    arguments = {
        "config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}", "log.level": "warn",
    }  # fmt: skip
    command = [server, *(f"--{name}={value}" for name, value in arguments.items())]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    watcher = Watcher(f"http://127.0.0.1:{port}", log)
    try:
        _wait(watcher, process)
        yield watcher
    finally:
        process.terminate()
        process.wait()


def _wait(watcher: Watcher, process: subprocess.Popen[bytes]) -> None:
    for _ in range(START_TRIES):
        if process.poll() is not None:
            break
        try:
            watcher.value("vector(1)")
            return
        except (OSError, queries.QueryError):
            time.sleep(0.1)
    raise RuntimeError(f"Prometheus did not start; its log:\n{watcher.log.read_text()[-4000:]}")
