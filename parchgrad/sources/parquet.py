"""Encoded images with labels in Parquet or Arrow files, on disk or in object storage; see storage.py for URIs.

Images are a column of binary, or Hugging Face's struct of bytes and path. Labels are class names, ids or indices of
the model; integers that Hugging Face's metadata name are matched by name. One row group is held at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError
from parchgrad.sources.chunked import Chunked, is_local, open_chunked
from parchgrad.sources.labels import Labels, class_names, image_column, label_column
from parchgrad.sources.storage import StoredFile, list_files, one_line, open_storage

if TYPE_CHECKING:
    from pyarrow import ChunkedArray
    from pyarrow.fs import FileSystem

    from parchgrad.models import Model


@dataclass(frozen=True, eq=False)
class ScannedFile:
    """What is known of a file before its images are read."""

    file: StoredFile
    column: tuple[str, ...]  # of images, and its field where it is a struct
    rows: list[int]  # of each chunk
    targets: NDArray[np.int64]  # of each row


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each row of a data set lies; rows are counted through all files."""

    filesystem: FileSystem
    files: tuple[StoredFile, ...]
    columns: tuple[tuple[str, ...], ...]  # the image column of each file, and its field where it is a struct
    file_starts: NDArray[np.int64]  # (files + 1,) rows before each file, and all rows
    chunk_starts: NDArray[np.int64]  # (chunks + 1,) rows before each chunk, and all rows
    chunk_files: NDArray[np.int64]  # (chunks,) the file of each chunk
    chunk_numbers: NDArray[np.int64]  # (chunks,) its number in that file

    @classmethod
    def of(cls, filesystem: FileSystem, scanned: Sequence[ScannedFile]) -> Layout:
        """The files one after the other."""
        chunks = [len(file.rows) for file in scanned]
        return cls(
            filesystem,
            tuple(file.file for file in scanned),
            tuple(file.column for file in scanned),
            np.cumsum([0, *(len(file.targets) for file in scanned)]),
            np.cumsum([0, *(rows for file in scanned for rows in file.rows)]),
            np.repeat(np.arange(len(scanned)), chunks),
            np.concatenate([np.arange(count) for count in chunks]),
        )

    def chunks_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """`(n,)`: the chunk of each row."""
        return np.searchsorted(self.chunk_starts, rows, side="right") - 1

    def name(self, row: int) -> str:
        """The row's file and its number in that: 'part-0.parquet#17'."""
        number = int(np.searchsorted(self.file_starts, row, side="right")) - 1
        return f"{self.files[number].name}#{row - int(self.file_starts[number])}"


