"""Files of ours: their digest, and files and folders written whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from parchgrad.errors import InUseError

if TYPE_CHECKING:
    from torch import Tensor


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place, then rename it: a crash leaves the old file or none."""
    from safetensors.torch import save_file  # loads torch, which the other functions do without

    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        tensor = value.contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, as the state dicts of tied weights do.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        owned[key] = tensor
    with beside(path) as temporary:
        try:
            save_file(owned, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # What the system said, such as a full disk.
            raise OSError(f"{error}, writing '{path}'") from error
        # safetensors creates files only their owner can read; a service often runs as another user.
        temporary.chmod(0o644)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place, then rename it."""
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file that these functions write, and what a killed process left of writing it."""
    path.unlink(missing_ok=True)
    shutil.rmtree(_scratch(path), ignore_errors=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file to write, which is renamed to `path` when the block ends well, else removed.

    It lies in a folder of its own, as safetensors has a temporary file too: what a killed process left is removed.
    """
    folder = _scratch(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / path.name
        _flush(folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes `target`'s place when the block ends well; otherwise nothing has changed.

    What stood at `target` before is exchanged in one step where the system can (Linux), so that neither a crash
    nor a full disk ever leaves half a folder, and then removed. What killed processes left is removed as well.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as made:
        staged = made / target.name
        staged.mkdir()
        yield staged
        for path in (*staged.rglob("*"), staged):
            _flush(path)
        if not target.exists():
            staged.rename(target)
        elif not _exchange(staged, target):
            # Without the system call: for a moment the place is empty, never half full.
            before = made / "before"
            try:
                target.rename(before)
                staged.rename(target)
            finally:
                if before.exists() and not target.exists():
                    before.rename(target)
        _flush(target.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, held as long as it is there, removed at the end; what killed processes left goes too.

    Named only once it is held: under that name, one that nobody holds is a killed process's.
    """
    for scrap in target.parent.glob(f".{glob.escape(target.name)}.*.new"):
        with suppress(FileNotFoundError), _held(scrap) as ours:
            if ours:
                shutil.rmtree(scrap, ignore_errors=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".making"))
    named = made.with_suffix(".new")
    try:
        with _held(made):
            os.rename(made, named)
            yield named
    finally:
        for folder in (made, named):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def claimed(folder: Path, purpose: str) -> Iterator[None]:
    """Hold `folder`, made if need be, until the block or the process ends. Raises InUseError if another has it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder) as ours:
            if not ours:
                raise InUseError(f"'{folder}' is in use by another process for {purpose}.")
            yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()  # where nothing came of it


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """An advisory lock on a folder, gone with the process however it ends; False where another process has it.

    Where the system or the file system knows no such locks, it is as if nobody held any.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        except OSError:
            ours = True
        yield ours
    finally:
        os.close(handle)


def copy_or_link(source: Path, target: Path) -> None:
    """The same file under a second name; copied where the file system knows no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk: a rename may otherwise outlive a power cut that its contents do not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (renameat2(2)); False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
