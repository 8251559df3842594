"""Dashboards -> the JSON files Grafana provisions: the same bytes every time."""

import json
from collections.abc import Mapping
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import capacity, explanations, runbook, service

FOLDER = Path(__file__).resolve().parent / "dashboards"


def dashboards() -> Mapping[str, str]:
    """File name -> content."""
    made = {
        "service": service.dashboard(),
        "explanations": explanations.dashboard(),
        "capacity": capacity.dashboard(),
        "runbook": runbook.dashboard(),
    }
    return {
        f"{name}.json": json.dumps(board, cls=JSONEncoder, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        for name, board in made.items()
    }


def write(folder: Path = FOLDER) -> list[Path]:
    """The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in dashboards().items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in dashboards()]
