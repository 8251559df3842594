"""Image files below one folder, of the classes that a file says: a CSV file, or annotations with boxes."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError
from parchgrad.evaluation.boxes import IMAGE_COLUMNS, LABEL_COLUMNS, by_image, read_boxes
from parchgrad.sources.folder import ImageFolder, images_below
from parchgrad.sources.labels import Labels

if TYPE_CHECKING:
    from parchgrad.models import Model

Name = str | os.PathLike[str]


def open_listed(root: Name, model: Model, labels: Name) -> ListedImages:
    """The images below `root`, with the labels of a file: see `read_labels` and `ListedImages.scan`.

    Raises DataError before any image is read.
    """
    return ListedImages.scan(root, model, read_labels(labels))


@dataclass(frozen=True, eq=False)
class ListedImages:
    """Image files below one folder, in whatever folders, with a label each from elsewhere; a Source."""

    files: ImageFolder
    unlabelled: tuple[str, ...]  # names of the images below the folder that have no label: they are not in the source

    @classmethod
    def scan(cls, root: Name, model: Model, labels: Mapping[str, Sequence[str]]) -> ListedImages:
        """Find the images below `root` that have labels, by image; a label is a class's name, id or index.

        Image and label are matched by name as boxes are (`boxes.by_image`); labels of images that are not there are
        not looked at. Raises DataError: no image; none with a label; a label that is no class of the model, or a
        name of several; an image with labels of several classes.
        """
        root = Path(root)
        there = sorted(images_below(root, root)) if root.is_dir() else []
        if not there:
            raise DataError(f"'{root}' holds no images, expected some: the labels are of images below it.")
        found = by_image(labels, there, "labels")
        if not found:
            first = next(iter(labels), None)
            what = "there are no labels" if first is None else f"the first label is of '{first}'"
            raise DataError(f"None of the {len(there)} images of '{root}' has a label, '{there[0]}' to begin; {what}.")
        known = Labels(model)
        targets = {name: _only(name, {known.class_of(one, f"Image '{name}'"): one for one in found[name]})
                   for name in there if name in found}  # fmt: skip
        names = sorted(targets, key=lambda name: (targets[name], name))
        files = ImageFolder(str(root), names, np.array([targets[name] for name in names], np.int64))
        return cls(files, tuple(name for name in there if name not in found))

    @property
    def root(self) -> str:
        """The folder."""
        return self.files.root

    @property
    def targets(self) -> NDArray[np.int64]:
        """`(n,)`: the model's class index of each image, ascending, names sorted within each."""
        return self.files.targets

    @property
    def classes(self) -> tuple[int, ...]:
        """The model's class indices that have images, ascending."""
        return self.files.classes

    @property
    def run_length(self) -> int:
        """1: files are read one by one in any order."""
        return self.files.run_length

    @property
    def run_starts(self) -> NDArray[np.int64]:
        """`(n,)`: each image is a run of its own."""
        return self.files.run_starts

    @property
    def start_method(self) -> str | None:
        """None: worker processes may start in any way."""
        return self.files.start_method

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Path relative to the root, '/' between folders."""
        return self.files.name(index)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.files.path(index)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes | DataError]:
        """The files' bytes in order, as `ImageFolder.read` gives them."""
        return self.files.read(indices)

    def fingerprint(self) -> str:
        """sha256 over names, sizes in bytes and targets, in order; asks each file's size, reads none."""
        return self.files.fingerprint()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> ListedImages:
        """Only the images at `indices`, in that order."""
        return ListedImages(self.files.take(indices), self.unlabelled)


def read_labels(path: Name) -> dict[str, tuple[str, ...]]:
    """The different labels of each image, as the file has them: from a `.csv`, an `.xml`, or a folder of `.xml` files.

    A CSV file has a header and the columns `image` (or `image_id`) and `label` (or `wnid`), others are ignored: a
    list with a row an image, or boxes with a row each. XML is PASCAL VOC's (`boxes.read_voc`): the objects' names.
    Raises DataError.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv" and not path.is_dir():
        return _read_csv(path)
    labels: dict[str, tuple[str, ...]] = {}
    for name, annotation in read_boxes(path).items():
        said = [box.label for box in annotation.boxes]
        if None in said:
            raise DataError(f"Boxes '{path}': a box of image '{name}' has no label; expected one, to name its class.")
        if said:
            labels[name] = tuple(dict.fromkeys(label for label in said if label is not None))
    return labels


def _read_csv(path: Path) -> dict[str, tuple[str, ...]]:
    labels: dict[str, dict[str, None]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [column.strip() for column in next(lines, [])]
            columns = [next((one for one in names if one in header), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)]
            if None in columns:
                raise DataError(f"Labels '{path}' have the columns {header}; expected image and label.")
            image, label = (header.index(column) for column in columns if column is not None)
            for row in lines:
                if not row:
                    continue
                where = f"Labels '{path}', line {lines.line_num}"
                if len(row) != len(header):
                    raise DataError(f"{where}: {len(row)} values; expected {len(header)}, as the header has.")
                for column in (image, label):
                    if not row[column].strip():
                        raise DataError(f"{where}: column '{header[column]}' is empty; expected a value.")
                labels.setdefault(row[image].strip(), {})[row[label].strip()] = None
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"Labels '{path}' cannot be read: {error}.") from error
    return {name: tuple(said) for name, said in labels.items()}


def _only(name: str, classes: Mapping[int, str]) -> int:
    """The one class of an image, of class indices and the labels that mean them."""
    if len(classes) > 1:
        several = ", ".join(f"{index} ('{label}')" for index, label in classes.items())
        raise DataError(f"Image '{name}' has labels of the classes {several}; expected one class.")
    return next(iter(classes))
