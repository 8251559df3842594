"""Bytes -> a safe, upright RGB image, or an `ImageError` with a code. Knows no HTTP, no model and no settings.

The header is read first and the limits are applied to it; pixels are decoded only afterwards. Pillow's process-wide
switches (`Image.MAX_IMAGE_PIXELS`, `ImageFile.LOAD_TRUNCATED_IMAGES`) are neither relied on nor touched: the plug-in
classes are called directly, because `Image.open` would apply the first of them before our own limit is looked at.
"""

import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from parchgrad.preprocessing import as_rgb, exif_orientation, turned_upright

PILLOW_WARNS_ABOVE = 89_478_485  # pixels; a higher limit of ours would meet Pillow's own
MAX_JPEG_SCANS = 100  # a progressive JPEG needs about ten; each scan costs a pass over the whole image

# Pillow warns of every damaged tag and large size, and Python would remember every text a hostile file makes it say.
warnings.filterwarnings("ignore", module=r"PIL\.")


class _StillGif(GifImageFile):
    """Only the first frame is shown, so none is disposed of: Pillow would fill one while it reads the header."""

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, asked: int) -> None:
        pass


_OPENERS: dict[str, Callable[[BytesIO], ImageFile.ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "gif": _StillGif,
    "webp": WebPImageFile,
    "bmp": BmpImageFile,
    "tiff": TiffImageFile,
}
FORMATS = tuple(_OPENERS)


class ImageError(Exception):
    """An image we do not decode. `code` is one of the codes `image_*` in errors.STATUS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class ImageLimits:
    """`max_bytes` of the encoded file, `max_pixels` of width times height."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class Picture:
    """An upright RGB image of 8 bits a channel, and what the file was."""

    image: Image.Image
    orientation: int  # EXIF orientation the file carried, 1..8; 1 where it had none or an invalid one
    format: str


class PixelBudget:
    """Lets threads decode at the same time only while their images together stay within `pixels`.

    So any number of small images decode side by side, and the largest allowed ones one after another.
    """

    def __init__(self, pixels: int) -> None:
        self._free = self._total = pixels
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class EncodedImage:
    """A file whose header passed the limits; `decode()` may be called once."""

    def __init__(self, opened: ImageFile.ImageFile, format: str, sixteen_bit: bool) -> None:
        self.size = opened.size
        self.format = format
        self._opened: ImageFile.ImageFile | None = opened
        self._sixteen_bit = sixteen_bit

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    def decode(self) -> Picture:
        """First frame only, upright, RGB. Raises `ImageError`."""
        opened, self._opened = self._opened, None
        if opened is None:
            raise ValueError("An EncodedImage is decoded once.")
        with _codec_errors(self.format):
            if tiff := self.format == "tiff":
                orientation = exif_orientation(opened)  # loading turns a TIFF upright and forgets its orientation
            opened.load()
            if not tiff:
                orientation = exif_orientation(opened)  # only now: a PNG's eXIf chunk may follow the pixels
            image = _rgb(opened, self._sixteen_bit)
            del opened  # its pixels are not needed beside the two copies that turning takes
            return Picture(image if tiff else turned_upright(image, orientation), orientation, self.format)


def inspect(data: bytes, limits: ImageLimits) -> EncodedImage:
    """Read the header of `data` and hold it against `limits`. Raises `ImageError`; decodes no pixel."""
    if not data:
        raise ImageError("image_empty", "The image has no bytes.")
    if len(data) > limits.max_bytes:
        raise ImageError(
            "image_too_many_bytes", f"The image has more than {limits.max_bytes} bytes, the most that are accepted."
        )
    format = _sniff(data)
    if format is None:
        raise ImageError(
            "image_unsupported", f"The bytes are not an image of a known format; expected one of {', '.join(FORMATS)}."
        )
    if format == "jpeg" and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise ImageError("image_too_complex", f"The JPEG has {scans} scans; at most {MAX_JPEG_SCANS} are accepted.")
    if format == "webp":
        # Its animation decoder keeps two canvases: three quarters of the pixels cost what other formats' whole does.
        limits = replace(limits, max_pixels=limits.max_pixels * 3 // 4)
        if canvas := _webp_canvas(data):
            _check_pixels(canvas, limits)  # Pillow's WebP class allocates the canvas when it is made
    with _codec_errors(format):
        opened = _OPENERS[format](BytesIO(data))
        _check_pixels(opened.size, limits)
        if isinstance(opened, TiffImageFile):
            _check_pixels((opened.tag_v2.get(322, 1), opened.tag_v2.get(323, 1)), limits)  # libtiff allocates a tile
    return EncodedImage(opened, format, sixteen_bit=format == "png" and data[24:25] == b"\x10")


def decode(data: bytes, limits: ImageLimits) -> Picture:
    """`inspect` and `decode` in one, for callers that need no budget."""
    return inspect(data, limits).decode()


def _sniff(data: bytes) -> str | None:
    """The format by its first bytes; the file's name and declared type are not asked."""
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM"):
        return "bmp"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    return None


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) by RFC 9649, or None where the header is cut short."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = struct.unpack("<I", body[1:5])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", body[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(
            "image_too_many_pixels",
            f"The image has {width}x{height} = {width * height} pixels; at most {limits.max_pixels} are accepted.",
        )


@contextmanager
def _codec_errors(format: str) -> Iterator[None]:
    """Turn whatever a codec raises on hostile bytes into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # a GIF whose first frame passes its screen, before we see its size
        raise ImageError("image_too_many_pixels", f"The {format} has more pixels than are accepted.") from error
    # Pillow's plug-ins raise OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError, ...
    # on damaged files, and promise no list; every one of them here means the same: the file is at fault.
    except Exception as error:
        if "MAX_TEXT" in str(error):
            raise ImageError("image_too_complex", f"The {format} carries too much compressed text.") from error
        # Pillow turns what its readers of headers raise into a SyntaxError.
        cut = any(isinstance(one, EOFError | struct.error) for one in (error, error.__cause__)) or any(
            word in str(error).lower() for word in ("truncated", "unexpected end", "not enough", "broken data stream")
        )
        code = "image_truncated" if cut else "image_corrupt"
        raise ImageError(code, f"The {format} {'ends too early' if cut else 'is damaged'}.") from error


def _rgb(opened: Image.Image, sixteen_bit: bool) -> Image.Image:
    """The library's conversion, so that what is explained here can be made again there."""
    try:
        return as_rgb(opened, sixteen_bit=sixteen_bit)
    except ValueError as error:
        raise ImageError("image_unsupported", f"Colour mode {opened.mode} is not supported: {error}.") from error
