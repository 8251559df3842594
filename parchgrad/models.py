"""A model package: architecture, weights, labels and preprocessing in one folder, checked when loaded.

`models/<name>/<version>/` holds `model.yaml`, `weights.safetensors` and `labels.txt`. Nothing in it is ever
unpickled; `.pth` files are read once, by `add_model`, with `weights_only=True`.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from parchgrad.errors import ModelError, WeightsError
from parchgrad.files import file_sha256, write_tensors
from parchgrad.labels import class_index
from parchgrad.preprocessing import Preprocessing
from parchgrad.versions import is_version, resolve_version

FORMAT_VERSION = 1
MANIFEST_FILE = "model.yaml"
WEIGHTS_FILE = "weights.safetensors"
LABELS_FILE = "labels.txt"

# `id<tab>name`, or a line of ImageNet's own list: a WordNet id, a space, names.
_LABEL_WITH_ID = re.compile(r"(?P<id>[^\t]+)\t(?P<name>.+)|(?P<wnid>n\d{8}) (?P<names>.+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Model:
    """A loaded model package; `module` is on the CPU in eval mode, weights not trainable."""

    name: str
    version: str
    architecture: str
    weights_sha256: str
    labels: tuple[str, ...]
    class_ids: tuple[str, ...]  # such as WordNet ids; empty where the labels file gives none
    preprocessing: Preprocessing
    module: nn.Module
    folder: Path

    def class_index(self, target: object) -> int:
        """Index of a class given by index, name or class id, or by index written as text.

        Where two classes share a name, the name means the first. Raises UnknownTargetError.
        """
        return class_index(target, self.labels, self.class_ids)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Load and check the package at `path`: a version folder, or its parent (then the highest version).

    Raises ModelError or WeightsError naming what does not hold: missing files, format version, checksum,
    number of labels, tensors that do not fit the architecture.
    """
    folder = resolve_version(Path(path), MANIFEST_FILE, ModelError)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    name = manifest["name"]
    class_ids, labels = _read_labels(folder / manifest["labels"])
    weights = folder / manifest["weights"]["file"]
    if not weights.is_file():
        raise WeightsError(f"Model '{name}' has no weights file '{weights.name}'.")
    digest = file_sha256(weights)
    if digest != manifest["weights"]["sha256"]:
        expected = manifest["weights"]["sha256"]
        raise WeightsError(f"Model '{name}': {weights.name} has sha256 {digest}, {MANIFEST_FILE} says {expected}.")
    module = build_network(manifest["architecture"], len(labels), manifest.get("arguments", {}))
    load_weights(module, _read_safetensors(weights), name)
    return Model(
        name=name,
        version=folder.name if is_version(folder.name) else "1",
        architecture=manifest["architecture"],
        weights_sha256=digest,
        labels=labels,
        class_ids=class_ids,
        preprocessing=_preprocessing(name, manifest["input"]),
        module=module.eval().requires_grad_(False),
        folder=folder,
    )


def add_model(
    name: str,
    *,
    architecture: str,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    labels: Sequence[str],
    preprocessing: Preprocessing,
    arguments: Mapping[str, Any] | None = None,
    models_dir: str | os.PathLike[str] = "models",
    version: int | None = None,
) -> Path:
    """Write a model package and return its folder; it loads, or nothing is left behind.

    `weights` is a `.safetensors` file, a `.pth`/`.pt` state dict (read with `weights_only=True`), or a state
    dict. A label is a name, or `id<tab>name`, or a WordNet id, a space and a name. `arguments` are passed to
    the architecture's factory beside `num_classes`. `version` defaults to one above the highest there is.
    Raises ModelError or WeightsError.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"Model name is {name!r}, expected letters, digits, '.', '_', '-', a letter or digit first.")
    root = Path(models_dir) / name
    number = _next_version(root) if version is None else version
    if number < 1:
        raise ModelError(f"Model '{name}': version is {number}, expected an integer >= 1.")
    target = root / str(number)
    if target.exists():
        raise ModelError(f"Model '{name}' already has a version {number}.")
    _check_labels(name, labels)
    state = dict(weights) if isinstance(weights, Mapping) else _read_weights(Path(weights))
    network = build_network(architecture, len(labels), arguments or {})
    load_weights(network, state, name)
    _check_answer(network, name, len(labels), preprocessing)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".adding-") as temporary:
        staged = Path(temporary) / str(number)
        staged.mkdir()
        write_tensors(staged / WEIGHTS_FILE, state)
        (staged / LABELS_FILE).write_text("\n".join(labels) + "\n", encoding="utf-8")
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "architecture": architecture,
            "arguments": dict(arguments or {}),
            "weights": {"file": WEIGHTS_FILE, "sha256": file_sha256(staged / WEIGHTS_FILE)},
            "labels": LABELS_FILE,
            "input": _input_section(preprocessing),
        }
        text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)
        (staged / MANIFEST_FILE).write_text(text, encoding="utf-8")
        load_model(staged)
        shutil.move(staged, target)
    return target


def build_network(architecture: str, classes: int, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A network with untrained weights: a torchvision classification model by name, or `module:factory`.

    The factory is called with `num_classes=classes` and `arguments`. Raises ModelError.
    """
    given: dict[str, Any] = {"num_classes": classes}
    if ":" in architecture:
        factory = _import_factory(architecture)
    else:
        from torchvision import models as zoo

        if architecture not in zoo.list_models(module=zoo):
            raise ModelError(
                f"Architecture '{architecture}' is not a torchvision classification model; "
                "for your own network give 'module:factory'."
            )
        factory = zoo.get_model_builder(architecture)
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


