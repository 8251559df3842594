"""A model asked in named tensors: a V2 request -> images and options -> a V2 response. HTTP and gRPC both call it.

What the tensors are called, their types and shapes stand here, once: `metadata`, `config` and `infer` go by it.
"""

import asyncio
import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from service import metrics, tracing
from service.answers import effective_options, map_error
from service.engine import Engine
from service.errors import ServiceError
from service.pipeline import Image, Origin, Outcome, Pipeline
from service.protocols.open_inference import Array, InferRequest, InferResponse, Parameters, Tensor, check_listed
from service.repository import Served
from service.schemas import OPTIONS, Drawing, ImageOptions, acts, parse_options

BASE64_PIECE = 1 << 20  # characters: the decoder holds the interpreter, and with it the event loop, for a piece


@dataclass(frozen=True)
class Spec:
    """A tensor of the model; `sides` follow the batch dimension, -1 where any is allowed."""

    name: str
    datatype: str
    sides: tuple[int, ...] = ()


IMAGES, IMAGE_BYTES = "images", "image_bytes"
TARGET, QUANTILE = Spec("target", "INT64"), Spec("quantile", "FP32")
PER_IMAGE = (TARGET, QUANTILE, Spec("gamma", "FP32"))
TARGETS = "targets"  # the input `target` of an exported graph: in an ONNX file no input is called as an output is

# A map is a tensor here: there is no picture to draw and no encoding or listing to choose.
_NATIVE_ONLY = {"saliency", "top_k", *(one.name for one in fields(Drawing))}
PARAMETERS = tuple(name for name in OPTIONS if name not in _NATIVE_ONLY)
_SEQUENCE = {"sequence_id": (0, ""), "sequence_start": (False,), "sequence_end": (False,), "priority": (0,)}


def inputs(engine: Engine) -> list[Spec]:
    preprocessing = engine.model.preprocessing
    # A fully convolutional model that keeps the image's own size takes any.
    height, width = (-1, -1) if preprocessing.rule == "native" else preprocessing.size
    return [Spec(IMAGES, "FP32", (3, height, width)), Spec(IMAGE_BYTES, "BYTES"), *PER_IMAGE]


def outputs(engine: Engine) -> list[Spec]:
    classes, (_, height, width) = len(engine.model.labels), inputs(engine)[0].sides
    return [
        Spec("logits", "FP32", (classes,)),
        Spec("probabilities", "FP32", (classes,)),
        Spec("target", "INT64"),
        Spec("saliency", "FP32", (height, width)),
    ]


# --- what a model says of itself ---------------------------------------------------------------------------


def metadata(engine: Engine, versions: Sequence[str]) -> dict[str, Any]:
    """The V2 model metadata; its shapes begin with the batch dimension."""

    def described(spec: Spec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.sides]}

    return {
        "name": engine.model.name,
        "versions": list(versions),
        "platform": engine.platform,
        "inputs": [described(spec) for spec in inputs(engine)],
        "outputs": [described(spec) for spec in outputs(engine)],
    }


def config(engine: Engine, max_images: int) -> dict[str, Any]:
    """Triton's model configuration, whose `dims` leave the batch dimension out; the labels are a parameter, as JSON."""

    def described(spec: Spec) -> dict[str, Any]:
        kind = {"BYTES": "STRING"}.get(spec.datatype, spec.datatype)
        tensor = {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.sides or (1,))}
        return tensor if spec.sides else {**tensor, "reshape": {"shape": []}}

    return {
        "name": engine.model.name,
        "platform": engine.platform,
        "backend": "parchgrad",
        "max_batch_size": max_images,
        "input": [{**described(spec), "optional": True} for spec in inputs(engine)],
        "output": [described(spec) for spec in outputs(engine)],
        "parameters": {
            "labels": {"string_value": json.dumps(engine.model.labels, ensure_ascii=False)},
            "weights_sha256": {"string_value": engine.model.weights_sha256},
            "table_sha256": {"string_value": engine.table.table_sha256},
        },
    }


# --- inference ---------------------------------------------------------------------------------------------


