"""Scenes: pictures of one object of ten classes among clutter, with the exact mask of its visible pixels.

Everything is a pure function of (label, seed, size), so any held-out sample can be made again. Background,
clutter, colours and light are drawn from the seed alone: scenes that differ only in their label differ only
in the object, and nothing but its shape can give the class away.
"""

from __future__ import annotations

import colorsys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scenes.objects import CLASSES, KINDS
from scenes.paint import Layer, Light, Plane, Pose, cast_shadow, compose, paint
from scenes.shapes import Ink, Part, ellipse, polygon, smooth
from scenes.textures import background, grid, noise

Rng = np.random.Generator
Stage = Literal["clutter", "object", "occluders"]
Split = Literal["train", "table", "test"]

# First seed of each split; a split has at most a million scenes, so no seed is in two of them.
SPLITS: dict[Split, int] = {"train": 0, "table": 1_000_000, "test": 2_000_000}
_LIMIT = 1_000_000
# An occluder that leaves less of the object than this to be seen is left out.
_LEAST_VISIBLE = 0.6


@dataclass(frozen=True)
class Scene:
    """image (h, w, 3) uint8; mask (h, w) bool, the object's visible pixels; label, an index into CLASSES."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    label: int


@dataclass(frozen=True)
class Mosaic:
    """Four scenes of four classes side by side: image (2h, 2w, 3) uint8; masks (4, 2h, 2w) bool, the four
    objects; labels, their classes. Order everywhere: top left, top right, bottom left, bottom right."""

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: tuple[int, int, int, int]


def _stream(seed: int, number: int) -> Rng:
    return np.random.default_rng((seed, number))


def _hsv(hue: float, saturation: float, value: float) -> Plane:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _colour(rng: Rng, unlike: Plane) -> tuple[float, float, float]:
    """Of four random (hue, saturation, value) the one farthest from the colour `unlike`, so that things show."""
    draws = rng.uniform((0, 0.3, 0.4), (1, 0.9, 1.0), (4, 3))
    far = [float(np.abs(_hsv(*draw) - unlike).sum()) for draw in draws]
    hue, saturation, value = draws[int(np.argmax(far))]
    return float(hue), float(saturation), float(value)


def _inks(rng: Rng, unlike: Plane) -> dict[Ink, Plane]:
    hue, saturation, value = _colour(rng, unlike)
    other = hue + rng.choice([0.5, 0.33, -0.33, 0.12, -0.12]) + rng.uniform(-0.04, 0.04)
    pale = hue + rng.uniform(-0.1, 0.1)
    return {
        "body": _hsv(hue, saturation, value),
        "shade": _hsv(hue, min(1.0, saturation * 1.1), value * 0.55),
        "light": _hsv(pale, saturation * 0.4, min(1.0, 0.35 + 0.7 * value)),
        "accent": _hsv(other, rng.uniform(0.35, 0.9), rng.uniform(0.5, 1.0)),
        "dark": _hsv(rng.uniform(), 0.4, rng.uniform(0.1, 0.22)),
        "white": _hsv(rng.uniform(), 0.07, rng.uniform(0.88, 1.0)),
    }


def _pattern(rng: Rng, size: int, scale: float) -> Plane | None:
    """Stripes, spots, mottling or nothing, (size, size) in [-1, 1]; `scale` is the object's radius in pictures."""
    kind, angle, phase = int(rng.integers(5)), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    waves = rng.uniform(1.6, 3.2) / scale * np.pi
    x, y = grid(size)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    if kind == 0:
        return None
    values: NDArray[np.floating]
    if kind == 1:
        values = 0.8 * np.clip(3 * np.sin(waves * along + phase[0]), -1, 1)
    elif kind == 2:
        dots = np.sin(waves * along + phase[0]) * np.sin(waves * across + phase[1])
        values = np.clip(4 * dots - 1.2, -0.6, 1)
    elif kind == 3:
        values = 1.2 * (2 * noise(rng, size, 12, 3, 0.8) - 1)
    else:
        values = np.clip(2 * (along - 0.5), -1, 1)
    return values.astype(np.float32)


