"""Where the images of a table come from: the Source protocol, and the door that opens one.

A source knows names, classes and encoded bytes; it decodes nothing and knows no network. Neither torch nor
pyarrow is imported here: pyarrow is, when a Parquet or Arrow source is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError
from parchgrad.sources.folder import IMAGE_SUFFIXES, ImageFolder
from parchgrad.sources.listed import ListedImages, open_listed
from parchgrad.sources.parquet import ParquetImages
from parchgrad.sources.storage import TABLE_SUFFIXES

if TYPE_CHECKING:
    from parchgrad.models import Model

__all__ = [
    "IMAGE_SUFFIXES", "TABLE_SUFFIXES", "Encoded", "ImageFolder", "ListedImages", "ParquetImages", "Source",
    "open_listed", "open_source",
]  # fmt: skip

Encoded = bytes


class Source(Protocol):
    """Encoded images with a class each, in a fixed reading order.

    Picklable: it goes to worker processes, and a file is opened where it is read. One object serves one thread.
    """

    @property
    def root(self) -> str:
        """What the user gave, for messages and the manifest; a URI without credentials and options."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """`(n,)`: the model's class index of each image, in reading order."""

    @property
    def classes(self) -> tuple[int, ...]:
        """The model's class indices that have images, ascending."""

    @property
    def run_length(self) -> int:
        """How many consecutive images are good to read together, by one worker; 1 where it does not matter."""

    @property
    def run_starts(self) -> NDArray[np.int64]:
        """`(runs,)`: where runs begin; cut between workers there, no part of a file is read twice."""

    @property
    def start_method(self) -> str | None:
        """How worker processes that read from this must start, such as 'spawn'; None: in any way."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image, relative to `root`: 'n01440764/a.JPEG', 'part-0.parquet#17'."""

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Encoded | DataError]:
        """The encoded images at `indices`, in that order; ascending neighbours are read fastest.

        An image that cannot be read is a DataError in its place; storage that fails raises one.
        """

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over names, sizes and targets: other data, another string."""

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Source:
        """Only the images at `indices`, in that order."""


def open_source(
    data: str | os.PathLike[str],
    model: Model,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    least_classes: int = 2,
    least_images: int = 2,
) -> Source:
    """The source that `data` names, its labels matched to the classes of `model`.

    A folder with one folder of images a class; or a Parquet or Arrow file, a folder of them, or a URI of one or
    the other (s3://, gs://, file://, ...). The columns are found by their usual names where they are not given.
    Raises DataError before any image is read, also where there are fewer classes, or images in a class, than
    these: a table alone needs two of both, one that grows takes any.
    """
    parquet = partial(
        ParquetImages.scan, model=model, image_column=image_column, label_column=label_column,
        least_classes=least_classes, least_images=least_images,
    )  # fmt: skip
    text = os.fspath(data)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif "://" in text:
        return parquet(text)
    root = Path(text)
    if root.is_file() and root.suffix.lower() not in TABLE_SUFFIXES:
        expected = f"a folder, or a file that ends in {', '.join(TABLE_SUFFIXES)}"
        raise DataError(f"'{root}' is a file of another kind, expected {expected}.")
    if root.is_file() or _holds_tables(root):
        return parquet(root)
    if image_column is not None or label_column is not None:
        raise DataError(f"'{root}' holds no Parquet or Arrow files, expected some where a column is named.")
    return ImageFolder.scan(root, model, least_classes=least_classes, least_images=least_images)


def _holds_tables(root: Path) -> bool:
    """Whether the folder is one of tables: the first file known decides, and at the top both kinds are refused."""
    found: dict[str, str] = {}
    for name in _files(root):
        suffix = os.path.splitext(name)[1].lower()
        at_top = "/" not in name
        kind = "tables" if suffix in TABLE_SUFFIXES else "images" if suffix in IMAGE_SUFFIXES and not at_top else None
        if kind is None:
            continue
        found.setdefault(kind, name)
        if len(found) == 2:
            raise DataError(
                f"'{root}' holds both tables ('{found['tables']}') and folders of images ('{found['images']}'), "
                "expected one kind."
            )
        if not (kind == "tables" and at_top):
            return "tables" in found
    return "tables" in found


def _files(root: Path) -> Iterator[str]:
    """Names of files below `root`, '/' between folders; those at the top first. Hidden ones are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(names):
            if not name.startswith((".", "_")):
                yield name if relative == "." else f"{relative}/{name}"
