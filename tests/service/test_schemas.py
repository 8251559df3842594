"""service/schemas.py: options from text; service/answers.py: what Accept chooses and how maps are packed."""

import numpy as np
import pytest

from service.answers import accepted, quantised
from service.errors import STATUS, ServiceError, from_exception
from service.openapi import document
from service.schemas import OPTIONS, parse_options


def refused(fields: dict[str, list[str]], images: int = 1, route: str = "explain") -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        parse_options(fields, images, route)
    assert caught.value.status == 422
    return caught.value


def test_one_value_is_for_all_and_one_each_is_for_each() -> None:
    options = parse_options({"method": ["gradient"], "quantile": ["0.1", "0.2"], "gamma": ["inf", "3"]}, 2, "explain")
    assert [one.explain for one in options] == [
        {"method": "gradient", "quantile": 0.1, "gamma": float("inf")},
        {"method": "gradient", "quantile": 0.2, "gamma": 3.0},
    ]


def test_layers_are_comma_separated_globs() -> None:
    (options,) = parse_options({"layers": ["features.*, classifier"]}, 1, "explain")
    assert options.explain == {"layers": ("features.*", "classifier")}


def test_top_targets() -> None:
    assert parse_options({"target": ["top:3"]}, 1, "explain")[0].top_targets == 3
    assert parse_options({}, 1, "explain")[0].top_targets is None


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"quantil": ["0.1"]}, "unknown_field", "'quantil' is not an option of /explain; its options are top_k,"),
        ({"outline": ["1"]}, "option_unsupported", "'outline' is not supported yet"),
        ({"quantile": ["a lot"]}, "option_invalid", "Option 'quantile' is 'a lot'; allowed: a number."),
        ({"gamma": ["big"]}, "option_invalid", "allowed: a number, or inf."),
        ({"top_k": ["0"]}, "option_invalid", "Option 'top_k' is '0'; allowed: an integer in 1..1000000."),
        ({"top_k": ["٣"]}, "option_invalid", "allowed: an integer"),
        ({"timeout_ms": ["1e3"]}, "option_invalid", "allowed: an integer"),
        ({"target": ["top:0"]}, "option_invalid", "Option 'target' is 'top:0'; allowed: top:k with k in 1..20."),
        ({"target": [""]}, "option_invalid", "allowed: not empty"),
        ({"saliency": ["jpeg"]}, "option_invalid", "allowed: uint8, float16, float32, list, png, none."),
        ({"overlay": ["red"]}, "option_invalid", "allowed: none, original, grayscale, mask_black."),
        ({"polarity": ["up"]}, "option_invalid", "allowed: positive, negative, both."),
        ({"rule": ["yes"]}, "option_invalid", "allowed: true, false, 1 or 0."),
        ({"clip_upper": ["101"]}, "option_invalid", "allowed: a percentile in [0, 100]."),
        ({"clip_upper": ["nan"]}, "option_invalid", "allowed: a percentile in [0, 100]."),
        ({"clip_lower": ["99.9"]}, "option_invalid", "allowed: less than clip_upper, 99.5."),
        ({"layers": ["a,,b"]}, "option_invalid", "comma-separated"),
        ({"quantile": ["0.1"], "alpha": ["0.1"]}, "option_invalid", "exclude each other"),
        ({"quantile": ["0.1", "0.2"]}, "option_invalid", "given 2 times; allowed: once, or once for each of 1 images."),
    ],
)  # fmt: skip
def test_wrong_options_name_option_value_and_allowed(fields: dict[str, list[str]], code: str, words: str) -> None:
    error = refused(fields)
    assert error.code == code
    assert words in error.message


def test_predict_knows_only_its_own_options() -> None:
    parse_options({"top_k": ["3"], "timeout_ms": ["100"]}, 1, "predict")
    assert refused({"quantile": ["0.1"]}, route="predict").code == "unknown_field"


@pytest.mark.parametrize(
    ("header", "media_type"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/png", "image/png"),
        ("image/*", "image/png"),
        ("application/x-npz", "application/x-npz"),
        ("text/html, image/png;q=0.9, application/json;q=0.1", "image/png"),
        ("application/json;q=0, */*", "image/png"),
        ("application/*", "application/json"),
    ],
)
def test_accept(header: str, media_type: str) -> None:
    assert accepted(header) == media_type


@pytest.mark.parametrize("header", ["text/html", "application/json;q=0", "image/png;q=x"])
def test_nothing_acceptable(header: str) -> None:
    with pytest.raises(ServiceError, match="answers are application/json, image/png, application/x-npz"):
        accepted(header)


@pytest.mark.parametrize(("dtype", "tolerance"), [("uint8", 1 / 510), ("float16", 1e-3), ("float32", 0)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_quantised_maps_come_back(dtype: str, tolerance: float, size: float) -> None:
    values = (np.random.default_rng(0).random((5, 7)) * size).astype(np.float32)
    array, scale = quantised(values, dtype)
    assert np.abs(array.astype(np.float64) * scale - values).max() <= tolerance * size * 1.001
    assert array.dtype.byteorder in "<|="


def test_a_map_of_zeros_stays_zeros() -> None:
    for dtype in ("uint8", "float16", "float32"):
        array, scale = quantised(np.zeros((2, 2), np.float32), dtype)
        assert not array.any()
        assert np.isfinite(scale)


def test_an_unforeseen_error_tells_nothing() -> None:
    error = from_exception(KeyError("/secret/path"))
    assert (error.code, error.status) == ("internal", 500)
    assert "secret" not in error.message


def test_the_document_lists_every_option_and_code() -> None:
    described = document()
    form = described["paths"]["/explain"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"image", *OPTIONS}
    responses = described["paths"]["/explain"]["post"]["responses"]
    for code, status in STATUS.items():
        assert code in responses[str(status)]["description"]


def test_a_call_that_takes_many_passes_takes_fewer_images(home) -> None:
    """One device call cannot be interrupted, so its bound counts passes, not images alone."""
    import torch

    from parchgrad.options import Options
    from service.engine import Engine, Explained, Job
    from service.settings import Settings

    engine = Engine(Settings(**{name: value for name, value in home.settings.items() if name != "threads"}))
    image = torch.zeros(3, 300, 300)
    single = Job(image, Explained(0, Options(), "mean_abs"))
    many = Job(image, Explained(0, Options(method="integrated_gradients", steps=25), "mean_abs"))
    assert (single.passes, many.passes) == (1, 25)
    assert engine.capacity(single) == 22  # of 2,000,000 pixels
    assert engine.capacity(many) == 1
    assert single.group != many.group
