"""What may be done to a picture, and how strongly: kinds, their units and bounds. No pixels, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parchgrad.errors import OptionError

MOST_LEVELS = 64  # of 255: a quarter of the range; beyond it there is little of the picture left
MOST_STEPS = 40
MOST_TEXT = 40  # characters of a watermark
STEPS = 10
TEXT = "SAMPLE"


@dataclass(frozen=True)
class Kind:
    """`levels`: strength is a whole number of pixel levels, 0..64 of 255; else a number in 0..1. 0 changes nothing."""

    name: str
    levels: bool
    meaning: str  # of the strength
    usual: tuple[float, ...]  # strengths to compare


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fgsm", True, "the most a colour value may change, in levels of 255", (1, 2, 4, 8)),
        Kind("pgd", True, "the most a colour value may change, in levels of 255", (1, 2, 4, 8)),
        Kind("blur", False, "of 1: a Gaussian of standard deviation 1/32 of the shorter side", (0.25, 0.5, 0.75, 1.0)),
        Kind("noise", False, "of 1: Gaussian noise of standard deviation 64 levels of 255", (0.25, 0.5, 0.75, 1.0)),
        Kind("jpeg", False, "the quality is 95 - 90 x strength: 5 at 1", (0.25, 0.5, 0.75, 1.0)),
        Kind("watermark", False, "how opaque the text over the picture is", (0.25, 0.5, 0.75, 1.0)),
    )
}
GRADIENT_KINDS = tuple(name for name, kind in KINDS.items() if kind.levels)


@dataclass(frozen=True)
class Attack:
    """One change of a picture.

    kind: `fgsm` (Goodfellow, Shlens, Szegedy 2015) and `pgd` (Madry et al. 2018) follow the network's own gradient
    within `strength` levels of every colour value (L-infinity); `blur`, `noise`, `jpeg` and `watermark` know nothing
    of the network. `goal`: the class to be predicted; None: any other. `steps` are PGD's; `seed` draws its start and
    the noise; `text` is the watermark's. Raises OptionError.
    """

    kind: str
    strength: float
    goal: int | None = None
    steps: int = STEPS
    seed: int = 0
    text: str = TEXT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError("attack", self.kind, ", ".join(KINDS))
        if self.by_gradient:
            if self.strength != self.strength or not (0 <= self.strength <= MOST_LEVELS and self.strength % 1 == 0):
                raise OptionError("strength", self.strength, f"a whole number of levels in 0..{MOST_LEVELS}")
        elif not (math.isfinite(self.strength) and 0 <= self.strength <= 1):
            raise OptionError("strength", self.strength, "a number in [0, 1]")
        if self.goal is not None and not self.by_gradient:
            raise OptionError("goal", self.goal, f"none: only {' and '.join(GRADIENT_KINDS)} seek a class")
        if not 1 <= self.steps <= MOST_STEPS:
            raise OptionError("steps", self.steps, f"an integer in 1..{MOST_STEPS}")
        if not 0 <= self.seed < 2**63:
            raise OptionError("seed", self.seed, f"an integer in 0..{2**63 - 1}")
        if not (1 <= len(self.text) <= MOST_TEXT and self.text.isprintable() and self.text.strip()):
            raise OptionError("text", self.text, f"1..{MOST_TEXT} printable characters")

    @property
    def by_gradient(self) -> bool:
        return self.kind in GRADIENT_KINDS
