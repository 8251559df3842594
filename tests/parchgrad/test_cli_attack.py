"""`parchgrad attack` on the bundled model: its figures against a recount, what it writes, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import parchgrad
from parchgrad.attacks.attack import Attack
from parchgrad.attacks.report import measure
from parchgrad.cli import cli
from parchgrad.evaluation.images import Picture
from parchgrad.preprocessing import read_image
from scenes.folder import write_folder

ROOT = Path(parchgrad.__file__).parent.parent
FOLDERS = ["--models-dir", str(ROOT / "models"), "--tables-dir", str(ROOT / "selection_tables")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    list(write_folder(folder, "test", 10, 64))
    return folder


def run(*arguments):
    return CliRunner().invoke(cli, ["attack", "scenes", *FOLDERS, *map(str, arguments)])


def test_the_report(data, tmp_path):
    out, chart = tmp_path / "a.json", tmp_path / "a.svg"
    kinds = ["--attacks", "fgsm,jpeg", "--levels", "0,8", "--strengths", "1", "--images", 6]
    found = run("--data", data, *kinds, "--json", out, "--chart", chart)
    assert found.exit_code == 0, found.output
    assert chart.read_text().startswith("<?xml")
    report = json.loads(out.read_text())
    rows, images = report["rows"], report["images"]
    said = [row["attack"] and (row["attack"]["kind"], row["attack"]["strength"]) for row in rows]
    assert said == [None, ("fgsm", 0.0), ("fgsm", 8.0), ("jpeg", 1.0)]
    assert "fgsm" in found.output
    for column, row in enumerate(rows):
        predictions = [image["predictions"][column] for image in images]
        assert row["accuracy"]["mean"] == np.mean([p == i["label"] for p, i in zip(predictions, images, strict=True)])
        kept = [p == image["predictions"][0] for p, image in zip(predictions, images, strict=True)]
        assert row["kept"]["mean"] == np.mean(kept)
        agreement = [image["agreement"][column] for image in images]
        assert row["movement"]["agreement"]["mean"] == pytest.approx(np.mean(agreement))
        assert row["movement_kept"]["agreement"]["maps"] == sum(kept)
    # No strength is no attack; a strong one is one.
    assert rows[1]["movement"] == rows[0]["movement"]
    assert rows[2]["accuracy"]["mean"] < rows[0]["accuracy"]["mean"]


def test_each_picture_has_noise_of_its_own_and_the_same_again():
    model = parchgrad.load_model(ROOT / "models" / "scenes")
    explainer = parchgrad.Explainer(model, parchgrad.load_table(ROOT / "selection_tables" / "scenes", model))
    sample = next(iter(sorted((model.folder / "samples").iterdir())))
    image, _ = model.preprocessing.apply(read_image(sample).resize((64, 64)))
    pictures = [Picture(image, 0, name=name) for name in ("one", "two")]
    first, again = (measure(explainer, model.preprocessing, pictures, [Attack("noise", 0.5)]) for _ in range(2))
    assert first.found == again.found
    assert first.found[0][1].movement != first.found[1][1].movement


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks", "fog"], "--attacks names 'fog'; expected of fgsm, pgd, blur"),
        (["--attacks", "fgsm", "--levels", "1.5"], "a whole number of levels in 0..64"),
        (["--attacks", "blur", "--goal", "key"], "--goal is for fgsm and pgd"),
        (["--chart", "a.txt"], "a file that ends in .svg, .png, .pdf"),
        (["--json", "/nowhere/a.json"], "cannot be written to"),
        (["--attacks", "fgsm", "--goal", "no such"], "no such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_it_refuses(data, arguments, said):
    found = run("--data", data, *arguments)
    assert found.exit_code != 0
    assert said in f"{found.output} {found.exception}"
