"""What a service answered, as values: predictions, explanations, maps. Knows the JSON, neither HTTP nor a model."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import DataError

DTYPES = {"uint8": "|u1", "float16": "<f2", "float32": "<f4"}  # of a map's bytes: little endian
ENCODINGS = ("base64", "list")

# What an explanation holds beside the options it was made with.
_NOT_OPTIONS = ("status", "reason", "target", "saliency", "transform", "quality", "error")


class AnswerError(DataError):
    """The JSON is not an answer of the service's /predict or /explain."""


@dataclass(frozen=True)
class Prediction:
    """One class of the model and its probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Failure:
    """Why an image or its map failed: a code of the service's closed list, and one sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class Transform:
    """Where the map lies on the upright original: `crop_box` is left, top, right, bottom in its pixels."""

    original_size: tuple[int, int]  # (width, height)
    exif_orientation: int
    crop_box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Quality:
    """`gini` near 1: the map lies on few pixels; None for a map of zeros. `identity_layers`: the rule did nothing."""

    gini: float | None
    identity_layers: int


@dataclass(frozen=True, eq=False)
class Explanation:
    """One map and all it was made with, or why there is none.

    status: `ok`; `error` (see `error`); or with a `reason`: `skipped` (not asked for under `explain_when`), `shed`
    (left out under load), `timeout`.
    saliency: float32 `(h, w)`; of `saliency=png` the picture's file as bytes; None where the status is not `ok`, and
    for `saliency=none`.
    options: every option in effect by name, enough to make the map again; a gamma of `inf` is the number.
    """

    status: str
    reason: str | None
    target: Prediction | None
    saliency: NDArray[np.float32] | bytes | None
    encoding: str | None
    options: Mapping[str, Any]
    transform: Transform | None
    quality: Quality | None
    error: Failure | None


@dataclass(frozen=True, eq=False)
class Result:
    """What came back for one image: status `ok`, or `error` with nothing but the error.

    predictions: best class first.  explanations: none after /predict, one after /explain, k for `target=top:k`.
    image_sha256: digest of the encoded file, as the service saw it.
    answer: the service's JSON for this image alone; saved to a file it is what `parchgrad explain --replay` takes.
    """

    status: str
    predictions: tuple[Prediction, ...]
    explanations: tuple[Explanation, ...]
    error: Failure | None
    image_sha256: str | None
    answer: Mapping[str, Any]

    @property
    def explanation(self) -> Explanation | None:
        """The explanation, of several the best class's; None after /predict and for an image that failed."""
        return self.explanations[0] if self.explanations else None


def failed(code: str, message: str) -> Result:
    """The result of an image that no service has seen."""
    error = {"status": "error", "error": {"code": code, "message": message}}
    return Result("error", (), (), Failure(code, message), None, {"results": [error]})


def read_answer(answer: object) -> list[Result]:
    """A result for each image of an answer of /predict or /explain, in order. Raises AnswerError."""
    with _shape_errors():
        whole: Any = answer
        if not isinstance(whole["results"], list):
            raise ValueError("its results are no list")
        common = {name: value for name, value in whole.items() if name != "results"}
        return [_result(entry, common) for entry in whole["results"]]


@contextmanager
def _shape_errors() -> Iterator[None]:
    """JSON of another shape fails in some lookup or conversion: each means that it is no answer."""
    try:
        yield
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise AnswerError(f"The JSON is not an answer of /predict or /explain: {reason}.") from error


def _result(entry: Mapping[str, Any], common: Mapping[str, Any]) -> Result:
    if "explanations" in entry:
        explanations = entry["explanations"]
    else:
        explanations = [entry["explanation"]] if "explanation" in entry else []
    return Result(
        status=_text(entry["status"]),
        predictions=tuple(map(_prediction, entry.get("predictions", ()))),
        explanations=tuple(map(_explanation, explanations)),
        error=_failure(entry.get("error")),
        image_sha256=None if entry.get("image_sha256") is None else _text(entry["image_sha256"]),
        answer={**common, "results": [entry]},
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.100} is not text")
    return value


