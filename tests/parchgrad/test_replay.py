"""A saved answer made again: equal as it is, different or refused when anything in it is another."""

import base64
import copy
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import parchgrad
from parchgrad.cli import cli
from parchgrad.errors import DataError, ModelError, TableError
from parchgrad.evaluation.maps import gini
from parchgrad.models import build_network
from parchgrad.options import per_image
from parchgrad.preprocessing import Preprocessing, read_image
from parchgrad.replay import DIFFERENT, EQUAL, NO_IMAGE, NO_MAP, replay

FACTORY = "tests.parchgrad.factories:small"
LABELS = ("cat", "dog", "tree", "house")


class Place:
    """A model, a random table for three of its four classes, and photographs."""

    def __init__(self, root):
        self.root, self.folders = root, {"models_dir": root / "models", "tables_dir": root / "tables"}
        torch.manual_seed(0)
        parchgrad.add_model(
            "net", architecture=FACTORY, arguments={"width": 12}, labels=LABELS, models_dir=root / "models",
            weights=build_network(FACTORY, 4, {"width": 12}).state_dict(),
            preprocessing=Preprocessing(size=(32, 32), resize=36),
        )  # fmt: skip
        self.model = parchgrad.load_model(root / "models/net/1")
        parchgrad.SelectionTable.random(self.model, 3, seed=0).save(root / "tables/net/1")
        self.table = parchgrad.load_table(root / "tables/net/1", self.model)
        self.explainer = parchgrad.Explainer(self.model, self.table)
        self.images = [root / f"{i}.png" for i in range(3)]
        for seed, path in enumerate(self.images):
            noise = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((60, 48), Image.Resampling.BICUBIC).save(path)

    def answer(self, *results):
        model = {
            "name": "net", "version": "1", "weights_sha256": self.model.weights_sha256,
            "table_sha256": self.table.table_sha256,
        }  # fmt: skip
        software = {"parchgrad": parchgrad.__version__, "runtime": f"torch {torch.__version__}", "device": "cpu"}
        return {"model": model, "software": software, "request_id": "r", "results": list(results)}

    def result(self, path, *targets, encoding="float32", polarity="both", top=False, **given):
        """What the service answers for one image, in its own form."""
        pixels, placement = self.model.preprocessing.apply(read_image(path))
        pixels = pixels[None]
        probabilities = self.explainer.predict(pixels).softmax(dim=1)[0].tolist()
        (options,) = per_image(1, self.table.defaults, given)
        effective = {
            "method": options.method, "rule": options.rule,
            **({"quantile": options.quantile} if options.alpha is None else {"alpha": options.alpha}),
            "gamma": "inf" if math.isinf(options.gamma) else options.gamma, "selection": options.selection,
            "conserve": options.conserve, "layers": list(options.layers),
            "normality_filter": options.normality_filter, "seed": options.seed, "polarity": polarity,
        }  # fmt: skip
        for name in {"integrated_gradients": ("steps",), "smoothgrad": ("samples", "noise", "noise_seed")}.get(
            options.method, ()
        ):
            effective[name] = getattr(options, name)
        reduction = {"both": "mean_abs"}.get(polarity, polarity)
        explanations = []
        for target in targets or (0,):
            explained = self.explainer.explain(pixels, target, **given)
            made = explained.saliency(reduction)[0].numpy()
            explanations.append(
                {
                    "status": "ok",
                    "target": {"index": target, "label": LABELS[target], "probability": probabilities[target]},
                    **effective,
                    **({} if encoding == "none" else {"saliency": encoded(made, encoding)}),
                    "transform": {
                        "original_size": list(placement.original_size),
                        "exif_orientation": 1,
                        "crop_box": list(placement.crop_box),
                    },
                    "quality": {"gini": gini(made), "identity_layers": int(explained.identity_layers[0])},
                }
            )
        predictions = [
            {"index": i, "label": LABELS[i], "probability": probabilities[i]}
            for i in sorted(range(4), key=lambda i: -probabilities[i])
        ]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        maps = {"explanations": explanations} if top else {"explanation": explanations[0]}
        return {"status": "ok", "image_sha256": digest, "predictions": predictions, **maps}

    def replayed(self, answer, *images, **settings):
        path = self.root / "answer.json"
        path.write_text(json.dumps(answer))
        return replay(path, images or self.images[:1], **{**self.folders, **settings})


