"""The native routes: POST /predict, POST /explain, GET /models, GET /models/{name}, /metrics."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service import metrics, tracing
from service.answers import JSON, PNG, accepted, encode, identity, require_one_picture
from service.body import Upload, read_upload
from service.errors import ServiceError
from service.pipeline import Origin, Pipeline
from service.repository import Served
from service.schemas import (
    ModelAnswer,
    ModelEntry,
    ModelListing,
    option_bounds,
    option_defaults,
    parse_options,
    take_model,
)

T = TypeVar("T")


async def predict(request: Request) -> Response:
    return await _answer(request, explain=False)


async def explain(request: Request) -> Response:
    return await _answer(request, explain=True)


async def _answer(request: Request, *, explain: bool) -> Response:
    """Options fail the request, images fail alone: a wrong option is 422 for all, a bad image has its own error."""
    arrival = asyncio.get_running_loop().time()
    metrics.asked("explain" if explain else "predict")
    media_type = accepted(",".join(request.headers.getlist("accept")))
    if media_type == PNG and not explain:
        raise ServiceError("not_acceptable", "/predict has no picture to answer with; use /explain.")

    def work(pipeline: Pipeline, served: Served, upload: Upload) -> Coroutine[Any, Any, bytes]:
        return _computed(pipeline, served, upload, media_type, explain, arrival, origin(request))

    return Response(await of_upload(request, work), media_type=media_type)


async def of_upload(request: Request, work: Callable[[Pipeline, Served, Upload], Coroutine[Any, Any, T]]) -> T:
    """What `work` makes of a request's images and options, with the version they name; it ends with the connection."""
    pipeline: Pipeline = request.app.state.pipeline
    pipeline.repository.require_any()  # before the body is read: it may be long
    with pipeline.bodies.share() as share:
        upload = await read_upload(request, pipeline.settings, share)
        try:
            name, version = take_model(upload.fields)
            with pipeline.repository.use(name, version) as served:
                return await while_connected(request, work(pipeline, served, upload))
        finally:
            upload.close()


async def _computed(
    pipeline: Pipeline,
    served: Served,
    upload: Upload,
    media_type: str,
    explain: bool,
    arrival: float,
    origin: Origin,
) -> bytes:
    asked = parse_options(upload.fields, len(upload.images), "explain" if explain else "predict")
    if media_type == PNG:
        require_one_picture(asked)
    requests = pipeline.check(served, upload.images, asked, explain=explain, draw=media_type == PNG, arrival=arrival)
    outcomes = await pipeline.run(served, requests, origin)
    for outcome in outcomes if len(outcomes) > 1 else ():
        if isinstance(outcome, ServiceError):
            metrics.rejects.labels(outcome.code).inc()
    return await asyncio.to_thread(
        tracing.rendered,
        encode,
        served.engine,
        outcomes,
        media_type,
        explain=explain,
        request_id=origin.request_id,
    )


def origin(request: Request) -> Origin:
    """Who asked, by what the envelope and the gate have put beside the request."""
    state = request.state
    return Origin(state.route, state.request_id, getattr(state, "caller", None))


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; when the client hangs up first the work is cancelled, and what had not begun never runs."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServiceError("client_closed_request", "The client went away.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def models(request: Request) -> Response:
    repository = request.app.state.pipeline.repository
    digests = {(one.name, one.version): identity(one.engine) for one in repository.listing()}
    entries = []
    for one in repository.states():
        known = digests.get((one.name, one.version))
        entries.append(
            ModelEntry(
                name=one.name,
                version=one.version,
                state=one.state,
                reason=one.reason or None,
                weights_sha256=known.weights_sha256 if known else None,
                table_sha256=known.table_sha256 if known else None,
            )
        )
    answer = ModelListing(default=repository.default, models=entries)
    return Response(answer.model_dump_json(exclude_none=True), media_type=JSON)


async def model(request: Request) -> Response:
    """One version of a model, by default the newest that serves; `?version=` names another."""
    from dataclasses import asdict

    pipeline: Pipeline = request.app.state.pipeline
    settings = pipeline.settings
    with pipeline.repository.use(request.path_params["name"], version_of(request)) as served:
        engine = served.engine
        answer = ModelAnswer(
            **identity(engine).model_dump(),
            labels=list(engine.model.labels),
            input=asdict(engine.model.preprocessing),
            table={key: value for key, value in engine.table.manifest().items() if key != "labels"},
            options=option_defaults(engine.defaults, settings.timeout_ms),
            bounds=option_bounds(len(engine.model.labels), engine.layer_names, settings.max_timeout_ms) | engine.cannot,
            limits={
                "image_bytes": settings.max_image_bytes,
                "image_pixels": settings.max_image_pixels,
                "images": settings.max_images,
            },
        )
    return Response(answer.model_dump_json(), media_type=JSON)


def version_of(request: Request) -> str | None:
    """What `?version=` says, the only field of the routes that ask about one model."""
    fields = {name: request.query_params.getlist(name) for name in request.query_params}
    for name in fields:
        if name != "version":
            raise ServiceError("unknown_field", f"Field {name[:64]!r} is not known here; known: version.")
    return take_model(fields)[1]


async def exposition(request: Request) -> Response:
    return Response(await asyncio.to_thread(metrics.exposition), headers={"Content-Type": metrics.CONTENT_TYPE})


ROUTES = [
    Route("/predict", predict, methods=["POST"]),
    Route("/explain", explain, methods=["POST"]),
    Route("/models", models, methods=["GET"]),
    Route("/models/{name}", model, methods=["GET"]),
    Route("/metrics", exposition, methods=["GET"]),
]
