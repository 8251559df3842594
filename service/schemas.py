"""Request options and answer types of the native routes: what may be asked, and the shape of what comes back.

`OPTIONS` is the one list behind parsing, the OpenAPI document and `/models/{name}`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from parchgrad.defaults import CONSERVE, SELECTIONS
from parchgrad.options import METHODS, SEEDS
from parchgrad.render import COLORMAPS, OVERLAYS, REDUCTION_OF_POLARITY
from service.errors import STATUS, ServiceError

ENCODINGS = ("uint8", "float16", "float32", "list", "png", "none")
MAX_TOP = 20
MAX_PASSES = 100  # steps or samples of one image: while it is waited for, the other maps wait
MAX_TEXT = 1000  # characters of an option: options are held against the model on the event loop
MAX_PARTS = 50  # patterns or classes in one
DEFAULT_TOP_K = 5

# Options that take part in a map only under one method, or only under the rule: elsewhere they are refused, and an
# answer does not carry them.
METHOD_OF = {
    "steps": "integrated_gradients",
    "samples": "smoothgrad",
    "noise": "smoothgrad",
    "noise_seed": "smoothgrad",
}
OF_RULE = ("quantile", "alpha", "gamma", "selection", "conserve", "layers", "normality_filter")

# A JSON number without its leniency's extremes; float() also takes '1_0', ' 1', 'nan' and digits of other scripts.
_DECIMAL = re.compile(r"-?[0-9]{1,64}(\.[0-9]{1,64})?([eE][+-]?[0-9]{1,3})?", re.ASCII)


# --- what an option's text may be --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """`parse` raises ValueError for what is not `allowed`; `schema` is the JSON Schema of one value."""

    parse: Callable[[str], Any]
    schema: Mapping[str, Any]
    allowed: str


def _integer(low: int, high: int) -> Kind:
    def parse(text: str) -> int:
        # Plain digits only: int() also takes '1_0', ' 1' and digits of other scripts.
        if not (text.isascii() and text.isdigit() and len(text) <= 19 and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return Kind(parse, {"type": "integer", "minimum": low, "maximum": high}, f"an integer in {low}..{high}")


def _count(most: str) -> Kind:
    """An integer of at least 1 whose upper bound, `most` in words, is the model's or the service's."""
    kind = _integer(1, 10**19)
    return Kind(kind.parse, {"type": "integer", "minimum": 1}, f"an integer of at least 1, at most {most}")


def _number(low: float, high: float, *, above: bool = False, infinity: bool = False) -> Kind:
    """A number in [low, high], or in (low, high] where `above`; `infinity` allows `inf` as well."""

    def parse(text: str) -> float:
        if infinity and text == "inf":
            return math.inf
        if not _DECIMAL.fullmatch(text):
            raise ValueError
        value = float(text)
        if not low <= value <= high or (above and value == low):
            raise ValueError
        return value + 0.0  # no negative zero

    schema = {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}
    allowed = f"a number in {'(' if above else '['}{low:g}, {high:.10g}]"
    if infinity:
        return Kind(parse, {"anyOf": [schema, {"type": "string", "enum": ["inf"]}]}, f"{allowed}, or inf")
    return Kind(parse, schema, allowed)


def _one_of(*values: str) -> Kind:
    return _chosen({value: value for value in values}, ", ".join(values))


def _chosen(values: Mapping[str, Any], allowed: str) -> Kind:
    def parse(text: str) -> Any:
        if text not in values:
            raise ValueError
        return values[text]

    return Kind(parse, {"type": "string", "enum": list(values)}, allowed)


def _boolean() -> Kind:
    return _chosen({"true": True, "1": True, "false": False, "0": False}, "true, false, 1 or 0")


def _text(allowed: str, parse: Callable[[str], Any] = str) -> Kind:
    def parse_bounded(text: str) -> Any:
        if not 1 <= len(text) <= MAX_TEXT:
            raise ValueError
        return parse(text)

    return Kind(parse_bounded, {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}, allowed)


def _target(text: str) -> str:
    if text.startswith("top:"):
        _integer(1, MAX_TOP).parse(text.removeprefix("top:"))
    return text


def _globs(text: str) -> tuple[str, ...]:
    globs = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(globs) or len(globs) > MAX_PARTS:
        raise ValueError
    return globs


@dataclass(frozen=True)
class ExplainWhen:
    """When a map is made: where any of the given conditions holds, in terms of the prediction or of the image.

    `confidence_below`: the predicted class's probability is less.  `classes`: the predicted class is one of these,
    indices, names or ids.  `sample_rate`: this share of images, chosen by their bytes, so the same image always decides
    the same.
    """

    confidence_below: float | None = None
    classes: tuple[str, ...] = ()
    sample_rate: float | None = None


def _explain_when(text: str) -> ExplainWhen | None:
    if text == "always":
        return None
    given: dict[str, Any] = {}
    for condition in text.split(";"):
        name, value = _condition(condition)
        if name in given:
            raise ValueError
        given[name] = value
    return ExplainWhen(**given)


def _condition(text: str) -> tuple[str, Any]:
    if text.startswith("confidence<"):
        return "confidence_below", _number(0, 1, above=True).parse(text.removeprefix("confidence<"))
    if text.startswith("sample:"):
        return "sample_rate", _number(0, 1).parse(text.removeprefix("sample:"))
    classes = tuple(dict.fromkeys(text.removeprefix("class:").split("|")))
    if not text.startswith("class:") or not all(classes) or len(classes) > MAX_PARTS:
        raise ValueError
    return "classes", classes


# --- options -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option: what it may be, what it means (a sentence), its default, and whether /predict knows it.

    `default` None: there is none, or it is the table's or the service's.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    predict: bool = False

    def parse(self, text: str) -> Any:
        """The value. Raises ServiceError, naming option, value and what is allowed."""
        try:
            return self.kind.parse(text)
        except ValueError:
            raise _invalid(self.name, text, self.kind.allowed) from None


def _invalid(name: str, text: str, allowed: str) -> ServiceError:
    return ServiceError("option_invalid", f"Option '{name}' is {text[:64]!r}; allowed: {allowed}.")


_TARGET = (
    "a class index, name or id, predicted, or top:k with k an integer of at least 1, at most the number of classes, "
    f"and {MAX_TOP}"
)
_WHEN = (
    "always, or one or more of confidence<NUMBER, class:CLASS|CLASS and sample:NUMBER joined by ';', a CLASS being an "
    "index, name or id and a NUMBER in [0, 1]"
)
_LONGEST = "the longest deadline that the service gives"

# Options of one image: given once for all images, or once for each.
OPTIONS = {
    option.name: option
    for option in (
        Option("top_k", _count("the number of classes"), "Predictions to return.", DEFAULT_TOP_K, predict=True),
        Option("timeout_ms", _count(_LONGEST), "Deadline of this image, milliseconds.", predict=True),
        Option(
            "explain_timeout_ms",
            _count(_LONGEST),
            "Deadline of this image's map, milliseconds: past it the prediction is answered without the map.",
        ),
        Option(
            "explain_when",
            _text(_WHEN, _explain_when),
            "When to make a map: where any of the conditions holds. 'confidence<0.6': the predicted class is less "
            "probable; 'class:217|n01440764': it is one of these; 'sample:0.05': this share of images. Else only "
            "predict.",
            "always",
        ),
        Option("target", _text(_TARGET, _target), "Class to explain; 'top:k': the k most probable.", "predicted"),
        Option("method", _one_of(*METHODS), "Attribution method.", "gradient"),
        Option("rule", _boolean(), "false: the plain method, without ParchGrad.", True),
        Option(
            "quantile", _number(0, 1, above=True), "Share of each layer's channels to select; default: the table's."
        ),
        Option("alpha", _number(0, 1, above=True), "Select by p-value, at most this, instead of by quantile."),
        Option("gamma", _number(0, 1e6, infinity=True), "Weight of the selected side; default: the table's."),
        Option("selection", _one_of(*SELECTIONS), "Channels selected by class or by image; default: the table's."),
        Option("conserve", _one_of(*CONSERVE), "How the rule keeps the gradient's size; default: the table's."),
        Option(
            "layers",
            _text(f"comma-separated layer names or glob patterns, {MAX_PARTS} at most", _globs),
            "Comma-separated layer names or glob patterns the rule acts on; default: the table's.",
        ),
        Option("normality_filter", _boolean(), "Leave out channels distributed normally; default: the table's."),
        Option(
            "seed",
            _one_of(*SEEDS),
            "What is differentiated: the target's logit, or weighted by probability; 'evidence': the logit, its "
            "gradient at the network's last map weighed by where the evidence is.",
            "logit",
        ),
        Option("steps", _integer(1, MAX_PASSES), "Points of integrated_gradients.", 25),
        Option("samples", _integer(1, MAX_PASSES), "Noisy copies of smoothgrad.", 25),
        Option("noise", _number(0, 10), "Their noise: its sd as a share of the image's value range.", 0.15),
        Option("noise_seed", _integer(0, 2**63 - 1), "Random seed of the noise.", 0),
        Option("saliency", _one_of(*ENCODINGS), "Encoding of the map in JSON.", "uint8"),
        Option(
            "polarity",
            _one_of(*REDUCTION_OF_POLARITY),
            "Attribution the map shows, numbers and picture: the positive or negative part of the sum over colours, or "
            "for 'both' the mean magnitude.",
            "both",
        ),
        Option("colormap", _one_of(*COLORMAPS), "Colours of pictures.", "inferno"),
        Option("overlay", _one_of(*OVERLAYS), "What pictures show under the map.", "original"),
        Option("clip_lower", _number(0, 100), "Percentile of the map drawn as nothing; less than clip_upper.", 0.0),
        Option("clip_upper", _number(0, 100), "Percentile of the map drawn as full.", 99.5),
        Option(
            "outline",
            _boolean(),
            "Pictures show outlines of the regions that matter most, not pixels, and are dimmed outside of them "
            "(overlay=mask_black: black).",
            False,
        ),
    )
}

TIMEOUTS = ("timeout_ms", "explain_timeout_ms")

# Options of the whole request: given once.
REQUEST_OPTIONS = {
    option.name: option
    for option in (
        Option("model", _text("a model's name"), "Model to ask; default: the service's."),
        Option("version", _text("a version of the model"), "Its version; default: the newest that is loaded."),
    )
}

_DRAWING = ("colormap", "overlay", "clip_lower", "clip_upper", "outline")
_EXPLAIN = (
    "method", "rule", "quantile", "alpha", "gamma", "selection", "conserve", "layers", "normality_filter", "seed",
    "steps", "samples", "noise", "noise_seed",
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """How a map becomes a picture; `clip_*` are percentiles of the map's values."""

    colormap: str = "inferno"
    overlay: str = "original"
    clip_lower: float = 0.0
    clip_upper: float = 99.5
    outline: bool = False


