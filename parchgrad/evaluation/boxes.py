"""Where objects are: boxes and masks read from files, and put on a model's input.

Boxes and masks are in pixels of the upright original image. A box `(x0, y0, x1, y1)` is taken as edges: it covers
x0 <= x < x1, 0 being the image's left edge. ImageNet's localisation files count from 0 and PASCAL VOC's own from 1,
both with the last pixel included; their numbers are used as they stand, at most one pixel off.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError
from parchgrad.preprocessing import Placement

Mask = NDArray[np.bool_]  # (h, w)
Name = str | os.PathLike[str]
Entry = TypeVar("Entry")

# Of one annotation of one image: hundreds of boxes have some 100 KB.
LARGEST_XML = 16 * 2**20
# What the columns of a file of boxes may be called: the first of each that is there counts.
IMAGE_COLUMNS = ("image", "image_id")
LABEL_COLUMNS = ("label", "wnid")
CORNER_COLUMNS = (("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"))
SIZE_COLUMNS = ("W", "H")


@dataclass(frozen=True)
class Box:
    """Edges in pixels of the upright original, and what is in it, where the file says."""

    x0: float
    y0: float
    x1: float
    y1: float
    label: str | None = None


@dataclass(frozen=True)
class Annotation:
    """The boxes of one image, and its (width, height) where the file says."""

    boxes: tuple[Box, ...]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ObjectMask:
    """Where an image's objects are on a model's input, bool `(h, w)`; what became of its boxes."""

    mask: Mask
    kept: int  # boxes of which a part is in the crop
    outside: int  # boxes of which none is
    degenerate: int  # without area

    @property
    def valid(self) -> bool:
        """Whether anything of the objects is to be seen: else no measure of place has a meaning."""
        return self.kept > 0


def mask_of_boxes(
    annotation: Annotation, placement: Placement, size: tuple[int, int], *, label: str | None = None
) -> ObjectMask:
    """The union of an image's boxes on the input of `size` (h, w); of `label` only, where one is named.

    Boxes are cut to the image and to the crop. An input pixel is inside if its middle is; a box too small or thin
    to have one has the pixels that its own middle is in, so every box with area in the crop has at least a pixel.
    Raises DataError if the annotation's size is not the image's: then its boxes are of another image, or of this
    one before it was resized or turned.
    """
    if annotation.size is not None and annotation.size != placement.original_size:
        raise DataError(
            f"Boxes are of an image of {_by(annotation.size)} pixels; the upright image has "
            f"{_by(placement.original_size)}."
        )
    height, width = size
    crop_left, crop_top, crop_right, crop_bottom = placement.crop_box
    columns_per_pixel, rows_per_pixel = width / (crop_right - crop_left), height / (crop_bottom - crop_top)
    left, right = max(crop_left, 0.0), min(crop_right, float(placement.original_size[0]))
    top, bottom = max(crop_top, 0.0), min(crop_bottom, float(placement.original_size[1]))

    mask = np.zeros(size, bool)
    kept = outside = degenerate = 0
    for box in annotation.boxes:
        if label is not None and box.label != label:
            continue
        if not (box.x0 < box.x1 and box.y0 < box.y1):
            degenerate += 1
            continue
        x0, x1 = max(box.x0, left), min(box.x1, right)
        y0, y1 = max(box.y0, top), min(box.y1, bottom)
        if not (x0 < x1 and y0 < y1):
            outside += 1
            continue
        rows = _pixels((y0 - crop_top) * rows_per_pixel, (y1 - crop_top) * rows_per_pixel, height)
        columns = _pixels((x0 - crop_left) * columns_per_pixel, (x1 - crop_left) * columns_per_pixel, width)
        mask[rows, columns] = True
        kept += 1
    return ObjectMask(mask, kept, outside, degenerate)


def _pixels(start: float, stop: float, count: int) -> slice:
    """Those of `count` pixels whose middles lie in start <= x < stop; the one at its middle if there is none."""
    first, end = max(math.ceil(start - 0.5), 0), min(math.ceil(stop - 0.5), count)
    if first >= end:
        first = min(max(math.floor((start + stop) / 2), 0), count - 1)
        end = first + 1
    return slice(first, end)


def mask_of_image(original: Mask, placement: Placement, size: tuple[int, int]) -> Mask:
    """A mask of the upright original image, bool `(height, width)`, on the input of `size` (h, w).

    Each input pixel has the value at its middle. Invalid, as there is nothing to point at, where no pixel is set.
    Raises DataError where the mask is not of the image's size.
    """
    found = original.shape[1], original.shape[0]
    if found != placement.original_size:
        raise DataError(
            f"A mask has {_by(found)} pixels; expected {_by(placement.original_size)}, the upright image's."
        )
    left, top, right, bottom = placement.crop_box
    rows = _sampled(top, bottom, size[0], original.shape[0])
    columns = _sampled(left, right, size[1], original.shape[1])
    mask: Mask = np.asarray(original, bool)[np.ix_(rows, columns)]
    return mask


def _sampled(start: float, stop: float, count: int, available: int) -> NDArray[np.intp]:
    """Indices of the pixels at the middles of `count` equal parts of start..stop."""
    middles = start + (np.arange(count) + 0.5) * ((stop - start) / count)
    indices: NDArray[np.intp] = np.clip(np.floor(middles), 0, available - 1).astype(np.intp)
    return indices


def read_mask(path: Name, *, value: int | None = None) -> Mask:
    """A mask from a PNG file of one channel, bool `(height, width)`: where it is `value`, or not 0.

    1, 8 or 16 bits, grey or palette; of a palette the indices count, not the colours. Raises DataError.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path, formats=("PNG",)) as file:
            mode = file.mode
            values = np.asarray(file) if mode in ("1", "L", "P") or mode.startswith("I") else None
    except MemoryError:
        raise
    except Exception as error:  # as in decode_image: a damaged file raises nearly anything
        reason = "it is no PNG file" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise DataError(f"Mask '{os.fspath(path)}' cannot be read: {reason}.") from error
    if values is None:
        raise DataError(f"Mask '{os.fspath(path)}' has mode {mode}; expected one channel, grey or palette.")
    mask: Mask = values != 0 if value is None else values == value
    return mask


