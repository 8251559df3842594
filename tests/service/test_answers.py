"""service/answers.py: what Accept chooses, how maps are packed, and what is said where there is none."""

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import parchgrad
from parchgrad import render
from parchgrad.answers import quantised
from parchgrad.options import Options
from parchgrad.preprocessing import Placement
from service import answers
from service.answers import JSON, NPZ, PNG, accepted, encode, require_one_picture
from service.engine import PREDICTED, Engine, Explained, Job, Result
from service.errors import ServiceError, from_exception
from service.pipeline import MissingMap, Outcome, Prepared, Request, _backdrop
from service.schemas import Drawing, ExplainAnswer, ImageOptions, PredictAnswer, parse_options
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.service.conftest import COVERED, LABELS, Home, picture

DEADLINE = 100.0  # of every image here; the clock stands at 0 unless a test says otherwise
SHA256 = "ab" * 32


@pytest.fixture(scope="module")
def engine(home: Home) -> Engine:
    kept = {name: value for name, value in home.settings.items() if name != "threads"}
    return TorchEngine(Settings(**kept), "tiny", "1")


Make = Callable[..., Outcome]


@pytest.fixture(scope="module")
def outcome(engine: Engine) -> Make:
    """An outcome computed alone, without queues: `outcome(seed, explain=…, target=…, method=…, **option texts)`."""

    def make(seed: int = 0, *, explain: bool = True, targets: tuple[int, ...] = (PREDICTED,), **texts: str) -> Outcome:
        image = picture(seed)
        tensor, placement = engine.model.preprocessing.array(image)
        (asked,) = parse_options({name: [text] for name, text in texts.items()}, 1, "explain")
        options = engine.options(asked.explain) if explain else None
        reduction = render.REDUCTION_OF_POLARITY[asked.polarity]
        jobs = [Job(tensor, Explained(target, options, reduction) if options else None) for target in targets]
        request = Request(
            image=io.BytesIO(),
            asked=asked,
            deadline=DEADLINE,
            map_deadline=DEADLINE / 2,
            options=options,
            target=targets[0],
            when_classes=frozenset(),
            draws=True,
        )
        return Outcome(request, Prepared(tensor, placement, 1, image.resize((80, 80)), SHA256), engine.run(jobs))

    return make


def without_map(outcome: Outcome, status: Any) -> Outcome:
    only = Result(outcome.first.logits, outcome.first.probabilities)
    return replace(outcome, results=[only], missing=MissingMap(status, f"It was {status}."))


def said(engine: Engine, *outcomes: Outcome | ServiceError, explain: bool = True, now: float = 0.0) -> dict[str, Any]:
    content = encode(engine, outcomes, JSON, explain=explain, now=lambda: now)
    (ExplainAnswer if explain else PredictAnswer).model_validate_json(content)
    answer: dict[str, Any] = json.loads(content)
    return answer


def arrays(engine: Engine, *outcomes: Outcome | ServiceError, explain: bool = True) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(encode(engine, outcomes, NPZ, explain=explain)), allow_pickle=False) as file:
        return dict(file)


# --- Accept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "media_type"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("image/png", PNG),
        ("image/*", PNG),
        ("IMAGE/PNG", PNG),
        ("application/x-npz", NPZ),
        ("text/html, image/png;q=0.9, application/json;q=0.1", PNG),
        ("application/json;q=0, */*", PNG),
        ("application/*", JSON),
        ("application/json; charset=utf-8; q=0.2, application/x-npz; q=0.20", JSON),
        ("application/json;q=0.2, application/x-npz;q=0.201", NPZ),
        ("*/*;q=0.1, application/json;q=0", PNG),
    ],
)
def test_accept(header: str, media_type: str) -> None:
    assert accepted(header) == media_type


@pytest.mark.parametrize(
    "header",
    ["text/html", "application/json;q=0", "image/png;q=x", "image/png;q=nan", "*/*;q=-1", "*/*;q=1e0", "*/*;q=2", ","],
)
def test_nothing_acceptable(header: str) -> None:
    with pytest.raises(ServiceError, match="answers are application/json, image/png, application/x-npz") as caught:
        accepted(header)
    assert caught.value.code == "not_acceptable"


