"""Naming a class: by index, or by one of its names; and saying that a table has none of it."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence

from parchgrad.errors import UncoveredTargetError, UnknownTargetError


def class_index(target: object, *names: Sequence[str]) -> int:
    """Index of the class `target`: an integer (NumPy's too), a name, or an index written as text.

    `names` are one or more lists with a name for each class, asked in turn; where two classes share a name it
    means the first. A name that looks like an index is a name. Raises UnknownTargetError.
    """
    if isinstance(target, str):
        for column in names:
            if target in column:
                return column.index(target)
        # Bounded in length: int() itself refuses thousands of digits with a ValueError.
        number = int(target) if target.isascii() and target.isdigit() and len(target) <= 18 else -1
    else:
        number = _integer(target)
    if 0 <= number < len(names[0]):
        return number
    similar = nearest(target, names[0]) if isinstance(target, str) else None
    raise UnknownTargetError(
        "target", target, f"an index in 0..{len(names[0]) - 1} or a class name, such as {similar or names[0][0]!r}"
    )


def nearest(text: str, names: Sequence[str]) -> str | None:
    """The name most like `text`, or like one of its parts between commas, whatever the case; None if none is much.

    So 'tench' finds 'tench, Tinca tinca'. Only the first 50 characters of `text` count: callers may send many.
    """
    known: dict[str, str] = {}
    for name in names:
        for form in (name, *name.split(",")):
            known.setdefault(form.strip().casefold(), name)
    found = difflib.get_close_matches(text[:50].casefold(), known, n=1)
    return known[found[0]] if found else None


def no_row_for(missing: Sequence[int], table: str, covered: int, labels: Sequence[str]) -> UncoveredTargetError:
    """The error that `table`, with rows for `covered` of the classes `labels`, has none for these classes."""
    return UncoveredTargetError(
        f"Table '{table}' covers {covered} of the model's {len(labels)} classes; "
        f"it has no row for target {', '.join(f'{t} ({labels[t]})' for t in missing)}."
    )


def _integer(value: object) -> int:
    """The value as an index, -1 if it is none: no bool, no float, whatever its value."""
    if isinstance(value, bool):
        return -1
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1
