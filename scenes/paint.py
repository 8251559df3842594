"""Parts -> anti-aliased, shaded pixels; no random numbers, no choice of what to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from scenes.shapes import Ink, Part, Points

Plane = NDArray[np.float32]
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Pose:
    """Where a thing stands: centre (x, y) and radius in pixels, `turn` in radians, mirrored or not, `squeeze` of x."""

    x: float
    y: float
    radius: float
    turn: float = 0.0
    flip: bool = False
    squeeze: float = 1.0

    def matrix(self) -> NDArray[np.float64]:
        """(2, 2), own coordinates (row vectors) -> pixels, before the centre is added."""
        cosine, sine = np.cos(self.turn), np.sin(self.turn)
        stretch = np.diag([(-1.0 if self.flip else 1.0) * self.squeeze, 1.0]) * self.radius
        matrix: NDArray[np.float64] = stretch @ np.array([[cosine, sine], [-sine, cosine]])
        return matrix

    def place(self, points: Points) -> Points:
        placed: Points = points @ self.matrix() + np.array([self.x, self.y])
        return placed


@dataclass(frozen=True)
class Light:
    """Direction towards the light in the picture plane (x, y; unit length) and how hard it shades, 0 to 1."""

    x: float
    y: float
    hardness: float


@dataclass(frozen=True)
class Layer:
    """A painted thing: premultiplied colour, (h, w, 3), and coverage, (h, w), in [0, 1], cut to (top, left)."""

    colour: Plane
    alpha: Plane
    top: int
    left: int

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def coverage(self, size: int) -> Plane:
        """Alpha on the whole picture, (size, size)."""
        whole: Plane = np.zeros((size, size), np.float32)
        whole[self.box] = self.alpha
        return whole


def _coverage(part: Part, pose: Pose, left: int, top: int, width: int, height: int) -> Plane:
    fine = _SUPERSAMPLING
    image = Image.new("L", (width * fine, height * fine))
    draw = ImageDraw.Draw(image)

    def to_fine(points: Points) -> list[tuple[float, float]]:
        placed = (pose.place(points) - np.array([left, top])) * fine
        return [(float(x), float(y)) for x, y in placed]

    for outline in part.outlines:
        draw.polygon(to_fine(outline), fill=255)
    for hole in part.holes:
        draw.polygon(to_fine(hole), fill=0)
    stroke = max(1, round(part.width * pose.radius * fine))
    for line in part.lines:
        draw.line(to_fine(line), fill=255, width=stroke, joint="curve")
    return np.asarray(image.reduce(fine), dtype=np.float32) / np.float32(255)


def _shading(alpha: Plane, depth: float, light: Light) -> tuple[Plane, Plane]:
    """Brightness factor around 1 and highlight in [0, 1] of a piece swollen by `depth` pixels, both (h, w)."""
    swell = ndimage.gaussian_filter(alpha, max(depth, 0.6), mode="constant") * alpha
    slope_y, slope_x = np.gradient(swell * np.float32(2.2 * max(depth, 0.6)))
    length = np.sqrt(1 + slope_x**2 + slope_y**2)
    facing = -(slope_x * light.x + slope_y * light.y) / length
    factor = 1 + light.hardness * np.clip(facing, -0.8, 0.8)
    highlight = np.clip(facing * 0.75 + 0.66 / length - 0.78, 0, 1) * light.hardness * 2.4
    return factor.astype(np.float32), np.clip(highlight, 0, 1).astype(np.float32)


def paint(
    parts: Sequence[Part], pose: Pose, inks: Mapping[Ink, Plane], pattern: Plane | None, light: Light, size: int
) -> Layer | None:
    """The parts over each other, last on top. `pattern`, (size, size) in [-1, 1], lightens and darkens
    patterned parts. None if no pixel falls inside the picture."""
    corners = np.concatenate([pose.place(part.extent()) for part in parts])
    margin = max(part.width for part in parts) * pose.radius / 2 + 1.5
    left, top = np.clip(np.floor(corners.min(axis=0) - margin), 0, size).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(axis=0) + margin), 0, size).astype(int)
    if right - left < 2 or bottom - top < 2:
        return None
    box = slice(top, bottom), slice(left, right)
    colour: Plane = np.zeros((bottom - top, right - left, 3), np.float32)
    alpha: Plane = np.zeros(colour.shape[:2], np.float32)
    for part in parts:
        cover = _coverage(part, pose, left, top, right - left, bottom - top)
        tint = np.broadcast_to(inks[part.ink], colour.shape)
        if part.patterned and pattern is not None:
            tint = tint * (1 + 0.45 * pattern[box][..., None])
        if part.bulge:
            factor, highlight = _shading(cover, part.bulge * pose.radius, light)
            tint = tint * factor[..., None]
            tint = tint + (1 - tint) * (0.55 * highlight)[..., None]
        opacity = (cover * np.float32(part.strength))[..., None]
        colour = colour * (1 - opacity) + np.clip(tint, 0, 1) * opacity
        alpha = alpha + opacity[..., 0] - alpha * opacity[..., 0]
    return Layer(colour, alpha, int(top), int(left))


def compose(picture: Plane, layer: Layer) -> None:
    """Puts the layer over the picture, (size, size, 3), in place."""
    below = picture[layer.box]
    picture[layer.box] = below * (1 - layer.alpha[..., None]) + layer.colour


def cast_shadow(picture: Plane, layer: Layer, light: Light, reach: float, depth: float) -> None:
    """Darkens the picture, in place, where the layer keeps the light off: `reach` pixels away, soft-edged."""
    blur = 0.5 * reach + 0.5
    margin = int(np.ceil(3 * blur))
    down, right = round(-light.y * reach), round(-light.x * reach)
    shadow = ndimage.gaussian_filter(np.pad(layer.alpha, margin), blur, mode="constant", truncate=3.0)
    top, left = layer.top + down - margin, layer.left + right - margin
    height, width = shadow.shape
    rows = slice(max(top, 0), max(top + height, 0))
    columns = slice(max(left, 0), max(left + width, 0))
    below = picture[rows, columns]
    seen = shadow[max(-top, 0) :, max(-left, 0) :][: below.shape[0], : below.shape[1]]
    below *= (1 - np.float32(depth) * seen)[..., None]
