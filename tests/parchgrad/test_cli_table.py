"""`parchgrad table build|extend|merge|verify`: equal tables however they came together, exit codes, refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from parchgrad import checkpoint as checkpoint_module
from parchgrad.cli import cli
from parchgrad.errors import DataError, EvidenceError, InUseError, ParchGradError
from parchgrad.files import claimed
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.store import write_table
from parchgrad.tables import load_table

LABELS = ["cat", "dog", "tree", "bus"]
FACTORY = "tests.parchgrad.factories:small"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    add_model(
        "net", architecture=FACTORY, weights=build_network(FACTORY, 4).state_dict(), labels=LABELS,
        preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=root,
    )  # fmt: skip
    return root


def write_images(root, counts, first=0):
    """`counts`: {class: number}; image `i` of a class is the same picture wherever it is written."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            generator = np.random.default_rng([LABELS.index(name), i])
            pixels = generator.integers(0, 200, 3) + generator.integers(0, 56, (15 + i % 3, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


class Tables:
    """Commands on the tables of one folder."""

    def __init__(self, models, root):
        self.models, self.root = models, root

    @property
    def where(self):
        return ("--models-dir", self.models, "--tables-dir", self.root)

    @property
    def folder(self):
        return self.root / "net" / "1"

    def build(self, data, *options):
        return self._done("build", "net", "--data", data, "--batch-size", 4, "--workers", 0, *options)

    def extend(self, data, *options):
        return self._done("extend", "net", "--data", data, "--workers", 0, *options)

    def merge(self, *parts, options=()):
        return self._done("merge", *(part.folder for part in parts), *options)

    def refused(self, *arguments):
        """The error that a command ends with; a table that stood there stands."""
        before = contents(self.root)
        result = invoke("table", *arguments, *self.where)
        assert result.exit_code != 0
        assert contents(self.root) == before
        return result.exception if not isinstance(result.exception, SystemExit) else result

    def _done(self, command, *arguments):
        result = invoke("table", command, *arguments, *self.where)
        assert result.exit_code == 0, (result.output, result.exception)
        assert sorted(p.name for p in self.folder.parent.iterdir()) == ["1"], "no scraps"
        return result

    def file(self, name="table.safetensors"):
        return (self.folder / name).read_bytes()

    @property
    def manifest(self):
        return json.loads(self.file("manifest.json"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def tables(models, tmp_path):
    """Called with a name: tables in a folder of their own."""
    return lambda name: Tables(models, tmp_path / "tables" / name)


@pytest.fixture
def whole(tables, tmp_path):
    """One build over all data."""
    made = tables("whole")
    made.build(write_images(tmp_path / "all", {"cat": 13, "dog": 9, "bus": 11}))
    return made


def assert_equal(one, other):
    """The same table to the last bit, of the same images; the sources may be told in another order."""
    assert one.file() == other.file()
    assert one.file("images.tsv.gz") == other.file("images.tsv.gz")
    mine, theirs = one.manifest, other.manifest
    for manifest in (mine, theirs):
        manifest["built"].pop("data")
        manifest["files"].pop("evidence.safetensors")
    assert mine == theirs
    with (
        safe_open(one.folder / "evidence.safetensors", "np") as a,
        safe_open(other.folder / "evidence.safetensors", "np") as b,
    ):
        for key in a.keys():  # noqa: SIM118  # no mapping
            np.testing.assert_array_equal(a.get_tensor(key), b.get_tensor(key), key)


# Growing


@pytest.mark.parametrize("room", [5000, 7, 4], ids=["whole-sample", "two-a-class", "one-a-class"])
def test_merged_tables_equal_one_build_over_all_data(tables, whole, tmp_path, monkeypatch, room):
    """Three parts of unlike classes and sizes, in either order."""
    monkeypatch.setattr("parchgrad.build.NORMALITY_IMAGES", room)
    if room != 5000:
        whole.build(tmp_path / "all", "--force")
    parts = [tables(name) for name in "abc"]
    parts[0].build(write_images(tmp_path / "a", {"cat": 5, "dog": 6}))
    write_images(tmp_path / "b", {"cat": 6}, first=5)
    parts[1].build(write_images(tmp_path / "b", {"bus": 4}))
    write_images(tmp_path / "c", {"cat": 2}, first=11)
    write_images(tmp_path / "c", {"dog": 3}, first=6)
    parts[2].build(write_images(tmp_path / "c", {"bus": 7}, first=4))
    forth, back, steps, halfway = tables("forth"), tables("back"), tables("steps"), tables("halfway")
    forth.merge(*parts)
    back.merge(*reversed(parts))
    halfway.merge(parts[2], parts[0])
    steps.merge(halfway, parts[1])
    for merged in (forth, back, steps):
        assert_equal(merged, whole)
    assert [source["images"] for source in forth.manifest["built"]["data"]] == [11, 10, 12]


@pytest.mark.parametrize("room", [5000, 7, 4], ids=["whole-sample", "two-a-class", "one-a-class"])
def test_an_extended_table_equals_one_build_over_all_data(tables, whole, tmp_path, monkeypatch, room):
    """By images of its classes, by a new class, by one image of one class, by images it has already."""
    monkeypatch.setattr("parchgrad.build.NORMALITY_IMAGES", room)
    if room != 5000:
        whole.build(tmp_path / "all", "--force")
    grown = tables("grown")
    grown.build(write_images(tmp_path / "first", {"cat": 6, "dog": 9}))
    grown.extend(write_images(tmp_path / "second", {"bus": 10}))
    grown.extend(write_images(tmp_path / "third", {"cat": 6}, first=6))
    one = grown.extend(write_images(tmp_path / "one", {"cat": 1}, first=12))
    assert "1 images added, 0 were in the table already" in one.stderr
    some = grown.extend(tmp_path / "all")
    assert "1 images added, 32 were in the table already" in some.stderr
    assert_equal(grown, whole)
    none = grown.extend(tmp_path / "all")
    assert "0 images added, 33 were in the table already" in none.stderr
    assert_equal(grown, whole)
    assert invoke("table", "verify", "net", *grown.where).exit_code == 0


def test_unreadable_images_are_listed_once_however_the_table_grew(tables, tmp_path):
    data = write_images(tmp_path / "all", {"cat": 4, "dog": 4})
    (data / "cat" / "zz.png").write_bytes(b"no image")
    grown = tables("grown")
    grown.build(data, "--max-bad", 0.5)
    write_images(data, {"dog": 1}, first=4)
    grown.extend(data, "--max-bad", 0.5)
    assert [name for name, _ in grown.manifest["built"]["bad_images"]] == ["cat/zz.png"]


def test_an_interrupted_extend_goes_on_and_is_not_taken_for_a_build(tables, whole, tmp_path, monkeypatch):
    grown = tables("grown")
    grown.build(write_images(tmp_path / "first", {"cat": 6, "dog": 9, "bus": 2}))
    before = contents(grown.folder)
    monkeypatch.setattr(checkpoint_module, "SHARE_OF_TIME", 1e9)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        result = invoke("table", "extend", "net", "--data", tmp_path / "all", "--workers", 0,
                        *grown.where)  # fmt: skip
    assert result.exit_code == 130
    unfinished = grown.folder.with_name(".1.unfinished.safetensors")
    assert f"Interrupted; '{unfinished}' keeps what is done, the same command goes on from there." in result.stderr
    assert contents(grown.folder) == before
    for other in (
        ("build", "net", "--force", "--data", tmp_path / "all", "--batch-size", 4),
        ("build", "net", "--force", "--data", tmp_path / "first", "--batch-size", 4),
        ("extend", "net", "--data", tmp_path / "first"),
    ):
        error = grown.refused(*other, "--workers", 0)
        assert isinstance(error, EvidenceError)
        assert str(error).endswith("give the same ones to go on, or --restart.")
    result = grown.extend(tmp_path / "all")
    assert "Going on after 12 of 33 images." in result.stderr
    assert_equal(grown, whole)


def interrupt_after(patched, batches):
    """Control-C while the next batch is looked at."""
    from parchgrad import build

    observed, calls = build.observed, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return observed(*arguments)

    patched.setattr(build, "observed", interrupted)


def test_restart_begins_anew(tables, whole, tmp_path, monkeypatch):
    made = tables("made")
    command = ("table", "build", "net", "--data", tmp_path / "all", "--batch-size", 4, "--workers", 0, *made.where)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        assert invoke(*command).exit_code == 130
    unfinished = made.folder.with_name(".1.unfinished.safetensors")
    unfinished.write_bytes(unfinished.read_bytes()[:-1])
    error = made.refused(*command[1:-4])
    assert isinstance(error, EvidenceError)
    assert "--restart begins anew" in str(error)
    result = made.build(tmp_path / "all", "--restart")
    assert "Going on" not in result.stderr
    assert_equal(made, whole)


# Refusals


def test_tables_that_do_not_belong_together_are_not_merged(models, tables, tmp_path):
    first, merged = tables("first"), tables("merged")
    first.build(write_images(tmp_path / "first", {"cat": 3, "dog": 3}))
    data = write_images(tmp_path / "other", {"cat": 3, "dog": 3}, first=3)
    for options, what in (
        (("--table-layers", "second"), "layers differs"),
        (("--statistics-point", "activation"), "statistics_point differs: 'convolution' and 'activation'"),
        (("--no-normality",), "sample_images differs: 5000 and 0"),
        (("--seed", 1), "seed differs: 0 and 1"),
    ):
        other = tables(what[:8])
        other.build(data, *options)
        error = merged.refused("merge", first.folder, other.folder)
        assert isinstance(error, EvidenceError)
        assert str(error).startswith("The evidence does not add up: ")
        assert what in str(error)
    shutil.copytree(models, tmp_path / "models")
    torch.manual_seed(1)
    for name in ("net", "net2"):
        add_model(name, architecture=FACTORY, weights=build_network(FACTORY, 4).state_dict(), labels=LABELS,
                  preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=tmp_path / "models")  # fmt: skip
    for name, what in (("net/2", "model_version differs: '1' and '2'"), ("net2", "model_name differs: 'net' and")):
        other = Tables(tmp_path / "models", tmp_path / "tables" / name)
        result = invoke("table", "build", name, "--data", data, "--workers", 0, *other.where)
        assert result.exit_code == 0, result.output
        (folder,) = (p.parent for p in other.root.rglob("manifest.json"))
        assert what in str(merged.refused("merge", first.folder, folder))
    assert "merge" in merged.refused("merge", first.folder).output
    assert not merged.root.exists()


def test_an_image_in_both_is_not_merged(tables, tmp_path):
    first, second = tables("first"), tables("second")
    first.build(write_images(tmp_path / "first", {"cat": 3, "dog": 3}))
    second.build(write_images(tmp_path / "second", {"cat": 3, "dog": 2}, first=2))
    error = tables("merged").refused("merge", first.folder, second.folder)
    assert isinstance(error, EvidenceError)
    assert str(error) == "2 image(s) are in both, such as 'cat/002.png'; they would count twice."


def test_a_table_without_its_evidence_serves_and_does_not_grow(tables, whole, tmp_path):
    bare = tables("bare")
    bare.build(tmp_path / "all", "--no-evidence")
    assert bare.file() == whole.file()
    assert bare.file("images.tsv.gz") == whole.file("images.tsv.gz")
    assert sorted(p.name for p in bare.folder.iterdir()) == [
        "golden.safetensors", "images.tsv.gz", "manifest.json", "table.safetensors",
    ]  # fmt: skip
    printed = invoke("table", "verify", "net", *bare.where)
    assert printed.exit_code == 0
    assert "absent   evidence" in printed.output
    more = write_images(tmp_path / "more", {"cat": 3, "dog": 3}, first=50)
    for command in (("extend", "net", "--data", more), ("merge", bare.folder, whole.folder, "--force")):
        error = bare.refused(*command)
        assert isinstance(error, EvidenceError)
        assert "has no evidence.safetensors" in str(error)
    image = tmp_path / "all" / "cat" / "000.png"
    answers = [
        invoke("explain", "net", image, "--json", "--out", tmp_path / name, *made.where)
        for name, made in (("x", bare), ("y", whole))
    ]
    assert [a.exit_code for a in answers] == [0, 0], answers[0].output
    assert (tmp_path / "x" / "000.overlay.png").read_bytes() == (tmp_path / "y" / "000.overlay.png").read_bytes()


def test_a_model_that_has_changed_since_is_not_extended_with(models, tables, tmp_path):
    """Other weights or other preprocessing under the same name and version: found before any image is read."""
    made = tables("made")
    made.build(write_images(tmp_path / "first", {"cat": 3, "dog": 3}))
    more = write_images(tmp_path / "more", {"cat": 3, "dog": 3}, first=3)
    torch.manual_seed(1)
    add_model("net", architecture=FACTORY, weights=build_network(FACTORY, 4).state_dict(), labels=LABELS,
              preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=tmp_path / "other")  # fmt: skip
    shutil.copytree(models, tmp_path / "scaled")
    manifest = tmp_path / "scaled" / "net" / "1" / "model.yaml"
    described = yaml.safe_load(manifest.read_text())
    described["input"]["resize"] = 40
    manifest.write_text(yaml.safe_dump(described))
    for place, what in (("other", "weights_sha256"), ("scaled", "preprocessing")):
        changed = Tables(tmp_path / place, made.root)
        error = changed.refused("extend", "net", "--data", more, "--workers", 0)
        assert isinstance(error, ParchGradError)
        assert what in str(error)
        assert not list(made.folder.parent.glob(".*")), "no image was read"


# Dirty data


def with_bad(root, counts, bad):
    """`bad`: {class: number} of files that are no images, spread among the good ones by name."""
    write_images(root, counts)
    for name, count in bad.items():
        for i in range(count):
            (root / name / f"{i:03}x.png").write_bytes(b"no image %d" % i)
    return root


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_counted_and_listed(tables, tmp_path, batch_size, workers):
    """Bad ones in a row fill whole batches, and lie on both sides of a batch's end."""
    made, clean = tables("made"), tables("clean")
    counts = {"cat": 6, "dog": 5, "bus": 4}
    data = with_bad(tmp_path / "dirty", counts, {"cat": 6, "bus": 1})
    for i in range(8):
        (data / "dog" / f"zz{i}.png").write_bytes(b"")
    (data / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    result = made.build(data, "--max-bad", 0.6, "--batch-size", batch_size, "--workers", workers)
    clean.build(write_images(tmp_path / "clean", counts), "--batch-size", batch_size)
    assert made.file() == clean.file()
    listed = dict(made.manifest["built"]["bad_images"])
    expected = [*(f"cat/{i:03}x.png" for i in range(6)), "bus/000x.png", *(f"dog/zz{i}.png" for i in range(8))]
    assert sorted(listed) == sorted([*expected, "dog/lost.png"])
    assert listed["dog/lost.png"].startswith("Image 'dog/lost.png' cannot be read: ")
    assert "16 unreadable left out" in result.output


def test_exit_codes(models, tables, tmp_path):
    """Of the command as a script meets it: 0 done, 1 an error, 2 wrong usage, 3 the images do not do."""
    good = write_images(tmp_path / "good", {"cat": 3, "dog": 3})
    dirty = with_bad(tmp_path / "dirty", {"cat": 3, "dog": 3}, {"cat": 1})
    lonely = with_bad(tmp_path / "lonely", {"cat": 3, "dog": 1}, {"dog": 3})
    strange = write_images(tmp_path / "strange", {"cat": 3, "dog": 3})
    (strange / "dog").rename(strange / "horse")
    made = tables("made")
    where = [str(w) for w in made.where]

    def run(*arguments):
        result = subprocess.run(
            [sys.executable, "-m", "parchgrad", "table", *map(str, arguments), *where], cwd=ROOT, text=True,
            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert "Traceback" not in result.stderr, result.stderr
        return result.returncode, result.stderr.strip().splitlines()[-1:]

    build = ("build", "net", "--workers", 0, "--data")
    assert run(*build, dirty) == (3, [
        "Error: 1 of 7 images cannot be read, more than the 1.00% allowed. Image 'cat/000x.png' cannot be read: it is "
        "no image Pillow knows."
    ])  # fmt: skip
    assert run(*build, good, "--restart")[0] == 0
    assert run(*build, good)[0] == 1
    assert run(*build, good, "--max-bad", 2)[0] == 2
    code, said = run(*build, lonely, "--force", "--max-bad", 0.9)
    assert (code, said) == (3, ["Error: Class 1 (dog) has 1 readable image(s); a class needs at least 2."])
    code, said = run(*build, strange, "--force")
    assert code == 3
    assert "horse' is named after no class of model 'net'" in said[0]


@pytest.mark.parametrize(("counts", "bad", "message"), [
    ({"cat": 3, "dog": 3}, {"cat": 1}, "1 of 7 images cannot be read, more than the 1.00% allowed."),
    ({"cat": 3}, {}, "a table contrasts at least 2"),
    ({"cat": 3, "dog": 1}, {}, "a class needs at least 2"),
])  # fmt: skip
def test_images_that_do_not_do_leave_the_table_that_was_there(tables, tmp_path, counts, bad, message):
    made = tables("made")
    made.build(write_images(tmp_path / "good", {"cat": 3, "dog": 3}))
    before = contents(made.folder)
    result = invoke("table", "build", "net", "--data", with_bad(tmp_path / "bad", counts, bad), "--force",
                    "--workers", 0, *made.where)  # fmt: skip
    assert isinstance(result.exception, DataError)
    assert message in str(result.exception)
    assert contents(made.folder) == before


def test_more_bad_images_are_allowed_by_the_same_command_which_goes_on(tables, tmp_path):
    made = tables("made")
    data = with_bad(tmp_path / "dirty", {"cat": 9, "dog": 9}, {"dog": 1})
    command = ("table", "build", "net", "--data", data, "--batch-size", 4, "--workers", 0, *made.where)
    assert isinstance(invoke(*command).exception, DataError)
    result = made.build(data, "--max-bad", 0.1)
    assert "Going on after 12 of 19 images" in result.stderr


def test_names_of_every_kind_get_through(tables, tmp_path):
    """Those that are no UTF-8 too, of good images and of bad ones."""
    made = tables("made")
    data = write_images(tmp_path / os.fsdecode(b"d\xe9ta"), {"cat": 3, "dog": 3})
    for name in ("tab\t.png", "line\n.png", "return\r.png", '"quoted".png', os.fsdecode(b"\xff\xfe.png")):
        shutil.copy(data / "cat" / "000.png", data / "cat" / name)
        (data / "dog" / name).write_bytes(b"no image")
    result = subprocess.run(
        [sys.executable, "-m", "parchgrad", "table", "build", "net", "--data", data, "--workers", "0", "--max-bad",
         "0.9", *map(str, made.where)], cwd=ROOT, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    assert b"5 unreadable left out" in result.stdout
    assert made.manifest["images_per_class"] == [8, 3]
    assert len(made.manifest["built"]["bad_images"]) == 5
    assert invoke("table", "verify", "net", *made.where).exit_code == 0
    assert invoke("table", "show", "net", *made.where[2:]).exit_code == 0


# Verify

EXAMINED = ("checksum", "files", "model", "values", "channels", "golden record", "images", "evidence")


def test_verify_says_what_it_examined(whole):
    printed = invoke("table", "verify", "net", *whole.where)
    assert printed.exit_code == 0
    assert [line.split()[0] for line in printed.output.splitlines()] == ["ok"] * len(EXAMINED)
    findings = json.loads(invoke("table", "verify", "net", "--json", *whole.where).output)
    assert [finding["what"] for finding in findings] == list(EXAMINED)
    assert all(set(finding) == {"what", "state", "detail"} for finding in findings)


def test_verify_finds_what_is_wrong_and_ends_with_1(whole):
    for name, what in (("golden.safetensors", "golden record"), ("evidence.safetensors", "evidence"),
                       ("images.tsv.gz", "images")):  # fmt: skip
        path = whole.folder / name
        before = path.read_bytes()
        path.write_bytes(before[: len(before) // 2])
        result = invoke("table", "verify", "net", "--json", *whole.where)
        assert result.exit_code == 1
        findings = {finding["what"]: finding for finding in json.loads(result.output)}
        assert [w for w, finding in findings.items() if finding["state"] == "failed"] == ["files", what]
        assert ("damaged" if what == "evidence" else "cannot be read") in findings[what]["detail"]
        assert "\n" not in findings[what]["detail"]
        assert invoke("table", "verify", "net", *whole.where).output.count("failed") == 2
        path.unlink()
        result = invoke("table", "verify", "net", *whole.where)
        assert result.exit_code == (1 if what == "golden record" else 0)
        assert result.output.count("absent") == (0 if what == "golden record" else 1)
        path.write_bytes(before)
    path = whole.folder / "table.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    result = invoke("table", "verify", "net", *whole.where)
    assert result.exit_code == 1
    assert result.output.startswith("failed   opening")
    assert "its manifest says" in result.output
    found = json.loads(invoke("table", "verify", "net", "--json", *whole.where).output)
    assert [(finding["what"], finding["state"]) for finding in found] == [("opening", "failed")]


# A folder and Parquet


@pytest.mark.parametrize("batch_size", [4, 64])
def test_images_in_parquet_give_the_folders_table(tables, whole, tmp_path, batch_size):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    paths = sorted((tmp_path / "all").rglob("*.png"), key=lambda p: p.name)  # classes mixed
    images = pa.table({"image": [p.read_bytes() for p in paths], "label": [p.parent.name for p in paths]})
    (tmp_path / "parquet").mkdir()
    parquet.write_table(images.slice(0, 20), tmp_path / "parquet" / "a.parquet", row_group_size=6)
    parquet.write_table(images.slice(20), tmp_path / "parquet" / "b.parquet", row_group_size=6)
    made = tables("made")
    for workers in (0, 2):
        made.build(tmp_path / "parquet", "--batch-size", batch_size, "--workers", workers, "--force")
        if batch_size == 4:
            assert made.file() == whole.file()
        with (
            safe_open(made.folder / "evidence.safetensors", "np") as a,
            safe_open(whole.folder / "evidence.safetensors", "np") as b,
        ):
            for key in ("count", "sum", "sum_low", "squares", "squares_low", "sample_features", "sample_priorities"):
                if batch_size == 4:
                    np.testing.assert_array_equal(a.get_tensor(key), b.get_tensor(key), key)
                else:  # another batch shape: kernels may sum in another order
                    np.testing.assert_allclose(a.get_tensor(key), b.get_tensor(key), rtol=1e-5, atol=1e-9)
    more = tables("grown")
    more.build(write_images(tmp_path / "first", {"cat": 6, "dog": 9}))
    grown = more.extend(tmp_path / "parquet")
    assert "18 images added, 15 were in the table already" in grown.stderr
    assert more.file() == whole.file()


# Several at once, and again and again


def test_too_many_unreadable_images_stop_the_build_each_time_it_is_tried(tables, tmp_path):
    data = write_images(tmp_path / "all", {"cat": 12, "dog": 12})
    (data / "cat" / "000.png").write_bytes(b"no image")
    made = tables("made")
    for _ in range(3):
        error = made_error(made, data)
        assert isinstance(error, DataError)
        assert "1 of 24 images cannot be read" in str(error)
    assert not made.folder.exists()


def made_error(made, data, *options):
    result = invoke(
        "table", "build", "net", "--data", data, "--batch-size", 4, "--workers", 0, *options, *made.where
    )  # fmt: skip
    assert result.exit_code != 0
    return result.exception


def test_one_process_at_a_time_works_on_a_table(whole, tables, tmp_path):
    more = write_images(tmp_path / "more", {"cat": 2}, first=50)
    with claimed(whole.folder.parent, "a test"):
        for command in (("build", "net", "--data", more, "--force"), ("extend", "net", "--data", more),
                        ("merge", whole.folder, whole.folder, "--force")):  # fmt: skip
            error = whole.refused(*command)
            assert isinstance(error, InUseError)
            assert str(error).endswith("net' is in use by another process for building a table.")
    whole.extend(more)


def test_new_defaults_for_a_table_that_was_replaced_meanwhile_are_refused(whole, tmp_path):
    """What `table tune` does: it reads a table, measures for long, and writes it with other defaults."""
    model = load_model(whole.models / "net")
    opened = load_table(whole.folder, model)
    write_table(opened.with_defaults(quantile=0.3), whole.folder, model)
    whole.extend(write_images(tmp_path / "more", {"cat": 2}, first=50))
    with pytest.raises(InUseError, match="was replaced by another while this one was worked on"):
        write_table(opened.with_defaults(quantile=0.5), whole.folder, model)
    assert load_table(whole.folder, model).defaults.quantile == 0.3


def test_damaged_evidence_is_not_grown_from(whole, tmp_path):
    path = whole.folder / "evidence.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    error = whole.refused("extend", "net", "--data", write_images(tmp_path / "more", {"cat": 2}, first=50))
    assert isinstance(error, EvidenceError)
    assert "is damaged or was changed" in str(error)


def test_tables_of_another_batch_size_do_not_add_up(tables, tmp_path):
    one, other = tables("one"), tables("other")
    one.build(write_images(tmp_path / "first", {"cat": 5, "dog": 4}))
    other.build(write_images(tmp_path / "second", {"cat": 5, "bus": 4}, first=20), "--batch-size", 5)
    error = tables("merged").refused("merge", one.folder, other.folder)
    assert isinstance(error, EvidenceError)
    assert str(error) == "The evidence does not add up: batch_size differs: 4 and 5."


def test_the_same_picture_under_another_class_is_another_image(tables, tmp_path):
    both = write_images(tmp_path / "all", {"cat": 5, "dog": 4})
    shutil.copy(both / "cat" / "000.png", both / "dog" / "zz.png")
    whole, grown = tables("whole"), tables("grown")
    whole.build(both)
    grown.build(write_images(tmp_path / "first", {"cat": 5, "dog": 4}))
    assert "1 images added, 9 were in the table already" in grown.extend(both).stderr
    assert_equal(grown, whole)


def test_the_record_of_tuning_stays_with_its_table_named(whole, tmp_path):
    model = load_model(whole.models / "net")
    opened = load_table(whole.folder, model)
    tuned = dataclasses.replace(opened, built={**opened.built, "tuned": {"chosen": 0.3}})
    write_table(tuned, whole.folder, model)
    whole.extend(write_images(tmp_path / "more", {"cat": 2}, first=50))
    assert whole.manifest["built"]["tuned"] == {"table_sha256": opened.table_sha256, "chosen": 0.3}


@pytest.mark.parametrize(
    "options",
    [("--max-bad", "nan"), ("--hold-out", "nan"), ("--checkpoint-every", "nan"), ("--seed", -1),
     ("--ray-address", "auto"), ("--gpus-per-worker", 1)],
    ids=lambda options: options[0],
)  # fmt: skip
def test_options_that_mean_nothing_are_wrong_usage(tables, tmp_path, options):
    data = write_images(tmp_path / "all", {"cat": 3, "dog": 3})
    result = tables("made").refused("build", "net", "--data", data, *options)
    assert result.exit_code == 2


def test_a_device_that_is_not_there_leaves_nothing_behind(tables, tmp_path):
    made = tables("made")
    error = made.refused("build", "net", "--data", write_images(tmp_path / "all", {"cat": 3, "dog": 3}),
                         "--device", "abacus")  # fmt: skip
    assert "abacus" in str(error)
    assert not made.root.exists()
