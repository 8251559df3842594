"""Changes of a picture that know nothing of the network: blur, noise, JPEG, watermark. No torch."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parchgrad.attacks.attack import Attack
from parchgrad.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = NDArray[np.uint8]  # (h, w, 3)

BLUR_SHARE = 1 / 32  # of the shorter side: 7 pixels at 224
NOISE_LEVELS = 64.0
BEST_QUALITY, WORST_QUALITY = 95, 5  # Pillow's scale; above 95 files grow and nothing is seen
TEXT_SHARE = 1 / 10  # of the shorter side: the height of a watermark's letters
TEXT_ANGLE = 30.0  # degrees


def corrupted(picture: Picture, attack: Attack) -> Picture:
    """The picture `(h, w, 3)` after a change of kind `blur`, `noise`, `jpeg` or `watermark`; a new array.

    Strength 0 is the picture itself. Raises OptionError for another kind.
    """
    makers = {"blur": _blurred, "noise": _noisy, "jpeg": _compressed, "watermark": _marked}
    if attack.kind not in makers:
        raise OptionError("attack", attack.kind, ", ".join(makers))
    return picture.copy() if attack.strength == 0 else makers[attack.kind](picture, attack)


def quality_of(strength: float) -> int:
    """JPEG's quality, by Pillow's scale, of a strength above 0."""
    return round(BEST_QUALITY - (BEST_QUALITY - WORST_QUALITY) * strength)


def _blurred(picture: Picture, attack: Attack) -> Picture:
    from scipy.ndimage import gaussian_filter

    sigma = attack.strength * BLUR_SHARE * min(picture.shape[:2])
    return _rounded(gaussian_filter(picture.astype(np.float64), (sigma, sigma, 0), mode="nearest"))


def _noisy(picture: Picture, attack: Attack) -> Picture:
    noise = np.random.default_rng(attack.seed).normal(0.0, NOISE_LEVELS * attack.strength, picture.shape)
    return _rounded(picture + noise)


def _compressed(picture: Picture, attack: Attack) -> Picture:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "JPEG", quality=quality_of(attack.strength))
    with PIL.Image.open(file) as again:
        return np.asarray(again.convert("RGB")).copy()


def _marked(picture: Picture, attack: Attack) -> Picture:
    """White text with a dark edge, slanted over the whole picture: both bright and dark places show it."""
    import PIL.Image

    image = PIL.Image.fromarray(picture)
    mark = _tiled(attack.text, image.width, image.height)
    mark.putalpha(mark.getchannel("A").point(lambda value: round(value * attack.strength)))
    image.paste(mark, mask=mark)
    return np.asarray(image).copy()


def _tiled(text: str, width: int, height: int) -> Image:
    """An RGBA image of this size with the text repeated in slanted lines, opaque where it is."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    letters = max(8, round(TEXT_SHARE * min(width, height)))
    font = PIL.ImageFont.load_default(letters)
    edge = max(1, letters // 12)
    side = 2 * math.ceil(math.hypot(width, height) / 2) + 2  # however it is turned, the picture lies within
    sheet = PIL.Image.new("RGBA", (side, side), (255, 255, 255, 0))
    draw = PIL.ImageDraw.Draw(sheet)
    across = max(1, math.ceil(draw.textlength(text, font)) + 2 * letters)
    down = 3 * letters
    for line, top in enumerate(range(0, side, down)):
        for left in range(-(line % 2) * (across // 2), side, across):
            draw.text((left, top), text, (255, 255, 255, 255), font, stroke_width=edge, stroke_fill=(0, 0, 0, 255))
    turned = sheet.rotate(TEXT_ANGLE, PIL.Image.Resampling.BILINEAR)
    left, top = (side - width) // 2, (side - height) // 2
    return turned.crop((left, top, left + width, top + height))


def _rounded(values: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
