"""The cases of an evaluation as small pictures: the image, and each method's map laid over it."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from parchgrad.render import Pixels, overlay

# Pixels of the longer side: some twenty cases of twenty methods are a few MB.
SIDE, LARGE = 208, 288
QUALITY = 72
# Pixels of the picture shown: the Gaussian over the map. Single pixels would be lost.
SMOOTH = 1.2
RIM, LINE, POINT = (0, 0, 0), (255, 255, 255), (0, 229, 255)


def photograph(pixels: Pixels, mask: NDArray[np.bool_] | None) -> str:
    """The image `(h, w, 3)` with the outline of `mask` `(h, w)`, as a `data:` address."""
    image = _fitted(pixels, LARGE)
    return _jpeg(image if mask is None else _outlined(image, mask))


def explained(pixels: Pixels, saliency: NDArray[np.floating], mask: NDArray[np.bool_] | None, side: int = SIDE) -> str:
    """The map `(h, w)` over the grey image, the outline of `mask`, and a ring about the map's maximum."""
    image = _fitted(pixels, side)
    size = image.shape[1], image.shape[0]
    # Area by area where it shrinks: what a small picture shows must not depend on which pixels it happens to keep.
    resized = Image.fromarray(np.asarray(saliency, np.float32)).resize(size, Image.Resampling.BOX)
    drawn = overlay(image, np.maximum(np.asarray(resized), 0), mode="grayscale", smooth=SMOOTH)
    if mask is not None:
        drawn = _outlined(drawn, mask)
    row, column = np.unravel_index(int(np.argmax(saliency)), saliency.shape)
    return _jpeg(_ringed(drawn, (row + 0.5) / saliency.shape[0], (column + 0.5) / saliency.shape[1]))


def _fitted(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _outlined(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """A white line about the mask with a dark rim, readable on any picture; none along the picture's edge."""
    size = image.shape[1], image.shape[0]
    small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST), bool)
    padded = np.pad(small, 3, mode="edge")
    edge = ndimage.binary_dilation(padded) & ~ndimage.binary_erosion(padded, border_value=1)
    drawn = image.copy()
    drawn[ndimage.binary_dilation(edge)[3:-3, 3:-3]] = RIM
    drawn[edge[3:-3, 3:-3]] = LINE
    return drawn


def _ringed(image: Pixels, row: float, column: float) -> Pixels:
    """A ring about a place given in shares of the sides."""
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    distance = np.hypot(y + 0.5 - row * image.shape[0], x + 0.5 - column * image.shape[1])
    drawn = image.copy()
    drawn[np.abs(distance - 7) < 2.4] = RIM
    drawn[np.abs(distance - 7) < 1.2] = POINT
    return drawn


def _jpeg(image: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
