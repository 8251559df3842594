"""The rows of the comparison: every method's maps, what it is, and which ones a model cannot have; no measures."""

from __future__ import annotations

import glob
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from parchgrad.defaults import Defaults
from parchgrad.errors import MissingPackageError, OptionError, UnsupportedModelError
from parchgrad.evaluation.baselines import centre_maps, edge_maps, grad_cam_maps, lrp_maps, random_maps
from parchgrad.evaluation.cam_layer import cam_layer_of
from parchgrad.evaluation.controls import random_control, shuffled_classes
from parchgrad.evaluation.maps import Maps
from parchgrad.evaluation.tune import ALL, UPPER_HALF, effect_of, layers_text, quantile_text
from parchgrad.explainer import Explainer
from parchgrad.options import Options
from parchgrad.patterns import match
from parchgrad.preprocessing import Preprocessing
from parchgrad.quantiles import Quantile, quantile_of_layers
from parchgrad.tables import SelectionTable, network_of

GROUPS = ("baseline", "gradient", "peer", "parchgrad", "control")

# The settings beside a table's defaults that stand in the comparison where no grid is given.
STAR_QUANTILES = (0.05, 0.3)
STAR_GAMMA = 3.0

AVERAGED = "ParchGrad, integrated gradients"
EVIDENCE = "ParchGrad, evidence"

# Patterns longer than this stand in a name as how many layers they mean.
LONGEST_PATTERNS = 32

_PARK = "Park, Jeon, Choi 2023"
_EVIDENCE = "docs/evidence.md; its weights are the map of HiResCAM, Draelos, Carin 2020"

