"""Methods side by side: every method's maps of the same pictures, each measured where its target is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parchgrad.build import ImageFolder
from parchgrad.errors import DataError, OptionError
from parchgrad.evaluation import mosaics
from parchgrad.evaluation.maps import gini, mass_share, pointing_hit
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing, read_image
from parchgrad.tables import SelectionTable, network_of

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
    table = explainer.table
    random = SelectionTable.random(explainer.model, table.classes, seed, table.idle_layers, table.labels)
    # The table's own but for the order: what is tested is the order alone.
    layers = {n: replace(table.layers[n], rank=r.rank, log_p=r.log_p) for n, r in random.layers.items()}
    random = replace(random, layers=layers, defaults=table.defaults)
    control = Explainer(explainer.model, random, explainer.device)
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


def mosaics_of(folder: ImageFolder, preprocessing: Preprocessing, count: int, seed: int) -> LazyPictures:
    """`count` mosaics of the folder's images, four different classes each; the target is one of the four.

    Made when asked for, so that memory does not grow with their number.
    """
    rows = np.array([sample.row for sample in folder.samples])
    if len(folder.classes) < 4:
        raise DataError(f"'{folder.root}' holds {len(folder.classes)} classes; a mosaic needs 4.")
    if preprocessing.rule == "native":
        # Images of one size fit together; the model takes any.
        preprocessing = replace(preprocessing, rule="stretch")
    indices, quarters = mosaics.draw(rows, count, seed)

    def picture(number: int) -> Picture:
        images = [preprocessing.apply(read_image(folder.samples[i].path))[0] for i in indices[number]]
        quarter = int(quarters[number])
        mask = mosaics.quarter_mask(images[0].shape[1], images[0].shape[2], quarter)
        return Picture(mosaics.four(images), folder.classes[rows[indices[number][quarter]]], mask)

    return LazyPictures(count, picture)


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
            measured[name] += [_measure(one, p.mask) for one, p in zip(saliency, batch, strict=True)]
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return [_score(name, np.array(rows)) for name, rows in measured.items()]


def _maps(explainer: Explainer, **options: Any) -> Maps:
    def maps(images: Tensor, targets: list[int]) -> Tensor:
        return explainer.explain(images, targets, **options).saliency()

    return maps


def _measure(saliency: NDArray[np.floating], mask: NDArray[np.bool_]) -> tuple[float, float, float]:
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
