"""`parchgrad evaluate` on a small model: what it reads, refuses and writes, and how it goes on."""

import gzip
import hashlib
import html
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from parchgrad.build import build_table
from parchgrad.cli import cli
from parchgrad.errors import DataError, EvaluationError, OptionError
from parchgrad.evaluation.measures import MEASURES
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import ImageFolder
from tests.parchgrad.test_build import write_images

LABELS = ("cat", "dog", "tree", "bus", "fish")


@pytest.fixture
def tiny_model(tmp_path_factory):
    architecture = "tests.parchgrad.factories:small"
    return load_model(
        add_model(
            "net",
            architecture=architecture,
            weights=build_network(architecture, 5).state_dict(),
            labels=list(LABELS),
            preprocessing=Preprocessing(size=(12, 10), resize=14),
            models_dir=tmp_path_factory.mktemp("models"),
        )
    )


@pytest.fixture
def folder(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("images")
    for seed, label in enumerate(LABELS):
        write_images(root / label, 3, seed)
    return ImageFolder.scan(root, tiny_model)


@pytest.fixture
def tables(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def evaluated(folder, tiny_model, tables):
    """`parchgrad evaluate --quick` on a table of the folder's images, built from those at `used` by its record."""
    place = tables / "net" / "1"
    build_table(tiny_model, folder.root).save(place)

    def run(*options, used=None, data=folder.root):
        if used is not None:
            lines = ["digest\tclass\tname"]
            for i in used:
                digest = hashlib.blake2b(folder.path(i).read_bytes(), digest_size=16).hexdigest()
                lines.append(f"{digest}\t{folder.targets[i]}\t{folder.name(i)}")
            (place / "images.tsv.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
        where = ["--models-dir", str(tiny_model.folder.parents[1]), "--tables-dir", str(tables)]
        arguments = ["evaluate", "net", "--data", str(data), "--quick"]
        if "--workers" not in options:
            options = ("--workers", "1", *options)
        return CliRunner().invoke(cli, [*arguments, *where, *options], catch_exceptions=False)

    return run


OURS = ("--method", "ParchGrad", "--method", "gradient")


def test_images_of_the_table_are_left_out(evaluated):
    result = evaluated(*OURS, used=[0, 1, 3, 6, 7, 9, 10, 12])
    assert result.exit_code == 0, result.output
    assert "that the table was built from were left out" in result.stderr
    again = evaluated(*OURS, "--allow-used")
    assert again.exit_code == 0
    assert "that the table was built from were left out" not in again.stderr
    assert again.stdout != result.stdout


def test_only_images_of_the_table_are_refused(evaluated):
    with pytest.raises(DataError, match=r"none of the 15 images can be evaluated; 15 were used to build the table"):
        evaluated(used=range(15))


def test_a_table_without_a_record_is_said(evaluated):
    result = evaluated(*OURS)
    assert "Table 'net' has no record of the images it was built from; they may be among these." in result.stderr


def test_a_class_without_a_row_is_measured_by_the_others_only(evaluated, folder, tiny_model, tables, tmp_path):
    build_table(tiny_model, folder.take(np.flatnonzero(folder.targets < 4))).save(tables / "net" / "1")
    written = tmp_path / "out.json"
    result = evaluated(*OURS, "--json", str(written))
    assert "rows for the classes of 8 of the 10 photographs" in result.stderr
    read = json.loads(written.read_text())
    gini = read["values"]["gini"]
    targets = [read["pictures"][index]["target"] for index in gini["pictures"]]
    assert [value is None for value in gini["methods"]["ParchGrad"]] == [target == 4 for target in targets]
    assert None not in gini["methods"]["gradient"]


def test_everything_is_written_and_named(evaluated, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    page, values, rows = tmp_path / "out.html", tmp_path / "out.json", tmp_path / "out.parquet"
    result = evaluated("--report", str(page), "--json", str(values), "--parquet", str(rows))
    assert result.exit_code == 0, result.output
    for path in (page, values, rows):
        assert f"Wrote {path}" in result.stdout
    assert not list(tmp_path.glob(".*unfinished"))
    read = json.loads(values.read_text())
    names = [row["name"] for row in read["methods"]]
    assert {"random map", "centre Gaussian", "edge detector", "gradient", "Grad-CAM", "LRP", "ParchGrad"} <= set(names)
    for name in names:
        assert name in result.stdout
        assert html.escape(name, quote=True).replace("&#x27;", "&#39;") in page.read_text(encoding="utf-8")
    model, table = read["settings"]["model"], read["settings"]["table"]
    assert re.fullmatch("[0-9a-f]{64}", model["weights_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", table["table_sha256"])
    assert set(parquet.read_table(rows).column("method").to_pylist()) <= set(names)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_processes_print_the_same(evaluated):
    one, two = (re.sub(r" +\d+\.\d  ", " ", evaluated(*OURS, "--workers", number).stdout) for number in "12")
    assert one == two


def test_an_ended_run_goes_on_and_another_one_is_refused(evaluated, tmp_path, monkeypatch):
    from parchgrad.evaluation.journal import Journal

    written = tmp_path / "out.json"
    record, done = Journal.record, []

    def until_the_third(journal, piece, found):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(piece)
        record(journal, piece, found)

    monkeypatch.setattr(Journal, "record", until_the_third)
    ended = evaluated(*OURS, "--json", str(written))
    assert ended.exit_code == 130
    assert "keeps what is done, the same command goes on from there" in ended.stderr
    assert not written.exists()
    monkeypatch.setattr(Journal, "record", record)
    with pytest.raises(EvaluationError, match="other data or with other options"):
        evaluated(*OURS, "--json", str(written), "--seed", "7")
    again = evaluated(*OURS, "--json", str(written))
    assert again.exit_code == 0
    assert "Going on: 3 pieces of work are done." in again.stderr
    assert written.exists()
    assert "Going on" not in evaluated(*OURS, "--json", str(written)).stderr


def test_without_an_output_nothing_is_kept_and_it_is_said(evaluated, monkeypatch):
    from parchgrad.evaluation.journal import Journal

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", stop)
    ended = evaluated(*OURS)
    assert ended.exit_code == 130
    assert "nothing to go on from: no output file was named" in ended.stderr


def test_boxes_and_masks_give_places(evaluated, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    boxes = root / "boxes.csv"
    lines = [f"{folder.name(i)},0,0,{5 + i},9" for i in range(1, len(folder))]
    folder.path(0).rename(folder.path(0).with_stem("unboxed"))
    boxes.write_text("\n".join(["image,x0,y0,x1,y1", *lines, ""]))
    written = root / "out.json"
    assert evaluated(*OURS, "--boxes", str(boxes), "--images", "15", "--json", str(written)).exit_code == 0
    read = json.loads(written.read_text())
    places = read["settings"]["places"]
    assert (places["with_place"], places["without"]) == (14, 1)
    assert len(places["sha256"]) == 64
    assert sum(value is None for value in read["values"]["object_mass"]["methods"]["gradient"]) == 1
    for i in range(len(folder)):
        path = next(path for path in (folder.path(i), folder.path(i).with_stem("unboxed")) if path.exists())
        with Image.open(path) as image:
            mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, : mask.shape[1] // 2] = 7
        place = root / "masks" / path.relative_to(folder.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(place.with_suffix(".png"))
    options = ("--masks", str(root / "masks"), "--mask-value", "7", "--json", str(written))
    assert evaluated(*OURS, *options).exit_code == 0
    assert json.loads(written.read_text())["settings"]["places"]["mask_value"] == 7


def test_a_folder_without_class_folders_has_labels_elsewhere(evaluated, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("flat")
    lines = ["image,label"]
    for i in range(len(folder)):
        name = f"{i}{folder.path(i).suffix}"
        (root / name).write_bytes(folder.path(i).read_bytes())
        if i != 2:
            lines.append(f"{name},{LABELS[folder.targets[i]]}")
    labels = root / "labels.csv"
    labels.write_text("\n".join([*lines, ""]))
    result = evaluated(*OURS, "--labels", str(labels), data=root)
    assert result.exit_code == 0, result.output
    assert "1 images have no label and are left out" in result.stderr
    with pytest.raises(DataError):
        evaluated(*OURS, data=root)


def test_fewer_than_four_classes_have_no_mosaics(evaluated, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("few")
    for label in LABELS[:3]:
        (root / label).symlink_to(f"{folder.root}/{label}")
    result = evaluated(*OURS, data=root)
    assert result.exit_code == 0
    assert "No mosaics: they need images of 4 classes, these are of 3." in result.stderr
    assert "mosaic mass" not in result.stdout


def test_all_outputs_are_tried_before_the_work(evaluated, tmp_path, monkeypatch):
    page = tmp_path / "out.html"
    same = evaluated(*OURS, "--report", str(page), "--json", str(page))
    assert same.exit_code == 2
    assert "name the same file" in same.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        evaluated(*OURS, "--report", str(page), "--json", str(tmp_path / "file" / "out.json"))
    assert evaluated(*OURS, "--json", str(tmp_path / "new" / "out.json")).exit_code == 0


def test_other_boxes_or_pictures_are_another_evaluation(evaluated, folder, tmp_path, monkeypatch):
    from parchgrad.evaluation.journal import Journal

    written, boxes = tmp_path / "out.json", tmp_path / "boxes.csv"
    record = Journal.record

    def stop(journal, piece, found):
        record(journal, piece, found)
        raise KeyboardInterrupt

    def run(*options):
        return evaluated(*OURS, "--boxes", str(boxes), "--json", str(written), *options, used=[0])

    def box(right):
        names = [folder.name(i) for i in range(len(folder))]
        boxes.write_text("\n".join(["image,x0,y0,x1,y1", *(f"{name},0,0,{right},9" for name in names), ""]))

    box(8)
    monkeypatch.setattr(Journal, "record", stop)
    assert run().exit_code == 130
    with pytest.raises(EvaluationError, match="other data or with other options"):
        run("--allow-used")
    box(9)
    with pytest.raises(EvaluationError, match="other data or with other options"):
        run()
    box(8)
    monkeypatch.setattr(Journal, "record", record)
    assert "Going on: 1 pieces" in run().stderr


def test_what_the_figures_stand_on_is_in_the_notes(evaluated, tmp_path):
    written = tmp_path / "out.json"

    def notes(*options, **more):
        evaluated(*OURS, "--json", str(written), *options, **more)
        return " ".join(json.loads(written.read_text())["notes"])

    assert "no record of the images it was built from" in notes()
    assert "were allowed: the figures may flatter it" in notes("--allow-used")
    assert "Of mosaics: Of" in notes(used=[0, 1, 3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "Gradcam"), "--method is 'Gradcam'; the rows are random map, centre Gaussian"),
        (("--boxes", "setup", "--masks", "setup"), "--boxes and --masks are given, expected one of them"),
        (("--mask-value", "3"), "--mask-value is for --masks"),
        (("--labels", "setup", "--label-column", "x"), "--image-column and --label-column are for Parquet"),
        (("--restart",), "--restart is for an output file"),
        (("--images", "0"), "0 is not in the range"),
    ],
)
def test_wrong_options_are_named(evaluated, tmp_path, options, words):
    (tmp_path / "setup").mkdir()
    options = tuple(str(tmp_path / "setup") if option == "setup" else option for option in options)
    result = evaluated(*options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_wrong_setting_of_the_grid_is_refused_before_any_work(evaluated):
    with pytest.raises(OptionError, match="quantile"):
        evaluated("--quantiles", "0.1,2")


def test_rows_are_named_by_patterns(evaluated):
    result = evaluated("--method", "ParchGrad, *channels", "--method", "gradient")
    assert result.exit_code == 0, result.output
    shown = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
    rows = ["gradient", "ParchGrad, evidence, random channels", "ParchGrad, random channels"]
    rows.append("ParchGrad, other classes' channels")
    assert [line for line in shown if line.startswith(("gradient", "ParchGrad", "edge"))] == rows


def test_a_grid_has_a_row_a_setting(evaluated):
    result = evaluated("--quantiles", "0.25,0.5", "--gammas", "inf,3")
    assert result.exit_code == 0, result.output
    for name in ("ParchGrad, q 0.25", "ParchGrad, q 0.5", "ParchGrad, q 0.25, gamma 3", "ParchGrad, q 0.5, gamma 3"):
        assert name in result.stdout
        assert name.replace("ParchGrad", "ParchGrad, instance-wise") in result.stdout
    alone = evaluated("--quantiles", "0.25", "--selections", "class")
    assert "ParchGrad, instance-wise, q 0.25" not in alone.stdout


def test_the_page_of_the_docs_names_every_option_and_measure():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    options = {name for option in cli.commands["evaluate"].params for name in option.opts if name.startswith("--")}
    said = set(re.findall(r"`(?:[^`\n]* )?(--[a-z-]+)", text))
    assert said <= options
    # What other commands have too, and what explains itself.
    obvious = {"--image-column", "--label-column", "--table", "--seed", "--batch-size", "--device", "--models-dir"}
    assert options - said <= obvious | {"--tables-dir", "--images", "--mosaics", "--quick"}
    for measure in MEASURES:
        assert measure.title in text, measure.key
