"""The classes that metrics tell apart: of each model a closed set, the same in all workers of one service."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from service.shared_files import locked, write

SEEN = 10  # times a worker predicts a class before it asks for a label of its own
OTHER = "other"
FILE, LOCK_FILE = "classes.json", "classes.lock"


class ClassLabels:
    """The label of each class of one version: the first `most` classes seen often, and `other`.

    In `folder`, which the workers share and which is emptied when the service starts, they note under `key` what has a
    label: a class that one worker named, the others name so as soon as they have seen it often too, and all others
    once the set is full. Without a folder there is one worker.
    """

    def __init__(self, labels: Sequence[str], most: int, key: str = "", folder: Path | None = None) -> None:
        self.labels = tuple(labels)
        self._most, self._key, self._folder = most, key, folder
        times = Counter((*labels, OTHER))
        # Two classes of one name are two, and a class named `other` is not the others.
        self._own = [name if times[name] == 1 else f"{name} ({index})" for index, name in enumerate(labels)]
        self._seen: Counter[int] = Counter()
        self._named = self._noted() if folder else set[str]()

    def seen(self, index: int) -> str:
        """The class's label, which it may get by being seen this time."""
        if self._own[index] not in self._named and len(self._named) < self._most:
            self._seen[index] += 1
            if self._seen[index] >= SEEN:
                self._name(self._own[index])
        return self.of(index)

    def of(self, index: int) -> str:
        """The class's label as it is now."""
        own = self._own[index]
        return own if own in self._named else OTHER

    def _name(self, label: str) -> None:
        if self._folder is None:
            self._named.add(label)
            return
        with locked(self._folder / LOCK_FILE):
            self._named = self._noted()
            if label not in self._named and len(self._named) < self._most:
                self._named.add(label)
                whole = self._read(self._folder) | {self._key: sorted(self._named)}
                write(self._folder / FILE, whole)

    def _noted(self) -> set[str]:
        assert self._folder is not None
        return set(self._read(self._folder).get(self._key, ()))

    @staticmethod
    def _read(folder: Path) -> dict[str, list[str]]:
        try:
            text = (folder / FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        return dict(json.loads(text))
