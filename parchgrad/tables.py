"""A selection table: per layer, class and channel, how strongly the channel belongs to the class.

Holds, validates, saves and loads tables and chooses channels from them (method.md section 1). It runs no
model. On disk a table is a folder with `table.safetensors`, tensors named `<layer>/<field>`, and
`manifest.json`, everything a reader needs to trust them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from parchgrad.errors import OptionError, TableError, UncoveredTargetError
from parchgrad.files import file_sha256, write_tensors, write_text
from parchgrad.layers import convolutions, match
from parchgrad.rule import CONSERVE, is_gamma
from parchgrad.statistics import ClassMoments, normality_p, ranks, welch_log_p
from parchgrad.versions import resolve_version

FORMAT_VERSION = 1
TENSORS_FILE = "table.safetensors"
MANIFEST_FILE = "manifest.json"

# Channels whose GAP features pass Shapiro-Wilk at this level are not selectable (method.md section 1).
NORMALITY_LEVEL = 0.05

SELECTIONS = ("class", "instance")

Quantile = float | Mapping[str, float]


class TableModel(Protocol):
    """What a table needs to know of the model it belongs to."""

    @property
    def name(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def module(self) -> nn.Module: ...


@dataclass(frozen=True)
class Defaults:
    """The options an explanation takes where the caller leaves them out."""

    quantile: Quantile = 0.1
    gamma: float = math.inf
    conserve: str = "independent"
    selection: str = "class"
    layers: tuple[str, ...] = ("*",)
    normality_filter: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gamma": "inf" if math.isinf(self.gamma) else self.gamma, "layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Defaults:
        return cls(**{**data, "gamma": float(data["gamma"]), "layers": tuple(data["layers"])})


@dataclass(frozen=True)
class LayerTable:
    """One layer's rows: `K` covered classes (in the table's order), `C` channels; CPU tensors."""

    log_p: Tensor  # (K, C) float64: one-sided Welch log p-values
    rank: Tensor  # (K, C) int16: 0 = smallest log p; ties by t statistic, then channel index
    mean: Tensor  # (C,) float64: GAP feature over all the table's images
    std: Tensor  # (C,) float64: its sample standard deviation
    normality_p: Tensor | None = None  # (C,) float64: Shapiro-Wilk

    @property
    def channels(self) -> int:
        return int(self.log_p.shape[1])

    @classmethod
    def from_moments(cls, moments: ClassMoments, subsample: np.ndarray[Any, Any] | None = None) -> LayerTable:
        """`moments` of the covered classes; `subsample` `(n, C)` GAP features for the normality test."""
        t, log_p = welch_log_p(moments)
        count, mean, m2 = moments.total()
        return cls(
            log_p=torch.from_numpy(log_p),
            rank=torch.from_numpy(ranks(log_p, t)),
            mean=torch.from_numpy(mean),
            std=torch.from_numpy(np.sqrt(m2 / (count - 1))),
            normality_p=None if subsample is None else torch.from_numpy(normality_p(subsample)),
        )


@dataclass(frozen=True)
class SelectionTable:
    """The rows of every layer, whose model they belong to, and how they came about.

    `classes` are the model's class indices that have rows, in row order: a table may cover only some of
    the model's classes. `labels` is the model's whole class order.
    """

    name: str
    model_name: str
    weights_sha256: str
    labels: tuple[str, ...]
    classes: tuple[int, ...]
    layers: dict[str, LayerTable]
    images_per_class: tuple[int, ...]
    built: dict[str, Any] = field(default_factory=dict)
    defaults: Defaults = Defaults()
    version: str = "1"
    idle_layers: tuple[str, ...] = ()  # convolutions that run only in training, such as auxiliary heads
    table_sha256: str = ""
    folder: Path | None = None

    def __post_init__(self) -> None:
        _check_contents(self)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.layers)

    @cached_property
    def row_of_class(self) -> Tensor:
        """`(number of labels,)` long: each class's row, -1 where the table has none."""
        rows = torch.full((len(self.labels),), -1, dtype=torch.long)
        rows[list(self.classes)] = torch.arange(len(self.classes))
        return rows

    def rows(self, targets: Tensor) -> Tensor:
        """Row of each target class `(batch,)`. Raises UncoveredTargetError where there is none."""
        rows = self.row_of_class[targets.cpu()]
        if bool((rows < 0).any()):
            missing = sorted({int(t) for t in targets[(rows < 0).to(targets.device)]})
            raise UncoveredTargetError(
                f"Table '{self.name}' covers {len(self.classes)} of the model's {len(self.labels)} classes; "
                f"it has no row for target {', '.join(f'{t} ({self.labels[t]})' for t in missing)}."
            )
        return rows

    def with_defaults(self, **changes: Any) -> SelectionTable:
        """The same rows under other defaults."""
        return replace(self, defaults=replace(self.defaults, **changes))

    def check_model(self, model: TableModel) -> None:
        """Raise TableError unless this table was built for exactly this model."""
        self._expect("model", self.model_name, model.name)
        self._expect("weights_sha256", self.weights_sha256, model.weights_sha256)
        self._expect_labels(model.labels)
        self.check_layers(model.module)

    def check_layers(self, module: nn.Module) -> None:
        """Raise TableError unless the layers are the convolutions of `module`, with as many channels."""
        found = convolutions(module)
        for name in found:
            if name not in self.layers and name not in self.idle_layers:
                raise TableError(f"Table '{self.name}' has no layer '{name}', a convolution of the model.")
        for name, layer in self.layers.items():
            if name not in found:
                raise TableError(f"Table '{self.name}': layer '{name}' is not a convolution of the model.")
            if layer.channels != found[name]:
                raise TableError(
                    f"Table '{self.name}': layer '{name}' has {layer.channels} channels, the model has {found[name]}."
                )

    def save(self, folder: str | os.PathLike[str]) -> SelectionTable:
        """Write `table.safetensors` and `manifest.json` into `folder`; an existing table is replaced.

        Each is written beside its place and renamed, tensors first: a crash in between leaves the old
        manifest, whose digest then refuses the new tensors, never a table that loads half new.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS_FILE, _tensors(self))
        saved = replace(self, table_sha256=file_sha256(folder / TENSORS_FILE), folder=folder)
        write_text(folder / MANIFEST_FILE, json.dumps(saved.manifest(), indent=1, ensure_ascii=False) + "\n")
        return saved

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds: JSON types only."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "version": self.version,
            "model": {"name": self.model_name, "weights_sha256": self.weights_sha256},
            "table_sha256": self.table_sha256,
            "layers": [{"name": name, "channels": layer.channels} for name, layer in self.layers.items()],
            "idle_layers": list(self.idle_layers),
            "labels": list(self.labels),
            "classes": list(self.classes),
            "images_per_class": list(self.images_per_class),
            "defaults": self.defaults.to_json(),
            "built": self.built,
        }

    @classmethod
    def random(
        cls,
        model: TableModel | nn.Module,
        classes: int | Sequence[int],
        seed: int,
        idle_layers: Sequence[str] = (),
        labels: Sequence[str] | None = None,
    ) -> SelectionTable:
        """The control: every class's channels in an order drawn from `seed`, of no meaning at all.

        `model` is a model package or a bare module; `classes` is how many, or which, class indices;
        `idle_layers` are convolutions to leave out because they take no part in prediction; `labels` are a
        bare module's classes, where it has more than `classes` names. The p-values are the normalised ranks.
        Mean 0 and std 1 stand in for feature statistics, so only class-wise selection is random.
        """
        module = network_of(model)
        indices = tuple(range(classes)) if isinstance(classes, int) else tuple(classes)
        if not indices:
            raise OptionError("classes", classes, "at least one class")
        package = None if isinstance(model, nn.Module) else model
        if labels is None:
            labels = package.labels if package else [str(i) for i in range(max(indices) + 1)]
        generator = np.random.default_rng(seed)
        layers = {}
        for name, channels in convolutions(module).items():
            if name in idle_layers:
                continue
            rank = np.argsort(generator.random((len(indices), channels)), axis=1).astype(np.int16)
            layers[name] = LayerTable(
                log_p=torch.from_numpy(np.log((rank + 1.0) / channels)),
                rank=torch.from_numpy(rank),
                mean=torch.zeros(channels, dtype=torch.float64),
                std=torch.ones(channels, dtype=torch.float64),
            )
        return cls(
            name="random",
            model_name=package.name if package else "",
            weights_sha256=package.weights_sha256 if package else "",
            labels=tuple(labels),
            classes=indices,
            layers=layers,
            images_per_class=(0,) * len(indices),
            built={"by": "random", "seed": seed},
            idle_layers=tuple(idle_layers),
        )

    def _expect(self, what: str, of_table: object, of_model: object) -> None:
        if of_table != of_model:
            raise TableError(f"Table '{self.name}': {what} is {of_table!r}, the model's is {of_model!r}.")

    def _expect_labels(self, labels: Sequence[str]) -> None:
        self._expect("number of classes", len(self.labels), len(labels))
        for index, (mine, theirs) in enumerate(zip(self.labels, labels, strict=True)):
            self._expect(f"class {index}", mine, theirs)


def quantile_of_layers(quantile: Quantile, names: Sequence[str]) -> dict[str, float]:
    """Each layer's quantile: one number for all, or by glob pattern, the first that fits deciding.

    Raises OptionError for a pattern that fits no layer and for a layer that fits no pattern.
    """
    if not isinstance(quantile, Mapping):
        return dict.fromkeys(names, float(quantile))
    chosen: dict[str, float] = {}
    for pattern, value in quantile.items():
        for name in match(names, [pattern], option="quantile"):
            chosen.setdefault(name, float(value))
    for name in names:
        if name not in chosen:
            raise OptionError("quantile", dict(quantile), f"a value for every layer; '{name}' has none")
    return chosen


def network_of(model: TableModel | nn.Module) -> nn.Module:
    """The network of a model package, or the bare module itself."""
    return model if isinstance(model, nn.Module) else model.module


def load_table(path: str | os.PathLike[str], model: TableModel | None = None) -> SelectionTable:
    """Read and check the table at `path`: a version folder, or its parent (then the highest version).

    Raises TableError naming what does not hold: missing files, format version, digest, layers, shapes,
    types, ranks that are no permutation, NaN; with `model`, also anything that is not that model's.
    """
    folder = resolve_version(Path(path), MANIFEST_FILE, TableError)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    tensors_path = folder / TENSORS_FILE
    if not tensors_path.is_file():
        raise TableError(f"Table folder '{folder}' has no {TENSORS_FILE}.")
    digest = file_sha256(tensors_path)
    name = manifest["name"]
    if digest != manifest["table_sha256"]:
        expected = manifest["table_sha256"]
        raise TableError(f"Table '{name}': {TENSORS_FILE} has sha256 {digest}, its manifest says {expected}.")
    try:
        table = SelectionTable(
            name=name,
            version=manifest["version"],
            model_name=manifest["model"]["name"],
            weights_sha256=manifest["model"]["weights_sha256"],
            labels=tuple(manifest["labels"]),
            classes=tuple(manifest["classes"]),
            layers=_layers(name, manifest["layers"], load_file(tensors_path)),
            images_per_class=tuple(manifest["images_per_class"]),
            built=manifest["built"],
            defaults=Defaults.from_json(manifest["defaults"]),
            idle_layers=tuple(manifest["idle_layers"]),
            table_sha256=digest,
            folder=folder,
        )
    except SafetensorError as error:
        raise TableError(f"Table '{name}': {TENSORS_FILE} is not a safetensors file ({error}).") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"Table '{name}': {MANIFEST_FILE} is malformed: {type(error).__name__} {error}.") from error
    if model is not None:
        table.check_model(model)
    return table


_REQUIRED_KEYS = (
    *("format_version", "name", "version", "model", "table_sha256", "layers", "idle_layers"),
    *("labels", "classes", "images_per_class", "defaults", "built"),
)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"Table manifest '{path}' cannot be read: {error}.") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise TableError(f"Table manifest '{path}' has no format_version.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise TableError(
            f"Table manifest '{path}' has format version {manifest['format_version']!r}; "
            f"this library reads {FORMAT_VERSION}."
        )
    if missing := [key for key in _REQUIRED_KEYS if key not in manifest]:
        raise TableError(f"Table manifest '{path}' has no '{missing[0]}'.")
    return manifest


def _tensors(table: SelectionTable) -> dict[str, Tensor]:
    return {
        f"{name}/{field_name}": tensor
        for name, layer in table.layers.items()
        for field_name, tensor in vars(layer).items()
        if tensor is not None
    }


_FIELDS = ("log_p", "rank", "mean", "std", "normality_p")


def _layers(table: str, entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, LayerTable]:
    """The layers the manifest lists, in its order, and no others."""
    names = [entry["name"] for entry in entries]
    if len(set(names)) != len(names):
        raise TableError(f"Table '{table}': its manifest lists a layer twice.")
    stored = {key.rpartition("/")[0] for key in tensors}
    if unlisted := sorted(stored - set(names)):
        raise TableError(f"Table '{table}': layer '{unlisted[0]}' of {TENSORS_FILE} is not in its manifest.")
    layers = {}
    for entry in entries:
        name = entry["name"]
        for required in _FIELDS[:-1]:
            if f"{name}/{required}" not in tensors:
                raise TableError(f"Table '{table}': layer '{name}' has no '{required}' in {TENSORS_FILE}.")
        layers[name] = LayerTable(**{f: tensors[f"{name}/{f}"] for f in _FIELDS if f"{name}/{f}" in tensors})
        found = tuple(layers[name].log_p.shape)
        if found[1:] != (entry["channels"],):
            raise TableError(
                f"Table '{table}': layer '{name}' has log_p of shape {found}, "
                f"its manifest says {entry['channels']} channels."
            )
    return layers


def _check_contents(table: SelectionTable) -> None:
    """Shapes, types and values of everything; raises TableError."""
    if not table.layers:
        raise TableError(f"Table '{table.name}' has no layers.")
    if len(set(table.classes)) != len(table.classes) or not table.classes:
        raise TableError(f"Table '{table.name}': classes are empty or repeat: {list(table.classes)[:20]}.")
    if outside := [c for c in table.classes if not 0 <= c < len(table.labels)]:
        raise TableError(f"Table '{table.name}': class {outside[0]} is outside 0..{len(table.labels) - 1}.")
    if len(table.images_per_class) != len(table.classes):
        raise TableError(
            f"Table '{table.name}': images_per_class has {len(table.images_per_class)} entries, "
            f"expected {len(table.classes)}."
        )
    for name, layer in table.layers.items():
        _check_layer(table, name, layer)
    tested = all(layer.normality_p is not None for layer in table.layers.values())
    check_defaults(table.name, table.defaults, table.layers, tested=tested)


def check_defaults(table: str, d: Defaults, names: Iterable[str], *, tested: bool) -> None:
    """The defaults must be legal options and name layers of the table: found here, not at a request.

    `tested`: whether the table holds normality tests. Raises TableError.
    """
    try:
        quantile_of_layers(d.quantile, match(names, d.layers))
        values = d.quantile.values() if isinstance(d.quantile, Mapping) else (d.quantile,)
        legal = {
            "quantile": all(0 < float(value) <= 1 for value in values),
            "gamma": is_gamma(d.gamma),
            "conserve": d.conserve in CONSERVE,
            "selection": d.selection in SELECTIONS,
            "normality_filter": isinstance(d.normality_filter, bool) and (tested or not d.normality_filter),
        }
    except (OptionError, TypeError, ValueError) as error:
        raise TableError(f"Table '{table}': its defaults do not fit: {error}") from error
    for name, fine in legal.items():
        if not fine:
            raise TableError(f"Table '{table}': default {name} is {getattr(d, name)!r}, which is not allowed.")


def _check_layer(table: SelectionTable, name: str, layer: LayerTable) -> None:
    where = f"Table '{table.name}': layer '{name}'"
    rows, channels = len(table.classes), layer.log_p.shape[-1] if layer.log_p.dim() else 0
    expected = {
        "log_p": ((rows, channels), torch.float64),
        "rank": ((rows, channels), torch.int16),
        "mean": ((channels,), torch.float64),
        "std": ((channels,), torch.float64),
        "normality_p": ((channels,), torch.float64),
    }
    for field_name, (shape, dtype) in expected.items():
        tensor = getattr(layer, field_name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise TableError(f"{where}: '{field_name}' is {found}, expected {dtype} {shape}.")
        if bool(torch.isnan(tensor).any()):
            raise TableError(f"{where}: '{field_name}' holds NaN.")
    if not bool(torch.isfinite(layer.mean).all() & torch.isfinite(layer.std).all() & (layer.std >= 0).all()):
        raise TableError(f"{where}: 'mean' and 'std' are not all finite, or a std is negative.")
    if bool((layer.log_p > 0).any()):
        raise TableError(f"{where}: a log p-value is positive, {float(layer.log_p.max())}.")
    order = layer.rank.long().sort(dim=1).values
    if not bool((order == torch.arange(channels)).all()):
        raise TableError(f"{where}: 'rank' is not an order of its {channels} channels in every row.")
    by_rank = layer.log_p.gather(1, layer.rank.long().argsort(dim=1))
    # Compared, not subtracted: -inf minus -inf would be NaN.
    if bool((by_rank[:, 1:] < by_rank[:, :-1]).any()):
        raise TableError(f"{where}: 'rank' does not follow the log p-values.")
