"""Open Inference Protocol (V2): server and model metadata, liveness, readiness. Inference comes with a later version.

Where the protocol's two servers differ (KServe answers `{"live": …}`, Triton an empty body) the superset is answered.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from parchgrad import __version__
from service.errors import ServiceError
from service.native import named_engine

PREFIX = "/v2"


async def server(request: Request) -> JSONResponse:
    return JSONResponse({"name": "parchgrad", "version": __version__, "extensions": []})


async def live(request: Request) -> JSONResponse:
    return JSONResponse({"live": True, "ready": request.app.state.pipeline.ready})


async def ready(request: Request) -> JSONResponse:
    is_ready = request.app.state.pipeline.ready
    return JSONResponse({"live": True, "ready": is_ready}, status_code=200 if is_ready else 503)


async def model(request: Request) -> JSONResponse:
    engine = named_engine(request)
    classes = len(engine.model.labels)
    preprocessing = engine.model.preprocessing
    # A fully convolutional model that keeps the image's own size takes any.
    height, width = (-1, -1) if preprocessing.rule == "native" else preprocessing.size
    return JSONResponse(
        {
            "name": engine.model.name,
            "versions": [engine.model.version],
            "platform": "parchgrad_pytorch",
            "inputs": [
                _tensor("images", "FP32", -1, 3, height, width),
                _tensor("image_bytes", "BYTES", -1),
                _tensor("target", "INT64", -1),
                _tensor("quantile", "FP32", -1),
                _tensor("gamma", "FP32", -1),
            ],
            "outputs": [
                _tensor("logits", "FP32", -1, classes),
                _tensor("probabilities", "FP32", -1, classes),
                _tensor("target", "INT64", -1),
                _tensor("saliency", "FP32", -1, height, width),
            ],
        }
    )


async def model_ready(request: Request) -> JSONResponse:
    try:
        engine = named_engine(request)
    except ServiceError as error:
        if error.code != "not_ready":
            raise
        return JSONResponse({"name": request.path_params["name"], "ready": False}, status_code=503)
    return JSONResponse({"name": engine.model.name, "ready": True})


def _tensor(name: str, datatype: str, *shape: int) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


ROUTES = [
    Route("/v2", server, methods=["GET"]),
    Route("/v2/health/live", live, methods=["GET"]),
    Route("/v2/health/ready", ready, methods=["GET"]),
    Route("/v2/models/{name}", model, methods=["GET"]),
    Route("/v2/models/{name}/ready", model_ready, methods=["GET"]),
    Route("/v2/models/{name}/versions/{version}", model, methods=["GET"]),
    Route("/v2/models/{name}/versions/{version}/ready", model_ready, methods=["GET"]),
]
