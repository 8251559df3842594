"""The images of an evaluation: which of a source's may be looked at, and mosaics made of them.

An image may be looked at if it can be read and the table was not built from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from parchgrad.errors import DataError
from parchgrad.evaluation import mosaics
from parchgrad.evidence import digest_of
from parchgrad.preprocessing import Preprocessing, decode_image
from parchgrad.sources import Encoded, Source

if TYPE_CHECKING:
    from PIL.Image import Image

# Images read together: bounds memory, not results.
READ_TOGETHER = 64

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Picture:
    """A normalised image `(3, h, w)`, the class to explain, and where it is, bool `(h, w)`, if that is known."""

    image: Tensor
    target: int
    mask: NDArray[np.bool_] | None = None
    name: str = ""  # no other of its sequence has it: 'n01440764/a.JPEG', 'mosaic 17'
    group: str = ""  # name of the photograph that the target is of: pictures of one are not independent

    @property
    def place(self) -> NDArray[np.bool_]:
        """The mask, for what cannot do without. Raises DataError where there is none."""
        if self.mask is None:
            raise DataError(f"Picture '{self.name}' has no mask; expected one, to measure where its target is.")
        return self.mask


@dataclass(frozen=True)
class LeftOut:
    """Names of the images that were left out, of those looked at, and classes that had too few others."""

    used: tuple[str, ...]  # the table was built from them
    unreadable: tuple[str, ...]
    looked_at: int
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of a source's images, and which images could not be in them."""

    pictures: LazyPictures
    left_out: LeftOut
    indices: NDArray[np.int64]  # (n, 4): which of the source's images each is of


def mosaics_of(
    source: Source,
    preprocessing: Preprocessing,
    count: int,
    seed: int,
    *,
    spread: bool = False,
    used: Set[str] = frozenset(),
    progress: Progress | None = None,
) -> Mosaics:
    """`count` mosaics of the source's images, four different classes each; the target is one of the four.

    An image that was drawn and cannot be read, or whose digest is in `used` (hexadecimal, `used_digests` of
    evidence.py), is replaced by another of its class: without such images the mosaics are `mosaics.draw`'s. With
    `spread`, all images of a class that can be used are in as many mosaics, or one more: few mosaics share any.
    Each drawn image is looked at once, here; the pictures are made when asked for, so that memory does not
    grow with their number; `progress(done, total)` counts the drawn images. Raises DataError for fewer than 4
    classes, and where a class has no image left.
    """
    if len(source.classes) < 4:
        raise DataError(f"'{source.root}' holds images of {len(source.classes)} classes; a mosaic needs 4.")
    if preprocessing.rule == "native":
        # Images of one size fit together; the model takes any.
        preprocessing = replace(preprocessing, rule="stretch")
    drawn, quarters = mosaics.draw(source.targets, count, seed, spread=spread)
    verdicts = Verdicts(source, used)
    verdicts.look(drawn.ravel().tolist(), progress)
    indices = _replaced(drawn, source, verdicts, seed, spread)

    def picture(number: int) -> Picture:
        images = [preprocessing.apply(decoded(source, int(i)))[0] for i in indices[number]]
        quarter = int(quarters[number])
        mask = mosaics.quarter_mask(images[0].shape[1], images[0].shape[2], quarter)
        index = int(indices[number][quarter])
        return Picture(
            mosaics.four(images), int(source.targets[index]), mask, name=f"mosaic {number}", group=source.name(index)
        )

    return Mosaics(LazyPictures(count, picture), verdicts.left_out(), indices)


