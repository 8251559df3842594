"""The pieces of images that excite channels most: found image by image, cut, and kept as strips of squares.

They ARE pieces of the images, readable by whoever reads the file; hence only where they are asked for.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from parchgrad.errors import ClassGraphError, DataError
from parchgrad.preprocessing import Preprocessing, decode_image
from parchgrad.sources import Source
from parchgrad.table_page.photographs import exciting_box

WEBP_QUALITY = 70
MOST_STRIP_PIXELS = 16383  # WebP's widest picture


class Exemplars:
    """For each of `channels`, by layer, the `count` images with the largest feature, and where in them it is active.

    `feature`, `image` `(n, count)` and `box` `(n, count, 4)`, channels of all layers side by side: strongest first, the
    earlier image of equals; -1 where there are fewer images. Boxes are shares of the network's input.
    """

    def __init__(self, channels: Mapping[str, NDArray[np.int64]], count: int) -> None:
        self.channels = dict(channels)
        self.count = count
        size = sum(len(of_layer) for of_layer in channels.values())
        self.feature = np.zeros((size, count), np.float64)
        self.image = np.full((size, count), -1, np.int64)
        self.box = np.zeros((size, count, 4), np.float32)

    def offer(self, features: Mapping[str, NDArray[np.float64]], maps: Mapping[str, Tensor], images: list[int]) -> None:
        """`features` `(B, C)` and `maps` `(B, C, h, w)` of all of a layer's channels, for these images, ascending."""
        start = 0
        for name, channels in self.channels.items():
            mine = slice(start, start + len(channels))
            start += len(channels)
            values = features[name][:, channels]
            # Most images excite few channels more than those before did.
            for row, column in np.argwhere(values > self.feature[mine, -1]):
                place, value = mine.start + column, values[row, column]
                if value > self.feature[place, -1]:
                    box = exciting_box(maps[name][row, int(channels[column])].float().cpu().numpy())
                    self._insert(place, float(value), images[row], box)

    def _insert(self, place: int, value: float, image: int, box: tuple[float, float, float, float]) -> None:
        at = int(np.searchsorted(-self.feature[place], -value, side="right"))
        for kept, new in ((self.feature, value), (self.image, image), (self.box, box)):
            kept[place, at + 1 :] = kept[place, at:-1].copy()
            kept[place, at] = new

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """To be kept, and given to `restore`."""
        return {"feature": self.feature, "image": self.image, "box": self.box}

    def restore(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Go on from what `arrays` said. Raises KeyError and ValueError for what is of other channels."""
        for name, kept in (("feature", self.feature), ("image", self.image), ("box", self.box)):
            if arrays[name].shape != kept.shape:
                raise ValueError(f"'{name}' has shape {arrays[name].shape}, expected {kept.shape}")
            kept[:] = arrays[name]


def require_room(exemplars: Exemplars, pixels: int, folder: Path) -> None:
    """Raises ClassGraphError where `cut` would not find the room for its crops on the disk of `folder`."""
    size, count = exemplars.image.shape
    needed, free = size * count * pixels**2 * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise ClassGraphError(
            f"{count} exemplars of {pixels} pixels for each of {size} channels need {needed / 1e9:.1f} GB beside "
            f"'{folder}' while they are cut, and {free / 1e9:.1f} GB are free."
        )


def cut(
    exemplars: Exemplars,
    source: Source,
    preprocessing: Preprocessing,
    pixels: int,
    scratch: Path,
    progress: Callable[[int, int], None],
) -> Generator[bytes, None, None]:
    """A WebP strip of squares of `pixels` for each channel, in order; empty for one that nothing excites.

    Each image is read once more; crops wait in the file `scratch`, which is removed. Raises DataError for an image that
    has become unreadable.
    """
    size, count = exemplars.image.shape
    wanted = np.unique(exemplars.image[exemplars.image >= 0])
    shape = (max(size, 1), pixels, count * pixels, 3)
    squares = np.memmap(scratch, np.uint8, "w+", shape=shape)
    try:
        where: dict[int, list[tuple[int, int]]] = {}
        for channel, place in np.argwhere(exemplars.image >= 0).tolist():
            where.setdefault(int(exemplars.image[channel, place]), []).append((channel, place))
        for done, image in enumerate(wanted.tolist(), 1):
            seen = _as_seen(source, preprocessing, image)
            for channel, place in where[image]:
                here = slice(place * pixels, (place + 1) * pixels)
                squares[channel, :, here] = _square(seen, exemplars.box[channel, place], pixels)
            progress(done, len(wanted))
        for channel, there in enumerate((exemplars.image >= 0).sum(1).tolist()):
            yield _webp(np.asarray(squares[channel, :, : there * pixels])) if there else b""
    finally:
        del squares
        scratch.unlink(missing_ok=True)


def _as_seen(source: Source, preprocessing: Preprocessing, image: int) -> Image.Image:
    """What the network is given of an image."""
    (data,) = source.read([image])
    if isinstance(data, DataError):
        raise data
    tensor, _ = preprocessing.apply(decode_image(data, source.name(image)))
    return Image.fromarray(preprocessing.restore(torch.as_tensor(tensor)))


def _square(seen: Image.Image, box: NDArray[np.float32], pixels: int) -> NDArray[np.uint8]:
    """The square around the middle of `box` that encloses it, pushed into the picture, never larger than that."""
    left, top, right, bottom = (float(v) for v in box * np.array([seen.width, seen.height] * 2, np.float32))
    side = min(max(right - left, bottom - top), seen.width, seen.height)
    x = min(max((left + right - side) / 2, 0.0), seen.width - side)
    y = min(max((top + bottom - side) / 2, 0.0), seen.height - side)
    crop = seen.resize((pixels, pixels), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(crop)


def _webp(strip: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, format="WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()
