"""service/schemas.py: options from text, their bounds, and what is said of a wrong one."""

import ast
import inspect
import math
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parchgrad import options as library
from parchgrad.defaults import Defaults
from parchgrad.errors import OptionError
from service import schemas
from service.errors import ServiceError
from service.schemas import (
    OPTIONS,
    REQUEST_OPTIONS,
    Drawing,
    ExplainWhen,
    ImageOptions,
    option_bounds,
    option_defaults,
    parse_options,
    take_model,
)


def parsed(**texts: str) -> ImageOptions:
    (one,) = parse_options({name: [text] for name, text in texts.items()}, 1, "explain")
    return one


def refused(fields: dict[str, list[str]], images: int = 1, route: str = "explain") -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        parse_options(fields, images, route)
    assert caught.value.status == 422
    return caught.value


def test_nothing_given_is_nothing_asked() -> None:
    assert parsed() == ImageOptions(explain={}, drawing=Drawing())


def test_every_option_arrives_where_it_belongs() -> None:
    one = parsed(
        top_k="3", timeout_ms="100", explain_timeout_ms="50", explain_when="always", target="tench",
        method="smoothgrad", rule="1", quantile="0.25", gamma="inf", selection="instance", conserve="exact",
        layers="features.*, fc", normality_filter="1", seed="logit", samples="7", noise="0.5",
        noise_seed="9223372036854775807", saliency="list", polarity="negative", colormap="viridis", overlay="none",
        clip_lower="62", clip_upper="99.9", outline="true", opacity="0.5",
    )  # fmt: skip
    assert one == ImageOptions(
        explain={
            "method": "smoothgrad", "rule": True, "quantile": 0.25, "gamma": math.inf, "selection": "instance",
            "conserve": "exact", "layers": ("features.*", "fc"), "normality_filter": True, "seed": "logit",
            "samples": 7, "noise": 0.5, "noise_seed": 2**63 - 1,
        },
        drawing=Drawing("viridis", "none", 62.0, 99.9, True, 0.5),
        target="tench", top_k=3, timeout_ms=100, explain_timeout_ms=50, saliency="list", polarity="negative",
    )  # fmt: skip
    assert parsed(alpha="0.05").explain == {"alpha": 0.05}
    texts = {"method": "integrated_gradients", "rule": "false", "steps": "100"}
    assert parsed(**texts).explain == {"method": "integrated_gradients", "rule": False, "steps": 100}


def test_one_value_is_for_all_and_one_each_is_for_each() -> None:
    options = parse_options({"method": ["gradient"], "quantile": ["0.1", "0.2"], "gamma": ["inf", "3"]}, 2, "explain")
    assert [one.explain for one in options] == [
        {"method": "gradient", "quantile": 0.1, "gamma": math.inf},
        {"method": "gradient", "quantile": 0.2, "gamma": 3.0},
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": ["5"]}, "Option 'steps' is of integrated_gradients only; method is gradient."),
        (
            {"steps": ["5"], "method": ["smoothgrad", "gradient"]},
            "Option 'steps' is of integrated_gradients only; method is smoothgrad, gradient.",
        ),
        (
            {"noise": ["0.1"], "method": ["integrated_gradients"]},
            "Option 'noise' is of smoothgrad only; method is integrated_gradients.",
        ),
        ({"samples": ["5"]}, "Option 'samples' is of smoothgrad only; method is gradient."),
        ({"noise_seed": ["5"]}, "Option 'noise_seed' is of smoothgrad only; method is gradient."),
        *(
            ({"rule": ["false"], name: [text]}, f"Option '{name}' has no effect with rule=false.")
            for name, text in {
                "quantile": "0.1", "alpha": "0.1", "gamma": "inf", "selection": "class", "conserve": "exact",
                "layers": "*", "normality_filter": "false",
            }.items()
        ),
        ({"method": ["grad_cam"], "rule": ["true"]}, "Option 'rule' is true; allowed: false with method grad_cam."),
        ({"method": ["grad_cam"], "gamma": ["2"]}, "Option 'gamma' has no effect with method=grad_cam."),
        (
            {"method": ["grad_cam", "gradient"], "rule": ["false"], "layers": ["*"]},
            "Option 'layers' has no effect with rule=false.",
        ),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(fields: dict[str, list[str]], words: str) -> None:
    error = refused(fields, images=2)
    assert (error.code, error.message) == ("option_invalid", words)


def test_an_option_that_takes_part_in_one_images_map_may_be_given_for_all() -> None:
    fields = {"method": ["smoothgrad", "gradient"], "samples": ["5"], "rule": ["false", "true"], "gamma": ["2"]}
    assert [one.explain for one in parse_options(fields, 2, "explain")] == [
        {"method": "smoothgrad", "samples": 5, "rule": False, "gamma": 2.0},
        {"method": "gradient", "samples": 5, "rule": True, "gamma": 2.0},
    ]
    fields = {"method": ["grad_cam", "gradient"], "rule": ["true"], "gamma": ["2"]}
    assert [one.explain["gamma"] for one in parse_options(fields, 2, "explain")] == [2.0, 2.0]
    assert parsed(method="grad_cam", rule="false").explain == {"method": "grad_cam", "rule": False}


def test_every_option_of_the_rule_and_of_a_method_is_the_librarys() -> None:
    known = set(library.Options.__dataclass_fields__)
    assert set(schemas.METHOD_OF.values()) < set(library.METHODS)
    assert set(library.WITHOUT_RULE) < set(library.METHODS)
    # What is left takes part in every map.
    assert known - schemas.METHOD_OF.keys() - set(schemas.OF_RULE) == {"method", "rule", "seed"}


def test_top_targets() -> None:
    assert parsed(target="top:3").top_targets == 3
    assert parsed().top_targets is None


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("always", None),
        ("confidence<0.6", ExplainWhen(confidence_below=0.6)),
        ("class:217|tench|maillot, tank suit", ExplainWhen(classes=("217", "tench", "maillot, tank suit"))),
        ("sample:0.05", ExplainWhen(sample_rate=0.05)),
        ("sample:0", ExplainWhen(sample_rate=0.0)),
        ("sample:1;class:3;confidence<1", ExplainWhen(1.0, ("3",), 1.0)),
    ],
)
def test_explain_when(text: str, condition: ExplainWhen | None) -> None:
    assert parsed(explain_when=text).explain_when == condition