class ParquetImages:
    """Images in the rows of Parquet or Arrow files; a Source.

    Rows are read in the files' order, files in the order of their names. A file that was open and the row group that
    was last read stay with the object, but neither with a pickled copy nor with a forked process.
    """

    def __init__(self, root: str, layout: Layout, rows: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """`rows`: `(n,)` rows of the layout, in reading order; `targets`: `(n,)` their classes."""
        self._root, self._layout, self._rows, self._targets = root, layout, rows, targets
        self._forget()

    @classmethod
    def scan(
        cls,
        uri: str | os.PathLike[str],
        model: Model,
        image_column: str | None = None,
        label_column: str | None = None,
        *,
        least_classes: int = 2,
        least_images: int = 2,
    ) -> ParquetImages:
        """Read the layout and the labels of a file, or of every file in a folder, and no image.

        Raises DataError: nothing there, no column or several that may hold images or labels, a column of the wrong
        type, a label that is null or no class of the model, fewer than `least_images` images in a class, fewer than
        `least_classes` classes.
        """
        filesystem, path, root = open_storage(uri)
        scanned = []
        labels = Labels(model)
        for file in list_files(filesystem, path, root):
            scanned.append(_scan_file(filesystem, file, labels, image_column, label_column))
        targets = np.concatenate([file.targets for file in scanned])
        _check_classes(targets, model, root, least_classes, least_images)
        return cls(root, Layout.of(filesystem, scanned), np.arange(len(targets)), targets)

    @property
    def root(self) -> str:
        """The path or URI the user gave, without password and query."""
        return self._root

    @property
    def targets(self) -> NDArray[np.int64]:
        """`(n,)`: the model's class index of each image, in reading order."""
        return self._targets

    @property
    def classes(self) -> tuple[int, ...]:
        """The model's class indices that have images, ascending."""
        return tuple(np.unique(self._targets).tolist())

    @property
    def run_length(self) -> int:
        """Images of a typical run: the median over `run_starts`."""
        return max(1, int(np.median(np.diff(self.run_starts, append=len(self)))))

    @property
    def run_starts(self) -> NDArray[np.int64]:
        """`(runs,)`: where the images of another row group begin; those of one are best read together."""
        return np.flatnonzero(np.diff(self._layout.chunks_of(self._rows), prepend=-1))

    @property
    def start_method(self) -> str | None:
        """'spawn' for storage with a client, whose threads a forked process lacks; None for local files."""
        return None if is_local(self._layout.filesystem) else "spawn"

    def __len__(self) -> int:
        return len(self._targets)

    def name(self, index: int) -> str:
        """The file, relative to the root, and the row in it: 'part-0.parquet#17'."""
        return self._layout.name(int(self._rows[index]))

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes | DataError]:
        """The encoded images in order; each row group among them is read once.

        A DataError stands in the place of an image that is null or empty. A row group that cannot be read is no dirty
        image but a broken file or a store that fails: that DataError is raised.
        """
        rows = self._rows[np.asarray(indices, np.int64)]
        chunks = self._layout.chunks_of(rows)
        found: list[bytes | DataError] = [DataError("not read")] * len(rows)
        for chunk in np.unique(chunks).tolist():
            places = np.flatnonzero(chunks == chunk)
            for place, image in zip(places.tolist(), self._read_from(chunk, rows[places]), strict=True):
                found[place] = image
        return found

    def fingerprint(self) -> str:
        """sha256 over names, sizes in bytes and rows of the files, the image columns, the rows taken and the targets.

        What the files held when they were scanned; reads nothing.
        """
        layout = self._layout
        digest = hashlib.sha256()
        for file, column, rows in zip(layout.files, layout.columns, np.diff(layout.file_starts).tolist(), strict=True):
            digest.update(f"{file.name}\0{file.size}\0{rows}\0{'.'.join(column)}\n".encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self._rows, "<i8").tobytes())
        digest.update(np.ascontiguousarray(self._targets, "<i8").tobytes())
        return digest.hexdigest()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> ParquetImages:
        """Only the images at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        return ParquetImages(self._root, self._layout, self._rows[chosen], self._targets[chosen])

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self._root, "layout": self._layout, "rows": self._rows, "targets": self._targets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._root, self._layout = state["root"], state["layout"]
        self._rows, self._targets = state["rows"], state["targets"]
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: tuple[int, Chunked] | None = None  # number of a file, and the file
        self._last: tuple[int, ChunkedArray] | None = None  # number of a chunk, and its images

    def _read_from(self, chunk: int, rows: NDArray[np.int64]) -> list[bytes | DataError]:
        """The images of `rows`, all of one chunk."""
        try:
            column = self._chunk(chunk)
            images = column.take(rows - self._layout.chunk_starts[chunk]).to_pylist()
        except MemoryError:
            raise
        except Exception as error:  # each kind of storage raises errors of its own
            first = self._layout.name(int(rows[0]))
            raise DataError(f"The row group of '{first}' cannot be read: {one_line(error)}.") from error
        return [image or self._unreadable(row, _EMPTY[image]) for row, image in zip(rows.tolist(), images, strict=True)]

    def _unreadable(self, row: int, reason: str) -> DataError:
        return DataError(f"Image '{self._layout.name(row)}' cannot be read: {reason}.")

    def _chunk(self, chunk: int) -> ChunkedArray:
        """The images of a chunk: those kept from last time, or read."""
        if self._process != os.getpid():
            self._forget()
        if self._last is not None and self._last[0] == chunk:
            return self._last[1]
        self._last = None  # two would be in memory at once
        layout = self._layout
        number = int(layout.chunk_files[chunk])
        if self._open is None or self._open[0] != number:
            self._open = number, open_chunked(layout.filesystem, layout.files[number])
        column = self._open[1].images(int(layout.chunk_numbers[chunk]), layout.columns[number])
        rows = int(layout.chunk_starts[chunk + 1] - layout.chunk_starts[chunk])
        if len(column) != rows:
            raise DataError(f"its row group has {len(column)} rows, expected {rows}: the file has changed")
        self._last = chunk, column
        return column


# Why there is no image: what the row holds instead.
_EMPTY = {None: "the row holds no bytes (null)", b"": "the row holds 0 bytes"}


def _scan_file(
    filesystem: FileSystem, file: StoredFile, labels: Labels, image: str | None, label: str | None
) -> ScannedFile:
    """What a file's footer and label column say. Raises DataError."""
    try:
        chunked = open_chunked(filesystem, file)
        images = image_column(chunked.schema, image, file.name)
        column = label_column(chunked.schema, label, file.name)
        rows, found = chunked.labels(images, column)
    except DataError:
        raise
    except Exception as error:  # each kind of storage raises errors of its own
        raise DataError(f"File '{file.name}' cannot be read: {one_line(error)}.") from error
    targets = labels.targets(found, class_names(chunked.schema, column, file.name), file.name)
    return ScannedFile(file, images, rows, targets)


def _check_classes(targets: NDArray[np.int64], model: Model, root: str, least_classes: int, least_images: int) -> None:
    classes, counts = np.unique(targets, return_counts=True)
    if len(classes) == 0:
        raise DataError(f"'{root}' holds no rows, expected images of at least {least_classes} class(es).")
    for index, count in zip(classes.tolist(), counts.tolist(), strict=True):
        if count < least_images:
            raise DataError(
                f"'{root}' holds {count} image(s) of class {index} ({model.labels[index]}); "
                f"a class needs at least {least_images}."
            )
    if len(classes) < least_classes:
        raise DataError(f"'{root}' holds 1 class; a table contrasts at least {least_classes}.")
