"""The photographs that excite channels most, and where in them: one pass over a source, bounded memory."""

from __future__ import annotations

import base64
import io
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import label
from torch import Tensor, nn

from parchgrad.errors import DataError, UnsupportedModelError
from parchgrad.explainer import checked_device
from parchgrad.features import GapNetwork
from parchgrad.layers import convolutions
from parchgrad.models import Model
from parchgrad.preprocessing import Placement, Preprocessing, decode_image
from parchgrad.runtimes.view import gap_features, private_view
from parchgrad.sources import Source

# A crop is never narrower than this share of the network's input, or nobody could tell what it shows.
SMALLEST_CROP = 1 / 5

# Pixels of the pictures in the page, about one and a half times the size they are shown at.
PHOTO_PIXELS = (240, 180)
CROP_PIXELS = (180, 180)
FRAME = (255, 196, 0)

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, order=True)
class Excitement:
    """How much one photograph excites one channel; sorts the strongest first, then in reading order."""

    order: tuple[float, int]  # (-feature, index)
    box: Box = field(compare=False)  # left, top, right, bottom, in shares of the network's input

    @property
    def feature(self) -> float:
        """The channel's GAP feature."""
        return -self.order[0]

    @property
    def index(self) -> int:
        """The photograph, in the source's reading order."""
        return self.order[1]


@dataclass(frozen=True)
class Excited:
    """For each channel `(layer, channel)` the photographs that excite it most, and what was not readable."""

    by_channel: dict[tuple[str, int], list[Excitement]]
    images: int  # photographs read
    unreadable: list[DataError]


@dataclass(frozen=True)
class Picture:
    """A photograph with the crop's frame drawn on it, and the crop, as `data:` addresses of JPEG files."""

    photo: str
    crop: str


