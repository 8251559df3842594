"""Any bytes -> service/images.py: an upright RGB picture within the limits, or an `ImageError` with a listed code."""

import io
import struct
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fuzz.target import FindingError, Mutate, Target
from service.errors import STATUS
from service.images import FORMATS, ImageError, ImageLimits, inspect

LIMITS = ImageLimits(max_bytes=16_384, max_pixels=262_144)
SIZE = (13, 9)  # of the seeds: odd, and no multiple of a JPEG block
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LITTLE_TIFF = b"II*\0"
_NUMBERS = (0, 1, 2, 3, 5, 7, 8, 16, 32, 255, 4096, 32773, 65535, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_TAGS = (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347, 530)


def check(case: bytes) -> None:
    try:
        encoded = inspect(case, LIMITS)
        if encoded.pixels > LIMITS.max_pixels:
            raise FindingError(f"{encoded.size} passed a limit of {LIMITS.max_pixels} pixels.")
        picture = encoded.decode()
    except ImageError as error:
        if not error.code.startswith("image_") or error.code not in STATUS:
            raise FindingError(f"The code {error.code!r} is not one of an image.") from error
        if "\n" in error.message or len(error.message) > 400:
            raise FindingError(f"The message is not one sentence: {error.message!r}.") from error
        return
    if len(case) > LIMITS.max_bytes:
        raise FindingError(f"{len(case)} bytes passed a limit of {LIMITS.max_bytes}.")
    image = picture.image
    if image.mode != "RGB" or picture.format not in FORMATS or picture.orientation not in range(1, 9):
        raise FindingError(f"The picture is {image.mode}, {picture.format}, orientation {picture.orientation}.")
    size = encoded.size
    if picture.orientation > 4 and picture.format != "tiff":  # Pillow gives a TIFF's size as turned already
        size = size[::-1]
    if image.size != size or np.asarray(image).shape != (size[1], size[0], 3):
        raise FindingError(f"The header says {encoded.size}, the picture has {image.size}.")


# --- cases that are almost right ---------------------------------------------------------------------------


def mutate(plain: Mutate) -> Mutate:
    """PNG chunks are changed and keep right lengths and checksums, TIFF tags keep their places; all else plainly."""

    def mutated(case: bytes, most: int, random: Random) -> bytes:
        if case.startswith(_LITTLE_TIFF) and random.random() < 0.5:
            return _with_another_tag(case, random)[:most]
        if not case.startswith(_SIGNATURE) or random.random() < 0.3:
            return plain(case, most, random)
        chunks = list(_chunks(case))
        if not chunks:
            return plain(case, most, random)
        i = random.randrange(len(chunks))
        name, body = chunks[i]
        match random.randrange(6):
            case 0:
                chunks.insert(random.randrange(len(chunks) + 1), (name, body))
            case 1:
                del chunks[i]
            case 2:
                j = random.randrange(len(chunks))
                chunks[i], chunks[j] = chunks[j], chunks[i]
            case 3 if name in (b"IDAT", b"fdAT", b"zTXt", b"iCCP"):
                chunks[i] = (name, _recompressed(body, most, random, plain))
            case _:
                chunks[i] = (name, plain(body or b"\0", most, random))
        return _png(chunks)[:most]

    return mutated


def _chunks(case: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, body) of each PNG chunk, up to the first that does not fit."""
    at = len(_SIGNATURE)
    while at + 12 <= len(case):
        length = int.from_bytes(case[at : at + 4])
        yield case[at + 4 : at + 8], case[at + 8 : at + 8 + length]
        at += 12 + length


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def _with_another_tag(case: bytes, random: Random) -> bytes:
    """One entry (tag, type, count, value) of the first directory made another."""
    start = int.from_bytes(case[4:8], "little")
    entries = int.from_bytes(case[start : start + 2], "little")
    at = start + 2 + 12 * random.randrange(max(1, entries))
    if at + 12 > len(case):
        return case
    tag, kind, count, value = struct.unpack_from("<HHII", case, at)
    match random.randrange(5):
        case 0:
            tag = random.choice(_TAGS)
        case 1:
            kind = random.choice((1, 2, 3, 4, 5, 11, 12, 16))
        case 2:
            count = random.choice(_NUMBERS)
        case _:
            value = random.choice(_NUMBERS)
    return case[:at] + struct.pack("<HHII", tag, kind, count, value) + case[at + 12 :]


def _recompressed(body: bytes, most: int, random: Random, plain: Mutate) -> bytes:
    """The chunk with what it compresses changed; an IDAT's stream begins its body, a text's follows two bytes NUL."""
    start = body.find(b"\x78")
    try:
        inner = zlib.decompressobj().decompress(body[max(start, 0) :], 65_536)
    except zlib.error:
        return plain(body or b"\0", most, random)
    return body[: max(start, 0)] + zlib.compress(plain(inner or b"\0", most, random))


# --- the start corpus --------------------------------------------------------------------------------------


def seeds() -> Iterator[tuple[str, bytes]]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise, "RGBA").resize(SIZE, Image.Resampling.BICUBIC)
    rgb, grey, palette = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").quantize(16)
    wide = Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 500)
    floats = Image.fromarray(np.linspace(-0.1, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE[::-1]))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    others = [rgb.rotate(90), rgb.rotate(180)]
    one_bit = grey.convert("1")

    def saved(image: Image.Image, format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    for name, image in {"rgb": rgb, "grey": grey, "palette": palette, "rgba": rgba, "la": rgba.convert("LA")}.items():
        yield f"png_{name}", saved(image, "PNG")
    yield "png_1bit", saved(one_bit, "PNG")
    yield "png_grey16", saved(wide, "PNG")
    yield "png_palette_transparent", saved(palette, "PNG", transparency=3)
    yield "png_rgb_transparent", saved(rgb, "PNG", transparency=(1, 2, 3))
    yield "png_exif", saved(rgb, "PNG", exif=exif)
    yield "png_animated", saved(rgb, "PNG", save_all=True, append_images=others)
    yield "png_profile", saved(rgb, "PNG", icc_profile=b"no profile at all")
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        for depth in (8, 16):
            yield f"png_interlaced_{colour}_{depth}", _interlaced(colour, channels, depth)
    jpegs: dict[str, dict[str, Any]] = {
        "baseline": {},
        "progressive": {"progressive": True},
        "420": {"subsampling": 2, "quality": 30},
        "exif": {"exif": exif},
        "restart": {"restart_marker_blocks": 1},
        "profile": {"icc_profile": b"no profile at all"},
        "comment": {"comment": "a comment"},
    }
    for name, options in jpegs.items():
        yield f"jpeg_{name}", saved(rgb, "JPEG", **options)
    yield "jpeg_grey", saved(grey, "JPEG")
    yield "jpeg_cmyk", saved(rgb.convert("CMYK"), "JPEG")
    yield "jpeg_cmyk_progressive", saved(rgb.convert("CMYK"), "JPEG", progressive=True)
    yield "gif", saved(palette, "GIF")
    yield "gif_interlaced", saved(palette, "GIF", interlace=True)
    yield "gif_transparent", saved(palette, "GIF", transparency=2)
    yield "gif_animated", saved(rgb, "GIF", save_all=True, append_images=others, duration=10, loop=0, disposal=2)
    yield "webp_lossy", saved(rgb, "WEBP", quality=40)
    yield "webp_lossy_alpha", saved(rgba, "WEBP", quality=40)
    yield "webp_lossless", saved(rgba, "WEBP", lossless=True)
    yield "webp_exif", saved(rgb, "WEBP", exif=exif)
    yield "webp_animated", saved(rgb, "WEBP", save_all=True, append_images=others, duration=10)
    for name, image in {"rgb": rgb, "grey": grey, "palette": palette, "1bit": one_bit, "rgba": rgba}.items():
        yield f"bmp_{name}", saved(image, "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        yield f"tiff_{compression}", saved(rgb, "TIFF", compression=compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield f"tiff_{compression}", saved(one_bit, "TIFF", compression=compression)
    yield "tiff_tiled", _tiled(1)
    yield "tiff_tiled_deflate", _tiled(8)
    yield "tiff_huge_tile", _tiled(8, side=60_000)
    # Found: for a frame that is disposed of, Pillow fills one of its size while it reads the header.
    disposal, frame = b"!\xf9\x04\x08\0\0\0\0", b"," + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0)
    yield "gif_huge_frame", b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + disposal + frame + b"\x08\x01\0\0;"
    yield "tiff_big", saved(rgb, "TIFF", big_tiff=True)
    yield "tiff_exif", saved(rgb, "TIFF", exif=exif, compression="tiff_lzw")
    yield "tiff_strips", saved(rgb, "TIFF", strip_size=64, compression="tiff_lzw")
    yield "tiff_two_pages", saved(rgb, "TIFF", save_all=True, append_images=others)
    for name, image in {
        "rgba": rgba, "palette": palette, "grey16": wide, "float": floats, "cmyk": rgb.convert("CMYK"),
        "lab": Image.merge("LAB", rgb.split()), "1bit": one_bit,
    }.items():  # fmt: skip
        yield f"tiff_mode_{name}", saved(image, "TIFF")


def _interlaced(colour: int, channels: int, depth: int) -> bytes:
    """Adam7, which Pillow reads and does not write: an image of one pixel has only its first pass."""
    width, height = 5, 3
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = bytearray()
    for left, top, right, down in passes:
        columns = len(range(left, width, right))
        for y in range(top, height, down) if columns else ():
            rows += b"\0" + bytes((y * 40 + i) % 256 for i in range(columns * channels * depth // 8))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 1)
    return _png([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b"")])


def _tiled(compression: int, side: int = 16) -> bytes:
    """A grey TIFF of one tile, raw (1) or deflated (8, by libtiff), which Pillow reads and does not write."""
    tile = bytes(range(256)) if compression == 1 else zlib.compress(bytes(range(256)))
    tags = {256: 13, 257: 9, 258: 8, 259: compression, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return _LITTLE_TIFF + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile


TARGET = Target(check, seeds, max_bytes=LIMITS.max_bytes + 16, mutate=mutate)
