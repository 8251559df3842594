"""The command line says what the library says, on a tiny model; test_cli.py holds its manners."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from parchgrad import golden
from parchgrad.cli import cli
from parchgrad.errors import OptionError, ParchGradError, WeightsError
from parchgrad.explainer import Explainer
from parchgrad.models import build_network, load_model
from parchgrad.tables import load_table
from tests.parchgrad.test_build import write_images

FACTORY = "tests.parchgrad.factories:small"


def run(*arguments, check=True):
    """Output of one command; a library error propagates, as it does to `main`."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=True)
    if isinstance(result.exception, ParchGradError):
        raise result.exception
    if check:
        assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a table built from images, and the images."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    torch.save(build_network(FACTORY, 3, {"width": 8}).state_dict(), root / "weights.pth")
    (root / "labels.txt").write_text("cat\ndog\ntree\n")
    for seed, name in enumerate(("cat", "dog", "tree")):
        write_images(root / "data" / name, 4, seed)
    run("model", "add", "net", "--arch", FACTORY, "--weights", root / "weights.pth", "--labels", root / "labels.txt",
        "--size", 14, "--argument", "width=8", "--std", "0.5,0.5,0.25", "--models-dir", root / "models")  # fmt: skip
    run("table", "build", "net", "--data", root / "data", "--quantile", 0.4, *folders(root))
    return root


def folders(root):
    return ("--models-dir", root / "models", "--tables-dir", root / "selection_tables")


def test_added_and_built(place):
    model = load_model(place / "models" / "net")
    assert model.labels == ("cat", "dog", "tree")
    assert model.preprocessing.size == (14, 14)
    assert model.preprocessing.resize == 16
    assert model.preprocessing.std == (0.5, 0.5, 0.25)
    table = load_table(place / "selection_tables" / "net", model)
    assert table.folder.name == "1"
    assert table.defaults.quantile == 0.4
    assert table.defaults.gamma == math.inf
    assert table.images_per_class == (4, 4, 4)
    golden.check(Explainer(model, table), table.folder)


def test_explain_writes_overlays_and_says_what_the_library_says(place, tmp_path):
    files = sorted((place / "data" / "dog").iterdir())[:2]
    output = run("explain", "net", *files, "--target", "tree", "--json", "--out", tmp_path, *folders(place)).output
    results = [json.loads(line) for line in output.splitlines()]
    model = load_model(place / "models" / "net")
    explainer = Explainer(model, load_table(place / "selection_tables" / "net", model))
    for path, result in zip(files, results, strict=True):
        pixels, _ = model.preprocessing.apply(Image.open(path).convert("RGB"))
        expected = explainer.explain(pixels[None], 2)
        assert result["target"]["label"] == "tree"
        assert result["target"]["probability"] == pytest.approx(float(expected.probabilities()[0, 2]), rel=1e-5)
        assert result["prediction"]["index"] == int(expected.logits.argmax())
        with Image.open(result["overlay"]) as drawn:
            assert np.asarray(drawn).shape == (14, 14, 3)
    assert len({result["overlay"] for result in results}) == 2


def test_options_reach_the_explanation(place, tmp_path):
    file = next((place / "data" / "cat").iterdir())

    def gini(*options):
        line = run("explain", "net", file, "--target", 0, "--json", "--out", tmp_path, *options, *folders(place)).output
        return json.loads(line)["gini"]

    variants = [
        (),
        ("--plain",),
        ("--quantile", 0.7),
        ("--gamma", 2.0),
        ("--selection", "instance"),
        ("--method", "input_x_gradient"),
    ]
    found = {" ".join(map(str, options)): gini(*options) for options in variants}
    assert len(set(found.values())) == len(variants), found


def test_bad_input_is_the_librarys_error(place, tmp_path):
    file = place / "data" / "cat" / "00.png"
    with pytest.raises(OptionError, match="Option 'target' is 'horse'"):
        run("explain", "net", file, "--target", "horse", "--out", tmp_path, *folders(place))
    with pytest.raises(OptionError, match=r"Option 'quantile' is 1\.5"):
        run("explain", "net", file, "--quantile", 1.5, "--out", tmp_path, *folders(place))
    readme = tmp_path / "README.md"
    readme.write_text("no weights")
    with pytest.raises(WeightsError, match="README"):
        run("model", "add", "other", "--arch", FACTORY, "--weights", readme, "--labels", place / "labels.txt",
            "--models-dir", tmp_path)  # fmt: skip
    result = run("explain", "net", file, file, file, "--target", "0", "--target", "1", *folders(place), check=False)
    assert result.exit_code == 2
    assert "--target is given 2 times" in result.output
