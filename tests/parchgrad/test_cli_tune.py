"""`parchgrad table tune` and `evaluate`: a default that changes, what is printed, what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from parchgrad.cli import cli
from parchgrad.errors import ParchGradError
from parchgrad.models import add_model
from parchgrad.preprocessing import Preprocessing
from tests.parchgrad.test_tune import COLOURS, LABELS, Colours

GRID = ("--quantiles", "0.1,0.5", "--gammas", "inf", "--layers", "all")


def colours(num_classes):
    """The network of test_tune.py as an architecture."""
    assert num_classes == len(LABELS)
    return Colours()


def write_colours(root, count, seed):
    for target, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng([seed, target, i]).integers(-20, 20, (6, 6, 3))
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


def invoke(*arguments, columns=None):
    return CliRunner(env={"COLUMNS": columns}).invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model package, a table whose default selects half of the channels, and images held out."""
    root = tmp_path_factory.mktemp("colours")
    add_model(
        "colours", architecture="tests.parchgrad.test_cli_tune:colours", weights=Colours().state_dict(),
        labels=list(LABELS), models_dir=root / "models",
        preprocessing=Preprocessing(size=(6, 6), resize=6, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    )  # fmt: skip
    write_colours(root / "train", 8, seed=1)
    write_colours(root / "held_out", 12, seed=2)
    where = ("--models-dir", root / "models", "--tables-dir", root / "tables")
    options = ("--quantile", 0.5, "--workers", 0, "--batch-size", 8)
    result = invoke("table", "build", "colours", "--data", root / "train", *options, *where)
    assert result.exit_code == 0, (result.output, result.exception)
    return root


class Place:
    """Commands on a copy of the table."""

    def __init__(self, built, root):
        self.built, self.tables = built, root / "tables"
        shutil.copytree(built / "tables", self.tables)

    @property
    def where(self):
        return ("--models-dir", self.built / "models", "--tables-dir", self.tables)

    @property
    def manifest(self):
        return json.loads(self.file("manifest.json"))

    def file(self, name):
        return (self.tables / "colours" / "1" / name).read_bytes()

    def tune(self, *options, data="held_out", columns=None):
        data = ("--data", self.built / data, *GRID, "--mosaics", 30)
        return invoke("table", "tune", "colours", *data, *options, *self.where, columns=columns)

    def evaluate(self, *options):
        data = ("--data", self.built / "held_out", "--mosaics", 4, "--quick", "--workers", 1)
        return invoke("evaluate", "colours", *data, *options, *self.where)

    def show(self, *options):
        return invoke("table", "show", "colours", *options, *self.where)


@pytest.fixture
def place(built, tmp_path):
    return Place(built, tmp_path)


def test_a_default_changes_and_the_table_verifies_with_a_new_golden_record(place):
    golden = place.file("golden.safetensors")
    result = place.tune()
    assert result.exit_code == 0, (result.output, result.exception)
    assert place.manifest["defaults"]["quantile"] == 0.1
    assert place.manifest["built"]["tuned"]["confirmed"] is True
    assert "defaults changed" in result.stdout
    assert "the mosaics of these figures also confirmed the change" in " ".join(result.stdout.split())
    assert place.file("golden.safetensors") != golden
    verified = invoke("table", "verify", "colours", *place.where)
    assert verified.exit_code == 0, verified.output
    again = place.tune()
    assert again.exit_code == 0, (again.output, again.exception)
    assert "defaults unchanged" in again.stdout
    assert place.manifest["defaults"]["quantile"] == 0.1
    assert place.manifest["built"]["tuned"]["before"]["quantile"] == 0.1, "measured anew and recorded"
    assert invoke("table", "verify", "colours", *place.where).exit_code == 0


def test_a_dry_run_writes_nothing_and_may_be_small(place):
    before = place.file("manifest.json")
    result = place.tune("--mosaics", 8, "--dry-run")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "nothing written" in result.stdout
    assert place.file("manifest.json") == before


def test_too_few_mosaics_to_write_a_choice_are_refused_before_any_work(place):
    result = place.tune("--mosaics", 29, data="nowhere")
    assert result.exit_code == 2
    assert "--mosaics is 29, expected at least 30 for a choice to be written; --dry-run takes fewer" in " ".join(
        result.output.replace("\n", " ").split()
    )


def rows_of(text):
    """Lines of the tables: those between the line under the headings and the line before the caption."""
    rows, inside = [], False
    for line in text.splitlines():
        if line.strip().startswith("───"):
            inside = True
        elif inside and not line.strip():
            inside = False
        elif inside:
            rows.append(line)
    return rows


@pytest.mark.parametrize("columns", ["80", "100", "130", None])
def test_no_number_of_the_grid_is_cut_and_no_line_is_wider_than_asked(place, columns):
    result = place.tune("--conserve", "independent,exact,none", "--dry-run", columns=columns)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "…" not in result.stdout
    rows = rows_of(result.stdout)
    assert len(rows) > 10
    assert all(re.search(r"\d\.\d{3} ±\d\.\d{3}", line) for line in rows), "mass in every row, whole"
    lines = result.stdout.splitlines()
    if columns is not None:
        assert max(map(len, lines)) <= int(columns)
    wide = columns in ("130", None)
    assert any("over gradient" in line for line in lines) == wide
    assert any("over current" in line for line in lines)
    assert any("Wilson" in line for line in lines) or "Wilson" in " ".join(result.stdout.split())
    if wide:
        assert "kept: share of the channels whose gradient" in " ".join(result.stdout.split())


def test_what_the_figures_are_of_is_printed(place):
    text = " ".join(place.tune("--dry-run").stdout.split())
    assert "4 of the model's 5 classes are contrasted, with each other only" in text
    assert "Mosaics share images" in text
    text = " ".join(place.evaluate().stderr.split())
    assert "4 of the model's 5 classes are contrasted, with each other only" in text


def test_a_class_of_too_few_images_is_left_out_with_a_line(place, built, tmp_path):
    data = shutil.copytree(built / "held_out", tmp_path / "data")
    for path in sorted((data / "white").iterdir())[2:]:
        path.unlink()
    for path in (data / "white").iterdir():
        path.write_bytes(b"no image")
    result = place.tune("--dry-run", data=data)
    assert isinstance(result.exception, ParchGradError)
    assert "usable images of 3 classes, a mosaic needs 4" in str(result.exception)


@pytest.mark.parametrize(
    "option",
    [("--quantile", "0.2"), ("--channels", "8"), ("--crops", "4"), ("--batch-size", "32"), ("--device", "cpu"),
     ("--data", "x"), ("--class", "red"), ("--models-dir", "models")],
    ids=lambda o: o[0],
)  # fmt: skip
def test_show_refuses_options_of_the_page_without_a_page(place, option):
    if option[0] == "--models-dir":
        assert place.show().exit_code == 0, "where models are may always be said"
        return
    result = place.show(*option)
    assert result.exit_code == 2
    assert f"{option[0]} is for the page; add --html FILE." in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantiles", "a"), "Invalid value for '--quantiles'"),
        (("--gammas", "a"), "Invalid value for '--gammas'"),
        (("--method", "gradient", "--cam-layer", "detect"), "--cam-layer is for Grad-CAM, which --method leaves out"),
        (("--method", "GradCAM"), "--method is 'GradCAM'"),
    ],
)
def test_evaluate_refuses(place, options, message):
    result = place.evaluate(*options)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.output


