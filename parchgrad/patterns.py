"""Glob patterns over layer names (`layer4.*`, `!*.se.*`): which layers they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from parchgrad.errors import OptionError


def match(names: Iterable[str], patterns: Sequence[str], option: str = "layers") -> tuple[str, ...]:
    """The names that fit any of the glob patterns (`layer4.*`, `*`), in the order of `names`.

    A pattern that begins with `!` takes out again what fits the rest of it (`*`, `!*.se.*`), wherever it
    stands; where all patterns do, they take from all names. Raises OptionError for a pattern that fits none,
    with `!` too (a typing mistake must not switch the rule off, or on), and where nothing is left; `option`
    is the name of the option the patterns came in.
    """
    names = tuple(names)
    without = tuple(pattern[1:] for pattern in patterns if pattern.startswith("!"))
    wanted = tuple(pattern for pattern in patterns if not pattern.startswith("!"))
    if without and not wanted:
        wanted = ("*",)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            known = f"{names[0]} ... {names[-1]}" if names else "a network without convolutions"
            raise OptionError(option, pattern, f"names or glob patterns ('layer4.*', '!*.se.*') of {known}")
    kept = tuple(name for name in names if _fits(name, wanted) and not _fits(name, without))
    if without and not kept:
        raise OptionError(option, ",".join(patterns), "patterns that leave at least one layer")
    return kept


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
