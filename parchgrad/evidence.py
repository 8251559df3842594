"""What images said about a network's channels: all that a selection table is computed from, and no table.

Evidence is gathered image by image, kept in one file, and added together: exact moments (`ClassMoments` says how far)
and hashed sampling make the result the same to the last bit for any order, grouping or interruption.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

import parchgrad
from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, EvidenceError
from parchgrad.files import write_tensors
from parchgrad.statistics import ClassMoments
from parchgrad.tables import CONTROLS, LayerTable, SelectionTable

FORMAT_VERSION = 1
EVIDENCE_FILE = "evidence.safetensors"
IMAGES_FILE = "images.tsv.gz"

# SciPy's Shapiro-Wilk p-value holds up to here (method.md section 1).
NORMALITY_IMAGES = 5000

DIGEST_BYTES = 16

FEATURE_OF_POINT = {
    "convolution": "mean of ReLU of the convolution's output, before normalisation",
    "activation": "mean after the network's own normalisation and activation, as far as they follow alone",
}


@dataclass(frozen=True)
class Subject:
    """What evidence is about; only evidence of one subject adds up."""

    model_name: str
    model_version: str
    weights_sha256: str
    labels: tuple[str, ...]
    preprocessing: str  # of the model, as JSON
    layers: dict[str, int]  # name -> channels, in the order they stand side by side
    idle_layers: tuple[str, ...]  # convolutions that do not run in prediction
    left_out: tuple[str, ...]  # convolutions that `layer_patterns` leave out
    layer_patterns: tuple[str, ...]
    statistics_point: str
    sample_images: int  # images in the normality test, at most; 0: no test
    seed: int  # draws that sample
    points: dict[str, str] = field(default_factory=dict)  # layer -> point reached, of the point `activation` alone
    batch_size: int = 0  # of the network's passes: features are the same to the last bit only among equal ones

    @property
    def channels(self) -> int:
        return sum(self.layers.values())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subject:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class Observation:
    """A few images looked at: `b` of them good, the others named with the reason."""

    features: NDArray[np.floating[Any]]  # (b, N)
    targets: NDArray[np.int64]  # (b,) class indices of the model
    names: list[str]
    digests: NDArray[np.uint8]  # (b, DIGEST_BYTES)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, why it cannot be read
    known: int = 0  # images left out because they are in the evidence already


def digest_of(data: bytes) -> bytes:
    """Identity of an image: BLAKE2b of its file's bytes, `DIGEST_BYTES` long."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def key_of(digest: bytes, target: int) -> bytes:
    """An image with its class, by which it counts once in what is put together."""
    return digest + int(target).to_bytes(4, "little")


def printable(name: str) -> str:
    """The name of a file with escapes for what is no UTF-8 in it, so that it can be written and shown."""
    return name.encode("utf-8", "backslashreplace").decode()


