"""The state of an unfinished class graph: what each class done has said, so that the pass can go on after any end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from parchgrad.class_graph.exemplars import Exemplars
from parchgrad.class_graph.graph import write_arrays
from parchgrad.errors import ClassGraphError
from parchgrad.files import remove, write_text


@dataclass(frozen=True)
class ClassFound:
    """What the images of one class say."""

    arrays: dict[
        str, NDArray[Any]
    ]  # pagerank (S,), edge_from, edge_to, edge_weight, reference_counts (L, BINS), images ()
    bad: list[list[str]]  # name, reason


class Unfinished:
    """The classes done, a file each, in a folder; the next go on from the first that is not there.

    With exemplars, also their state after the last class done: written before that class's file, so that it is
    there for whatever number of classes is found.
    """

    def __init__(self, folder: Path, key: str, restart: bool) -> None:
        self.folder = folder
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "key"
        if written.is_file() and written.read_text(encoding="utf-8") != key:
            raise ClassGraphError(
                f"'{folder}' is of an unfinished class graph of other images or with other options; give the same ones "
                "to go on, or --restart."
            )
        write_text(written, key)
        self.done = 0
        while (folder / f"{self.done}.safetensors").is_file():
            self.done += 1

    def add(self, found: ClassFound, exemplars: Exemplars | None) -> None:
        if exemplars is not None:
            write_arrays(self.folder / f"exemplars-{self.done}.safetensors", exemplars.arrays())
        write_arrays(self.folder / f"{self.done}.safetensors", found.arrays, {"bad": json.dumps(found.bad)})
        remove(self.folder / f"exemplars-{self.done - 1}.safetensors")
        self.done += 1

    def restore(self, exemplars: Exemplars) -> None:
        """The state after the classes done. Raises ClassGraphError."""
        if not self.done:
            return
        path = self.folder / f"exemplars-{self.done - 1}.safetensors"
        try:
            exemplars.restore(load_file(path))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ClassGraphError(f"'{path}' cannot be read: {error}. --restart begins anew.") from error

    def read(self, row: int) -> ClassFound:
        path = self.folder / f"{row}.safetensors"
        try:
            with safe_open(path, framework="np") as file:
                bad = json.loads((file.metadata() or {})["bad"])
                return ClassFound({name: file.get_tensor(name) for name in file.keys()}, bad)  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ClassGraphError(f"'{path}' cannot be read: {error}. --restart begins anew.") from error
