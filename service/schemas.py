"""Request options and answer types of the native routes: what may be asked, and the shape of what comes back.

Options are parsed from text here; ranges of the explanation's own options are the library's (parchgrad.options).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from parchgrad.render import COLORMAPS, OVERLAYS, REDUCTION_OF_POLARITY
from service.errors import ServiceError

ENCODINGS = ("uint8", "float16", "float32", "list", "png", "none")
MAX_TOP = 20


# --- options -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How a map becomes a picture; `clip_*` are percentiles of the map's values."""

    colormap: str = "inferno"
    overlay: str = "original"
    clip_lower: float = 0.0
    clip_upper: float = 99.5


@dataclass(frozen=True)
class ImageOptions:
    """Everything asked of one image. `explain` holds what was given of the library's options, unchecked."""

    explain: dict[str, Any]
    drawing: Drawing
    target: str = "predicted"
    top_k: int | None = None
    timeout_ms: int | None = None
    saliency: str = "uint8"
    polarity: str = "both"

    @property
    def top_targets(self) -> int | None:
        """k of `target=top:k`, else None."""
        return int(self.target.removeprefix("top:")) if self.target.startswith("top:") else None


@dataclass(frozen=True)
class Option:
    """One option: its text's parser, one sentence for the documents, and the routes that know it."""

    name: str
    parse: Callable[[str, str], Any]
    help: str
    predict: bool = False


def _invalid(name: str, text: str, allowed: str) -> ServiceError:
    return ServiceError("option_invalid", f"Option '{name}' is {text[:64]!r}; allowed: {allowed}.")


def _integer(name: str, text: str, low: int, high: int) -> int:
    allowed = f"an integer in {low}..{high}"
    # Plain digits only: int() also takes '1_0', ' 1' and digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high):
        raise _invalid(name, text, allowed)
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _invalid(name, text, "a number" + (", or inf" if name == "gamma" else "")) from None


def _percentile(name: str, text: str) -> float:
    value = _number(name, text)
    if not 0 <= value <= 100:
        raise _invalid(name, text, "a percentile in [0, 100]")
    return value


