"""A class graph as it is stored and asked: nodes, edges, layout, exemplars of every class. Computes none of it.

On disk, beside a table: `class_graph.safetensors`, one array a field, mapped and read as far as it is asked for;
`class_graph.json`, which names the model and table it belongs to; and, only where exemplars were asked for,
`exemplars/strips.bin`, pictures one after the other. No torch here. `K` covered classes in the table's order, `S`
slots: the channels selected in each layer side by side, strongest first, -1 where a layer has fewer.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parchgrad.errors import ClassGraphError, NoClassGraphError, OptionError, UncoveredTargetError
from parchgrad.files import beside, file_sha256
from parchgrad.labels import no_row_for

FORMAT_VERSION = 1
TENSORS_FILE = "class_graph.safetensors"
MANIFEST_FILE = "class_graph.json"
EXEMPLARS_FOLDER = "exemplars"
STRIPS_FILE = "strips.bin"

Channel = tuple[str, int]  # layer, channel

# Name -> type of the arrays in the file.
FIELDS = {
    "channel": "I16",  # (K, S): the selected channels
    "log_p": "F32",  # (K, S): the table's log p-values of them
    "pagerank": "F32",  # (K, S): a class's sum to 1
    "edge_start": "I64",  # (K + 1,): a class's edges lie in edge_start[row] .. edge_start[row + 1]
    "edge_from": "U16",  # (E,): slot; "I32" where there are more than 65,536 of them
    "edge_to": "U16",  # (E,): slot, likewise
    "edge_weight": "F16",  # (E,): influence
    "position": "F32",  # (K, 2): x, y of the layout
    "images": "I32",  # (K,): images the class was looked at with
    "reference_counts": "I32",  # (K, L, BINS)
    "reference_edges": "F64",  # (BINS + 1,)
}
MOST_SLOTS = 1 << 16
EXEMPLAR_FIELD = "exemplar_start"  # (N + 1,) I64: where each channel's strip begins in strips.bin
EXEMPLAR_COUNT = "exemplar_count"  # (N,) I16: crops in it


class OfTable(Protocol):
    """What a class graph needs to know of the selection table it belongs to."""

    @property
    def name(self) -> str: ...
    @property
    def table_sha256(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def classes(self) -> tuple[int, ...]: ...
    def manifest(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Node:
    """A selected channel of a class."""

    layer: str
    channel: int
    strength: float  # 0..1 in its layer: sqrt(log p / the class's smallest log p there)
    log_p: float  # the table's
    pagerank: float  # share of the class's random walks; all nodes of a class sum to 1


@dataclass(frozen=True)
class Edge:
    """How much one channel does to another on the class's images."""

    source: Channel
    target: Channel
    weight: float  # share of the target's feature that comes by way of the source; can be above 1


@dataclass(frozen=True)
class ClassView:
    """One class: nodes by layer, then strongest first; edges by weight, the largest first."""

    index: int
    label: str
    images: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    nodes_in_all: int  # before `most_nodes`


@dataclass(frozen=True)
class Serves:
    """A class that selects a channel."""

    index: int
    label: str
    strength: float
    log_p: float


@dataclass(frozen=True)
class ChannelView:
    """One channel: the classes that select it, the strongest (smallest log p) first."""

    layer: str
    channel: int
    classes: tuple[Serves, ...]
    exemplars: int  # crops in its strip


@dataclass(frozen=True)
class Comparison:
    """Two classes' channels of one layer: of both, of the first alone, of the second alone; ascending."""

    layer: str
    shared: tuple[int, ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]