async def infer(
    pipeline: Pipeline, served: Served, request: InferRequest, arrival: float, origin: Origin
) -> InferResponse:
    """Only what is asked for is computed: without `saliency` the images are predicted and not explained.

    Raises ServiceError; an image's own error fails the request and names the image.
    """
    metrics.asked("explain" if request.wants("saliency") else "predict")
    request = _with_our_names(request)
    images = await asyncio.to_thread(_images, served.engine, request, pipeline.settings.max_images)
    asked = _options(served.engine, request, len(images))
    _check_outputs(served.engine, request, len(images))
    checked = pipeline.check(served, images, asked, explain=True, draw=False, arrival=arrival)
    if not request.wants("saliency"):
        checked = [replace(one, options=None) for one in checked]
    outcomes = all_of(await pipeline.run(served, checked, origin))
    return await asyncio.to_thread(tracing.rendered, _response, served.engine, request, outcomes)


def all_of(outcomes: Sequence[Outcome | ServiceError]) -> list[Outcome]:
    """The outcomes, where each image has one. Raises the first image's error there is, naming the image."""
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, ServiceError):
            message = outcome.message if len(outcomes) == 1 else f"Image {i}: {outcome.message}"
            raise ServiceError(outcome.code, message, outcome.retry_after)
    return [one for one in outcomes if isinstance(one, Outcome)]


def _with_our_names(request: InferRequest) -> InferRequest:
    """The request with `targets` called `target`: what is sent to an exported graph may be sent here too."""
    if TARGETS not in request.inputs:
        return request
    if TARGET.name in request.inputs:
        raise ServiceError("malformed_request", f"Inputs '{TARGET.name}' and '{TARGETS}' are one; give one of them.")
    given = {name: tensor for name, tensor in request.inputs.items() if name != TARGETS}
    return replace(request, inputs={**given, TARGET.name: replace(request.inputs[TARGETS], name=TARGET.name)})


def _images(engine: Engine, request: InferRequest, most: int) -> list[Image]:
    given = [name for name in (IMAGES, IMAGE_BYTES) if name in request.inputs]
    if len(given) != 1:
        raise ServiceError("malformed_request", f"Give one of the inputs '{IMAGES}' and '{IMAGE_BYTES}'.")
    (name,) = given
    tensor = request.inputs[name]
    known = {spec.name: spec for spec in inputs(engine)}
    for other in request.inputs.values():
        if other.name not in known:
            raise ServiceError(
                "malformed_request",
                f"Model '{engine.model.name}' has no input {other.name[:64]!r}; its inputs are {', '.join(known)}.",
            )
        _check(other, _as_given(engine, other, known[other.name]))
    count = tensor.shape[0]
    if not count:
        raise ServiceError("no_image", f"Input '{name}' holds no image.")
    if count > most:
        raise ServiceError("too_many_images", f"Input '{name}' holds {count} images; at most {most} are accepted.")
    return _tensors(engine, tensor) if name == IMAGES else _files(tensor)


def _as_given(engine: Engine, tensor: Tensor, spec: Spec) -> Spec:
    """`quantile` may have a number for each layer instead of one."""
    return replace(spec, sides=tensor.shape[1:]) if spec == QUANTILE and _is_by_layer(engine, tensor) else spec


def _is_by_layer(engine: Engine, quantile: Tensor) -> bool:
    return quantile.shape[1:] == (len(engine.layer_names),) != (1,)


def _check(tensor: Tensor, spec: Spec) -> None:
    """Datatype and shape. Raises ServiceError(malformed_request)."""
    if tensor.datatype != spec.datatype:
        raise ServiceError(
            "malformed_request", f"Input '{spec.name}' has datatype {tensor.datatype}; expected {spec.datatype}."
        )
    # One value an image may also come as (n, 1), as Triton's clients send it.
    sides = () if not spec.sides and tensor.shape[1:] == (1,) else tensor.shape[1:]
    fits = len(sides) == len(spec.sides) and all(a in (-1, b) for a, b in zip(spec.sides, sides, strict=True))
    if not tensor.shape or not fits:
        raise ServiceError(
            "malformed_request",
            f"Input '{spec.name}' has shape {list(tensor.shape)}; expected {[-1, *spec.sides]}, -1 being any.",
        )


def _tensors(engine: Engine, tensor: Tensor) -> list[Image]:
    preprocessing, (height, width) = engine.model.preprocessing, tensor.shape[-2:]
    if preprocessing.rule == "native":
        low, high = preprocessing.min_side, preprocessing.max_side
        if not (low <= height <= high and low <= width <= high):
            raise ServiceError(
                "malformed_request", f"Input '{IMAGES}' is {height} x {width}; allowed: sides in {low}..{high}."
            )
    if not np.isfinite(tensor.data).all():
        raise ServiceError("malformed_request", f"Input '{IMAGES}' has values that are not finite.")
    # A copy that a runtime may own: the request's bytes may be read-only, and lie at any address.
    return list(np.array(tensor.data, dtype=np.float32))