@pytest.mark.parametrize(
    "text",
    [
        "", "never", "confidence<", "confidence<0", "confidence<1.5", "confidence<nan", "confidence>0.5", "sample:",
        "sample:-0.1", "sample:2", "sample: 0.5", "class:", "class:a||b", "sample:0.1;", "always;sample:1",
        "sample:0.1;sample:0.2", "class:1;class:2",
    ],
)  # fmt: skip
def test_explain_when_refuses(text: str) -> None:
    error = refused({"explain_when": [text]})
    assert error.message.startswith(
        f"Option 'explain_when' is {text!r}; allowed: always, or one or more of confidence<"
    )


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"quantil": ["0.1"]}, "unknown_field", "'quantil' is not an option of /explain; its options are top_k,"),
        ({"quantil": ["0.1"]}, "unknown_field", "opacity, model, version."),
        ({"quantile": ["a lot"]}, "option_invalid", "Option 'quantile' is 'a lot'; allowed: a number in (0, 1]."),
        ({"quantile": ["0"]}, "option_invalid", "Option 'quantile' is '0'; allowed: a number in (0, 1]."),
        ({"alpha": ["1.01"]}, "option_invalid", "Option 'alpha' is '1.01'; allowed: a number in (0, 1]."),
        ({"gamma": ["big"]}, "option_invalid", "allowed: a number in [0, 1000000], or inf."),
        ({"gamma": ["-inf"]}, "option_invalid", "allowed: a number in [0, 1000000], or inf."),
        ({"top_k": ["0"]}, "option_invalid", "'0'; allowed: an integer of at least 1, at most the number of classes."),
        ({"timeout_ms": ["1e3"]}, "option_invalid", "least 1, at most the longest deadline that the service gives."),
        ({"explain_timeout_ms": ["0"]}, "option_invalid", "least 1, at most the longest deadline that the service"),
        ({"steps": ["101"]}, "option_invalid", "Option 'steps' is '101'; allowed: an integer in 1..100."),
        ({"samples": ["0"]}, "option_invalid", "Option 'samples' is '0'; allowed: an integer in 1..100."),
        ({"noise": ["11"]}, "option_invalid", "Option 'noise' is '11'; allowed: a number in [0, 10]."),
        ({"noise_seed": ["9223372036854775808"]}, "option_invalid", "allowed: an integer in 0..9223372036854775807."),
        ({"normality_filter": ["yes"]}, "option_invalid", "allowed: true, false, 1 or 0."),
        ({"target": ["top:0"]}, "option_invalid", "Option 'target' is 'top:0'; allowed: a class index, name or id, "),
        ({"target": ["top:21"]}, "option_invalid", "of at least 1, at most the number of classes, and 20."),
        ({"target": [""]}, "option_invalid", "Option 'target' is ''; allowed: a class index"),
        ({"method": ["lrp"]}, "option_invalid", "allowed: gradient, input_x_gradient, integrated_gradients,"),
        ({"seed": ["softmax"]}, "option_invalid", "allowed: logit, probability_weighted_logit, evidence."),
        ({"selection": ["both"]}, "option_invalid", "allowed: class, instance."),
        ({"conserve": [""]}, "option_invalid", "Option 'conserve' is ''; allowed: independent, exact, none."),
        ({"saliency": ["jpeg"]}, "option_invalid", "allowed: uint8, float16, float32, list, png, none."),
        ({"overlay": ["red"]}, "option_invalid", "allowed: none, original, grayscale, mask_black."),
        ({"colormap": ["Inferno"]}, "option_invalid", "allowed: inferno, magma,"),
        ({"polarity": ["up"]}, "option_invalid", "allowed: positive, negative, both."),
        ({"outline": ["yes"]}, "option_invalid", "Option 'outline' is 'yes'; allowed: true, false, 1 or 0."),
        ({"opacity": ["1.5"]}, "option_invalid", "Option 'opacity' is '1.5'; allowed: a number in [0, 1]."),
        ({"rule": ["True"]}, "option_invalid", "allowed: true, false, 1 or 0."),
        ({"clip_upper": ["101"]}, "option_invalid", "allowed: a number in [0, 100]."),
        ({"clip_lower": ["99.9"]}, "option_invalid", "'clip_lower' is 99.9; allowed: less than clip_upper, 99.5."),
        ({"layers": ["a,,b"]}, "option_invalid", "allowed: comma-separated layer names or glob patterns, 50 at most."),
        ({"quantile": ["0.1"], "alpha": ["0.1"]}, "option_invalid", "exclude each other"),
        ({"quantile": ["0.1", "0.2"]}, "option_invalid", "given 2 times; allowed: once, or once for each of 1 images."),
        ({"model": ["tiny"]}, "unknown_field", "'model' is not an option"),
        ({"x" * 100: ["1"]}, "unknown_field", f"Field '{'x' * 64}' is not"),
        ({"method": ["x" * 100]}, "option_invalid", f"Option 'method' is '{'x' * 64}'; allowed"),
    ],
)  # fmt: skip
def test_wrong_options_name_option_value_and_allowed(fields: dict[str, list[str]], code: str, words: str) -> None:
    error = refused(fields)
    assert error.code == code
    assert words in error.message


