"""The client, `parchgrad explain --url` and `--replay` against the real service."""

import asyncio
import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import parchgrad
from parchgrad.cli import cli
from parchgrad.cli.explain import POLARITIES
from parchgrad.client import AsyncClient, Client, RequestRefusedError
from parchgrad.errors import DataError, OptionError
from parchgrad.preprocessing import read_image
from parchgrad.render import REDUCTION_OF_POLARITY
from parchgrad.replay import DIFFERENT, EQUAL, replay
from service.images import ImageError, ImageLimits, decode
from tests.service.conftest import LABELS, Home, picture
from tests.service.serving import Server


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """More than one request takes, one of them turned by its EXIF, one with alpha, one of 16 bits."""
    root = tmp_path_factory.mktemp("photographs")
    paths = [root / f"{i}.png" for i in range(20)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(root / "turned.jpg", exif=exif)
    alpha = picture(2).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    alpha.save(root / "alpha.png")
    grey = np.asarray(picture(3).convert("L")).astype(np.uint16) * 200
    Image.fromarray(grey).save(root / "grey16.png")
    return [*paths, root / "turned.jpg", root / "alpha.png", root / "grey16.png"]


@pytest.fixture(scope="module")
def explainer(home: Home) -> parchgrad.Explainer:
    return home.explainer()


def local_map(explainer: parchgrad.Explainer, path: Path, target: int | None = None, **options: object) -> np.ndarray:
    pixels = explainer.model.preprocessing.apply(read_image(path))[0][None]
    return explainer.explain(pixels, target, selection="instance", **options).saliency()[0].numpy()


def assert_same_map(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_maps_are_the_library_s(server: Server, explainer: parchgrad.Explainer, photographs: list[Path]) -> None:
    with Client(server.url) as client:
        results = client.explain(photographs, selection="instance")
    assert [r.status for r in results] == ["ok"] * len(photographs)
    for path, result in zip(photographs, results, strict=True):
        assert_same_map(result.explanation.saliency, local_map(explainer, path))
    turned = results[20].explanation.transform
    assert (turned.original_size, turned.exif_orientation) == ((80, 96), 6)


def test_the_awaited_client_gives_the_same(server: Server, photographs: list[Path]) -> None:
    async def explained() -> list[parchgrad.answers.Result]:
        async with AsyncClient(server.url) as client:
            assert await client.ready()
            return await client.explain(photographs, selection="instance")

    with Client(server.url) as client:
        expected = client.explain(photographs, selection="instance")
    for one, other in zip(asyncio.run(explained()), expected, strict=True):
        assert_same_map(one.explanation.saliency, other.explanation.saliency)
        assert one.predictions[0].index == other.predictions[0].index


def test_every_kind_of_image_is_the_same_image(server: Server, photographs: list[Path]) -> None:
    path = photographs[20]
    with Image.open(path) as opened, Client(server.url) as client:
        kinds = [path, str(path), path.read_bytes(), opened, np.asarray(read_image(path))]
        results = client.explain(kinds, 3)
    for one in results[1:]:
        assert_same_map(one.explanation.saliency, results[0].explanation.saliency)


def test_every_encoding_holds_the_same_map(
    server: Server, explainer: parchgrad.Explainer, photographs: list[Path]
) -> None:
    expected = local_map(explainer, photographs[0], 1)
    with Client(server.url) as client:
        for encoding, most in (("float32", 1e-5), ("list", 1e-5), ("float16", 1e-3), ("uint8", 0.06)):
            found = client.explain(photographs[0], 1, saliency=encoding, selection="instance").explanation.saliency
            assert np.linalg.norm(found - expected) <= most * np.linalg.norm(expected), encoding
        drawn = client.explain(photographs[0], 1, saliency="png").explanation.saliency
        with Image.open(io.BytesIO(drawn)) as opened:
            assert opened.size == (71, 71)  # the cut of 96 x 80, whose shorter side was 72 of which the model sees 64
        assert client.explain(photographs[0], 1, saliency="none").explanation.saliency is None


def test_options_of_each_image_reach_it(
    server: Server, explainer: parchgrad.Explainer, photographs: list[Path]
) -> None:
    gammas, targets = [0.0, 0.5, 2.0, np.inf] * 5, [LABELS[i % 8] for i in range(20)]
    with Client(server.url) as client:
        results = client.explain(
            photographs[:20], targets, gamma=gammas, layers=["features.1*", "classifier*"], top_k=2
        )
    for i, result in enumerate(results):
        pixels = explainer.model.preprocessing.apply(read_image(photographs[i]))[0][None]
        made = explainer.explain(pixels, i % 8, gamma=gammas[i], layers=["features.1*", "classifier*"])
        assert_same_map(result.explanation.saliency, made.saliency()[0].numpy())
        assert result.explanation.target.label == targets[i]
        assert result.explanation.options["gamma"] == gammas[i]
        assert len(result.predictions) == 2


def test_top_k_and_missing_maps(server: Server, photographs: list[Path]) -> None:
    with Client(server.url) as client:
        ranked = client.explain(photographs[0], "top:3", selection="instance")
        assert [e.target.index for e in ranked.explanations] == [p.index for p in ranked.predictions[:3]]
        skipped = client.explain(photographs[0], explain_when="sample:0").explanation
        assert (skipped.status, skipped.saliency) == ("skipped", None)
        assert skipped.reason
        uncovered = client.explain(photographs[0], 9).explanation
        assert (uncovered.status, uncovered.error.code) == ("error", "target_not_in_table")


def test_refusals_and_bad_images(server: Server, photographs: list[Path], tmp_path: Path) -> None:
    with Client(server.url) as client:
        with pytest.raises(RequestRefusedError, match="422 option_invalid: Option 'quantile' is '7'") as caught:
            client.explain(photographs[0], quantile=7)
        assert caught.value.status == 422
        with pytest.raises(RequestRefusedError, match="unknown_model"):
            client.predict(photographs[0], model="other")
        with pytest.raises(RequestRefusedError, match="unknown_field"):
            client.predict(photographs[0], sharpness=7)
        results = client.predict([photographs[0], b"no image", tmp_path / "absent.png", photographs[1]])
        assert [r.error and r.error.code for r in results] == [None, "image_unsupported", "image_unreadable", None]
        assert client.models()["default"] == "tiny"
        assert client.model("tiny")["labels"] == LABELS
    assert not Client("http://127.0.0.1:9").ready()


# --- the command -------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def folders(home: Home) -> tuple[object, ...]:
    return ("--models-dir", home.root / "models", "--tables-dir", home.root / "tables")


def test_the_command_says_and_draws_the_same_by_a_service(
    server: Server, home: Home, photographs: list[Path], tmp_path: Path
) -> None:
    images = photographs[:3]
    options = ("--target", "thing 3", "--gamma", 2, "--json")
    local = run("explain", "tiny", *images, *options, "--out", tmp_path / "local", *folders(home))
    remote = run("explain", "tiny", *images, *options, "--out", tmp_path / "remote", "--url", server.url)
    assert local.exit_code == remote.exit_code == 0
    for here, there in zip(local.stdout.splitlines(), remote.stdout.splitlines(), strict=True):
        one, other = json.loads(here), json.loads(there)
        assert one.keys() == other.keys()
        assert (one["image"], one["crop_box"]) == (other["image"], other["crop_box"])
        assert one["target"]["label"] == other["target"]["label"] == "thing 3"
        assert one["gini"] == pytest.approx(other["gini"], abs=1e-4)
        with Image.open(one["overlay"]) as mine, Image.open(other["overlay"]) as theirs:
            assert mine.size == theirs.size == (64, 64)
            # The picture below is cut before it is scaled, not after: its edges differ by a few levels.
            difference = np.abs(np.asarray(mine).astype(int) - np.asarray(theirs))
            assert difference.mean() < 1
    table = run("explain", "tiny/1", *images, "--out", tmp_path / "remote", "--url", server.url + "/")
    assert len(table.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    "options",
    [
        ("--outline",),
        ("--opacity", 0.5),
        ("--polarity", "positive"),
        ("--polarity", "negative"),
        ("--method", "smoothgrad", "--samples", 2),
        ("--method", "grad_cam", "--outline"),
    ],
    ids=lambda options: options[-1],
)
def test_each_option_does_the_same_here_and_by_a_service(
    server: Server, home: Home, photographs: list[Path], tmp_path: Path, options: tuple[object, ...]
) -> None:
    def drawn(name: str, *arguments: object) -> tuple[float, np.ndarray]:
        given = (*arguments, "--target", 3, "--overlay", "none", "--json", "--out", tmp_path / name)
        result = run("explain", "tiny", photographs[0], *given)
        assert result.exit_code == 0, result.output
        one = json.loads(result.stdout)
        with Image.open(one["overlay"]) as opened:
            return one["gini"], np.asarray(opened).astype(int)

    plain = options[:2] if options[0] == "--method" else ()
    without = drawn("without", *plain, *folders(home))
    here = drawn("local", *options, *folders(home))
    there = drawn("remote", *options, "--url", server.url)
    assert here[0] == pytest.approx(there[0], abs=1e-4)
    assert np.abs(here[1] - there[1]).mean() < 0.5
    assert np.abs(here[1] - without[1]).mean() > 1


@pytest.mark.parametrize("option", ["steps", "samples"])
def test_what_is_no_number_of_points_is_refused_here_and_by_a_service(
    server: Server, home: Home, photographs: list[Path], tmp_path: Path, option: str
) -> None:
    given = ("explain", "tiny", photographs[0], f"--{option}", 0, "--out", tmp_path)
    with pytest.raises(OptionError, match=f"Option '{option}' is 0; allowed"):
        run(*given, *folders(home))
    with pytest.raises(RequestRefusedError, match=f"Option '{option}' is '0'; allowed"):
        run(*given, "--url", server.url)


def test_the_polarities_are_the_library_s() -> None:
    assert sorted(POLARITIES) == sorted(REDUCTION_OF_POLARITY)


def test_the_command_reports_an_image_that_fails(server: Server, photographs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = run("explain", "tiny", tmp_path / "bad.png", photographs[0], "--out", tmp_path, "--url", server.url)
    assert result.exit_code == 1
    assert "bad.png': The bytes are not an image" in result.stderr
    assert (tmp_path / "0.overlay.png").exists()
    uncovered = run("explain", "tiny", photographs[0], "--target", 9, "--out", tmp_path, "--url", server.url)
    assert uncovered.exit_code == 1
    assert "and no map: Table 'random' has no row for class 9" in uncovered.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--device", "cpu"), "--device does not go with this: the service at --url chooses that"),
        (("--table", "t"), "--table does not go with this"),
        (("--models-dir", "m"), "--models-dir does not go with this"),
        (("--tolerance", "1"), "--tolerance does not go with this: it is an option of --replay"),
        (("--target", "top:2"), "--target is top:k"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_that_a_service_has_no_use_for_are_refused(
    server: Server, photographs: list[Path], option: tuple[str, str], message: str
) -> None:
    result = run("explain", "tiny", photographs[0], "--url", server.url, *option)
    assert result.exit_code == 2
    assert message in result.output


# --- replay ------------------------------------------------------------------------------------------------


def save(path: Path, answer: object) -> Path:
    path.write_text(json.dumps(answer))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "instance"},
        {"target": 3, "saliency": "uint8", "quantile": 0.3, "gamma": 1.5, "conserve": "exact"},
        {"target": 3, "saliency": "float16", "alpha": 0.3, "polarity": "positive"},
        {"target": 3, "method": "integrated_gradients", "steps": 3, "seed": "probability_weighted_logit"},
        {"target": 3, "method": "smoothgrad", "samples": 3, "noise_seed": 11},
        {"target": 3, "seed": "evidence"},
        {"target": "top:2", "rule": False},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_a_real_answer_is_made_again(
    server: Server, home: Home, photographs: list[Path], tmp_path: Path, options: dict[str, object]
) -> None:
    images = photographs[20:]  # turned, with alpha, of 16 bits: decoded here as there
    with Client(server.url) as client:
        results = client.explain(images, **options)
    whole = {**results[0].answer, "results": [one for r in results for one in r.answer["results"]]}
    answer = save(tmp_path / "answer.json", whole)
    found = replay(answer, reversed(images), models_dir=home.root / "models", tables_dir=home.root / "tables")
    assert len(found) == (6 if options.get("target") == "top:2" else 3)
    for one in found:
        assert one.status == EQUAL, one
        assert one.tolerance == pytest.approx(one.quantisation + 0.01)  # the service says the same software
        assert one.distance == pytest.approx(one.quantisation, abs=2e-3)


def test_an_answer_as_curl_saves_it_is_made_again_by_the_command(
    server: Server, home: Home, photographs: list[Path], tmp_path: Path
) -> None:
    with photographs[0].open("rb") as file:
        response = server.client.post("/explain", files={"image": file}, data={"target": "3"})
    (tmp_path / "answer.json").write_bytes(response.content)
    result = run("explain", "--replay", tmp_path / "answer.json", photographs[0], *folders(home))
    assert result.exit_code == 0, result.output
    assert "equal" in result.output


def test_a_real_answer_that_was_changed_is_found_out(
    server: Server, home: Home, photographs: list[Path], tmp_path: Path
) -> None:
    with Client(server.url) as client:
        original = client.explain(photographs[0], 3).answer
    inside = {"models_dir": home.root / "models", "tables_dir": home.root / "tables"}

    def status(change: str, value: object) -> str:
        answer = json.loads(json.dumps(original))
        answer["results"][0]["explanation"][change] = value
        return replay(save(tmp_path / "answer.json", answer), photographs[:1], **inside)[0].status

    explained = original["results"][0]["explanation"]
    entry = explained["saliency"]
    values = np.frombuffer(base64.b64decode(entry["data"]), "<f4").copy()
    values[values.argmax()] = 0
    assert status("method", "gradient") == EQUAL
    assert status("transform", {**explained["transform"], "crop_box": [0, 0, 64, 64]}) == DIFFERENT
    assert status("transform", {**explained["transform"], "original_size": [80, 96]}) == DIFFERENT
    assert status("quality", {**explained["quality"], "gini": 0.99}) == DIFFERENT
    with pytest.raises(DataError, match="calls class 3 'cup', the model 'thing 3'"):
        status("target", {**explained["target"], "label": "cup"})
    assert status("gamma", 1.0) == DIFFERENT
    assert status("quantile", 0.5) == DIFFERENT
    assert status("polarity", "positive") == DIFFERENT
    assert status("saliency", {**entry, "data": base64.b64encode(values.tobytes()).decode()}) == DIFFERENT


# --- one decoding ------------------------------------------------------------------------------------------


def test_the_library_reads_every_file_as_the_service_does(bad_images: Path) -> None:
    """Else a replay of such an image would differ: transparency, 16 and 32 bits, orientation, palettes, CMYK."""
    limits, same = ImageLimits(10**9, 20_000_000), 0
    for path in sorted(bad_images.rglob("*.*")):
        try:
            theirs = decode(path.read_bytes(), limits).image
        except ImageError:
            continue
        assert np.array_equal(np.asarray(theirs), np.asarray(read_image(path))), path.name
        same += 1
    assert same > 150
