"""Request options and answer types of the native routes: what may be asked, and the shape of what comes back.

`OPTIONS` is the one list behind parsing, the OpenAPI document and `/models/{name}`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from parchgrad.attacks.attack import GRADIENT_KINDS, KINDS, MOST_LEVELS, MOST_STEPS, MOST_TEXT, STEPS, TEXT
from parchgrad.defaults import CONSERVE, SELECTIONS
from parchgrad.options import METHODS, SEEDS, WITHOUT_RULE
from parchgrad.render import COLORMAPS, OVERLAYS, REDUCTION_OF_POLARITY
from service.errors import STATUS, ServiceError

ENCODINGS = ("uint8", "float16", "float32", "list", "png", "none")
MAX_TOP = 20
MAX_PASSES = 100  # steps or samples of one image: while it is waited for, the other maps wait
MAX_TEXT = 1000  # characters of an option: options are held against the model on the event loop
MAX_PARTS = 50  # patterns or classes in one
MAX_CHANNELS = 16  # of a layer of /layers: a few MB of a network of fifty layers
# As the library has them (parchgrad/layer_views.py, which needs torch).
LAYER_METHODS = ("gradient", "input_x_gradient", "guided_backprop")
LAYER_ORDERS = ("activation", "gradient", "table")
MAP_METHODS = (*LAYER_METHODS, "grad_cam")  # of one pass, so that /attack's cost is its steps
DEFAULT_LEVELS, DEFAULT_STRENGTH = 2, 0.5
DEFAULT_TOP_K = 5

# Options that take part in a map only under one method, or only under the rule: elsewhere they are refused, and an
# answer does not carry them. A method WITHOUT_RULE is never under it.
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


def _one_target(text: str) -> str:
    if text.startswith("top:"):
        raise ValueError
    return text


def _watermark() -> Kind:
    """ASCII: the letters that the font surely has."""
    pattern = r"[!-~]([ -~]*[!-~])?"

    def parse(text: str) -> str:
        if len(text) > MOST_TEXT or not re.fullmatch(pattern, text):
            raise ValueError
        return text

    schema = {"type": "string", "minLength": 1, "maxLength": MOST_TEXT, "pattern": f"^{pattern}$"}
    return Kind(parse, schema, f"1 to {MOST_TEXT} printable ASCII characters, no space at the ends")


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
_ONE_TARGET = "a class index, name or id, or predicted"
_WHEN = (
    "always, or one or more of confidence<NUMBER, class:CLASS|CLASS and sample:NUMBER joined by ';', a CLASS being an "
    "index, name or id and a NUMBER in [0, 1]"
)
_LONGEST = "the longest deadline that the service gives"
_WITHOUT_RULE = " or ".join(WITHOUT_RULE)

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
        Option("method", _one_of(*METHODS), f"Attribution method; {_WITHOUT_RULE} has no rule.", "gradient"),
        Option("rule", _boolean(), f"false: the plain method, without ParchGrad, as {_WITHOUT_RULE} always is.", True),
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
            f"gradient at the network's last map weighed by where the evidence is, not with method {_WITHOUT_RULE}.",
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
        Option("opacity", _number(0, 1), "How much of all that lies over the image itself in pictures.", 1.0),
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

_DRAWING = ("colormap", "overlay", "clip_lower", "clip_upper", "outline", "opacity")
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
    opacity: float = 1.0


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


# What the class graph's routes take beside `version`: how much of a class is told.
MAX_NODES, MAX_EDGES = 500, 2000
MAX_SERVED = 100  # classes named of those that select a channel
CLASS_GRAPH_OPTIONS = {
    option.name: option
    for option in (
        Option("nodes", _integer(1, MAX_NODES), "Channels to tell of, each layer's most walked in turn.", 100),
        Option("edges", _integer(0, MAX_EDGES), "Influences between them to tell of, the strongest.", 400),
    )
}

# What GET /traffic takes beside `model` and `version`.
TRAFFIC_OPTIONS = {
    "class": Option("class", _text("an index, a name or an id"), "The class to show; without it all together."),
    "span": Option("span", _one_of("hour", "day"), "How far back.", "hour"),
}


def take_model(fields: dict[str, list[str]]) -> tuple[str | None, str | None]:
    """Take `model` and `version` out of a request's fields; None where not given. Raises ServiceError."""
    name, version = (once(option, fields.pop(option.name, [])) for option in REQUEST_OPTIONS.values())
    return name, version


