"""The command line: each command from text to text, and its refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from parchgrad.cli import cli
from parchgrad.errors import ParchGradError
from parchgrad.models import build_network

ARCHITECTURE = "scenes.network:scene_net"
CLASSES = ("disc", "square", "cross", "ring")


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def output(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def write_images(root, per_class, seed=0):
    """Noise of a colour of its own for each class: enough for a table that means something."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 120, (48, 48, 3))
            pixels[..., number % 3] += 30 * (number + 1)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with labels, weights, images, an added model and its table; and the arguments that name it."""
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    torch.save(build_network(ARCHITECTURE, 4).state_dict(), root / "weights.pth")
    (root / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    images = write_images(root / "images", 4)
    where = ("--models-dir", root / "models", "--tables-dir", root / "tables")
    options = ("--rule", "native", "--size", 48, "--labels", root / "labels.txt", "--weights", root / "weights.pth")
    output("model", "add", "tiny", "--arch", ARCHITECTURE, *options, *where[:2])
    printed = output("table", "build", "tiny", "--data", images, *where)
    return root, where, printed


def test_table_build_says_what_it_made(project):
    root, _, printed = project
    assert "classes       4 of the model's 4" in printed
    assert "images        16; 4 to 4 a class" in printed
    assert sorted(p.name for p in (root / "tables/tiny/1").iterdir()) == [
        "evidence.safetensors",
        "golden.safetensors",
        "images.tsv.gz",
        "manifest.json",
        "table.safetensors",
    ]


def test_a_table_is_not_replaced_unasked(project):
    root, where, _ = project
    before = (root / "tables/tiny/1/manifest.json").read_bytes()
    result = invoke("table", "build", "tiny", "--data", root / "images", *where)
    assert result.exit_code == 1
    assert "exists already; --force replaces it" in result.output
    assert (root / "tables/tiny/1/manifest.json").read_bytes() == before


def test_model_list_and_show(project):
    _, where, _ = project
    assert output("model", "list", *where[:2]) == "tiny 1\n"
    shown = output("model", "show", "tiny", *where[:2])
    assert "architecture    scenes.network:scene_net" in shown
    assert "disc, square, cross, ring" in shown


def test_table_show(project):
    _, where, printed = project
    assert output("table", "show", "tiny/1", *where[2:]) in printed


def test_explain_writes_an_overlay_and_prints_json(project, tmp_path):
    root, where, _ = project
    image = root / "images/square/0.png"
    printed = output("explain", "tiny", image, "--target", "cross", "--out", tmp_path, "--json", *where)
    result = json.loads(printed)
    assert result["target"]["label"] == "cross"
    assert result["prediction"]["label"] in CLASSES
    with Image.open(tmp_path / "0.overlay.png") as drawn:
        assert drawn.size == (48, 48)


def test_explain_gives_each_image_its_target(project, tmp_path):
    root, where, _ = project
    images = (root / "images/disc/0.png", root / "images/ring/1.png")
    printed = output("explain", "tiny", *images, "--target", "2", "--target", "disc", "--out", tmp_path, *where)
    first, second = printed.splitlines()
    assert "explained cross" in first
    assert "explained disc" in second


def test_images_of_one_name_do_not_overwrite_each_others_overlay(project, tmp_path):
    root, where, _ = project
    images = (root / "images/disc/0.png", root / "images/ring/0.png")
    output("explain", "tiny", *images, "--out", tmp_path, *where)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unreadable_image_leaves_the_others_explained(project, tmp_path):
    root, where, _ = project
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = invoke("explain", "tiny", tmp_path / "bad.png", root / "images/disc/0.png", "--out", tmp_path, *where)
    assert result.exit_code == 1
    assert "bad.png' cannot be read" in result.stderr
    assert (tmp_path / "0.overlay.png").exists()


def test_evaluate_prints_the_comparison_and_writes_it(project, tmp_path):
    _, where, _ = project
    written = tmp_path / "scores.json"
    options = ("--quick", "--mosaics", 4, "--cam-layer", "features", "--workers", 1, "--json", written)
    printed = output("evaluate", "tiny", "--data", write_images(tmp_path / "held_out", 4, seed=1), *options, *where)
    methods = [row["name"] for row in json.loads(written.read_text())["methods"]]
    assert {
        "random map",
        "gradient",
        "integrated gradients",
        "Grad-CAM",
        "ParchGrad",
        "ParchGrad, random channels",
    } <= set(methods)
    assert all(name in printed for name in methods)


def test_a_wrong_row_is_refused_with_the_rows_there_are(project):
    root, where, _ = project
    result = invoke("evaluate", "tiny", "--data", root / "images", "--method", "lime", *where)
    assert result.exit_code == 2
    assert "'lime'" in result.output
    assert "ParchGrad" in result.output


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("model", "show", "absent"), "holds neither model.yaml nor a numbered version folder", 1),
        (("explain", "tiny", "IMAGE", "--target", "unicorn"), "'unicorn'; allowed: an index in 0..3", 1),
        (("explain", "tiny", "IMAGE", "--quantile", "2"), "Option 'quantile' is 2.0; allowed: a number in", 1),
        (("table", "build", "tiny", "--data", "EMPTY", "--force"), "holds no folders of images", 3),
    ],
    ids=["no-model", "no-such-class", "bad-option", "no-images"],
)
def test_a_library_error_is_one_line_on_stderr_and_an_exit_code(project, typed, tmp_path, arguments, message, code):
    root, where, _ = project
    names = {"IMAGE": str(root / "images/disc/0.png"), "EMPTY": str(tmp_path)}
    folders = where[:2] if arguments[0] == "model" else where
    command = [*(names.get(a, a) for a in arguments), *map(str, folders)]
    ran = typed(*command)
    assert ran.returncode == code
    assert ran.stderr.startswith("Error: ")
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_table_is_not_built_over_weights_of_another_model(project, tmp_path):
    root, where, _ = project
    torch.manual_seed(1)
    torch.save(build_network(ARCHITECTURE, 4).state_dict(), tmp_path / "other.pth")
    options = ("--rule", "native", "--size", 48, "--labels", root / "labels.txt", "--weights", tmp_path / "other.pth")
    output("model", "add", "tiny", "--arch", ARCHITECTURE, *options, "--models-dir", tmp_path)
    with pytest.raises(ParchGradError, match=r"weights_sha256 is .* the model's is"):
        invoke("explain", "tiny", root / "images/disc/0.png", "--models-dir", tmp_path, *where[2:])


def test_help_does_not_load_torch():
    code = "import sys, parchgrad.cli as c; c.cli(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
