"""The OpenAPI document at /docs.json, made of the same option list, answer types and error codes the routes use."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse

from parchgrad import __version__
from service import examples
from service.errors import STATUS
from service.protocols import schemas as protocol_types
from service.schemas import (
    CLASS_GRAPH_OPTIONS,
    METHOD_OF,
    OPTIONS,
    REQUEST_OPTIONS,
    TIMEOUTS,
    TRAFFIC_OPTIONS,
    AttackAnswer,
    ClassComparisonAnswer,
    ClassGraphAnswer,
    ClassGraphChannelAnswer,
    ClassGraphClassAnswer,
    ErrorAnswer,
    ExplainAnswer,
    LayersAnswer,
    ModelAnswer,
    ModelListing,
    Option,
    PageState,
    PredictAnswer,
    SampleListing,
    TrafficAnswer,
    options_of,
    timeout_kind,
)
from service.settings import Settings

JSON = "application/json"
OCTETS = "application/octet-stream"
BINARY = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_REF = "#/components/schemas/{model}"

Schema = dict[str, Any]
Model = type[BaseModel]


# --- which codes a route can answer with --------------------------------------------------------------------

KEYS = ("unauthorized", "forbidden", "rate_limited", "internal")  # of every route that a key may guard
NAMED = ("unknown_model", "unknown_version", "not_ready")
BODY = ("malformed_request", "body_too_large", "content_type_unsupported", "deadline_exceeded")
IMAGES = (
    "no_image", "image_empty", "image_truncated", "image_corrupt", "too_many_images", "image_too_many_bytes",
    "image_too_many_pixels", "image_too_complex", "image_unsupported",
)  # fmt: skip
COMPUTED = (
    "unknown_field", "option_invalid", "queue_full", "out_of_memory", "audit_unavailable", "prediction_not_finite",
)  # fmt: skip
NATIVE = (*KEYS, *NAMED, *BODY, *IMAGES, *COMPUTED, "not_acceptable", "storage_full")
EXPLAINED = ("unknown_class", "target_not_in_table", "map_not_finite", "map_shed")
V1 = (*KEYS, "unknown_model", "not_ready", *BODY, *IMAGES, *COMPUTED)
CHANGED = (*KEYS, *BODY, "unknown_field")


async def view(request: Request) -> JSONResponse:
    return JSONResponse(document(request.app.state.pipeline.settings))


# --- the document -------------------------------------------------------------------------------------------


def document(settings: Settings | None = None) -> Schema:
    """OpenAPI 3.1 of a service with these settings, by default the defaults: their limits are in it."""
    settings = settings or Settings()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "parchgrad",
            "version": __version__,
            "description": "CNN predictions with ParchGrad saliency maps. "
            "Options come as form fields or query parameters, one value or one for each image (repeat the field).",
        },
        "tags": [
            {"name": "native", "description": "Images in; predictions and saliency maps out."},
            {"name": "V2", "description": "The Open Inference Protocol, with binary tensors."},
            {"name": "V1", "description": "KServe's first protocol."},
            {"name": "repository", "description": "Which models serve."},
            {"name": "page", "description": "The page at / and what it is made of."},
            {"name": "operation", "description": "Probes and metrics."},
        ],
        "paths": {
            path: {method: _operation(path, method, operation) for method, operation in methods.items()}
            for path, methods in _paths(settings).items()
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "parameters": {
                "requestId": {
                    "name": "X-Request-Id",
                    "in": "header",
                    "description": "Echoed in the answer, where it is up to 128 visible ASCII characters.",
                    "schema": {"type": "string"},
                }
            },
            "headers": {
                "requestId": {"description": "The request's, or one made for it.", "schema": {"type": "string"}},
                "retryAfter": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
            },
        },
    }


@dataclass(frozen=True)
class Body:
    """`content`: what may be sent, by media type."""

    content: Mapping[str, Schema]
    required: bool = True


@dataclass(frozen=True)
class Operation:
    """One method of one path. `answers`: what 200 may carry, by media type; `access`: open, key or admin."""

    tag: str
    summary: str
    answers: Mapping[str, Schema] = field(default_factory=dict)
    codes: tuple[str, ...] = ()
    access: str = "key"
    body: Body | None = None
    query: tuple[Schema, ...] = ()
    unready: Mapping[str, Schema] | None = None  # the body of 503 where it is no error


def _paths(settings: Settings) -> dict[str, dict[str, Operation]]:
    return {
        "/predict": {"post": _images_in("Predict the class of each image.", "predict", settings)},
        "/explain": {"post": _images_in("Predict, and map what the prediction rests on.", "explain", settings)},
        **_models(),
        **_page(),
        "/layers": {
            "post": _one_image_in(
                "One image's way through the network and back, layer by layer.",
                "layers",
                LayersAnswer,
                (*NATIVE, *EXPLAINED, "option_unsupported"),
                settings,
            )
        },
        "/attack": {
            "post": _one_image_in(
                "One image before and after a small change: predictions, maps, channels.",
                "attack",
                AttackAnswer,
                (*NATIVE, "unknown_class", "map_not_finite", "map_shed", "option_unsupported", "attack_off"),
                settings,
            )
        },
        **_class_graph(),
        **_traffic(),
        **_operation_routes(),
        **_protocol_v2(),
        **_protocol_v1(settings),
        **_repository(),
    }


def _images_in(summary: str, route: str, settings: Settings) -> Operation:
    explain = route == "explain"
    options = {option.name: _columns(option, settings) for option in _served(route, settings)}
    options |= {option.name: _single(option) for option in REQUEST_OPTIONS.values()}
    images = {"type": "array", "items": BINARY, "minItems": 1, "maxItems": settings.max_images}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": images, **options},
        "additionalProperties": False,
    }
    answers = {JSON: _content(ExplainAnswer if explain else PredictAnswer), "application/x-npz": {"schema": BINARY}}
    if explain:
        answers["image/png"] = {"schema": BINARY}
    raw = {"schema": BINARY}
    return Operation(
        "native",
        summary,
        answers,
        (*NATIVE, *EXPLAINED) if explain else NATIVE,
        body=Body(
            {
                "multipart/form-data": {"schema": form, "encoding": {"image": {"contentType": "image/*"}}},
                "image/*": raw,
                OCTETS: raw,
            }
        ),
        query=tuple(_query(name, schema) for name, schema in options.items()),
    )


def _one_image_in(summary: str, route: str, answer: Model, codes: tuple[str, ...], settings: Settings) -> Operation:
    options = {option.name: _single(option) for option in (*_served(route, settings), *REQUEST_OPTIONS.values())}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": BINARY, **options},
        "additionalProperties": False,
    }
    raw = {"schema": BINARY}
    multipart = {"schema": form, "encoding": {"image": {"contentType": "image/*"}}}
    return Operation(
        "page",
        summary,
        {JSON: _content(answer)},
        codes,
        body=Body({"multipart/form-data": multipart, "image/*": raw, OCTETS: raw}),
        query=tuple(
            {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
            for name, schema in options.items()
        ),
    )


def _models() -> dict[str, dict[str, Operation]]:
    version = _query("version", _single(REQUEST_OPTIONS["version"]))
    return {
        "/models": {"get": Operation("native", "The models there are.", {JSON: _content(ModelListing)}, KEYS)},
        "/models/{name}": {
            "get": Operation(
                "native",
                "Labels, input, table, defaults and bounds.",
                {JSON: _content(ModelAnswer)},
                (*KEYS, *NAMED, "unknown_field", "option_invalid"),
                query=(version,),
            )
        },
    }


def _page() -> dict[str, dict[str, Operation]]:
    version = _query("version", _single(REQUEST_OPTIONS["version"]))
    named = (*KEYS, *NAMED, "unknown_field", "option_invalid")
    html, palettes = {"text/html": {"schema": {"type": "string"}}}, {"type": "object", "additionalProperties": _BASE64}
    return {
        "/": {"get": Operation("page", "The page: images, predictions and maps to look at.", html, access="open")},
        "/page/{path}": {
            "get": Operation("page", "A file of the page.", {"*/*": {"schema": BINARY}}, ("not_found",), access="open")
        },
        "/page/state.json": {
            "get": Operation("page", "What the page has to know first.", {JSON: _content(PageState)}, access="open")
        },
        "/page/palettes.json": {
            "get": Operation("page", "Colour maps, 256 x 3 bytes each.", {JSON: {"schema": palettes}}, access="open")
        },
        "/models/{name}/samples": {
            "get": Operation(
                "page", "Pictures to try a model with.", {JSON: _content(SampleListing)}, named, query=(version,)
            )
        },
        "/models/{name}/samples/{file}": {
            "get": Operation(
                "page", "One of them.", {"image/*": {"schema": BINARY}}, (*named, "not_found"), query=(version,)
            )
        },
    }


def _class_graph() -> dict[str, dict[str, Operation]]:
    base, named = "/models/{name}/class-graph", (*KEYS, *NAMED, "no_class_graph", "unknown_field", "option_invalid")
    version = _query("version", _single(REQUEST_OPTIONS["version"]))
    bounds = tuple(_query(name, _single(option)) for name, option in CLASS_GRAPH_OPTIONS.items())
    classes = (*named, "unknown_class", "target_not_in_table")

    def asked(summary: str, answer: Model, codes: tuple[str, ...], *query: Schema) -> dict[str, Operation]:
        return {"get": Operation("page", summary, {JSON: _content(answer)}, codes, query=(version, *query))}

    return {
        base: asked("What classes are made of: layers, classes, where they lie.", ClassGraphAnswer, named),
        f"{base}/classes/{{index}}": asked(
            "One class, by index, name or id: channels and influences.", ClassGraphClassAnswer, classes, *bounds
        ),
        f"{base}/classes/{{index}}/against/{{other}}": asked(
            "Two classes' channels: of both, of one alone.", ClassComparisonAnswer, classes
        ),
        f"{base}/channels/{{layer}}/{{channel}}": asked(
            "One channel: the classes it serves.", ClassGraphChannelAnswer, named
        ),
        f"{base}/exemplars/{{layer}}/{{channel}}": {
            "get": Operation(
                "page",
                "Pieces of the images it was built with that excite a channel most, squares side by side.",
                {"image/webp": {"schema": BINARY}},
                (*named, "not_found"),
                query=(version,),
            )
        },
    }


def _traffic() -> dict[str, dict[str, Operation]]:
    known = {**REQUEST_OPTIONS, **TRAFFIC_OPTIONS}
    return {
        "/traffic": {
            "get": Operation(
                "native",
                "Activations of recent images beside the table's own, and figures of recent maps.",
                {JSON: _content(TrafficAnswer)},
                (*KEYS, *NAMED, "unknown_field", "option_invalid", "unknown_class", "target_not_in_table"),
                query=tuple(_query(name, _single(option)) for name, option in known.items()),
            )
        }
    }


def _operation_routes() -> dict[str, dict[str, Operation]]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/livez": {"get": Operation("operation", "200 while the process answers.", text, access="open")},
        "/healthz": {"get": Operation("operation", "The same, by another name.", text, access="open")},
        "/readyz": {
            "get": Operation(
                "operation", "200 once every model's golden map matched, else 503.", text, ("not_ready",), "open"
            )
        },
        "/metrics": {"get": Operation("operation", "Prometheus metrics.", text, KEYS)},
        "/docs.json": {
            "get": Operation("operation", "This document.", {JSON: {"schema": {"type": "object"}}}, KEYS),
        },
    }


def _protocol_v2() -> dict[str, dict[str, Operation]]:
    types = protocol_types
    health = {JSON: _content(types.Health)}
    paths = {
        "/v2": {"get": Operation("V2", "Server metadata.", {JSON: _content(types.ServerMetadata)}, KEYS)},
        "/v2/health/live": {"get": Operation("V2", "Liveness.", health, access="open")},
        "/v2/health/ready": {"get": Operation("V2", "Readiness.", health, access="open", unready=health)},
    }
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        named = (*KEYS, *(code for code in NAMED if code != "unknown_version" or "{version}" in base))
        ready = {JSON: _content(types.ModelReady)}
        paths |= {
            base: {"get": Operation("V2", "Model metadata.", {JSON: _content(types.ModelMetadata)}, named)},
            f"{base}/config": {
                "get": Operation("V2", "Triton's model configuration.", {JSON: {"schema": {"type": "object"}}}, named)
            },
            f"{base}/ready": {
                "get": Operation(
                    "V2", "Model readiness.", ready, tuple(c for c in named if c != "not_ready"), unready=ready
                )
            },
            f"{base}/infer": {"post": _infer(named)},
        }
    return paths


def _infer(named: tuple[str, ...]) -> Operation:
    types = protocol_types
    binary = {"schema": BINARY}
    explained = tuple(code for code in EXPLAINED if code == "unknown_class")
    return Operation(
        "V2",
        "Predict and explain tensors or encoded images. Raw tensors follow the JSON, whose length the header "
        "Inference-Header-Content-Length gives.",
        {JSON: _content(types.InferResponse), OCTETS: binary},
        (*named, *BODY, *IMAGES, *COMPUTED, *explained, "option_unsupported"),
        body=Body({JSON: _content(types.InferRequest), OCTETS: binary}),
        query=(
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "description": "Bytes of JSON before the raw tensors; without it the whole body is JSON.",
                "schema": {"type": "integer", "minimum": 0},
            },
        ),
    )


def _protocol_v1(settings: Settings) -> dict[str, dict[str, Operation]]:
    types = protocol_types
    ready = {JSON: _content(types.ModelReady)}

    def computed(route: str, answer: Model, codes: tuple[str, ...]) -> dict[str, Operation]:
        body = Body({JSON: {"schema": _instances(route, settings), "examples": examples.of_instances(route)}})
        return {
            "post": Operation("V1", f"The native {route}, in V1's form.", {JSON: _content(answer)}, codes, body=body)
        }

    return {
        "/v1/models": {
            "get": Operation("V1", "Names of the models that serve.", {JSON: _content(types.V1Models)}, KEYS)
        },
        "/v1/models/{name}": {
            "get": Operation("V1", "Model readiness.", ready, (*KEYS, "unknown_model"), unready=ready)
        },
        "/v1/models/{name}:predict": computed("predict", types.V1PredictAnswer, V1),
        "/v1/models/{name}:explain": computed("explain", types.V1ExplainAnswer, (*V1, "unknown_class")),
    }


def _instances(route: str, settings: Settings) -> Schema:
    """V1's body: each instance an image in base64, and its options beside it, as JSON values or as their texts."""
    encoded = {
        "type": "object",
        "required": ["b64"],
        "properties": {"b64": {"type": "string", "format": "byte", "contentEncoding": "base64"}},
        "additionalProperties": False,
    }
    options = {
        option.name: {"description": _described(option), "type": ["boolean", "number", "string"]}
        for option in _served(route, settings)
    }
    instance = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": encoded, **options},
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "required": ["instances"],
        "properties": {
            "instances": {"type": "array", "minItems": 1, "maxItems": settings.max_images, "items": instance}
        },
        "additionalProperties": False,
    }


