"""Which columns of a table hold images and labels, and which class of the model a label means."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError, UnknownTargetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyarrow import ChunkedArray, DataType, DictionaryArray, Schema

    from parchgrad.models import Model

IMAGE_COLUMNS = ("image", "jpg", "png", "img", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "wnid", "target")


def image_column(schema: Schema, given: str | None, file: str) -> tuple[str, ...]:
    """The column of encoded images, and its field where it is a struct (Hugging Face's). Raises DataError."""
    kind = "binary, or a struct with a binary field 'bytes'"
    name = _column(schema, given, file, "image", IMAGE_COLUMNS, _holds_images, kind)
    return (name,) if _is_binary(schema.field(name).type) else (name, "bytes")


def label_column(schema: Schema, given: str | None, file: str) -> str:
    """The column of labels. Raises DataError."""
    return _column(schema, given, file, "label", LABEL_COLUMNS, _holds_labels, "integers or strings")


def class_names(schema: Schema, column: str, file: str) -> tuple[str, ...] | None:
    """What the integers of a label column mean, where Hugging Face's metadata say so; else None.

    Raises DataError for metadata that cannot be read.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        feature = json.loads(metadata)["info"]["features"].get(column) or {}
        names = feature.get("names")
        return None if names is None else tuple(str(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"File '{file}' has Hugging Face metadata without readable features, expected JSON with info.features: "
            f"{error!r}."
        ) from error


class Labels:
    """Labels of a data set as classes of a model; each distinct label is looked up once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        shared = {name for name, count in Counter(model.labels).items() if count > 1}
        self._ambiguous = shared - set(model.class_ids)
        self._known: dict[str | int, int] = {}
        self._named: dict[tuple[str, ...], list[int]] = {}

    def targets(self, column: ChunkedArray, names: tuple[str, ...] | None, file: str) -> NDArray[np.int64]:
        """`(rows,)` class indices of the model; `names` is what integers mean, if not the model's indices.

        Raises DataError naming the file, the row and the label: null, or no class of the model.
        """
        encoded = _encoded(column)
        positions = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        values = encoded.dictionary.to_pylist()
        # A dictionary may hold values that no row has: they need not be classes.
        used, rows = np.unique(positions, return_index=True)
        classes = np.full(len(values), -1, np.int64)
        for row, position in sorted(zip(rows.tolist(), used.tolist(), strict=True)):
            where = f"Row {row} of file '{file}'"
            label = values[position] if position >= 0 else None
            if label is None:
                raise DataError(f"{where} has no label (null), expected a class of the model.")
            classes[position] = (
                self.class_of(label, where)
                if names is None or isinstance(label, str)
                else (self._class_of_number(label, names, where, file))
            )
        found: NDArray[np.int64] = classes[positions]
        return found

    def class_of(self, label: str | int, where: str) -> int:
        """The class of which a label is name, id or index; `where` it stands is for the message. Raises DataError."""
        if label not in self._known:
            if label in self._ambiguous:
                raise DataError(
                    f"{where} is of class '{label}', a name of several classes; expected an id or an index."
                )
            try:
                self._known[label] = self._model.class_index(label)
            except UnknownTargetError as error:
                raise DataError(f"{where} is of no class of model '{self._model.name}': {error}") from error
        return self._known[label]

    def _class_of_number(self, number: int, names: tuple[str, ...], where: str, file: str) -> int:
        if not 0 <= number < len(names):
            raise DataError(f"{where} has label {number}, expected 0..{len(names) - 1}, the file's own classes.")
        if names not in self._named:
            self._named[names] = self._classes_of(names, file)
        return self._named[names][number]

    def _classes_of(self, names: tuple[str, ...], file: str) -> list[int]:
        """The model's class of each of the file's own classes, another one for each."""
        if names == self._model.labels:
            return list(range(len(names)))  # in the model's order, even where two share a name
        found: list[int] = []
        for number, name in enumerate(names):
            index = self.class_of(name, f"Label {number} of file '{file}'")
            if index in found:
                other = names[found.index(index)]
                raise DataError(f"File '{file}' has classes '{other}' and '{name}', both class {index} of the model.")
            found.append(index)
        return found


def _column(
    schema: Schema,
    given: str | None,
    file: str,
    what: str,
    usual: tuple[str, ...],
    fits: Callable[[DataType], bool],
    kind: str,
) -> str:
    """The column named by the user, or the only one that has a usual name and a type that fits."""
    names = list(schema.names)
    there = f"columns are {', '.join(repr(name) for name in names)}"
    candidates = [name for name in (usual if given is None else (given,)) if name in names]
    if not candidates:
        expected = f"one named {', '.join(usual)}" if given is None else f"'{given}'"
        raise DataError(f"File '{file}' has no {what} column, expected {expected} (--{what}-column); its {there}.")
    fitting = [name for name in candidates if fits(schema.field(name).type)]
    if not fitting:
        found = schema.field(candidates[0]).type
        raise DataError(
            f"File '{file}': column '{candidates[0]}' is of type {found}, expected {kind} (--{what}-column names "
            f"another); its {there}."
        )
    if len(fitting) > 1:
        several = ", ".join(repr(name) for name in fitting)
        raise DataError(
            f"File '{file}' has several {what} columns ({several}), expected one: --{what}-column names it."
        )
    return fitting[0]


def _is_binary(kind: DataType) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _holds_images(kind: DataType) -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return _is_binary(kind)
    return any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _holds_labels(kind: DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(text or types.is_integer(kind))


def _encoded(column: ChunkedArray) -> DictionaryArray:
    """The column as one array of positions in a dictionary of distinct values."""
    from pyarrow import DictionaryArray, array, types

    if not types.is_dictionary(column.type):
        if types.is_string_view(column.type):
            column = column.cast("string")
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, DictionaryArray):
        return whole
    # Of no chunk or several, pyarrow gives a chunked array back.
    return DictionaryArray.from_arrays(array([], "int32"), array([], column.type.value_type))
