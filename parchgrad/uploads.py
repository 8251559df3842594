"""What a request to the service carries: image files and option fields, from whatever the caller has. No HTTP here."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from parchgrad.answers import AnswerError, Result, failed
from parchgrad.errors import DataError, OptionError

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

REQUEST_BYTES = 16_000_000  # of images in one request of many; a larger image goes alone
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_ALLOWED = "a path, bytes, a PIL image or an array, or an iterable of them"


# --- images ------------------------------------------------------------------------------------------------


def is_one(images: object) -> bool:
    """Whether this is one image, not an iterable of them."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)


def check_several(images: object) -> None:
    """Raises OptionError for what is no iterable of images: a single one, or an open file, whose lines are none."""
    if is_one(images):
        raise OptionError("images", f"one {type(images).__name__}", "an iterable of images")
    if not isinstance(images, Iterable) or hasattr(images, "read"):
        raise OptionError("images", type(images).__name__, _ALLOWED)


def _encoded(image: object) -> bytes:
    """An image file's bytes; pictures and arrays are packed without loss. Raises DataError, OptionError."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        if str(image).startswith(("http://", "https://")):
            raise DataError(f"Image '{image}' is an address, which is not fetched; give a path, or the file's bytes.")
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"Image '{os.fspath(image)}' cannot be read: {error}.") from error
    if isinstance(image, np.ndarray):
        return _packed(Image.fromarray(_checked(image)))
    if isinstance(image, Image.Image):
        return _packed(image)
    raise OptionError("images", type(image).__name__, _ALLOWED)


def _checked(array: NDArray[Any]) -> NDArray[np.uint8]:
    colours = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not colours or not array.size:
        found = f"{array.dtype} {array.shape}"
        raise OptionError("images", found, "uint8 of shape (height, width), (height, width, 3) or (height, width, 4)")
    return array


def _packed(image: Image.Image) -> bytes:
    """A PNG, or a TIFF of modes that PNG has not. Its EXIF goes along: the service turns the image upright by it."""
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        image.save(buffer, "PNG", compress_level=1, exif=image.getexif())
    else:
        image.save(buffer, "TIFF", exif=image.getexif())
    return buffer.getvalue()


# --- options -----------------------------------------------------------------------------------------------


def _columns(options: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Each option as the text of a form field: one for all images, or a list with one for each."""
    return {name: _column(name, value) for name, value in options.items() if value is not None}


def _column(name: str, value: Any) -> str | list[str]:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if name == "layers" and isinstance(value, Sequence) and not isinstance(value, str):
        patterns = all(isinstance(item, str) for item in value)  # then it is one set of them for all images
        return _text(name, value) if patterns else [_text(name, item) for item in value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_text(name, item) for item in value]
    return _text(name, value)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name == "target" and value is None:
        return "predicted"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))  # exact, and 'inf' as the service spells it
    if name == "layers" and isinstance(value, Sequence):
        return ",".join(value)
    raise OptionError(name, value, "text, a number, true or false; or one of these for each image")


# --- both together ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The images of one request, and the results of those that need none: exactly one of each pair is None."""

    images: tuple[tuple[bytes | None, Result | None], ...]
    fields: Mapping[str, list[str]]

    @property
    def files(self) -> list[tuple[str, tuple[str, bytes]]]:
        return [("image", (str(i), data)) for i, (data, _) in enumerate(self.images) if data is not None]

    def results(self, answered: Sequence[Result]) -> list[Result]:
        """`answered` with the other images' results in their places. Raises AnswerError where the number is wrong."""
        if len(answered) != len(self.files):
            raise AnswerError(f"The answer has {len(answered)} results for {len(self.files)} images.")
        rest = iter(answered)
        return [next(rest) if known is None else known for _, known in self.images]


class Batches(Iterator[Batch]):
    """Images, read as they are asked for, in requests of at most `images` images and about REQUEST_BYTES.

    An image that cannot be read, or has more than `image_bytes` bytes, has an error for its result.
    Raises OptionError where an option has not as many values as there are images.
    """

    def __init__(self, images: Iterable[ImageLike], options: Mapping[str, Any], limits: Mapping[str, int]) -> None:
        self.total = len(images) if isinstance(images, Sequence | np.ndarray) else None
        self._images = iter(images)
        self._columns = _columns(options)
        self._limits = limits
        self._done = 0
        self._waiting: tuple[bytes | None, Result | None] | None = None
        for name, column in self._columns.items():
            if isinstance(column, list) and self.total is not None and len(column) != self.total:
                raise OptionError(name, column, f"one value, or one for each of the {self.total} images")

    def __next__(self) -> Batch:
        taken: list[tuple[bytes | None, Result | None]] = []
        size = 0
        while len(taken) < self._limits["images"]:
            item = self._waiting or self._next()
            self._waiting = None
            if item is None:
                break
            size += len(item[0] or b"")
            if taken and size > REQUEST_BYTES:
                self._waiting = item
                break
            taken.append(item)
        if not taken:
            self._check_used_up()
            raise StopIteration
        # An option of each image is given once for each that is sent.
        sent = [self._done + i for i, (data, _) in enumerate(taken) if data is not None]
        self._done += len(taken)
        return Batch(tuple(taken), {name: _values(name, column, sent) for name, column in self._columns.items()})

    def _next(self) -> tuple[bytes | None, Result | None] | None:
        for image in self._images:
            try:
                data = _encoded(image)
            except DataError as error:
                return None, failed("image_unreadable", str(error))
            if len(data) > self._limits["image_bytes"]:
                message = f"The image has {len(data)} bytes; at most {self._limits['image_bytes']} are accepted."
                return None, failed("image_too_many_bytes", message)
            return data, None
        return None

    def _check_used_up(self) -> None:
        for name, column in self._columns.items():
            if isinstance(column, list) and len(column) > self._done:
                raise OptionError(name, column, f"one value, or one for each of the {self._done} images")


def _values(name: str, column: str | list[str], which: Sequence[int]) -> list[str]:
    if isinstance(column, str):
        return [column]
    if which and which[-1] >= len(column):
        raise OptionError(name, column, "one value, or one for each image, of which there are more")
    return [column[i] for i in which]


def batch_of_one(image: ImageLike, options: Mapping[str, Any]) -> Batch:
    columns = _columns(options)
    for name, column in columns.items():
        if isinstance(column, list) and len(column) != 1:
            raise OptionError(name, column, "one value for one image")
    fields = {name: [column] if isinstance(column, str) else column for name, column in columns.items()}
    return Batch(((_encoded(image), None),), fields)