@pytest.mark.parametrize(
    ("texts", "images", "words"),
    [
        ({}, 2, "one map of one image"),
        ({"target": "top:2"}, 1, "one map of one image"),
        ({"explain_when": "sample:0.5"}, 1, "no place for explain_when"),
    ],
)
def test_a_picture_is_of_one_map_that_is_there(texts: dict[str, str], images: int, words: str) -> None:
    asked = parse_options({name: [text] for name, text in texts.items()}, images, "explain")
    with pytest.raises(ServiceError, match=words) as caught:
        require_one_picture(asked)
    assert caught.value.code == "not_acceptable"


@pytest.mark.parametrize("texts", [{}, {"target": "top:1"}, {"explain_when": "always"}])
def test_a_picture_of_one_map_may_be_asked_for(texts: dict[str, str]) -> None:
    require_one_picture(parse_options({name: [text] for name, text in texts.items()}, 1, "explain"))


# --- JSON ---------------------------------------------------------------------------------------------------


def test_an_answer_says_what_made_it(engine: Engine, outcome: Make) -> None:
    content = encode(engine, [outcome()], JSON, explain=True, request_id="r-1", now=lambda: 0.0)
    answer = json.loads(content)
    assert answer["model"] == {
        "name": "tiny",
        "version": "1",
        "weights_sha256": engine.model.weights_sha256,
        "table_sha256": engine.table.table_sha256,
    }
    assert answer["software"] == {
        "parchgrad": parchgrad.__version__,
        "runtime": f"torch {torch.__version__}",
        "device": "cpu",
    }
    assert answer["request_id"] == "r-1"
    assert answer["results"][0]["image_sha256"] == SHA256
    assert "request_id" not in said(engine, outcome())


def test_predictions_are_exact_and_best_first(engine: Engine, outcome: Make) -> None:
    one = outcome(explain=False, top_k="10")
    (result,) = said(engine, one, explain=False)["results"]
    assert result.keys() == {"status", "image_sha256", "predictions"}
    softmax = one.first.probabilities
    order = np.argsort(-softmax, kind="stable")
    assert [p["index"] for p in result["predictions"]] == order.tolist()
    assert [p["label"] for p in result["predictions"]] == [LABELS[i] for i in order]
    assert [np.float32(p["probability"]) for p in result["predictions"]] == softmax[order].tolist()


EFFECTIVE = {
    "gradient": set(),
    "integrated_gradients": {"steps"},
    "smoothgrad": {"samples", "noise", "noise_seed"},
}
OF_RULE = {"quantile", "alpha", "gamma", "selection", "conserve", "layers", "normality_filter"}


@pytest.mark.parametrize("method", EFFECTIVE)
def test_an_explanation_carries_all_options_that_took_part(engine: Engine, outcome: Make, method: str) -> None:
    texts = {
        "method": method, "quantile": "0.30000000000000004", "gamma": "1e-05", "selection": "instance",
        "conserve": "exact", "normality_filter": "false", "layers": "features.3*,features.6*",
    }  # fmt: skip
    passes = {"steps": "3", "samples": "2", "noise": "0.1", "noise_seed": "9223372036854775807"}
    texts |= {name: passes[name] for name in EFFECTIVE[method]}
    explanation = said(engine, outcome(polarity="positive", **texts))["results"][0]["explanation"]
    given = {name: explanation[name] for name in [*texts, *passes] if name in explanation}
    numbers = {"steps": 3, "samples": 2, "noise": 0.1, "noise_seed": 2**63 - 1}
    assert given == {
        "method": method, "quantile": 0.1 + 0.2, "gamma": 1e-05, "selection": "instance", "conserve": "exact",
        "normality_filter": False, "layers": ["features.3*", "features.6*"],
        **{name: numbers[name] for name in EFFECTIVE[method]},
    }  # fmt: skip
    assert explanation["rule"] is True
    assert explanation["seed"] == "logit"
    assert explanation["polarity"] == "positive"


@pytest.mark.parametrize("method", EFFECTIVE)
def test_without_the_rule_its_options_took_no_part(engine: Engine, outcome: Make, method: str) -> None:
    explanation = said(engine, outcome(method=method, rule="false"))["results"][0]["explanation"]
    assert explanation["rule"] is False
    assert not OF_RULE & explanation.keys()
    assert EFFECTIVE[method] | {"method", "seed", "polarity"} <= explanation.keys()