NUMBERS = [
    name for name, option in OPTIONS.items() if option.kind.schema.get("type", "number") in ("integer", "number")
]


@pytest.mark.parametrize(
    "text",
    ["1_0", " 1", "1 ", "+1", "1\n", "٣", "²", "１", "nan", "NaN", "Infinity", "1e400", "-1e400", "0x1", "1.", ".5", "",
     "--1", "1" * 5000],
    ids=lambda text: ascii(text)[:12],
)  # fmt: skip
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_plain_decimals(name: str, text: str) -> None:
    assert refused({name: [text]}).code == "option_invalid"


@pytest.mark.parametrize("name", ["quantile", "noise", "clip_lower", "top_k", "alpha"])
def test_infinity_is_only_for_gamma(name: str) -> None:
    assert refused({name: ["inf"]}).code == "option_invalid"
    assert parsed(gamma="inf").explain == {"gamma": math.inf}


@settings(deadline=None)
@given(st.floats(min_value=1e-300, max_value=1.0))
def test_a_number_written_by_python_is_read_exactly(value: float) -> None:
    assert parsed(quantile=repr(value)).explain == {"quantile": value}


def test_there_is_no_negative_zero() -> None:
    assert math.copysign(1, parsed(gamma="-0").explain["gamma"]) == 1


@settings(deadline=None)
@given(st.sampled_from(sorted(OPTIONS)), st.text(max_size=20))
def test_a_text_is_a_value_or_an_error_naming_the_option(name: str, text: str) -> None:
    try:
        OPTIONS[name].parse(text)
    except ServiceError as error:
        message = error.message
    else:
        return
    assert message.startswith(f"Option '{name}' is {text!r}; allowed: ")