def encoded(values, encoding):
    """As the service encodes a map: uint8 and float16 are scaled to its maximum."""
    scale, dtype = 1.0, "<f4"
    if encoding == "uint8":
        scale, dtype = float(values.max()) / 255, "|u1"
        values = np.rint(values / scale)
    elif encoding == "float16":
        scale, dtype = float(values.max()), "<f2"
        values = values / scale
    elif encoding == "list":
        data = {"dtype": "float32", "encoding": "list", "data": values.tolist()}
        return {"shape": list(values.shape), "scale": 1.0, **data}
    data = base64.b64encode(values.astype(dtype).tobytes()).decode()
    return {"shape": list(values.shape[:2]), "dtype": encoding, "scale": scale, "encoding": "base64", "data": data}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("replay"))


# --- equal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"quantile": 0.35, "gamma": 2.5, "conserve": "exact"},
        {"alpha": 0.2, "gamma": 0.0},
        {"selection": "instance", "layers": ["fir*"]},
        {"rule": False, "seed": "probability_weighted_logit"},
        {"seed": "evidence"},
        {"method": "integrated_gradients", "steps": 3},
        {"method": "smoothgrad", "samples": 3, "noise": 0.3, "noise_seed": 5},
        {"method": "grad_cam"},
        {"polarity": "negative"},
        {"polarity": "positive", "method": "input_x_gradient"},
    ],
    ids=lambda given: ",".join(map(str, given.values())) or "defaults",
)
def test_an_answer_is_made_again_with_its_options(place, given):
    (found,) = place.replayed(place.answer(place.result(place.images[0], 1, **given)))
    assert found.status == EQUAL, found
    assert found.distance < 1e-5
    assert found.quantisation == 0
    assert found.tolerance == 0.01
    assert found.rank_correlation > 0.9999
    assert found.probability_difference < 1e-6
    assert found.image == str(place.images[0])
    assert found.target.label == "dog"


@pytest.mark.parametrize(
    ("encoding", "least", "most"), [("uint8", 1e-3, 0.05), ("float16", 1e-5, 1e-3), ("list", 0, 0)]
)
def test_what_the_encoding_makes_is_known_beforehand(place, encoding, least, most):
    (found,) = place.replayed(place.answer(place.result(place.images[0], encoding=encoding)))
    assert found.status == EQUAL
    assert least <= found.quantisation <= most
    assert found.distance == pytest.approx(found.quantisation, abs=1e-6)
    assert found.tolerance == pytest.approx(found.quantisation + 0.01)


def test_every_map_of_top_k_is_compared(place):
    found = place.replayed(place.answer(place.result(place.images[0], 2, 0, top=True)))
    assert [(one.status, one.target.label) for one in found] == [(EQUAL, "tree"), (EQUAL, "cat")]


def test_images_are_found_by_their_digest_not_their_order(place):
    answer = place.answer(*(place.result(path) for path in place.images))
    found = place.replayed(answer, *reversed(place.images))
    assert [(one.status, one.image) for one in found] == [(EQUAL, str(path)) for path in place.images]


def test_of_several_results_some_may_be_made_again(place):
    answer = place.answer(*(place.result(path) for path in place.images))
    found = place.replayed(answer, place.images[1])
    assert [one.status for one in found] == [NO_IMAGE, EQUAL, NO_IMAGE]
    assert found[0].image == f"sha256 {answer['results'][0]['image_sha256']}"


def test_a_map_of_zeros_has_no_ranks(place):
    result = place.result(place.images[0])
    result["explanation"]["saliency"] = encoded(np.zeros((32, 32), np.float32), "float32")
    (found,) = place.replayed(place.answer(result))
    assert (found.status, found.distance, found.rank_correlation) == (DIFFERENT, 1.0, None)


# --- different ---------------------------------------------------------------------------------------------


def changed(answer, *path_and_value):
    *path, last, value = path_and_value
    answer = copy.deepcopy(answer)
    inner = answer
    for key in path:
        inner = inner[key]
    inner[last] = value
    return answer


