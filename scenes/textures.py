"""Background textures: seeded images of surfaces and views; no objects.

A texture is a function of (rng, size, palette) -> (size, size, 3) float32 in [0, 1]. Every draw from the rng
is made at every size, so one seed shows the same view at 64 and at 256 pixels, only sharper.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rng = np.random.Generator
Plane = NDArray[np.float32]
# Three colours, (3, 3) in [0, 1]: mostly the first, then the second, the third for lines and highlights.
Palette = NDArray[np.float32]

_FINEST = 64  # cells a side of the finest octave of noise


def enlarge(cells: NDArray[np.float32], height: int, width: int) -> Plane:
    """Bicubic resize of a small grid, (rows, columns) -> (height, width)."""
    image = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def noise(rng: Rng, size: int, cells: int, octaves: int = 4, fall: float = 0.55, stretch: float = 1.0) -> Plane:
    """Fractal value noise, (size, size), about [0, 1] around 0.5; `stretch` > 1 draws it out along x."""
    total: Plane = np.zeros((size, size), np.float32)
    weight, weights = 1.0, 0.0
    for _ in range(octaves):
        columns = max(2, round(cells / stretch))
        grid = rng.random((cells, columns), dtype=np.float32)
        total += np.float32(weight) * enlarge(grid, size, size)
        weights += weight
        weight *= fall
        cells = min(cells * 2, _FINEST)
    spread: Plane = np.clip((total / np.float32(weights) - 0.5) * 1.6 + 0.5, 0.0, 1.0)
    return spread


def grid(size: int) -> tuple[Plane, Plane]:
    """x and y of the pixel centres, (1, size) and (size, 1), in [0, 1]."""
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return line[None, :], line[:, None]


def _mix(a: NDArray[np.float32], b: NDArray[np.float32], share: NDArray[np.floating]) -> Plane:
    """From colours a to colours b, (3,) or (h, w, 3), by `share`, (h, w)."""
    mixed: Plane = (a + (b - a) * share[..., None]).astype(np.float32, copy=False)
    return mixed


def _sky(rng: Rng, size: int, palette: Palette) -> Plane:
    _, y = grid(size)
    clouds = noise(rng, size, int(rng.integers(3, 5)), 5, stretch=1.5)
    cover = rng.uniform(0.42, 0.6)
    base = _mix(palette[0], 0.5 * palette[0] + 0.5, np.broadcast_to(y, (size, size)))
    white = np.clip(palette[2] * 0.25 + 0.75, 0, 1)
    return _mix(base, white, np.clip((clouds - cover) * 3.5, 0, 0.95))


def _meadow(rng: Rng, size: int, palette: Palette) -> Plane:
    blades = noise(rng, size, 24, 2, 0.9, stretch=1.0)
    blades = 0.5 * blades + 0.5 * noise(rng, size, 12, 3, 0.9, stretch=0.3)
    patches = noise(rng, size, 3, 2)
    view = _mix(palette[0] * 0.55, palette[1], np.clip(blades * 1.5 - 0.25, 0, 1))
    return _mix(view, palette[2], np.clip(patches - 0.5, 0, 1) * 0.7)


def _planks(rng: Rng, size: int, palette: Palette) -> Plane:
    _, y = grid(size)
    rows = int(rng.integers(3, 7))
    grain = noise(rng, size, 40, 3, 0.8, stretch=9.0)
    warp = noise(rng, size, 4, 2, stretch=2.5)
    rings = 0.5 + 0.5 * np.sin(40.0 * (np.broadcast_to(y, (size, size)) + 0.25 * warp) + rng.uniform(0, 6))
    tone = rng.uniform(0.75, 1.15, rows).astype(np.float32)
    plank = np.minimum((y * rows).astype(int), rows - 1)
    view = _mix(palette[0] * 0.7, palette[1], 0.55 * grain + 0.45 * rings) * tone[plank][..., None]
    gap = np.abs(y * rows - np.round(y * rows)) < 0.035
    boards: Plane = view * np.where(gap, np.float32(0.45), np.float32(1.0))[..., None]
    return boards.transpose(1, 0, 2) if rng.random() < 0.5 else boards


def _bricks(rng: Rng, size: int, palette: Palette) -> Plane:
    x, y = grid(size)
    rows = int(rng.integers(5, 9))
    columns = rows / rng.uniform(1.8, 2.6)
    row = np.minimum((y * rows).astype(int), rows - 1)
    across = x * columns + 0.5 * (row % 2)
    tones = rng.random((rows, 12), dtype=np.float32)[row, across.astype(int)]
    edge_x = np.abs(across - np.round(across)) * rows / columns
    edge_y = np.abs(y * rows - np.round(y * rows))
    mortar = np.clip(1.6 - 14.0 * np.minimum(edge_x, edge_y), 0, 1)
    rough = noise(rng, size, 24, 2, 0.8)
    view = _mix(palette[0] * 0.75, palette[1], np.clip(0.6 * tones + 0.5 * rough - 0.05, 0, 1))
    return _mix(view, np.clip(palette[2] * 0.4 + 0.4, 0, 1), mortar * 0.85)


def _plaid(rng: Rng, size: int, palette: Palette) -> Plane:
    x, y = grid(size)
    count = rng.integers(2, 6, 2)
    phase = rng.uniform(0, 1, 4).astype(np.float32)
    wide_x, wide_y = (x * count[0] + phase[0]) % 1.0 < 0.5, (y * count[1] + phase[1]) % 1.0 < 0.5
    thin_x, thin_y = (x * count[0] + phase[2]) % 1.0 < 0.1, (y * count[1] + phase[3]) % 1.0 < 0.1
    cloth = 0.5 * wide_x.astype(np.float32) + np.float32(0.5) * wide_y
    weave = 0.5 + 0.5 * np.sin(2 * np.pi * 30 * x) * np.sin(2 * np.pi * 30 * y)
    view = _mix(palette[0], palette[1], cloth)
    view = _mix(view, palette[2], (thin_x | thin_y).astype(np.float32) * 0.6)
    folds: Plane = view * ((0.86 + 0.14 * weave) * (0.85 + 0.3 * noise(rng, size, 3, 3)))[..., None]
    return folds


def _sand(rng: Rng, size: int, palette: Palette) -> Plane:
    coarse, fine = noise(rng, size, 4, 3), noise(rng, size, 64, 1)
    view = _mix(palette[0], palette[1], coarse)
    dots = np.clip(fine - 0.5, 0, 1) * 1.1 - np.clip(0.5 - fine, 0, 1) * 0.8
    grains: Plane = view * (1 + 0.4 * dots)[..., None]
    return grains


def _water(rng: Rng, size: int, palette: Palette) -> Plane:
    _, y = grid(size)
    warp = noise(rng, size, 5, 3, stretch=2.0)
    near = 8 + 14 * (1 - np.broadcast_to(y, (size, size)))
    waves = 0.5 + 0.5 * np.sin(2 * np.pi * (near * (y + 0.22 * warp) + rng.uniform(0, 1)))
    glint = np.clip(noise(rng, size, 20, 2, 0.9, stretch=3.0) * waves * 3 - 1.5, 0, 1)
    view = _mix(palette[0] * 0.65, palette[1], 0.25 + 0.6 * waves * warp)
    return _mix(view, np.clip(palette[2] * 0.3 + 0.7, 0, 1), glint * 0.7)


def _bokeh(rng: Rng, size: int, palette: Palette) -> Plane:
    x, y = grid(size)
    view = _mix(palette[0] * 0.35, palette[1] * 0.7, noise(rng, size, 3, 2))
    for cx, cy, radius, bright, which in rng.random((16, 5), dtype=np.float32):
        far = np.hypot(x - cx, y - cy) / (0.04 + 0.1 * radius)
        disc = np.clip((1.0 - far) * 5, 0, 1) * (0.55 + 0.45 * np.clip(far, 0, 1) ** 2)
        colour = np.clip(palette[1 + int(which > 0.5)] * 0.7 + 0.3, 0, 1)
        view = _mix(view, colour, disc * (0.2 + 0.45 * bright))
    return view


def _hills(rng: Rng, size: int, palette: Palette) -> Plane:
    _, y = grid(size)
    view = _mix(0.4 * palette[2] + 0.6, palette[2], np.broadcast_to(1 - y, (size, size)))
    rough = noise(rng, size, 16, 3, 0.8)
    ridges = 4
    for ridge in range(ridges):
        profile = noise(rng, size, 4 + ridge, 4)[0]
        start = 0.28 + 0.18 * ridge + rng.uniform(-0.05, 0.05)
        cover = np.clip((y - (start + 0.22 * (profile[None, :] - 0.5))) * size * 0.5, 0, 1)
        near = (ridge + 1) / ridges
        colour = (0.35 * palette[2] * (1 - near) + palette[0] * (0.55 + 0.35 * (1 - near))).astype(np.float32)
        view = _mix(view, _mix(colour * 0.75, colour * 1.15, rough), cover)
    return view


def _marble(rng: Rng, size: int, palette: Palette) -> Plane:
    x, y = grid(size)
    warp = noise(rng, size, 4, 5)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    vein = np.abs(np.sin(np.pi * (rng.uniform(2, 4) * along + 2.2 * warp))) ** 0.5
    return _mix(palette[2] * 0.6, _mix(palette[0], np.clip(palette[0] * 0.4 + 0.55, 0, 1), warp), vein)


TEXTURES: tuple[Callable[[Rng, int, Palette], Plane], ...] = (
    _sky,
    _meadow,
    _planks,
    _bricks,
    _plaid,
    _sand,
    _water,
    _bokeh,
    _hills,
    _marble,
)

_COLOURS = (
    "6fa8dc a9cbe8 f4ead5",
    "5d8a3a a8bf5a e8d27a",
    "8a5a33 c79a63 5a3a22",
    "a8543c c97b5a d9cbb8",
    "c9a06b e6cfa0 8c6a43",
    "2f6f8f 6fb3c4 e6f2f0",
    "37474f 78909c eceff1",
    "7a4b6a c28aa8 f3d9e2",
    "3f6d4e 86a97a d8d3a8",
    "b5651d e0a458 fbe3b5",
    "4a4e8c 8c92c9 dfe0f5",
    "8d8576 bdb5a4 59544a",
    "2b3a2f 5f7f52 c5d86d",
    "9c3d3d d98c6a f0d9b5",
    "1f3b57 47709c f2c57c",
    "9aa88f cfd6c0 6b7a5e",
)


def palette(rng: Rng) -> Palette:
    """Three colours that go together, jittered."""
    words = _COLOURS[int(rng.integers(len(_COLOURS)))].split()
    colours = np.array([[int(word[i : i + 2], 16) / 255 for i in (0, 2, 4)] for word in words], np.float32)
    jitter = rng.normal(0, 0.05, (3, 3)) + rng.normal(0, 0.06, (1, 3))
    return np.clip(colours + jitter, 0.02, 1.0).astype(np.float32)


def background(rng: Rng, size: int) -> Plane:
    """One view of a random kind, (size, size, 3) float32 in [0, 1]."""
    kind = TEXTURES[int(rng.integers(len(TEXTURES)))]
    return np.clip(kind(rng, size, palette(rng)), 0.0, 1.0).astype(np.float32)
