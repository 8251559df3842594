"""The OpenAPI document at /docs.json, made of the same option list, answer types and error codes the routes use."""

from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse

from parchgrad import __version__
from service.errors import STATUS
from service.schemas import (
    OPTIONS,
    Answer,
    ErrorAnswer,
    ExplainAnswer,
    ModelAnswer,
    ModelListing,
    PredictAnswer,
)

_REF = "#/components/schemas/{model}"
_ANSWERS: tuple[type[Answer], ...] = (PredictAnswer, ExplainAnswer, ModelListing, ModelAnswer, ErrorAnswer)


async def view(request: Request) -> JSONResponse:
    return JSONResponse(document())


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, schemas = models_json_schema([(model, "serialization") for model in _ANSWERS], ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "parchgrad",
            "version": __version__,
            "description": "CNN predictions with ParchGrad saliency maps. "
            "Options come as form fields or query parameters, one value or one for each image (repeat the field).",
        },
        "paths": {
            "/predict": {"post": _images_in("Predict the class of each image.", PredictAnswer, explain=False)},
            "/explain": {
                "post": _images_in("Predict, and map what the prediction rests on.", ExplainAnswer, explain=True)
            },
            "/models": {"get": _get("The models served.", ModelListing)},
            "/models/{name}": {"get": _get("Labels, input, table, defaults and bounds.", ModelAnswer, "name")},
            "/livez": {"get": _get("200 while the process answers.")},
            "/readyz": {"get": _get("200 once the golden image's map matched, else 503.")},
            "/metrics": {"get": _get("Prometheus metrics.")},
            "/docs.json": {"get": _get("This document.")},
            "/v2": {"get": _get("Open Inference Protocol: server metadata.")},
            "/v2/health/live": {"get": _get("Open Inference Protocol: liveness.")},
            "/v2/health/ready": {"get": _get("Open Inference Protocol: readiness.")},
            **{
                f"/v2/models/{{name}}{version}{suffix}": {
                    "get": _get(f"Open Inference Protocol: model {what}.", None, *names)
                }
                for version, names in (("", ("name",)), ("/versions/{version}", ("name", "version")))
                for suffix, what in (("", "metadata"), ("/ready", "readiness"))
            },
        },
        "components": {"schemas": schemas["$defs"]},
    }


def _images_in(summary: str, answer: type[Answer], *, explain: bool) -> dict[str, Any]:
    options = {
        option.name: {"type": "array", "items": {"type": "string"}, "description": option.help}
        for option in OPTIONS.values()
        if explain or option.predict
    }
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": file}, **options},
        "additionalProperties": False,
    }
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}, "application/x-npz": {"schema": file}}
    if explain:
        content["image/png"] = {"schema": file}
    return {
        "summary": summary,
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
            for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "image/*": {"schema": file}},
        },
        "responses": {"200": {"description": "One result an image, in order.", "content": content}, **_errors()},
    }


def _get(summary: str, answer: type[Answer] | None = None, *path_parameters: str) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": summary}
    if answer is not None:
        ok["content"] = {"application/json": {"schema": _ref(answer)}}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in path_parameters
    ]
    return {"summary": summary, "parameters": parameters, "responses": {"200": ok, "default": _error("An error.")}}


def _errors() -> dict[str, Any]:
    """One response a status, naming its codes."""
    codes: dict[int, list[str]] = {}
    for code, status in STATUS.items():
        codes.setdefault(status, []).append(code)
    return {str(status): _error(f"Codes: {', '.join(names)}.") for status, names in sorted(codes.items())}


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(ErrorAnswer)}}}


def _ref(answer: type[Answer]) -> dict[str, str]:
    return {"$ref": _REF.format(model=answer.__name__)}