def _repository() -> dict[str, dict[str, Operation]]:
    types = protocol_types
    entries = {"type": "array", "items": _ref(types.IndexEntry)}
    index = Operation(
        "repository",
        "Every version known: what serves, what loads, what failed and why.",
        {JSON: {"schema": entries, "examples": examples.of_index()}},
        CHANGED,
        body=Body({JSON: _content(types.IndexRequest)}, required=False),
    )

    def change(summary: str, codes: tuple[str, ...]) -> dict[str, Operation]:
        body = Body({JSON: _content(types.ChangeRequest)}, required=False)
        return {"post": Operation("repository", summary, {}, (*CHANGED, "unknown_model", *codes), "admin", body)}

    return {
        "/v2/repository/index": {"post": index},
        "/v2/repository/models/{name}/load": change(
            "Load a model's versions, or load them again; what serves goes on until they are proven.",
            ("unknown_version", "load_failed"),
        ),
        "/v2/repository/models/{name}/unload": change("Stop serving a model, once its last request is answered.", ()),
    }


# --- its parts ----------------------------------------------------------------------------------------------


def _operation(path: str, method: str, operation: Operation) -> Schema:
    names = [part.partition("}")[0] for part in path.split("{")[1:]]
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "example": examples.PATH[name],
        }
        for name in names
    ]
    described: Schema = {
        "operationId": _identifier(path, method),
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [*parameters, *operation.query, {"$ref": "#/components/parameters/requestId"}],
        "responses": _responses(path, operation),
        "security": {
            "open": [],
            "key": [{}, {"bearer": []}, {"apiKey": []}],
            "admin": [{"bearer": []}, {"apiKey": []}],
        }[operation.access],
    }
    if operation.body is not None:
        described["requestBody"] = {"required": operation.body.required, "content": dict(operation.body.content)}
    return described


