"""Where tables lie: a path or URI -> a filesystem and the files on it.

Whatever pyarrow opens by URI is accepted: s3://, gs://, abfs://, hdfs://, hf://, and fsspec's own as far as their
packages are installed. Keys for S3 come from where the AWS tools take them (the environment's AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, the shared credentials file, the machine's role), or stand in the URI, percent-encoded:
`s3://KEY:SECRET@bucket/prefix`. Other object stores that speak S3 are named in the URI's query:
`s3://bucket/prefix?endpoint_override=127.0.0.1:9000&scheme=http`. `region=` there spares a request that asks for it.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from parchgrad.errors import DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")


@dataclass(frozen=True)
class StoredFile:
    """One file of a data set."""

    name: str  # relative to what the user gave; the file's own name where that is the file itself
    path: str  # on its filesystem
    size: int  # bytes


def open_storage(data: str | os.PathLike[str]) -> tuple[FileSystem, str, str]:
    """The filesystem, the path on it, and how messages call it: without password and query.

    Raises DataError for a URI that names no filesystem, and where pyarrow is not installed.
    """
    text = os.fspath(data)
    try:
        from pyarrow.fs import LocalFileSystem
    except ImportError as error:
        raise DataError(
            f"'{shown(text)}' needs pyarrow, expected it installed: pip install 'parchgrad[parquet]'."
        ) from error
    if "://" not in text:
        return LocalFileSystem(), Path(text).absolute().as_posix(), text
    filesystem, path = _from_uri(text)
    return filesystem, path.rstrip("/"), shown(text)


def shown(text: str) -> str:
    """A path as it is; a URI without a password in it and without its query, which may hold keys."""
    if "://" not in text:
        return text
    scheme, rest = text.split("://", 1)
    place = rest.split("?", 1)[0].split("#", 1)[0]
    # A user without a password is no secret, and in abfs:// it is the container.
    user, at, after = place.rpartition("@")
    return f"{scheme}://{after}" if at and ":" in user else f"{scheme}://{place}"


def list_files(filesystem: FileSystem, path: str, root: str) -> list[StoredFile]:
    """The Parquet and Arrow files at `path`, a file or a folder at any depth, sorted by name.

    Files and folders whose name begins with '.' or '_' are left out, as other readers do. Raises DataError:
    nothing there, no such file in it.
    """
    from pyarrow.fs import FileSelector, FileType

    try:
        found: FileInfo = filesystem.get_file_info(path)
        if found.type == FileType.NotFound:
            raise DataError(f"'{root}' does not exist.")
        if found.type == FileType.File:
            return [StoredFile(found.base_name, found.path, found.size)]
        entries = filesystem.get_file_info(FileSelector(path, recursive=True))
    except DataError:
        raise
    except Exception as error:  # each kind of storage raises errors of its own
        raise DataError(f"'{root}' cannot be listed: {one_line(error)}.") from error
    files = [
        StoredFile(posixpath.relpath(entry.path, path), entry.path, entry.size)
        for entry in entries
        if entry.type == FileType.File and entry.base_name.lower().endswith(TABLE_SUFFIXES)
    ]
    files = [file for file in files if not any(part.startswith((".", "_")) for part in file.name.split("/"))]
    if not files:
        raise DataError(f"'{root}' holds no files of images, expected some that end in {', '.join(TABLE_SUFFIXES)}.")
    return sorted(files, key=lambda file: file.name)


def one_line(error: Exception) -> str:
    """The error's text on one line, without the full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _from_uri(uri: str) -> tuple[FileSystem, str]:
    import pyarrow
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
        return filesystem, str(path)
    except (pyarrow.ArrowException, OSError, ValueError, ImportError) as error:
        if "Unrecognized filesystem type" not in str(error):
            raise _refused(uri, error) from None
    try:
        return _from_fsspec(uri)
    except (ImportError, OSError, ValueError) as error:
        raise _refused(uri, error) from None


def _from_fsspec(uri: str) -> tuple[FileSystem, str]:
    """fsspec's filesystem for a scheme that pyarrow does not know itself."""
    from fsspec.core import url_to_fs
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = url_to_fs(uri)
    return PyFileSystem(FSSpecHandler(filesystem)), str(path)


def _refused(uri: str, error: Exception) -> DataError:
    # The reason may quote the URI, and an exception chain would; the URI may hold keys.
    reason = one_line(error).replace(uri, shown(uri))
    secret = urlsplit(uri).netloc.rpartition("@")[0]
    reason = reason.replace(secret, "...") if ":" in secret else reason
    return DataError(f"'{shown(uri)}' cannot be opened: {reason[:300]}.")