class Evidence:
    """Moments of every channel by class, a sample for the normality test, and which images were looked at.

    `classes` are the model's class indices that may occur, ascending; `sample_classes` among how many classes the
    sample is shared out, if there are more than these.
    """

    def __init__(self, subject: Subject, classes: Iterable[int], sample_classes: int | None = None) -> None:
        self.subject = subject
        self.classes = tuple(sorted(classes))
        self.moments = ClassMoments(len(self.classes), subject.channels)
        self.sample = _Sample(subject, sample_classes or len(self.classes))
        self.names: list[str] = []
        self.bad: list[tuple[str, str]] = []
        self.known = 0  # images left out because they were in the evidence already
        self.sources: list[dict[str, Any]] = []  # where the images came from, for the manifest
        self._targets: list[NDArray[np.int64]] = []
        self._digests: list[NDArray[np.uint8]] = []

    @property
    def targets(self) -> NDArray[np.int64]:
        """`(n,)`: class index of each image, as `names`."""
        return np.concatenate([np.empty(0, np.int64), *self._targets])

    @property
    def digests(self) -> NDArray[np.uint8]:
        """`(n, DIGEST_BYTES)`: identity of each image, as `names`."""
        return np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *self._digests])

    @property
    def images(self) -> int:
        return len(self.names)

    def observe(self, seen: Observation) -> None:
        """Add a few images."""
        self.bad += seen.bad
        self.known += seen.known
        if not len(seen.targets):
            return
        self.moments.update(seen.features, self._rows(seen.targets))
        self.sample.observe(seen)
        self._note(seen.names, seen.targets, seen.digests)

    def add(self, other: Evidence) -> None:
        """Add evidence of disjoint images, of some of these classes."""
        self.moments.add(other.moments, self._rows(np.array(other.classes)))
        self.sample.add(other.sample)
        self._note(other.names, other.targets, other.digests)
        self.bad += other.bad
        self.known += other.known
        self.sources += other.sources

    def merge(self, other: Evidence) -> Evidence:
        """The evidence of both sets of images together; neither changes.

        Raises EvidenceError where they are of different subjects, or an image is in both.
        """
        require_same(self.subject, other.subject)
        if shared := self.keys() & other.keys():
            places = [i for i, key in enumerate(other._keys_in_order()) if key in shared]
            raise EvidenceError(
                f"{len(shared)} image(s) are in both, such as '{other.names[places[0]]}'; they would count twice."
            )
        merged = Evidence(self.subject, set(self.classes) | set(other.classes))
        merged.add(self)
        merged.add(other)
        # Looked at twice, where a folder has grown: a bad image has no digest to be known by.
        merged.bad = sorted(set(merged.bad))
        return merged

    def table(self, defaults: Defaults, control: str = "none") -> SelectionTable:
        """The selection table of this evidence (method.md section 1).

        `control`: see `LayerTable.from_moments`. Raises DataError where a class has fewer than two images or there
        is but one class.
        """
        if control not in CONTROLS:
            raise EvidenceError(f"Control is {control!r}, expected one of {', '.join(CONTROLS)}.")
        subject = self.subject
        for index, count in zip(self.classes, self.moments.count.tolist(), strict=True):
            if count < 2:
                label = subject.labels[index]
                raise DataError(f"Class {index} ({label}) has {count:.0f} readable image(s); a class needs at least 2.")
        if len(self.classes) < 2:
            raise DataError("There are images of 1 class; a table contrasts at least 2.")
        layers, start = {}, 0
        for name, channels in subject.layers.items():
            here = slice(start, start + channels)
            moments = self.moments.columns(here.start, here.stop)
            # A layer at a time: all of the sample once more would be the largest thing in memory.
            sample = self.sample.features(here) if subject.sample_images else None
            layers[name] = LayerTable.from_moments(moments, sample, control)
            start += channels
        return SelectionTable(
            name=subject.model_name,
            version=subject.model_version,
            model_name=subject.model_name,
            weights_sha256=subject.weights_sha256,
            labels=subject.labels,
            classes=self.classes,
            layers=layers,
            images_per_class=tuple(int(n) for n in self.moments.count),
            defaults=defaults,
            idle_layers=subject.idle_layers,
            left_out=subject.left_out,
            statistics_point=subject.statistics_point,
            built={
                "by": f"parchgrad {parchgrad.__version__}",
                "data": self.sources,
                "images": self.images,
                "images_sha256": hashlib.sha256(self.images_record()).hexdigest(),
                "bad_images": [[printable(name), printable(reason)] for name, reason in sorted(self.bad)],
                "layer_patterns": list(subject.layer_patterns),
                "feature": FEATURE_OF_POINT[subject.statistics_point],
                **({"points": dict(subject.points)} if subject.points else {}),
                "test": "one-sided Welch t, class against all other images",
                "control": control,
                "normality": {"images": len(self.sample), "seed": subject.seed} if subject.sample_images else None,
                "batch_size": subject.batch_size,
            },
        )

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None, note: str = "") -> None:
        """Write one safetensors file whole; `extra` tensors and a `note` travel with it."""
        tensors = {**self._tensors(), **(extra or {})}
        # One entry: safetensors writes several in an order that changes from call to call.
        write_tensors(path, tensors, {"evidence": json.dumps({**self._header(), "note": note})})

    @classmethod
    def load(cls, path: Path) -> tuple[Evidence, dict[str, Tensor], str]:
        """The evidence, extra tensors and note of a file that `save` wrote. Raises EvidenceError."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
            header = json.loads(metadata["evidence"])
            if header["format_version"] != FORMAT_VERSION:
                found = header["format_version"]
                raise EvidenceError(
                    f"Evidence '{path}' has format version {found!r}; this library reads {FORMAT_VERSION}."
                )
            evidence = cls(Subject.from_json(header["subject"]), header["classes"], header["sample_classes"])
            evidence._restore(header, tensors)
            note = str(header["note"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise EvidenceError(f"Evidence '{path}' cannot be read: {type(error).__name__} {error}.") from error
        return evidence, {key: value for key, value in tensors.items() if key not in _OWN_TENSORS}, note

    def in_order(self) -> Evidence:
        """The same evidence with its images in order of class and name, so that equal evidence gives equal files."""
        targets, digests = self.targets, self.digests
        keys = self._keys_in_order()
        order = sorted(range(self.images), key=lambda i: (targets[i], self.names[i], keys[i]))
        ordered = Evidence(self.subject, self.classes, self.sample.classes)
        ordered.moments, ordered.sample = self.moments, self.sample
        ordered.bad, ordered.known, ordered.sources = sorted(self.bad), self.known, self.sources
        ordered._note([self.names[i] for i in order], targets[order], digests[order])
        return ordered

    def images_record(self) -> bytes:
        """Which images were looked at, as text: one line an image, digest, class index and name."""
        text = io.StringIO()
        # Every text quoted: whether a carriage return is a reason to quote differs between versions of Python.
        lines = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        lines.writerow(("digest", "class", "name"))
        targets = self.targets.tolist()
        lines.writerows(zip((d.tobytes().hex() for d in self.digests), targets, self.names, strict=True))
        return text.getvalue().encode("utf-8", "surrogateescape")

    def keys(self) -> set[bytes]:
        """`key_of` every image."""
        return set(self._keys_in_order())

    def _keys_in_order(self) -> list[bytes]:
        return [key_of(digest.tobytes(), target) for digest, target in zip(self.digests, self.targets, strict=True)]

    def _rows(self, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.searchsorted(self.classes, targets)
        found = np.array(self.classes)[np.minimum(rows, len(self.classes) - 1)]
        if bool((found != targets).any()):
            raise EvidenceError(f"Class {targets[found != targets][0]} is none of this evidence's classes.")
        return rows

    def _note(self, names: list[str], targets: NDArray[np.int64], digests: NDArray[np.uint8]) -> None:
        self.names += names
        self._targets.append(targets)
        self._digests.append(digests)

    def _header(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "subject": asdict(self.subject),
            "classes": list(self.classes),
            "sample_classes": self.sample.classes,
            "bad": self.bad,
            "known": self.known,
            "sources": self.sources,
        }

    def _tensors(self) -> dict[str, Tensor]:
        priorities, features, targets = self.sample.arrays()
        m = self.moments
        arrays = {
            "count": m.count, "sum": m.sum, "sum_low": m.sum_low, "squares": m.squares, "squares_low": m.squares_low,
            "sample_priorities": priorities, "sample_features": features, "sample_targets": targets,
            "targets": self.targets, "digests": self.digests,
            # No file name holds a zero byte.
            "names": np.frombuffer(bytearray("\0".join(self.names).encode("utf-8", "surrogateescape")), np.uint8),
        }  # fmt: skip
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def _restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name in ("count", "sum", "sum_low", "squares", "squares_low"):
            place = getattr(self.moments, name)
            if tensors[name].shape != place.shape:
                raise ValueError(f"'{name}' has shape {tuple(tensors[name].shape)}, expected {place.shape}")
            place[...] = tensors[name].numpy()
        self.sample.restore(*(tensors[f"sample_{n}"].numpy() for n in ("priorities", "features", "targets")))
        names = tensors["names"].numpy().tobytes().decode("utf-8", "surrogateescape")
        targets = tensors["targets"].numpy()
        self._note(names.split("\0") if len(targets) else [], targets, tensors["digests"].numpy())
        if len(self.names) != len(targets):
            raise ValueError(f"{len(self.names)} names for {len(targets)} images")
        self.bad = [(name, reason) for name, reason in header["bad"]]
        self.known = int(header["known"])
        self.sources = list(header["sources"])


_OWN_TENSORS = frozenset(
    {"count", "sum", "sum_low", "squares", "squares_low", "targets", "digests", "names"}
    | {"sample_priorities", "sample_features", "sample_targets"}
)


def used_digests(folder: str | os.PathLike[str] | None) -> frozenset[str] | None:
    """Digests (hexadecimal) of the images that the table in `folder` was built from; None where it has no record.

    Raises EvidenceError for a record that cannot be read.
    """
    if folder is None or not (path := Path(folder) / IMAGES_FILE).is_file():
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = csv.reader(file, delimiter="\t")
            if next(lines, None) != ["digest", "class", "name"]:
                raise ValueError("its first line is not 'digest, class, name'")
            return frozenset(line[0] for line in lines)
    except (OSError, EOFError, ValueError, IndexError, csv.Error, zlib.error) as error:
        raise EvidenceError(f"Record of images '{path}' cannot be read: {error}.") from error


class _Sample:
    """For each class the images of the lowest priorities: a sample of a union is the sample of the samples.

    A priority is a hash of seed and image, so that which images are in it depends on nothing else. `classes` share
    the room among them, one image a class at least.
    """

    def __init__(self, subject: Subject, classes: int) -> None:
        self.classes = classes
        self._room, self._seed, self._channels = subject.sample_images, subject.seed, subject.channels
        self._quota = max(1, self._room // classes) if self._room else 0
        self._kept: dict[int, tuple[NDArray[np.uint64], NDArray[np.float32]]] = {}
        self._count: dict[int, int] = {}

    def observe(self, seen: Observation) -> None:
        if self._quota:
            self._offer(seen.targets, self._priorities(seen.digests), seen.features)

    def add(self, other: _Sample) -> None:
        priorities, features, targets = other.arrays()
        if self._quota:
            self._offer(targets, priorities, features)

    def restore(
        self, priorities: NDArray[np.uint64], features: NDArray[np.float32], targets: NDArray[np.int64]
    ) -> None:
        self._offer(targets, priorities, features)

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.float32], NDArray[np.int64]]:
        """Priorities `(n,)`, features `(n, N)`, class indices `(n,)`, by class and priority."""
        priorities, features = [np.empty(0, np.uint64)], [np.empty((0, self._channels), np.float32)]
        targets: list[int] = []
        for target in sorted(self._kept):
            mine, rows = self._kept[target]
            order = np.argsort(mine[: self._count[target]], kind="stable")
            priorities.append(mine[order])
            features.append(rows[order])
            targets += [target] * len(order)
        return np.concatenate(priorities), np.concatenate(features), np.array(targets, np.int64)

    def __len__(self) -> int:
        return min(self._room, sum(self._count.values()))

    def features(self, channels: slice = slice(None)) -> NDArray[np.float32]:
        """`(n, C)` of these channels: n at most the room, with more classes than room the lowest priorities of all."""
        priorities, features = [np.empty(0, np.uint64)], []
        for target in sorted(self._kept):
            mine, rows = self._kept[target]
            order = np.argsort(mine[: self._count[target]], kind="stable")
            priorities.append(mine[order])
            features.append(rows[:, channels][order])
        chosen = np.sort(np.argsort(np.concatenate(priorities), kind="stable")[: self._room])
        return np.concatenate(features)[chosen]

    def _priorities(self, digests: NDArray[np.uint8]) -> NDArray[np.uint64]:
        key = str(self._seed).encode()
        hashed = b"".join(hashlib.blake2b(d.tobytes(), digest_size=8, key=key).digest() for d in digests)
        return np.frombuffer(hashed, np.uint64)

    def _offer(
        self, targets: NDArray[np.int64], priorities: NDArray[np.uint64], features: NDArray[np.floating[Any]]
    ) -> None:
        for target, priority, row in zip(targets.tolist(), priorities, features, strict=True):
            if target not in self._kept:
                empty = np.empty(self._quota, np.uint64), np.empty((self._quota, self._channels), np.float32)
                self._kept[target], self._count[target] = empty, 0
            mine, rows = self._kept[target]
            place = self._count[target]
            if place < self._quota:
                self._count[target] += 1
            else:
                place = int(mine.argmax())
                if priority >= mine[place]:
                    continue
            mine[place], rows[place] = priority, row


def require_same(one: Subject, other: Subject) -> None:
    """Raises EvidenceError, naming what differs, unless evidence of both adds up."""
    for thing in fields(Subject):
        mine, theirs = getattr(one, thing.name), getattr(other, thing.name)
        if mine != theirs:
            shown = ("", "") if thing.name in ("labels", "layers", "points") else (f": {mine!r}", f" and {theirs!r}")
            raise EvidenceError(f"The evidence does not add up: {thing.name} differs{shown[0]}{shown[1]}.")
