"""Outcomes -> the bytes of an answer: JSON, PNG or npz. Pure and slow enough to run in a thread, off the event loop."""

import base64
import io
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from parchgrad import __version__, render
from parchgrad.answers import quantised
from service.engine import Array, Engine, Result
from service.errors import ServiceError
from service.pipeline import Outcome, best
from service.schemas import (
    DEFAULT_TOP_K,
    METHOD_OF,
    OF_RULE,
    AnyExplanation,
    Dtype,
    ErrorBody,
    ExplainAnswer,
    ExplainResult,
    ExplanationAnswer,
    FailedAnswer,
    ImageOptions,
    MissingExplanation,
    ModelIdentity,
    PredictAnswer,
    Prediction,
    PredictResult,
    Quality,
    SaliencyMap,
    Software,
    Transform,
)

if TYPE_CHECKING:
    from parchgrad.options import Options
    from parchgrad.preprocessing import Placement

JSON, PNG, NPZ = "application/json", "image/png", "application/x-npz"
MEDIA_TYPES = (JSON, PNG, NPZ)
MAX_LIST_VALUES = 300_000  # one map of 512 x 512
SMOOTH = 0.008  # of the picture's longer side: the map of single pixels is hard to see on a photograph
_QUALITY = re.compile(r"0(\.[0-9]*)?|1(\.0*)?", re.ASCII)  # RFC 9110, 12.4.2

Clock = Callable[[], float]


def accepted(header: str) -> str:
    """The media type to answer with, by quality then by our order. Raises ServiceError(not_acceptable)."""
    ranges = []
    for part in header.split(",") if header.strip() else ["*/*"]:
        name, _, parameters = part.partition(";")
        ranges.append((name.strip().lower(), _quality(parameters)))

    def quality(media: str) -> float:
        """That of the most specific range that fits (RFC 9110, 12.5.1)."""
        wanted = (media, media.partition("/")[0] + "/*", "*/*")
        return next((q for range_ in wanted for name, q in ranges if name == range_), 0.0)

    chosen = max(MEDIA_TYPES, key=quality)  # max keeps the first of equals: JSON before the others
    if quality(chosen) <= 0:
        raise ServiceError("not_acceptable", f"Accept is {header[:100]!r}; answers are {', '.join(MEDIA_TYPES)}.")
    return chosen


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            return float(value) if _QUALITY.fullmatch(value.strip()) else 0.0
    return 1.0


def require_one_picture(asked: Sequence[ImageOptions]) -> None:
    """Raises ServiceError(not_acceptable) unless image/png can answer what was asked: one map, whatever happens."""
    if len(asked) > 1 or asked[0].top_targets not in (None, 1):
        raise ServiceError("not_acceptable", "image/png answers one map of one image; use application/json.")
    if asked[0].explain_when is not None:
        raise ServiceError("not_acceptable", "image/png has no place for explain_when; use application/json.")


def encode(
    engine: Engine,
    outcomes: Sequence[Outcome | ServiceError],
    media_type: str,
    *,
    explain: bool,
    request_id: str | None = None,
    now: Clock = time.monotonic,
) -> bytes:
    """A single image's error is raised; of several images, each has its own place in the answer.

    So a request with several images, all of them bad, is answered 200 with an error for each. `now` is the clock of
    the requests' deadlines: the event loop's. A picture whose time is up is not drawn.
    """
    errors = [one for one in outcomes if isinstance(one, ServiceError)]
    late = len(errors) == len(outcomes) and all(one.code == "deadline_exceeded" for one in errors)
    if errors and (len(outcomes) == 1 or late):
        raise errors[0]
    if media_type == PNG:
        return _png(engine, outcomes[0], now)
    if media_type == NPZ:
        return _npz(engine, outcomes)
    _check_lists(outcomes)
    return _json(engine, outcomes, explain, request_id, now)


def _check_lists(outcomes: Sequence[Outcome | ServiceError]) -> None:
    """`saliency=list` costs a hundred times the binary forms. Raises ServiceError beyond MAX_LIST_VALUES."""
    listed = [one for one in outcomes if isinstance(one, Outcome) and one.request.asked.saliency == "list"]
    values = sum(result.saliency.size for one in listed for result in one.results if result.saliency is not None)
    if values > MAX_LIST_VALUES:
        raise ServiceError(
            "option_invalid",
            f"Option 'saliency' is 'list' for maps of {values} values; allowed: {MAX_LIST_VALUES} in all, "
            "or a binary form: uint8, float16, float32.",
        )


def identity(engine: Engine) -> ModelIdentity:
    return ModelIdentity(
        name=engine.model.name,
        version=engine.model.version,
        weights_sha256=engine.model.weights_sha256,
        table_sha256=engine.table.table_sha256,
    )


