"""A selection table: per layer, class and channel, how strongly the channel belongs to the class.

Holds, validates, saves and loads tables (method.md section 1). It runs no model. On disk a table is a folder with
`table.safetensors`, one tensor a field with the channels of all layers side by side, so that a class's ranks are one
piece of the file, and `manifest.json`, everything a reader needs to trust them. The tensors are mapped into
memory, not read: a table costs what is used of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from parchgrad.defaults import CONSERVE, SELECTIONS, Defaults, is_gamma
from parchgrad.errors import OptionError, TableError
from parchgrad.files import file_sha256, write_tensors, write_text
from parchgrad.labels import no_row_for
from parchgrad.layers import convolutions
from parchgrad.patterns import match
from parchgrad.quantiles import quantile_of_layers
from parchgrad.statistics import ClassMoments, benjamini_hochberg, normality_p, ranks, welch_log_p
from parchgrad.versions import resolve_version

FORMAT_VERSION = 2
TENSORS_FILE = "table.safetensors"
MANIFEST_FILE = "manifest.json"

# Channels whose GAP features pass Shapiro-Wilk at this level are not selectable (method.md section 1).
NORMALITY_LEVEL = 0.05

# Where a GAP feature is taken: of the convolution's own output (the paper's), or of what the network's own
# normalisation and activation make of it, as far as they follow alone (`built["points"]`, layer by layer).
STATISTICS_POINTS = ("convolution", "activation")

# What stands for the p-values: as they are, or adjusted for the false discovery rate within class and layer.
CONTROLS = ("none", "benjamini_hochberg")


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
    def from_moments(
        cls, moments: ClassMoments, sample: np.ndarray[Any, Any] | None = None, control: str = "none"
    ) -> LayerTable:
        """`moments` of the covered classes; `sample` `(n, C)` GAP features for the normality test.

        `control` `benjamini_hochberg` replaces each class's p-values by those adjusted for the layer's number of
        channels (false discovery rate); the order of the channels stays.
        """
        t, log_p = welch_log_p(moments)
        total = moments.total()
        return cls(
            log_p=torch.from_numpy(benjamini_hochberg(log_p) if control == "benjamini_hochberg" else log_p),
            rank=torch.from_numpy(ranks(log_p, t)),
            mean=torch.from_numpy(total.mean()[0]),
            std=torch.from_numpy(np.sqrt(total.m2()[0] / (total.count[0] - 1))),
            normality_p=None if sample is None else torch.from_numpy(normality_p(sample)),
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
    defaults: Defaults = field(default_factory=Defaults)
    version: str = "1"
    idle_layers: tuple[str, ...] = ()  # convolutions that run only in training, such as auxiliary heads
    left_out: tuple[str, ...] = ()  # convolutions that whoever built the table left out of it
    statistics_point: str = "convolution"  # one of STATISTICS_POINTS
    table_sha256: str = ""
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 of the files that lie beside it, by name
    folder: Path | None = None

    def __post_init__(self) -> None:
        _check_structure(self)

    @property
    def in_folder(self) -> Path:
        """The folder it was loaded from or saved to. Raises TableError where there is none."""
        if self.folder is None:
            raise TableError(f"Table '{self.name}' was not loaded from a folder.")
        return self.folder

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.layers)

    @cached_property
    def rank(self) -> Tensor:
        """Ranks of all layers side by side, `(K, N)` int16, in the order of `layers`."""
        return _side_by_side([layer.rank for layer in self.layers.values()])

    @property
    def normality_tested(self) -> bool:
        """Whether every layer has Shapiro-Wilk p-values."""
        return all(layer.normality_p is not None for layer in self.layers.values())

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
            raise no_row_for(missing, self.name, len(self.classes), self.labels)
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
            if name not in self.layers and name not in self.idle_layers and name not in self.left_out:
                raise TableError(f"Table '{self.name}' has no layer '{name}', a convolution of the model.")
        for name, layer in self.layers.items():
            if name not in found:
                raise TableError(f"Table '{self.name}': layer '{name}' is not a convolution of the model.")
            if layer.channels != found[name]:
                raise TableError(
                    f"Table '{self.name}': layer '{name}' has {layer.channels} channels, the model has {found[name]}."
                )

    def check_values(self) -> None:
        """Raise TableError for NaN, ranks that are no order or do not follow the p-values, p above 1.

        Reads the whole table, which opening it does not.
        """
        for name, layer in self.layers.items():
            _check_values(f"Table '{self.name}': layer '{name}'", layer)

    def save(self, folder: str | os.PathLike[str]) -> SelectionTable:
        """Write `table.safetensors` and `manifest.json` into `folder`; an existing table is replaced.

        Each is written beside its place and renamed, tensors first: a crash in between leaves the old
        manifest, whose digest then refuses the new tensors, never a table that loads half new. To replace
        the whole folder or nothing, save into a `files.new_folder`. Raises TableError for values that no table
        has.
        """
        self.check_values()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS_FILE, _tensors(self), {"layers": json.dumps(_layout(self))})
        return replace(self, table_sha256=file_sha256(folder / TENSORS_FILE), folder=folder).save_manifest()

    def save_manifest(self) -> SelectionTable:
        """Write `manifest.json` alone into the table's folder, with the digests of what lies beside it now."""
        beside = sorted(p for p in self.in_folder.iterdir() if p.name not in (TENSORS_FILE, MANIFEST_FILE))
        saved = replace(self, files={path.name: file_sha256(path) for path in beside if path.is_file()})
        write_text(self.in_folder / MANIFEST_FILE, json.dumps(saved.manifest(), indent=1, ensure_ascii=False) + "\n")
        return saved

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds: JSON types only."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "version": self.version,
            "model": {"name": self.model_name, "weights_sha256": self.weights_sha256},
            "table_sha256": self.table_sha256,
            "files": dict(self.files),
            "layers": [{"name": name, "channels": channels} for name, channels in _layout(self)],
            "idle_layers": list(self.idle_layers),
            "left_out": list(self.left_out),
            "statistics_point": self.statistics_point,
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


