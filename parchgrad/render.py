"""A saliency map as a picture: heat map, overlay, PNG. Knows arrays and images only."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from parchgrad.errors import OptionError

OVERLAYS = ("none", "original", "grayscale", "mask_black")
POLARITIES = ("positive", "negative", "both")
COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "hot", "gray", "jet")

# What is drawn of the attributions, in terms of Explanation.saliency's reductions.
REDUCTION_OF_POLARITY = {"positive": "positive", "negative": "negative", "both": "mean_abs"}

Pixels = NDArray[np.uint8]


def strength(
    saliency: NDArray[np.floating], clip_lower: float = 0.0, clip_upper: float = 99.5, smooth: float = 0.0
) -> NDArray[np.float64]:
    """Saliency `(h, w)`, non-negative, to drawing strength in [0, 1].

    Values at or below the `clip_lower` percentile become 0, at or above `clip_upper` 1. `smooth` is the sd
    in pixels of a Gaussian laid over the map first: single-pixel maps are hard to see on a photograph.
    Raises OptionError for percentiles out of order.
    """
    if not 0 <= clip_lower < clip_upper <= 100:
        raise OptionError("clip_lower, clip_upper", (clip_lower, clip_upper), "0 <= clip_lower < clip_upper <= 100")
    values = np.asarray(saliency, np.float64)
    if smooth > 0:
        values = gaussian_filter(values, smooth)
    low, high = np.percentile(values, [clip_lower, clip_upper])
    if high <= low:
        # A map sparser than the percentile: its maximum is then the top of the scale.
        high = values.max()
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def heatmap(
    saliency: NDArray[np.floating],
    colormap: str = "inferno",
    clip_lower: float = 0.0,
    clip_upper: float = 99.5,
    smooth: float = 0.0,
) -> Pixels:
    """The map in colours, `(h, w, 3)`."""
    return _colours(strength(saliency, clip_lower, clip_upper, smooth), colormap)


def overlay(
    image: Pixels,
    saliency: NDArray[np.floating],
    *,
    colormap: str = "inferno",
    mode: str = "original",
    clip_lower: float = 0.0,
    clip_upper: float = 99.5,
    smooth: float = 0.0,
) -> Pixels:
    """The map over its image, both `(h, w)`; `image` is uint8 `(h, w, 3)`. Returns `(h, w, 3)`.

    mode `original` / `grayscale`: colours over the image, the more opaque the stronger; `mask_black`: the
    image darkened where the map is weak; `none`: the heat map alone. Raises OptionError.
    """
    if mode not in OVERLAYS:
        raise OptionError("overlay", mode, ", ".join(OVERLAYS))
    value = strength(saliency, clip_lower, clip_upper, smooth)
    colours = _colours(value, colormap)
    if mode == "none":
        return colours
    weight = value[..., None]
    if mode == "mask_black":
        return _rounded(image * weight)
    # A dimmed base lets the colours stand out where they are, and the picture be seen where they are not.
    base = 0.65 * (image if mode == "original" else _gray(image))
    return _rounded(base + (colours - base) * weight**0.7)


def png(pixels: Pixels) -> bytes:
    """PNG file of an `(h, w, 3)` or `(h, w)` uint8 array."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _colours(value: NDArray[np.float64], colormap: str) -> Pixels:
    return _palette(colormap)[np.round(value * 255).astype(np.uint8)]


@lru_cache(maxsize=len(COLORMAPS))
def _palette(colormap: str) -> Pixels:
    if colormap not in COLORMAPS:
        raise OptionError("colormap", colormap, ", ".join(COLORMAPS))
    import matplotlib  # half a second, for those who draw

    return _rounded(255 * np.asarray(matplotlib.colormaps[colormap](np.arange(256), bytes=False))[:, :3])


def _gray(image: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def _rounded(values: NDArray[np.floating]) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
