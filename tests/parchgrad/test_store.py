"""The folder of a table: whatever fails while it is written the old one stands; what is wrong in it is found."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from parchgrad.build import Local, Reader, Work, build_table, gather, note_of, subject_of
from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, EvidenceError, ParchGradError
from parchgrad.evidence import EVIDENCE_FILE, IMAGES_FILE, Evidence
from parchgrad.files import file_sha256
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import open_source
from parchgrad.store import examine, read_evidence, write_table
from parchgrad.tables import MANIFEST_FILE, TENSORS_FILE, load_table

LABELS = ["cat", "dog", "tree", "bus"]
FACTORY = "tests.parchgrad.factories:small"
ALL_FILES = (TENSORS_FILE, MANIFEST_FILE, "golden.safetensors", IMAGES_FILE, EVIDENCE_FILE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = add_model(
        "net", architecture=FACTORY, weights=build_network(FACTORY, 4).state_dict(), labels=LABELS,
        preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=tmp_path_factory.mktemp("models"),
    )  # fmt: skip
    return load_model(folder)


def write_images(root, counts, seed=0, sizes=((15, 16),)):
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (*sizes[i % len(sizes)], 3)
            pixels = generator.integers(0, 200, 3) + generator.integers(0, 56, shape)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{seed}-{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), {"cat": 6, "dog": 5, "bus": 7})


def evidence_of(model, source, batch_size=4, **options):
    source = open_source(source, model) if isinstance(source, Path) else source
    work = Work(model, subject_of(model, **options), Reader(source, model.preprocessing, batch_size), note_of(source))
    return gather(work, Local())


@pytest.fixture(scope="module")
def evidence(model, data):
    return evidence_of(model, data)


@pytest.fixture
def written(model, evidence, tmp_path):
    """A table folder with everything in it."""
    folder = tmp_path / "tables" / "1"
    write_table(evidence.table(Defaults()), folder, model, evidence)
    assert sorted(p.name for p in folder.iterdir()) == sorted(ALL_FILES)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# A full disk


class Full:
    """From its `at`-th call on a function of a writer says that the disk is full, having written half of the file."""

    def __init__(self, function, at):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls < self.at:
            return self.function(*arguments, **options)
        for argument in arguments:
            if isinstance(argument, Path) and argument.parent.is_dir() and not argument.is_dir():
                argument.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", "the file")


STEPS = {
    "table": ("safetensors.torch.save_file", 1),
    "golden": ("safetensors.torch.save_file", 2),
    "evidence": ("safetensors.torch.save_file", 3),
    "flush of the table": ("parchgrad.files._flush", 1),
    "flush of the folder": ("parchgrad.files._flush", 5),
    "manifest": ("parchgrad.tables.write_text", 1),
    "record of images": ("parchgrad.store.gzip.compress", 1),
    "folder": ("parchgrad.files.tempfile.mkdtemp", 1),
    "exchange": ("parchgrad.files._exchange", 1),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", [True, False], ids=["replacing", "first"])
def test_a_full_disk_at_any_step_leaves_what_was_there(model, evidence, tmp_path, monkeypatch, step, before):
    from parchgrad import files

    folder = tmp_path / "tables" / "1"
    if before:
        write_table(evidence.table(Defaults(quantile=0.5)), folder, model, evidence)
    elif step == "exchange":
        pytest.skip("there is nothing to exchange")
    was = contents(tmp_path)
    name, at = STEPS[step]
    function = {
        "safetensors.torch.save_file": save_file,
        "parchgrad.files._flush": files._flush,
        "parchgrad.tables.write_text": files.write_text,
    }.get(name)
    full = Full(function, at)
    with monkeypatch.context() as patched:
        patched.setattr(name, full)
        with pytest.raises(OSError, match="No space left on device"):
            write_table(evidence.table(Defaults()), folder, model, evidence)
    assert full.calls >= at
    assert contents(tmp_path) == was
    assert not folder.parent.exists() or os.listdir(folder.parent) == (["1"] if before else [])
    write_table(evidence.table(Defaults()), folder, model, evidence)
    assert load_table(folder, model).defaults.quantile == 0.1


def test_a_file_of_any_size_that_does_not_fit_leaves_what_was_there(model, evidence, tmp_path):
    """The system's own error (a limit to the size of a file), in a process of its own."""
    folder = tmp_path / "tables" / "1"
    write_table(evidence.table(Defaults(quantile=0.5)), folder, model, evidence)
    was = contents(tmp_path)
    table = evidence.table(Defaults())
    largest = max(len(data) for data in was.values())
    failed = 0
    for limit in [*range(0, largest + 300, 499), largest + 1000]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                write_table(table, folder, model, evidence)
            except OSError as error:
                os.write(writing, str(error).encode())
                os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            said = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert os.listdir(folder.parent) == ["1"], limit
        if code:
            failed += 1
            assert (code, contents(tmp_path)) == (1, was), limit
            assert "File too large" in said
            assert "\n" not in said
    assert code == 0, "the last limit is none"
    assert failed > 5
    assert load_table(folder, model).defaults.quantile == 0.1