def load_weights(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copy `state` into `network`; every tensor must have its place and shape. Raises WeightsError."""
    expected = network.state_dict()
    # torchvision's auxiliary heads serve training only: files without them are complete for prediction.
    missing = sorted(k for k in expected.keys() - state.keys() if not _training_only(k, state))
    unexpected = sorted(state.keys() - expected.keys())
    for what, keys in (("lack", missing), ("have unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WeightsError(f"Weights of model '{name}' {what} tensor '{keys[0]}'{more}.")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"Weights of model '{name}': tensor '{key}' has shape {tuple(tensor.shape)}, "
                f"the architecture has {tuple(expected[key].shape)}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"Weights of model '{name}': tensor '{key}' holds NaN or infinity.")
    network.load_state_dict(dict(state), strict=False)


def _training_only(key: str, state: Mapping[str, Tensor]) -> bool:
    head = re.match(r"(aux\d|AuxLogits)\.", key)
    if head:
        return not any(k.startswith(head.group(0)) for k in state)
    return key.endswith("num_batches_tracked")


def _import_factory(architecture: str) -> Any:
    module_name, _, attribute = architecture.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise ModelError(
            f"Architecture '{architecture}' cannot be imported ({type(error).__name__}: {error}); "
            "is its folder on the Python path?"
        ) from error
    return factory


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"Model manifest '{path}' cannot be read: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise ModelError(f"Model manifest '{path}' has format version {found!r}; this library reads {FORMAT_VERSION}.")
    for key, kind in {"name": str, "architecture": str, "weights": dict, "labels": str, "input": dict}.items():
        if not isinstance(manifest.get(key), kind):
            raise ModelError(f"Model manifest '{path}': '{key}' is {manifest.get(key)!r}, expected a {kind.__name__}.")
    files = [manifest["weights"].get("file"), manifest["labels"]]
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"Model manifest '{path}': {file!r} is not the name of a file beside it.")
    if not isinstance(manifest["weights"].get("sha256"), str):
        raise ModelError(f"Model manifest '{path}': 'weights' has no sha256.")
    return manifest


def _preprocessing(name: str, section: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    try:
        return Preprocessing(**values)
    except TypeError as error:
        raise ModelError(f"Model '{name}': 'input' is malformed: {error}.") from error


def _input_section(preprocessing: Preprocessing) -> dict[str, Any]:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(preprocessing).items()}
    unused: tuple[str, ...] = ("resize",) if preprocessing.rule != "shorter_side" else ()
    unused += ("min_side", "max_side") if preprocessing.rule != "native" else ()
    return {key: value for key, value in values.items() if key not in unused}


def _read_labels(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class ids (none, or one a class) and names."""
    lines = read_lines(path)
    _check_labels(path.name, lines)
    split = [_LABEL_WITH_ID.fullmatch(line) for line in lines]
    if all(split):
        pairs = [(m["id"] or m["wnid"], m["name"] or m["names"]) for m in split if m]
        return tuple(i for i, _ in pairs), tuple(n for _, n in pairs)
    return (), tuple(lines)


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 labels file, a byte order mark left out. Raises ModelError."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(f"Labels file '{path}' cannot be read: {error}.") from error


def _check_answer(network: nn.Module, name: str, classes: int, preprocessing: Preprocessing) -> None:
    """One empty image through the network: it must answer with one logit a class. Raises ModelError."""
    try:
        with torch.inference_mode():
            answer = network.eval()(torch.zeros(1, 3, *preprocessing.size))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise ModelError(f"Model '{name}' fails on an image of shape (1, 3, {preprocessing.size}): {found}") from error
    if not isinstance(answer, Tensor) or tuple(answer.shape) != (1, classes):
        found = str(tuple(answer.shape)) if isinstance(answer, Tensor) else type(answer).__name__
        raise ModelError(f"Model '{name}' answers one image with {found}, expected logits of shape (1, {classes}).")


def _check_labels(name: str, labels: Sequence[str]) -> None:
    if not labels:
        raise ModelError(f"'{name}' has no labels.")
    for number, label in enumerate(labels):
        if not label.strip() or len(label.splitlines()) != 1:
            raise ModelError(f"'{name}': label {number} is {label!r}, expected one line of text.")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"Weights file '{path}' does not exist.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"Weights file '{path.name}' is not a safetensors file: {error}.") from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"Weights file '{path.name}' holds more than tensors, which may run code when read; "
            "save its state dict alone."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        found = f"{type(error).__name__} {error}".strip()
        raise WeightsError(f"Weights file '{path.name}' is not a PyTorch state dict: {found}.") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"Weights file '{path.name}' is not a state dict of tensors.")
    # DataParallel and DistributedDataParallel put this before every name.
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _next_version(root: Path) -> int:
    numbers = [int(p.name) for p in root.iterdir() if is_version(p.name)] if root.is_dir() else []
    return max(numbers, default=0) + 1
