"""service/images.py: what each kind of file becomes, what is refused, and at what cost in memory."""

import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.errors import STATUS
from service.images import FORMATS, MAX_JPEG_SCANS, ImageError, ImageLimits, PixelBudget, decode, inspect
from tests.service.conftest import picture, png
from tests.service.serving import PROJECT_ROOT

LIMITS = ImageLimits(max_bytes=20_000_000, max_pixels=50_000_000)

# File of ../shared/data/bad_images -> the code it is refused with; every other file there is decoded.
REFUSED = {
    "bomb_16000x16000.gif": "image_too_many_pixels",
    "bomb_16383x16383.webp": "image_too_many_pixels",
    "bomb_1bit_30000x30000.png": "image_too_many_pixels",
    "bomb_header_only_2e9x1.png": "image_too_many_pixels",
    "bomb_header_only_65535x65535.png": "image_too_many_pixels",
    "bomb_rgb_20000x20000.png": "image_too_many_pixels",
    "bomb_underlimit_rgb_13300x13300.png": "image_too_many_pixels",
    "bomb_underlimit_rgb_9400x9400.png": "image_too_many_pixels",
    "bomb_ztxt_200MB.png": "image_too_complex",
    "empty.png": "image_empty",
    "html_as.jpg": "image_unsupported",
    "png_bad_crc.png": "image_corrupt",
    "random.jpg": "image_unsupported",
    "svg.svg": "image_unsupported",
    "trunc_0.jpg": "image_empty",
    "trunc_109525.jpg": "image_truncated",
    "trunc_2.jpg": "image_corrupt",
    "trunc_20.jpg": "image_corrupt",
    "trunc_27381.jpg": "image_truncated",
    "trunc_54763.jpg": "image_truncated",
}
# PngSuite's deliberately broken files: wrong signature, colour type, bit depth, header checksum; no image data.
# Pillow does not check the IDAT checksum (xcsn0g01), and its pixels are right.
REFUSED_SUITE = {
    "xc1n0g08.png": "image_corrupt",
    "xc9n2c08.png": "image_corrupt",
    "xcrn0g04.png": "image_unsupported",
    "xd0n2c08.png": "image_corrupt",
    "xd3n2c08.png": "image_corrupt",
    "xd9n2c08.png": "image_corrupt",
    "xdtn0g01.png": "image_corrupt",
    "xhdn0g08.png": "image_corrupt",
    "xlfn0g04.png": "image_unsupported",
    "xs1n0g01.png": "image_unsupported",
    "xs2n0g01.png": "image_unsupported",
    "xs4n0g01.png": "image_unsupported",
    "xs7n0g01.png": "image_unsupported",
}


def pixels(data: bytes) -> np.ndarray:
    """(h, w, 3) int, for differences."""
    return np.asarray(decode(data, LIMITS).image).astype(int)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    assert caught.value.code in STATUS
    return caught.value


@pytest.mark.parametrize(("folder", "refused"), [("", REFUSED), ("pngsuite", REFUSED_SUITE)], ids=["bad", "pngsuite"])
def test_every_bad_file_is_decoded_or_refused_with_its_code(
    bad_images: Path, folder: str, refused: dict[str, str]
) -> None:
    found = {}
    for path in sorted((bad_images / folder).glob("*.*")):
        try:
            result = decode(path.read_bytes(), LIMITS)
            assert result.image.mode == "RGB"
            assert result.orientation in range(1, 9)
        except ImageError as error:
            found[path.name] = error.code
    assert found == refused


MEASURE = """
import sys
from service.images import ImageError, ImageLimits, decode
def peak():  # not ru_maxrss: a child inherits its parent's
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
data = open(sys.argv[1], 'rb').read()
before = peak()
try: decode(data, ImageLimits(20_000_000, 50_000_000))
except ImageError: pass
print((peak() - before) // 1024)
"""


def decoding_megabytes(file: Path) -> int:
    """Peak resident memory of decoding `file` in a process of its own, above that process's idle state."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    run = subprocess.run([sys.executable, "-c", MEASURE, str(file)], cwd=PROJECT_ROOT, capture_output=True, check=True)
    return int(run.stdout)


@pytest.mark.parametrize(
    "name", [*sorted(REFUSED), "Landscape_3.jpg", "anim_3000frames.gif", "anim6.webp", "float32.tif"]
)
def test_memory_of_one_file_stays_small(bad_images: Path, name: str) -> None:
    assert decoding_megabytes(bad_images / name) < 60  # far below the 600 promised: refused before decoding


@pytest.mark.parametrize(
    ("format", "mode", "side", "options"),
    [
        ("PNG", "RGBA", 7000, {}),
        ("PNG", "LA", 7000, {}),
        ("PNG", "I;16", 7000, {}),
        ("JPEG", "CMYK", 7000, {}),
        ("JPEG", "RGB", 7000, {"progressive": True, "subsampling": 0}),
        ("TIFF", "RGBA", 7000, {"compression": "tiff_lzw"}),
        ("WEBP", "RGBA", 6100, {"method": 0}),
    ],
)
def test_largest_allowed_image_stays_under_600_mb(
    tmp_path: Path, format: str, mode: str, side: int, options: dict[str, object]
) -> None:
    """Close to the limit, turned by EXIF: the dearest legal paths."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new(mode, (side, side), 77 if mode == "I;16" else None).save(tmp_path / "large", format, exif=exif, **options)
    assert 100 < decoding_megabytes(tmp_path / "large") < 600


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"], ids=ascii)
def test_a_header_cut_short_is_said_in_our_words(data: bytes) -> None:
    error = refusal(data)
    format = {b"\x89P": "png", b"GI": "gif", b"BM": "bmp", b"II": "tiff"}[data[:2]]
    assert (error.code, error.message) == ("image_truncated", f"The {format} ends too early.")


