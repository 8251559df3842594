"""How a network with untrained weights is built from a name, and what its publisher gives along with it.

Names: a torchvision classification model, `timm/` and a timm model, or `module:factory` of the user's own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from parchgrad.errors import ModelError, WeightsError

TIMM = "timm/"

# What a factory is not given: a package has its own weights and classes, and loading one downloads and reads nothing
# else. timm and torchvision take these names.
_NOT_ARGUMENTS = ("pretrained", "weights", "checkpoint_path", "model_name", "num_classes")


@dataclass(frozen=True)
class Published:
    """What a library publishes for an architecture: one trained state and what goes with it."""

    source: str  # such as 'torchvision ResNet50_Weights.IMAGENET1K_V2'
    file: str  # name of the weights file a download would fetch
    labels: tuple[str, ...] | None  # None where the publisher names none
    preprocessing: Mapping[str, Any]  # fields of Preprocessing, which refuses a rule or interpolation it has not
    download: Callable[[], dict[str, Tensor]]  # the state dict; raises WeightsError where it cannot be had


def build_network(architecture: str, classes: int, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A network with untrained weights; `arguments` are passed to its factory beside `num_classes=classes`.

    `module:factory` imports that module and calls the factory: code of yours, whoever wrote the name. Raises
    ModelError, also for factories of PyTorch's own (`torch.hub` runs other people's code) and for arguments that
    would bring other weights or classes.
    """
    for argument in _NOT_ARGUMENTS:
        if argument in (arguments or {}):
            raise ModelError(
                f"Architecture '{architecture}' takes no argument '{argument}': a package has its own weights "
                "and classes."
            )
    given: dict[str, Any] = {"num_classes": classes}
    factory: Callable[..., Any]
    if architecture.startswith(TIMM):
        timm, name = _timm_model(architecture)
        given |= {"model_name": name, "pretrained": False}
        factory = timm.create_model
    elif ":" in architecture:
        factory = _import_factory(architecture)
    else:
        factory = _torchvision(architecture).get_model_builder(architecture)
        given["weights"] = None
        if architecture in ("googlenet", "inception_v3"):
            # Drawing initial weights takes these two a minute. torchvision's own weights for them expect the
            # input transformed; weights trained without say so by `arguments: {transform_input: false}`.
            given |= {"init_weights": False, "transform_input": True}
    try:
        # Weights are drawn and then overwritten: the caller's random state must not feel it.
        with torch.random.fork_rng(devices=[]):
            network = factory(**{**given, **(arguments or {})})
    except Exception as error:
        raise ModelError(f"Architecture '{architecture}' cannot be built: {type(error).__name__}: {error}.") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"Architecture '{architecture}' returned {type(network).__name__}, expected torch.nn.Module.")
    return network


def published(architecture: str, pretrained: str | None = None, weights_file: str | None = None) -> Published | None:
    """What the architecture's publisher gives; None for `module:factory`, of which nothing is known.

    Of torchvision's several weights, `pretrained` names one (`IMAGENET1K_V1`). Without it: the best one
    (`DEFAULT`) where `weights_file` is None too; else the one whose file has that name, and for a file of the
    user's own the first published one, whose preprocessing is the common one of 256 and 224 pixels.
    Raises ModelError for unknown names.
    """
    if architecture.startswith(TIMM):
        return _published_by_timm(architecture, pretrained)
    if ":" in architecture:
        if pretrained is not None:
            raise ModelError(f"Architecture '{architecture}' has no published weights, so none named '{pretrained}'.")
        return None
    return _published_by_torchvision(architecture, pretrained, weights_file)


def _import_factory(architecture: str) -> Any:
    module_name, _, attribute = architecture.partition(":")
    own = ModelError(f"Architecture '{architecture}' is PyTorch's own, expected a module of yours.")
    if module_name.partition(".")[0] == "torch":
        raise own
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise ModelError(
            f"Architecture '{architecture}' cannot be imported ({type(error).__name__}: {error}); "
            "is its folder on the Python path?"
        ) from error
    if getattr(factory, "__module__", None) == "torch.hub":  # under another module's name
        raise own
    return factory


def _torchvision(architecture: str) -> ModuleType:
    """torchvision's models, if `architecture` is one for classification. Raises ModelError."""
    from torchvision import models as zoo

    if architecture not in zoo.list_models(module=zoo):
        raise ModelError(
            f"Architecture '{architecture}' is not a torchvision classification model; "
            f"for timm's give '{TIMM}NAME', for your own network 'module:factory'."
        )
    module: ModuleType = zoo
    return module


