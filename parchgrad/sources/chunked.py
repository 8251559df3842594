"""One Parquet or Arrow file as a sequence of chunks of rows: row groups, or record batches.

Read are Parquet, the Arrow IPC file format (which Feather version 2 is), and on local disk the Arrow IPC stream
format, which Hugging Face's `datasets` saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from parchgrad.errors import DataError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, NativeFile, RecordBatch, Schema, Table
    from pyarrow.fs import FileSystem
    from pyarrow.ipc import IpcReadOptions, RecordBatchFileReader, RecordBatchStreamReader

    from parchgrad.sources.storage import StoredFile

# A row group is held whole while its images are read, in every worker process.
MAX_GROUP_BYTES = 2 << 30

# A column, or a struct column and the name of its field.
Column = tuple[str, ...]


class Chunked(Protocol):
    """An open file."""

    @property
    def schema(self) -> Schema:
        """Its columns."""

    def labels(self, image: Column, label: str) -> tuple[list[int], ChunkedArray]:
        """Rows of each chunk, and the label column of all of them; no image is read."""

    def images(self, number: int, column: Column) -> ChunkedArray:
        """The image column of one chunk."""


def open_chunked(filesystem: FileSystem, file: StoredFile) -> Chunked:
    """Open a file; its footer is read, no rows. Raises what pyarrow raises, and DataError for other formats."""
    if file.path.lower().endswith(".parquet"):
        return _Parquet(filesystem, file)
    with filesystem.open_input_file(file.path) as start:
        magic = start.read(6)
    if magic == b"ARROW1":
        return _ArrowFile(filesystem, file)
    if magic.startswith(b"FEA1"):
        raise DataError(f"File '{file.name}' is of Feather version 1, expected version 2.")
    if not is_local(filesystem):
        raise DataError(
            f"File '{file.name}' is an Arrow stream, which has no index; from remote storage expected is Parquet "
            "or the Arrow file format."
        )
    return _ArrowStream(file)


def is_local(filesystem: FileSystem) -> bool:
    """Whether files are on this machine's disks."""
    return str(filesystem.type_name) == "local"


class _Parquet:
    def __init__(self, filesystem: FileSystem, file: StoredFile) -> None:
        from pyarrow.parquet import ParquetFile

        # Reading ahead spares requests to a store; on disk it would only start threads.
        self._file = ParquetFile(file.path, filesystem=filesystem, pre_buffer=not is_local(filesystem))
        self._name = file.name

    @property
    def schema(self) -> Schema:
        return self._file.schema_arrow

    def labels(self, image: Column, label: str) -> tuple[list[int], ChunkedArray]:
        metadata = self._file.metadata
        paths = [self._file.schema.column(position).path for position in range(metadata.num_columns)]
        position = paths.index(".".join(image))
        rows = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            size = group.column(position).total_uncompressed_size
            if size > MAX_GROUP_BYTES:
                raise DataError(
                    f"Row group {number} of file '{self._name}' holds {size} bytes of images, expected at most "
                    f"{MAX_GROUP_BYTES}; write it with a smaller row_group_size."
                )
            rows.append(int(group.num_rows))
        return rows, self._file.read([label], use_threads=False).column(0)

    def images(self, number: int, column: Column) -> ChunkedArray:
        # One column needs no threads of its own: the worker processes are the parallelism.
        return _field(self._file.read_row_group(number, columns=[".".join(column)], use_threads=False), column)


class _ArrowFile:
    def __init__(self, filesystem: FileSystem, file: StoredFile) -> None:
        import pyarrow

        local = is_local(filesystem)
        self._input: NativeFile = pyarrow.memory_map(file.path) if local else filesystem.open_input_file(file.path)
        self.schema: Schema = pyarrow.ipc.open_file(self._input).schema

    def labels(self, image: Column, label: str) -> tuple[list[int], ChunkedArray]:
        reader = self._reader(label)
        return _rows_and_labels([reader.get_batch(number) for number in range(reader.num_record_batches)], label)

    def images(self, number: int, column: Column) -> ChunkedArray:
        from pyarrow import Table

        return _field(Table.from_batches([self._reader(column[0]).get_batch(number)]), column)

    def _reader(self, column: str) -> RecordBatchFileReader:
        from pyarrow import ipc

        return ipc.open_file(self._input, options=_only(self.schema, column))


class _ArrowStream:
    """Mapped into memory: passing over a batch costs no reading, unless the stream is compressed."""

    def __init__(self, file: StoredFile) -> None:
        from pyarrow import ipc, memory_map

        self._path = file.path
        with memory_map(file.path) as start:
            self.schema: Schema = ipc.open_stream(start).schema
        self._batches: Iterator[RecordBatch] = iter(())
        self._next = -1  # number of the batch that comes next; -1: none is open

    def labels(self, image: Column, label: str) -> tuple[list[int], ChunkedArray]:
        return _rows_and_labels(list(self._reader(label)), label)

    def images(self, number: int, column: Column) -> ChunkedArray:
        from pyarrow import Table

        if not 0 <= self._next <= number:
            self._batches, self._next = iter(self._reader(column[0])), 0
        for batch in self._batches:
            self._next += 1
            if self._next > number:
                return _field(Table.from_batches([batch]), column)
        self._next = -1
        raise DataError("the file has become shorter")

    def _reader(self, column: str) -> RecordBatchStreamReader:
        from pyarrow import ipc, memory_map

        return ipc.open_stream(memory_map(self._path), options=_only(self.schema, column))


def _only(schema: Schema, column: str) -> IpcReadOptions:
    from pyarrow.ipc import IpcReadOptions

    return IpcReadOptions(included_fields=[schema.get_field_index(column)], use_threads=False)


def _rows_and_labels(batches: list[RecordBatch], label: str) -> tuple[list[int], ChunkedArray]:
    from pyarrow import chunked_array

    return [batch.num_rows for batch in batches], chunked_array([batch.column(label) for batch in batches])


def _field(table: Table, column: Column) -> ChunkedArray:
    """The only column of the table; of a struct, its field, null where the struct is."""
    from pyarrow import compute

    return table.column(0) if len(column) == 1 else compute.struct_field(table.column(0), column[1])