def _identifier(path: str, method: str) -> str:
    words = "".join(character if character.isalnum() else " " for character in path).split()
    return "_".join([method, *words])


def _responses(path: str, operation: Operation) -> Schema:
    """200, and one response a status of the operation's codes, naming them."""
    headers = {"X-Request-Id": {"$ref": "#/components/headers/requestId"}}
    done: Schema = {"description": operation.summary, "headers": headers}
    if operation.answers:
        done["content"] = dict(operation.answers)
    responses = {"200": done}
    if operation.unready is not None:
        responses["503"] = {"description": "Not ready.", "headers": headers, "content": dict(operation.unready)}
    for status, codes in sorted(_by_status(operation.codes).items()):
        retry = {"Retry-After": {"$ref": "#/components/headers/retryAfter"}} if status in (429, 503) else {}
        responses[str(status)] = {
            "description": f"Codes: {', '.join(codes)}.",
            "headers": {**headers, **retry},
            "content": {JSON: _error(path, codes)},
        }
    return responses


def _by_status(codes: Iterable[str]) -> dict[int, list[str]]:
    statuses: dict[int, list[str]] = {}
    for code in sorted(set(codes)):
        statuses.setdefault(STATUS[code], []).append(code)
    return statuses


def _error(path: str, codes: list[str]) -> Schema:
    """An error's body: the native form names its code, the protocols' has only the message."""
    if path.startswith(("/v1", "/v2")):
        return _content(protocol_types.ProtocolError)
    return {
        "schema": _ref(ErrorAnswer),
        "examples": {code: {"value": {"error": {"code": code, "message": examples.MESSAGES[code]}}} for code in codes},
    }


