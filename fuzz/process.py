"""The process libFuzzer runs in: `python -m fuzz.process MODULE [libFuzzer's arguments]`. Started by fuzz/run.py."""

import importlib
import os
import sys
from collections.abc import Callable
from random import Random

import atheris  # type: ignore[import-untyped,unused-ignore]

from fuzz.target import FindingError, Mutate, Target

# What is compiled with coverage counters: our readers and the Python halves of the libraries they call.
INSTRUMENTED = [
    "service",
    "PIL",
    "starlette.formparsers",
    "python_multipart",
    "parchgrad.options",
    "tritonclient.utils",
]
MOST_GROWTH_MB = 64  # what one case may add to the most memory ever allocated
MOST_MEMORY_MB = 1024  # what all of them together may


class Peak:
    """The most address space the process ever had, in MB: what a codec allocated and did not touch counts too."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/status", os.O_RDONLY)

    def __call__(self) -> int:
        text = os.pread(self._file, 4096, 0)
        start = text.index(b"VmPeak:") + 7
        return int(text[start : text.index(b"kB", start)]) // 1024


def watched(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`check` that raises `FindingError` where one case costs much memory."""
    peak = Peak()
    start = highest = peak()

    def run(case: bytes) -> None:
        nonlocal highest
        check(case)
        before, highest = highest, peak()
        if highest - before > MOST_GROWTH_MB:
            raise FindingError(f"One case took the memory from {before} MB to {highest} MB.")
        if highest - start > MOST_MEMORY_MB:
            raise FindingError(f"All cases together took the memory from {start} MB to {highest} MB.")

    return run


def mutator(mutate: Callable[[Mutate], Mutate]) -> Callable[[bytes, int, int], bytes]:
    structured = mutate(lambda case, most, random: atheris.Mutate(case, most))
    return lambda case, most, seed: structured(case, most, Random(seed))


def main() -> None:
    module, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=[*INSTRUMENTED, module]):
        target: Target = importlib.import_module(module).TARGET
    target.check(b"")  # whatever is imported or opened at first use is not the first case's growth
    # libFuzzer's merge starts itself again by its first argument, through a shell.
    itself = f"{sys.executable} -m fuzz.process {module}"
    options = {"custom_mutator": mutator(target.mutate)} if target.mutate else {}
    atheris.Setup([itself, f"-max_len={target.max_bytes}", *arguments], watched(target.check), **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
