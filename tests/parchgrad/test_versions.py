"""parchgrad/versions.py: which folder is meant, and what is said where there is none."""

from pathlib import Path

import pytest

from parchgrad.errors import TableError
from parchgrad.versions import resolve_version, versions_of


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    for version in ("2", "10"):
        (tmp_path / "net" / version).mkdir(parents=True)
        (tmp_path / "net" / version / "mark").touch()
    for folder in ("net/007", "net/.adding", "net/11x", "empty/1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "net" / "12").touch()  # a file
    return tmp_path


def test_versions_are_folders_named_by_numbers_newest_first(shelf: Path) -> None:
    assert versions_of(shelf / "net") == ["10", "2"]
    assert versions_of(shelf / "absent") == versions_of(shelf / "net" / "12") == []


def test_the_newest_is_meant_where_none_is_named(shelf: Path) -> None:
    assert resolve_version(shelf / "net", "mark", TableError) == shelf / "net" / "10"
    assert resolve_version(shelf / "net" / "2", "mark", TableError) == shelf / "net" / "2"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("net/7", "'{}/net/7' has no mark; there is version 10, 2."),
        ("empty/1", "'{}/empty/1' has no mark."),
        ("empty", "'{}/empty/1' has no mark."),
        ("nets", "'{}/nets' holds neither mark nor a numbered version folder. There are: net."),
    ],
)
def test_what_is_missing_is_named_with_what_is_there(shelf: Path, folder: str, message: str) -> None:
    with pytest.raises(TableError) as caught:
        resolve_version(shelf / folder, "mark", TableError)
    assert str(caught.value) == message.format(shelf)