def network_of(model: TableModel | nn.Module) -> nn.Module:
    """The network of a model package, or the bare module itself."""
    return model if isinstance(model, nn.Module) else model.module


def load_table(path: str | os.PathLike[str], model: TableModel | None = None, *, mapped: bool = True) -> SelectionTable:
    """Read and check the table at `path`: a version folder, or its parent (then the highest version).

    The tensors are mapped, so that only what is used takes memory; with `mapped=False` they are copied, and whoever
    overwrites or cuts the file afterwards changes nothing. Raises TableError naming what does not hold: missing
    files, format version, digest, layers, shapes, types; with `model`, also anything that is not that model's. What
    the digest vouches for is what `save` checked; `check_values` checks it again.
    """
    for _ in range(TRIES):
        folder = resolve_version(Path(path), MANIFEST_FILE, TableError)
        try:
            table = _opened(folder, mapped)
        except _ReplacedError:
            continue  # by another process, between the reading of its two files
        if model is not None:
            table.check_model(model)
        return table
    raise TableError(f"Table '{path}' is replaced faster than it can be opened.")


TRIES = 5


class _ReplacedError(Exception):
    """What was read is of two tables."""


def _opened(folder: Path, mapped: bool) -> SelectionTable:
    manifest = _read_manifest(folder / MANIFEST_FILE)
    tensors_path = folder / TENSORS_FILE
    if not tensors_path.is_file():
        raise TableError(f"Table folder '{folder}' has no {TENSORS_FILE}.")
    name = manifest["name"]
    with tensors_path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = file_sha256(tensors_path)
        try:
            table = SelectionTable(
                name=name,
                version=manifest["version"],
                model_name=manifest["model"]["name"],
                weights_sha256=manifest["model"]["weights_sha256"],
                labels=tuple(manifest["labels"]),
                classes=tuple(manifest["classes"]),
                layers=_layers(name, manifest["layers"], tensors_path, mapped),
                images_per_class=tuple(manifest["images_per_class"]),
                built=manifest["built"],
                defaults=Defaults.from_json(manifest["defaults"]),
                idle_layers=tuple(manifest["idle_layers"]),
                left_out=tuple(manifest["left_out"]),
                statistics_point=manifest["statistics_point"],
                table_sha256=digest,
                files=dict(manifest["files"]),
                folder=folder,
            )
            problem: TableError | None = None
        except SafetensorError as error:
            problem = TableError(f"Table '{name}': {TENSORS_FILE} is not a safetensors file ({error}).")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = TableError(f"Table '{name}': {MANIFEST_FILE} is malformed: {type(error).__name__} {error}.")
        except TableError as error:
            problem = error
        # The held file cannot be reused: if the path still leads to it, all that was read is of it.
        if not _leads_to(tensors_path, before) or _read_manifest(folder / MANIFEST_FILE) != manifest:
            raise _ReplacedError
        if not mapped and file_sha256(tensors_path) != digest:
            raise _ReplacedError  # overwritten in place while it was copied
    if digest != manifest["table_sha256"]:
        expected = manifest["table_sha256"]
        raise TableError(f"Table '{name}': {TENSORS_FILE} has sha256 {digest}, its manifest says {expected}.")
    if problem is not None:
        raise problem
    return table


def _leads_to(path: Path, file: os.stat_result) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino)


_REQUIRED_KEYS = (
    *("format_version", "name", "version", "model", "table_sha256", "files", "layers", "idle_layers"),
    *("left_out", "statistics_point"),
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
            f"this library reads {FORMAT_VERSION}. Build it again: parchgrad table build NAME --data FOLDER."
        )
    if missing := [key for key in _REQUIRED_KEYS if key not in manifest]:
        raise TableError(f"Table manifest '{path}' has no '{missing[0]}'.")
    return manifest