def _files(tensor: Tensor) -> list[Image]:
    return [io.BytesIO(_decoded(i, data) if tensor.text else data) for i, data in enumerate(tensor.data.ravel())]


def _decoded(i: int, text: bytes) -> bytes:
    """JSON strings hold no bytes: in JSON an encoded image is base64."""
    return from_base64(text, f"Input '{IMAGE_BYTES}' in JSON: image {i}")


def from_base64(text: str | bytes, thing: str) -> bytes:
    """Raises ServiceError(malformed_request), naming the thing."""
    pieces = [text[i : i + BASE64_PIECE] for i in range(0, len(text), BASE64_PIECE)]
    try:
        decoded = [base64.b64decode(piece, validate=True) for piece in pieces]
    except (binascii.Error, ValueError):
        raise ServiceError("malformed_request", f"{thing} is not base64.") from None
    if any(3 * len(piece) != 4 * len(data) for piece, data in zip(pieces[:-1], decoded, strict=False)):
        raise ServiceError("malformed_request", f"{thing} is not base64.")  # padding before its end
    return b"".join(decoded)


# --- options -----------------------------------------------------------------------------------------------


def _options(engine: Engine, request: InferRequest, images: int) -> list[ImageOptions]:
    """From the request's parameters and the tensors of one value an image; both are texts to the options' parsers."""
    texts = option_texts(request.parameters)
    by_layer = QUANTILE.name in request.inputs and _is_by_layer(engine, request.inputs[QUANTILE.name])
    for spec in PER_IMAGE:
        if spec.name in request.inputs:
            if spec.name in texts:
                raise ServiceError("option_invalid", f"Option '{spec.name}' is given as parameter and as input.")
            if by_layer and spec == QUANTILE:
                continue
            column = request.inputs[spec.name].data.ravel()
            # str() of a float32 is its shortest decimal: 0.1 means 0.1, and not 0.100000001.
            texts[spec.name] = [_target(value) if spec.name == "target" else str(value) for value in column]
    asked = parse_options(texts, images, "explain")
    if any(one.top_targets for one in asked):
        raise ServiceError("option_invalid", "Option 'target' asks for several maps of an image; a tensor holds one.")
    if not by_layer:
        return asked
    for name in ("layers", "rule", "alpha"):
        if name in texts:
            raise ServiceError("option_invalid", f"Option '{name}' has no effect where 'quantile' is given by layer.")
    if not any(acts(one.explain) for one in asked):
        method = ", ".join(dict.fromkeys(one.explain["method"] for one in asked))
        raise ServiceError("option_invalid", f"Option 'quantile' has no effect with method={method}.")
    rows = request.inputs[QUANTILE.name].data
    if len(rows) != images:
        raise ServiceError("option_invalid", f"Input 'quantile' has {len(rows)} rows; allowed: one an image, {images}.")
    return [
        replace(one, explain={**one.explain, **_of_layers(engine.layer_names, row)})
        for one, row in zip(asked, rows, strict=True)
    ]


def _of_layers(names: Sequence[str], row: Array) -> dict[str, Any]:
    """The options that one quantile a layer means, as in an exported graph: where it is 0 the rule does not act."""
    values = [float(str(value)) for value in row]  # shortest decimals, as above
    if not all(0 <= value <= 1 for value in values):
        raise ServiceError("option_invalid", f"Option 'quantile' is {values}; allowed: a number in [0, 1] a layer.")
    acting = {name: value for name, value in zip(names, values, strict=True) if value}
    return {"quantile": acting, "layers": tuple(acting)} if acting else {"rule": False}


def _target(index: "np.int64") -> str:
    return "predicted" if index == -1 else str(index)


def option_texts(parameters: Parameters) -> dict[str, list[str]]:
    """A V2 request's parameters -> option texts. Raises ServiceError on one that is no option of a tensor's answer."""
    texts: dict[str, list[str]] = {}
    for name, value in parameters.items():
        if name in _SEQUENCE:
            if value not in _SEQUENCE[name]:
                raise ServiceError(
                    "option_unsupported", f"Parameter '{name}' is {value!r}; requests have no sequence and no priority."
                )
        elif name == "timeout":
            if milliseconds := _milliseconds(value):
                texts.setdefault("timeout_ms", []).append(milliseconds)
        elif name in PARAMETERS:
            texts.setdefault(name, []).append(text_of(value))
        else:
            raise ServiceError(
                "unknown_field",
                f"Parameter {name[:64]!r} is not known; parameters are {', '.join([*PARAMETERS, 'timeout'])}.",
            )
    if len(texts.get("timeout_ms", ())) > 1:
        raise ServiceError("option_invalid", "Parameters 'timeout' and 'timeout_ms' exclude each other.")
    return texts