# Name, method of Explainer.explain, what it is, source, whether its attributions claim to add up to the logit's rise.
_GRADIENTS = (
    ("gradient", "gradient", "The size of the target's gradient in the input.", "Simonyan, Vedaldi, Zisserman 2013",
     False),
    ("input x gradient", "input_x_gradient", "The gradient times the normalised input.",
     "Shrikumar, Greenside, Shcherbina, Kundaje 2016", True),
    ("SmoothGrad", "smoothgrad", "The mean gradient of noisy copies of the image.",
     "Smilkov, Thorat, Kim, Viégas, Wattenberg 2017", False),
    ("integrated gradients", "integrated_gradients",
     "The mean gradient on the way from the mean colour to the image, times that way.",
     "Sundararajan, Taly, Yan 2017", True),
    ("guided backprop", "guided_backprop", "The gradient without what is negative behind a ReLU.",
     "Springenberg, Dosovitskiy, Brox, Riedmiller 2014", False),
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row: what it is, and its maps. A target it does not answer has a map of NaN."""

    name: str
    group: str  # one of GROUPS
    words: str  # one plain sentence: what it is
    maps: Maps
    # The same method of another network of the same architecture; None: it does not look at a network.
    of: Callable[[nn.Module], Maps] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # JSON types only
    source: str = ""
    library: str = "parchgrad"
    # Signed (B, 3, h, w), of methods that claim completeness.
    attributions: Callable[[Tensor, list[int]], Tensor] | None = None
    explain: dict[str, Any] | None = None  # what Explainer.explain is given; of the group "parchgrad"


@dataclass(frozen=True)
class Unavailable:
    """A row that this model, table or machine cannot have."""

    name: str
    reason: str


def all_methods(
    explainer: Explainer,
    *,
    grid: Sequence[Defaults] | None = None,
    cam_layer: str | None = None,
    steps: int = 25,
    samples: int = 25,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> tuple[list[Method], list[Unavailable]]:
    """Every method that the comparison shows of `explainer`'s model and table, in the order of its rows.

    Baselines that know no model, the gradient family without a table (`mean_abs` maps), Grad-CAM and LRP, ParchGrad at
    the table's own defaults class-wise and instance-wise, then at the settings of `grid` (`tune.Grid.settings` makes
    them; `star` of the table by default), named by what differs from the defaults, in integrated gradients, with the
    seed `evidence`, and its controls. Settings
    that select the same channels stand once. `cam_layer` is the module Grad-CAM is made at, `cam_layer_of` by
    default; `steps` are the points of integrated gradients, `samples` SmoothGrad's noisy copies; `seed` draws the
    random map, SmoothGrad's noise and the controls. `preprocessing` is the model package's own by default: of a bare
    module without one nothing is known of its pixels and size, hence no edges and no default layer of Grad-CAM.

    The rows share one explainer; their maps are on its device. A method's `of` takes a network as it is when first
    given, and keeps the last one. Raises OptionError for a setting or a `cam_layer` that is none.
    """
    preprocessing = preprocessing or getattr(explainer.model, "preprocessing", None)
    rows = _Rows(_Explainers(explainer))
    rows.baselines(preprocessing, seed)
    rows.gradients({"integrated_gradients": {"steps": steps}, "smoothgrad": {"samples": samples, "noise_seed": seed}})
    rows.grad_cam(cam_layer, preprocessing)
    rows.lrp()
    rows.settings(star(explainer.table) if grid is None else grid)
    rows.averaged(steps)
    rows.evidence(preprocessing, seed)
    rows.controls(seed)
    return sorted(rows.found, key=lambda row: GROUPS.index(row.group)), rows.missing


def star(table: SelectionTable) -> list[Defaults]:
    """One step from the table's defaults in each direction: quantiles 0.05 and 0.3, gamma 3, the upper half of the
    layers they act on. Class-wise."""
    base = _class_wise(table)
    active = match(table.layer_names, base.layers)
    settings = [*(replace(base, quantile=quantile) for quantile in STAR_QUANTILES), replace(base, gamma=STAR_GAMMA)]
    if upper := active[len(active) // 2 :] if len(active) > 1 else ():
        patterns = tuple(glob.escape(name) for name in upper)
        quantile: Quantile = base.quantile
        if isinstance(quantile, Mapping):  # by patterns that may fit none of the upper half
            values = quantile_of_layers(quantile, active)
            quantile = {glob.escape(name): values[name] for name in upper}
        settings.append(replace(base, layers=patterns, quantile=quantile))
    return settings


def setting_name(setting: Defaults, base: Defaults, names: Sequence[str]) -> str:
    """A row's name: ParchGrad and what of `setting` differs from `base`. `names` are the table's layers."""
    parts = ["ParchGrad"]
    if setting.selection == "instance":
        parts.append("instance-wise")
    layers = "" if setting.layers == base.layers else _layers_words(setting, names)
    if setting.quantile != base.quantile and not _same_quantiles(setting, base, names):
        parts.append(_quantile_words(setting, names))
    if setting.gamma != base.gamma:
        parts.append(f"gamma {setting.gamma:g}")
    if layers:
        parts.append(layers)
    if setting.conserve != base.conserve:
        parts.append(f"conserve {setting.conserve}")
    if setting.normality_filter != base.normality_filter:
        parts.append("normality filter" if setting.normality_filter else "no normality filter")
    return ", ".join(parts)


class _Explainers:
    """The explainer of the comparison, and those of other networks with its table."""

    def __init__(self, explainer: Explainer) -> None:
        self.own = explainer
        self._last: tuple[nn.Module, Explainer] | None = None

    def of(self, network: nn.Module) -> Explainer:
        """An explainer of `network`, the last one again where it is the same: rows ask for each network in turn."""
        if self._last is None or self._last[0] is not network:
            backward = "dense" if self.own.backward == "dense" else "auto"
            self._last = network, Explainer(network, self.own.table, self.own.device, backward)
        return self._last[1]


class _Rows:
    """The rows found so far, and those that cannot be."""

    def __init__(self, explainers: _Explainers) -> None:
        self.explainers = explainers
        self.explainer = explainers.own
        self.found: list[Method] = []
        self.missing: list[Unavailable] = []

    def add(self, name: str, group: str, words: str, make: Callable[[Explainer], Maps], **others: Any) -> None:
        """A row that looks at the network: `make` gives its maps by an explainer; or why there is none."""
        try:
            maps = make(self.explainer)
        except (MissingPackageError, UnsupportedModelError) as error:
            self.missing.append(Unavailable(name, str(error)))
            return
        of = self.explainers.of
        self.found.append(Method(name, group, words, maps, lambda network: make(of(network)), **others))

    def baselines(self, preprocessing: Preprocessing | None, seed: int) -> None:
        self.found += [
            Method("random map", "baseline", "Noise, another for each image: the level of chance.", random_maps(seed),
                   options={"seed": seed}),
            Method("centre Gaussian", "baseline", "A Gaussian in the middle of the image.", centre_maps(),
                   options={"sigma": 0.25}, source="Judd, Durand, Torralba 2012"),
        ]  # fmt: skip
        name = "edge detector"
        if preprocessing is None:
            self.missing.append(Unavailable(name, "A bare module does not say how its pixels were normalised."))
            return
        words = "Sobel's gradient of the image's brightness."
        self.found.append(Method(name, "baseline", words, edge_maps(preprocessing), source="Adebayo et al. 2018"))

    def gradients(self, extra: Mapping[str, dict[str, Any]]) -> None:
        for name, method, words, source, complete in _GRADIENTS:
            options = {"method": method, **extra.get(method, {})}

            # Without the rule a selection means nothing, but instance-wise would be computed, and slower.
            plain = {"rule": False, "selection": "class", **options}

            def make(explainer: Explainer, plain: dict[str, Any] = plain) -> Maps:
                return _explained(explainer, **plain)

            attributions = _attributions(self.explainer, **plain) if complete else None
            self.add(name, "gradient", words, make, options=options, source=source, attributions=attributions)

    def grad_cam(self, layer: str | None, preprocessing: Preprocessing | None) -> None:
        name = "Grad-CAM"
        probe = None if preprocessing is None else torch.zeros(3, *preprocessing.size)
        if layer is None:
            if probe is None:
                self.missing.append(
                    Unavailable(name, "No layer is known for a bare module; name one with --cam-layer.")
                )
                return
            try:
                layer = cam_layer_of(network_of(self.explainer.model), probe)
            except UnsupportedModelError as error:
                self.missing.append(Unavailable(name, f"{error} Name one with --cam-layer."))
                return
        at = layer

        def make(explainer: Explainer) -> Maps:
            return grad_cam_maps(explainer, at)

        words = "The feature maps of a late layer, weighted by their mean gradients, enlarged to the image."
        self.add(name, "peer", words, make, options={"layer": layer}, source="Selvaraju et al. 2017",
                 library=_version("grad-cam"))  # fmt: skip
        if probe is not None and self.found[-1].name == name:
            # A layer that does not run, or gives no feature map, is found out now and not at the first picture.
            dtype = next((p.dtype for p in network_of(self.explainer.model).parameters()), probe.dtype)
            self.found[-1].maps(probe[None].to(dtype), [0])

    def lrp(self) -> None:
        words = "The logit handed down layer by layer in proportion to what pushed it up, where it is positive."
        self.add("LRP", "peer", words, lrp_maps, options={"composite": "EpsilonPlus", "epsilon": 1e-6},
                 source="Bach et al. 2015; Montavon et al. 2019", library=_version("zennit"))  # fmt: skip

    def settings(self, grid: Sequence[Defaults]) -> None:
        table = self.explainer.table
        base = _class_wise(table)
        seen: set[tuple[object, ...]] = set()
        names: set[str] = set()
        for setting in (base, replace(base, selection="instance"), *grid):
            # Made to be refused here if it is no option.
            options = Options(**_options(setting))
            effect = (*effect_of(setting, table), setting.selection, setting.normality_filter)
            if effect in seen:
                continue
            seen.add(effect)
            name = _unique(setting_name(setting, base, table.layer_names), names)
            names.add(name)
            try:
                self.explainer.require_statistics([options])
            except OptionError as error:
                self.missing.append(Unavailable(name, str(error)))
                continue
            self._setting(name, setting)

    def averaged(self, steps: int) -> None:
        """Integrated gradients of ParchGrad's gradient, at the table's own defaults: the paper's other method."""
        setting = _class_wise(self.explainer.table)
        explain = {**_options(setting), "method": "integrated_gradients", "steps": steps}

        def make(explainer: Explainer) -> Maps:
            return _explained(explainer, **explain)

        try:
            self.explainer.require_statistics([Options(**explain)])
        except OptionError as error:
            self.missing.append(Unavailable(AVERAGED, str(error)))
            return
        words = "Integrated gradients in which every gradient is ParchGrad's."
        options = {**setting.to_json(), "method": "integrated_gradients", "steps": steps}
        self.add(AVERAGED, "parchgrad", words, make, options=options, source=_PARK, explain=explain)

    def evidence(self, preprocessing: Preprocessing | None, seed: int) -> None:
        """The seed `evidence` with the plain gradient, the table, and random channels: what is whose."""
        base = _class_wise(self.explainer.table)
        ours = {**_options(base), "seed": "evidence"}
        plain = {"rule": False, "selection": "class", "seed": "evidence"}
        rows: tuple[tuple[str, str, str, dict[str, Any], bool], ...] = (
            ("gradient, evidence", "gradient",
             "The gradient, weighed at the last map by where the evidence for the class is.", plain, False),
            (EVIDENCE, "parchgrad",
             "ParchGrad, weighed at the last map by where the evidence for the class is.", ours, False),
            (f"{EVIDENCE}, random channels", "control",
             "The same with each class's channels in random order.", ours, True),
        )  # fmt: skip
        size = None if preprocessing is None else (3, *preprocessing.size)
        for name, group, words, explain, control in rows:

            def make(explainer: Explainer, explain: dict[str, Any] = explain, control: bool = control) -> Maps:
                return _explained(random_control(explainer, seed) if control else explainer, **explain)

            try:
                self.explainer.require_statistics([Options(**explain)], size)
            except OptionError as error:
                self.missing.append(Unavailable(name, str(error)))
                continue
            options: dict[str, Any] = {"seed": "evidence"}
            if explain is not plain:
                options = {**base.to_json(), **options}
            if control:
                options["random_channels"] = seed
            row = explain if name == EVIDENCE else None
            self.add(name, group, words, make, options=options, source=_EVIDENCE, explain=row)

    def _setting(self, name: str, setting: Defaults) -> None:
        explain = _options(setting)
        chosen = (
            "the channels whose features are unusually strong in the image"
            if setting.selection == "instance"
            else "the channels that the table ranks first for the target"
        )

        def make(explainer: Explainer) -> Maps:
            return _explained(explainer, **explain)

        words = f"The gradient with {chosen} favoured in every layer of the rule."
        self.add(name, "parchgrad", words, make, options=setting.to_json(), source=_PARK, explain=explain)

    def controls(self, seed: int) -> None:
        """ParchGrad at the table's own defaults, class-wise, with tables that mean nothing."""
        base = _class_wise(self.explainer.table)
        controls = (
            ("ParchGrad, random channels", random_control, "ParchGrad with each class's channels in random order."),
            ("ParchGrad, other classes' channels", shuffled_classes,
             "ParchGrad with each class's channels given to another class."),
        )  # fmt: skip
        for name, control, words in controls:

            def make(explainer: Explainer, control: Callable[[Explainer, int], Explainer] = control) -> Maps:
                return _explained(control(explainer, seed), **_options(base))

            try:
                self.explainer.require_statistics([Options(**_options(base))])
                self.add(name, "control", words, make, options={**base.to_json(), "seed": seed}, source=_PARK)
            except OptionError as error:
                self.missing.append(Unavailable(name, str(error)))


