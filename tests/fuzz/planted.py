"""A fuzz target with the fault that the environment names, behind six bytes: shows that every kind is found."""

import ctypes
import os
from collections.abc import Iterator

from fuzz.target import Target

FAULT = "PLANTED_FAULT"  # the variable: raise, crash or hoard
hoard: list[bytes] = []


def check(case: bytes) -> None:
    if case[:6] != b"fault!":
        return
    match os.environ.get(FAULT):
        case "raise":
            raise ValueError("planted")
        case "crash":
            ctypes.string_at(0)  # a fault in native code
        case "hoard":
            hoard.append(bytes(100_000_000))


def seeds() -> Iterator[tuple[str, bytes]]:
    yield from ()


TARGET = Target(check, seeds, max_bytes=8)
