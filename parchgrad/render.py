"""A saliency map as a picture: heat map, overlay, PNG. Knows arrays and images only."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from parchgrad.errors import OptionError

OVERLAYS = ("none", "original", "grayscale", "mask_black")
POLARITIES = ("positive", "negative", "both")
COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "hot", "gray", "jet")

# What is drawn of the attributions, in terms of Explanation.saliency's reductions.
REDUCTION_OF_POLARITY = {"positive": "positive", "negative": "negative", "both": "mean_abs"}

# Outlines. Lengths are shares of the longer side: the picture looks the same at every resolution.
REGION_SMOOTH = 0.02  # sd of the Gaussian that joins single pixels to regions
REGION_STRENGTH = 0.4  # of the drawing strength: a region is where the map reaches it
REGION_SHARE = 0.9  # of all regions' attribution, that the regions drawn hold together
REGION_SIDE = 256  # pixels: where regions begin and end is decided on a map no larger
LINE = 0.006  # width of an outline
DIMMED = 0.65  # brightness of the image where the map is weak

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
        values = ndimage.gaussian_filter(values, smooth)
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
    outline: bool = False,
    opacity: float = 1.0,
) -> Pixels:
    """The map over its image, both `(h, w)`; `image` is uint8 `(h, w, 3)`. Returns `(h, w, 3)`.

    mode `original` / `grayscale`: colours over the image, the more opaque the stronger; `mask_black`: the
    image darkened where the map is weak; `none`: the heat map alone. With `outline` the outlines of `regions` are
    drawn instead of pixels: the image dimmed (`mask_black`: black) outside of them. `opacity` in [0, 1]: how much of
    all this lies over the image itself. Raises OptionError.
    """
    if mode not in OVERLAYS:
        raise OptionError("overlay", mode, ", ".join(OVERLAYS))
    if not 0 <= opacity <= 1:
        raise OptionError("opacity", opacity, "a number in [0, 1]")
    if outline:
        drawn = _outlined(image, inside(saliency, clip_lower, clip_upper), colormap, mode)
    else:
        drawn = _shaded(image, strength(saliency, clip_lower, clip_upper, smooth), colormap, mode)
    return _rounded(image + (drawn - image) * opacity)


def regions(saliency: NDArray[np.floating], clip_lower: float = 0.0, clip_upper: float = 99.5) -> NDArray[np.bool_]:
    """Where the map matters most, `(h, w)`: connected regions instead of pixels.

    Where the smoothed map is strong, without specks and cracks; of its connected regions those that hold
    most attribution, until they hold REGION_SHARE of it together. (The outlines of integrated gradients' authors:
    threshold, close and open, keep the heaviest components.) Raises OptionError.
    """
    value = strength(saliency, clip_lower, clip_upper, REGION_SMOOTH * max(saliency.shape))
    radius = round(REGION_SMOOTH * max(saliency.shape))
    disk = _disk(radius)
    # Beyond the edge the map goes on: else a region that touches it would be cut off short of it.
    strong = np.pad(value >= REGION_STRENGTH, 2 * radius, mode="edge")
    found = ndimage.binary_opening(ndimage.binary_closing(strong, disk), disk)
    found = found[2 * radius : 2 * radius + value.shape[0], 2 * radius : 2 * radius + value.shape[1]]
    labels, count = ndimage.label(found)
    weights = np.asarray(ndimage.sum_labels(value, labels, np.arange(1, count + 1)))
    heaviest = np.argsort(-weights, kind="stable")
    held_before = np.cumsum(weights[heaviest]) - weights[heaviest]
    kept: NDArray[np.bool_] = np.isin(labels, 1 + heaviest[held_before < REGION_SHARE * weights.sum()])
    return kept


def inside(saliency: NDArray[np.floating], clip_lower: float = 0.0, clip_upper: float = 99.5) -> NDArray[np.float64]:
    """How far inside of `regions` a pixel lies, `(h, w)`: 1 within, 0 without, 0.5 on the (rounded) outline."""
    height, width = saliency.shape
    scale = min(1.0, REGION_SIDE / max(height, width))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    shrunk = np.asarray(Image.fromarray(np.asarray(saliency, np.float32)).resize(small, Image.Resampling.BOX))
    mask = regions(shrunk, clip_lower, clip_upper).astype(np.float32)
    rounded = ndimage.gaussian_filter(mask, REGION_SMOOTH * max(small) / 2)
    return np.asarray(Image.fromarray(rounded).resize((width, height), Image.Resampling.BICUBIC), np.float64)


def png(pixels: Pixels) -> bytes:
    """PNG file of an `(h, w, 3)` or `(h, w)` uint8 array."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _shaded(image: Pixels, value: NDArray[np.float64], colormap: str, mode: str) -> NDArray[np.float64]:
    """`value`, the drawing strength `(h, w)`, in colours over the image."""
    colours = _colours(value, colormap).astype(np.float64)
    if mode == "none":
        return colours
    weight = value[..., None]
    if mode == "mask_black":
        darkened: NDArray[np.float64] = image * weight**0.5  # linear, all but the strongest would look black
        return darkened
    # A dimmed base lets the colours stand out where they are, and the picture be seen where they are not.
    base = DIMMED * (image if mode == "original" else _gray(image))
    shaded: NDArray[np.float64] = base + (colours - base) * weight**0.7
    return shaded


