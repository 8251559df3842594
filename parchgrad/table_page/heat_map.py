"""The similarity of classes as a heat map: colours, cells and the picture, ready to be laid out."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from parchgrad.table_page.figures import Floats

# Up to this many classes a map has a cell with a name on both sides for each.
CLASSES_WITH_NAMES = 60
# Along a map of more classes these many stand by name, evenly spaced, to tell where one is.
PLACES_NAMED = 40

COLOURS = "cividis"  # even steps of lightness, and readable by colour-blind people

WHITE = 255  # its place in the palette, after the colours

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class HeatMap:
    """Classes in the order of likeness; `cells` (value, colour, whether dark) where there is room for each."""

    labels: list[str]
    named: list[int]  # places along the map whose labels are shown where there are no cells
    cells: list[list[tuple[float, str, bool]]] | None
    picture: str
    low: float
    high: float


def heat_map(labels: Sequence[str], similarity: Floats) -> HeatMap:
    """The map of at least two classes, `(K, K)`, in the order given."""
    low, high = limits(similarity)
    places = np.linspace(0, len(labels) - 1, min(len(labels), PLACES_NAMED)).round().astype(int)
    return HeatMap(
        labels=list(labels),
        named=places.tolist(),
        cells=_cells(similarity) if len(labels) <= CLASSES_WITH_NAMES else None,
        picture=picture(similarity),
        low=low,
        high=high,
    )


def picture(similarity: Floats) -> str:
    """A pixel a pair of classes, as the `data:` address of a PNG file."""
    return _png(_steps(similarity))


def scale() -> str:
    """The colours from dark to bright, as the `data:` address of a PNG file."""
    return _png(np.arange(WHITE, dtype=np.uint8)[None])


def limits(similarity: Floats) -> tuple[float, float]:
    """Smallest and largest value between different classes: the ends of the colour scale."""
    others = similarity[~np.eye(len(similarity), dtype=bool)]
    return float(others.min()), float(others.max())


def _cells(similarity: Floats) -> list[list[tuple[float, str, bool]]]:
    """Each cell's value, its colour and whether that is a dark one."""
    pixels = _palette()[_steps(similarity)].tolist()
    return [
        [(value, f"#{r:02x}{g:02x}{b:02x}", r + g + b < 3 * 120) for value, (r, g, b) in zip(values, line, strict=True)]
        for values, line in zip(similarity.tolist(), pixels, strict=True)
    ]


def _steps(similarity: Floats) -> Bytes:
    """`(K, K)` places in the palette; a class with itself is white, as it says nothing and would set the scale."""
    low, high = limits(similarity)
    steps = np.clip((similarity - low) / (high - low or 1.0) * (WHITE - 1), 0, WHITE - 1).round().astype(np.uint8)
    steps[np.diag_indices(len(steps))] = WHITE
    return steps


def _palette() -> Bytes:
    """`(256, 3)`: the colour scale, and white."""
    colours = matplotlib.colormaps[COLOURS](np.linspace(0, 1, WHITE), bytes=True)[:, :3]
    return np.concatenate([colours, [[255, 255, 255]]]).astype(np.uint8)


def _png(steps: Bytes) -> str:
    image = Image.fromarray(steps)
    image.putpalette(_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