_FIELDS = ("log_p", "rank", "mean", "std", "normality_p")


def _layout(table: SelectionTable) -> list[tuple[str, int]]:
    return [(name, layer.channels) for name, layer in table.layers.items()]


def _tensors(table: SelectionTable) -> dict[str, Tensor]:
    layers = table.layers.values()
    fields = _FIELDS if table.normality_tested else _FIELDS[:-1]
    return {f: _side_by_side([getattr(layer, f) for layer in layers]) for f in fields}


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """`(..., n1), (..., n2) ...` -> `(..., n1 + n2 + ...)`; no copy where they are neighbours in one tensor."""
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    rows = first.stride()[:-1]
    place = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        # A row as long as the parts together: nothing else can lie between them.
        if not same or part.storage_offset() != place or part.stride() != (*rows, 1) or (rows and rows[0] != width):
            return torch.cat(list(parts), dim=-1)
        place += part.shape[-1]
    return first.as_strided((*first.shape[:-1], width), first.stride())


def _layers(table: str, entries: Sequence[Mapping[str, Any]], path: Path, mapped: bool) -> dict[str, LayerTable]:
    """The layers the manifest lists, which must be those the tensors were written for, in order."""
    with safe_open(path, framework="pt") as file:
        written = [tuple(entry) for entry in json.loads((file.metadata() or {}).get("layers", "[]"))]
    listed = [(entry["name"], entry["channels"]) for entry in entries]
    if written != listed:
        theirs, ours = next(pair for pair in zip_longest(written, listed) if pair[0] != pair[1])
        raise TableError(f"Table '{table}': {TENSORS_FILE} has layer {theirs} where its manifest has {ours}.")
    if len({name for name, _ in listed}) != len(listed):
        raise TableError(f"Table '{table}': its manifest lists a layer twice.")
    tensors = load_file(path)
    if not mapped:
        tensors = {field_name: tensor.clone() for field_name, tensor in tensors.items()}
    width = sum(channels for _, channels in listed)
    for field_name in _FIELDS:
        if field_name not in tensors and field_name != "normality_p":
            raise TableError(f"Table '{table}' has no '{field_name}' in {TENSORS_FILE}.")
        if field_name in tensors and (found := tuple(tensors[field_name].shape))[-1:] != (width,):
            raise TableError(
                f"Table '{table}': '{field_name}' has shape {found}, its layers have {width} channels together."
            )
    layers, start = {}, 0
    for name, channels in listed:
        here = slice(start, start + channels)
        layers[name] = LayerTable(**{f: tensors[f][..., here] for f in _FIELDS if f in tensors})
        start += channels
    return layers


def _check_structure(table: SelectionTable) -> None:
    """Classes, shapes, types, what is small enough to look at whenever a table is opened; raises TableError."""
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
    if table.statistics_point not in STATISTICS_POINTS:
        raise TableError(
            f"Table '{table.name}': statistics_point is {table.statistics_point!r}, "
            f"expected one of {', '.join(STATISTICS_POINTS)}."
        )
    for name, layer in table.layers.items():
        _check_layer(table, name, layer)
    tested = {layer.normality_p is not None for layer in table.layers.values()}
    if len(tested) > 1:
        raise TableError(f"Table '{table.name}': some layers have normality tests and some have none.")
    check_defaults(table.name, table.defaults, table.layers, tested=tested == {True})
    if table.defaults.selection == "instance" and table.statistics_point != "convolution":
        raise TableError(f"Table '{table.name}': default selection 'instance' needs statistics of the convolution.")


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
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise TableError(f"{where}: '{field_name}' is {found}, expected {dtype} {shape}.")
    if not bool(torch.isfinite(layer.mean).all() & torch.isfinite(layer.std).all() & (layer.std >= 0).all()):
        raise TableError(f"{where}: 'mean' and 'std' are not all finite, or a std is negative.")
    if layer.normality_p is not None and bool(torch.isnan(layer.normality_p).any()):
        raise TableError(f"{where}: 'normality_p' holds NaN.")


def _check_values(where: str, layer: LayerTable) -> None:
    if bool(torch.isnan(layer.log_p).any()):
        raise TableError(f"{where}: 'log_p' holds NaN.")
    if bool((layer.log_p > 0).any()):
        raise TableError(f"{where}: a log p-value is positive, {float(layer.log_p.max())}.")
    order = layer.rank.argsort(dim=1)
    in_order = layer.rank.gather(1, order)
    if not bool((in_order == torch.arange(layer.channels, dtype=torch.int16)).all()):
        raise TableError(f"{where}: 'rank' is not an order of its {layer.channels} channels in every row.")
    by_rank = layer.log_p.gather(1, order)
    # Compared, not subtracted: -inf minus -inf would be NaN.
    if bool((by_rank[:, 1:] < by_rank[:, :-1]).any()):
        raise TableError(f"{where}: 'rank' does not follow the log p-values.")
