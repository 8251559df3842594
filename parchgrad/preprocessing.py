"""How an upright RGB image becomes a model's input, and where on the image that input lies."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling
    from torch import Tensor

Pixels = NDArray[np.float32]  # of one image, normalised: (3, height, width)

RULES = ("shorter_side", "stretch", "native")
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Placement:
    """Which part of the original the input shows; puts a map back in its place."""

    original_size: tuple[int, int]  # (width, height) of the upright image
    crop_box: tuple[float, float, float, float]  # left, top, right, bottom in original pixels


@dataclass(frozen=True)
class Preprocessing:
    """Size, resize rule and normalisation of a model's input.

    rule `shorter_side`: scale the shorter side to `resize`, then cut `size` from the centre (torchvision's
    evaluation transform, to the pixel); `stretch`: scale to `size`, aspect ignored; `native`: for fully
    convolutional models, keep the image's own size, scaled in aspect only where a side leaves
    `[min_side, max_side]`. `size` is (height, width); for `native` it is only the nominal size.
    Raises ModelError for values that make no sense.
    """

    size: tuple[int, int]
    rule: str = "shorter_side"
    resize: int | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    min_side: int = 32
    max_side: int = 1024

    def __post_init__(self) -> None:
        _require(self.rule in RULES, "rule", self.rule, ", ".join(RULES))
        _require(self.interpolation in INTERPOLATIONS, "interpolation", self.interpolation, ", ".join(INTERPOLATIONS))
        _require(len(self.size) == 2 and min(self.size) >= 1, "size", self.size, "(height, width), both >= 1")
        if self.rule == "shorter_side":
            enough = self.resize is not None and self.resize >= max(self.size)
            _require(enough, "resize", self.resize, f"an integer >= {max(self.size)}, the longer side of size")
        _require(1 <= self.min_side <= self.max_side, "min_side", self.min_side, f"1..max_side ({self.max_side})")
        _require(len(self.mean) == 3, "mean", self.mean, "three numbers")
        _require(len(self.std) == 3 and min(self.std) > 0, "std", self.std, "three numbers > 0")

    def apply(self, image: Image) -> tuple[Tensor, Placement]:
        """Upright RGB image -> normalised float32 `(3, h, w)` and its placement, to the bit what `array` gives."""
        import torch

        pixels, placement = self.array(image)
        return torch.from_numpy(pixels), placement

    def array(self, image: Image) -> tuple[Pixels, Placement]:
        """`apply` without torch: an array."""
        if image.mode != "RGB":
            raise ModelError(f"Preprocessing expects an RGB image, got mode {image.mode}.")
        cut, placement = self._fit(image)
        return self._normalised(cut), placement

    def normalise(self, image: Image) -> Tensor:
        """Pixels of an RGB image to `(value / 255 - mean) / std`, float32 `(3, h, w)`."""
        import torch

        return torch.from_numpy(self._normalised(image))

    def _normalised(self, image: Image) -> Pixels:
        mean, std = self._statistics()
        # Colours stay innermost in memory, as they come.
        pixels = np.array(image, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32)
        pixels /= np.float32(255)
        pixels -= mean
        pixels /= std
        return pixels

    def restore(self, pixels: Tensor | Pixels) -> NDArray[np.uint8]:
        """The inverse of `normalise`: `(3, h, w)` -> uint8 `(h, w, 3)`, for drawing."""
        mean, std = self._statistics()
        values = (pixels if isinstance(pixels, np.ndarray) else pixels.detach().cpu().float().numpy()) * std + mean
        levels: NDArray[np.uint8] = np.clip(np.rint(values * np.float32(255)), 0, 255).astype(np.uint8)
        return levels.transpose(1, 2, 0)

    def _statistics(self) -> tuple[Pixels, Pixels]:
        """mean and std, `(3, 1, 1)`."""
        mean, std = np.array([self.mean, self.std], dtype=np.float32)[..., None, None]
        return mean, std

    def _fit(self, image: Image) -> tuple[Image, Placement]:
        width, height = image.size
        whole = (0.0, 0.0, float(width), float(height))
        if self.rule == "stretch":
            return self._resized(image, self.size[1], self.size[0]), Placement(image.size, whole)
        if self.rule == "native":
            return self._resized(image, *self._native_size(width, height)), Placement(image.size, whole)
        return self._centre_of_resized(image)

    def _native_size(self, width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, self.max_side / max(width, height))
        scale = max(scale, self.min_side / min(width, height))
        # A strip too long for its width cannot keep its aspect within both bounds.
        return tuple(min(max(round(side * scale), self.min_side), self.max_side) for side in (width, height))  # type: ignore[return-value]

    def _centre_of_resized(self, image: Image) -> tuple[Image, Placement]:
        """torchvision's Resize(resize) and CenterCrop(size), and the cut's box on the original."""
        assert self.resize is not None
        width, height = image.size
        crop_h, crop_w = self.size
        new_w, new_h = _resized_size(width, height, self.resize)
        left, top = round((new_w - crop_w) / 2.0), round((new_h - crop_h) / 2.0)
        sx, sy = width / new_w, height / new_h
        box = (left * sx, top * sy, (left + crop_w) * sx, (top + crop_h) * sy)
        if max(width, height) > 16 * min(width, height):
            # 1 x 50000 pixels would become 256 x 12,800,000: compute only the cut, at most one level off.
            cut = image.resize((crop_w, crop_h), self._resampling, box=box)
        else:
            cut = self._resized(image, new_w, new_h).crop((left, top, left + crop_w, top + crop_h))
        return cut, Placement(image.size, box)

    @property
    def _resampling(self) -> Resampling:
        from PIL.Image import Resampling

        return Resampling[self.interpolation.upper()]

    def _resized(self, image: Image, width: int, height: int) -> Image:
        if image.size == (width, height):
            return image
        return image.resize((width, height), self._resampling)


def read_image(path: str | os.PathLike[str]) -> Image:
    """An upright RGB image from a trusted local file, to the pixel what the service makes of it when it is uploaded.

    Raises DataError when Pillow cannot read it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"Image '{os.fspath(path)}' cannot be read: {error}.") from error
    return decode_image(data, os.fspath(path))


