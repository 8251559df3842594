"""The ten things a scene can be about, each as a list of parts with its proportions drawn at random.

Nothing here chooses a colour: hues are the scene's (generator.py), so that they cannot give a class away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scenes.shapes import Part, ellipse, mirrored, moved, polygon, smooth

Rng = np.random.Generator


def _butterfly(rng: Rng) -> list[Part]:
    reach, droop = rng.uniform(0.85, 1.0), rng.uniform(0.75, 0.95)
    upper = smooth(
        polygon((0.04, -0.1), (0.3, -0.62), (reach * 0.8, -0.82), (reach, -0.6), (reach * 0.86, -0.15), (0.4, 0.05))
    )
    lower = smooth(
        polygon((0.04, 0.0), (0.45, 0.06), (reach * 0.74, 0.3), (reach * 0.62, droop * 0.8), (0.3, droop * 0.72))
    )
    spot_x, spot = reach * 0.68, rng.uniform(0.12, 0.17)
    eyes = [ellipse(spot_x, -0.5, spot, spot), ellipse(reach * 0.48, 0.4, spot * 0.8, spot * 0.8)]
    inner = [moved(upper, 0.13, -0.07, scale=0.72), moved(lower, 0.09, 0.07, scale=0.7)]
    antenna = smooth(polygon((0.0, -0.4), (0.1, -0.7), (0.26, -0.9)), closed=False)
    return [
        Part("dark", lines=[antenna, mirrored(antenna)], width=0.06),
        Part("shade", [upper, mirrored(upper), lower, mirrored(lower)], bulge=0.08),
        Part("body", [inner[0], mirrored(inner[0])], bulge=0.1, patterned=True),
        Part("accent", [inner[1], mirrored(inner[1])], bulge=0.1),
        Part("white", [outline for eye in eyes for outline in (eye, mirrored(eye))], strength=0.85),
        Part("dark", [ellipse(0, 0.08, 0.1, 0.52), ellipse(0, -0.44, 0.12, 0.13)], bulge=0.1),
    ]


def _cup(rng: Rng) -> list[Part]:
    top, bottom, height = rng.uniform(0.58, 0.68), rng.uniform(0.42, 0.58), rng.uniform(0.62, 0.8)
    tilt = rng.uniform(0.14, 0.22)
    wall = np.concatenate(
        [
            polygon((-top, -height)),
            ellipse(0, height, bottom, tilt * 0.8, np.pi, 0.0, 12),
            polygon((top, -height)),
        ]
    )
    handle_x, handle_y, reach = (top + bottom) / 2 - 0.02, -0.05, rng.uniform(0.34, 0.42)
    handle = ellipse(handle_x, handle_y, reach, 0.46)
    opening = ellipse(handle_x, handle_y, reach - 0.15, 0.29)
    band_y, band = rng.uniform(-0.2, 0.25), rng.uniform(0.1, 0.2)
    middle = (top + bottom) / 2
    stripe = np.concatenate(
        [
            ellipse(0, band_y - band, middle, tilt, np.pi, 0.0, 12),
            ellipse(0, band_y + band, middle, tilt, 0.0, np.pi, 12),
        ]
    )
    return [
        Part("body", [handle], holes=[opening], bulge=0.1),
        Part("body", [wall], bulge=0.34, patterned=True),
        Part("accent", [stripe], strength=0.75),
        Part("light", [ellipse(0, -height, top, tilt)]),
        Part("dark", [ellipse(0, -height + 0.02, top * 0.86, tilt * 0.76)]),
        Part("shade", [ellipse(0, -height + 0.07, top * 0.78, tilt * 0.5)], strength=0.7),
    ]


def _fish(rng: Rng) -> list[Part]:
    depth = rng.uniform(0.36, 0.5)
    body = smooth(
        polygon((-0.95, 0.02), (-0.62, -depth * 0.8), (-0.1, -depth), (0.42, -0.2), (0.58, 0.0))
        if rng.random() < 0.5
        else polygon((-0.95, 0.0), (-0.7, -depth * 0.7), (-0.2, -depth), (0.3, -depth * 0.6), (0.58, -0.02))
    )
    upper = body[: len(body) * 4 // 5 + 1]
    outline = np.concatenate([upper, (upper * np.array([1.0, -1.0]))[::-1]])
    spread = rng.uniform(0.36, 0.5)
    tail = smooth(polygon((0.48, 0.0), (0.98, -spread), (0.84, 0.0), (0.98, spread)))
    fin = smooth(polygon((-0.35, -depth * 0.85), (-0.1, -depth - rng.uniform(0.22, 0.34)), (0.34, -depth * 0.5)))
    under = smooth(polygon((-0.2, depth * 0.85), (0.06, depth + 0.24), (0.22, depth * 0.6)))
    gill = ellipse(-0.6, 0, 0.2, depth * 0.62, -1.1, 1.1, 10)
    flipper = smooth(polygon((-0.28, 0.06), (0.04, 0.02), (0.02, 0.22)))
    bars = [smooth(polygon((x, -depth * 0.8), (x + 0.06, 0.0), (x, depth * 0.8)), closed=False) for x in (-0.1, 0.16)]
    return [
        Part("accent", [tail, fin, under], bulge=0.06),
        Part("body", [outline], bulge=0.3, patterned=True),
        Part("light", lines=bars, width=0.1, strength=0.6),
        Part("shade", lines=[gill], width=0.05),
        Part("accent", [flipper], bulge=0.04),
        Part("white", [ellipse(-0.7, -0.08, 0.1, 0.1)]),
        Part("dark", [ellipse(-0.71, -0.08, 0.055, 0.055)]),
    ]


def _house(rng: Rng) -> list[Part]:
    wide, wall, peak = rng.uniform(0.6, 0.75), rng.uniform(0.05, 0.15), rng.uniform(0.62, 0.78)
    left, middle, right, base = -0.85, -0.85 + wide, 0.85, 0.72
    top = wall - peak
    lean = 0.1
    front = polygon((left, base), (left, wall), ((left + middle) / 2, top), (middle, wall), (middle, base))
    side = polygon((middle, wall), (right, wall - lean), (right, base - lean), (middle, base))
    centre = (left + middle) / 2
    slope = polygon(
        (centre, top), (right - 0.3, top - lean), (right + 0.1, wall - lean + 0.08), (middle + 0.06, wall + 0.08)
    )
    gable = polygon((left - 0.1, wall + 0.1), (centre, top), (middle + 0.06, wall + 0.08))
    chimney_x = rng.uniform(0.1, 0.4)
    chimney = polygon(
        (chimney_x, top - 0.22), (chimney_x + 0.17, top - 0.22), (chimney_x + 0.17, top + 0.2), (chimney_x, top + 0.2)
    )
    door = polygon((centre - 0.14, base), (centre - 0.14, 0.28), (centre + 0.14, 0.28), (centre + 0.14, base))
    panes = []
    for x in np.linspace(middle + 0.14, right - 0.36, 2):
        y = wall + 0.2 - lean * (x - middle) / (right - middle)
        panes.append(polygon((x, y), (x + 0.22, y - 0.02), (x + 0.22, y + 0.2), (x, y + 0.22)))
    attic = ellipse(centre, wall - 0.18, 0.1, 0.1)
    return [
        Part("shade", [chimney], bulge=0.05),
        Part("light", [front]),
        Part("body", [side], patterned=True),
        Part("accent", [slope], patterned=True),
        Part("accent", lines=[gable], width=0.11),
        Part("dark", [door], strength=0.9),
        Part("white", panes, strength=0.9),
        Part("dark", lines=[np.concatenate([pane, pane[:1]]) for pane in panes], width=0.035),
        Part("dark", [attic]),
    ]


def _key(rng: Rng) -> list[Part]:
    bow, thick = rng.uniform(0.36, 0.44), rng.uniform(0.17, 0.21)
    y = -0.56
    hole = rng.uniform(0.42, 0.52)
    if rng.random() < 0.5:
        head = ellipse(0, y, bow, bow)
        opening = ellipse(0, y, bow * hole, bow * hole)
    else:
        head = smooth(
            polygon(
                (0, y + bow),
                (-bow, y + 0.12),
                (-bow * 0.72, y - bow * 0.9),
                (bow * 0.72, y - bow * 0.9),
                (bow, y + 0.12),
            )
        )
        opening = ellipse(0, y - 0.03, bow * hole * 1.1, bow * hole * 0.9)
    half = thick / 2
    shaft = polygon((-half, y + bow * 0.7), (half, y + bow * 0.7), (half, 0.96), (-half, 0.96))
    teeth = []
    for tooth in range(int(rng.integers(2, 4))):
        bottom, reach = 0.93 - 0.25 * tooth, rng.uniform(0.26, 0.44)
        teeth.append(polygon((0, bottom - 0.15), (reach, bottom - 0.15), (reach, bottom), (0, bottom)))
    collar = polygon((-half - 0.07, -0.14), (half + 0.07, -0.14), (half + 0.07, -0.02), (-half - 0.07, -0.02))
    return [
        Part("body", [head, shaft, *teeth], holes=[opening], bulge=0.14),
        Part("light", [collar], bulge=0.06),
        Part("light", lines=[ellipse(0, y, bow * 0.8, bow * 0.8, np.pi, 1.6 * np.pi, 10)], width=0.05, strength=0.7),
    ]


def _leaf(rng: Rng) -> list[Part]:
    half, teeth = rng.uniform(0.42, 0.56), int(rng.integers(6, 9))
    along = np.linspace(0.0, 1.0, 4 * teeth + 1)
    width = half * np.sin(np.pi * along ** rng.uniform(0.75, 0.95)) ** 0.85
    width *= 1.0 + rng.uniform(0.1, 0.2) * ((along * teeth) % 1.0 - 0.4)
    y = 0.62 - 1.58 * along
    right = np.stack([width, y], axis=1)
    outline = np.concatenate([right, mirrored(right)[::-1]])
    veins = []
    for place in np.linspace(0.18, 0.72, 5):
        reach = half * np.sin(np.pi * place) * 0.8
        start = 0.62 - 1.58 * place
        vein = smooth(polygon((0, start), (reach * 0.55, start - 0.16), (reach, start - 0.34)), closed=False, steps=3)
        veins += [vein, mirrored(vein)]
    stalk = smooth(polygon((0, 0.55), (0.03, 0.8), (rng.uniform(-0.15, 0.15), 1.0)), closed=False)
    shadowed = np.concatenate([right, polygon((0, -0.96), (0, 0.62))])
    return [
        Part("shade", lines=[stalk], width=0.1, bulge=0.04),
        Part("body", [outline], bulge=0.16, patterned=True),
        Part("shade", [shadowed], strength=0.35),
        Part("light", lines=veins, width=0.045, strength=0.8),
        Part("light", lines=[polygon((0, 0.62), (0, -0.86))], width=0.07),
    ]


def _mushroom(rng: Rng) -> list[Part]:
    wide, tall = rng.uniform(0.78, 0.95), rng.uniform(0.66, 0.86)
    rim, stem = rng.uniform(0.0, 0.1), rng.uniform(0.17, 0.26)
    cap = np.concatenate(
        [
            ellipse(0, rim, wide, tall, np.pi, 2 * np.pi, 24),
            ellipse(0, rim, wide, 0.2, 0.0, np.pi, 16),
        ]
    )
    stalk = smooth(
        polygon(
            (-stem, 0.0),
            (-stem * 0.85, 0.5),
            (-stem * 1.35, 0.88),
            (0, 0.96),
            (stem * 1.35, 0.88),
            (stem * 0.85, 0.5),
            (stem, 0.0),
        )
    )
    skirt = smooth(
        polygon((-stem * 0.95, 0.26), (-stem * 1.7, 0.44), (0, 0.52), (stem * 1.7, 0.44), (stem * 0.95, 0.26))
    )
    spots = []
    for angle, far in ((-2.6, 0.72), (-2.05, 0.5), (-1.5, 0.82), (-1.15, 0.42), (-0.62, 0.74)):
        size = rng.uniform(0.09, 0.16)
        spots.append(ellipse(far * wide * np.cos(angle), rim + far * tall * np.sin(angle), size * 1.1, size))
    gills = ellipse(0, rim + 0.02, wide * 0.82, 0.16, 0.0, np.pi, 16)
    return [
        Part("light", [stalk], bulge=0.14),
        Part("white", [skirt], bulge=0.05, strength=0.9),
        Part("body", [cap], bulge=0.32),
        Part("shade", [gills], strength=0.55),
        Part("white", spots, bulge=0.04),
    ]


def _sailboat(rng: Rng) -> list[Part]:
    mast, lean = rng.uniform(-0.12, 0.05), rng.uniform(0.02, 0.1)
    deck, keel = 0.5, rng.uniform(0.82, 0.94)
    hull = smooth(polygon((-0.92, deck), (-0.62, keel), (0.55, keel), (0.92, deck - 0.06)), steps=6)
    hull = np.concatenate([polygon((-0.92, deck)), hull[(hull[:, 1] > deck - 0.07)], polygon((0.95, deck - 0.08))])
    top, foot = -0.98, 0.36
    main = np.concatenate(
        [
            polygon((mast + 0.05, foot), (mast + 0.05, top)),
            smooth(polygon((mast + 0.05, top), (0.5, -0.3 - lean), (0.8, foot)), closed=False),
        ]
    )
    jib = np.concatenate(
        [
            polygon((mast - 0.06, foot)),
            smooth(polygon((-0.8, foot), (-0.42, -0.25), (mast - 0.06, top + 0.22)), closed=False),
        ]
    )
    boom = mast + 0.05
    seams = [polygon((boom, y), (boom + 0.72 * (y - top) / (foot - top), y - 0.03)) for y in (-0.4, -0.02)]
    return [
        Part("dark", lines=[polygon((mast, 0.55), (mast, top - 0.02))], width=0.075),
        Part("white", [main], bulge=0.16),
        Part("accent", [jib], bulge=0.12, patterned=True),
        Part("shade", lines=seams, width=0.04, strength=0.6),
        Part("body", [hull], bulge=0.16),
        Part("light", lines=[polygon((-0.78, deck + 0.1), (0.8, deck + 0.04))], width=0.07, strength=0.8),
    ]


def _star(rng: Rng) -> list[Part]:
    inner = rng.uniform(0.42, 0.52)
    angle = -np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    corners = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    centre = np.zeros((1, 2))
    facets = [np.concatenate([centre, corners[i : i + 1], corners[(i + 1) % 10 : (i + 1) % 10 + 1]]) for i in range(10)]
    ridges = [np.concatenate([centre, corners[i : i + 1] * 0.97]) for i in range(0, 10, 2)]
    return [
        Part("body", [corners], bulge=0.12, patterned=True),
        Part("shade", facets[0::2], strength=0.75),
        Part("light", facets[1::2], strength=0.35),
        Part("light", lines=ridges, width=0.04, strength=0.8),
    ]


def _umbrella(rng: Rng) -> list[Part]:
    wide, tall, base = rng.uniform(0.9, 1.0), rng.uniform(0.72, 0.88), 0.02
    panels = 4
    edges = np.linspace(-wide, wide, panels + 1) * np.array([1.0, 1.04, 1.0, 1.04, 1.0])
    dome = ellipse(0, base, wide, tall, np.pi, 2 * np.pi, 24)
    scallop = [ellipse((a + b) / 2, base, (a - b) / 2, 0.12, 0.0, -np.pi, 8) for a, b in pairwise(edges[::-1])]
    canopy = np.concatenate([dome, *scallop])
    tip = -tall + base
    stripes = []
    for a, b in ((edges[0], edges[1]), (edges[2], edges[3])):
        left = ellipse(0, base, a, tall, -np.pi / 2, 0.0, 10)
        right = ellipse(0, base, b, tall, -np.pi / 2, 0.0, 10)
        arch = ellipse((a + b) / 2, base, (b - a) / 2, 0.12, np.pi, 2 * np.pi, 8)
        stripes.append(np.concatenate([left, arch, right[::-1]]))
    ribs = [ellipse(0, base, x, tall, -np.pi / 2, 0.0, 10) for x in edges[1:-1]]
    hook = 0.17 * (1 if rng.random() < 0.5 else -1)
    handle = np.concatenate([polygon((0, tip - 0.1), (0, 0.74)), ellipse(hook, 0.76, -hook, 0.19, 0.0, np.pi, 10)])
    return [
        Part("dark", lines=[handle], width=0.09, bulge=0.03),
        Part("body", [canopy], bulge=0.3, patterned=True),
        Part("accent", stripes, bulge=0.06, strength=0.9),
        Part("shade", lines=ribs, width=0.035, strength=0.8),
    ]


@dataclass(frozen=True)
class Kind:
    """A class of object: its parts, how much larger it is drawn than the rest, how far it may turn (radians)."""

    name: str
    parts: Callable[[Rng], list[Part]]
    scale: float
    turn: float


# Alphabetical, which is also the model's class order and torchvision's ImageFolder order.
# Thin things are drawn larger, so that the classes cover about the same area.
KINDS = (
    Kind("butterfly", _butterfly, 1.0, np.pi),
    Kind("cup", _cup, 0.92, 0.5),
    Kind("fish", _fish, 1.08, 0.7),
    Kind("house", _house, 0.95, 0.3),
    Kind("key", _key, 1.22, np.pi),
    Kind("leaf", _leaf, 1.12, np.pi),
    Kind("mushroom", _mushroom, 0.98, 0.5),
    Kind("sailboat", _sailboat, 1.05, 0.35),
    Kind("star", _star, 1.05, np.pi),
    Kind("umbrella", _umbrella, 1.05, 0.7),
)
CLASSES = tuple(kind.name for kind in KINDS)