EXPLANATION = ("results", 0, "explanation")


@pytest.mark.parametrize(
    ("option", "value"),
    [("gamma", 0.5), ("quantile", 0.5), ("conserve", "none"), ("method", "input_x_gradient"), ("rule", False),
     ("selection", "instance"), ("layers", ["second"]), ("polarity", "negative"),
     ("seed", "probability_weighted_logit")],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["float32", "uint8"])
def test_another_option_is_found(place, option, value, encoding):
    answer = place.answer(place.result(place.images[0], 1, encoding=encoding))
    (found,) = place.replayed(changed(answer, *EXPLANATION, option, value))
    assert found.status == DIFFERENT
    assert found.distance > found.tolerance
    assert "the map is off by" in found.reason


def test_another_target_is_found(place):
    answer = place.answer(place.result(place.images[0], 1))
    tree = {**answer["results"][0]["explanation"]["target"], "index": 2, "label": "tree"}
    (found,) = place.replayed(changed(answer, *EXPLANATION, "target", tree))
    assert found.status == DIFFERENT
    assert found.distance > found.tolerance


def test_another_map_is_found(place):
    answer = place.answer(place.result(place.images[0]))
    with_noise = place.explainer.explain(
        place.model.preprocessing.apply(read_image(place.images[0]))[0][None], 0
    ).saliency()[0].numpy() * np.float32(1.02)  # fmt: skip
    (found,) = place.replayed(changed(answer, *EXPLANATION, "saliency", encoded(with_noise, "float32")))
    assert found.status == DIFFERENT
    assert found.distance == pytest.approx(0.02, rel=1e-3)
    assert found.rank_correlation > 0.9999
    with_noise[3, 3] = np.nan
    (found,) = place.replayed(changed(answer, *EXPLANATION, "saliency", encoded(with_noise, "float32")))
    assert found.status == DIFFERENT


