"""Outlines and the parts an object is drawn from; not what the objects are (objects.py), not pixels (paint.py).

Coordinates are an object's own: x right, y down, the object roughly inside the unit circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Ink = Literal["body", "accent", "shade", "light", "dark", "white"]


@dataclass(frozen=True)
class Part:
    """One painted piece: the union of `outlines` less `holes`, each (points, 2), and `lines` of `width`.

    `bulge` is how far the piece swells towards the viewer, in units of the object's radius; 0 is flat.
    A `patterned` piece takes the object's stripes, spots or mottling. `strength` is its opacity, 0 to 1.
    """

    ink: Ink
    outlines: Sequence[Points] = ()
    holes: Sequence[Points] = ()
    lines: Sequence[Points] = ()
    width: float = 0.0
    bulge: float = 0.0
    patterned: bool = False
    strength: float = 1.0

    def extent(self) -> Points:
        """Points, (n, 2), whose bounding box grown by width / 2 holds the piece."""
        return np.concatenate([*self.outlines, *self.lines])


def polygon(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=np.float64)


def ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 2 * np.pi, count: int = 26
) -> Points:
    """Arc from angle `start` to `stop` (radians, 0 = right, growing clockwise as y points down)."""
    angle = np.linspace(start, stop, count)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def smooth(points: Points, closed: bool = True, steps: int = 5) -> Points:
    """Catmull-Rom spline through `points`, (n, 2), with `steps` points a span."""
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    before, here, there, after = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(steps) / steps)[:, None, None]
    curve = 0.5 * (
        2 * here
        + (there - before) * t
        + (2 * before - 5 * here + 4 * there - after) * t**2
        + (3 * here - before - 3 * there + after) * t**3
    )
    spans = curve.transpose(1, 0, 2).reshape(-1, 2)
    return spans if closed else np.concatenate([spans, points[-1:]])


def mirrored(points: Points) -> Points:
    """The outline reflected in the y axis."""
    reflected: Points = points * np.array([-1.0, 1.0])
    return reflected


def moved(points: Points, x: float, y: float, turn: float = 0.0, scale: float = 1.0) -> Points:
    """The outline scaled, turned by `turn` radians about the origin, then moved."""
    cosine, sine = np.cos(turn) * scale, np.sin(turn) * scale
    placed: Points = points @ np.array([[cosine, sine], [-sine, cosine]]) + np.array([x, y])
    return placed
