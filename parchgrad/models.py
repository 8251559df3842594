"""A model package: architecture, weights, labels and preprocessing in one folder, checked when loaded.

`models/<name>/<version>/` holds `model.yaml`, `labels.txt` and `weights.safetensors`, or for an exported program
`program.pt2`, which is its own architecture. Nothing in it is ever unpickled; `.pth` files are read once, by
`add_model`, with `weights_only=True`.
"""

from __future__ import annotations

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

from parchgrad.architectures import Published, build_network, published
from parchgrad.errors import ModelError, UnsupportedModelError, WeightsError
from parchgrad.files import file_sha256, write_tensors
from parchgrad.labels import class_index
from parchgrad.layers import convolutions
from parchgrad.preprocessing import Preprocessing
from parchgrad.programs import is_program, load_program, read_reduced, reduce_program
from parchgrad.versions import is_version, resolve_version

FORMAT_VERSION = 1
MANIFEST_FILE = "model.yaml"
WEIGHTS_FILE = "weights.safetensors"
PROGRAM_FILE = "program.pt2"
LABELS_FILE = "labels.txt"

# The architecture of an exported program, which brings its own.
PROGRAM = "program"

# What most classification networks are evaluated with, where nothing says otherwise.
_COMMON_INPUT: dict[str, Any] = {"size": (224, 224), "rule": "shorter_side", "resize": 256}

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
    weights_source: str = ""  # where the weights came from when the package was made, in words

    def class_index(self, target: object) -> int:
        """Index of a class given by index, name or class id, or by index written as text.

        Where two classes share a name, the name means the first. Raises UnknownTargetError.
        """
        return class_index(target, self.labels, self.class_ids)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Load and check the package at `path`: a version folder, or its parent (then the highest version).

    A package whose architecture is `module:factory` runs that code, with the `arguments` that the package gives:
    trust it as you trust code. Other packages run none of their own. Raises ModelError or WeightsError naming
    what does not hold: missing files, format version, checksum, number of labels, tensors that do not fit the
    architecture.
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
    if manifest["architecture"] == PROGRAM:
        module: nn.Module = load_program(weights)
    else:
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
        weights_source=str(manifest["weights"].get("source", "")),
    )


