"""KServe's protocol V1 over HTTP: a list of instances in, predictions and explanations out, all of it JSON.

An instance is an image in base64 and its options: `{"image": {"b64": "…"}, "target": 217}`. What is answered of it is
what the native routes answer, in V1's arrangement.
"""

import asyncio
import io
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service import metrics, tracing
from service.answers import JSON, encode
from service.body import read_bytes
from service.engine import Engine
from service.errors import ServiceError
from service.native import origin, while_connected
from service.pipeline import Image, Outcome, Pipeline
from service.protocols.inference import all_of, from_base64, text_of
from service.protocols.open_inference import read_message
from service.repository import Served
from service.schemas import ImageOptions, parse_options

MAX_JSON_BYTES = 33_554_432  # an image of the largest size in base64; parsing more would hold everybody up
MAX_INSTANCES = 1000  # what the setting of images a request may allow at most

Value = StrictBool | StrictInt | StrictFloat | StrictStr


class _Encoded(BaseModel):
    model_config = ConfigDict(extra="forbid")

    b64: StrictStr


class _Instance(BaseModel):
    """What is not the image is an option of it."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value]

    image: _Encoded


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    instances: Annotated[list[_Instance], Field(min_length=1, max_length=MAX_INSTANCES)]


async def predict(request: Request) -> Response:
    return await _answer(request, "predict")


async def explain(request: Request) -> Response:
    return await _answer(request, "explain")


async def _answer(request: Request, route: str) -> Response:
    arrival = asyncio.get_running_loop().time()
    metrics.asked("explain" if route == "explain" else "predict")
    pipeline: Pipeline = request.app.state.pipeline
    settings = pipeline.settings
    with pipeline.repository.use(request.path_params["name"]) as served, pipeline.bodies.share() as share:
        body = await read_bytes(request, min(settings.max_body_bytes, MAX_JSON_BYTES), settings, share)
        return await while_connected(request, _computed(request, served, body, route, arrival))


async def _computed(request: Request, served: Served, body: bytearray, route: str, arrival: float) -> Response:
    pipeline: Pipeline = request.app.state.pipeline
    images, asked = await asyncio.to_thread(_read, body, pipeline.settings.max_images, route)
    checked = pipeline.check(served, images, asked, explain=route == "explain", draw=False, arrival=arrival)
    outcomes = all_of(await pipeline.run(served, checked, origin(request)))
    content = await asyncio.to_thread(tracing.rendered, _arranged, served.engine, outcomes, route)
    return Response(content, media_type=JSON)


def _read(body: bytearray, most: int, route: str) -> tuple[list[Image], list[ImageOptions]]:
    instances = read_message(body, _Body).instances
    if len(instances) > most:
        raise ServiceError("too_many_images", f"There are {len(instances)} instances; at most {most} are accepted.")
    images: list[Image] = []
    asked = []
    for i, instance in enumerate(instances):
        images.append(io.BytesIO(from_base64(instance.image.b64, f"instances.{i}.image.b64")))
        texts = {name: [text_of(value)] for name, value in instance.__pydantic_extra__.items()}
        asked += parse_options(texts, 1, route)
    return images, asked


def _arranged(engine: Engine, outcomes: Sequence[Outcome], route: str) -> bytes:
    """`predictions` and, for :explain, `explanations`: an entry an instance, a list of maps where it said `top:k`."""
    answer = from_json(encode(engine, outcomes, JSON, explain=route == "explain"))
    arranged = {
        "model": answer["model"],
        "software": answer["software"],
        "predictions": [one["predictions"] for one in answer["results"]],
    }
    if route == "explain":
        maps = [one["explanation"] if "explanation" in one else one["explanations"] for one in answer["results"]]
        arranged["explanations"] = maps
    return to_json(arranged)


async def models(request: Request) -> Response:
    served = request.app.state.pipeline.repository.listing()
    return JSONResponse({"models": sorted({one.name for one in served})})


async def model_ready(request: Request) -> Response:
    """503 while it loads; 404, as everywhere, for a model there is not."""
    name = request.path_params["name"]
    try:
        with request.app.state.pipeline.repository.use(name):
            return JSONResponse({"name": name, "ready": True})
    except ServiceError as error:
        if error.code != "not_ready":
            raise
        return JSONResponse({"name": name, "ready": False}, status_code=503)


ROUTES = [
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name}:predict", predict, methods=["POST"]),
    Route("/v1/models/{name}:explain", explain, methods=["POST"]),
    Route("/v1/models/{name}", model_ready, methods=["GET"]),
]