def read_boxes(path: Name) -> dict[str, Annotation]:
    """Boxes by image, as named there: from a `.csv` file, an `.xml` file, or a folder of `.xml` files.

    See `read_csv` and `read_voc`. Raises DataError.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".xml":
        return read_voc(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    raise DataError(f"Boxes '{path}' are neither a folder of .xml files nor an .xml or .csv file.")


def read_csv(path: Name) -> dict[str, Annotation]:
    """Boxes from a CSV file with a header, one row a box; by image, in the file's order.

    Columns: `image` (or `image_id`); `x0, y0, x1, y1` (or `x1, y1, x2, y2`); if there, `label` (or `wnid`), and
    `W, H`, the image's size. Others are ignored. Raises DataError, naming the line.
    """
    path = Path(path)
    boxes: dict[str, list[Box]] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [column.strip() for column in next(lines, [])]
            image, label, corners, size = _columns(path, header)
            for row in lines:
                if not row:
                    continue
                where = f"Boxes '{path}', line {lines.line_num}"
                if len(row) != len(header):
                    raise DataError(f"{where}: {len(row)} values; expected {len(header)}, as the header has.")
                name = row[image].strip()
                if not name:
                    raise DataError(f"{where}: column '{header[image]}' is empty; expected an image's name.")
                x0, y0, x1, y1 = (_number(where, header[column], row[column]) for column in corners)
                box = Box(x0, y0, x1, y1, None if label is None else row[label].strip() or None)
                said = None if size is None else _size(where, [row[column] for column in size])
                if sizes.setdefault(name, said) != said:
                    raise DataError(f"{where}: image '{name}' has size {said}; expected {sizes[name]}, as before.")
                boxes.setdefault(name, []).append(box)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"Boxes '{path}' cannot be read: {error}.") from error
    return {name: Annotation(tuple(found), sizes[name]) for name, found in boxes.items()}


def _columns(path: Path, header: list[str]) -> tuple[int, int | None, list[int], list[int] | None]:
    """Of the image's name, the label, the corners and the size."""
    image = next((header.index(name) for name in IMAGE_COLUMNS if name in header), None)
    corners = next((names for names in CORNER_COLUMNS if set(names) <= set(header)), None)
    if image is None or corners is None:
        raise DataError(f"Boxes '{path}' have the columns {header}; expected image, x0, y0, x1, y1 and maybe label.")
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    size = [header.index(name) for name in SIZE_COLUMNS] if set(SIZE_COLUMNS) <= set(header) else None
    return image, label, [header.index(name) for name in corners], size