def _milliseconds(timeout: object) -> str | None:
    """Triton's timeout is in microseconds, and 0 is none."""
    if type(timeout) is not int or timeout < 0:
        raise ServiceError("option_invalid", f"Parameter 'timeout' is {timeout!r}; allowed: microseconds, an integer.")
    return str(-(-timeout // 1000)) if timeout else None


def text_of(value: bool | int | float | str) -> str:
    """A JSON value as the text of an option."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


# --- outputs -----------------------------------------------------------------------------------------------


def _check_outputs(engine: Engine, request: InferRequest, images: int) -> None:
    """Names and size, before anything is computed; a side that is not known yet counts for one."""
    listed = [spec for spec in outputs(engine) if request.wants(spec.name) and not request.wants_raw(spec.name)]
    check_listed(sum(images * math.prod(max(1, side) for side in spec.sides) for spec in listed))
    known = [spec.name for spec in outputs(engine)]
    for name in request.outputs:
        if name not in known:
            raise ServiceError(
                "malformed_request",
                f"Model '{engine.model.name}' has no output {name[:64]!r}; its outputs are {', '.join(known)}.",
            )


def _response(engine: Engine, request: InferRequest, outcomes: Sequence[Outcome]) -> InferResponse:
    parameters: dict[str, bool | int | float | str] = {
        "weights_sha256": engine.model.weights_sha256,
        "table_sha256": engine.table.table_sha256,
    }
    columns: Mapping[str, list[Any]] = {
        "logits": [one.first.logits for one in outcomes],
        "probabilities": [one.first.probabilities for one in outcomes],
        "target": [_explained_class(one) for one in outcomes],
    }
    if request.wants("saliency"):
        columns = {**columns, "saliency": [_map(engine, one) for one in outcomes]}
        parameters |= _explanation(engine, outcomes)
    return InferResponse(
        model_name=engine.model.name,
        model_version=engine.model.version,
        id=request.id,
        parameters=parameters,
        outputs=[
            Tensor(spec.name, spec.datatype, _stacked(spec, columns[spec.name]))
            for spec in outputs(engine)
            if request.wants(spec.name)
        ],
    )


def _stacked(spec: Spec, rows: Sequence[Any]) -> Array:
    shapes = {np.shape(row) for row in rows}
    if len(shapes) > 1:
        sizes = ", ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise ServiceError(
            "malformed_request",
            f"Output '{spec.name}' is one tensor, and the images' maps are {sizes}; send images of one size together.",
        )
    return np.stack(rows).astype(np.int64 if spec.datatype == "INT64" else np.float32, copy=False)


def _explained_class(outcome: Outcome) -> int:
    """The class explained, or that would have been: the one asked for, else the predicted."""
    named = max(outcome.first.target, outcome.request.target)
    return named if named >= 0 else int(outcome.first.logits.argmax())


def _map(engine: Engine, outcome: Outcome) -> Array:
    """NaN where there is no map."""
    saliency = outcome.first.saliency
    if saliency is None or _problem(engine, outcome) is not None:
        return np.full(tuple(outcome.prepared.tensor.shape[-2:]), np.nan, dtype=np.float32)
    return saliency


def _problem(engine: Engine, outcome: Outcome) -> tuple[str, str] | None:
    """The status and the reason where there is no map."""
    if outcome.missing is not None:
        return outcome.missing.status, outcome.missing.reason
    error = map_error(engine, outcome.first)
    return ("error", error.message) if error else None


def _explanation(engine: Engine, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Each image's status, why maps are missing, and the options the maps were made with, as JSON."""
    problems = [_problem(engine, one) for one in outcomes]
    said = {
        "explanation_status": ",".join(problem[0] if problem else "ok" for problem in problems),
        "explanation_options": json.dumps([_effective(one) for one in outcomes]),
    }
    reasons = [f"Image {i}: {problem[1]}" for i, problem in enumerate(problems) if problem]
    return said | ({"explanation_reason": " ".join(reasons)} if reasons else {})


def _effective(outcome: Outcome) -> dict[str, Any]:
    """All that the map was made with."""
    options = outcome.request.options
    assert options is not None  # who asks has asked for maps
    return {**effective_options(options), "polarity": outcome.request.asked.polarity}
