"""Whether a map can be an explanation at all: of this input, of this model, of this table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.evaluation.controls import random_control, shuffled_classes
from parchgrad.evaluation.maps import Maps, agreement
from parchgrad.explainer import Explainer
from parchgrad.runtimes.view import private_view

Floats = NDArray[np.float64]
Predict = Callable[[Tensor], Tensor]  # images (B, 3, h, w) -> logits (B, K)
MapsOf = Callable[[nn.Module], Maps]  # the method, as maps of whatever network it is given


@dataclass(frozen=True)
class Sensitivity:
    """How far noise in the input moves the map."""

    largest: Floats  # (B,): largest relative change
    radius: float
    samples: int


@dataclass(frozen=True)
class Completeness:
    """How far attributions are from adding up to the logit's rise."""

    gap: Floats  # (B,): sum of attributions - rise, in logits
    relative: Floats  # (B,): |gap| / |rise|


@dataclass(frozen=True)
class EntropyRise:
    """Efficient model-parameter randomisation test."""

    rise: Floats  # (B,): (randomised - entropy) / entropy
    entropy: Floats  # (B,): of the model's maps, nats
    randomised: Floats  # (B,): of the maps of the model with random parameters


@dataclass(frozen=True)
class Cascade:
    """Model-parameter randomisation test: the layers from the top, and what is left of the map below each."""

    layers: tuple[str, ...]  # (L,): each with all that run after it
    similarity: Floats  # (L, B): Spearman's rank correlation with the model's map


@dataclass(frozen=True)
class TableRandomisation:
    """What is left of the map under a table of no meaning, Spearman's rank correlation."""

    classes: Floats  # (B,): every class has another one's rows
    channels: Floats  # (B,): every class's channels in random order


def max_sensitivity(
    maps: Maps,
    images: Tensor,
    targets: list[int],
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 16,
) -> Sensitivity:
    """Max-sensitivity of Yeh et al. 2019: max over noise e of |map(x + e) - map(x)| / |map(x)|, L2 norms.

    Every value of e is uniform in -`radius`..`radius`, in units of the normalised image; the default radius and
    number of `samples` are captum's. All images share one noise, drawn from `seed`, so that batches do not matter.
    0 is a map that ignores the input's details; a map of noise uniform in 0..1, drawn anew for each input, has about
    sqrt(1/6) / sqrt(1/3) = 0.71. NaN for a map of zeros, and where a map is not finite. Raises OptionError.
    """
    if not radius >= 0:
        raise OptionError("radius", radius, "a number of at least 0")
    if samples < 1:
        raise OptionError("samples", samples, "an integer of at least 1")
    before = _flat_maps(maps, images, targets, batch_size)
    size = np.linalg.norm(before, axis=1)
    largest = np.zeros(len(images))
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        noise = torch.from_numpy(generator.uniform(-radius, radius, tuple(images.shape[1:]))).to(images)
        after = _flat_maps(maps, images + noise, targets, batch_size)
        with np.errstate(invalid="ignore"):  # inf - inf
            largest = np.maximum(largest, np.linalg.norm(after - before, axis=1))
    return Sensitivity(_ratio(largest, size), radius, samples)


def completeness_gap(
    attributions: Tensor,
    predict: Predict,
    images: Tensor,
    targets: list[int],
    *,
    baseline: Tensor | None = None,
    batch_size: int = 16,
) -> Completeness:
    """Whether signed `attributions` (B, 3, h, w) add up: their sum - (logit(image) - logit(baseline)).

    The completeness axiom of Sundararajan, Taly, Yan 2017, for methods that claim it: integrated gradients, and LRP or
    input x gradient on networks without biases with a baseline of zeros. `baseline` is (3, h, w) or (B, 3, h, w),
    by default zeros, the mean colour of normalised images. `relative` is the gap's size over the rise's: 0 is
    complete, and attributions that sum to nothing, as random ones do, have 1. NaN where there is no rise.
    """
    start = torch.zeros_like(images) if baseline is None else baseline.to(images).expand_as(images)
    rise = _target_logits(predict, images, targets, batch_size) - _target_logits(predict, start, targets, batch_size)
    gap = attributions.detach().cpu().double().flatten(1).sum(dim=1).numpy() - rise
    return Completeness(gap, _ratio(np.abs(gap), np.abs(rise)))


def histogram_entropy(saliency: ArrayLike, bins: int = 100) -> float:
    """Entropy of the histogram of the map's values, nats: -sum p log p over `bins` equal bins from least to largest.

    0 for a map of one value, at most log `bins`; about log `bins` for uniform noise. It does not change with the map's
    scale. NaN for a map with a value that is not finite.
    """
    values = np.asarray(saliency, np.float64).ravel()
    if not np.isfinite(values).all():
        return float("nan")
    low, high = values.min(), values.max()
    if not high > low:
        return 0.0
    # Stretched first: numpy refuses a range too small for so many bins at its values.
    counts = np.histogram((values - low) / (high - low), bins, (0.0, 1.0))[0]
    shares = counts[counts > 0] / len(values)
    return max(0.0, -float(shares @ np.log(shares)))


def entropy_rise(
    maps_of: MapsOf,
    module: nn.Module,
    images: Tensor,
    targets: list[int],
    *,
    seed: int = 0,
    bins: int = 100,
    batch_size: int = 16,
) -> EntropyRise:
    """Efficient model-parameter randomisation test, eMPRT (Hedström, Weber, Lapuschkin, Höhne 2024).

    The relative rise of the map's `histogram_entropy` from `module` to a copy of it whose parameters are all drawn
    anew (see `cascade`). An explanation of the model becomes noisier, above 0; a method that ignores the model has 0.
    `maps_of(network)` is the method for a network. NaN where the model's map has no entropy. The caller's model is
    untouched.
    """
    view = private_view(module)
    entropy, randomised = (
        np.array([histogram_entropy(one, bins) for one in _flat_maps(maps_of(network), images, targets, batch_size)])
        for network in (copy.deepcopy(view), _randomised(view, _layers(view, images), seed))
    )
    return EntropyRise(_ratio(randomised - entropy, entropy), entropy, randomised)


