"""Open Inference Protocol (V2) over HTTP: what serves, what a model takes and gives, readiness, inference.

Where the protocol's two servers differ (KServe answers `{"live": …}`, Triton an empty body) the superset is answered.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from parchgrad import __version__
from service import tracing
from service.body import read_bytes
from service.errors import ServiceError
from service.native import origin, while_connected
from service.pipeline import Pipeline
from service.protocols import inference, open_inference
from service.protocols.open_inference import HEADER_LENGTH
from service.repository import Served

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters")  # by Triton's names


async def server(request: Request) -> Response:
    return JSONResponse({"name": "parchgrad", "version": __version__, "extensions": EXTENSIONS})


async def live(request: Request) -> Response:
    return JSONResponse({"live": True, "ready": request.app.state.pipeline.ready})


async def ready(request: Request) -> Response:
    is_ready = request.app.state.pipeline.ready
    return JSONResponse({"live": True, "ready": is_ready}, status_code=200 if is_ready else 503)


async def metadata(request: Request) -> Response:
    with _named(request) as served:
        versions = _pipeline(request).repository.versions(served.name)
        return JSONResponse(inference.metadata(served.engine, versions))


async def config(request: Request) -> Response:
    with _named(request) as served:
        return JSONResponse(inference.config(served.engine, _pipeline(request).settings.max_images))


async def model_ready(request: Request) -> Response:
    """503 while it loads; 404, as everywhere, for a model there is not."""
    try:
        with _named(request) as served:
            return JSONResponse({"name": served.name, "ready": True})
    except ServiceError as error:
        if error.code != "not_ready":
            raise
        return JSONResponse({"name": request.path_params["name"], "ready": False}, status_code=503)


async def infer(request: Request) -> Response:
    arrival = asyncio.get_running_loop().time()
    pipeline = _pipeline(request)
    settings = pipeline.settings
    with _named(request) as served, pipeline.bodies.share() as share:  # the model before the body, which may be long
        body = await read_bytes(request, settings.max_body_bytes, settings, share)
        return await while_connected(request, _inferred(request, served, body, arrival))


async def _inferred(request: Request, served: Served, body: bytearray, arrival: float) -> Response:
    asked = await asyncio.to_thread(open_inference.decode, body, request.headers.get(HEADER_LENGTH))
    if asked.model_name not in (None, served.name):
        raise ServiceError("malformed_request", f"The body names another model than the address, '{served.name}'.")
    answer = await inference.infer(_pipeline(request), served, asked, arrival, origin(request))
    content, headers = await asyncio.to_thread(tracing.rendered, open_inference.encode, answer, asked)
    return Response(content, headers=headers)


def _pipeline(request: Request) -> Pipeline:
    pipeline: Pipeline = request.app.state.pipeline
    return pipeline


@contextmanager
def _named(request: Request) -> Iterator[Served]:
    """The route's model and version. Raises ServiceError: unknown_model, unknown_version, not_ready."""
    with _pipeline(request).repository.use(request.path_params["name"], request.path_params.get("version")) as served:
        yield served


def _of_a_model() -> Iterator[Route]:
    """Each route of a model, and of one of its versions."""
    for version in ("", "/versions/{version}"):
        address = f"/v2/models/{{name}}{version}"
        yield Route(address, metadata, methods=["GET"])
        yield Route(f"{address}/config", config, methods=["GET"])
        yield Route(f"{address}/ready", model_ready, methods=["GET"])
        yield Route(f"{address}/infer", infer, methods=["POST"])


ROUTES = [
    Route("/v2", server, methods=["GET"]),
    Route("/v2/health/live", live, methods=["GET"]),
    Route("/v2/health/ready", ready, methods=["GET"]),
    *_of_a_model(),
]
