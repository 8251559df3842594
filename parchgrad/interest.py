"""Who still wants an explanation while it is computed: asked between two passes, and a no is final."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parchgrad.errors import AbandonedError, OptionError


class Interest:
    """Which images of an explanation somebody still wants."""

    def __init__(self, wanted: Callable[[], Sequence[bool]] | None, images: int) -> None:
        self._wanted = wanted
        self._still = [True] * images

    def ask(self, ready: Callable[[], object] | None = None) -> list[bool]:
        """One an image. Raises AbandonedError where none is wanted, OptionError for an answer of another length.

        Where somebody is asked at all, `ready` is called before: it waits for what has been begun.
        """
        if self._wanted is None:
            return self._still
        if ready is not None:
            ready()
        now = list(self._wanted())
        if len(now) != len(self._still):
            raise OptionError("wanted", now, f"one bool for each of the {len(self._still)} images")
        self._still = [was and bool(one) for was, one in zip(self._still, now, strict=True)]
        if not any(self._still):
            raise AbandonedError(f"None of the {len(now)} images is wanted any more.")
        return self._still