def once(option: Option, texts: Sequence[str]) -> Any:
    """The value of an option that may be given once; None where it is not. Raises ServiceError."""
    if len(texts) > 1:
        raise ServiceError("option_invalid", f"Option '{option.name}' is given {len(texts)} times; allowed: once.")
    return option.parse(texts[0]) if texts else None


# Of /layers: one way forward and back of one image, and how much is shown of each layer.
_OF_LAYERS = ("top_k", "timeout_ms", *(name for name in _EXPLAIN if name not in METHOD_OF))
LAYER_OPTIONS = {
    option.name: option
    for option in (
        Option("target", _text(_ONE_TARGET, _one_target), "Class to look at.", "predicted"),
        *(OPTIONS[name] for name in _OF_LAYERS if name != "method"),
        Option("method", _one_of(*LAYER_METHODS), "Attribution method whose way back is shown.", "gradient"),
        Option("channels", _integer(1, MAX_CHANNELS), "Channels shown of each layer, half of them selected ones.", 8),
        Option("order", _one_of(*LAYER_ORDERS), "What makes a channel one of the strongest.", "activation"),
    )
}


def take_layers(fields: dict[str, list[str]]) -> tuple[int, str]:
    """Take `channels` and `order` of /layers out of a request's fields. Raises ServiceError."""
    channels, order = (LAYER_OPTIONS[name] for name in ("channels", "order"))
    given = (once(option, fields.pop(option.name, [])) or option.default for option in (channels, order))
    number, kind = given
    return number, kind


# Of /attack: what is done to the image, and how the maps before and after it are made, in one pass each.
_OF_MAPS = (*(name for name in _OF_LAYERS if name != "method"), "polarity")
_GOAL = "a class index, name or id, or any"
ATTACK_OPTIONS = {
    option.name: option
    for option in (
        Option("attack", _one_of(*KINDS), "What is done to the image.", "pgd"),
        Option(
            "strength",
            _number(0, MOST_LEVELS),
            f"How strongly. {' and '.join(GRADIENT_KINDS)}: the most a colour value may change, a whole number of "
            f"levels of 255, default {DEFAULT_LEVELS}; the others: 0 to 1, default {DEFAULT_STRENGTH}.",
        ),
        Option(
            "goal", _text(_GOAL, _one_target), "Class that fgsm and pgd lead to; any: away from the prediction.", "any"
        ),
        Option("attack_steps", _integer(1, MOST_STEPS), "Steps of pgd.", STEPS),
        Option("attack_seed", _integer(0, 2**63 - 1), "Random seed of pgd's start and of noise.", 0),
        Option("text", _watermark(), "What the watermark says.", TEXT),
        Option("most", _integer(1, MAX_CHANNELS), "Channels named of each layer in each direction.", 6),
        Option("method", _one_of(*MAP_METHODS), "Attribution method of the maps.", "gradient"),
        *(OPTIONS[name] for name in _OF_MAPS),
    )
}
_OF_KIND = {"goal": GRADIENT_KINDS, "attack_steps": ("pgd",), "attack_seed": ("pgd", "noise"), "text": ("watermark",)}


@dataclass(frozen=True)
class Attacking:
    """What /attack is asked to do; `goal` is not held against the model, None for any other class."""

    kind: str
    strength: float
    goal: str | None
    steps: int
    seed: int
    text: str
    most: int


def take_attack(fields: dict[str, list[str]]) -> Attacking:
    """Take what is done to the image out of a request's fields. Raises ServiceError."""
    given = {
        name: once(ATTACK_OPTIONS[name], fields.pop(name, []))
        for name in ("attack", "strength", "goal", "attack_steps", "attack_seed", "text", "most")
    }
    kind = given["attack"] or ATTACK_OPTIONS["attack"].default
    for name, kinds in _OF_KIND.items():
        if given[name] is not None and kind not in kinds:
            raise ServiceError("option_invalid", f"Option '{name}' is of {' and '.join(kinds)} only; attack is {kind}.")
    said = {name: ATTACK_OPTIONS[name].default if value is None else value for name, value in given.items()}
    usual = DEFAULT_LEVELS if kind in GRADIENT_KINDS else DEFAULT_STRENGTH
    strength = usual if given["strength"] is None else given["strength"]
    goal = None if said["goal"] == "any" else said["goal"]
    return Attacking(kind, strength, goal, said["attack_steps"], said["attack_seed"], said["text"], said["most"])