def software(engine: Engine) -> Software:
    return Software(parchgrad=__version__, runtime=engine.runtime, device=engine.device)


def _json(
    engine: Engine, outcomes: Sequence[Outcome | ServiceError], explain: bool, request_id: str | None, now: Clock
) -> bytes:
    answer = (ExplainAnswer if explain else PredictAnswer)(
        model=identity(engine),
        software=software(engine),
        request_id=request_id,
        results=results(engine, outcomes, explain=explain, now=now),
    )
    return answer.model_dump_json(exclude_none=True).encode()


def results(
    engine: Engine, outcomes: Sequence[Outcome | ServiceError], *, explain: bool, now: Clock = time.monotonic
) -> list[Any]:
    """One PredictResult, ExplainResult (with `explain`) or FailedAnswer an outcome; `now` as in `encode`."""

    def result(outcome: Outcome | ServiceError) -> PredictResult | FailedAnswer:
        if isinstance(outcome, ServiceError):
            return _failed(outcome)
        return _explained(engine, outcome, now) if explain else _predicted(engine, outcome)

    return list(map(result, outcomes))


def _failed(error: ServiceError) -> FailedAnswer:
    return FailedAnswer(error=ErrorBody(code=error.code, message=error.message))


def predictions_of(engine: Engine, outcome: Outcome) -> list[Prediction]:
    probabilities = outcome.first.probabilities
    k = outcome.request.asked.top_k or min(DEFAULT_TOP_K, len(probabilities))
    return [_prediction(engine, outcome.first, index) for index in best(probabilities, k)]


def _prediction(engine: Engine, result: Result, index: int) -> Prediction:
    return Prediction(index=index, label=engine.model.labels[index], probability=float(result.probabilities[index]))


def _predicted(engine: Engine, outcome: Outcome) -> PredictResult:
    return PredictResult(image_sha256=outcome.prepared.sha256, predictions=predictions_of(engine, outcome))


def _explained(engine: Engine, outcome: Outcome, now: Clock) -> ExplainResult:
    maps: list[AnyExplanation]
    if outcome.missing is not None:
        maps = [MissingExplanation(status=outcome.missing.status, reason=outcome.missing.reason)]
    else:
        maps = [_explanation(engine, outcome, result, now) for result in outcome.results]
    many = outcome.request.asked.top_targets
    return ExplainResult(
        image_sha256=outcome.prepared.sha256,
        predictions=predictions_of(engine, outcome),
        explanation=None if many else maps[0],
        explanations=maps if many else None,
    )


def _explanation(engine: Engine, outcome: Outcome, result: Result, now: Clock) -> AnyExplanation:
    if error := map_error(engine, result):
        return _failed(error)
    options, asked = outcome.request.options, outcome.request.asked
    if asked.saliency == "png" and _is_late(outcome, now):
        return MissingExplanation(status="timeout", reason=_late_reason(outcome))
    assert result.saliency is not None
    assert result.figures is not None
    assert options is not None  # results with a map come from requests to explain
    return ExplanationAnswer(
        target=_prediction(engine, result, result.target),
        **effective_options(options),
        polarity=asked.polarity,
        saliency=_saliency(outcome, result.saliency),
        transform=transform_of(outcome.prepared.placement, outcome.prepared.orientation),
        quality=Quality(gini=_or_none(result.figures.gini), identity_layers=result.identity_layers),
    )


def _is_late(outcome: Outcome, now: Clock) -> bool:
    """Whether it is too late to draw: past the map's deadline where the caller named one, else past the image's."""
    request = outcome.request
    return now() >= (request.deadline if request.asked.explain_timeout_ms is None else request.map_deadline)


def _late_reason(outcome: Outcome) -> str:
    name = "timeout_ms" if outcome.request.asked.explain_timeout_ms is None else "explain_timeout_ms"
    return f"The map was made, and not drawn within {name}."


def transform_of(placement: "Placement | None", orientation: int) -> Transform | None:
    if placement is None:
        return None
    return Transform(original_size=placement.original_size, exif_orientation=orientation, crop_box=placement.crop_box)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def effective_options(options: "Options") -> dict[str, Any]:
    """Every option that took part in a map, as JSON has it."""
    quantile = options.quantile if isinstance(options.quantile, float | int) else dict(options.quantile)
    all_of_them = {field.name: getattr(options, field.name) for field in fields(options)} | {
        "quantile": None if options.alpha is not None else quantile,
        "gamma": "inf" if math.isinf(options.gamma) else options.gamma,
        "layers": list(options.layers),
    }
    without_effect = {name for name, method in METHOD_OF.items() if method != options.method}
    without_effect |= set() if options.rule else set(OF_RULE)
    return {name: value for name, value in all_of_them.items() if name not in without_effect}