def test_grad_cam_alone_is_without_the_rule_and_needs_no_row(engine: Engine, outcome: Make) -> None:
    explanation = said(engine, outcome(method="grad_cam", target="9"))["results"][0]["explanation"]
    assert explanation["status"] == "ok"
    assert (explanation["method"], explanation["rule"], explanation["seed"]) == ("grad_cam", False, "logit")
    assert not (OF_RULE | set().union(*EFFECTIVE.values())) & explanation.keys()


def test_an_answer_is_enough_to_make_its_map_again(engine: Engine, outcome: Make) -> None:
    one = outcome(
        method="smoothgrad", samples="2", noise="0.1", noise_seed="7", gamma="3.3", quantile="0.2", saliency="float32"
    )
    explanation = said(engine, one)["results"][0]["explanation"]
    assert "alpha" not in explanation
    given = {
        name: explanation[name] for name in Options.__dataclass_fields__.keys() & explanation.keys() if name != "gamma"
    } | {"gamma": float(explanation["gamma"])}
    image = torch.from_numpy(one.prepared.tensor)[None]
    again = engine.explainer.explain(image, explanation["target"]["index"], **given)
    data = np.frombuffer(base64.b64decode(explanation["saliency"]["data"]), "<f4").reshape(64, 64)
    np.testing.assert_array_equal(data, again.saliency("mean_abs")[0].numpy())


def test_infinite_gamma_and_selection_by_alpha(engine: Engine, outcome: Make) -> None:
    explanation = said(engine, outcome(gamma="inf", alpha="0.05"))["results"][0]["explanation"]
    assert explanation["gamma"] == "inf"
    assert explanation["alpha"] == 0.05
    assert "quantile" not in explanation


def test_where_the_map_lies_and_how_good_it_is(engine: Engine, outcome: Make) -> None:
    one = outcome()
    explanation = said(engine, one)["results"][0]["explanation"]
    assert explanation["transform"]["original_size"] == [96, 80]
    assert explanation["transform"]["exif_orientation"] == 1
    assert explanation["transform"]["crop_box"] == list(one.prepared.placement.crop_box)
    assert 0 < explanation["quality"]["gini"] < 1
    ready = replace(one, prepared=replace(one.prepared, placement=None))
    assert "transform" not in said(engine, ready)["results"][0]["explanation"]
    zeros = replace(one, results=[replace(one.first, saliency=np.zeros((64, 64), np.float32))])
    assert said(engine, zeros)["results"][0]["explanation"]["quality"] == {"identity_layers": one.first.identity_layers}


@pytest.mark.parametrize("encoding", ["uint8", "float16", "float32", "list"])
def test_a_map_comes_back_from_every_encoding(engine: Engine, outcome: Make, encoding: str) -> None:
    one = outcome(saliency=encoding)
    saliency = said(engine, one)["results"][0]["explanation"]["saliency"]
    assert saliency["shape"] == [64, 64]
    if encoding == "list":
        values = np.array(saliency["data"])
    else:
        values = np.frombuffer(base64.b64decode(saliency["data"]), np.dtype(encoding).newbyteorder("<"))
    tolerance = {"uint8": 1 / 509, "float16": 1e-3}.get(encoding, 0) * one.first.saliency.max()
    np.testing.assert_allclose(values.reshape(64, 64) * saliency["scale"], one.first.saliency, rtol=0, atol=tolerance)


def test_no_map_in_the_answer_where_none_is_wanted(engine: Engine, outcome: Make) -> None:
    explanation = said(engine, outcome(saliency="none"))["results"][0]["explanation"]
    assert "saliency" not in explanation
    assert explanation["status"] == "ok"


@pytest.mark.parametrize("status", ["skipped", "shed", "timeout"])
def test_the_prediction_arrives_without_its_map(engine: Engine, outcome: Make, status: str) -> None:
    one = outcome()
    whole = said(engine, one)["results"][0]
    (result,) = said(engine, without_map(one, status))["results"]
    assert result["explanation"] == {"status": status, "reason": f"It was {status}."}
    assert result["predictions"] == whole["predictions"]
    assert (result["status"], result["image_sha256"]) == ("ok", SHA256)


def test_several_maps_of_an_image(engine: Engine, outcome: Make) -> None:
    one = outcome(target="top:3", targets=(4, COVERED, 1))
    (result,) = said(engine, one)["results"]
    assert "explanation" not in result
    assert [e["status"] for e in result["explanations"]] == ["ok", "error", "ok"]
    assert [e["target"]["index"] for e in result["explanations"][::2]] == [4, 1]
    assert result["explanations"][1]["error"]["code"] == "target_not_in_table"
    (result,) = said(engine, without_map(one, "shed"))["results"]
    assert result["explanations"] == [{"status": "shed", "reason": "It was shed."}]