def options_of(route: str) -> list[Option]:
    """The per-image options of `predict` or `explain`, or those of `layers` or `attack`."""
    if route == "layers":
        return list(LAYER_OPTIONS.values())
    if route == "attack":
        return list(ATTACK_OPTIONS.values())
    return [option for option in OPTIONS.values() if route == "explain" or option.predict]


def parse_options(fields: Mapping[str, Sequence[str]], images: int, route: str) -> list[ImageOptions]:
    """One ImageOptions for each of `images`; a field comes once, or once an image. Raises ServiceError."""
    known = {option.name: option for option in options_of(route)}
    for name in fields:
        if name not in known:
            raise ServiceError(
                "unknown_field",
                f"Field {name[:64]!r} is not an option of /{route}; its options are "
                f"{', '.join([*known, *REQUEST_OPTIONS])}.",
            )
    columns = {name: _column(known[name], texts, images) for name, texts in fields.items()}
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
    plain = all(method in WITHOUT_RULE for method in methods)
    if plain and any(one.get("rule", False) for one in asked):
        raise ServiceError("option_invalid", f"Option 'rule' is true; allowed: false with method {', '.join(methods)}.")
    if not any(acts(one) for one in asked):
        why = f"method={', '.join(methods)}" if plain else "rule=false"
        for name in OF_RULE:
            if name in given:
                raise ServiceError("option_invalid", f"Option '{name}' has no effect with {why}.")


def acts(explain: Mapping[str, Any]) -> bool:
    """Whether the rule acts under these of the library's options."""
    method, rule = (explain.get(name, OPTIONS[name].default) for name in ("method", "rule"))
    return bool(rule) and method not in WITHOUT_RULE


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


class MapStack(Answer):
    """Maps of one size, `shape` (maps, height, width), side by side: each is its `scales` entry times its data.

    `data` is base64 of integers of one byte, map by map and row by row; `int8` are signed.
    """

    shape: tuple[int, int, int]
    dtype: Literal["uint8", "int8"]
    scales: list[float]
    data: str


class GradientShares(Answer):
    """A part of the energy (sum of squares) of a layer's gradient: of the plain gradient's, without the rule anywhere;
    of what arrives at the layer; of what its rule lets on."""

    plain: float
    before: float
    after: float


class LayerChannel(Answer):
    """`feature`: mean of the convolution's rectified output; `deviations`: that, in the table's own; `rank` (0 is best)
    and `log_p` (natural logarithm): the table's of the channel for the target; `factor`: the rule's. The gradient after
    the rule is the factor times the one before it."""

    index: int
    selected: bool
    feature: float
    deviations: float | None = None
    rank: int | None = None
    log_p: float | None = None
    factor: float
    share: GradientShares


class LayerRule(Answer):
    """The rule in one layer: variances `m` of the selected channels' sum and `n` of the others' and their covariance
    `k` over the positions, `a` and `b`, the factors of both sides (1 where it is the `identity`), and the standard
    deviation of the sum of all channels before and after."""

    m: float
    n: float
    k: float
    a: float
    b: float
    selected_factor: float
    unselected_factor: float
    identity: bool
    sd_before: float
    sd_after: float


class LayerAnswer(Answer):
    """One call of a convolution (`call` of `calls`, from 0), its `shape` (channels, height, width).

    `rule` is absent where it does not act. `energy`: the sums of squares themselves; `selected_share`: the selected
    channels' part of them. `sums`: of the selected channels' gradient, the others', and all after the rule. `channels`
    are the strongest, and `activation`, `plain` and `before` their maps in that order.
    """

    name: str
    call: int
    calls: int
    kind: str
    kernel: list[int]
    stride: list[int]
    groups: int
    shape: list[int]
    active: bool
    selected: list[int]
    rule: LayerRule | None = None
    energy: GradientShares
    selected_share: GradientShares
    sums: MapStack
    channels: list[LayerChannel]
    activation: MapStack
    plain: MapStack
    before: MapStack