def add_model(
    name: str,
    *,
    architecture: str | None = None,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    models_dir: str | os.PathLike[str] = "models",
    version: int | None = None,
) -> Path:
    """Write a model package and return its folder; it loads, or nothing is left behind.

    `architecture` is a torchvision classification model (default: the one called `name`), `timm/NAME`,
    `module:factory`, or `program`, the default where `weights` is an exported program (`.pt2`).
    `weights` is a `.safetensors` file, a `.pth`/`.pt` state dict (read with `weights_only=True`), a state
    dict, or a program. A label is a name, or `id<tab>name`, or a WordNet id, a space and a name.
    What is left out is what the architecture's publisher gives (`architectures.published`): weights are
    downloaded; labels; preprocessing, of which a mapping replaces single fields. `pretrained` chooses among what
    torchvision publishes: with `weights` given, labels and preprocessing alone. `arguments` are passed to the
    architecture's factory beside `num_classes`. `version` defaults to one above the highest there is. Raises
    ModelError or WeightsError.
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
    file = None if weights is None or isinstance(weights, Mapping) else Path(weights)
    if architecture is None:
        architecture = PROGRAM if file is not None and is_program(file) else name
    if labels is not None:
        _check_labels(name, labels)
    if architecture == PROGRAM:
        made = _of_program(name, file, labels, preprocessing, pretrained, arguments)
    else:
        made = _of_architecture(name, architecture, weights, labels, preprocessing, pretrained, arguments)
    _check_convolutions(name, made.network)
    _check_answer(made.network, name, len(made.labels), made.preprocessing)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".adding-") as temporary:
        staged = Path(temporary) / str(number)
        staged.mkdir()
        if isinstance(made.content, bytes):
            weights_file = PROGRAM_FILE
            (staged / weights_file).write_bytes(made.content)
        else:
            weights_file = WEIGHTS_FILE
            write_tensors(staged / weights_file, made.content)
        (staged / LABELS_FILE).write_text("\n".join(made.labels) + "\n", encoding="utf-8")
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "architecture": architecture,
            "arguments": dict(arguments or {}),
            "weights": {"file": weights_file, "sha256": file_sha256(staged / weights_file), "source": made.source},
            "labels": LABELS_FILE,
            "input": _input_section(made.preprocessing),
        }
        text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)
        (staged / MANIFEST_FILE).write_text(text, encoding="utf-8")
        load_model(staged)
        shutil.move(staged, target)
    return target


@dataclass(frozen=True)
class _Made:
    """What a package is written from, checked as far as its parts go."""

    network: nn.Module
    content: Mapping[str, Tensor] | bytes  # the state dict, or a reduced program
    source: str
    labels: Sequence[str]
    preprocessing: Preprocessing


def _of_architecture(
    name: str,
    architecture: str,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None,
    labels: Sequence[str] | None,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
    pretrained: str | None,
    arguments: Mapping[str, Any] | None,
) -> _Made:
    file = None if weights is None or isinstance(weights, Mapping) else Path(weights)
    given = None if weights is None else file.name if file is not None else ""
    offer = published(architecture, pretrained, given)
    known = labels if labels is not None else offer.labels if offer is not None else None
    if known is None:
        raise ModelError(f"Model '{name}': architecture '{architecture}' comes without labels; give them (--labels).")
    if isinstance(weights, Mapping):
        state, source = dict(weights), "a state dict"
    elif file is not None:
        if is_program(file):
            raise ModelError(f"Model '{name}': '{file.name}' is an exported program; its architecture is '{PROGRAM}'.")
        state, source = _read_weights(file), f"file {file.name}"
    elif offer is not None:
        state, source = offer.download(), offer.source
    else:
        raise ModelError(
            f"Model '{name}': architecture '{architecture}' comes without weights; give them (--weights FILE)."
        )
    network = build_network(architecture, len(known), arguments or {})
    if labels is None and offer is not None:
        _check_published_labels(network, state, name, offer)
    load_weights(network, state, name)
    return _Made(network, state, source, known, _combined(offer.preprocessing if offer else {}, preprocessing))


def _of_program(
    name: str,
    file: Path | None,
    labels: Sequence[str] | None,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
    pretrained: str | None,
    arguments: Mapping[str, Any] | None,
) -> _Made:
    if file is None or not is_program(file):
        raise ModelError(f"Model '{name}': architecture '{PROGRAM}' is an exported program; give its .pt2 as weights.")
    if labels is None:
        raise ModelError(f"Model '{name}': an exported program comes without labels; give them (--labels).")
    if pretrained is not None or arguments:
        raise ModelError(f"Model '{name}': an exported program takes neither arguments nor the name of weights.")
    content = reduce_program(file)
    program = read_reduced(content, file.name)
    _check_finite(program.state_dict(), name)
    size = program.sides.only
    own = {} if size is None else {"size": size, "resize": round(max(size) * 256 / 224)}
    return _Made(program, content, f"file {file.name}", labels, _combined(own, preprocessing))


def _combined(base: Mapping[str, Any], changes: Preprocessing | Mapping[str, Any] | None) -> Preprocessing:
    """The published preprocessing with single fields replaced; a new size takes `resize` along in proportion."""
    if isinstance(changes, Preprocessing):
        return changes
    fields = {**_COMMON_INPUT, **base, **(changes or {})}
    given = changes or {}
    if fields["rule"] in ("stretch", "native"):
        fields["resize"] = None
    elif "resize" not in given and ("size" in given or fields["resize"] is None):
        before = {**_COMMON_INPUT, **base}
        share = before["resize"] / max(before["size"]) if before["resize"] is not None else 256 / 224
        fields["resize"] = round(max(fields["size"]) * share)
    try:
        return Preprocessing(**fields)
    except TypeError as error:
        raise ModelError(f"Preprocessing: {error}.") from error


def _check_published_labels(network: nn.Module, state: Mapping[str, Tensor], name: str, offer: Published) -> None:
    """Weights of another number of classes than the published labels: say so. Raises WeightsError."""
    classes = len(offer.labels or ())
    for key, expected in network.state_dict().items():
        found = state.get(key)
        if found is None or found.shape == expected.shape or not expected.shape or not found.shape:
            continue
        if expected.shape[0] == classes and found.shape[1:] == expected.shape[1:]:
            raise WeightsError(
                f"Weights of model '{name}' are for {found.shape[0]} classes ('{key}'), the labels of {offer.source} "
                f"are {classes}; give the labels of your own classes (--labels)."
            )


def _check_convolutions(name: str, network: nn.Module) -> None:
    if not convolutions(network):
        raise UnsupportedModelError(
            f"Model '{name}' has no convolution module, so no channels to select: ParchGrad explains CNNs."
        )


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
    _check_finite(state, name)
    network.load_state_dict(dict(state), strict=False)


def _check_finite(state: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"Weights of model '{name}': tensor '{key}' holds NaN or infinity.")


def _training_only(key: str, state: Mapping[str, Tensor]) -> bool:
    head = re.match(r"(aux\d|AuxLogits)\.", key)
    if head:
        return not any(k.startswith(head.group(0)) for k in state)
    return key.endswith("num_batches_tracked")


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
    """Empty images through the network: it must answer with one logit a class, for one image and for two.

    Raises ModelError.
    """
    for batch, many in ((1, "one image"), (2, "two images")):
        shape = (batch, 3, *preprocessing.size)
        try:
            with torch.inference_mode():
                answer = network.eval()(torch.zeros(shape))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise ModelError(f"Model '{name}' fails on {many} of shape {shape}: {found}") from error
        if not isinstance(answer, Tensor) or tuple(answer.shape) != (batch, classes):
            found = str(tuple(answer.shape)) if isinstance(answer, Tensor) else type(answer).__name__
            expected = (batch, classes)
            raise ModelError(f"Model '{name}' answers {many} with {found}, expected logits of shape {expected}.")


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