def map_error(engine: Engine, result: Result) -> ServiceError | None:
    """Why there is no map to answer with, if there is none."""
    if result.saliency is None:
        table, label = engine.table, engine.model.labels[result.target]
        return ServiceError(
            "target_not_in_table",
            f"Table '{table.name}' has no row for class {result.target} ({label}); it covers {len(table.classes)} of "
            f"{len(table.labels)} classes. selection=instance or rule=false needs no row.",
        )
    if not np.isfinite(result.saliency).all():
        return ServiceError("map_not_finite", "The map overflows float32 under these options; gamma may be too large.")
    return None


def _saliency(outcome: Outcome, values: Array) -> SaliencyMap | None:
    encoding = outcome.request.asked.saliency
    if encoding == "none":
        return None
    if encoding == "png":
        picture = _picture(outcome, values)
        data = base64.b64encode(render.png(picture)).decode()
        return SaliencyMap(shape=picture.shape[:2], dtype="png", scale=1.0, encoding="base64", data=data)
    if encoding == "list":
        shape = (values.shape[0], values.shape[1])
        return SaliencyMap(shape=shape, dtype="float32", scale=1.0, encoding="list", data=values.tolist())
    return binary_map(values, cast(Dtype, encoding))


def binary_map(values: Array, dtype: Dtype) -> SaliencyMap:
    """A map `(h, w)` as uint8, float16 or float32, in base64."""
    array, scale = quantised(values, dtype)
    data = base64.b64encode(array.tobytes()).decode()
    return SaliencyMap(shape=(values.shape[0], values.shape[1]), dtype=dtype, scale=scale, encoding="base64", data=data)


def short(value: float) -> float:
    """Six digits: where there are thousands of numbers to be read, and a float32 has no more than seven."""
    return float(f"{value:.6g}")


def _png(engine: Engine, outcome: Outcome | ServiceError, now: Clock) -> bytes:
    assert isinstance(outcome, Outcome)  # a single image's error was raised before
    if missing := outcome.missing:
        raise ServiceError("map_shed" if missing.status == "shed" else "deadline_exceeded", missing.reason)
    if error := map_error(engine, outcome.first):
        raise error
    if _is_late(outcome, now):
        raise ServiceError("deadline_exceeded", _late_reason(outcome))
    assert outcome.first.saliency is not None
    return render.png(_picture(outcome, outcome.first.saliency))


def _picture(outcome: Outcome, values: Array) -> Array:
    """The map over what the model saw, uint8 (h, w, 3), as the drawing options say."""
    backdrop, drawing = outcome.prepared.backdrop, outcome.request.asked.drawing
    assert backdrop is not None  # prepared for every request that draws
    spread = Image.fromarray(values).resize(backdrop.size, Image.Resampling.BILINEAR)
    return render.overlay(
        np.asarray(backdrop),
        np.asarray(spread),
        colormap=drawing.colormap,
        mode=drawing.overlay,
        clip_lower=drawing.clip_lower,
        clip_upper=drawing.clip_upper,
        smooth=SMOOTH * max(backdrop.size),
        outline=drawing.outline,
        opacity=drawing.opacity,
    )


def _npz(engine: Engine, outcomes: Sequence[Outcome | ServiceError]) -> bytes:
    """Arrays named `<what>_<image>`; an image that failed has only `error_<image>`, a string."""
    arrays: dict[str, Any] = {}
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, ServiceError):
            arrays[f"error_{i}"] = np.array(f"{outcome.code}: {outcome.message}")
            continue
        arrays[f"logits_{i}"] = outcome.first.logits
        arrays[f"probabilities_{i}"] = outcome.first.probabilities
        if outcome.missing is not None:
            arrays[f"status_{i}"] = np.array(outcome.missing.status)
        elif outcome.request.options is not None:
            maps = _map_arrays(engine, outcome)
            many = bool(outcome.request.asked.top_targets)
            arrays |= {f"{name}_{i}": array if many else array[0] for name, array in maps.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _map_arrays(engine: Engine, outcome: Outcome) -> dict[str, Array]:
    """`saliency` (k, h, w), `target` (k,) and `status` (k,), `ok` or `error`, of an image's k maps."""
    results = outcome.results
    return {
        "saliency": np.stack([_map_or_nan(outcome, result) for result in results]),
        "target": np.array([result.target for result in results], dtype=np.int64),
        "status": np.array(["error" if map_error(engine, result) else "ok" for result in results]),
    }


def _map_or_nan(outcome: Outcome, result: Result) -> Array:
    if result.saliency is not None:
        return result.saliency
    return np.full(tuple(outcome.prepared.tensor.shape[-2:]), np.nan, dtype=np.float32)