def test_evaluate_takes_gamma_without_an_upper_end_and_grad_cam_alone(place):
    ours = ("--method", "ParchGrad, q 1")
    assert place.evaluate("--gammas", "inf", "--quantiles", "1", *ours).exit_code == 0
    result = place.evaluate("--method", "Grad-CAM", "--cam-layer", "detect")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Grad-CAM" in result.stdout


def parquet(folder, root):
    """The images of `root` as a Parquet file with columns of unusual names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(root.rglob("*.png"))
    columns = {"pixels_png": [p.read_bytes() for p in paths], "colour": [p.parent.name for p in paths]}
    pq.write_table(pa.table(columns), folder / "held_out.parquet")
    return folder / "held_out.parquet"


def test_columns_of_a_parquet_file_are_named_as_for_build(place, built, tmp_path):
    pytest.importorskip("pyarrow")
    data = parquet(tmp_path, built / "held_out")
    columns = ("--image-column", "pixels_png", "--label-column", "colour")
    assert place.tune("--data", data, "--dry-run", *columns).exit_code == 0
    assert place.evaluate("--data", data, *columns).exit_code == 0


@pytest.mark.parametrize("command", [("table", "tune"), ("evaluate",)], ids=" ".join)
def test_help_names_what_is_expected(command):
    text = invoke(*command, "--help").output
    assert "--conserve PATTERNS" not in text
    assert "--image-column" in text