@dataclass(frozen=True)
class ClassGraph:
    """See `load`. Safe to ask from several threads."""

    folder: Path
    table_name: str
    labels: tuple[str, ...]  # the model's whole class order
    classes: tuple[int, ...]  # class indices that have a row, in row order
    layers: tuple[str, ...]
    written: Mapping[str, Any] = field(repr=False)  # class_graph.json
    _file: Any = field(repr=False)  # an open safetensors file, which maps it
    _strips: mmap.mmap | None = field(repr=False)  # of the exemplars, as they were when this was opened; None: no bytes

    def summary(self) -> dict[str, Any]:
        """Of the whole graph, JSON types only: `layers` [{name, channels, selected}], `classes` [{index, label,
        images, x, y}] with x, y in [-1, 1], `built` (how), `exemplars` ({channels, crops, pixels, bytes}, or None)."""
        positions, images = self._all("position"), self._all("images")
        classes = [
            {"index": index, "label": self.labels[index], "images": int(images[row]),
             "x": float(positions[row, 0]), "y": float(positions[row, 1])}
            for row, index in enumerate(self.classes)
        ]  # fmt: skip
        return {
            "layers": [dict(layer) for layer in self.written["layers"]],
            "classes": classes,
            "built": dict(self.written["built"]),
            "exemplars": self.written["exemplars"],
        }

    def class_view(self, index: int, most_nodes: int | None = None) -> ClassView:
        """The nodes and edges of class `index`.

        With `most_nodes` the layers take turns, each giving its next channel by PageRank, until there are as many;
        edges are those between them. Raises UncoveredTargetError for a class without a row, OptionError for
        `most_nodes` below 1.
        """
        if most_nodes is not None and most_nodes < 1:
            raise OptionError("most_nodes", most_nodes, "a number of at least 1")
        row = self._row(index)
        channel, log_p, pagerank = (self._rows(name, row) for name in ("channel", "log_p", "pagerank"))
        strength = self._strength(log_p, channel)
        there = np.flatnonzero(channel >= 0)
        kept = there if most_nodes is None else self._best(there, pagerank, most_nodes)
        layer_of = self._layer_of_slot
        nodes = tuple(
            Node(self.layers[layer_of[s]], int(channel[s]), float(strength[s]), float(log_p[s]), float(pagerank[s]))
            for s in kept
        )
        start, end = (int(value) for value in self._all("edge_start")[row : row + 2])
        sources, targets, weights = (self._rows(name, slice(start, end)) for name in _EDGE_FIELDS)
        drawn = np.flatnonzero(np.isin(sources, kept) & np.isin(targets, kept))

        def named(slot: int) -> Channel:
            return self.layers[layer_of[slot]], int(channel[slot])

        edges = tuple(
            Edge(named(sources[e]), named(targets[e]), float(weights[e]))
            for e in drawn[np.argsort(-weights[drawn], kind="stable")]
        )
        images = int(self._all("images")[row])
        return ClassView(index, self.labels[index], images, nodes, edges, len(there))

    def channel_view(self, layer: str, channel: int) -> ChannelView:
        """Which classes select a channel. Raises OptionError for a layer or channel that is not there."""
        self._require(layer, channel)
        here = self._slots[layer]
        channels, log_p = self._rows("channel", slice(None), here), self._rows("log_p", slice(None), here)
        rows, columns = np.nonzero(channels == channel)
        found = log_p[rows, columns]
        smallest = log_p[rows].min(axis=1, initial=0.0)
        classes = tuple(
            Serves(self.classes[rows[i]], self.labels[self.classes[rows[i]]],
                   _strength_of(float(found[i]), float(smallest[i])), float(found[i]))
            for i in np.argsort(found, kind="stable")
        )  # fmt: skip
        return ChannelView(layer, channel, classes, self._crops(layer, channel))

    def exemplars(self, layer: str, channel: int) -> bytes | None:
        """A WebP picture: the crops that excite the channel most side by side, squares, the strongest on the left.

        None where there are none: exemplars were not asked for, or no class selects the channel. They are pieces of
        the images the graph was built with. Raises OptionError for a layer or channel that is not there.
        """
        self._require(layer, channel)
        if not self._crops(layer, channel):
            return None
        place = self._channel_start[layer] + channel
        start, end = (int(value) for value in self._all(EXEMPLAR_FIELD)[place : place + 2])
        return b"" if self._strips is None else self._strips[start:end]

    def images(self, index: int) -> int:
        """Of how many images of a class its nodes, edges and reference counts tell. Raises UncoveredTargetError."""
        return int(self._all("images")[self._row(index)])

    def compare(self, a: int, b: int) -> tuple[Comparison, ...]:
        """The channels of two classes, layer by layer. Raises UncoveredTargetError."""
        first, second = (self._rows("channel", self._row(index)) for index in (a, b))
        found = []
        for layer, here in self._slots.items():
            mine, theirs = ({int(c) for c in channels[here] if c >= 0} for channels in (first, second))
            parts = (mine & theirs, mine - theirs, theirs - mine)
            found.append(Comparison(layer, *(tuple(sorted(part)) for part in parts)))
        return tuple(found)

    @property
    def reference_edges(self) -> NDArray[np.float64]:
        """`(BINS + 1,)`: edges of the reference histograms, the outer bins open (activation_histograms.py)."""
        return self._all("reference_edges")

    def reference_counts(self, index: int) -> NDArray[np.int32]:
        """`(layers, BINS)`: a class's standardised features of its selected channels on its own images, counted.

        Raises UncoveredTargetError.
        """
        return self._rows("reference_counts", self._row(index))

    @cached_property
    def _slots(self) -> dict[str, slice]:
        slots, start = {}, 0
        for layer in self.written["layers"]:
            slots[layer["name"]] = slice(start, start + layer["selected"])
            start += layer["selected"]
        return slots

    @cached_property
    def _layer_of_slot(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.layers)), [layer["selected"] for layer in self.written["layers"]])

    @cached_property
    def _channel_start(self) -> dict[str, int]:
        widths = [layer["channels"] for layer in self.written["layers"]]
        return dict(zip(self.layers, np.cumsum([0, *widths[:-1]]).tolist(), strict=True))

    @cached_property
    def _row_of_class(self) -> dict[int, int]:
        return {index: row for row, index in enumerate(self.classes)}

    def _row(self, index: int) -> int:
        if index not in self._row_of_class:
            if not 0 <= index < len(self.labels):
                raise UncoveredTargetError(f"Class {index} is outside 0..{len(self.labels) - 1}.")
            raise no_row_for([index], self.table_name, len(self.classes), self.labels)
        return self._row_of_class[index]

    def _require(self, layer: str, channel: int) -> None:
        if layer not in self._slots:
            raise OptionError("layer", layer, f"one of the graph's {len(self.layers)} layers")
        width = self.written["layers"][self.layers.index(layer)]["channels"]
        if not 0 <= channel < width:
            raise OptionError("channel", channel, f"0 to {width - 1} in layer '{layer}'")

    def _crops(self, layer: str, channel: int) -> int:
        if self.written["exemplars"] is None:
            return 0
        return int(self._all(EXEMPLAR_COUNT)[self._channel_start[layer] + channel])

    def _strength(self, log_p: NDArray[Any], channel: NDArray[Any]) -> NDArray[np.float64]:
        found = np.zeros(len(log_p))
        for here in self._slots.values():
            found[here] = strengths(log_p[here], channel[here] >= 0)
        return found

    def _best(self, there: NDArray[Any], pagerank: NDArray[Any], most: int) -> NDArray[np.intp]:
        """The slots of the channels in turn by PageRank within their layers, ascending."""
        layer = self._layer_of_slot[there]
        order = np.lexsort((-pagerank[there], layer))
        turn = np.empty(len(there), np.int64)
        first = np.searchsorted(layer[order], layer[order])
        turn[order] = np.arange(len(there)) - first
        return np.sort(there[np.lexsort((-pagerank[there], turn))[:most]])

    def _rows(self, name: str, *where: Any) -> NDArray[Any]:
        """A piece of a field; only that piece is read."""
        part = self._file.get_slice(name)
        first = where[0]
        if isinstance(first, slice) and first.start is not None and first.start == first.stop:
            empty: NDArray[Any] = self._file.get_tensor(name)[:0]  # safetensors has none behind the last row
            return empty
        found: NDArray[Any] = part[where if len(where) > 1 else first]
        return found

    def _all(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self._file.get_tensor(name)
        return found


_EDGE_FIELDS = ("edge_from", "edge_to", "edge_weight")


def strengths(log_p: NDArray[Any], there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Strength of a class's channels of one layer `(n,)`, 0..1: `sqrt(log p / min log p)`; 0 where none is `there`.

    For large t, `-2 log p` tends to `t^2`, so this is the channel's t over the strongest one's. It follows the order of
    the table's ranks; where all log p are 0 (nothing speaks for the class) it is 0.
    """
    found = np.zeros(len(log_p))
    smallest = float(log_p[there].min()) if there.any() else 0.0
    for place in np.flatnonzero(there):
        found[place] = _strength_of(float(log_p[place]), smallest)
    return found


def _strength_of(log_p: float, smallest: float) -> float:
    return float(np.sqrt(log_p / smallest)) if smallest < 0 else 0.0


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place, then rename it; the same arrays give the same bytes."""
    with beside(path) as temporary:
        # As bytes: safetensors' own writing makes files that only their owner can read.
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        temporary.write_bytes(save(contiguous, dict(metadata) if metadata else None))


def load(folder: str | os.PathLike[str], table: OfTable) -> ClassGraph:
    """The class graph in a table's folder; its arrays are mapped, and read as far as they are asked for.

    Raises NoClassGraphError where none was built, ClassGraphError for one that is damaged, of another format, or built
    for other weights or another table.
    """
    folder = Path(folder)
    manifest_path, tensors_path = folder / MANIFEST_FILE, folder / TENSORS_FILE
    model = table.manifest()["model"]
    command = f"parchgrad class-graph build {model['name']} --data IMAGES"
    if not manifest_path.is_file():
        raise NoClassGraphError(f"Table '{table.name}' has no class graph; build one: {command}.")
    where = f"Class graph '{manifest_path}'"
    try:
        written = json.loads(manifest_path.read_text(encoding="utf-8"))
        if written["format_version"] != FORMAT_VERSION:
            raise ClassGraphError(
                f"{where} has format version {written['format_version']!r}; this library reads {FORMAT_VERSION}. "
                f"Build it again: {command}."
            )
        _expect(where, "weights_sha256", written["model"]["weights_sha256"], model["weights_sha256"], "model")
        _expect(where, "table_sha256", written["table_sha256"], table.table_sha256, "table")
        digest = file_sha256(tensors_path)
        if digest != written["tensors_sha256"]:
            raise ClassGraphError(
                f"{where}: {TENSORS_FILE} has sha256 {digest}, expected {written['tensors_sha256']}. "
                f"Build it again: {command}."
            )
        if not isinstance(written["built"], dict):
            raise ClassGraphError(f"{where} does not say how it was built: 'built' is {written['built']!r}.")
        layers = tuple(layer["name"] for layer in written["layers"])
        if tuple(written["classes"]) != tuple(table.classes):
            raise ClassGraphError(f"{where} has other classes than table '{table.name}'.")
        file = safe_open(tensors_path, framework="np")
        _check(where, written, file)
        strips = _strips(where, written["exemplars"], folder / EXEMPLARS_FOLDER / STRIPS_FILE)
    except (OSError, SafetensorError) as error:
        raise ClassGraphError(f"{where} cannot be read: {error}.") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClassGraphError(f"{where} is malformed: {type(error).__name__} {error}.") from error
    return ClassGraph(folder, table.name, tuple(table.labels), tuple(table.classes), layers, written, file, strips)


def _expect(where: str, what: str, found: str, expected: str, of: str) -> None:
    if found != expected:
        raise ClassGraphError(f"{where} was built for {what} {found!r}, the {of}'s is {expected!r}.")


def _check(where: str, written: Mapping[str, Any], file: Any) -> None:
    """Every field is there with its type, and with the shapes the manifest tells."""
    classes, layers = len(written["classes"]), written["layers"]
    slots = sum(layer["selected"] for layer in layers)
    fields = dict(FIELDS)
    if written["exemplars"] is not None:
        fields |= {EXEMPLAR_FIELD: "I64", EXEMPLAR_COUNT: "I16"}
    there = set(file.keys())
    shapes: dict[str, Sequence[int]] = {}
    for name, kind in fields.items():
        if name not in there:
            raise ClassGraphError(f"{where}: {TENSORS_FILE} has no '{name}'.")
        found = file.get_slice(name)
        shapes[name] = tuple(found.get_shape())
        if name in ("edge_from", "edge_to") and slots > MOST_SLOTS:
            kind = "I32"
        if found.get_dtype() != kind:
            raise ClassGraphError(f"{where}: '{name}' is {found.get_dtype()}, expected {kind}.")
    bins, edges = shapes["reference_edges"][0] - 1, shapes["edge_from"][0]
    expected = {
        **dict.fromkeys(("channel", "log_p", "pagerank"), (classes, slots)),
        **dict.fromkeys(_EDGE_FIELDS, (edges,)),
        "edge_start": (classes + 1,), "position": (classes, 2), "images": (classes,),
        "reference_counts": (classes, len(layers), bins), "reference_edges": (bins + 1,),
    }  # fmt: skip
    if written["exemplars"] is not None:
        width = sum(layer["channels"] for layer in layers)
        expected |= {EXEMPLAR_FIELD: (width + 1,), EXEMPLAR_COUNT: (width,)}
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ClassGraphError(f"{where}: '{name}' has shape {shapes[name]}, expected {shape}.")


def _strips(where: str, exemplars: Mapping[str, Any] | None, path: Path) -> mmap.mmap | None:
    """Mapped: a file of many pictures is not read through at every start, and one in its place is another graph's."""
    if exemplars is None:
        return None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != exemplars["bytes"]:
            raise ClassGraphError(f"{where}: {path.name} has {size} bytes, expected {exemplars['bytes']}.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None  # nothing maps no bytes
