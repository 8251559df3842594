"""What an ONNX file of ours says about itself: its model, its table, how it was exported. Read and checked; no engine.

The file's metadata has one JSON object under the key `parchgrad`.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.defaults import CONSERVE, Defaults
from parchgrad.errors import ModelError, ParchGradError
from parchgrad.labels import class_index
from parchgrad.options import SEEDS
from parchgrad.patterns import match
from parchgrad.preprocessing import Preprocessing
from parchgrad.quantiles import quantile_of_layers

Array = NDArray[np.float32]

METADATA_KEY = "parchgrad"
FORMAT_VERSION = 1

# No graph weighs its gradient by evidence.
_SEEDS = tuple(seed for seed in SEEDS if seed != "evidence")


@dataclass(frozen=True)
class GraphModel:
    """The model package that the graph was exported from, without its weights."""

    name: str
    version: str
    architecture: str
    weights_sha256: str
    labels: tuple[str, ...]
    class_ids: tuple[str, ...]  # empty where the file gives none
    preprocessing: Preprocessing

    def class_index(self, target: object) -> int:
        """Index of a class given by index, name or class id, or by index as text. Raises UnknownTargetError."""
        return class_index(target, self.labels, self.class_ids)


@dataclass(frozen=True)
class GraphTable:
    """The selection table in the graph: which it is and what it covers; its ranks are the graph's own."""

    name: str
    version: str
    table_sha256: str
    defaults: Defaults  # `conserve` is the exported one
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    channels: dict[str, int]  # of each layer, in the table's order
    written: Mapping[str, Any] = field(repr=False)  # the table's manifest as the file has it, without labels

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.channels)

    def manifest(self) -> dict[str, Any]:
        """What the table's `manifest.json` held when the graph was exported: JSON types only."""
        return {**self.written, "labels": list(self.labels)}


@dataclass(frozen=True)
class GraphSettings:
    """What was fixed when the graph was exported."""

    backward: str  # `pruned` or `dense`
    conserve: str
    seed: str
    dtype: str  # of the weights
    opset: int
    layers: tuple[str, ...]  # in the order of the columns of the input `quantile`


@dataclass(frozen=True)
class GraphFeatures:
    """Where in the graph the table's GAP features are (graph/features.py), and their statistics; `N` channels."""

    ranks: str  # the table's ranks, `(rows, N)`
    tensors: tuple[str | None, ...]  # of each layer, in the table's order; None where its features are not known
    positive: tuple[bool, ...]  # whether only the tensor's positive part counts
    scale: Array  # (N,): what the tensor was multiplied by, after the feature's place
    shift: Array  # (N,): and what was then added
    mean: Array  # (N,)
    std: Array  # (N,); 0 where the channel is not compared


@dataclass(frozen=True)
class GraphMetadata:
    """All that the file says about itself."""

    model: GraphModel
    table: GraphTable
    graph: GraphSettings
    versions: Mapping[str, str]
    features: GraphFeatures | None = None  # None in files of before they were noted


def read_metadata(text: str | None, file: str) -> GraphMetadata:
    """The metadata of `file` from its JSON `text`. Raises ModelError, naming what is missing or does not fit."""
    if text is None:
        raise ModelError(
            f"ONNX file '{file}' has no '{METADATA_KEY}' in its metadata, expected a file of 'parchgrad export'."
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"ONNX file '{file}': its '{METADATA_KEY}' metadata is not JSON: {error}.") from error
    found = data.get("format_version") if isinstance(data, dict) else type(data).__name__
    if found != FORMAT_VERSION:
        raise ModelError(
            f"ONNX file '{file}' has format version {found!r}; this library reads {FORMAT_VERSION}. Export it again."
        )
    try:
        metadata = _read(data)
        _check(metadata)
    except KeyError as error:
        raise ModelError(f"ONNX file '{file}': its metadata has no {error}.") from error
    except (TypeError, ValueError, AttributeError, ParchGradError) as error:
        raise ModelError(f"ONNX file '{file}': its metadata is malformed: {error}") from error
    return metadata


def _read(data: Mapping[str, Any]) -> GraphMetadata:
    of_model, of_table, of_graph = data["model"], data["table"], data["graph"]
    settings = GraphSettings(
        backward=of_graph["backward"],
        conserve=of_graph["conserve"],
        seed=of_graph["seed"],
        dtype=of_graph["dtype"],
        opset=int(of_graph["opset"]),
        layers=tuple(of_graph["layers"]),
    )
    labels = tuple(of_model["labels"])
    section: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in of_model["input"].items()}
    return GraphMetadata(
        model=GraphModel(
            name=of_model["name"],
            version=of_model["version"],
            architecture=of_model["architecture"],
            weights_sha256=of_model["weights_sha256"],
            labels=labels,
            class_ids=tuple(of_model.get("class_ids", ())),
            preprocessing=Preprocessing(**section),
        ),
        table=GraphTable(
            name=of_table["name"],
            version=of_table["version"],
            table_sha256=of_table["table_sha256"],
            defaults=replace(Defaults.from_json(of_table["defaults"]), conserve=settings.conserve),
            classes=tuple(of_table["classes"]),
            labels=labels,
            channels={layer["name"]: int(layer["channels"]) for layer in of_table["layers"]},
            written=dict(of_table),
        ),
        graph=settings,
        versions=dict(data["versions"]),
        features=_features(data["features"]) if "features" in data else None,
    )


def _features(data: Mapping[str, Any]) -> GraphFeatures:
    layers = data["layers"]
    return GraphFeatures(
        ranks=data["ranks"],
        tensors=tuple(layer["tensor"] for layer in layers),
        positive=tuple(layer["positive"] for layer in layers),
        **{name: np.frombuffer(b64decode(data[name]), "<f4") for name in ("scale", "shift", "mean", "std")},
    )


def _check(metadata: GraphMetadata) -> None:
    table, graph = metadata.table, metadata.graph
    if set(graph.layers) != set(table.layer_names) or len(graph.layers) != len(table.channels):
        raise ModelError(f"its graph has {len(graph.layers)} layers, not the {len(table.channels)} of its table.")
    if metadata.features is not None:
        channels = sum(table.channels.values())
        found = metadata.features
        if len(found.tensors) != len(table.channels):
            raise ModelError(f"it has the features of {len(found.tensors)} layers, its table {len(table.channels)}.")
        for array in (found.scale, found.shift, found.mean, found.std):
            if len(array) != channels:
                raise ModelError(f"it has the features of {len(array)} channels, its table {channels}.")
    if outside := [c for c in table.classes if not 0 <= c < len(table.labels)]:
        raise ModelError(f"class {outside[0]} of its table is outside 0..{len(table.labels) - 1}.")
    if wrong := [name for name, channels in table.channels.items() if channels < 1]:
        raise ModelError(
            f"layer '{wrong[0]}' of its table has {table.channels[wrong[0]]} channels, expected 1 or more."
        )
    texts = (metadata.model.name, metadata.model.version, metadata.model.weights_sha256, *table.labels)
    if other := [text for text in texts if not isinstance(text, str)]:
        raise ModelError(f"{other[0]!r} stands where a text is expected.")
    if graph.conserve not in CONSERVE:
        raise ModelError(f"conserve is {graph.conserve!r}, expected one of {', '.join(CONSERVE)}.")
    if graph.seed not in _SEEDS:
        raise ModelError(f"seed is {graph.seed!r}, expected one of {', '.join(_SEEDS)}.")
    quantile_of_layers(table.defaults.quantile, match(table.layer_names, table.defaults.layers))