class LayersAnswer(Answer):
    """`options`: those in effect, as an explanation has them; `maps`: mean magnitude over colours of the gradient at
    the image, without the rule and with it; `layers`: in the order in which they run."""

    model: ModelIdentity
    software: Software
    request_id: str | None = None
    image_sha256: str
    predictions: list[Prediction]
    target: Prediction
    options: dict[str, Any]
    order: str
    identity_layers: int
    transform: Transform | None = None
    maps: MapStack
    layers: list[LayerAnswer]


class AttackSaid(Answer):
    """What was done: `strength` in levels of 255 for fgsm and pgd, else 0 to 1; `goal` is absent for any class."""

    kind: str
    strength: float
    goal: Prediction | None = None
    steps: int | None = None
    seed: int | None = None
    text: str | None = None


class AttackedClass(Answer):
    """A class's probability before and after."""

    index: int
    label: str
    before: float
    after: float


class MapMovement(Answer):
    """How far a map moved: `agreement` is Spearman's rank correlation of the pixels, `overlap` that of the largest
    tenth's places (intersection over union), `shift` of the centre of mass in diagonals; absent where there is none."""

    agreement: float | None = None
    overlap: float | None = None
    shift: float | None = None


class Perturbation(Answer):
    """`png` shows 128 + `factor` x change, base64; `largest` and `mean` are of the change's magnitude, in levels."""

    png: str
    factor: int
    largest: int
    mean: float


class AttackChannel(Answer):
    """`before` and `after`: the channel's feature in standard deviations of the table's images."""

    index: int
    before: float
    after: float
    of_old: bool
    of_new: bool


class AttackLayer(Answer):
    """`size`: root mean square of all `channels`' changes, in standard deviations; `of_old`, `of_new`, `of_both`: mean
    change of those selected for the old class alone, the new alone, both; absent where there are none."""

    name: str
    channels: int
    size: float
    of_old: float | None = None
    of_new: float | None = None
    of_both: float | None = None
    excited: list[AttackChannel]
    inhibited: list[AttackChannel]


class AttackAnswer(Answer):
    """`old`: the class predicted of the image; `new`: the one predicted after, or the goal where that stayed the same.

    `picture` and `attacked`: PNG in base64, what the model sees. `map_before` and `map_after` are of the old class,
    `map_new` of the new one on the attacked picture; absent where the class has no row in the table, or the two are
    one. `movement` is from `map_before` to `map_after`, `movement_to_new` from `map_before` to `map_new`.
    """

    model: ModelIdentity
    software: Software
    request_id: str | None = None
    image_sha256: str
    attack: AttackSaid
    changed: bool
    old: AttackedClass
    new: AttackedClass
    predictions: list[AttackedClass]
    picture: str
    attacked: str
    perturbation: Perturbation
    options: dict[str, Any]
    map_before: SaliencyMap | None = None
    map_after: SaliencyMap | None = None
    map_new: SaliencyMap | None = None
    movement: MapMovement | None = None
    movement_to_new: MapMovement | None = None
    layers: list[AttackLayer]
    transform: Transform | None = None


class PageState(Answer):
    """What the page has to know first: whether a key is needed, and whether /attack answers."""

    parchgrad: str
    keys: bool
    attacks: bool


class SampleListing(Answer):
    """File names of the pictures that come with a model's package."""

    samples: list[str]


class ClassGraphLayer(Answer):
    """A layer, how many channels it has, and how many of them a class selects."""

    name: str
    channels: int
    selected: int


class ClassGraphPlace(Answer):
    """A class, the images it was looked at with, and where it lies, x and y in [-1, 1]: near is similar."""

    index: int
    label: str
    images: int
    x: float
    y: float


