"""GET /traffic: how the activations of recent images lie beside the table's own, and the figures of recent maps.

What it tells is kept by watching.py as counts in buckets of time; here they are compared. docs/watching.md says how.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from parchgrad.activation_histograms import EDGES, FEWEST_IMAGES, chance, divergence, normal
from parchgrad.errors import ClassGraphError, NoClassGraphError, UncoveredTargetError
from service import class_graphs, metrics
from service.answers import JSON, identity
from service.errors import ServiceError
from service.pipeline import Pipeline
from service.repository import Served
from service.schemas import (
    TRAFFIC_OPTIONS,
    TrafficAnswer,
    TrafficBucket,
    TrafficClass,
    TrafficFigure,
    TrafficFigureBucket,
    TrafficLayer,
    once,
    take_model,
)
from service.traffic_history import FIGURE_BINS, FIGURE_RANGES, FIGURES, OTHER, SPANS, Bucket, Cell, History

if TYPE_CHECKING:
    from parchgrad.class_graph import ClassGraph

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
Kind = Literal["table's images", "normal", "mixed"]

ALL = "all classes"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SWITCHED_OFF = (
    "No image is looked at: PARCHGRAD_WATCH_RATE is 0. With 0.01 one image in a hundred is, after its answer."
)


@dataclass(frozen=True)
class Reference:
    """What each class's activations are compared with: counts of the table's images, or a normal's shares."""

    layers: tuple[str, ...]
    graph: ClassGraph | None
    note: str | None = None  # why there is no graph, where one was to be expected

    @cached_property
    def _places(self) -> list[int]:
        assert self.graph is not None  # its callers looked
        return [self.graph.layers.index(name) for name in self.layers]

    def of(self, index: int) -> tuple[Array, NDArray[np.bool_]]:
        """`(L, BINS)`, and whether they are counts of the table's own images, `(L,)`."""
        shares = np.tile(normal(), (len(self.layers), 1))
        if self.graph is None or index not in self.graph.classes:
            return shares, np.zeros(len(self.layers), bool)
        found = np.asarray(self.graph.reference_counts(index), np.float64)[self._places]
        counted = found.sum(-1) > 0
        return np.where(counted[:, None], found, shares), counted

    def mixed(self, images: Mapping[int, int]) -> tuple[Array, Kind]:
        """Of several classes' images together, as many values of each: shares, times as many as they are good for.

        An image of one class may have more values in a layer than one of another, as more channels are selected for
        it; one of a class without counts is taken to have as many as the others on average.
        """
        if self.graph is None:
            return np.tile(normal(), (len(self.layers), 1)), "normal"
        each_of = [self.of(index) for index in images]
        rows, has = np.array([found for found, _ in each_of]), np.array([counted for _, counted in each_of])
        total = rows.sum(-1)  # (classes, L)
        behind = [self.graph.images(index) if index in self.graph.classes else 1 for index in images]
        values = np.where(has, total / np.maximum(behind, 1)[:, None], 0.0)  # that one image has
        usual = values.sum(0) / np.maximum(has.sum(0), 1)
        values = np.where(has, values, np.where(usual > 0, usual, 1.0))
        weights = np.array(list(images.values()))[:, None] * values
        share = weights / weights.sum(0)
        shares = (share[..., None] * rows / total[..., None]).sum(0)
        uncertainty = np.where(has, share**2 / total, 0.0).sum(0)[:, None]
        kind: Kind = "table's images" if has.all() else "mixed" if has.any() else "normal"
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(uncertainty > 0, shares / uncertainty, shares), kind


_told: WeakSet[Served] = WeakSet()  # whose unusable graph the log has been told of


async def traffic(request: Request) -> Response:
    pipeline: Pipeline = request.app.state.pipeline
    fields = {name: request.query_params.getlist(name) for name in request.query_params}
    name, version = take_model(fields)
    asked = {option: once(known, fields.pop(option, [])) for option, known in TRAFFIC_OPTIONS.items()}
    for field in fields:
        known = ", ".join(("model", "version", *TRAFFIC_OPTIONS))
        raise ServiceError("unknown_field", f"Field {field[:64]!r} is not known here; known: {known}.")
    with pipeline.repository.use(name, version) as served:
        chosen = None if asked["class"] is None else served.engine.model.class_index(asked["class"])
        if chosen is not None and chosen not in served.engine.table.classes:
            label = served.engine.model.labels[chosen]
            raise UncoveredTargetError(
                f"Table '{served.engine.table.name}' has no row for class {chosen} ({label}), so that none of its "
                "channels are watched."
            )
        history = pipeline.watch.history(served)
        reference = await _reference(pipeline, served, history.layers)
        answer = await asyncio.to_thread(_answer, pipeline, served, history, reference, chosen, asked["span"] or "hour")
    return Response(answer.model_dump_json(exclude_none=True), media_type=JSON, headers={"Cache-Control": "no-store"})


async def _reference(pipeline: Pipeline, served: Served, layers: tuple[str, ...]) -> Reference:
    """A graph that cannot be used is said in the answer, and the normal is the reference."""
    try:
        graph = await class_graphs.opened(pipeline.settings, served)
    except NoClassGraphError:
        return Reference(layers, None)
    except ClassGraphError as error:
        if served not in _told:
            _told.add(served)
            log.warning("The class graph of '%s' is not used: %s", served.name, error)
        return Reference(layers, None, "There is a class graph that cannot be used; the log says why.")
    if np.array_equal(graph.reference_edges, EDGES) and set(layers) <= set(graph.layers):
        return Reference(layers, graph)
    return Reference(layers, None, "The class graph has other layers or bins than are watched; build it again.")