def read_voc(path: Name) -> dict[str, Annotation]:
    """Boxes from one file in PASCAL VOC's XML, or all `.xml` files of a folder and those in it; by image.

    As ImageNet's localisation annotations have it: `annotation/object`, each with a `name` and a `bndbox` of `xmin`,
    `ymin`, `xmax`, `ymax`, and a `size`, if there. The image is called as the file is, within the folder, without
    ending (`filename`, in the file, is "%s" in some of ImageNet's). A document type, and with it any entity, is
    refused. Raises DataError.
    """
    path = Path(path)
    if not path.is_dir():
        return {path.stem: _voc_annotation(path)}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".xml")
    if not files:
        raise DataError(f"Folder '{path}' has no .xml file; expected one with boxes for each image.")
    return {file.relative_to(path).with_suffix("").as_posix(): _voc_annotation(file) for file in files}


def _voc_annotation(path: Path) -> Annotation:
    root = _xml(path)
    where = f"Boxes '{path}'"
    if root.tag != "annotation":
        raise DataError(f"{where}: the root is <{root.tag[:80]}>; expected <annotation>.")
    boxes = []
    for number, item in enumerate(root.findall("object"), 1):
        here, box = f"{where}, object {number}", item.find("bndbox")
        if box is None:
            raise DataError(f"{here}: no <bndbox>; expected one.")
        x0, y0, x1, y1 = (_number(here, tag, box.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append(Box(x0, y0, x1, y1, (item.findtext("name") or "").strip() or None))
    size = root.find("size")
    said = None if size is None else _size(where, [size.findtext("width"), size.findtext("height")])
    return Annotation(tuple(boxes), said)


def _xml(path: Path) -> Element:
    """The root of an XML file without a document type: no entity is ever expanded or fetched."""

    def refuse(*_: object) -> None:
        raise DataError(f"Boxes '{path}' have a document type (<!DOCTYPE>); expected XML without one.")

    tree, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = tree.start
    parser.EndElementHandler = tree.end
    parser.CharacterDataHandler = tree.data
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_XML + 1)
        if len(data) > LARGEST_XML:
            raise DataError(f"Boxes '{path}' have more than {LARGEST_XML} bytes; expected the boxes of one image.")
        parser.Parse(data, True)
    except (OSError, expat.ExpatError, ValueError, LookupError) as error:  # the latter two: an unknown encoding
        raise DataError(f"Boxes '{path}' cannot be read: {error}.") from error
    return tree.close()


def _number(where: str, what: str, text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {what} is {_short(text)}; expected a number.")
    return number


def _size(where: str, texts: list[str | None] | list[str]) -> tuple[int, int] | None:
    """(width, height); None for 0 x 0, which some tools write for "not known"."""
    width, height = (_number(where, what, text) for what, text in zip(("width", "height"), texts, strict=True))
    if width == height == 0:
        return None
    if min(width, height) < 1 or not (width.is_integer() and height.is_integer()):
        raise DataError(f"{where}: the size is {width:g} x {height:g}; expected whole numbers from 1.")
    return int(width), int(height)


def boxes_by_image(annotations: Mapping[str, Annotation], names: Iterable[str]) -> dict[str, Annotation]:
    """Of each of the images `names`, paths with `/`, its annotation; see `by_image`."""
    return by_image(annotations, names, "boxes")


def by_image(entries: Mapping[str, Entry], names: Iterable[str], what: str) -> dict[str, Entry]:
    """Of each of the images `names`, paths with `/`, its entry; an image that has none is not in the result.

    An image and an entry belong together if their names are equal, or are without the image's ending, or are so in
    their last part. Raises DataError where that fits two entries of one image, or two images of one entry: what is
    said of another image would be measured against. `what` the entries are, in the plural, is for its message.
    """
    by_last: dict[str, list[str]] = {}
    for key in entries:
        by_last.setdefault(PurePosixPath(key).name, []).append(key)
    chosen: dict[str, str] = {}
    claimed: dict[str, str] = {}
    for name in names:
        found = _key(name, entries, by_last, what)
        if found is None:
            continue
        other = claimed.setdefault(found, name)
        if other != name:
            raise DataError(
                f"{what.capitalize()} of '{found}' fit the images '{other}' and '{name}'; expected one of them."
            )
        chosen[name] = found
    return {name: entries[key] for name, key in chosen.items()}


def _key(name: str, entries: Mapping[str, Entry], by_last: Mapping[str, list[str]], what: str) -> str | None:
    path = PurePosixPath(name)
    for candidate in (name, path.with_suffix("").as_posix()):
        if candidate in entries:
            return candidate
    for candidate in (path.name, path.stem):
        keys = by_last.get(candidate, [])
        if len(keys) > 1:
            raise DataError(f"Image '{name}' fits the {what} of '{keys[0]}' and '{keys[1]}'; expected one of them.")
        if keys:
            return keys[0]
    return None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _short(text: str | None) -> str:
    return "missing" if text is None else repr(text if len(text) <= 80 else f"{text[:80]}...")