class ClassGraphAnswer(ModelIdentity):
    """Layers in the order of the network, the classes that have a row, how the graph was built.

    `exemplars` (how many channels have crops, crops of each, their pixels, bytes in all) is absent where none are kept.
    """

    layers: list[ClassGraphLayer]
    classes: list[ClassGraphPlace]
    built: dict[str, Any]
    exemplars: dict[str, int] | None = None


class ClassGraphNode(Answer):
    """A selected channel. `strength` 0..1: 1 is the class's strongest of that layer; `log_p`: the table's natural
    logarithm of its p-value; `pagerank`: its share of the walks through the class's graph."""

    layer: str
    channel: int
    strength: float
    log_p: float
    pagerank: float


class ClassGraphEdge(Answer):
    """`source` and `target`: places in `nodes`; `weight`: share of the target's activity that comes by the source."""

    source: int
    target: int
    weight: float


class ClassGraphClassAnswer(Answer):
    """One class: nodes by layer, the strongest first, and the strongest edges between them."""

    index: int
    label: str
    images: int
    nodes: list[ClassGraphNode]
    nodes_in_all: int
    edges: list[ClassGraphEdge]
    edges_in_all: int


class ClassName(Answer):
    index: int
    label: str


class ComparedLayer(Answer):
    """Channels that both classes select, that `a` selects alone, that `b` selects alone."""

    layer: str
    shared: list[int]
    only_a: list[int]
    only_b: list[int]


class ClassComparisonAnswer(Answer):
    """All selected channels of two classes, layer by layer."""

    a: ClassName
    b: ClassName
    layers: list[ComparedLayer]


class ServedClass(ClassName):
    """A class that selects a channel; `strength` and `log_p` as in ClassGraphNode."""

    strength: float
    log_p: float


class ClassGraphChannelAnswer(Answer):
    """One channel, the classes that select it, the strongest first, and how many crops there are of it."""

    layer: str
    channel: int
    classes: list[ServedClass]
    classes_in_all: int
    exemplars: int


class TrafficClass(Answer):
    """A class's divergence in bits by layer, what chance makes of it, and what it stays below; null: too few images.

    `index` is absent for all classes together.
    """

    index: int | None = None
    label: str
    images: int
    reference: Literal["table's images", "normal", "mixed"]
    divergence: list[float | None]
    expected: list[float | None]
    bound: list[float | None]


class TrafficLayer(Answer):
    """A layer's standardised activations by bin: counts of recent images', and shares of the reference's."""

    name: str
    values: int
    live: list[int]
    reference: list[float]


class TrafficBucket(Answer):
    """The chosen class in one piece of time; `start` in seconds since 1970. Layers as in `layers`."""

    start: int
    images: int
    divergence: list[float | None]
    bound: list[float | None]


class TrafficFigureBucket(Answer):
    """Of the maps of one piece of time; `quantiles` as in TrafficFigure."""

    start: int
    maps: int
    quantiles: list[float]


class TrafficFigure(Answer):
    """A figure of the maps under the table's own options: its quantiles 0.05, 0.25, 0.5, 0.75, 0.95, if any."""

    name: str
    lowest: float
    highest: float
    maps: int
    quantiles: list[float]
    history: list[TrafficFigureBucket]


class TrafficAnswer(ModelIdentity):
    """What was lately seen: `classes` begins with all together, `distributions` and `history` are of `chosen`.

    `note` says why no image is looked at, `no_activations` why no activation, `reference_note` why the table's class
    graph is not the reference. `images_of_others`: of classes that are not kept apart, which count in all together.
    """

    span: Literal["hour", "day"]
    bucket_seconds: int
    watch_rate: float
    workers: int
    note: str | None = None
    no_activations: str | None = None
    reference_note: str | None = None
    fewest_images: int
    images: int
    images_of_others: int
    edges: list[float]
    layers: list[str]
    classes: list[TrafficClass]
    chosen: TrafficClass
    distributions: list[TrafficLayer]
    history: list[TrafficBucket]
    figures: list[TrafficFigure]


class ModelAnswer(ModelIdentity):
    """`options` are the defaults of /explain with this model; `bounds` what each may be."""

    labels: list[str]
    input: dict[str, Any]
    table: dict[str, Any]
    options: dict[str, Any]
    bounds: dict[str, str]
    limits: dict[str, int]
