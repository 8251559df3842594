"""The routes that change which models serve, as Triton's model repository extension has them."""

from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.body import read_json
from service.errors import ServiceError
from service.native import origin
from service.pipeline import Pipeline
from service.repository import READY, Repository

MAX_BODY_BYTES = 65_536
UNLOAD_DEPENDENTS = "unload_dependents"  # Triton's clients send it; no model here depends on another


async def index(request: Request) -> Response:
    """Every version known: what serves, what loads, what failed and why. `{"ready": true}` leaves only the first."""
    body = await _body(request, {"ready": bool})
    repository: Repository = request.app.state.pipeline.repository
    states = [state for state in repository.states() if state.state == READY or not body.get("ready")]
    return JSONResponse([{"name": s.name, "version": s.version, "state": s.state, "reason": s.reason} for s in states])


async def load(request: Request) -> Response:
    await _change(request, served=True)
    return Response(status_code=200)


async def unload(request: Request) -> Response:
    await _change(request, served=False)
    return Response(status_code=200)


async def _change(request: Request, *, served: bool) -> None:
    await _body(request, {"parameters": dict})
    pipeline: Pipeline = request.app.state.pipeline
    await pipeline.change(origin(request), request.path_params["name"], served=served)


async def _body(request: Request, known: dict[str, type]) -> dict[str, object]:
    """The JSON object sent. Raises ServiceError: malformed_request, unknown_field."""
    body = await read_json(request, MAX_BODY_BYTES, request.app.state.pipeline.settings)
    if not isinstance(body, dict):
        raise ServiceError("malformed_request", "The body must be a JSON object.")
    for name, value in body.items():
        if name not in known:
            raise ServiceError("unknown_field", f"Field {name[:64]!r} is not known here; known: {', '.join(known)}.")
        if not isinstance(value, known[name]):
            raise ServiceError("malformed_request", f"Field '{name}' must be a {known[name].__name__}.")
    parameters = body.get("parameters")
    check_parameters(parameters if isinstance(parameters, dict) else {})
    return body


def check_parameters(names: Iterable[str]) -> None:
    """Refuse Triton's `config` and `file:`, which would bring a model from outside the repository: unknown_field."""
    for name in names:
        if name != UNLOAD_DEPENDENTS:
            raise ServiceError("unknown_field", f"Parameter {name[:64]!r} is refused: models load from the repository.")


ROUTES = [
    Route("/v2/repository/index", index, methods=["POST"]),
    Route("/v2/repository/models/{name}/load", load, methods=["POST"]),
    Route("/v2/repository/models/{name}/unload", unload, methods=["POST"]),
]