def test_another_probability_is_found(place):
    answer = place.answer(place.result(place.images[0]))
    before = answer["results"][0]["predictions"][2]["probability"]
    (found,) = place.replayed(changed(answer, "results", 0, "predictions", 2, "probability", before + 0.05))
    assert found.status == DIFFERENT
    assert found.reason == "a probability is off by 0.05, allowed 0.01"
    assert found.distance < found.tolerance


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("transform", "original_size"), [48, 60], "original_size is [48, 60], here [60, 48]"),
        (("transform", "exif_orientation"), 6, "exif_orientation is 6, here 1"),
        (("transform", "crop_box"), [0, 0, 32, 32], "crop_box is [0.0, 0.0, 32.0, 32.0], here [8.0, 2.66"),
        (("quality", "gini"), 0.99, "gini is 0.99, here 0."),
        (("quality", "gini"), None, "gini is nan, here 0."),
        (("quality", "identity_layers"), 7, "identity_layers is 7, here 0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_another_transform_or_quality_is_found(place, path, value, reason):
    answer = changed(place.answer(place.result(place.images[0])), *EXPLANATION, *path, value)
    (found,) = place.replayed(answer)
    assert found.status == DIFFERENT
    assert found.reason.startswith(reason)
    assert found.mismatches == (found.reason,)
    assert found.distance < found.tolerance


def test_the_transform_is_compared_where_the_map_was_left_out(place):
    answer = place.answer(place.result(place.images[0], encoding="none"))
    (found,) = place.replayed(changed(answer, *EXPLANATION, "transform", "crop_box", [0, 0, 32, 32]))
    assert (found.status, found.distance) == (DIFFERENT, None)


def test_a_gini_index_may_be_off_as_much_as_the_map(place):
    answer = place.answer(place.result(place.images[0]))
    index = answer["results"][0]["explanation"]["quality"]["gini"]
    shifted = changed(answer, *EXPLANATION, "quality", "gini", index - 0.1)
    assert place.replayed(shifted)[0].status == DIFFERENT
    assert place.replayed(changed(shifted, "software", "runtime", "torch 1.0"))[0].status == EQUAL


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_the_orientation_is_that_of_the_file(place, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"turned.{suffix}"
    with Image.open(place.images[0]) as image:
        image.save(path, exif=exif)
    answer = place.answer(place.result(path))
    (found,) = place.replayed(changed(answer, *EXPLANATION, "transform", "exif_orientation", 6), path)
    assert found.status == EQUAL, found
    assert place.replayed(answer, path)[0].reason == "exif_orientation is 1, here 6"


@pytest.mark.parametrize("where", [("explanation", "target"), ("predictions", 3)], ids=["target", "prediction"])
def test_a_class_called_otherwise_is_refused(place, where):
    answer = place.answer(place.result(place.images[0]))
    one = answer["results"][0][where[0]][where[1]]
    ours = one["label"]
    answer = changed(answer, "results", 0, *where, "label", "cup")
    with pytest.raises(DataError, match=rf"calls class {one['index']} 'cup', the model '{ours}'\."):
        place.replayed(answer)


def test_maps_of_other_software_may_be_further_apart(place):
    answer = place.answer(place.result(place.images[0]))
    (found,) = place.replayed(changed(answer, "software", "runtime", "torch 1.0"))
    assert found.tolerance == 0.2
    here = f"torch {torch.__version__}"
    assert found.versions == f"Versions differ (torch 1.0, here {here}): 0.2 is allowed."
    assert place.replayed(answer)[0].versions == ""
    older = changed(changed(answer, "software", "parchgrad", "0.0.9"), "software", "device", "cuda")
    assert place.replayed(older, tolerance=0.5)[0].versions == (
        f"Versions differ (parchgrad 0.0.9, here {parchgrad.__version__}; device cuda, here cpu): 0.5 is allowed."
    )
    del answer["software"]
    assert place.replayed(answer)[0].tolerance == 0.2
    assert f"runtime not said, here {here}" in place.replayed(answer)[0].versions
    assert place.replayed(answer, tolerance=1e-3)[0].tolerance == 1e-3


# --- no map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"status": "skipped", "reason": "Not explained: 0.88 is not below 0.1."}, "skipped: 0.88 is not below 0.1"),
        ({"status": "shed", "reason": "Long queue."}, "shed: Long queue"),
        ({"status": "timeout", "reason": "Late."}, "timeout: Late"),
        (
            {"status": "error", "error": {"code": "target_not_in_table", "message": "No row."}},
            "the map failed with target_not_in_table",
        ),
    ],
    ids=["skipped", "shed", "timeout", "error"],
)
def test_an_answer_without_a_map_says_so_and_its_prediction_is_compared(place, entry, reason):
    result = place.result(place.images[0]) | {"explanation": entry}
    (found,) = place.replayed(place.answer(result))
    assert (found.status, found.reason, found.distance) == (NO_MAP, reason, None)
    assert found.probability_difference < 1e-6


def test_a_map_left_out_or_drawn_is_no_map(place):
    (found,) = place.replayed(place.answer(place.result(place.images[0], encoding="none")))
    assert (found.status, found.reason) == (NO_MAP, "the answer was asked for without its map (saliency=none)")
    answer = place.answer(place.result(place.images[0]))
    answer["results"][0]["explanation"]["saliency"]["dtype"] = "png"
    assert "saliency=png" in place.replayed(answer)[0].reason
    del answer["results"][0]["explanation"]
    assert place.replayed(answer)[0].reason == "it is an answer of /predict"


def test_an_image_that_failed_has_nothing_to_compare(place):
    failed = {"status": "error", "error": {"code": "image_truncated", "message": "Short."}}
    found = place.replayed(place.answer(failed, place.result(place.images[0])))
    assert [one.status for one in found] == [NO_MAP, EQUAL]
    assert found[0].reason == "the image failed with image_truncated"


# --- what does not belong together -------------------------------------------------------------------------


def test_weights_table_and_image_are_those_of_the_answer(place):
    answer = place.answer(place.result(place.images[0]))
    ours = place.model.weights_sha256
    with pytest.raises(DataError, match=f"has weights_sha256 {ours}, the answer has 0123"):
        place.replayed(changed(answer, "model", "weights_sha256", "0123"))
    with pytest.raises(DataError, match=f"has table_sha256 {place.table.table_sha256}, the answer has 0123"):
        place.replayed(changed(answer, "model", "table_sha256", "0123"))
    digest = hashlib.sha256(place.images[1].read_bytes()).hexdigest()
    expected = answer["results"][0]["image_sha256"]
    with pytest.raises(DataError, match=rf"1\.png' has sha256 {digest}, the answer's images have {expected}"):
        place.replayed(answer, place.images[1])


