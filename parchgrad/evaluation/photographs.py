"""Photographs of a source as the pictures of an evaluation, and where their objects are, by boxes or masks."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError, OptionError, UnknownTargetError
from parchgrad.evaluation.boxes import (
    Annotation,
    Box,
    ObjectMask,
    boxes_by_image,
    by_image,
    mask_of_boxes,
    mask_of_image,
    read_boxes,
    read_mask,
)
from parchgrad.evaluation.images import READ_TOGETHER, LazyPictures, LeftOut, Picture, Progress, Verdicts, decoded
from parchgrad.preprocessing import Placement, Preprocessing
from parchgrad.sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

    from parchgrad.models import Model

Name = str | os.PathLike[str]


@dataclass(frozen=True)
class Places:
    """Where the objects of a source's images are: boxes, or a mask's file, by the image's name."""

    origin: str  # the file or folder, for messages
    boxes: Mapping[str, Annotation] = field(default_factory=dict)
    masks: Mapping[str, Path] = field(default_factory=dict)
    value: int | None = None  # of a mask's pixels, where the object is; None: any but 0
    of_others: frozenset[str] = frozenset()  # images whose boxes are all of other classes of the model

    def find(self, name: str, placement: Placement, size: tuple[int, int]) -> ObjectMask | None:
        """Where the objects of image `name` are on the input of `size` (h, w); None where nothing is said of it.

        Raises DataError, naming the image, where the boxes or the mask are of an image of another size, and for a
        mask that cannot be read.
        """
        try:
            if name in self.boxes:
                return mask_of_boxes(self.boxes[name], placement, size) if self.boxes[name].boxes else None
            if name in self.masks:
                mask = mask_of_image(read_mask(self.masks[name], value=self.value), placement, size)
                return ObjectMask(mask, kept=int(mask.any()), outside=0, degenerate=0)
        except DataError as error:
            raise DataError(f"Image '{name}': {error}") from error
        return None

    def digest(self, names: Iterable[str]) -> str:
        """sha256 (hexadecimal) of what is said of the images `names`: other boxes or masks, another string."""
        found = hashlib.sha256()
        for name in names:
            said = repr(self.boxes.get(name)).encode()
            found.update(hashlib.sha256(self.masks[name].read_bytes() if name in self.masks else said).digest())
        return found.hexdigest()


@dataclass(frozen=True)
class Placed:
    """How many photographs have a place, and why the others have none; how many boxes count for nothing."""

    with_place: int
    without: int  # nothing is said of where their objects are
    of_others: int  # what is said is of other classes of the model
    unseen: int  # the model's input shows nothing of their boxes or mask, or no box has an area
    boxes_outside: int  # boxes of which the input shows nothing
    boxes_degenerate: int  # boxes without area


@dataclass(frozen=True)
class Photographs:
    """Photographs of a source in a fixed order, and which could not be among them."""

    pictures: LazyPictures
    indices: NDArray[np.int64]  # (n,): which of the source's each is
    left_out: LeftOut
    placed: Placed | None  # None: places were not asked for


def places_of_boxes(path: Name, source: Source, model: Model) -> Places:
    """Boxes for a source's images, from a file or folder that `boxes.read_boxes` reads, matched by name.

    An image's place is the union of its boxes. Where boxes have labels, only those of the image's class count;
    if none is, those whose label is no class of the model or that have none: a file may speak other words than the
    model, but a box of another of its classes is not where the target is. So of ImageNet's boxes, all of the
    labelled object, and of boxes without labels, all count. Raises DataError: no boxes for any of the images.
    """
    found = boxes_by_image(read_boxes(path), [source.name(index) for index in range(len(source))])
    if not found:
        raise DataError(f"Boxes '{path}' are of none of the {len(source)} images of '{source.root}'{_such_as(source)}.")
    known: dict[str, frozenset[int]] = {}

    def classes(label: str | None) -> frozenset[int]:
        if label is None:
            return frozenset()
        if label not in known:
            known[label] = _classes_of(label, model)
        return known[label]

    boxes, of_others = {}, set()
    for index, target in enumerate(source.targets.tolist()):
        name = source.name(index)
        if name not in found:
            continue
        of_target = _of_target(found[name].boxes, target, classes)
        boxes[name] = replace(found[name], boxes=of_target)
        if found[name].boxes and not of_target:
            of_others.add(name)
    return Places(os.fspath(path), boxes=boxes, of_others=frozenset(of_others))


def places_of_masks(folder: Name, source: Source, value: int | None = None) -> Places:
    """Masks for a source's images: the PNG files of a folder and those in it, matched by name as boxes are.

    The object is where a mask is `value`, or not 0 (`boxes.read_mask`); they are read when needed. Raises
    DataError: no PNG file, two of one name, none of any of the images.
    """
    folder = Path(folder)
    files: dict[str, Path] = {}
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".png"):
        name = file.relative_to(folder).with_suffix("").as_posix()
        other = files.setdefault(name, file)
        if other != file:
            raise DataError(f"Folder '{folder}' has two masks of '{name}', '{other.name}' and '{file.name}'.")
    if not files:
        raise DataError(f"'{folder}' is no folder with .png files; expected a mask for each image.")
    found = by_image(files, [source.name(index) for index in range(len(source))], "masks")
    if not found:
        raise DataError(
            f"Masks '{folder}' are of none of the {len(source)} images of '{source.root}'{_such_as(source)}."
        )
    return Places(str(folder), masks=found, value=value)