def test_no_codec_speaks_for_us() -> None:
    """A codec's own words are of no use to a caller, and tell of our insides."""
    good = png(picture())
    assert refusal(good[:300]).message == "The png ends too early."
    assert refusal(good[:29] + bytes(4) + good[33:]).message == "The png is damaged."
    assert refusal(b"\xff\xd8\xff").message == "The jpeg is damaged."


def test_limits_are_applied_to_the_header() -> None:
    data = png(picture(size=(100, 50)))
    decode(data, ImageLimits(len(data), 5000))
    assert refusal(data, ImageLimits(len(data) - 1, 5000)).code == "image_too_many_bytes"
    too_many = refusal(data, ImageLimits(len(data), 4999))
    assert too_many.code == "image_too_many_pixels"
    assert too_many.message == "The image has 100x50 = 5000 pixels; at most 4999 are accepted."


@pytest.mark.parametrize(
    "options",
    [{"lossless": True}, {"quality": 50}, {"lossless": True, "exif": b"Exif\0\0"}],
    ids=["VP8L", "VP8", "VP8X"],
)
def test_webp_size_is_read_before_pillow_allocates(options: dict[str, object]) -> None:
    data = saved(picture(size=(100, 50)), "WEBP", **options)
    assert inspect(data, ImageLimits(10**6, 6667)).size == (100, 50)  # three quarters of it are 5000
    assert refusal(data, ImageLimits(10**6, 6666)).code == "image_too_many_pixels"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats_keep_their_pixels(format: str) -> None:
    image = picture().quantize(64).convert("RGB")
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(saved(image, format, **options), LIMITS)
    assert decoded.format == format.lower()
    assert decoded.format in FORMATS
    assert np.array_equal(np.asarray(decoded.image), np.asarray(image))


def test_orientation_is_undone() -> None:
    image = picture()
    inverse = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    for orientation, turn in inverse.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = image if turn is None else image.transpose(turn)
        for format in ("PNG", "TIFF"):
            decoded = decode(saved(stored, format, exif=exif), LIMITS)
            assert decoded.orientation == orientation
            assert np.array_equal(np.asarray(decoded.image), np.asarray(image)), (orientation, format)


@pytest.mark.parametrize("value", [0, 9, 99, 65535])
def test_an_invalid_orientation_is_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert decode(saved(picture(), "JPEG", exif=exif), LIMITS).orientation == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
def test_damaged_exif_is_ignored() -> None:
    data = saved(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode(data, LIMITS).orientation == 1


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    expected = np.rint(ramp / 257.0)
    for data in (saved(Image.fromarray(ramp), "PNG"), saved(Image.fromarray(ramp), "TIFF")):
        assert np.abs(pixels(data)[..., 0] - expected).max() == 0


def test_sixteen_bit_dark_picture_stays_dark() -> None:
    assert pixels(saved(Image.fromarray(np.full((8, 8), 200, np.uint16)), "PNG")).max() == 1


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 32896.0, 65535.0]], np.float32), [0, 128, 255]),
        (np.array([[-5.0, np.nan, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[-7, 32896, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
    ],
    ids=["float to 1", "float to 255", "float to 65535", "negative and NaN", "int to 255", "int to 65535", "int 32"],
)
def test_wide_samples_take_the_smallest_scale_that_holds_them(samples: np.ndarray, expected: list[int]) -> None:
    assert pixels(saved(Image.fromarray(samples), "TIFF"))[0, :, 0].tolist() == expected


def test_the_wide_files_agree_with_the_grey_one(bad_images: Path) -> None:
    grey = pixels((bad_images / "grey16.png").read_bytes())
    for name in ("int32.tif", "float32.tif"):
        assert np.abs(pixels((bad_images / name).read_bytes()) - grey).max() == 0
    colour = decode((bad_images / "rgb.bmp").read_bytes(), LIMITS).image
    assert np.abs(grey[..., 0] - np.asarray(colour.convert("L"))).max() <= 2


def test_a_wide_sample_without_known_scale_is_refused() -> None:
    data = saved(Image.fromarray(np.array([[0, 1e30]], np.float32)), "TIFF")
    assert refusal(data).code == "image_unsupported"


def test_alpha_shows_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (200, 100, 0, alpha))
    for data in (saved(image, "PNG"), saved(image, "WEBP", lossless=True, exact=True), saved(image, "TIFF")):
        assert np.abs(pixels(data)[0] - [[200, 100, 0], [227, 177, 127], [255, 255, 255]]).max() <= 1
    grey = Image.merge("LA", [Image.new("L", (2, 1), 40), Image.frombytes("L", (2, 1), b"\xff\0")])
    assert pixels(saved(grey, "PNG"))[0].tolist() == [[40] * 3, [255] * 3]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [False, True], ids=["grey", "rgb"])
def test_a_transparent_colour_shows_white(depth: int, colour: bool) -> None:
    """PNG tRNS: one colour is fully transparent; at 16 bits Pillow leaves the key at 16 bits too."""
    high = 2 ** (depth - 8)
    key, other = 100 * high + high // 3, 40 * high
    channels = 3 if colour else 1
    row = b"".join(struct.pack(">H" if depth == 16 else ">B", v) * channels for v in (key, other))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, 2 if colour else 0, 0, 0, 0))
    data += (
        chunk(b"tRNS", struct.pack(">H", key) * channels)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )
    assert pixels(data)[0].tolist() == [[255] * 3, [40] * 3]