def value_of(text: str) -> Any:
    """What a JSON writer would have made of an option's text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("quantile", "1", "0"), ("quantile", "1e-9", "1.1"), ("gamma", "0", "-1"), ("gamma", "1000000", "1000001"),
        ("gamma", "inf", "Inf"), ("steps", "100", "101"), ("noise_seed", "0", "-1"), ("top_k", "1", "0"),
        ("clip_upper", "100", "100.1"), ("method", "gradient", "grad"), ("saliency", "png", "jpg"),
    ],
)  # fmt: skip
def test_parser_and_schema_agree(name: str, good: str, bad: str) -> None:
    option = OPTIONS[name]
    option.parse(good)
    jsonschema.validate(value_of(good), option.kind.schema)
    with pytest.raises(ServiceError):
        option.parse(bad)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value_of(bad), option.kind.schema)


def test_predict_knows_only_its_own_options() -> None:
    parse_options({"top_k": ["3"], "timeout_ms": ["100"]}, 1, "predict")
    error = refused({"quantile": ["0.1"]}, route="predict")
    assert error.code == "unknown_field"
    assert error.message.endswith("its options are top_k, timeout_ms, model, version.")


# --- the whole request's ------------------------------------------------------------------------------------


def test_model_and_version_are_taken_out() -> None:
    fields = {"model": ["tiny"], "version": ["2"], "top_k": ["1"]}
    assert take_model(fields) == ("tiny", "2")
    assert fields == {"top_k": ["1"]}
    assert take_model(fields) == (None, None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": ["a", "a"]}, "Option 'model' is given 2 times; allowed: once."),
        ({"model": [""]}, "Option 'model' is ''; allowed: a model's name."),
        ({"version": [""]}, "Option 'version' is ''; allowed: a version of the model."),
    ],
)
def test_model_and_version_come_once(fields: dict[str, list[str]], words: str) -> None:
    with pytest.raises(ServiceError, match=re.escape(words)) as caught:
        take_model(fields)
    assert caught.value.code == "option_invalid"


# --- held to the library ------------------------------------------------------------------------------------


def test_the_library_takes_every_bound_that_an_option_takes() -> None:
    for name in library.Options.__dataclass_fields__.keys() & OPTIONS.keys():
        schema = OPTIONS[name].kind.schema
        for part in schema.get("anyOf", [schema]):
            for value in (part.get("minimum"), part.get("maximum")):
                if value is not None:
                    library.Options(**{name: value})
    for name in ("quantile", "alpha"):  # open at zero, in both
        with pytest.raises(OptionError):
            library.Options(**{name: 0})


def test_defaults_are_those_of_the_library_and_of_the_dataclasses() -> None:
    for name in ("method", "rule", "seed", "steps", "samples", "noise", "noise_seed"):
        assert OPTIONS[name].default == getattr(library.Options(), name), name
    for name in ("colormap", "overlay", "clip_lower", "clip_upper", "outline", "opacity"):
        assert OPTIONS[name].default == getattr(Drawing(), name), name
    for name in ("target", "saliency", "polarity"):
        assert OPTIONS[name].default == getattr(ImageOptions(), name), name


def test_every_option_of_the_library_is_an_option_or_left_out_for_a_reason() -> None:
    assert set(inspect.signature(library.Options).parameters) - set(OPTIONS) == set()


def test_published_defaults_are_the_tables_before_ours() -> None:
    table = Defaults(quantile=0.3, gamma=math.inf, layers=("a",)).to_json()
    published = option_defaults(table, timeout_ms=500)
    assert published["quantile"] == 0.3
    assert published["gamma"] == "inf"
    assert published["timeout_ms"] == 500
    assert published["outline"] is False
    assert published["explain_when"] == "always"
    # The others have none: without explain_timeout_ms or alpha there is no such bound.
    assert set(OPTIONS) - set(published) == {"explain_timeout_ms", "alpha"}
    assert set(published) - set(OPTIONS) == set()


def test_published_bounds_are_the_models() -> None:
    bounds = option_bounds(10, ("features.3", "features.6"), 60_000)
    assert set(bounds) == set(OPTIONS)
    assert bounds["target"] == "an index in 0..9, a class name or id, predicted, or top:k with k in 1..10"
    assert bounds["layers"] == "comma-separated names or glob patterns of features.3, features.6"
    assert bounds["top_k"] == "an integer in 1..10"
    assert bounds["timeout_ms"] == bounds["explain_timeout_ms"] == "an integer in 1..60000"
    assert bounds["quantile"] == "a number in (0, 1]"
    assert bounds["outline"] == "true, false, 1 or 0"


def test_option_names_are_distinct() -> None:
    assert not OPTIONS.keys() & REQUEST_OPTIONS.keys()


def test_a_call_that_takes_many_passes_takes_fewer_images(home) -> None:
    """One device call does not end for another, so its bound counts passes, not images alone."""
    from service.engine import Explained, Job
    from service.settings import Settings
    from service.torch_engine import TorchEngine

    kept = {name: value for name, value in home.settings.items() if name != "threads"}
    engine = TorchEngine(Settings(**kept, max_batch_pixels=2_000_000), "tiny", "1")
    image = np.zeros((3, 300, 300), np.float32)
    single = Job(image, Explained(0, library.Options(), "mean_abs"))
    many = Job(image, Explained(0, library.Options(method="integrated_gradients", steps=25), "mean_abs"))
    assert (single.passes, many.passes) == (1, 25)
    assert engine.capacity(single) == 22  # of 2,000,000 pixels
    assert engine.capacity(many) == 1
    assert single.group != many.group
