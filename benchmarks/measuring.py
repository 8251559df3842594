"""How the benchmarks measure: process CPU time in interleaved rounds, and a call's memory (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# Large tensors then come from the system and go back to it, so that resident memory is memory in use.
EXACT_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def interleaved(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Process CPU seconds of each call, `runs` rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratios(values: list[float], base: list[float]) -> list[float]:
    """Round by round, so that a slower machine slows both sides."""
    return [value / by for value, by in zip(values, base, strict=True)]


@dataclass(frozen=True)
class Memory:
    """What a row needs beyond the network and its images, in MiB."""

    held: float  # kept between two calls: copies, hooks, caches
    added: float  # on top of that, at the peak of one call

    @property
    def peak(self) -> float:
        return self.held + self.added


def memory_of(build: Callable[[], Callable[[], object]], warm: Callable[[Callable[[], object]], object]) -> Memory:
    """Memory of what `build` makes, after `warm` has called it; in a process with EXACT_ALLOCATOR.

    `held` counts private pages only; the peak is the kernel's high-water mark of resident pages, set back
    before the call. Code is resident by then, having been called.
    """
    _settle()
    before = _status()["RssAnon"]
    call = build()
    warm(call)
    _settle()
    idle = _status()
    CLEAR_REFS.write_text("5", encoding="ascii")
    call()
    added = _status()["VmHWM"] - idle["VmRSS"]
    return Memory(held=max(0, idle["RssAnon"] - before) / 1024, added=max(0, added) / 1024)


def can_measure_memory() -> bool:
    """Whether this kernel tells a process its high-water mark and lets it set it back."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
        return {"VmHWM", "VmRSS", "RssAnon"} <= _status().keys()
    except OSError:
        return False


def _status() -> dict[str, int]:
    """This process's memory in KiB."""
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+)", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(value) for name, value in found}


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