def test_a_version_that_is_not_there_is_answered_with_those_that_are(place):
    answer = place.answer(place.result(place.images[0]))
    with pytest.raises(ModelError, match=r"Model 'nothing' has no version 1 in '.*nothing'; there are: none\."):
        place.replayed(changed(answer, "model", "name", "nothing"))
    with pytest.raises(ModelError, match=r"Model 'net' has no version 7 in '.*net'; there are: 1\."):
        place.replayed(changed(answer, "model", "version", "7"))
    with pytest.raises(TableError, match=r"Table 'net' has no version 1 in '.*net'; there are: none\."):
        place.replayed(answer, tables_dir=place.root / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model", "name", "../net"), "no folder's names"),
        (("model", "version", ".."), "no folder's names"),
        (("model", 7), "does not name its model"),
        (("results", {}), "results are no list"),
        (("results", 0, "image_sha256", [7]), "is not text"),
        (("results", 0, "predictions", 0, "index", 9), r"names class 9; the model has 0\.\.3"),
        ((*EXPLANATION, "quantile", 7), "make no sense: Option 'quantile' is 7"),
        ((*EXPLANATION, "layers", 7), "make no sense"),
        ((*EXPLANATION, "layers", ["absent"]), "none of this model's"),
        ((*EXPLANATION, "target", {"index": 3, "label": "house", "probability": 0.2}), "none of this model's"),
        ((*EXPLANATION, "quality", "gini", "high"), "could not convert string to float: 'high'"),
        ((*EXPLANATION, "transform", "exif_orientation", math.inf), "cannot convert float infinity"),
        ((*EXPLANATION, "transform", None), "a map and no transform"),
        ((*EXPLANATION, "quality", None), "a map and no quality"),
        ((*EXPLANATION, "polarity", "up"), "polarity is 'up'"),
        ((*EXPLANATION, "alpha", 0.1), "lacks what its map was made with: one of quantile and alpha"),
        ((*EXPLANATION, "method", "integrated_gradients"), "lacks what its map was made with: steps"),
        ((*EXPLANATION, "sharpness", 2), r"does not know: \['sharpness'\]"),
        ((*EXPLANATION, "target", None), "a map and no target"),
        ((*EXPLANATION, "saliency", encoded(np.ones((3, 3), np.float32), "float32")), r"shape \(3, 3\)"),
        ((*EXPLANATION, "saliency", {}), "field 'shape' is missing"),
    ],
    ids=lambda value: ".".join(map(str, value[-2:]))[:30] if isinstance(value, tuple) else "",
)
def test_an_answer_that_makes_no_sense_is_refused(place, change, message):
    answer = changed(place.answer(place.result(place.images[0])), *change)
    with pytest.raises(DataError, match=message):
        place.replayed(answer)


OF_RULE = ("quantile", "gamma", "selection", "conserve", "layers", "normality_filter")


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "guided_backprop"])
@pytest.mark.parametrize("left_out", [OF_RULE, OF_RULE[2:], ()], ids=len)
def test_a_plain_method_needs_none_of_the_rule_s_options(place, method, left_out):
    answer = place.answer(place.result(place.images[0], 3, method=method, rule=False))
    for name in left_out:
        del answer["results"][0]["explanation"][name]
    (found,) = place.replayed(answer)
    assert found.status == EQUAL, found
    with pytest.raises(DataError, match="lacks what its map was made with: seed"):
        place.replayed(without(answer, "seed"))


def without(answer, name):
    answer = copy.deepcopy(answer)
    del answer["results"][0]["explanation"][name]
    return answer


@pytest.mark.parametrize("name", ["conserve", "rule", "seed", "polarity", "normality_filter", "quantile"])
def test_an_option_that_is_missing_is_named(place, name):
    answer = without(place.answer(place.result(place.images[0])), name)
    with pytest.raises(DataError, match=f"lacks what its map was made with: .*{name}"):
        place.replayed(answer)


