"""Scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from parchgrad.evaluation.compare import Score


def score_table(scores: Sequence[Score], title: str) -> Table:
    """One row a method: mass and hits with their standard errors, Gini."""
    view = Table("method", "mass", "hits", "Gini", title=title)
    for s in scores:
        mass, hits = f"{s.mass:.3f} ± {s.mass_error:.3f}", f"{s.hits:.3f} ± {s.hits_error:.3f}"
        view.add_row(s.method, mass, hits, f"{s.gini:.2f}")
    return view
