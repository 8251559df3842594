"""Methods side by side: every method's maps of the same pictures, each measured where its target is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parchgrad.errors import DataError, OptionError
from parchgrad.evaluation import mosaics
from parchgrad.evaluation.maps import gini, mass_share, pointing_hit
from parchgrad.evidence import digest_of
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing, decode_image
from parchgrad.sources import Encoded, Source
from parchgrad.tables import SelectionTable, network_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Images looked at together when mosaics are drawn: bounds memory, not results.
READ_TOGETHER = 64

Maps = Callable[[Tensor, list[int]], Tensor]  # images (B, 3, h, w), targets -> saliency maps (B, h, w)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """A normalised image `(3, h, w)`, the class to explain, and where it is, bool `(h, w)`."""

    image: Tensor
    target: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """One method over all pictures: means and their standard errors."""

    method: str
    mass: float
    mass_error: float
    hits: float
    hits_error: float
    gini: float
    pictures: int


def standard_methods(
    explainer: Explainer, *, cam_layer: str | None = None, seed: int = 0, **options: Any
) -> dict[str, Maps]:
    """The comparison every figure of ours stands in: plain methods, Grad-CAM, ParchGrad and its control.

    Grad-CAM comes from captum, at `cam_layer`, and is left out without one. `options` apply to ParchGrad and
    to the same with random channels, drawn from `seed`. Maps are `mean_abs`.
    """
    control = random_control(explainer, seed)
    methods = {
        "gradient": _maps(explainer, rule=False),
        "input x gradient": _maps(explainer, rule=False, method="input_x_gradient"),
        "integrated gradients (25)": _maps(explainer, rule=False, method="integrated_gradients", steps=25),
    }
    if cam_layer is not None:
        methods["Grad-CAM"] = grad_cam(explainer, cam_layer)
    methods["ParchGrad"] = _maps(explainer, **options)
    methods["ParchGrad, random channels"] = _maps(control, **options)
    return methods


def random_control(explainer: Explainer, seed: int) -> Explainer:
    """The same model and table but for each class's order of channels, drawn from `seed`.

    What is tested is the order alone: features, defaults and layers are the table's.
    """
    table = explainer.table
    absent = (*table.idle_layers, *table.left_out)
    random = SelectionTable.random(explainer.model, table.classes, seed, absent, table.labels)
    layers = {n: replace(table.layers[n], rank=r.rank, log_p=r.log_p) for n, r in random.layers.items()}
    control = replace(table, name=random.name, built=random.built, layers=layers, table_sha256="", folder=None)
    return Explainer(explainer.model, control, explainer.device)


def grad_cam(explainer: Explainer, layer: str) -> Maps:
    """captum's Grad-CAM at the output of module `layer`, interpolated to the image."""
    from captum.attr import LayerAttribution, LayerGradCam

    from parchgrad.runtimes.pytorch import private_view

    module = private_view(network_of(explainer.model), explainer.device)
    try:
        cam = LayerGradCam(module, module.get_submodule(layer))
    except AttributeError as error:
        raise OptionError("cam_layer", layer, "the dotted name of a module of the model") from error

    def maps(images: Tensor, targets: list[int]) -> Tensor:
        here = images.to(explainer.device, copy=True).requires_grad_()
        coarse = cam.attribute(here, torch.tensor(targets, device=here.device), relu_attributions=True)
        full: Tensor = LayerAttribution.interpolate(coarse, images.shape[2:], "bilinear")
        return full[:, 0].detach()

    return maps


@dataclass(frozen=True)
class LeftOut:
    """Names of the images that were left out, of those looked at."""

    used: tuple[str, ...]  # the table was built from them
    unreadable: tuple[str, ...]
    looked_at: int


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of a source's images, and which images could not be in them."""

    pictures: LazyPictures
    left_out: LeftOut


def mosaics_of(
    source: Source, preprocessing: Preprocessing, count: int, seed: int, *, used: Set[str] = frozenset()
) -> Mosaics:
    """`count` mosaics of the source's images, four different classes each; the target is one of the four.

    An image that was drawn and cannot be read, or whose digest is in `used` (hexadecimal, `used_digests` of
    evidence.py), is replaced by another of its class: without such images the mosaics are `mosaics.draw`'s.
    Each drawn image is looked at once, here; the pictures are made when asked for, so that memory does not
    grow with their number. Raises DataError for fewer than 4 classes, and where a class has no image left.
    """
    if len(source.classes) < 4:
        raise DataError(f"'{source.root}' holds images of {len(source.classes)} classes; a mosaic needs 4.")
    if preprocessing.rule == "native":
        # Images of one size fit together; the model takes any.
        preprocessing = replace(preprocessing, rule="stretch")
    drawn, quarters = mosaics.draw(source.targets, count, seed)
    verdicts = _Verdicts(source, used)
    indices = _replaced(drawn, source, verdicts, seed)

    def picture(number: int) -> Picture:
        images = [preprocessing.apply(_decoded(source, int(i)))[0] for i in indices[number]]
        quarter = int(quarters[number])
        mask = mosaics.quarter_mask(images[0].shape[1], images[0].shape[2], quarter)
        return Picture(mosaics.four(images), int(source.targets[indices[number][quarter]]), mask)

    return Mosaics(LazyPictures(count, picture), verdicts.left_out())