@dataclass(frozen=True)
class ImageOptions:
    """Everything asked of one image. `explain` holds what was given of the library's options, not held to the model."""

    explain: dict[str, Any] = field(default_factory=dict)
    drawing: Drawing = Drawing()
    target: str = "predicted"
    top_k: int | None = None
    timeout_ms: int | None = None
    explain_timeout_ms: int | None = None
    saliency: str = "uint8"
    polarity: str = "both"
    explain_when: ExplainWhen | None = None

    @property
    def top_targets(self) -> int | None:
        """k of `target=top:k`, else None."""
        return int(self.target.removeprefix("top:")) if self.target.startswith("top:") else None


def take_model(fields: dict[str, list[str]]) -> tuple[str | None, str | None]:
    """Take `model` and `version` out of a request's fields; None where not given. Raises ServiceError."""
    name, version = (_once(option, fields.pop(option.name, [])) for option in REQUEST_OPTIONS.values())
    return name, version


def _once(option: Option, texts: Sequence[str]) -> Any:
    if len(texts) > 1:
        raise ServiceError("option_invalid", f"Option '{option.name}' is given {len(texts)} times; allowed: once.")
    return option.parse(texts[0]) if texts else None


def options_of(route: str) -> list[Option]:
    """The per-image options of `predict` or `explain`."""
    return [option for option in OPTIONS.values() if route == "explain" or option.predict]


