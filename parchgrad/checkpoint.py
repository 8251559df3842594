"""The state of an unfinished pass over images, written whole, so that the pass can go on after any end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from parchgrad.errors import EvidenceError
from parchgrad.evidence import Evidence
from parchgrad.files import remove

# A checkpoint is written at most so often that it takes this share of the time.
SHARE_OF_TIME = 0.05


@dataclass
class Checkpoint:
    """The evidence so far and the batches in it, in one file at `path`, replaced in one step.

    `key` is a digest of all that decides the result (`Work.key`); `every` is how many seconds of work may be lost,
    more where the file takes long to write.
    """

    path: Path
    key: str
    every: float = 60.0
    _due: float = field(init=False)

    def __post_init__(self) -> None:
        self._due = time.monotonic() + self.every

    def restore(self) -> tuple[Evidence, NDArray[np.bool_]] | None:
        """The evidence and which batches `(n,)` are in it; None where there is no file.

        Raises EvidenceError for a file that cannot be read, or of work with another key.
        """
        if not self.path.is_file():
            return None
        try:
            evidence, extra, found = Evidence.load(self.path)
            done = extra["done"].numpy()
        except EvidenceError as error:
            raise EvidenceError(f"{error} It is of an unfinished build; --restart begins anew.") from error
        except KeyError as error:
            raise EvidenceError(f"'{self.path}' is no unfinished build; --restart begins anew.") from error
        if found != self.key:
            raise EvidenceError(
                f"'{self.path}' is of an unfinished build of other images or with other options; "
                "give the same ones to go on, or --restart."
            )
        return evidence, done

    def save_if_due(self, evidence: Evidence, done: NDArray[np.bool_]) -> None:
        """Write the file where `every` seconds have gone by."""
        if time.monotonic() >= self._due:
            self.save(evidence, done)

    def save(self, evidence: Evidence, done: NDArray[np.bool_]) -> None:
        """Write the file; a full disk leaves the one before. Raises OSError."""
        begun = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        evidence.save(self.path, {"done": torch.from_numpy(done)}, self.key)
        taken = time.monotonic() - begun
        self._due = begun + max(self.every, taken / SHARE_OF_TIME)

    def clear(self) -> None:
        """Remove the file."""
        remove(self.path)
