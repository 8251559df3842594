"""What was lately seen of activations and maps, as counts in buckets of time: one worker's, and that of all together.

Counts only, of a model's version, its layers and a bounded number of its classes: no image, no name or digest of one,
no map. Where workers share a folder each writes its buckets there, a file each, and whoever is asked adds them up.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.activation_histograms import BINS, counts
from service.metrics import is_gone

if TYPE_CHECKING:
    from parchgrad.drift import LayerDrift

log = logging.getLogger(__name__)

OTHER = -1  # stands for the classes that are not kept apart
FIGURES = ("gini", "border_share", "centroid_x", "centroid_y", "identity_share", "gradient_agreement")
FIGURE_BINS = 101  # round each hundredth of the range, so that 0 is told as 0
FIGURE_RANGES = {name: (-1.0 if name == "gradient_agreement" else 0.0, 1.0) for name in FIGURES}

_FILE = r"traffic-(?P<pid>[0-9]+)-(?P<span>[a-z]+)-(?P<number>[0-9]+)-(?P<of>.+)\.npz"


@dataclass(frozen=True)
class Span:
    """So long back is looked: the last `buckets` of `seconds` each, the one that is being filled among them."""

    seconds: int
    buckets: int

    def numbers(self, now: float) -> range:
        """Of its buckets, oldest first: a bucket's number is its beginning, in `seconds` since 1970."""
        last = int(now // self.seconds)
        return range(last - self.buckets + 1, last + 1)


SPANS = {"hour": Span(120, 30), "day": Span(3600, 24)}


@dataclass
class Cell:
    """The activations of the images of one class, `L` layers: 384 bytes a layer."""

    counts: NDArray[np.uint32]  # (L, BINS): sum of the images' histograms
    squares: NDArray[np.float32]  # (L, BINS): sum of their squares
    images: Counter[int] = field(default_factory=Counter)  # by class: of OTHER several

    @classmethod
    def empty(cls, layers: int) -> Cell:
        return cls(np.zeros((layers, BINS), np.uint32), np.zeros((layers, BINS), np.float32))

    def add(self, other: Cell) -> None:
        self.counts += other.counts
        self.squares += other.squares
        self.images.update(other.images)


@dataclass
class Bucket:
    """What was seen in one piece of time."""

    cells: dict[int, Cell] = field(default_factory=dict)  # by class, or OTHER
    figures: dict[str, NDArray[np.uint32]] = field(default_factory=dict)  # by figure: (FIGURE_BINS,)

    def cell(self, index: int, layers: int) -> Cell:
        return self.cells.setdefault(index, Cell.empty(layers))

    def figure(self, name: str) -> NDArray[np.uint32]:
        return self.figures.setdefault(name, np.zeros(FIGURE_BINS, np.uint32))

    def add(self, other: Bucket, layers: int) -> None:
        for index, cell in other.cells.items():
            self.cell(index, layers).add(cell)
        for name, values in other.figures.items():
            self.figure(name)[:] += values

    def fold(self, kept: Iterable[int], layers: int) -> None:
        """Put the classes that are not among `kept` to OTHER."""
        for index in self.cells.keys() - {*kept, OTHER}:
            self.cell(OTHER, layers).add(self.cells.pop(index))


class History:
    """One version's in one worker. Thread safe: maps' figures come from a thread."""

    def __init__(
        self, layers: tuple[str, ...], most: int, identity: str, clock: Callable[[], float] = time.time
    ) -> None:
        """`layers` in their order; `most` classes are kept apart; `identity` says which model and table they are of."""
        self.layers, self.most, self.identity = layers, most, identity
        self._clock, self._pid = clock, str(os.getpid())
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[int, Bucket]] = {name: {} for name in SPANS}
        self._changed: set[tuple[str, int]] = set()

    def looked(self, index: int, drift: Mapping[str, LayerDrift]) -> None:
        """Count an image's activations in the channels of class `index`."""
        one = Cell.empty(len(self.layers))
        for i, name in enumerate(self.layers):
            if name in drift:
                one.counts[i] = counts(drift[name].z)
        one.squares[:] = np.square(one.counts, dtype=np.float32)
        one.images[index] = 1
        with self._lock:
            kept = {key for ring in self._buckets.values() for bucket in ring.values() for key in bucket.cells}
            where = index if index in kept or len(kept - {OTHER}) < self.most else OTHER
            for bucket in self._now():
                bucket.cell(where, len(self.layers)).add(one)

    def mapped(self, figures: Mapping[str, float]) -> None:
        """Count figures of a map; one that is not finite is left out."""
        with self._lock:
            buckets = self._now()
            for name, value in figures.items():
                if np.isfinite(value):
                    low, high = FIGURE_RANGES[name]
                    place = round((value - low) / (high - low) * (FIGURE_BINS - 1))
                    for bucket in buckets:
                        bucket.figure(name)[min(max(place, 0), FIGURE_BINS - 1)] += 1

    def _now(self) -> list[Bucket]:
        """The buckets to count in; what is too old is dropped, so that no more than all of SPANS is ever held."""
        found, now = [], self._clock()
        for name, span in SPANS.items():
            numbers, ring = span.numbers(now), self._buckets[name]
            for number in [old for old in ring if old not in numbers]:
                del ring[number]
            found.append(ring.setdefault(numbers[-1], Bucket()))
            self._changed.add((name, numbers[-1]))
        return found

    @property
    def changed(self) -> bool:
        """Whether there is something that has not been written."""
        return bool(self._changed)

    @property
    def over(self) -> bool:
        """Whether all of it is too old."""
        now = self._clock()
        with self._lock:
            return not any(
                number in SPANS[name].numbers(now) for name, ring in self._buckets.items() for number in ring
            )

    def share(self, folder: Path, of: str) -> None:
        """Write what has changed since the last time, under this worker's name; take away what is too old.

        Raises OSError; what could not be written is written with the next.
        """
        now = self._clock()
        with self._lock:
            todo, self._changed = self._changed, set()
            packed = {
                (name, number): _packed(self._buckets[name][number], self.identity)
                for name, number in todo
                if number in self._buckets[name]
            }
        try:
            for (name, number), arrays in packed.items():
                path = folder / f"traffic-{self._pid}-{name}-{number}-{of}.npz"
                part = path.with_suffix(".part")
                with part.open("wb") as file:
                    np.savez_compressed(file, **arrays)
                part.replace(path)
        except OSError:
            with self._lock:
                self._changed |= todo
            raise
        for path, found in _files(folder, of):
            if found["pid"] == self._pid and int(found["number"]) not in SPANS[found["span"]].numbers(now):
                path.unlink(missing_ok=True)

    def together(self, span: str, folder: Path | None, of: str) -> tuple[dict[int, Bucket], int]:
        """The buckets of `span` by number, of this worker and all others alive, and how many workers those are.

        At most `most` classes, those of the most images, are kept apart. Files of workers that are gone are removed.
        """
        now = self._clock()
        numbers, layers = SPANS[span].numbers(now), len(self.layers)
        merged: dict[int, Bucket] = {number: Bucket() for number in numbers}
        with self._lock:
            for number, bucket in self._buckets[span].items():
                if number in merged:
                    merged[number].add(bucket, layers)
        workers = {self._pid}
        for part in folder.glob("traffic-*.part") if folder else ():  # of one that was killed while it wrote
            if is_gone(part.name.split("-")[1]):
                part.unlink(missing_ok=True)
        for path, found in _files(folder, of) if folder else ():
            if found["pid"] == self._pid:
                continue
            if is_gone(found["pid"]):
                path.unlink(missing_ok=True)
                continue
            workers.add(found["pid"])
            if found["span"] == span and (into := merged.get(int(found["number"]))) is not None:
                with suppress(FileNotFoundError):  # it has just become too old
                    theirs = _unpacked(path, self.identity, layers)
                    if theirs is not None:
                        into.add(theirs, layers)
        images: Counter[int] = Counter()
        for bucket in merged.values():
            images.update({index: cell.images.total() for index, cell in bucket.cells.items() if index != OTHER})
        kept = [index for index, _ in sorted(images.items(), key=lambda one: (-one[1], one[0]))[: self.most]]
        for bucket in merged.values():
            bucket.fold(kept, layers)
        return merged, len(workers)