def test_a_full_disk_is_one_line_and_exit_code_1(model, data, tmp_path):
    """The command itself, on a file system of its own that is too small: in the pass and while the table is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        tables = disk / "tables"
        command = [
            sys.executable, "-m", "parchgrad", "table", "build", "net", "--data", data, "--models-dir",
            model.folder.parents[1], "--tables-dir", tables, "--workers", "0", "--batch-size", "4", "--force",
        ]  # fmt: skip
        run = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
        run["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
        assert subprocess.run([str(c) for c in command], **run).returncode == 0
        was = contents(tables)
        for every, room in (("3600", 12_288), ("0", 4096)):
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(b"x" * (free - room))
            result = subprocess.run([str(c) for c in [*command, "--seed", "1", "--checkpoint-every", every]], **run)
            assert result.returncode == 1
            *before, line = result.stderr.splitlines()
            assert not any(other.startswith(("Error", "Traceback", " ")) for other in before), "one line of error"
            assert line.startswith("Error: ")
            assert "No space left on device" in line
            left = contents(tables)
            left.pop("net/.1.unfinished.safetensors", None)
            assert left == was
            (disk / "filler").unlink()
        assert subprocess.run([str(c) for c in [*command, "--seed", "1"]], **run).returncode == 0
        assert sorted(p.name for p in (tables / "net").iterdir()) == ["1"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# What is written


def test_writing_twice_gives_the_same_files(model, evidence, written, tmp_path):
    write_table(evidence.table(Defaults()), tmp_path / "again", model, evidence)
    for name in (TENSORS_FILE, MANIFEST_FILE, IMAGES_FILE, EVIDENCE_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes(), name


def test_other_defaults_keep_the_evidence_and_the_record(model, evidence, written):
    before = contents(written)
    table = load_table(written, model)
    saved = write_table(table.with_defaults(quantile=0.7), written, model)
    after = contents(written)
    assert (saved.defaults.quantile, saved.table_sha256) == (0.7, table.table_sha256)
    assert {n for n in before if before[n] != after[n]} <= {MANIFEST_FILE, "golden.safetensors"}
    assert states(saved, model) == dict.fromkeys(EXAMINED, "ok")


def test_evidence_may_be_left_out(model, evidence, tmp_path):
    table = write_table(evidence.table(Defaults()), tmp_path / "1", model, evidence, keep_evidence=False)
    assert states(table, model) == {**dict.fromkeys(EXAMINED, "ok"), "evidence": "absent"}
    with pytest.raises(EvidenceError, match=r"has no evidence.safetensors"):
        read_evidence(table)
    (tmp_path / "1" / IMAGES_FILE).unlink()
    assert states(table, model)["images"] == "absent"


def test_evidence_read_back_gives_the_table(model, evidence, written):
    again = read_evidence(load_table(written, model))
    assert states(load_table(written, model), model) == dict.fromkeys(EXAMINED, "ok")
    assert again.names == evidence.names


# Examining

EXAMINED = ("files", "model", "values", "channels", "golden record", "images", "evidence")


def states(table, model):
    return {finding.what: finding.state for finding in examine(table, model)}


def failed(folder, model):
    """What is found wrong: in opening it, or in examining it, but for the digests of files in the manifest."""
    try:
        table = load_table(folder, model)
    except ParchGradError:
        return {"opening"}
    return {what for what, state in states(table, model).items() if state == "failed"} - {"files"}


@pytest.mark.parametrize("name", [IMAGES_FILE, EVIDENCE_FILE, "golden.safetensors"])
def test_any_changed_byte_beside_the_table_is_found(model, written, name):
    whole = (written / name).read_bytes()
    for place in np.linspace(0, len(whole) - 1, 5).astype(int).tolist():
        (written / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert states(load_table(written, model), model)["files"] == "failed", place
    (written / name).unlink()
    assert states(load_table(written, model), model)["files"] == "ok", "a served table needs less"


@pytest.mark.parametrize("name", [TENSORS_FILE, MANIFEST_FILE, IMAGES_FILE, EVIDENCE_FILE, "golden.safetensors"])
def test_any_changed_byte_is_found_or_changes_nothing_and_never_crashes(model, written, name):
    """`table.safetensors` and the record are under a digest: there every byte counts."""
    path = written / name
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    places = generator.permutation(len(whole))[:150]
    found = 0
    for place in places.tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        found += bool(failed(written, model))
    path.write_bytes(whole)
    assert not failed(written, model)
    if name == TENSORS_FILE:
        assert found == len(places)
    print(name, found, len(places), len(whole))


@pytest.mark.parametrize("name", [IMAGES_FILE, EVIDENCE_FILE, "golden.safetensors", TENSORS_FILE, MANIFEST_FILE])
def test_any_truncated_file_is_found(model, written, name):
    whole = (written / name).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2]:
        (written / name).write_bytes(whole[:length])
        assert failed(written, model), length
    (written / name).unlink()
    expected = {IMAGES_FILE: set(), EVIDENCE_FILE: set(), "golden.safetensors": {"golden record"}}
    assert failed(written, model) == expected.get(name, {"opening"})


def test_a_golden_record_of_another_table_is_found(model, written, data, tmp_path):
    other = evidence_of(model, write_images(tmp_path / "other", {"cat": 4, "dog": 4}, seed=5))
    write_table(other.table(Defaults()), tmp_path / "2", model, other)
    shutil.copy(tmp_path / "2" / "golden.safetensors", written)
    assert failed(written, model) == {"golden record"}


def test_evidence_of_other_images_is_found(model, written, tmp_path):
    other = evidence_of(model, write_images(tmp_path / "other", {"cat": 6, "dog": 5, "bus": 7}, seed=5))
    other.save(written / EVIDENCE_FILE)
    assert failed(written, model) == {"evidence"}


def test_evidence_that_differs_in_the_sample_alone_is_found(model, written, evidence):
    """Another normality test, all else equal."""
    path = written / EVIDENCE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    tensors["sample_features"] = tensors["sample_features"] ** 2
    save_file(tensors, path, metadata)
    assert failed(written, model) == {"evidence"}


@pytest.mark.parametrize("what", ["names", "digests", "targets"])
def test_evidence_whose_images_are_not_those_of_the_record_is_found(model, written, what):
    path = written / EVIDENCE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    tensors[what].view(-1)[0] ^= 1
    save_file(tensors, path, metadata)
    assert "evidence" in failed(written, model)


def test_evidence_of_another_model_is_found(model, written, evidence):
    other = Evidence(dataclasses.replace(evidence.subject, weights_sha256="00"), evidence.classes)
    other.add(evidence)
    other.sources = evidence.sources
    other.save(written / EVIDENCE_FILE)
    assert failed(written, model) == {"evidence"}


def test_a_record_of_other_images_is_found(model, written, tmp_path):
    other = evidence_of(model, write_images(tmp_path / "other", {"cat": 6, "dog": 5, "bus": 7}, seed=5))
    write_table(other.table(Defaults()), tmp_path / "2", model, other)
    shutil.copy(tmp_path / "2" / IMAGES_FILE, written)
    assert failed(written, model) == {"images"}


WRONG = {
    "nan": lambda t: t["log_p"].__setitem__((0, 0), torch.nan),
    "positive": lambda t: t["log_p"].__setitem__((1, 3), 0.5),
    "rank twice": lambda t: t["rank"].__setitem__((0, 0), t["rank"][0, 1]),
    "order": lambda t: t["rank"].__setitem__(0, t["rank"][0].flip(0)),
    "other p": lambda t: t["log_p"].mul_(1.5),
    "other mean": lambda t: t["mean"].add_(0.25),
    "other normality": lambda t: t["normality_p"].fill_(0.5),
    "negative std": lambda t: t["std"].neg_(),
    "constant": lambda t: t["std"].zero_(),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_values_under_a_right_digest_are_found(model, written, what):
    path = written / TENSORS_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    WRONG[what](tensors)
    save_file(tensors, path, metadata)
    manifest = json.loads((written / MANIFEST_FILE).read_text())
    manifest["table_sha256"] = file_sha256(path)
    (written / MANIFEST_FILE).write_text(json.dumps(manifest))
    found = failed(written, model)
    assert found - {"golden record"}, "the golden record alone would be made anew with the digest"
    if what in ("nan", "positive", "rank twice", "order"):
        assert "values" in found
    if what == "constant":
        assert "channels" in found


def test_a_table_that_is_nowhere_is_refused(evidence):
    with pytest.raises(ParchGradError, match="was not loaded from a folder"):
        read_evidence(evidence.table(Defaults()))


# Models of every kind


def rows(table):
    return {name: (layer.log_p, layer.rank, layer.mean, layer.std) for name, layer in table.layers.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 18, 64])
def test_batches_of_any_size_merge_to_the_whole(model, data, batch_size):
    """Also of one image, and larger than the data."""
    source = open_source(data, model)
    whole = evidence_of(model, source, batch_size).table(Defaults())
    order = np.random.default_rng(0).permutation(len(source))
    halves = [evidence_of(model, source.take(np.sort(order[part])), batch_size) for part in (slice(7), slice(7, None))]
    merged = halves[0].merge(halves[1]).table(Defaults())
    for name, fields in rows(merged).items():
        assert all(torch.equal(a, b) for a, b in zip(fields, rows(whole)[name], strict=True))


def test_models_of_double_precision(model, data, tmp_path):
    double = dataclasses.replace(model, module=build_network(FACTORY, 4).double())
    double.module.load_state_dict(model.module.state_dict())
    table, single = build_table(double, data), build_table(model, data)
    for name, layer in single.layers.items():
        np.testing.assert_allclose(table.layers[name].mean, layer.mean, rtol=1e-5, atol=1e-7)
    found = evidence_of(double, data)
    found.save(tmp_path / "e")
    assert Evidence.load(tmp_path / "e")[0].table(Defaults()).layers.keys() == table.layers.keys()


def test_images_of_their_own_sizes(model, tmp_path):
    """Under the native rule a device batch holds what has one size, so features may move in their last bits."""
    sizes = ((16, 20), (15, 15), (20, 16))
    native = dataclasses.replace(
        model, preprocessing=Preprocessing(size=(12, 12), rule="native", min_side=8, max_side=30)
    )
    source = open_source(write_images(tmp_path, {"cat": 7, "dog": 6}, sizes=sizes), native)
    whole = evidence_of(native, source).table(Defaults())
    parts = [evidence_of(native, source.take(np.arange(start, 13, 2))) for start in (0, 1)]
    merged = parts[0].merge(parts[1]).table(Defaults())
    assert merged.images_per_class == whole.images_per_class == (7, 6)
    for name, layer in whole.layers.items():
        np.testing.assert_allclose(merged.layers[name].mean, layer.mean, rtol=1e-5)
        np.testing.assert_allclose(merged.layers[name].log_p, layer.log_p, rtol=1e-3)


class WithHead(nn.Module):
    """An auxiliary head that runs in training alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3)
        self.auxiliary = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, images):
        z = torch.relu(self.body(images))
        if self.training:
            return self.auxiliary(z).mean((2, 3))
        return self.head(z.mean((2, 3)))


def test_idle_layers_are_named_and_stay_out(model, data, tmp_path):
    torch.manual_seed(0)
    with_head = dataclasses.replace(model, module=WithHead().eval())
    found = evidence_of(with_head, data)
    assert (found.subject.layers, found.subject.idle_layers) == ({"body": 5}, ("auxiliary",))
    table = write_table(found.table(Defaults()), tmp_path / "1", with_head, found)
    assert (table.layer_names, table.idle_layers, table.left_out) == (("body",), ("auxiliary",), ())
    assert states(table, with_head) == dict.fromkeys(EXAMINED, "ok")


def test_too_many_bad_images_are_no_table(model, data, tmp_path):
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    for path in sorted((copied / "cat").iterdir())[:5]:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Class 0 \(cat\) has 1 readable image"):
        build_table(model, copied, max_bad=0.9)