def _prediction(entry: Mapping[str, Any]) -> Prediction:
    return Prediction(int(entry["index"]), _text(entry["label"]), float(entry["probability"]))


def _failure(entry: Mapping[str, Any] | None) -> Failure | None:
    return None if entry is None else Failure(_text(entry["code"]), _text(entry["message"]))


def _explanation(entry: Mapping[str, Any]) -> Explanation:
    options = {name: value for name, value in entry.items() if name not in _NOT_OPTIONS}
    if options.get("gamma") == "inf":
        options["gamma"] = math.inf
    target, saliency = entry.get("target"), entry.get("saliency")
    transform, quality = entry.get("transform"), entry.get("quality")
    return Explanation(
        status=_text(entry["status"]),
        reason=entry.get("reason"),
        target=None if target is None else _prediction(target),
        saliency=None if saliency is None else read_map(saliency),
        encoding=None if saliency is None else _text(saliency["dtype"]),
        options=options,
        transform=None if transform is None else _transform(transform),
        quality=None if quality is None else _quality(quality),
        error=_failure(entry.get("error")),
    )


def _transform(entry: Mapping[str, Any]) -> Transform:
    width, height = map(int, entry["original_size"])
    left, top, right, bottom = map(float, entry["crop_box"])
    return Transform((width, height), int(entry["exif_orientation"]), (left, top, right, bottom))


def _quality(entry: Mapping[str, Any]) -> Quality:
    gini = entry.get("gini")
    return Quality(None if gini is None else float(gini), int(entry["identity_layers"]))


def read_map(entry: Mapping[str, Any]) -> NDArray[np.float32] | bytes:
    """Field `saliency` of an explanation: float32 `(h, w)`, or the bytes of a PNG. Raises AnswerError."""
    with _shape_errors():
        height, width = map(int, entry["shape"])
        _known("encoding", entry["encoding"], ENCODINGS)
        _known("dtype", entry["dtype"], ("float32",) if entry["encoding"] == "list" else (*DTYPES, "png"))
        if entry["encoding"] == "list":
            values = np.asarray(entry["data"], np.float64)
        else:
            data = _decoded(entry["data"])
            if entry["dtype"] == "png":
                return data
            values = np.frombuffer(data, DTYPES[entry["dtype"]]).astype(np.float64)
        if values.size != height * width:
            raise ValueError(f"a map of shape {height} x {width} has {values.size} values")
        # The product in float64, rounded once: exact for float32, whose scale is 1.
        return (values.reshape(height, width) * float(entry["scale"])).astype(np.float32)


def _known(what: str, found: object, known: Collection[str]) -> None:
    if found not in known:
        raise ValueError(f"unknown {what} {found!r:.100}; known are {', '.join(known)}")


def _decoded(data: str) -> bytes:
    try:
        return base64.b64decode(_text(data), validate=True)
    except binascii.Error as error:
        raise ValueError(f"a map's data is not base64: {error}") from error


def quantised(values: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], float]:
    """(array, scale) with values = scale * array. Small floats are scaled to 0..1: gradients underflow float16."""
    steps, scale = _steps(values, dtype)
    return steps.astype(_ON_THE_WIRE[dtype]), scale


_ON_THE_WIRE = {"uint8": "u1", "float16": "<f2", "float32": "<f4"}


def _steps(values: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], float]:
    """Rounded as `dtype` rounds, but floats still: a map that is not finite stays so."""
    if dtype == "float32":
        return values, 1.0
    largest = float(values.max()) or 1.0
    if dtype == "float16":
        return (values / largest).astype(np.float16), largest
    return np.rint(values / largest * 255), largest / 255


def encoded_as(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The map as it comes back after the service sent it as `dtype`."""
    steps, scale = _steps(values, dtype)
    return (steps.astype(np.float64) * scale).astype(np.float32)