def decode_image(data: bytes, name: str) -> Image:
    """An upright RGB image from the bytes of a trusted file called `name`: its first frame. Raises DataError."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data)) as file:
            tiff = file.format == "TIFF"  # Pillow turns it while loading, and forgets its orientation
            file.load()
            orientation = 1 if tiff else exif_orientation(file)
            rgb = as_rgb(file, sixteen_bit=file.format == "PNG" and data[24:25] == b"\x10")
    except MemoryError:
        raise
    except Exception as error:  # a damaged header raises nearly anything: struct.error, AttributeError, TypeError ...
        # Pillow names a stream by its address in memory.
        reason = "it is no image Pillow knows" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise DataError(f"Image '{name}' cannot be read: {reason}.") from error
    return turned_upright(rgb, orientation)


ORIENTATION_TAG = 0x0112  # EXIF 2.32
BACKGROUND = (255, 255, 255)  # what transparent pixels show: white, as most viewers and pages do
STRIP_ROWS = 256


def exif_orientation(image: Image) -> int:
    """1..8; 1 where the image carries none or an invalid one. Of a PNG known only once its pixels are loaded."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels: the image is taken as it stands
        return 1
    return value if value in range(1, 9) else 1


def turned_upright(image: Image, orientation: int) -> Image:
    """The image with its EXIF orientation undone."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def as_rgb(image: Image, *, sixteen_bit: bool = False) -> Image:
    """8-bit RGB of a loaded image; each mode gets the conversion that keeps what a viewer would show.

    `sixteen_bit`: it comes from a PNG of 16 bits a sample. Raises ValueError for a mode of no known conversion.
    """
    mode, transparent = image.mode, image.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        return _from_wide(image, transparent)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent is not None:
        if sixteen_bit and isinstance(transparent, tuple):
            # Pillow keeps the high byte of 16-bit samples but the whole of the transparent colour.
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return _on_background(image if mode == "RGBA" else image.convert("RGBA"))
    return image if mode == "RGB" else image.convert("RGB")


def _on_background(image: Image) -> Image:
    import PIL.Image

    flat = PIL.Image.new("RGB", image.size, BACKGROUND)
    flat.paste(image, mask=image)
    return flat


def _from_wide(image: Image, transparent: object) -> Image:
    """Grey of 16 bits, 32 bits or float -> RGB, in strips so that no second full-size array exists.

    The full scale is the smallest of 1 (floats only), 255, 65535 and 2**31 - 1 that holds the largest sample: such
    files do not say which it is. 16-bit files always mean 65535. Negative and not-a-number samples are black.
    """
    import PIL.Image

    width, height = image.size
    tops = range(0, height, STRIP_ROWS)

    def strip(top: int) -> np.ndarray[Any, Any]:  # (rows, width)
        return np.asarray(image.crop((0, top, width, min(top + STRIP_ROWS, height))))

    if image.mode.startswith("I;16"):
        full_scale = 65535.0
    else:
        largest = max(float(np.nanmax(strip(top), initial=0.0)) for top in tops)
        scales = [1.0] * (image.mode == "F") + [255.0, 65535.0, 2.0**31 - 1]
        fitting = [scale for scale in scales if largest <= scale]
        if not fitting:
            raise ValueError(f"samples up to {largest:g} have no known full scale")
        full_scale = fitting[0]
    grey = PIL.Image.new("L", image.size)
    for top in tops:
        samples = strip(top)
        scaled = np.nan_to_num(samples.astype(np.float64)) * (255.0 / full_scale)
        values = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        if isinstance(transparent, int):
            values[samples == transparent] = BACKGROUND[0]
        grey.paste(PIL.Image.fromarray(values), (0, top))
    return grey.convert("RGB")


def _resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """torchvision's rule: the shorter side exactly, the longer one rounded down."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _require(holds: bool, what: str, found: object, expected: str) -> None:
    if not holds:
        raise ModelError(f"Preprocessing: {what} is {found!r}; expected {expected}.")