def _thing(rng: Rng) -> list[Part]:
    """A piece of clutter: blob, ball, box, wedge, ring, rod, crescent or cross."""
    kind = int(rng.integers(8))
    angles = np.arange(7) * 2 * np.pi / 7
    radii = rng.uniform(0.5, 1.0, 7)
    if kind == 0:
        blob = smooth(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))
        return [Part("body", [blob], bulge=0.3, patterned=True)]
    if kind == 1:
        return [Part("body", [ellipse(0, 0, 0.8, 0.8)], bulge=0.4, patterned=True)]
    if kind == 2:
        box = polygon((-0.9, -0.55), (0.9, -0.55), (0.9, 0.55), (-0.9, 0.55))
        lid = polygon((-0.9, -0.2), (0.9, -0.2))
        return [Part("body", [box], bulge=0.08, patterned=True), Part("shade", lines=[lid], width=0.07)]
    if kind == 3:
        return [Part("body", [polygon((-0.9, 0.7), (0.1, -0.9), (0.9, 0.6))], bulge=0.12, patterned=True)]
    if kind == 4:
        return [Part("body", [ellipse(0, 0, 0.8, 0.8)], [ellipse(0, 0, 0.45, 0.45)], bulge=0.14)]
    if kind == 5:
        return [Part("body", lines=[polygon((-1.2, 0.1), (1.2, -0.1))], width=0.28, bulge=0.12)]
    if kind == 6:
        return [Part("body", [ellipse(0, 0, 0.85, 0.85)], [ellipse(0.4, -0.1, 0.72, 0.72)], bulge=0.16)]
    arms = polygon((-0.25, -0.9), (0.25, -0.9), (0.25, 0.9), (-0.25, 0.9))
    return [Part("body", [arms, arms[:, ::-1]], bulge=0.12)]


def _clutter(seed: int, size: int, light: Light, unlike: Plane) -> list[Layer]:
    rng = _stream(seed, 1)
    layers = []
    for _ in range(int(rng.integers(2, 7))):
        x, y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.16)
        pose = Pose(x * size, y * size, radius * size, rng.uniform(0, 2 * np.pi))
        parts, inks, pattern = _thing(rng), _inks(rng, unlike), _pattern(rng, size, radius)
        layer = paint(parts, pose, inks, pattern, light, size)
        if layer is not None:
            layers.append(layer)
    return layers


def _object(label: int, seed: int, size: int, light: Light, unlike: Plane) -> Layer:
    colours, shape = _stream(seed, 2), _stream(seed, 3)
    kind = KINDS[label]
    radius = shape.uniform(0.2, 0.36) * kind.scale
    reach = max(0.0, 0.5 - 0.8 * radius)
    x, y = 0.5 + shape.uniform(-reach, reach, 2)
    turn, flip, squeeze = shape.uniform(-kind.turn, kind.turn), bool(shape.random() < 0.5), shape.uniform(0.82, 1.08)
    pose = Pose(x * size, y * size, radius * size, turn, flip, squeeze)
    inks, pattern = _inks(colours, unlike), _pattern(colours, size, radius)
    layer = paint(kind.parts(shape), pose, inks, pattern, light, size)
    if layer is None:  # the centre is inside the picture and the radius over a sixth of it
        raise RuntimeError(f"Scene {seed}: the {kind.name} fell outside the picture.")
    return layer


def _occluders(seed: int, size: int, light: Light, unlike: Plane, target: Layer) -> list[Layer]:
    """At most two things in front, of those drawn the ones that leave enough of the object to be seen."""
    rng = _stream(seed, 4)
    layers: list[Layer] = []
    area = float(target.alpha.sum())
    visible = target.coverage(size)
    for _ in range(int(rng.integers(0, 3))):
        x = (target.left + rng.uniform(0, 1) * target.alpha.shape[1]) / size
        y = (target.top + rng.uniform(0, 1) * target.alpha.shape[0]) / size
        radius = rng.uniform(0.06, 0.14)
        pose = Pose(x * size, y * size, radius * size, rng.uniform(0, 2 * np.pi))
        parts, inks, pattern = _thing(rng), _inks(rng, unlike), _pattern(rng, size, radius)
        layer = paint(parts, pose, inks, pattern, light, size)
        if layer is None:
            continue
        left = visible * (1 - layer.coverage(size))
        if float(left.sum()) >= _LEAST_VISIBLE * area:
            visible = left
            layers.append(layer)
    return layers


