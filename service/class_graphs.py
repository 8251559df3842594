"""The routes under /models/{name}/class-graph: what a model's classes are made of, as it was built beside its table.

Nothing is computed here. A graph is opened when it is first asked for, in a thread, and once a version; one that was
built for other weights or another table is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from parchgrad import class_graph
from parchgrad.class_graph import ClassGraph
from parchgrad.class_graph.graph import MANIFEST_FILE
from parchgrad.errors import ClassGraphError, NoClassGraphError
from service.answers import JSON, identity, short
from service.errors import ServiceError
from service.pipeline import Pipeline, class_index
from service.repository import Served, without_folders
from service.schemas import (
    CLASS_GRAPH_OPTIONS,
    MAX_SERVED,
    Answer,
    ClassComparisonAnswer,
    ClassGraphAnswer,
    ClassGraphChannelAnswer,
    ClassGraphClassAnswer,
    ClassGraphEdge,
    ClassGraphNode,
    ClassName,
    ComparedLayer,
    Option,
    ServedClass,
    once,
    take_model,
)
from service.settings import Settings

T = TypeVar("T")

Stamp = tuple[int, int, int]  # of the graph's manifest: what it is that was opened
Opened = tuple[Stamp, asyncio.Future[ClassGraph]]

# A reload makes a new Served, and with the old one goes its graph.
_opened: WeakKeyDictionary[Served, Opened] = WeakKeyDictionary()


async def opened(settings: Settings, served: Served) -> ClassGraph:
    """The class graph of a version, opened once and again when it was built anew.

    Raises NoClassGraphError where there is none, ClassGraphError where it does not belong to what serves.
    """
    folder = settings.tables_dir / served.name / served.version
    stamp = await asyncio.to_thread(_stamp, folder)
    known = _opened.get(served)
    if known is None or known[0] != stamp:
        known = stamp, asyncio.ensure_future(asyncio.to_thread(class_graph.load, folder, served.engine.table))
        _opened[served] = known
    try:
        return await asyncio.shield(known[1])  # whoever goes away leaves the others their graph
    except ClassGraphError:
        _forget(served, known)  # asked again, it is looked at again: it may have been put right
        raise


async def graph_of(settings: Settings, served: Served) -> ClassGraph:
    """Raises ServiceError(no_class_graph) where there is none that belongs to what serves, and says why."""
    try:
        return await opened(settings, served)
    except NoClassGraphError:
        why = f"Model '{served.name}' version {served.version} has no class graph; build one: {command(served)}."
    except ClassGraphError as error:
        why = without_folders(str(error), (settings.tables_dir, settings.models_dir)) + f" Build it: {command(served)}."
    raise ServiceError("no_class_graph", why)


def _forget(served: Served, known: Opened) -> None:
    if _opened.get(served) is known:
        del _opened[served]


def command(served: Served) -> str:
    return f"parchgrad class-graph build {served.name} --data IMAGES"


def _stamp(folder: Path) -> Stamp:
    try:
        found = (folder / MANIFEST_FILE).stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size


# --- routes -------------------------------------------------------------------------------------------------


async def summary(request: Request) -> Response:
    """Layers, classes and where they lie, how it was built."""

    def work(served: Served, graph: ClassGraph, given: Mapping[str, int]) -> Answer:
        found = graph.summary()
        found["built"]["bad_images"] = len(found["built"].get("bad_images", ()))  # which, is the operator's business
        for one in found["classes"]:
            one.update(x=round(one["x"], 5), y=round(one["y"], 5))
        return ClassGraphAnswer(**identity(served.engine).model_dump(), **found)

    return await _answered(request, work)


async def one_class(request: Request) -> Response:
    def work(served: Served, graph: ClassGraph, given: Mapping[str, int]) -> Answer:
        index = class_index(served.engine.model, request.path_params["index"], "'class' is")
        found = graph.class_view(index, given["nodes"])
        place = {(node.layer, node.channel): at for at, node in enumerate(found.nodes)}
        return ClassGraphClassAnswer(
            index=found.index,
            label=found.label,
            images=found.images,
            nodes_in_all=found.nodes_in_all,
            nodes=[
                ClassGraphNode(
                    layer=node.layer,
                    channel=node.channel,
                    strength=short(node.strength),
                    log_p=short(node.log_p),
                    pagerank=short(node.pagerank),
                )
                for node in found.nodes
            ],
            edges=[
                ClassGraphEdge(source=place[edge.source], target=place[edge.target], weight=short(edge.weight))
                for edge in found.edges[: given["edges"]]
            ],
            edges_in_all=len(found.edges),
        )

    return await _answered(request, work, "nodes", "edges")


async def comparison(request: Request) -> Response:
    """All selected channels of two classes, not only the drawn ones."""

    def work(served: Served, graph: ClassGraph, given: Mapping[str, int]) -> Answer:
        names = (request.path_params[name] for name in ("index", "other"))
        a, b = (class_index(served.engine.model, name, "'class' is") for name in names)
        layers = [
            ComparedLayer(layer=one.layer, shared=list(one.shared), only_a=list(one.only_a), only_b=list(one.only_b))
            for one in graph.compare(a, b)
        ]
        return ClassComparisonAnswer(
            a=ClassName(index=a, label=graph.labels[a]), b=ClassName(index=b, label=graph.labels[b]), layers=layers
        )

    return await _answered(request, work)


async def channel(request: Request) -> Response:
    def work(served: Served, graph: ClassGraph, given: Mapping[str, int]) -> Answer:
        found = graph.channel_view(request.path_params["layer"], _number(request))
        classes = [
            ServedClass(index=one.index, label=one.label, strength=short(one.strength), log_p=short(one.log_p))
            for one in found.classes[:MAX_SERVED]
        ]
        return ClassGraphChannelAnswer(
            layer=found.layer,
            channel=found.channel,
            classes=classes,
            classes_in_all=len(found.classes),
            exemplars=found.exemplars,
        )

    return await _answered(request, work)


async def exemplars(request: Request) -> Response:
    """Squares side by side, the strongest on the left; asked again each time, by ETag: a graph may be built anew."""

    def work(served: Served, graph: ClassGraph, given: Mapping[str, int]) -> bytes:
        layer, number = request.path_params["layer"], _number(request)
        found = graph.exemplars(layer, number)
        if found is None:
            without = graph.summary()["exemplars"] is None
            why = (
                f"the graph was built without; {command(served)} --exemplars 9 stores them" if without else "no class "
            )
            why += "" if without else "selects the channel"
            raise ServiceError("not_found", f"There are no exemplars of channel {number} of '{layer}': {why}.")
        return found

    strip = await _with_graph(request, work)
    headers = {
        "ETag": f'"{hashlib.sha256(strip).hexdigest()[:32]}"',
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(strip, media_type="image/webp", headers=headers)


async def _answered(
    request: Request, work: Callable[[Served, ClassGraph, Mapping[str, int]], Answer], *known: str
) -> Response:
    def encoded(served: Served, graph: ClassGraph, given: Mapping[str, int]) -> str:
        return work(served, graph, given).model_dump_json(exclude_none=True)

    content = await _with_graph(request, encoded, *known)
    return Response(content, media_type=JSON, headers={"Cache-Control": "no-cache"})


async def _with_graph(request: Request, work: Callable[[Served, ClassGraph, Mapping[str, int]], T], *known: str) -> T:
    """What `work` makes of the version, its graph and the `known` options, in a thread: the graph's arrays are mapped,
    and reading one may wait for the disk."""
    pipeline: Pipeline = request.app.state.pipeline
    options = {name: CLASS_GRAPH_OPTIONS[name] for name in known}
    version, given = _fields(request, options)
    with pipeline.repository.use(request.path_params["name"], version) as served:
        graph = await graph_of(pipeline.settings, served)
        return await asyncio.to_thread(work, served, graph, given)


def _fields(request: Request, options: Mapping[str, Option]) -> tuple[str | None, dict[str, int]]:
    fields = {name: request.query_params.getlist(name) for name in request.query_params}
    for name in fields:
        if name != "version" and name not in options:
            allowed = ", ".join(("version", *options))
            raise ServiceError("unknown_field", f"Field {name[:64]!r} is not known here; known: {allowed}.")
    given = {name: once(option, fields.pop(name, [])) for name, option in options.items()}
    return take_model(fields)[1], {
        name: options[name].default if value is None else value for name, value in given.items()
    }


def _number(request: Request) -> int:
    text: str = request.path_params["channel"]
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ServiceError("option_invalid", f"Channel is {text[:64]!r}; allowed: a channel's number in its layer.")
    return int(text)


_GZIP = [Middleware(GZipMiddleware, minimum_size=1024)]
_BASE = "/models/{name}/class-graph"

ROUTES = [
    Route(_BASE, summary, methods=["GET"], middleware=_GZIP),
    Route(f"{_BASE}/classes/{{index}}", one_class, methods=["GET"], middleware=_GZIP),
    Route(f"{_BASE}/classes/{{index}}/against/{{other}}", comparison, methods=["GET"], middleware=_GZIP),
    Route(f"{_BASE}/channels/{{layer}}/{{channel}}", channel, methods=["GET"], middleware=_GZIP),
    Route(f"{_BASE}/exemplars/{{layer}}/{{channel}}", exemplars, methods=["GET"]),
]