def test_a_map_that_is_not_finite_is_an_error(engine: Engine, outcome: Make) -> None:
    one = outcome()
    values = one.first.saliency.copy()
    values[0, 0] = math.inf
    broken = replace(one, results=[replace(one.first, saliency=values)])
    assert said(engine, broken)["results"][0]["explanation"]["error"]["code"] == "map_not_finite"


def test_one_images_error_stands_beside_its_neighbours_answer(engine: Engine, outcome: Make) -> None:
    results = said(engine, ServiceError("image_truncated", "The image ends early."), outcome())["results"]
    assert results[0] == {
        "status": "error",
        "error": {"code": "image_truncated", "message": "The image ends early."},
    }
    assert results[1]["status"] == "ok"


def test_an_error_is_the_requests_where_it_is_the_only_one_or_all_are_late(engine: Engine) -> None:
    bad, late = ServiceError("image_empty", "a"), ServiceError("deadline_exceeded", "b")
    for outcomes, code in (([bad], "image_empty"), ([late, late], "deadline_exceeded")):
        with pytest.raises(ServiceError) as caught:
            encode(engine, outcomes, JSON, explain=True)
        assert caught.value.code == code
    assert [one["error"]["code"] for one in said(engine, bad, late)["results"]] == ["image_empty", "deadline_exceeded"]


def test_a_class_without_a_row_is_told_what_needs_none(engine: Engine, outcome: Make) -> None:
    error = said(engine, outcome(targets=(COVERED,)))["results"][0]["explanation"]["error"]
    assert error["message"].endswith("it covers 8 of 10 classes. selection=instance or rule=false needs no row.")


def test_lists_are_bounded_in_all(engine: Engine, outcome: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = outcome(saliency="list")
    monkeypatch.setattr(answers, "MAX_LIST_VALUES", 2 * 64 * 64)
    said(engine, one, one, without_map(one, "shed"))
    with pytest.raises(ServiceError, match=r"'list' for maps of 12288 values; allowed: 8192 in all, or a binary form"):
        said(engine, one, one, one)


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "box", "map_size", "expected"),
    [
        ((3000, 50), None, (48, 512), (2880, 48)),  # of the map's height
        ((50, 3000), None, (512, 48), (48, 2880)),
        ((30, 20), None, (64, 64), (96, 64)),
        ((4000, 3000), None, (224, 224), (1024, 768)),
        ((300, 200), (50.0, 0.0, 250.0, 200.0), (224, 224), (224, 224)),
        ((20_000, 2), None, (224, 224), (4096, 1)),  # a picture of the map's height would be 2,240,000 wide
    ],
    ids=str,
)
def test_a_picture_has_the_aspect_of_what_the_model_saw(
    image: tuple[int, int], box: Any, map_size: tuple[int, int], expected: tuple[int, int]
) -> None:
    placement = Placement(image, (0.0, 0.0, *map(float, image)) if box is None else box)
    assert _backdrop(picture(size=image), placement, *map_size).size == expected


def drawn(engine: Engine, outcome: Outcome, now: float = 0.0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encode(engine, [outcome], PNG, explain=True, now=lambda: now))))


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"overlay": "none", "colormap": "viridis"},
        {"overlay": "grayscale", "clip_lower": "30", "clip_upper": "90"},
        {"overlay": "mask_black", "outline": "1"},
        {"outline": "true", "colormap": "turbo", "clip_lower": "50", "opacity": "0.25"},
    ],
    ids=str,
)
def test_a_picture_is_the_renderers_of_the_same_options(engine: Engine, outcome: Make, texts: dict[str, str]) -> None:
    one = outcome(**texts)
    drawing: Drawing = one.request.asked.drawing
    spread = np.asarray(Image.fromarray(one.first.saliency).resize((80, 80), Image.Resampling.BILINEAR))
    expected = render.overlay(
        np.asarray(one.prepared.backdrop),
        spread,
        colormap=texts.get("colormap", "inferno"),
        mode=texts.get("overlay", "original"),
        clip_lower=float(texts.get("clip_lower", 0)),
        clip_upper=float(texts.get("clip_upper", 99.5)),
        smooth=answers.SMOOTH * 80,
        outline="outline" in texts,
        opacity=float(texts.get("opacity", 1)),
    )
    np.testing.assert_array_equal(drawn(engine, one), expected)
    assert drawing.outline == ("outline" in texts)
    in_json = said(engine, outcome(saliency="png", **texts))["results"][0]["explanation"]["saliency"]
    assert (in_json["dtype"], in_json["shape"]) == ("png", [80, 80])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(in_json["data"])))), expected)