def test_animations_show_their_first_frame() -> None:
    first, second = picture(1).quantize(32).convert("RGB"), picture(2).quantize(32).convert("RGB")
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(first, format, save_all=True, append_images=[second] * 5, **options)
        assert np.array_equal(np.asarray(decode(data, LIMITS).image), np.asarray(first)), format


def test_a_jpeg_with_endless_scans_is_refused() -> None:
    data = saved(picture(), "JPEG", progressive=True)
    assert refusal(data + b"\xff\xda" * MAX_JPEG_SCANS).code == "image_too_complex"


def test_a_tiff_with_one_huge_tile_is_refused() -> None:
    """libtiff would allocate the tile, whatever the image's own size."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert refusal(data).code == "image_too_many_pixels"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
def test_every_cut_of_a_file_is_decoded_or_refused() -> None:
    seen: set[str] = set()
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        data = saved(picture(size=(24, 16)), format)
        for end in range(0, len(data), max(1, len(data) // 60)):
            try:
                decode(data[:end], LIMITS)
            except ImageError as error:
                seen.add(error.code)
    assert seen <= STATUS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
def test_flipped_bytes_are_decoded_or_refused() -> None:
    seen: set[str] = set()
    random = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        data = np.frombuffer(saved(picture(size=(24, 16)), format), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
            try:
                decode(damaged.tobytes(), ImageLimits(10**6, 10**6))
            except ImageError as error:
                seen.add(error.code)
    assert seen <= STATUS.keys()


@pytest.mark.parametrize(("side", "megabytes"), [(9000, 10), (65_535, 10)])
def test_a_gif_frame_larger_than_its_screen_is_refused_unread(tmp_path: Path, side: int, megabytes: int) -> None:
    """Found by fuzzing: with a disposal method, Pillow fills the frame, here 81 MB, while it reads the header."""
    disposal = b"!\xf9\x04\x08\0\0\0\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x08\x01\0\0;"
    data = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + b"\1\2\3\4\5\6" + disposal + frame
    assert refusal(data).code == "image_too_many_pixels"
    (tmp_path / "large.gif").write_bytes(data)
    assert decoding_megabytes(tmp_path / "large.gif") < megabytes


DAMAGED_TAGS = """
import struct
import PIL.TiffImagePlugin
from service.images import ImageError, ImageLimits, decode
entries = b"".join(struct.pack("<HHII", 1000 + tag, 2, 9999, 9999) for tag in range(100))
try: decode(b"II*\\0" + struct.pack("<IH", 8, 100) + entries + bytes(4), ImageLimits(10**6, 10**6))
except ImageError: pass
print(len(getattr(PIL.TiffImagePlugin, "__warningregistry__", {}).keys() - {"version"}))
"""


def test_pillow_s_warnings_are_not_kept() -> None:
    """Found by fuzzing: Python remembers each text warned of, and a file's bytes choose the texts."""
    run = subprocess.run([sys.executable, "-c", DAMAGED_TAGS], cwd=PROJECT_ROOT, capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"0\n", b"")


def test_pillow_s_switches_are_not_asked() -> None:
    """A lower MAX_IMAGE_PIXELS of somebody else's neither warns nor refuses."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 10
    try:
        for format in ("PNG", "JPEG", "GIF", "BMP"):
            assert decode(saved(picture(), format), LIMITS).image.size == (96, 80)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_the_budget_bounds_what_is_decoded_at_once() -> None:
    budget, most, now, lock = PixelBudget(10), 0, 0, threading.Lock()

    def work(pixels: int) -> None:
        nonlocal most, now
        for _ in range(50):
            with budget.hold(pixels):
                with lock:
                    now += min(pixels, 10)
                    most = max(most, now)
                with lock:
                    now -= min(pixels, 10)

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 4, 6, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most <= 10


def test_the_budget_is_given_back_after_an_exception() -> None:
    budget = PixelBudget(10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), budget.hold(8):
            raise ZeroDivisionError
    with budget.hold(10):
        pass
