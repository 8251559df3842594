"""Methods side by side: every method's maps of the same pictures, each measured where its target is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parchgrad.errors import OptionError
from parchgrad.evaluation.images import Picture, Progress
from parchgrad.evaluation.maps import gini, mass_share, pointing_hit
from parchgrad.explainer import Explainer
from parchgrad.tables import SelectionTable, network_of

Maps = Callable[[Tensor, list[int]], Tensor]  # images (B, 3, h, w), targets -> saliency maps (B, h, w)


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

    from parchgrad.runtimes.view import private_view

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