def _outlined(image: Pixels, depth: NDArray[np.float64], colormap: str, mode: str) -> NDArray[np.float64]:
    """`depth` is that of `inside`: 0.5 on the outlines."""
    palette = _palette(colormap).astype(np.float64)
    within = np.clip(4 * depth - 1.5, 0, 1)[..., None]  # a soft edge, beneath the line
    if mode == "none":
        base = palette[0] + 0.25 * within * (palette[128] - palette[0])
    else:
        shown = _gray(image) if mode == "grayscale" else image
        least = 0.0 if mode == "mask_black" else DIMMED
        base = shown * (least + (1 - least) * within)
    width = max(1.5, LINE * max(depth.shape))
    # A dark rim: a light line would be lost on a light picture.
    for colour, thickness in ((palette[0], 2.2 * width), (palette[204], width)):
        base = base + (colour - base) * _line(depth, thickness)[..., None]
    outlined: NDArray[np.float64] = base
    return outlined


def _line(depth: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Opacity of a line `width` pixels wide along depth 0.5, with soft edges."""
    slope = ndimage.gaussian_gradient_magnitude(depth, 1.0)
    # To first order, the distance in pixels from the level 0.5. Flat parts are far from it.
    distance = np.abs(depth - 0.5) / np.maximum(slope, 1e-9)
    opacity: NDArray[np.float64] = np.clip((width + 1) / 2 - distance, 0, 1)
    return opacity


def _disk(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk: NDArray[np.bool_] = x * x + y * y <= radius * radius
    return disk


def _colours(value: NDArray[np.float64], colormap: str) -> Pixels:
    return _palette(colormap)[np.round(value * 255).astype(np.uint8)]


def palettes() -> dict[str, Pixels]:
    """The colour maps by name, each (256, 3), weakest first."""
    return dict(zip(COLORMAPS, _palettes(), strict=True))


def _palette(colormap: str) -> Pixels:
    """(256, 3), as matplotlib has it: see palettes.npy."""
    if colormap not in COLORMAPS:
        raise OptionError("colormap", colormap, ", ".join(COLORMAPS))
    palette: Pixels = _palettes()[COLORMAPS.index(colormap)]
    return palette


@lru_cache(maxsize=1)
def _palettes() -> Pixels:
    """(colour maps, 256, 3), in the order of COLORMAPS. A file, so that drawing needs no matplotlib."""
    found: Pixels = np.load(Path(__file__).with_name("palettes.npy"))
    return found


def _gray(image: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def _rounded(values: NDArray[np.floating]) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
