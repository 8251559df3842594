"""The forms a gradient is handed on in: whole, even along axes, or only some of its planes (or pooling.Pooled)."""

from __future__ import annotations

from dataclasses import dataclass

from parchgrad.graph.builder import Builder


class Whole(str):
    """The name of a tensor of the value's own shape."""


class Even(str):
    """The name of one that is the same along axes where it has length 1 and its value more."""


@dataclass(frozen=True)
class Planes:
    """Of one image: some channels, the others being zero; `C` channels, of which `R` are there."""

    name: str  # (1, R, h, w)
    channels: str  # (R,) int64
    place: str  # (C,) int64: of each channel among them; R where it is not

    def some(self, b: Builder, channels: str) -> str:
        """These channels `(n,)`, `(1, n, h, w)`."""
        return self._picked(b, b.op("Gather", self.place, channels, axis=0))

    def whole(self, b: Builder) -> Whole:
        return Whole(self._picked(b, self.place))

    def _picked(self, b: Builder, places: str) -> str:
        with_zeros = b.op("Pad", self.name, b.ints(0, 0, 0, 0, 0, 1, 0, 0))
        return b.op("Gather", with_zeros, places, axis=1)
