"""docs/runbook.md as a dashboard, so that whoever looks at a panel finds what to do behind the same link bar."""

import re
from pathlib import Path

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import board, page

UID = "parchgrad-runbook"
RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"


def unlinked(markdown: str) -> str:
    """The text without its relative links: in Grafana headings have no anchors, and there are no pages beside it.

    What names a page names its place in the repository.
    """
    markdown = re.sub(r"\[([^]]+)\]\(#[^)]*\)", r"\1", markdown)
    return re.sub(r"\[[^]]+\]\((?!\w+:)([^)#]+)[^)]*\)", r"docs/\1", markdown)


def dashboard() -> Dashboard:
    content = unlinked(RUNBOOK.read_text(encoding="utf-8"))
    made = board(UID, "ParchGrad: runbook", "What each alert means and what to do: docs/runbook.md.")
    return made.with_panel(page("docs/runbook.md", content, height=60)).build()