def usable(
    source: Source,
    enough: int,
    seed: int,
    *,
    least: int = 1,
    used: Set[str] = frozenset(),
    progress: Progress | None = None,
) -> tuple[Source, LeftOut]:
    """Images that can be read and whose digests are not in `used`: of each class `enough`, or all it has.

    They are looked for in an order drawn from `seed`, and no further than needed. A class of fewer than `least`
    is left out. `progress(done, total)` counts images found.
    """
    generator = np.random.default_rng([seed, 4])
    verdicts, chosen, left = Verdicts(source, used), [], []
    sizes = {target: int((source.targets == target).sum()) for target in source.classes}
    done, total = 0, sum(min(enough, size) for size in sizes.values())
    for target, size in sizes.items():
        members = generator.permutation(np.flatnonzero(source.targets == target)).tolist()
        found: list[int] = []
        start = 0
        while start < size and len(found) < enough:
            part = members[start : start + min(READ_TOGETHER, enough - len(found))]
            start += len(part)
            verdicts.look(part)
            found += [index for index in part if verdicts.fine(index)]
            if progress is not None:
                progress(done + len(found), total)
        done += len(found)
        total -= min(enough, size) - len(found)
        if len(found) < least:
            left.append(target)
        else:
            chosen += found
    if progress is not None:
        progress(done, total)
    return source.take(sorted(chosen)), replace(verdicts.left_out(), classes=tuple(left))


class Verdicts:
    """What is known of a source's images: `fine`, `used` or `unreadable`, by index.

    Each that is looked at is read once; `seen(index, image)` gets the fine ones' pixels.
    """

    def __init__(self, source: Source, used: Set[str], seen: Callable[[int, Image], None] | None = None) -> None:
        self.known: dict[int, str] = {}
        self._source, self._used, self._seen = source, used, seen

    def left_out(self) -> LeftOut:
        return LeftOut(self._names("used"), self._names("unreadable"), len(self.known))

    def fine(self, index: int) -> bool:
        self.look([index])
        return self.known[index] == "fine"

    def look(self, indices: Sequence[int], progress: Progress | None = None) -> None:
        wanted = sorted(set(indices) - self.known.keys())
        for start in range(0, len(wanted), READ_TOGETHER):
            part = wanted[start : start + READ_TOGETHER]
            for index, encoded in zip(part, self._source.read(part), strict=True):
                self.known[index] = self._verdict(index, encoded)
            if progress is not None:
                progress(start + len(part), len(wanted))

    def _names(self, verdict: str) -> tuple[str, ...]:
        return tuple(self._source.name(i) for i, found in sorted(self.known.items()) if found == verdict)

    def _verdict(self, index: int, encoded: Encoded | DataError) -> str:
        if isinstance(encoded, DataError):
            return "unreadable"
        if digest_of(encoded).hex() in self._used:
            return "used"
        try:
            image = decode_image(encoded, self._source.name(index))
        except DataError:
            return "unreadable"
        if self._seen is not None:
            self._seen(index, image)
        return "fine"


def _replaced(
    drawn: NDArray[np.int64], source: Source, verdicts: Verdicts, seed: int, spread: bool
) -> NDArray[np.int64]:
    """`drawn` `(count, 4)` with every image that is not fine replaced by one of its class that is.

    With `spread`, by one that is in the fewest mosaics.
    """
    generator = np.random.default_rng([seed, 1])
    indices = drawn.copy()
    for place in np.ndindex(*drawn.shape):
        if verdicts.fine(int(drawn[place])):
            continue
        target = int(source.targets[drawn[place]])
        # In a new order each time, so that one image does not stand in for all that are missing.
        others = generator.permutation(np.flatnonzero(source.targets == target)).tolist()
        if spread:
            others.sort(key=lambda index: np.count_nonzero(indices == index))
        fine = next((index for index in others if verdicts.fine(index)), None)
        if fine is None:
            found = [verdicts.known[index] for index in others]
            raise DataError(
                f"'{source.root}': none of the {len(others)} images of class {target} can be in a mosaic; "
                f"{found.count('used')} were used to build the table, {found.count('unreadable')} cannot be read."
            )
        indices[place] = fine
    return indices


def decoded(source: Source, index: int) -> Image:
    """An image of a source, upright RGB. Raises DataError."""
    (encoded,) = source.read([index])
    if isinstance(encoded, DataError):
        raise encoded
    return decode_image(encoded, source.name(index))


class LazyPictures(Sequence[Picture]):
    """`count` pictures, each made by `make(number)` whenever it is looked at."""

    def __init__(self, count: int, make: Callable[[int], Picture]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(index, slice):
            return [self._make(number) for number in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)
