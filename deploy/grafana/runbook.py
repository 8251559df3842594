"""docs/runbook.md as a dashboard, so that whoever looks at a panel finds what to do behind the same link bar."""

from pathlib import Path

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import board, page

UID = "parchgrad-runbook"
RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"


def dashboard() -> Dashboard:
    content = RUNBOOK.read_text(encoding="utf-8")
    made = board(UID, "ParchGrad: runbook", "What each alert means and what to do: docs/runbook.md.")
    return made.with_panel(page("docs/runbook.md", content, height=60)).build()
