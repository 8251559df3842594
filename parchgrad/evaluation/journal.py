"""What an unfinished evaluation has found: a line a piece of work, so that it can go on after any end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from parchgrad.errors import EvaluationError
from parchgrad.files import claimed

Found = dict[str, Any]  # of one piece of work: JSON types only


@dataclass
class Journal:
    """Findings by piece of work, each written as it is recorded."""

    found: dict[str, Found] = field(default_factory=dict)
    _file: IO[str] | None = None

    def record(self, piece: str, found: Found) -> None:
        """Keep what a piece of work has found. Raises OSError; what was recorded before stays."""
        if self._file is not None:
            self._file.write(json.dumps({"piece": piece, "found": found}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.found[piece] = found


@contextmanager
def journal_in(folder: Path, key: str, *, restart: bool = False) -> Iterator[Journal]:
    """The journal in `folder`, held against other processes; the folder is removed where the block ends well.

    `key` is a digest of all that decides the results. What an ended run has recorded is in `found`; a last line cut
    off in the middle is dropped. Raises EvaluationError for a journal of another evaluation or one that cannot be
    read, InUseError.
    """
    path = folder / "journal.jsonl"
    with claimed(folder, "an evaluation"):
        if restart:
            path.unlink(missing_ok=True)
        found, whole = _read(path, key)
        with path.open("r+" if whole else "w", encoding="utf-8") as file:
            if whole:
                file.truncate(whole)
                file.seek(whole)
            else:
                file.write(json.dumps({"key": key}) + "\n")
                file.flush()
            yield Journal(found, file)
        path.unlink()
        with suppress(OSError):
            folder.rmdir()  # somebody's file in it is no reason to fail


def _read(path: Path, key: str) -> tuple[dict[str, Found], int]:
    """What was found, and how many bytes of the file are whole lines; 0 for none."""
    if not path.is_file():
        return {}, 0
    found: dict[str, Found] = {}
    whole = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                if number == 0 and entry["key"] != key:
                    raise EvaluationError(
                        f"'{path}' is of an unfinished evaluation of other data or with other options; give the same "
                        "ones to go on, or --restart."
                    )
                if number > 0:
                    found[entry["piece"]] = entry["found"]
                whole += len(line)
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"'{path}' is no journal of an evaluation; --restart begins anew.") from error
    return found, whole