def photographs_of(
    source: Source,
    preprocessing: Preprocessing,
    count: int | None,
    seed: int,
    *,
    places: Places | None = None,
    used: Set[str] = frozenset(),
    progress: Progress | None = None,
) -> Photographs:
    """`count` of the source's images, or all (None, or fewer there are), as pictures to explain their own class.

    They are drawn from `seed`, no image twice, the classes in turns as long as they have images; the first n are the
    same whatever `count`. An image that cannot be read, or whose digest is in `used` (hexadecimal, `used_digests` of
    evidence.py), gives its turn to the next of its class. A picture whose `places` are not known, or not to be seen
    on the model's input, stays, without a mask, and is counted.

    Each drawn image is looked at once, here; the pictures are made when asked for. Those of a preprocessing of rule
    'native' are of different sizes. `progress(done, total)` counts drawn images. Raises OptionError for a `count`
    below 1; DataError where no image is left, none has a place, or a place is of an image of another size.
    """
    if count is not None and count < 1:
        raise OptionError("count", count, "an integer >= 1, or None for all")
    survey = _Survey(source, preprocessing, places)
    verdicts = Verdicts(source, used, survey.look if places is not None else None)
    chosen = _drawn(source, len(source) if count is None else min(count, len(source)), seed, verdicts, progress)
    left_out = verdicts.left_out()
    if not chosen:
        raise DataError(
            f"'{source.root}': none of the {len(source)} images can be evaluated; {len(left_out.used)} were used to "
            f"build the table, {len(left_out.unreadable)} cannot be read."
        )
    placed = None
    if places is not None:
        placed = survey.placed()
        if placed.with_place == 0:
            raise DataError(
                f"'{source.root}': none of the {len(chosen)} images drawn has a place by '{places.origin}'; "
                f"{placed.without} have no boxes or mask, {placed.of_others} only boxes of other classes, "
                f"{placed.unseen} none that the model's input shows."
            )

    def picture(number: int) -> Picture:
        index = chosen[number]
        name = source.name(index)
        image, placement = preprocessing.apply(decoded(source, index))
        place = None if places is None else places.find(name, placement, (image.shape[1], image.shape[2]))
        mask = place.mask if place is not None and place.valid else None
        return Picture(image, int(source.targets[index]), mask, name=name, group=name)

    return Photographs(LazyPictures(len(chosen), picture), np.array(chosen, np.int64), left_out, placed)


class _Survey:
    """What becomes of the drawn images' places; only numbers are kept."""

    def __init__(self, source: Source, preprocessing: Preprocessing, places: Places | None) -> None:
        self._source, self._preprocessing, self._places = source, preprocessing, places
        self._images: Counter[str] = Counter()
        self._outside = self._degenerate = 0

    def look(self, index: int, image: Image) -> None:
        if self._places is None:
            return
        name = self._source.name(index)
        pixels, placement = self._preprocessing.array(image)
        place = self._places.find(name, placement, (pixels.shape[1], pixels.shape[2]))
        if place is None:
            self._images["of_others" if name in self._places.of_others else "without"] += 1
            return
        self._images["with_place" if place.valid else "unseen"] += 1
        self._outside += place.outside
        self._degenerate += place.degenerate

    def placed(self) -> Placed:
        counts = {what: self._images[what] for what in ("with_place", "without", "of_others", "unseen")}
        return Placed(**counts, boxes_outside=self._outside, boxes_degenerate=self._degenerate)


def _drawn(source: Source, count: int, seed: int, verdicts: Verdicts, progress: Progress | None) -> list[int]:
    """Up to `count` indices of images that are fine: rounds of one image a class, the classes in a new order each."""
    generator = np.random.default_rng([seed, 6])
    members: dict[int, Iterator[int]] = {
        target: iter(generator.permutation(np.flatnonzero(source.targets == target)).tolist())
        for target in source.classes
    }
    chosen: list[int] = []
    while members and len(chosen) < count:
        waiting: list[int] = generator.permutation(list(members)).tolist()
        while waiting and len(chosen) < count:
            # No more turns than are wanted: an image that is looked at and fine is one of the drawn.
            size = min(READ_TOGETHER, count - len(chosen))
            turns, waiting = waiting[:size], waiting[size:]
            chosen += _round(turns, members, verdicts)
            if progress is not None:
                progress(len(chosen), count)
    if progress is not None and len(chosen) < count:
        progress(len(chosen), len(chosen))
    return chosen


def _round(turns: Sequence[int], members: dict[int, Iterator[int]], verdicts: Verdicts) -> list[int]:
    """The next fine image of each of these classes; a class that has no more leaves `members`."""
    found: dict[int, int] = {}
    pending = list(turns)
    while pending:
        tried = {target: next(members[target], None) for target in pending}
        for target in [target for target, index in tried.items() if index is None]:
            del members[target]
        candidates = {target: index for target, index in tried.items() if index is not None}
        verdicts.look(list(candidates.values()))
        found |= {target: index for target, index in candidates.items() if verdicts.fine(index)}
        pending = [target for target in candidates if target not in found]
    return [found[target] for target in turns if target in found]


def _of_target(boxes: tuple[Box, ...], target: int, classes: Callable[[str | None], frozenset[int]]) -> tuple[Box, ...]:
    """Those of an image's boxes that are where its target is; see `places_of_boxes`."""
    own = tuple(box for box in boxes if target in classes(box.label))
    return own or tuple(box for box in boxes if not classes(box.label))


def _classes_of(label: str, model: Model) -> frozenset[int]:
    """The classes that a label may mean: several where they share a name, none where the model has no such class."""
    try:
        index = model.class_index(label)
    except UnknownTargetError:
        return frozenset()
    return frozenset({index, *(i for i, name in enumerate(model.labels) if name == label)})


def _such_as(source: Source) -> str:
    return f", such as '{source.name(0)}'" if len(source) else ""
