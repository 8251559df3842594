"""How much memory the worker uses where it computes, and how much there is: a CPU's and a GPU's. Frees none.

Asked every few seconds in a thread, never on the event loop: a card may be slow to answer.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from service import metrics

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
CPU = "cpu"
_ROOT = Path("/")


async def watch(devices: Callable[[], Iterable[str]]) -> None:
    """Keep the gauges fresh; `devices`: where torch runs models now, `cpu` or `cuda:N`, asked on the event loop."""
    before: set[str] = set()
    while True:
        try:
            now = set(devices())
            await asyncio.to_thread(refresh, now)
            for device in before - now - {CPU}:
                metrics.device_memory_used.labels(device).set(0)  # its last model is gone
            before = now
        except Exception:  # whatever a driver raises: the next look may find it better
            log.exception("The memory of the devices cannot be read.")
        await asyncio.sleep(EVERY_SECONDS)


def refresh(devices: Iterable[str]) -> None:
    """One look. What cannot be known is not told: a system without /proc has no figures for its CPU."""
    known = {CPU: (resident_bytes(), limit_bytes())} | {name: _of_card(name) for name in devices if name != CPU}
    for name, (used, total) in known.items():
        if used is not None:
            metrics.device_memory_used.labels(name).set(used)
        if total is not None:
            metrics.device_memory_total.labels(name).set(total)


def resident_bytes(root: Path = _ROOT) -> int | None:
    """Of this process (proc(5), statm: the second number, in pages)."""
    text = _text(root / "proc/self/statm")
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else None


def limit_bytes(root: Path = _ROOT) -> int | None:
    """The least of the machine's memory and of what the control groups (version 2 or 1) allow this process."""
    limits = [int(text) for file in _limit_files(root) if (text := _text(file)).isdecimal()]
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    return min(limits, default=None)


def _limit_files(root: Path) -> Iterable[Path]:
    """A group and those it lies in each may have a limit. In a container the own group is often seen as the root."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.strip("/"))
        for group in (inner, *inner.parents):
            yield top / group / name


def _of_card(device: str) -> tuple[int, int]:
    """What torch has reserved on it for this worker, and the card's memory."""
    torch = sys.modules["torch"]  # a model runs there: it has been imported
    return torch.cuda.memory_reserved(device), torch.cuda.get_device_properties(device).total_memory


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # there is none, or it is not for us
        return ""