@pytest.mark.parametrize(("status", "code", "http"), [("shed", "map_shed", 503), ("timeout", "deadline_exceeded", 504)])
def test_a_picture_without_a_map_is_an_error(engine: Engine, outcome: Make, status: str, code: str, http: int) -> None:
    with pytest.raises(ServiceError, match=f"It was {status}") as caught:
        drawn(engine, without_map(outcome(), status))
    assert (caught.value.code, caught.value.status) == (code, http)
    assert ("Retry-After" in caught.value.headers) == (status == "shed")


def test_a_picture_of_an_uncovered_class_is_an_error(engine: Engine, outcome: Make) -> None:
    with pytest.raises(ServiceError, match=r"has no row for class 8 \(thing 8\); it covers 8 of 10 classes") as caught:
        drawn(engine, outcome(targets=(COVERED,)))
    assert caught.value.code == "target_not_in_table"


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlay(*arguments: object, **options: object) -> None:
        raise AssertionError("A picture was drawn that is too late.")

    monkeypatch.setattr(render, "overlay", overlay)


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(("texts", "now"), [({}, DEADLINE), ({"explain_timeout_ms": "5"}, DEADLINE / 2)], ids=str)
def test_what_is_late_is_not_drawn(engine: Engine, outcome: Make, texts: dict[str, str], now: float) -> None:
    name = "explain_timeout_ms" if texts else "timeout_ms"
    with pytest.raises(ServiceError, match=f"not drawn within {name}") as caught:
        drawn(engine, outcome(**texts), now)
    assert caught.value.code == "deadline_exceeded"
    (result,) = said(engine, outcome(saliency="png", **texts), now=now)["results"]
    assert result["explanation"] == {"status": "timeout", "reason": f"The map was made, and not drawn within {name}."}
    assert len(result["predictions"]) == 5


def test_a_picture_in_time_is_drawn_and_numbers_need_no_drawing(engine: Engine, outcome: Make) -> None:
    assert drawn(engine, outcome(), DEADLINE - 1).shape == (80, 80, 3)
    assert said(engine, outcome(), now=DEADLINE + 1)["results"][0]["explanation"]["status"] == "ok"


# --- npz ----------------------------------------------------------------------------------------------------


def test_npz_holds_exact_arrays(engine: Engine, outcome: Make) -> None:
    one, shed = outcome(), without_map(outcome(1), "shed")
    file = arrays(engine, one, ServiceError("image_empty", "No bytes."), shed)
    assert sorted(file) == [
        "error_1", "logits_0", "logits_2", "probabilities_0", "probabilities_2", "saliency_0", "status_0", "status_2",
        "target_0",
    ]  # fmt: skip
    np.testing.assert_array_equal(file["saliency_0"], one.first.saliency)
    np.testing.assert_array_equal(file["logits_2"], shed.first.logits)
    assert (file["status_0"].item(), file["status_2"].item()) == ("ok", "shed")
    assert file["target_0"].item() == one.first.target
    assert file["error_1"].item() == "image_empty: No bytes."


def test_npz_stacks_the_maps_of_an_image(engine: Engine, outcome: Make) -> None:
    one = outcome(target="top:2", targets=(4, COVERED))
    file = arrays(engine, one)
    assert file["saliency_0"].shape == (2, 64, 64)
    assert np.isnan(file["saliency_0"][1]).all()
    assert file["target_0"].tolist() == [4, COVERED]
    assert file["status_0"].tolist() == ["ok", "error"]


def test_npz_of_predictions_alone(engine: Engine, outcome: Make) -> None:
    assert sorted(arrays(engine, outcome(explain=False), explain=False)) == ["logits_0", "probabilities_0"]


# --- packing ------------------------------------------------------------------------------------------------


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


def test_options_are_the_defaults_of_the_dataclass() -> None:
    assert parse_options({}, 1, "explain") == [ImageOptions()]
