"""Tables of real models from real photographs: grown, merged, checked, shown and tuned as in docs/tables.md."""

import hashlib
import json

import numpy as np
import pytest
import torch

from parchgrad.models import load_model
from parchgrad.sources import ImageFolder
from parchgrad.tables import load_table
from tests.oracles import selection
from tests.real.conftest import DATA, run

TRAINING, VALIDATION = DATA / "imagenette" / "train", DATA / "imagenette" / "val"
SQUEEZENET = pytest.mark.parametrize("real_model", ["squeezenet1_1"], indirect=True)


def sha256(folder):
    return hashlib.sha256((folder / "table.safetensors").read_bytes()).hexdigest()


def folder_of(root, classes, images=slice(None)):
    """Links to the training photographs of some classes, as an image folder of their own."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for path in sorted((TRAINING / name).iterdir())[images]:
            (root / name / path.name).symlink_to(path)
    return root


def parquet_of(root, folder):
    """The same photographs in one Parquet file, their labels as text."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow as pa

    paths = sorted(folder.glob("*/*"))
    rows = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    root.mkdir()
    pq.write_table(pa.table(rows), root / "images.parquet", row_group_size=100)
    return root


def test_a_real_table_verifies(repository, real_model):
    findings = json.loads(run(["table", "verify", real_model, "--json", *repository.arguments]))
    assert {finding["what"]: finding["state"] for finding in findings} == dict.fromkeys(
        ("checksum", "files", "model", "values", "channels", "golden record", "images", "evidence"), "ok"
    )


def test_log_p_of_real_channels_is_scipys(repository, real_model):
    """A slice of channels, their features taken photograph by photograph: exact where the features are."""
    from parchgrad.build import Local, Reader, Work, subject_of
    from parchgrad.statistics import ClassMoments, welch_log_p

    model = load_model(repository.models / real_model)
    source = ImageFolder.scan(TRAINING, model).take(np.arange(0, 1000, 10))
    work = Work(model, subject_of(model, normality=False), Reader(source, model.preprocessing, 32))
    seen = [found for _, found in Local().observe(work, np.arange(4))]
    features = np.concatenate([s.features for s in seen]).astype(np.float64)[:, ::97]
    targets = np.concatenate([s.targets for s in seen])
    moments = ClassMoments(10, features.shape[1])
    moments.update(features, np.searchsorted(source.classes, targets))
    _, log_p = welch_log_p(moments)
    for row, target in enumerate(source.classes):
        expected = selection.welch(features, targets, target)[1]
        alive = ~np.isnan(expected)
        assert alive.mean() > 0.9
        np.testing.assert_allclose(log_p[row][alive], expected[alive], rtol=1e-9)


@SQUEEZENET
def test_a_folder_and_a_parquet_file_merged_are_the_table_of_all(repository, real_model, tmp_path):
    names = sorted(path.name for path in TRAINING.iterdir())
    first, second = folder_of(tmp_path / "first", names[::2]), folder_of(tmp_path / "second", names[1::2])
    parts = []
    for name, data in (("a", first), ("b", parquet_of(tmp_path / "parquet", second))):
        where = ["--models-dir", str(repository.models), "--tables-dir", str(tmp_path / name)]
        run(["table", "build", real_model, "--data", str(data), "--no-normality", *where])
        parts.append(str(tmp_path / name / real_model))
    where = ["--models-dir", str(repository.models), "--tables-dir", str(tmp_path / "merged")]
    run(["table", "merge", *parts, *where])
    assert sha256(tmp_path / "merged" / real_model / "1") == sha256(repository.tables / real_model / "1")


@SQUEEZENET
def test_a_page_with_photographs(repository, real_model, tmp_path):
    page = tmp_path / "page.html"
    options = ["--data", str(VALIDATION), "--class", "n01440764", "--channels", "2", "--crops", "2"]
    run(["table", "show", real_model, "--html", str(page), *options, *repository.arguments])
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") >= 4
    assert "English springer" in text


@SQUEEZENET
def test_tune_finds_the_table_better_than_the_gradient_and_records_it(repository, real_model, tmp_path):
    import shutil

    copied = shutil.copytree(repository.tables, tmp_path / "tables")
    where = ["--models-dir", str(repository.models), "--tables-dir", str(copied)]
    options = ["--mosaics", "30", "--quantiles", "0.1,1.0", "--gammas", "inf", "--layers", "all"]
    printed = run(["table", "tune", real_model, "--data", str(VALIDATION), *options, *where])
    assert "mass over random" in printed
    model = load_model(repository.models / real_model)
    tuned = load_table(copied / real_model, model)
    assert tuned.defaults.quantile == 0.1, "all channels are the plain gradient"
    assert tuned.built["tuned"]["mosaics"]
    assert torch.equal(tuned.rank, load_table(repository.tables / real_model).rank)
    run(["table", "verify", real_model, *where])


@SQUEEZENET
@pytest.mark.filterwarnings(r"ignore:`\w+` is deprecated:DeprecationWarning")  # Ray's own
def test_ray_builds_the_same_table_of_real_photographs(repository, real_model, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    data = folder_of(tmp_path / "data", sorted(path.name for path in TRAINING.iterdir())[:3], slice(32))
    made = []
    for name, engine in (("local", []), ("ray", ["--engine", "ray", "--workers", "2"])):
        where = ["--models-dir", str(repository.models), "--tables-dir", str(tmp_path / name)]
        run(["table", "build", real_model, "--data", str(data), *engine, *where])
        made.append(sha256(tmp_path / name / real_model / "1"))
    assert made[0] == made[1]