def cascade(
    maps_of: MapsOf,
    module: nn.Module,
    images: Tensor,
    targets: list[int],
    *,
    depths: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Cascade:
    """Cascading randomisation from the logits down (Adebayo et al. 2018): similarity of the map, layer by layer.

    The layers are the modules with parameters of their own, the last to run first. Each is drawn anew by its own
    `reset_parameters`, as before training; the values of one that has none are shuffled. A layer's draw depends on
    `seed` and its place alone, so each step keeps what the one before drew. An explanation's similarity falls towards
    0; a method that ignores the model has 1 throughout. NaN where a map is the same everywhere (`maps.agreement`).
    The caller's model is untouched: `maps_of` is given copies. Takes one round of maps a layer; `depths` at most,
    spread evenly from the logits' layer to all of them, where it is given. Raises OptionError.
    """
    if depths is not None and depths < 1:
        raise OptionError("depths", depths, "an integer of at least 1")
    view = private_view(module)
    layers = _layers(view, images)
    all_depths = list(range(1, len(layers) + 1))
    if depths is not None and depths < len(layers):
        all_depths = sorted({round(depth) for depth in np.linspace(len(layers), 1, depths).tolist()})
    before = _flat_maps(maps_of(copy.deepcopy(view)), images, targets, batch_size)
    similarity = []
    for depth in all_depths:
        after = _flat_maps(maps_of(_randomised(view, layers[:depth], seed)), images, targets, batch_size)
        similarity.append(_similarity(after, before))
    reached = tuple(layers[depth - 1] for depth in all_depths)
    return Cascade(reached, np.array(similarity).reshape(len(reached), len(images)))


def table_randomisation(
    explainer: Explainer,
    images: Tensor,
    targets: list[int],
    *,
    draw: int = 0,
    reduction: str = "mean_abs",
    batch_size: int = 16,
    **options: Any,
) -> TableRandomisation:
    """What is left of the map when the table means nothing: ours, after Adebayo et al. 2018.

    `draw` seeds the tables; `options`, a seed of the gradient among them, are those of Explainer.explain.

    Similarity with the map of `explainer`'s own table under the same `options`: with each class's rows given to
    another class, and with each class's channels in random order (`controls.random_control`). Near 1, the map does
    not come from the table's choice; the smaller, the more of it does. A plain method has 1, as has instance-wise
    selection, which does not ask the rows. Some similarity is left to every method: the gradient it starts from is
    the same. NaN where a map is the same everywhere. Raises OptionError for a table of fewer than two classes.
    """
    controls = [shuffled_classes(explainer, draw), random_control(explainer, draw)]

    def maps(by: Explainer) -> Floats:
        def one(batch: Tensor, chosen: list[int]) -> Tensor:
            return by.explain(batch, chosen, **options).saliency(reduction)

        return _flat_maps(one, images, targets, batch_size)

    before = maps(explainer)
    return TableRandomisation(*(_similarity(maps(control), before) for control in controls))


def _layers(view: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Modules with parameters of their own that run in prediction, the last to run first."""
    ran: dict[str, None] = {}
    probe = copy.deepcopy(view)
    for name, part in probe.named_modules():
        if any(True for _ in part.parameters(recurse=False)):
            part.register_forward_pre_hook(lambda _, __, name=name: ran.setdefault(name))
    with torch.no_grad():
        # One image is enough to see what runs.
        probe(images[:1].to(next(view.parameters(), images).device, copy=True))
    if not ran:
        raise UnsupportedModelError("The network has no parameters that could be randomised.")
    return tuple(reversed(ran))


def _randomised(view: nn.Module, layers: tuple[str, ...], seed: int) -> nn.Module:
    """A copy of `view` with weights of its own in which the parameters of `layers` are drawn anew."""
    network = copy.deepcopy(view)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for place, name in enumerate(layers):
            torch.manual_seed(int(np.random.SeedSequence([seed, place]).generate_state(1)[0]))
            part = network.get_submodule(name)
            device = next(part.parameters(recurse=False)).device
            part.cpu()  # one draw, whatever the device
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
            else:
                for values in part.parameters(recurse=False):
                    values.copy_(values.flatten()[torch.randperm(values.numel())].view_as(values))
            part.to(device)
    return network.eval().requires_grad_(False)


def _flat_maps(maps: Maps, images: Tensor, targets: list[int], batch_size: int) -> Floats:
    """Maps (B, h * w), `batch_size` images at a time."""
    parts = []
    for start in range(0, len(images), batch_size):
        some = slice(start, start + batch_size)
        saliency = torch.as_tensor(maps(images[some], targets[some]))
        parts.append(saliency.detach().cpu().double().flatten(1).numpy())
    return np.concatenate(parts)


def _target_logits(predict: Predict, images: Tensor, targets: list[int], batch_size: int) -> Floats:
    parts = []
    for start in range(0, len(images), batch_size):
        logits = predict(images[start : start + batch_size]).detach().cpu().double()
        chosen = torch.tensor(targets[start : start + batch_size])[:, None]
        parts.append(logits.gather(1, chosen)[:, 0].numpy())
    return np.concatenate(parts)


def _similarity(maps: Floats, others: Floats) -> Floats:
    return np.array([agreement(one, other) for one, other in zip(maps, others, strict=True)])


def _ratio(part: Floats, whole: Floats) -> Floats:
    """NaN where `whole` is 0, or both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole != 0)
