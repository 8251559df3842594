"""What the C library's allocator keeps: without this a worker grows to twice what it needs. Does nothing elsewhere."""

import ctypes
import gc
from collections.abc import Callable

_M_ARENA_MAX = -8  # <malloc.h>


def share_one_arena() -> None:
    """Called before the threads begin: each would keep an arena of its own, with the largest images it ever saw."""
    if mallopt := _function("mallopt"):
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Modules refer to themselves in circles, and malloc keeps what was freed: return both to the system now."""
    gc.collect()
    if trim := _function("malloc_trim"):
        trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None)