def parse_options(fields: Mapping[str, Sequence[str]], images: int, route: str) -> list[ImageOptions]:
    """One ImageOptions for each of `images`; a field comes once, or once an image. Raises ServiceError."""
    known = [option.name for option in options_of(route)]
    for name in fields:
        if name not in known:
            raise ServiceError(
                "unknown_field",
                f"Field {name[:64]!r} is not an option of /{route}; its options are "
                f"{', '.join([*known, *REQUEST_OPTIONS])}.",
            )
    columns = {name: _column(OPTIONS[name], texts, images) for name, texts in fields.items()}
    asked = [_of_image({name: column[i] for name, column in columns.items()}) for i in range(images)]
    _check_effects([one.explain for one in asked])
    return asked


def _check_effects(asked: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an option that changes no image's map; one that changes any may be given for all. Raises ServiceError."""
    given = {name for one in asked for name in one}
    methods = list(dict.fromkeys(one.get("method", OPTIONS["method"].default) for one in asked))
    for name, method in METHOD_OF.items():
        if name in given and method not in methods:
            raise ServiceError(
                "option_invalid", f"Option '{name}' is of {method} only; method is {', '.join(methods)}."
            )
    if not any(one.get("rule", OPTIONS["rule"].default) for one in asked):
        for name in OF_RULE:
            if name in given:
                raise ServiceError("option_invalid", f"Option '{name}' has no effect with rule=false.")


def _column(option: Option, texts: Sequence[str], images: int) -> list[Any]:
    if len(texts) not in (1, images):
        raise ServiceError(
            "option_invalid",
            f"Option '{option.name}' is given {len(texts)} times; allowed: once, or once for each of {images} images.",
        )
    values = [option.parse(text) for text in texts]
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


def option_defaults(engine: Mapping[str, Any], timeout_ms: int) -> dict[str, Any]:
    """What /explain takes where nothing is given; `engine`: the table's and the runtime's, which come before ours."""
    ours = {option.name: option.default for option in OPTIONS.values() if option.default is not None}
    return {**ours, "timeout_ms": timeout_ms, **engine}


def timeout_kind(max_timeout_ms: int) -> Kind:
    """What each of TIMEOUTS may be in a service that gives at most so long."""
    return _integer(1, max_timeout_ms)


def option_bounds(classes: int, layer_names: Sequence[str], max_timeout_ms: int) -> dict[str, str]:
    """What each option may be, in words, for a model of so many classes and the layers its table knows."""
    timeout = timeout_kind(max_timeout_ms).allowed
    most = min(MAX_TOP, classes)
    return (
        {option.name: option.kind.allowed for option in OPTIONS.values()}
        | dict.fromkeys(TIMEOUTS, timeout)
        | {
            "target": f"an index in 0..{classes - 1}, a class name or id, predicted, or top:k with k in 1..{most}",
            "layers": f"comma-separated names or glob patterns of {', '.join(layer_names)}",
            "top_k": _integer(1, classes).allowed,
        }
    )


# --- answers -----------------------------------------------------------------------------------------------


class Answer(BaseModel):
    """What is None is left out of the answer's JSON."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorBody(Answer):
    code: str = Field(json_schema_extra={"enum": list(STATUS)})
    message: str


class ErrorAnswer(Answer):
    """The body of every status of 400 and above on the native routes."""

    error: ErrorBody


class ModelIdentity(Answer):
    name: str
    version: str
    weights_sha256: str
    table_sha256: str


class Software(Answer):
    """What computed the answer: this package's version, the runtime's name and version, the device."""

    parchgrad: str
    runtime: str
    device: str


class Prediction(Answer):
    index: int
    label: str
    probability: float


Dtype = Literal["uint8", "float16", "float32", "png"]


class SaliencyMap(Answer):
    """A map of `shape` (height, width). Its values are `scale` times the data (little endian), row by row."""

    shape: tuple[int, int]
    dtype: Dtype
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
    """The map and every option it was made with, enough to make it again.

    Under `rule` also `quantile` (a number, or by layer pattern) or `alpha`, and `gamma` to `normality_filter`; `steps`
    only of integrated_gradients; `samples`, `noise` and `noise_seed` only of smoothgrad. Numbers are exact.
    """

    status: Literal["ok"] = "ok"
    target: Prediction
    method: str
    rule: bool
    quantile: float | dict[str, float] | None = None
    alpha: float | None = None
    gamma: float | Literal["inf"] | None = None
    selection: str | None = None
    conserve: str | None = None
    layers: list[str] | None = None
    normality_filter: bool | None = None
    seed: str
    steps: int | None = None
    samples: int | None = None
    noise: float | None = None
    noise_seed: int | None = None
    polarity: str
    saliency: SaliencyMap | None = None
    transform: Transform | None = None
    quality: Quality


class MissingExplanation(Answer):
    """There is a prediction and no map: not asked for under `explain_when`, shed under load, or late."""

    status: Literal["skipped", "shed", "timeout"]
    reason: str


class FailedAnswer(Answer):
    """In `results`: this image failed, its neighbours did not. In `explanation`: the prediction stands."""

    status: Literal["error"] = "error"
    error: ErrorBody


AnyExplanation = Annotated[ExplanationAnswer | MissingExplanation | FailedAnswer, Field(discriminator="status")]


class PredictResult(Answer):
    """`image_sha256` is the digest of the encoded file."""

    status: Literal["ok"] = "ok"
    image_sha256: str | None = None
    predictions: list[Prediction]


class ExplainResult(PredictResult):
    """`explanations`, best class first, only for `target=top:k` (a single entry where there are no maps)."""

    explanation: AnyExplanation | None = None
    explanations: list[AnyExplanation] | None = None


AnyPredictResult = Annotated[PredictResult | FailedAnswer, Field(discriminator="status")]
AnyExplainResult = Annotated[ExplainResult | FailedAnswer, Field(discriminator="status")]


class PredictAnswer(Answer):
    """`request_id` is the request's X-Request-Id."""

    model: ModelIdentity
    software: Software
    request_id: str | None = None
    results: list[AnyPredictResult]


class ExplainAnswer(Answer):
    """`request_id` is the request's X-Request-Id."""

    model: ModelIdentity
    software: Software
    request_id: str | None = None
    results: list[AnyExplainResult]


class ModelEntry(Answer):
    """One version of a model. The digests are known once it is loaded; `reason` says why it is not."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str | None = None
    weights_sha256: str | None = None
    table_sha256: str | None = None


class ModelListing(Answer):
    """`default` is the model asked where a request names none."""

    default: str | None = None
    models: list[ModelEntry]


class ModelAnswer(ModelIdentity):
    """`options` are the defaults of /explain with this model; `bounds` what each may be."""

    labels: list[str]
    input: dict[str, Any]
    table: dict[str, Any]
    options: dict[str, Any]
    bounds: dict[str, str]
    limits: dict[str, int]
