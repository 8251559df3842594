"""The native routes: POST /predict, POST /explain, GET /models, GET /models/{name}, /metrics."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service import metrics
from service.answers import JSON, PNG, accepted, encode, identity
from service.body import Upload, read_upload
from service.engine import Engine
from service.errors import ServiceError
from service.pipeline import Pipeline
from service.schemas import MAX_TOP, ModelAnswer, ModelListing, parse_options

T = TypeVar("T")


async def predict(request: Request) -> Response:
    return await _answer(request, explain=False)


async def explain(request: Request) -> Response:
    return await _answer(request, explain=True)


async def _answer(request: Request, *, explain: bool) -> Response:
    """Options fail the request, images fail alone: a wrong option is 422 for all, a bad image has its own error."""
    arrival = asyncio.get_running_loop().time()
    pipeline: Pipeline = request.app.state.pipeline
    engine = pipeline.require_engine()
    media_type = accepted(",".join(request.headers.getlist("accept")))
    if media_type == PNG and not explain:
        raise ServiceError("not_acceptable", "/predict has no picture to answer with; use /explain.")
    settings = pipeline.settings
    try:
        async with asyncio.timeout_at(arrival + settings.max_timeout_ms / 1000):
            upload = await read_upload(request, settings.max_images, settings.max_body_bytes)
    except TimeoutError:
        raise ServiceError("deadline_exceeded", f"The body did not arrive in {settings.max_timeout_ms} ms.") from None
    try:
        content = await _while_connected(request, _computed(pipeline, engine, upload, media_type, explain, arrival))
    finally:
        upload.close()
    return Response(content, media_type=media_type)


async def _computed(
    pipeline: Pipeline, engine: Engine, upload: Upload, media_type: str, explain: bool, arrival: float
) -> bytes:
    asked = parse_options(upload.fields, len(upload.images), "explain" if explain else "predict")
    if media_type == PNG and (len(asked) > 1 or asked[0].top_targets not in (None, 1)):
        raise ServiceError("not_acceptable", "image/png answers one map of one image; use application/json.")
    requests = pipeline.check(upload.images, asked, explain=explain, draw=media_type == PNG, arrival=arrival)
    outcomes = await pipeline.run(requests)
    for outcome in outcomes if len(outcomes) > 1 else ():
        if isinstance(outcome, ServiceError):
            metrics.rejects.labels(outcome.code).inc()
    return await asyncio.to_thread(encode, engine, outcomes, media_type, explain=explain)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
    engine = request.app.state.pipeline.require_engine()
    return Response(ModelListing(models=[identity(engine)]).model_dump_json(), media_type=JSON)


async def model(request: Request) -> Response:
    from dataclasses import asdict

    from parchgrad import options
    from parchgrad.rule import CONSERVE
    from parchgrad.tables import SELECTIONS

    pipeline: Pipeline = request.app.state.pipeline
    engine = named_engine(request)
    settings = pipeline.settings
    answer = ModelAnswer(
        **identity(engine).model_dump(),
        labels=list(engine.model.labels),
        input=asdict(engine.model.preprocessing),
        table={key: value for key, value in engine.table.manifest().items() if key != "labels"},
        options={"method": "gradient", "seed": "logit", "rule": True, **engine.table.defaults.to_json()},
        bounds={
            "target": f"index in 0..{len(engine.model.labels) - 1}, class name, predicted, or top:k, k in 1..{MAX_TOP}",
            "method": ", ".join(options.METHODS),
            "quantile": "(0, 1]",
            "alpha": "(0, 1]",
            "gamma": "[0, 1e6] or inf",
            "selection": ", ".join(SELECTIONS),
            "conserve": ", ".join(CONSERVE),
            "layers": ", ".join(engine.explainer.layer_names),
            "seed": ", ".join(options.SEEDS),
            "top_k": f"1..{len(engine.model.labels)}",
            "timeout_ms": f"1..{settings.max_timeout_ms}",
        },
        limits={
            "image_bytes": settings.max_image_bytes,
            "image_pixels": settings.max_image_pixels,
            "images": settings.max_images,
        },
    )
    return Response(answer.model_dump_json(), media_type=JSON)


def named_engine(request: Request) -> Engine:
    """The engine of the route's `name` (and `version`). Raises ServiceError: unknown_model, unknown_version."""
    pipeline: Pipeline = request.app.state.pipeline
    engine = pipeline.require_engine()
    name, version = request.path_params["name"], request.path_params.get("version", engine.model.version)
    if name != engine.model.name:
        raise ServiceError("unknown_model", f"There is no model {name[:64]!r}; there is '{engine.model.name}'.")
    if version != engine.model.version:
        raise ServiceError(
            "unknown_version", f"Model '{name}' has no version {version[:64]!r}; it has '{engine.model.version}'."
        )
    return engine


async def exposition(request: Request) -> Response:
    return Response(await asyncio.to_thread(metrics.exposition), headers={"Content-Type": metrics.CONTENT_TYPE})


ROUTES = [
    Route("/predict", predict, methods=["POST"]),
    Route("/explain", explain, methods=["POST"]),
    Route("/models", models, methods=["GET"]),
    Route("/models/{name}", model, methods=["GET"]),
    Route("/metrics", exposition, methods=["GET"]),
]