# --- the command -------------------------------------------------------------------------------------------


def command(place, answer, *arguments):
    path = place.root / "saved.json"
    path.write_text(answer if isinstance(answer, str) else json.dumps(answer))
    folders = ("--models-dir", place.root / "models", "--tables-dir", place.root / "tables")
    return [str(a) for a in ("explain", "--replay", path, *arguments, *folders)]


def test_the_command_prints_a_table_and_ends_with_0(place):
    answer = place.answer(place.result(place.images[0], encoding="uint8"))
    result = CliRunner().invoke(cli, command(place, answer, place.images[0]), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "0.png" in result.output
    assert "equal" in result.output


def test_the_table_fits_80_columns(place):
    result = place.result(place.images[0], encoding="uint8")
    answer = changed(place.answer(result), "results", 0, "explanation", "gamma", 0.5)
    terminal = {"COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "dumb"}
    path = place.root / "picture_of_a_cat.png"
    path.write_bytes(place.images[0].read_bytes())
    printed = CliRunner().invoke(cli, command(place, answer, path), env=terminal, catch_exceptions=False).output
    heading, _, first, *_ = printed.splitlines()
    assert heading.split() == ["image", "target", "map", "distance", "encoding", "allowed", "ranks", "prob."]
    assert first.split()[1:3] == ["cat", "different"]
    assert max(map(len, printed.splitlines()[:4])) <= 80


def test_other_versions_are_said_once(place):
    answer = place.answer(*(place.result(path) for path in place.images))
    arguments = command(place, changed(answer, "software", "parchgrad", "0.0.9"), *place.images)
    printed = CliRunner().invoke(cli, arguments, catch_exceptions=False).output.splitlines()
    sentence = f"Versions differ (parchgrad 0.0.9, here {parchgrad.__version__}): 0.2 is allowed."
    assert printed.count(sentence) == 1


def test_a_sentence_ends_once(place, typed):
    skipped = {"status": "skipped", "reason": "Not explained: 0.88 is not below 0.1."}
    answer = place.answer(place.result(place.images[0]) | {"explanation": skipped})
    path = command(place, answer, place.images[0])
    ran = typed(*path)
    assert ran.returncode == 3
    assert ran.stdout.splitlines()[-1] == f"{place.images[0]}: skipped: 0.88 is not below 0.1."
    assert ran.stderr.endswith("could be compared: skipped: 0.88 is not below 0.1.\n")


def test_the_command_ends_with_1_where_a_map_differs_and_prints_json(place):
    answer = changed(place.answer(place.result(place.images[0])), *EXPLANATION, "gamma", 0.5)
    result = CliRunner().invoke(cli, command(place, answer, place.images[0], "--json"), catch_exceptions=False)
    assert result.exit_code == 1
    one = json.loads(result.output)
    assert (one["status"], one["target"]["label"]) == ("different", "cat")
    assert one["distance"] > one["tolerance"]
    same = command(place, answer, place.images[0], "--tolerance", 1e6)
    assert CliRunner().invoke(cli, same, catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("kind", ["no-json", "no-map", "other-image"])
def test_the_command_ends_with_3_where_the_data_does_not_do(place, typed, kind):
    answer = place.answer(place.result(place.images[0], encoding="none" if kind == "no-map" else "float32"))
    image = place.images[1 if kind == "other-image" else 0]
    arguments = command(place, "{" if kind == "no-json" else answer, image)
    ran = typed(*arguments)
    assert ran.returncode == 3
    said = {"no-json": "is not JSON", "no-map": "holds no map that could be compared", "other-image": "has sha256"}
    assert said[kind] in ran.stderr
    assert ran.stderr.startswith("Error: ")


@pytest.mark.parametrize("option", [("--gamma", "2"), ("--url", "http://x"), ("--out", "o"), ("--plain",)])
def test_options_that_a_replay_takes_from_the_answer_are_refused(place, option):
    result = CliRunner().invoke(cli, command(place, place.answer(), place.images[0], *option))
    assert result.exit_code == 2
    assert f"{option[0]} does not go with this: --replay takes every option from the answer" in result.output