def usable(source: Source, enough: int, seed: int, *, used: Set[str] = frozenset()) -> tuple[Source, LeftOut]:
    """Images that can be read and whose digests are not in `used`: of each class `enough`, or all it has.

    They are looked for in an order drawn from `seed`, and no further than needed.
    """
    generator = np.random.default_rng([seed, 4])
    verdicts, chosen = _Verdicts(source, used), []
    for target in source.classes:
        members = generator.permutation(np.flatnonzero(source.targets == target)).tolist()
        found: list[int] = []
        for start in range(0, len(members), READ_TOGETHER):
            part = members[start : start + READ_TOGETHER]
            verdicts.look(part)
            found += [index for index in part if verdicts.fine(index)]
            if len(found) >= enough:
                break
        chosen += found[:enough]
    return source.take(sorted(chosen)), verdicts.left_out()


class _Verdicts:
    """What is known of a source's images: `fine`, `used` or `unreadable`, by index."""

    def __init__(self, source: Source, used: Set[str]) -> None:
        self.known: dict[int, str] = {}
        self._source, self._used = source, used

    def left_out(self) -> LeftOut:
        return LeftOut(self._names("used"), self._names("unreadable"), len(self.known))

    def fine(self, index: int) -> bool:
        self.look([index])
        return self.known[index] == "fine"

    def look(self, indices: Sequence[int]) -> None:
        wanted = sorted(set(indices) - self.known.keys())
        for start in range(0, len(wanted), READ_TOGETHER):
            part = wanted[start : start + READ_TOGETHER]
            for index, encoded in zip(part, self._source.read(part), strict=True):
                self.known[index] = self._verdict(index, encoded)

    def _names(self, verdict: str) -> tuple[str, ...]:
        return tuple(self._source.name(i) for i, found in sorted(self.known.items()) if found == verdict)

    def _verdict(self, index: int, encoded: Encoded | DataError) -> str:
        if isinstance(encoded, DataError):
            return "unreadable"
        if digest_of(encoded).hex() in self._used:
            return "used"
        try:
            decode_image(encoded, self._source.name(index))
        except DataError:
            return "unreadable"
        return "fine"


def _replaced(drawn: NDArray[np.int64], source: Source, verdicts: _Verdicts, seed: int) -> NDArray[np.int64]:
    """`drawn` `(count, 4)` with every image that is not fine replaced by one of its class that is."""
    generator = np.random.default_rng([seed, 1])
    verdicts.look(drawn.ravel().tolist())
    indices = drawn.copy()
    for place in np.ndindex(*drawn.shape):
        if verdicts.fine(int(drawn[place])):
            continue
        target = int(source.targets[drawn[place]])
        # In a new order each time, so that one image does not stand in for all that are missing.
        others = generator.permutation(np.flatnonzero(source.targets == target)).tolist()
        fine = next((index for index in others if verdicts.fine(index)), None)
        if fine is None:
            found = [verdicts.known[index] for index in others]
            raise DataError(
                f"'{source.root}': none of the {len(others)} images of class {target} can be in a mosaic; "
                f"{found.count('used')} were used to build the table, {found.count('unreadable')} cannot be read."
            )
        indices[place] = fine
    return indices


def _decoded(source: Source, index: int) -> Image:
    (encoded,) = source.read([index])
    if isinstance(encoded, DataError):
        raise encoded
    return decode_image(encoded, source.name(index))


class LazyPictures(Sequence[Picture]):
    """`count` pictures, each made by `make(number)` whenever it is looked at."""

    def __init__(self, count: int, make: Callable[[int], Picture]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(index, slice):
            return [self._make(number) for number in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


def compare(
    methods: dict[str, Maps],
    pictures: Sequence[Picture],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Score]:
    """Measure each method on each picture; the pictures of a batch must be of one size.

    A map without mass has no share and points nowhere: it counts as 0 for both. `progress(done, total)`
    counts maps.
    """
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    done, total = 0, len(methods) * len(pictures)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        images, targets = torch.stack([p.image for p in batch]), [p.target for p in batch]
        for name, maps in methods.items():
            saliency = maps(images, targets).cpu().numpy()
            measured[name] += [measure(one, p.mask) for one, p in zip(saliency, batch, strict=True)]
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return [_score(name, np.array(rows)) for name, rows in measured.items()]


def _maps(explainer: Explainer, **options: Any) -> Maps:
    def maps(images: Tensor, targets: list[int]) -> Tensor:
        return explainer.explain(images, targets, **options).saliency()

    return maps


def measure(saliency: NDArray[np.floating], mask: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Mass and hit, 0 for a map without mass, and Gini, NaN for one, of a map `(h, w)`."""
    return (
        np.nan_to_num(mass_share(saliency, mask)),
        np.nan_to_num(pointing_hit(saliency, mask)),
        gini(saliency),
    )


def _score(name: str, measured: NDArray[np.float64]) -> Score:
    mass, hits, sparsity = measured.T
    root = math.sqrt(len(measured))
    return Score(
        method=name,
        mass=float(mass.mean()),
        mass_error=float(mass.std() / root),
        hits=float(hits.mean()),
        hits_error=float(hits.std() / root),
        gini=float(np.nanmean(sparsity)),
        pictures=len(measured),
    )