def _boolean(name: str, text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text not in values:
        raise _invalid(name, text, "true, false, 1 or 0")
    return values[text]


def _target(name: str, text: str) -> str:
    k = text.removeprefix("top:")
    if k != text and not (k.isascii() and k.isdigit() and len(k) <= 2 and 1 <= int(k) <= MAX_TOP):
        raise _invalid(name, text, f"top:k with k in 1..{MAX_TOP}")
    return _text(name, text)


def _text(name: str, text: str) -> str:
    if not text:
        raise _invalid(name, text, "not empty")
    return text


def _globs(name: str, text: str) -> tuple[str, ...]:
    globs = tuple(part.strip() for part in text.split(","))
    if not all(globs):
        raise _invalid(name, text, "comma-separated layer names or glob patterns")
    return globs


def _one_of(*allowed: str) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if text not in allowed:
            raise _invalid(name, text, ", ".join(allowed))
        return text

    return parse


def _in(low: int, high: int) -> Callable[[str, str], int]:
    return lambda name, text: _integer(name, text, low, high)


OPTIONS = {
    option.name: option
    for option in (
        Option("top_k", _in(1, 1_000_000), "Number of predictions to return; default 5.", predict=True),
        Option("timeout_ms", _in(1, 3_600_000), "Deadline of this image, milliseconds.", predict=True),
        Option("target", _target, "Class to explain: index, class name, 'predicted' (default) or 'top:k'."),
        Option("method", _text, "Attribution method; default gradient."),
        Option("rule", _boolean, "false: the plain method, without ParchGrad."),
        Option("quantile", _number, "Share of each layer's channels to select, in (0, 1]."),
        Option("alpha", _number, "Select by p-value instead of quantile, in (0, 1]."),
        Option("gamma", _number, "Weight of the selected side, in [0, 1e6] or inf."),
        Option("selection", _text, "class or instance."),
        Option("conserve", _text, "independent, exact or none."),
        Option("layers", _globs, "Comma-separated layer names or glob patterns the rule acts on."),
        Option("seed", _text, "logit or probability_weighted_logit."),
        Option("saliency", _one_of(*ENCODINGS), f"Encoding of the map: {', '.join(ENCODINGS)}; default uint8."),
        Option("colormap", _one_of(*COLORMAPS), f"Colours of pictures: {', '.join(COLORMAPS)}; default inferno."),
        Option("overlay", _one_of(*OVERLAYS), f"What pictures show under the map: {', '.join(OVERLAYS)}."),
        Option("polarity", _one_of(*REDUCTION_OF_POLARITY), "Sign of attribution the map shows; default both."),
        Option("clip_lower", _percentile, "Percentile of the map drawn as nothing; default 0."),
        Option("clip_upper", _percentile, "Percentile of the map drawn as full; default 99.5."),
    )
}
NOT_YET = ("outline",)

_EXPLAIN = ("method", "rule", "quantile", "alpha", "gamma", "selection", "conserve", "layers", "seed")
_DRAWING = ("colormap", "overlay", "clip_lower", "clip_upper")


def parse_options(fields: dict[str, list[str]], images: int, route: str) -> list[ImageOptions]:
    """One ImageOptions for each of `images`; a field comes once, or once an image. Raises ServiceError."""
    known = [name for name, option in OPTIONS.items() if route == "explain" or option.predict]
    for name in fields:
        if name in NOT_YET:
            raise ServiceError("option_unsupported", f"Option '{name}' is not supported yet.")
        if name not in known:
            raise ServiceError(
                "unknown_field",
                f"Field {name[:64]!r} is not an option of /{route}; its options are {', '.join(known)}.",
            )
    columns = {name: _column(name, texts, images) for name, texts in fields.items()}
    return [_of_image({name: column[i] for name, column in columns.items()}) for i in range(images)]


def _column(name: str, texts: Sequence[str], images: int) -> list[Any]:
    if len(texts) not in (1, images):
        raise ServiceError(
            "option_invalid",
            f"Option '{name}' is given {len(texts)} times; allowed: once, or once for each of {images} images.",
        )
    values = [OPTIONS[name].parse(name, text) for text in texts]
    return values if len(values) == images else values * images


def _of_image(values: dict[str, Any]) -> ImageOptions:
    if "alpha" in values and "quantile" in values:
        raise ServiceError("option_invalid", "Options 'quantile' and 'alpha' exclude each other; give one of them.")
    explain = {name: values.pop(name) for name in _EXPLAIN if name in values}
    drawing = Drawing(**{name: values.pop(name) for name in _DRAWING if name in values})
    if drawing.clip_lower >= drawing.clip_upper:
        raise ServiceError(
            "option_invalid",
            f"Option 'clip_lower' is {drawing.clip_lower:g}; allowed: less than clip_upper, {drawing.clip_upper:g}.",
        )
    return ImageOptions(explain=explain, drawing=drawing, **values)


# --- answers -----------------------------------------------------------------------------------------------


class Answer(BaseModel):
    """What is None is left out of the answer's JSON."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorBody(Answer):
    code: str
    message: str


class ErrorAnswer(Answer):
    """The body of every status of 400 and above on the native routes."""

    error: ErrorBody


class ModelIdentity(Answer):
    name: str
    version: str
    weights_sha256: str
    table_sha256: str


class Prediction(Answer):
    index: int
    label: str
    probability: float


class SaliencyMap(Answer):
    """A map of `shape` (height, width). Its values are `scale` times the data (little endian), row by row."""

    shape: tuple[int, int]
    dtype: str
    scale: float
    encoding: Literal["base64", "list"]
    data: str | list[list[float]]


class Transform(Answer):
    """`crop_box` (left, top, right, bottom) puts the map back on the upright original, (width, height)."""

    original_size: tuple[int, int]
    exif_orientation: int
    crop_box: tuple[float, float, float, float]


class Quality(Answer):
    """`gini` is absent for a map of zeros."""

    gini: float | None = None
    identity_layers: int


class ExplanationAnswer(Answer):
    """The map and every option it was made with: `quantile` (a number, or by layer pattern) or `alpha`."""

    status: Literal["ok"] = "ok"
    target: Prediction
    method: str
    rule: bool
    quantile: float | dict[str, float] | None = None
    alpha: float | None = None
    gamma: float | Literal["inf"]
    selection: str
    conserve: str
    layers: list[str]
    seed: str
    polarity: str
    saliency: SaliencyMap | None = None
    transform: Transform
    quality: Quality


class FailedAnswer(Answer):
    """In `results`: this image failed, its neighbours did not. In `explanation`: the prediction stands."""

    status: Literal["error"] = "error"
    error: ErrorBody


class PredictResult(Answer):
    status: Literal["ok"] = "ok"
    predictions: list[Prediction]


class ExplainResult(Answer):
    """`explanations`, best class first, only for `target=top:k`; `explanation` otherwise."""

    status: Literal["ok"] = "ok"
    predictions: list[Prediction]
    explanation: ExplanationAnswer | FailedAnswer | None = None
    explanations: list[ExplanationAnswer | FailedAnswer] | None = None


class PredictAnswer(Answer):
    model: ModelIdentity
    results: list[PredictResult | FailedAnswer]


class ExplainAnswer(Answer):
    model: ModelIdentity
    results: list[ExplainResult | FailedAnswer]


class ModelListing(Answer):
    models: list[ModelIdentity]


class ModelAnswer(ModelIdentity):
    """`options` are the defaults an explanation takes from the table; `bounds` what each may be."""

    labels: list[str]
    input: dict[str, Any]
    table: dict[str, Any]
    options: dict[str, Any]
    bounds: dict[str, str]
    limits: dict[str, int]