def forget(folder: Path) -> None:
    """Remove this worker's files: it ends."""
    for path in folder.glob(f"traffic-{os.getpid()}-*"):
        path.unlink(missing_ok=True)


def _files(folder: Path, of: str) -> list[tuple[Path, dict[str, str]]]:
    """The files of one version, and what their names say."""
    matches = [(path, re.fullmatch(_FILE, path.name)) for path in folder.glob("traffic-*.npz")]
    return [
        (path, match.groupdict())
        for path, match in matches
        if match is not None and match["of"] == of and match["span"] in SPANS
    ]


def _packed(bucket: Bucket, identity: str) -> dict[str, Any]:
    classes = sorted(bucket.cells)
    cells = [bucket.cells[index] for index in classes]
    images = [[index, *pair] for index, cell in zip(classes, cells, strict=True) for pair in cell.images.items()]
    return {
        "identity": np.array(identity),
        "classes": np.array(classes, np.int64),
        "counts": np.array([cell.counts for cell in cells], np.uint32),
        "squares": np.array([cell.squares for cell in cells], np.float32),
        "images": np.array(images, np.int64).reshape(-1, 3),
        "figures": np.array(json.dumps(sorted(bucket.figures))),
        "values": np.array([bucket.figures[name] for name in sorted(bucket.figures)], np.uint32),
    }


def _unpacked(path: Path, identity: str, layers: int) -> Bucket | None:
    """None where it is of another model or table under the same name, or of another form: the workers, or the service
    itself, are being changed one by one."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if str(found["identity"]) != identity or (
            len(found["classes"]) and found["counts"].shape[1:] != (layers, BINS)
        ):
            return None
        bucket = Bucket()
        for index, own, squares in zip(found["classes"].tolist(), found["counts"], found["squares"], strict=True):
            bucket.cells[index] = Cell(own, squares)
        for index, of, images in found["images"].tolist():
            bucket.cells[index].images[of] += images
        bucket.figures = dict(zip(json.loads(str(found["figures"])), found["values"], strict=True))
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error):
        log.warning("A worker's file of traffic, %s, cannot be read and is left out.", path.name)
        return None
    return bucket