def _published_by_torchvision(architecture: str, pretrained: str | None, weights_file: str | None) -> Published | None:
    enum = _torchvision(architecture).get_model_weights(architecture)
    # VGG16's IMAGENET1K_FEATURES are for detection: no classifier.
    known = {weights.name: weights for weights in enum if weights.meta.get("categories")}
    if pretrained not in (None, "DEFAULT", *known):
        raise ModelError(
            f"Architecture '{architecture}' has no weights named '{pretrained}', but {', '.join(['DEFAULT', *known])}."
        )
    if not known:
        return None
    chosen = enum.DEFAULT
    if pretrained not in (None, "DEFAULT"):
        chosen = known[str(pretrained)]
    elif pretrained is None and weights_file is not None:
        own = [weights for weights in known.values() if _file_name(weights.url) == weights_file]
        chosen = (own or list(known.values()))[0]
    file = _file_name(chosen.url)

    preset = chosen.transforms()
    (side,), (resize,) = preset.crop_size, preset.resize_size
    preprocessing = {
        "size": (side, side),
        "rule": "shorter_side",
        "resize": resize,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }

    def download() -> dict[str, Tensor]:
        try:
            return dict(chosen.get_state_dict(progress=False, check_hash=True))
        except Exception as error:
            raise _not_downloaded(str(chosen), file, error) from error

    return Published(f"torchvision {chosen}", file, tuple(chosen.meta["categories"]), preprocessing, download)


def _timm_model(architecture: str) -> tuple[ModuleType, str]:
    """timm and the model's name in it. Raises ModelError."""
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"Architecture '{architecture}' needs timm, which is not installed: pip install 'parchgrad[timm]'."
        ) from error
    name = architecture.removeprefix(TIMM)
    if ":" in name or not timm.is_model(name):  # 'hf-hub:owner/name' is fetched from there
        raise ModelError(f"Architecture '{architecture}' is not one of timm {timm.__version__}'s models.")
    tag = name.partition(".")[2]
    if tag and name not in timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        raise ModelError(f"Architecture '{architecture}' has no published weights tagged '{tag}' in timm.")
    module: ModuleType = timm
    return module, name


def _published_by_timm(architecture: str, pretrained: str | None) -> Published | None:
    timm, name = _timm_model(architecture)
    if pretrained is not None:
        raise ModelError(
            f"Architecture '{architecture}': timm names its weights in the architecture, 'timm/NAME.{pretrained}'."
        )
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    full_name = f"{name.partition('.')[0]}.{config.tag}" if config.tag else name
    if config.hf_hub_id:
        file = f"model.safetensors of {config.hf_hub_id} on the Hugging Face Hub"
    else:
        file = _file_name(config.url or "") or "the weights file"

    def download() -> dict[str, Tensor]:
        try:
            with torch.random.fork_rng(devices=[]):
                return dict(timm.create_model(name, pretrained=True).state_dict())
        except Exception as error:
            raise _not_downloaded(architecture, file, error) from error

    preprocessing = _timm_preprocessing(timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
    return Published(f"timm {full_name}", file, _timm_labels(config.to_dict()), preprocessing, download)


def _timm_preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's evaluation transform (`transforms_imagenet_eval`) as one of our rules, where it is one."""
    _, height, width = config["input_size"]
    mode, part = config["crop_mode"], float(config["crop_pct"])
    rule, resize = f"timm's crop mode {mode} at {part:g} of {height} x {width}", None
    if mode == "center" and height == width:
        rule, resize = "shorter_side", math.floor(height / part)
    elif mode == "squash" and (math.floor(height / part), math.floor(width / part)) == (height, width):
        rule = "stretch"
    return {
        "size": (height, width),
        "rule": rule,
        "resize": resize,
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
    }


def _timm_labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """WordNet id, tab, name of each class, for weights of ImageNet or a part of it that timm knows by size."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    ids = [str(info.index_to_label_name(index)) for index in range(int(config["num_classes"]))]
    return tuple(f"{wordnet_id}\t{info.index_to_description(index)}" for index, wordnet_id in enumerate(ids))


def _file_name(url: str) -> str:
    return Path(url).name


def _not_downloaded(what: str, file: str, error: Exception) -> WeightsError:
    """`file` is what to fetch elsewhere; on the command line it is then given as --weights."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return WeightsError(
        f"Weights '{what}' cannot be downloaded ({reason[:200]}); "
        f"fetch {file} where there is a network and give the file: --weights FILE."
    )
