"""Image files in one folder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError, UnknownTargetError

if TYPE_CHECKING:
    from parchgrad.models import Model

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Image files in one folder a class, matched to the model's classes; a Source."""

    root: str
    names: list[str]  # relative to `root`, '/' between folders; sorted within each class, classes ascending
    targets: NDArray[np.int64]  # (n,) the model's class index of each

    @classmethod
    def scan(
        cls, root: str | os.PathLike[str], model: Model, *, least_classes: int = 2, least_images: int = 2
    ) -> ImageFolder:
        """Find the images before any work is done.

        A folder is named by a class's name, id or index; images may lie in folders within it. Raises DataError:
        no folders, a folder that is no class, two folders of one class, fewer than `least_images` images in a
        class, fewer than `least_classes` classes.
        """
        root = Path(root)
        folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        if not folders:
            raise DataError(f"'{root}' holds no folders of images, expected one for each class.")
        files: dict[int, list[str]] = {}
        for folder in folders:
            index = _class_of(folder, model)
            if index in files:
                raise DataError(f"'{folder}' is a second folder of class {index} ({model.labels[index]}).")
            files[index] = sorted(images_below(folder, root))
            if (found := len(files[index])) < least_images:
                raise DataError(
                    f"Class folder '{folder}' holds {found} image(s); a class needs at least {least_images}."
                )
        if len(files) < least_classes:
            raise DataError(f"'{root}' holds 1 class; a table contrasts at least {least_classes}.")
        classes = sorted(files)
        names = [name for index in classes for name in files[index]]
        targets = np.repeat(np.array(classes, np.int64), [len(files[index]) for index in classes])
        return cls(str(root), names, targets)

    @property
    def classes(self) -> tuple[int, ...]:
        """The model's class indices that have images, ascending."""
        return tuple(np.unique(self.targets).tolist())

    @property
    def run_length(self) -> int:
        """1: files are read one by one in any order."""
        return 1

    @property
    def run_starts(self) -> NDArray[np.int64]:
        """`(n,)`: each image is a run of its own."""
        return np.arange(len(self))

    @property
    def start_method(self) -> str | None:
        """None: worker processes may start in any way."""
        return None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path relative to the root, '/' between folders."""
        return self.names[index]

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(self.root, self.names[index])

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes | DataError]:
        """The files' bytes in order; a DataError in the place of one that is gone or not ours to read.

        Any other failure is the disk's or the network's, not the image's, and that DataError is raised.
        """
        return [self._read_one(int(index)) for index in indices]

    def fingerprint(self) -> str:
        """sha256 over names, sizes in bytes and targets, in order; asks each file's size, reads none."""
        digest = hashlib.sha256()
        for name, target in zip(self.names, self.targets.tolist(), strict=True):
            try:
                size = os.stat(os.path.join(self.root, name)).st_size
            except OSError:
                size = -1
            digest.update(f"{name}\0{size}\0{target}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> ImageFolder:
        """Only the images at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        return ImageFolder(self.root, [self.names[index] for index in chosen.tolist()], self.targets[chosen])

    def _read_one(self, index: int) -> bytes | DataError:
        try:
            return self.path(index).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            return DataError(f"Image '{self.names[index]}' cannot be read: {error.strerror}.")
        except OSError as error:
            raise DataError(f"File '{self.path(index)}' cannot be read: {error}.") from error


def images_below(folder: Path, root: Path) -> list[str]:
    """Image files in and below a folder, named from `root`, in any order; links to folders are not followed."""
    found: list[str] = []
    for here, _, names in os.walk(folder):
        prefix = os.path.relpath(here, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        found += [f"{prefix}{name}" for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return found


def _class_of(folder: Path, model: Model) -> int:
    try:
        return model.class_index(folder.name)
    except UnknownTargetError as error:
        raise DataError(f"Folder '{folder}' is named after no class of model '{model.name}': {error}") from error
