"""Versioned folders, as Triton lays out a repository: `<name>/<integer version>/`."""

from __future__ import annotations

from pathlib import Path

from parchgrad.errors import ParchGradError


def resolve_version(path: Path, marker: str, error: type[ParchGradError]) -> Path:
    """The folder that holds the file `marker`: `path` itself, or its highest integer-named subfolder.

    Raises `error` when there is neither.
    """
    if (path / marker).is_file():
        return path
    versions = [p for p in path.iterdir() if is_version(p.name) and p.is_dir()] if path.is_dir() else []
    if not versions:
        beside = sorted(p.parent.parent.name for p in path.parent.glob(f"*/*/{marker}"))
        there = f" There are: {', '.join(dict.fromkeys(beside))}." if beside else ""
        raise error(f"'{path}' holds neither {marker} nor a numbered version folder.{there}")
    newest = max(versions, key=lambda p: int(p.name))
    if not (newest / marker).is_file():
        raise error(f"'{newest}' has no {marker}.")
    return newest


def is_version(name: str) -> bool:
    """Whether a folder's name is a version: a positive integer without leading zeros."""
    return name.isascii() and name.isdigit() and not name.startswith("0")