def _answer(
    pipeline: Pipeline, served: Served, history: History, reference: Reference, chosen: int | None, span: Any
) -> TrafficAnswer:
    settings, engine, layers = pipeline.settings, served.engine, history.layers
    buckets, workers = history.together(span, metrics.workers_folder(), f"{served.name}-{served.version}")
    whole = Bucket()
    for bucket in buckets.values():
        whole.add(bucket, len(layers))
    kept = sorted(whole.cells.keys() - {OTHER})
    cells: list[tuple[int | None, Cell]] = [(None, _every(whole, len(layers)))]
    cells += [(index, whole.cells[index]) for index in kept]
    of_chosen = next((cell for index, cell in cells if index == chosen), Cell.empty(len(layers)))
    note = SWITCHED_OFF if settings.watch_rate == 0 else None
    return TrafficAnswer(
        **identity(engine).model_dump(),
        span=span,
        bucket_seconds=SPANS[span].seconds,
        watch_rate=settings.watch_rate,
        workers=workers,
        note=note,
        no_activations=None if engine.no_drift is None else f"No activations are watched: {engine.no_drift}",
        reference_note=reference.note,
        fewest_images=FEWEST_IMAGES,
        images=cells[0][1].images.total(),
        images_of_others=whole.cells[OTHER].images.total() if OTHER in whole.cells else 0,
        edges=EDGES.tolist(),
        layers=list(layers),
        classes=[_class(index, _label(served, index), cell, reference) for index, cell in cells],
        chosen=_class(chosen, _label(served, chosen), of_chosen, reference),
        distributions=_distributions(chosen, of_chosen, reference),
        history=[
            _bucket(number * SPANS[span].seconds, _cell(bucket, chosen, len(layers)), reference)
            for number, bucket in buckets.items()
        ],
        figures=[_figure(name, buckets, SPANS[span].seconds) for name in FIGURES],
    )


def _label(served: Served, index: int | None) -> str:
    return ALL if index is None else served.engine.model.labels[index]


def _every(bucket: Bucket, layers: int) -> Cell:
    total = Cell.empty(layers)
    for cell in bucket.cells.values():
        total.add(cell)
    return total


def _cell(bucket: Bucket, chosen: int | None, layers: int) -> Cell:
    if chosen is None:
        return _every(bucket, layers)
    return bucket.cells.get(chosen, Cell.empty(layers))


def _compared(cell: Cell, reference: Reference) -> tuple[Array, Array, Array]:
    """Divergence, what chance makes of it, and its bound, by layer; NaN where there are too few images."""
    images = cell.images.total()
    if images < FEWEST_IMAGES:
        return (np.full(len(reference.layers), np.nan),) * 3
    known, _ = reference.mixed(cell.images)
    by_chance = chance(cell.counts, cell.squares, np.full(len(known), images), known)
    found = np.where(np.isnan(by_chance.expected), np.nan, divergence(cell.counts, known))
    return found, by_chance.expected, by_chance.bound


def _class(index: int | None, label: str, cell: Cell, reference: Reference) -> TrafficClass:
    found, expected, bound = _compared(cell, reference)
    images = cell.images or Counter({index: 1} if index is not None else {})
    return TrafficClass(
        index=index,
        label=label,
        images=cell.images.total(),
        reference=reference.mixed(images)[1] if images else "normal",
        divergence=_numbers(found),
        expected=_numbers(expected),
        bound=_numbers(bound),
    )


def _distributions(index: int | None, cell: Cell, reference: Reference) -> list[TrafficLayer]:
    images = cell.images or Counter({index: 1} if index is not None else {})
    known = reference.mixed(images)[0] if images else np.tile(normal(), (len(reference.layers), 1))
    shares = known / known.sum(-1, keepdims=True)
    return [
        TrafficLayer(name=name, values=int(live.sum()), live=live.tolist(), reference=[round(v, 6) for v in own])
        for name, live, own in zip(reference.layers, cell.counts, shares.tolist(), strict=True)
    ]


def _bucket(start: int, cell: Cell, reference: Reference) -> TrafficBucket:
    found, _, bound = _compared(cell, reference)
    return TrafficBucket(start=start, images=cell.images.total(), divergence=_numbers(found), bound=_numbers(bound))


def _figure(name: str, buckets: Mapping[int, Bucket], seconds: int) -> TrafficFigure:
    """A figure of maps, over all of the span and bucket by bucket; buckets without a map are left out."""
    low, high = FIGURE_RANGES[name]
    counted = {number: bucket.figures[name] for number, bucket in buckets.items() if name in bucket.figures}
    total = np.zeros(FIGURE_BINS, np.int64)
    for values in counted.values():
        total += values
    return TrafficFigure(
        name=name,
        lowest=low,
        highest=high,
        maps=int(total.sum()),
        quantiles=_quantiles(total, low, high, QUANTILES),
        history=[
            TrafficFigureBucket(
                start=number * seconds, maps=int(values.sum()), quantiles=_quantiles(values, low, high, QUANTILES)
            )
            for number, values in counted.items()
            if values.any()
        ],
    )


def _quantiles(counted: NDArray[Any], low: float, high: float, shares: Sequence[float]) -> list[float]:
    """Of values counted in equal bins, to half a bin's width; empty where there are none."""
    if not counted.any():
        return []
    upto = np.cumsum(counted) / counted.sum()
    middles = np.linspace(low, high, len(counted))
    return [round(float(middles[np.searchsorted(upto, share - 1e-12)]), 6) for share in shares]


def _numbers(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


ROUTES = [Route("/traffic", traffic, methods=["GET"])]