def most_exciting(
    model: Model,
    source: Source,
    channels: Mapping[str, Sequence[int]],
    count: int,
    *,
    point: str = "convolution",
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Excited:
    """The `count` photographs of `source` with the largest GAP feature of each of `channels`, by layer.

    One pass; memory does not grow with the number of images. `point` is the table's `statistics_point`. A
    photograph that does not excite a channel at all (feature 0) is not among them. What cannot be read is left
    out and reported. Raises UnsupportedModelError for a layer that runs twice in a forward pass or not at all.
    """
    wanted_channels = {name: sorted(set(wanted)) for name, wanted in channels.items()}
    network = _Responses(model.module, wanted_channels, point, checked_device(device))
    best: dict[tuple[str, int], list[Excitement]] = {(n, c): [] for n, wanted in channels.items() for c in wanted}
    unreadable: list[DataError] = []
    read = 0
    for indices, images in _batches(source, model.preprocessing, batch_size, unreadable):
        read += len(indices)
        for layer, features, maps in network.of(images):
            for column, channel in enumerate(network.channels[layer]):
                found = best[layer, channel]
                for row in np.flatnonzero(features[:, column] > (found[-1].feature if len(found) == count else 0)):
                    box = WHOLE if maps is None else exciting_box(maps[row, column].float().cpu().numpy())
                    insort(found, Excitement((-float(features[row, column]), indices[row]), box))
                    del found[count:]
        if progress is not None:
            progress(read + len(unreadable), len(source))
    return Excited(best, read, unreadable)


def exciting_box(activation: NDArray[np.floating]) -> Box:
    """The part of the network's input where a channel is active, in shares of its width and height.

    The map `(h, w)` is enlarged smoothly; of the places above half of its maximum those connected to the maximum
    are enclosed, and the box is widened to `SMALLEST_CROP` of either side where it is narrower. For a map that is
    no picture or a single position it is the whole input.
    """
    if activation.ndim != 2 or activation.size <= 1:
        return WHOLE
    height, width = (max(side, 64) for side in activation.shape)
    smooth = F.interpolate(
        torch.from_numpy(np.maximum(activation, 0).astype(np.float32))[None, None], (height, width), mode="bilinear"
    )[0, 0].numpy()
    regions, _ = label(smooth >= smooth.max() / 2)
    rows, columns = np.nonzero(regions == regions.flat[smooth.argmax()])
    top, bottom = _at_least(rows.min() / height, (rows.max() + 1) / height)
    left, right = _at_least(columns.min() / width, (columns.max() + 1) / width)
    return left, top, right, bottom


def picture(source: Source, preprocessing: Preprocessing, excitement: Excitement) -> Picture:
    """Read the photograph again and draw it: outside the network's input darkened, the crop framed.

    Raises DataError where the file has become unreadable since.
    """
    (data,) = source.read([excitement.index])
    if isinstance(data, DataError):
        raise data
    photo = decode_image(data, source.name(excitement.index))
    _, placement = preprocessing.apply(photo)
    crop_box = _on_photo(excitement.box, placement)
    crop = photo.resize(_fitted(crop_box, CROP_PIXELS), Image.Resampling.BICUBIC, box=crop_box)
    return Picture(_jpeg(_framed(photo, placement, crop_box)), _jpeg(crop))


class _Responses:
    """A model that answers with the GAP features of some channels, and with their maps where there are some."""

    def __init__(
        self, module: nn.Module, channels: dict[str, list[int]], point: str, device: torch.device | None
    ) -> None:
        self.channels = channels
        self._device = device
        self._found: dict[str, Tensor] = {}
        # After the activation there are features only: which operation makes them is known to GapNetwork alone.
        self._activations = None
        if point == "activation":
            self._activations = GapNetwork(module, tuple(channels), device, point)
            self._widths = [convolutions(module)[name] for name in channels]
        else:
            self._module = private_view(module, device)
            for name, wanted in channels.items():
                self._module.get_submodule(name).register_forward_hook(self._hook(name, wanted))

    def of(self, images: Tensor) -> Iterator[tuple[str, NDArray[np.float64], Tensor | None]]:
        """Layer, features `(B, wanted channels)`, maps `(B, wanted channels, h, w)` for normalised `images`."""
        if not self.channels:
            return
        if self._activations is not None:
            by_layer = torch.split(self._activations.features(images), self._widths, dim=1)
            for (name, wanted), features in zip(self.channels.items(), by_layer, strict=True):
                yield name, features[:, wanted].double().numpy(), None
            return
        self._found.clear()
        with torch.inference_mode():
            self._module(images.to(self._device))
        for name in self.channels:
            if name not in self._found:
                raise UnsupportedModelError(f"Layer '{name}' took no part in the model's forward pass.")
            maps = self._found[name]
            yield name, gap_features(maps).double().cpu().numpy(), maps
        self._found.clear()

    def _hook(self, name: str, wanted: list[int]) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            if name in self._found:
                raise UnsupportedModelError(
                    f"Layer '{name}' runs twice in one forward pass; its GAP feature would be ambiguous."
                )
            # Indexing copies: an activation in place may follow.
            self._found[name] = output[:, wanted]

        return hook


def _batches(
    source: Source, preprocessing: Preprocessing, batch_size: int, unreadable: list[DataError]
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and images `(B, 3, h, w)`, of one size each; what cannot be read is added to `unreadable`."""

    def prepared(name: str, data: bytes | DataError) -> Tensor | DataError:
        if isinstance(data, DataError):
            return data
        try:
            return preprocessing.apply(decode_image(data, name))[0]
        except DataError as error:
            return error

    # Pillow decodes and scales outside the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(source), batch_size):
            indices = range(start, min(start + batch_size, len(source)))
            ready = pool.map(prepared, [source.name(index) for index in indices], source.read(indices))
            by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
            for index, found in zip(indices, ready, strict=True):
                if isinstance(found, DataError):
                    unreadable.append(found)
                else:
                    by_size.setdefault(found.shape, []).append((index, found))
            for group in by_size.values():
                yield [index for index, _ in group], torch.stack([image for _, image in group])


def _at_least(low: float, high: float) -> tuple[float, float]:
    """The interval widened to `SMALLEST_CROP` around its middle, pushed back into [0, 1]."""
    side = max(high - low, SMALLEST_CROP)
    start = min(max((low + high - side) / 2, 0.0), 1.0 - side)
    return float(start), float(start + side)


def _on_photo(box: Box, placement: Placement) -> Box:
    """A box in shares of the network's input -> pixels of the photograph."""
    left, top, right, bottom = placement.crop_box
    width, height = right - left, bottom - top
    found = left + box[0] * width, top + box[1] * height, left + box[2] * width, top + box[3] * height
    # Rounding may lead a hair outside, which Pillow refuses.
    limits = placement.original_size * 2
    return tuple(min(max(value, 0.0), float(limit)) for value, limit in zip(found, limits, strict=True))  # type: ignore[return-value]


def _framed(photo: Image.Image, placement: Placement, crop_box: Box) -> Image.Image:
    """The whole photograph, small, darkened where the network did not see it, with a frame around the crop."""
    whole = (0.0, 0.0, float(photo.width), float(photo.height))
    small = photo.resize(_fitted(whole, PHOTO_PIXELS), Image.Resampling.BICUBIC)
    across, down = small.width / photo.width, small.height / photo.height

    def scaled(box: Box) -> tuple[int, int, int, int]:
        left, top, right, bottom = box
        return round(left * across), round(top * down), round(right * across) - 1, round(bottom * down) - 1

    seen = Image.new("L", small.size, 110)
    ImageDraw.Draw(seen).rectangle(scaled(placement.crop_box), fill=255)
    small = Image.composite(small, Image.new("RGB", small.size), seen)
    left, top, right, bottom = scaled(crop_box)
    draw = ImageDraw.Draw(small)
    # Dark lines on both sides keep the frame visible on a bright photograph.
    for inset, colour in ((0, (0, 0, 0)), (1, FRAME), (2, FRAME), (3, (0, 0, 0))):
        if right - left > 2 * inset and bottom - top > 2 * inset:
            draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=colour)
    return small


def _fitted(box: Box, limits: tuple[int, int]) -> tuple[int, int]:
    """Width and height of `box` scaled to fit into `limits`, its aspect kept as far as whole pixels allow."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(limits[0] / width, limits[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