def _light(rng: Rng) -> Light:
    angle = rng.uniform(-np.pi * 0.95, -np.pi * 0.05)  # from above, as in most photographs
    return Light(float(np.cos(angle)), float(np.sin(angle)), rng.uniform(0.45, 0.8))


def _exposed(picture: Plane, rng: Rng, light: Light) -> NDArray[np.uint8]:
    """Fall-off of the light across the picture, its tint, exposure, lens shading and sensor noise."""
    size = len(picture)
    x, y = grid(size)
    slope = rng.uniform(0.0, 0.5) * ((x - 0.5) * light.x + (y - 0.5) * light.y)
    corners = 1 - rng.uniform(0.0, 0.45) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    tint = rng.normal(1.0, 0.05, 3) * rng.uniform(0.85, 1.15)
    exposed = picture * ((1 + slope) * corners)[..., None] * tint.astype(np.float32)
    exposed = np.clip(exposed, 0, None) ** np.float32(rng.uniform(0.85, 1.15))
    # A film's shoulder: bright on bright keeps a difference instead of burning out to one white.
    exposed = exposed / (1 + exposed**4) ** np.float32(0.25)
    exposed += rng.normal(0, rng.uniform(0.005, 0.03), (size, size, 3))
    return np.round(np.clip(exposed, 0, 1) * 255).astype(np.uint8)


def scene(label: int, seed: int, size: int = 128, stages: Collection[Stage] = get_args(Stage)) -> Scene:
    """The scene of class `label` (index into CLASSES) with this seed, `size` pixels a side (16 or more).

    Leaving one of `stages` out gives the same scene without it; the mask is of the whole scene all the same.
    """
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"Scene: the label must be 0 to {len(CLASSES) - 1}, not {label}.")
    if size < 16:
        raise ValueError(f"Scene: the size must be 16 pixels or more, not {size}.")
    lighting = _stream(seed, 5)
    light = _light(lighting)
    picture = background(_stream(seed, 0), size)
    unlike = picture.mean(axis=(0, 1))
    target = _object(label, seed, size, light, unlike)
    occluders = _occluders(seed, size, light, unlike, target)
    layers: list[Layer] = []
    if "clutter" in stages:
        layers += _clutter(seed, size, light, unlike)
    if "object" in stages:
        layers.append(target)
    if "occluders" in stages:
        layers += occluders
    reach, depth = lighting.uniform(0.01, 0.06) * size, lighting.uniform(0.2, 0.55)
    for layer in layers:
        cast_shadow(picture, layer, light, reach, depth)
        compose(picture, layer)
    visible = target.coverage(size)
    for layer in occluders:
        visible[layer.box] *= 1 - layer.alpha
    return Scene(_exposed(picture, lighting, light), visible >= 0.5, label)


def sample(split: Split, index: int, size: int = 128) -> Scene:
    """Scene `index` (0 to 999 999) of a split; labels go round in turn, so any ten in a row hold each class once."""
    if not 0 <= index < _LIMIT:
        raise ValueError(f"Split '{split}': the index must be 0 to {_LIMIT - 1}, not {index}.")
    return scene(index % len(CLASSES), SPLITS[split] + index, size)


def mosaic(index: int, split: Split = "test", size: int = 128) -> Mosaic:
    """Mosaic `index` of a split: four of its scenes, of four different classes, each `size` pixels a side."""
    rng = np.random.default_rng((SPLITS[split], index, 6))
    labels = rng.permutation(len(CLASSES))[:4]
    rounds = rng.integers(0, _LIMIT // len(CLASSES), 4)
    indices = [int(index) for index in rounds * len(CLASSES) + labels]
    scenes = [sample(split, index, size) for index in indices]
    image = np.zeros((2 * size, 2 * size, 3), np.uint8)
    masks = np.zeros((4, 2 * size, 2 * size), np.bool_)
    for place, part in enumerate(scenes):
        top, left = place // 2 * size, place % 2 * size
        image[top : top + size, left : left + size] = part.image
        masks[place, top : top + size, left : left + size] = part.mask
    first, second, third, fourth = (part.label for part in scenes)
    return Mosaic(image, masks, (first, second, third, fourth))