def _served(route: str, settings: Settings) -> list[Option]:
    """A route's options with the bounds that this service sets."""
    timeout = timeout_kind(settings.max_timeout_ms)
    return [replace(one, kind=timeout) if one.name in TIMEOUTS else one for one in options_of(route)]


def _described(option: Option) -> str:
    default = "" if option.default is None else f" Default {_shown(option.default)}."
    return f"{option.help} Allowed: {option.kind.allowed}.{default}"


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _single(option: Option) -> Schema:
    return {**option.kind.schema, "description": _described(option)}


def _columns(option: Option, settings: Settings) -> Schema:
    """One value, or one for each image."""
    return {
        "type": "array",
        "items": dict(option.kind.schema),
        "minItems": 1,
        "maxItems": settings.max_images,
        "description": _described(option),
    }


def _query(name: str, schema: Schema) -> Schema:
    known = OPTIONS.get(name)
    described: Schema = {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
    # All parameters' examples may be sent together: none that is of another method than the default.
    if known is not None and known.default is not None and name not in METHOD_OF:
        described["example"] = [_shown(known.default) if isinstance(known.default, bool) else known.default]
    return described


def _content(model: Model) -> Schema:
    """A body of this type, with its examples where there are any."""
    found = examples.of(model)
    return {"schema": _ref(model), **({"examples": found} if found else {})}


def _ref(model: Model) -> Schema:
    return {"$ref": _REF.format(model=model.__name__)}


_REQUESTS: tuple[Model, ...] = (
    protocol_types.InferRequest,
    protocol_types.IndexRequest,
    protocol_types.ChangeRequest,
)
_RECEIVED = {model.__name__ for model in _REQUESTS} | {"InferInput", "RequestedOutput"}
_ANSWERS: tuple[Model, ...] = (
    PredictAnswer,
    ExplainAnswer,
    AttackAnswer,
    LayersAnswer,
    ModelListing,
    ModelAnswer,
    ClassGraphAnswer,
    ClassGraphClassAnswer,
    ClassComparisonAnswer,
    ClassGraphChannelAnswer,
    TrafficAnswer,
    PageState,
    SampleListing,
    ErrorAnswer,
    protocol_types.ProtocolError,
    protocol_types.ServerMetadata,
    protocol_types.Health,
    protocol_types.ModelMetadata,
    protocol_types.ModelReady,
    protocol_types.InferResponse,
    protocol_types.IndexEntry,
    protocol_types.V1Models,
    protocol_types.V1PredictAnswer,
    protocol_types.V1ExplainAnswer,
)


def _schemas() -> Schema:
    both: list[tuple[Model, JsonSchemaMode]] = [(model, "validation") for model in _REQUESTS]
    both += [(model, "serialization") for model in _ANSWERS]
    _, schemas = models_json_schema(both, ref_template=_REF)
    definitions: Schema = schemas["$defs"]
    return {name: one if name in _RECEIVED else _as_sent(one) for name, one in definitions.items()}


def _as_sent(schema: Schema) -> Schema:
    """What is None is left out of an answer, and everything else is there, defaults too."""
    if "properties" not in schema:
        return schema
    optional = {name for name, one in schema["properties"].items() if one.get("default", ...) is None}
    return {
        **schema,
        "properties": {
            name: _without_null(one) if name in optional else one for name, one in schema["properties"].items()
        },
        "required": [name for name in schema["properties"] if name not in optional],
    }


def _without_null(schema: Schema) -> Schema:
    kept = {key: value for key, value in schema.items() if key not in ("default", "anyOf")}
    choices = [one for one in schema.get("anyOf", []) if one != {"type": "null"}]
    return {**kept, **(choices[0] if len(choices) == 1 else {"anyOf": choices})}
