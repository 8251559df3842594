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
    versions = versions_of(path)
    if not versions and is_version(path.name):
        others = [version for version in versions_of(path.parent) if (path.parent / version / marker).is_file()]
        there = f"; there is version {', '.join(others)}" if others else ""
        raise error(f"'{path}' has no {marker}{there}.")
    if not versions:
        beside = sorted(p.parent.parent.name for p in path.parent.glob(f"*/*/{marker}"))
        there = f" There are: {', '.join(dict.fromkeys(beside))}." if beside else ""
        raise error(f"'{path}' holds neither {marker} nor a numbered version folder.{there}")
    newest = path / versions[0]
    if not (newest / marker).is_file():
        raise error(f"'{newest}' has no {marker}.")
    return newest


def versions_of(path: Path) -> list[str]:
    """Names of the version folders in `path`, newest first; none where `path` is no folder."""
    names = [p.name for p in path.iterdir() if is_version(p.name) and p.is_dir()] if path.is_dir() else []
    return sorted(names, key=int, reverse=True)


def is_version(name: str) -> bool:
    """Whether a folder's name is a version: a positive integer without leading zeros."""
    return name.isascii() and name.isdigit() and not name.startswith("0")
