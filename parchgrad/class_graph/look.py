"""The pass over the images of a class graph, class by class: what each class's images say of its channels."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from parchgrad import activation_histograms
from parchgrad.build import Batch, Reader
from parchgrad.class_graph.exemplars import Exemplars
from parchgrad.class_graph.influence import Influence, InfluenceNetwork
from parchgrad.class_graph.selected import Selected
from parchgrad.class_graph.unfinished import ClassFound
from parchgrad.class_graph.walks import Edges, most_walked, pagerank
from parchgrad.errors import DataError
from parchgrad.features import GapNetwork
from parchgrad.models import Model
from parchgrad.sources import Source
from parchgrad.tables import SelectionTable


@dataclass(frozen=True)
class Images:
    """The images looked at, class by class in the table's order."""

    source: Source
    row: NDArray[np.int64]  # (n,): the class of each
    end: NDArray[np.int64]  # (K,): where each class's images end


def drawn(source: Source, table: SelectionTable, most: int) -> Images:
    """At most `most` images a class, evenly spread over its images in reading order. Raises DataError."""
    found, rows = [], []
    for row, index in enumerate(table.classes):
        mine = np.flatnonzero(source.targets == index)
        if not len(mine):
            raise DataError(
                f"'{source.root}' has no image of class {index} ({table.labels[index]}), which table '{table.name}' "
                "covers; expected at least one of each."
            )
        count = min(most, len(mine))
        found.append(mine[np.arange(count) * len(mine) // count])
        rows += [row] * count
    ends = np.cumsum([len(of_class) for of_class in found])
    return Images(source.take(np.concatenate(found)), np.array(rows), ends)


@dataclass
class ClassNow:
    """A class whose images are being looked at."""

    row: int
    influence: Influence = field(default_factory=Influence)
    counts: NDArray[np.int64] | None = None
    bad: list[list[str]] = field(default_factory=list)


class Look:
    """The pass over the images."""

    def __init__(
        self, model: Model, table: SelectionTable, chosen: Selected, images: Images, batch_size: int,
        edges_per_channel: int, device: torch.device | None, exemplars: Exemplars | None,
    ) -> None:  # fmt: skip
        self._table, self._chosen, self._images = table, chosen, images
        self._edges_per_channel = edges_per_channel
        self._exemplars = exemplars
        self._reader = Reader(images.source, model.preprocessing, batch_size)
        names = tuple(chosen.layers)
        points = table.built.get("points") or None
        if points is not None:
            points = {name: points[name] for name in names}
        self._features = GapNetwork(model.module, names, device, table.statistics_point, points)
        self._network = InfluenceNetwork(model.module, names, device)

    def classes(self, first: int, workers: int, progress: Callable[[int], None]) -> Iterator[ClassFound]:
        """What each class from row `first` on says, in order. Raises DataError for a class without a readable image."""
        if first == len(self._images.end):
            return
        batches = range(int(self._images.end[first - 1] if first else 0) // self._reader.batch_size, len(self._reader))
        loading: DataLoader[Batch] = DataLoader(
            self._reader, batch_size=None, sampler=list(batches), num_workers=workers,
            multiprocessing_context=self._reader.source.start_method if workers else None,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )  # fmt: skip
        current = ClassNow(first)
        place_of = {self._images.source.name(i): i for i in range(len(self._images.row))}
        for batch in loading:
            if batch.failure:
                raise DataError(batch.failure)
            places = np.array([place_of[name] for name in batch.names], np.int64)
            stop = int(self._reader.indices(batch.number)[-1]) + 1
            # A batch may end one class and begin the next ones.
            while current.row < len(self._images.end):
                self._look(current, batch, places)
                if self._images.end[current.row] > stop:
                    break
                yield self._finished(current)
                current = ClassNow(current.row + 1)
            progress(stop)

    def _look(self, current: ClassNow, batch: Batch, places: NDArray[np.int64]) -> None:
        """Add what the batch's images of one class say."""
        channels = self._chosen.of_class(current.row)
        tensors = {name: torch.from_numpy(of_layer) for name, of_layer in channels.items()}
        index = self._table.classes[current.row]
        mine = set(np.flatnonzero(batch.targets == index).tolist())
        for at, images in batch.groups:
            rows = [row for row, place in enumerate(at.tolist()) if place in mine]
            if not rows:
                continue
            # A copy for each: a network may write into the images it is given.
            influence, maps = self._network.measure(images[rows], tensors)
            current.influence.add(influence)
            gap = self._features.features(images[rows]).numpy().astype(np.float64)
            ends = np.cumsum([*self._chosen.layers.values()])[:-1]
            features = dict(zip(channels, np.split(gap, ends, axis=1), strict=True))
            counts = np.stack([self._counts(name, features[name][:, of], of) for name, of in channels.items()])
            current.counts = counts if current.counts is None else current.counts + counts
            if self._exemplars is not None:
                self._exemplars.offer(features, maps, [int(places[at[row]]) for row in rows])
        named = {self._images.source.name(int(i)) for i in self._reader.indices(batch.number)
                 if self._images.row[i] == current.row}  # fmt: skip
        current.bad += [[name, reason] for name, reason in batch.bad if name in named]

    def _counts(self, name: str, features: NDArray[np.float64], channels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Standardised features of some channels `(B, n)`, counted; a channel with std 0 says nothing."""
        layer = self._table.layers[name]
        mean, std = layer.mean.numpy()[channels], layer.std.numpy()[channels]
        varies = std > 0
        return activation_histograms.counts((features[:, varies] - mean[varies]) / std[varies])

    def _finished(self, current: ClassNow) -> ClassFound:
        """The class's graph: pruned influences, and the rank of every slot."""
        if not current.influence.images or current.counts is None:
            index = self._table.classes[current.row]
            raise DataError(
                f"No image of class {index} ({self._table.labels[index]}) can be read. "
                f"{' '.join(reason for _, reason in current.bad[:3])}"
            )
        there = self._chosen.channel[current.row] >= 0
        strength = self._chosen.strength_of(current.row)
        edges = _edges(current.influence, {name: here.start for name, here in self._chosen.slots.items()})
        ranks = pagerank(strength, edges, there)
        kept = most_walked(ranks, edges, self._chosen.group, self._edges_per_channel)
        arrays = {
            "pagerank": ranks.astype(np.float32),
            "edge_from": kept.source.astype(np.int32),
            "edge_to": kept.target.astype(np.int32),
            "edge_weight": kept.weight.astype(np.float32),
            "reference_counts": current.counts.astype(np.int32),
            "images": np.array([current.influence.images], np.int32),
        }
        return ClassFound(arrays, current.bad)


def _edges(influence: Influence, start: Mapping[str, int]) -> Edges:
    """The influences above 0, between slots; what holds a channel down is no edge."""
    parts = []
    for (first, second), weights in influence.weights().items():
        found = weights.cpu().numpy()
        sources, targets = np.nonzero(found > 0)
        parts.append((sources + start[first], targets + start[second], found[sources, targets]))
    if not parts:
        return Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    return Edges(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Control-C reaches every process of the terminal; the parent ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