def _explained(explainer: Explainer, **options: Any) -> Maps:
    def maps(images: Tensor, targets: list[int]) -> Tensor:
        return explainer.explain(images, targets, uncovered="nan", **options).saliency()

    return maps


def _attributions(explainer: Explainer, **options: Any) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda images, targets: explainer.explain(images, targets, uncovered="nan", **options).attributions


def _class_wise(table: SelectionTable) -> Defaults:
    return replace(table.defaults, selection="class")


def _options(setting: Defaults) -> dict[str, Any]:
    """Options of Explainer.explain: all that a table's defaults say, so that the row is the same under others."""
    return {name: getattr(setting, name) for name in Defaults.__dataclass_fields__}


def _same_quantiles(setting: Defaults, base: Defaults, names: Sequence[str]) -> bool:
    """Whether the layers of `setting` have the quantiles they have in `base`."""
    before = quantile_of_layers(base.quantile, match(names, base.layers))
    return quantile_of_layers(setting.quantile, active := match(names, setting.layers)) == {
        name: before.get(name, math.nan) for name in active
    }


def _quantile_words(setting: Defaults, names: Sequence[str]) -> str:
    """`q 0.05`; `q 0.5/0.1` for the lower and upper half of the layers; else patterns, or from least to largest."""
    text = quantile_text(setting, names)
    if not isinstance(setting.quantile, Mapping) or "/" in text:
        return f"q {text}"
    patterns = " ".join(f"{pattern}={value:g}" for pattern, value in setting.quantile.items())
    if len(patterns) <= LONGEST_PATTERNS:
        return f"q {patterns}"
    values = quantile_of_layers(setting.quantile, match(names, setting.layers)).values()
    return f"q by layer {min(values):g}-{max(values):g}"


def _layers_words(setting: Defaults, names: Sequence[str]) -> str:
    text = layers_text(setting, names)
    if text == ALL:
        return "all layers"
    if text == UPPER_HALF:
        return "upper half of the layers"
    patterns = " ".join(setting.layers)
    return f"layers {patterns}" if len(patterns) <= LONGEST_PATTERNS else f"{text} layers"


def _unique(name: str, taken: set[str]) -> str:
    """The name, numbered where another setting has it."""
    number = 2
    found = name
    while found in taken:
        found, number = f"{name} ({number})", number + 1
    return found


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
