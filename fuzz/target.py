"""What a fuzz target is, and what it raises when the code under test did something it may not. Knows no fuzzer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

CORPUS = Path(__file__).parent / "corpus"

Mutate = Callable[[bytes, int, Random], bytes]  # (case, most bytes of the result, randomness) -> a case


class FindingError(Exception):
    """A case made the code under test break a promise; the message says which."""


@dataclass(frozen=True)
class Target:
    """`check` runs one case: it returns, or raises whatever the code under test must not let out, or `FindingError`.

    `mutate` makes cases that are almost right, where flipped bytes would nearly always die at the first check; it is
    given the plain mutation to fall back on. `seeds` are the (file name, case) the corpus starts from.
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterator[tuple[str, bytes]]]
    max_bytes: int
    mutate: Callable[[Mutate], Mutate] | None = None


def corpus(name: str) -> Path:
    """The folder of a target's kept cases."""
    return CORPUS / name
