"""Sources: every image read is, byte for byte, what was written; everything wrong is said before any work."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.utils.data import DataLoader, Dataset

from parchgrad.errors import DataError
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import ImageFolder, ParquetImages, open_source
from parchgrad.sources.storage import shown

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")

LABELS = ("cat", "dog", "tree", "bus", "crane", "crane")
IDS = ("n1", "n2", "n3", "n4", "n5", "n6")
MODEL = Model(
    name="net", version="1", architecture="none", weights_sha256="", labels=LABELS, class_ids=IDS,
    preprocessing=Preprocessing(size=(8, 8), resize=8), module=nn.Identity(), folder=Path(),
)  # fmt: skip


def pictures(count, seed=0):
    """Bytes of every length, no two alike; sources decode nothing."""
    generator = np.random.default_rng(seed)
    return [b"%d:" % i + generator.bytes(int(generator.integers(0, 900))) for i in range(count)]


def classes_of(count, classes=(3, 0, 2), seed=1):
    return [classes[i % len(classes)] if i < 9 else int(c) for i, c in enumerate(
        np.random.default_rng(seed).choice(classes, count))]  # fmt: skip


# Image folders


@pytest.fixture
def folder(tmp_path):
    """Three classes, named by name, index and id; {name: bytes}."""
    written = {}
    for name, count in (("tree", 4), ("0", 2), ("n4", 3)):
        (tmp_path / "data" / name / "deep").mkdir(parents=True)
        for i, image in enumerate(pictures(count, seed=count)):
            inner = f"{name}/deep/{i}.JPEG" if i == 1 else f"{name}/{i}.png"
            (tmp_path / "data" / inner).write_bytes(image)
            written[inner] = image
        (tmp_path / "data" / name / "notes.txt").write_text("no image")
    (tmp_path / "data" / "README.md").write_text("no class")
    return tmp_path / "data", written


def test_a_folder_gives_what_is_in_its_files(folder):
    root, written = folder
    source = open_source(root, MODEL)
    assert isinstance(source, ImageFolder)
    class_of = {"0": 0, "tree": 2, "n4": 3}
    expected = sorted(written, key=lambda name: (class_of[name.split("/")[0]], name))
    assert [source.name(i) for i in range(len(source))] == expected
    assert source.targets.tolist() == [class_of[name.split("/")[0]] for name in expected]
    assert source.targets.dtype == np.int64
    assert source.read(range(len(source))) == [written[name] for name in expected]
    assert source.read([4, 1]) == [written[expected[4]], written[expected[1]]]
    assert (source.root, source.classes) == (str(root), (0, 2, 3))
    assert (source.run_length, source.run_starts.tolist()) == (1, list(range(9)))
    assert source.path(0) == root / expected[0]


def test_links_to_files_are_read_and_a_lost_file_is_an_error_in_its_place(folder):
    root, written = folder
    (root / "tree" / "z.png").symlink_to(root / "0" / "0.png")
    (root / "tree" / "zz.png").symlink_to(root / "nowhere.png")
    source = open_source(root, MODEL)
    place = next(i for i in range(len(source)) if source.name(i) == "tree/z.png")
    before, link, lost = source.read([place - 1, place, place + 1])
    assert (before, link) == (written["tree/deep/1.JPEG"], written["0/0.png"])
    assert isinstance(lost, DataError)
    assert str(lost).startswith("Image 'tree/zz.png' cannot be read: ")


def test_opening_a_folder_imports_neither_torch_nor_pyarrow(folder):
    code = (
        "import sys, types; from parchgrad.sources import open_source\n"
        "model = types.SimpleNamespace(class_index=['0', '', 'tree', 'n4'].index)\n"
        f"open_source({str(folder[0])!r}, model)\n"
        "print([m for m in ('torch', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Tables of encoded images


def as_struct(images):
    return pa.array([{"bytes": image, "path": None} for image in images], HF_IMAGE)


HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SIZES = {"b.parquet": 17, "a.parquet": 30, "deep/c.parquet": 1, "z.parquet": 0}


def write_parquet(folder, group=7, column="image", images=None, label="label", labels=None, names=None, sizes=SIZES):
    """Files of odd sizes in row groups of odd sizes; images and classes in the order of the names."""
    count = sum(sizes.values())
    images = pa.array(pictures(count)) if images is None else images
    labels = pa.array(classes_of(count)) if labels is None else labels
    start = 0
    for name in sorted(sizes):
        part = slice(start, start + sizes[name])
        table = pa.table({"other": pa.array(range(count))[part], column: images[part], label: labels[part]})
        start += sizes[name]
        if names is not None:
            features = {label: {"names": names, "_type": "ClassLabel"}, column: {"_type": "Image"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name, row_group_size=group)
    return folder


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "dictionary"])
@pytest.mark.parametrize("group", [1, 7, 100])
def test_each_image_is_what_was_written(tmp_path, kind, group):
    written, classes = pictures(48), classes_of(48)
    images = {
        "struct": lambda: as_struct(written),
        "large_binary": lambda: pa.array(written, pa.large_binary()),
    }.get(kind, lambda: pa.array(written))()
    labels = pa.array([LABELS[c] for c in classes])
    labels = labels.dictionary_encode() if kind == "dictionary" else labels
    write_parquet(tmp_path, group=group, images=images, labels=labels)
    source = open_source(str(tmp_path), MODEL)
    assert isinstance(source, ParquetImages)
    assert (len(source), source.classes, source.targets.tolist()) == (48, (0, 2, 3), classes)
    assert source.targets.dtype == np.int64
    assert source.read(range(48)) == written
    for start in range(0, 48, 5):
        assert source.read(range(start, min(start + 5, 48))) == written[start : start + 5]
    order = np.random.default_rng(3).permutation(48)
    assert source.read(order) == [written[i] for i in order]
    assert source.read([]) == []
    names = [f"{name}#{row}" for name in sorted(SIZES) for row in range(SIZES[name])]
    assert [source.name(i) for i in range(48)] == names
    starts = [i for i, name in enumerate(names) if int(name.split("#")[1]) % group == 0]
    assert source.run_starts.tolist() == starts
    assert source.run_length == int(np.median(np.diff([*starts, 48])))


LABEL_KINDS = {
    "int32": lambda classes: pa.array(classes, pa.int32()),
    "uint8": lambda classes: pa.array(classes, pa.uint8()),
    "names": lambda classes: pa.array([LABELS[c] for c in classes]),
    "large-string": lambda classes: pa.array([LABELS[c] for c in classes], pa.large_string()),
    "ids": lambda classes: pa.array([IDS[c] for c in classes]),
    "index-text": lambda classes: pa.array([str(c) for c in classes]),
    "dictionary": lambda classes: pa.DictionaryArray.from_arrays(classes, pa.array(["cat", "?", "tree", "bus"])),
}


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_labels_are_names_ids_or_indices(tmp_path, kind):
    classes = classes_of(48)
    write_parquet(tmp_path, label="wnid", labels=LABEL_KINDS[kind](classes))
    assert open_source(tmp_path, MODEL).targets.tolist() == classes


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow", "feather"])
def test_every_file_format_gives_the_same(tmp_path, suffix):
    written, classes = pictures(40), classes_of(40)
    table = pa.table({"label": classes, "jpg": as_struct(written), "other": ["x"] * 40})
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=6)
    elif suffix == "feather":
        pytest.importorskip("pyarrow.feather").write_feather(table, path, chunksize=6)
    else:
        new = pa.ipc.new_stream if "stream" in suffix else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as out, new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
    source = open_source(path, MODEL)
    assert source.name(39) == f"data.{suffix}#39"
    assert source.run_starts.tolist() == list(range(0, 40, 6))
    assert source.targets.tolist() == classes
    assert source.read([30, 31, 2, 39]) == [written[i] for i in (30, 31, 2, 39)]
    assert source.read(range(40)) == written
    assert pickle.loads(pickle.dumps(source)).read([7]) == [written[7]]


@pytest.mark.parametrize("labels", [LABELS, ("tree", "n2", "cat", "bus"), ("3", "2", "1", "0")])
def test_hugging_face_names_say_what_an_integer_means(tmp_path, labels):
    """In the model's own order, in another, and with a class that no image has."""
    numbers = [i % len(labels) for i in range(48)]
    write_parquet(tmp_path, labels=pa.array(numbers), names=labels)
    expected = numbers if labels == LABELS else [MODEL.class_index(labels[number]) for number in numbers]
    assert open_source(tmp_path, MODEL).targets.tolist() == expected


BAD_NAMES = {
    "unknown": (("cat", "dog", "horse"), r"Label 2 of file 'a.parquet' is of no class of model 'net'.*horse"),
    "twice": (("cat", "dog", "n1"), r"classes 'cat' and 'n1', both class 0"),
    "ambiguous": (("cat", "dog", "crane"), r"class 'crane', a name of several"),
    "too-few": (("cat", "dog"), r"Row \d+ of file 'a.parquet' has label 2, expected 0..1"),
}


@pytest.mark.parametrize("case", BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_hugging_face_names_that_do_not_match_are_refused(tmp_path, case):
    names, message = case
    write_parquet(tmp_path, labels=pa.array([i % 3 for i in range(48)]), names=names)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, MODEL)


@pytest.mark.parametrize("metadata", [b"{", b"[]", b"{}"])
def test_unreadable_metadata_are_refused(tmp_path, metadata):
    table = pa.table({"image": pictures(4), "label": [0, 0, 1, 1]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'a.parquet' has Hugging Face metadata without readable features"):
        open_source(tmp_path, MODEL)


def with_columns(**columns):
    def make(root):
        table = {"image": pictures(6), "label": [0, 0, 1, 1, 2, 2]} | columns
        root.mkdir()
        pq.write_table(
            pa.table({name: column for name, column in table.items() if column is not None}), root / "a.parquet"
        )

    return make


def nothing(root):
    pass


def empty(root):
    root.mkdir()


def no_tables(root):
    root.mkdir()
    (root / "a.txt").write_text("text")


def broken(root):
    root.mkdir()
    (root / "a.parquet").write_bytes(b"PAR1 no parquet PAR1")


def both_kinds(root):
    write_parquet(root)
    (root / "cat").mkdir()
    (root / "cat" / "1.png").write_bytes(b"")


def changing_columns(root):
    with_columns()(root)
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), root / "b.parquet")


def old_feather(root):
    root.mkdir()
    (root / "a.feather").write_bytes(b"FEA1" + bytes(20))


REFUSED = {
    "absent": (nothing, {}, "holds no folders of images"),
    "absent-tables": (nothing, {"image_column": "x"}, "holds no Parquet or Arrow files"),
    "empty": (empty, {}, "holds no folders of images"),
    "no-tables": (no_tables, {"label_column": "x"}, "holds no Parquet or Arrow files"),
    "broken": (broken, {}, r"File 'a.parquet' cannot be read: [^\n]*\.$"),
    "old-feather": (old_feather, {}, "Feather version 1, expected version 2"),
    "both-kinds": (both_kinds, {}, "holds both tables .* and folders of images"),
    "no-image": (with_columns(image=None), {}, r"no image column, expected one named image.*--image-column.*label'\.$"),
    "no-label": (with_columns(label=None), {}, r"no label column.*--label-column.*columns are 'image'\.$"),
    "no-such-column": (with_columns(), {"image_column": "pic"}, r"no image column, expected 'pic' .*'image', 'label'"),
    "two-images": (with_columns(jpg=pictures(6)), {}, r"image columns \('image', 'jpg'\), .*: --image-column"),
    "two-labels": (with_columns(wnid=["n1"] * 6), {}, r"label columns \('label', 'wnid'\), .*: --label-column"),
    "image-type": (with_columns(image=["a"] * 6), {}, "column 'image' is of type string, expected binary, or a struct"),
    "struct-type": (with_columns(image=[{"path": "x"}] * 6), {}, "column 'image' is of type struct<path: string>"),
    "label-type": (with_columns(label=[0.5] * 6), {}, "column 'label' is of type double, expected integers or strings"),
    "label-list": (with_columns(label=[[0]] * 6), {}, "column 'label' is of type list"),
    "label-bool": (with_columns(label=[True, False] * 3), {}, "column 'label' is of type bool"),
    "other-columns": (changing_columns, {}, "File 'b.parquet' has no image column"),
    "no-class": (with_columns(label=[*"001122"[:5], "horse"]), {}, "Row 5 of file 'a.parquet' is of no class.*'horse'"),
    "no-index": (with_columns(label=[0, 0, 1, 6, 1, -1]), {}, "Row 3 of file 'a.parquet' is of no class.* 6; allowed"),
    "null": (with_columns(label=[0, 0, None, 1, None, 1]), {}, "Row 2 of file 'a.parquet' has no label"),
    "ambiguous": (with_columns(label=["crane"] * 6), {}, "Row 0 of file .* is of class 'crane', a name of sev"),
    "lonely": (with_columns(label=[0, 0, 0, 2, 2, 1]), {}, r"1 image\(s\) of class 1 \(dog\); a class needs at"),
    "one-class": (with_columns(label=[1] * 6), {}, "holds 1 class; a table contrasts at least 2"),
    "no-rows": (with_columns(image=pa.array([], pa.binary()), label=pa.array([], "string")), {}, "holds no rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_give_a_table_is_refused(tmp_path, case):
    make, options, message = case
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "data", MODEL, **options)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match="file of another kind"):
        open_source(__file__, MODEL)
    with pytest.raises(DataError, match="does not exist"):
        ParquetImages.scan(tmp_path / "absent.parquet", MODEL)
    with pytest.raises(DataError, match=r"holds no files of images, expected some that end in .parquet"):
        ParquetImages.scan(tmp_path, MODEL)


def test_a_null_label_among_strings_is_named_by_its_row(tmp_path):
    labels = [LABELS[c] for c in classes_of(48)]
    labels[33] = None
    write_parquet(tmp_path, labels=pa.array(labels))
    with pytest.raises(DataError, match=r"^Row 3 of file 'b.parquet' has no label \(null\)"):
        open_source(tmp_path, MODEL)


def test_columns_named_by_the_user(tmp_path):
    written = pictures(6)
    with_columns(thumb=written, picture=as_struct(written[::-1]), number=[5, 4, 5, 4, 5, 4])(tmp_path / "data")
    source = open_source(tmp_path / "data", MODEL, image_column="picture", label_column="number")
    assert source.read(range(6)) == written[::-1]
    assert source.targets.tolist() == [5, 4, 5, 4, 5, 4]
    assert open_source(tmp_path / "data", MODEL, image_column="thumb").read([0]) == written[:1]


def test_hidden_files_and_names_with_a_scheme(tmp_path):
    write_parquet(tmp_path)
    for name in ("_metadata.parquet", ".part.parquet", "_old/x.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no parquet")
    source = open_source(tmp_path.as_uri(), MODEL)
    assert (len(source), source.root) == (48, str(tmp_path))


@pytest.mark.parametrize("null", [False, None, {"bytes": None, "path": "x"}], ids=["binary", "struct", "path-only"])
def test_null_and_empty_images_are_errors_in_their_place(tmp_path, null):
    written = pictures(48)
    written[4], written[9] = None, b""
    images = pa.array(written)
    if null is not False:
        structs = [{"bytes": image, "path": "x"} for image in written]
        images = pa.array([*structs[:4], null, *structs[5:]], HF_IMAGE)
    found = open_source(write_parquet(tmp_path, images=images), MODEL).read(range(48))
    assert {i: str(image) for i, image in enumerate(found) if isinstance(image, DataError)} == {
        4: "Image 'a.parquet#4' cannot be read: the row holds no bytes (null).",
        9: "Image 'a.parquet#9' cannot be read: the row holds 0 bytes.",
    }
    assert [i for i in range(48) if found[i] != written[i]] == [4, 9]


def test_a_damaged_row_group_and_a_lost_or_changed_file_are_errors_in_their_places(tmp_path):
    write_parquet(tmp_path)
    written = pictures(48)
    source = open_source(tmp_path, MODEL)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    where = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    start = where.dictionary_page_offset or where.data_page_offset
    data[start : start + where.total_compressed_size] = bytes(where.total_compressed_size)
    (tmp_path / "a.parquet").write_bytes(data)
    assert source.read(range(7)) == written[:7]
    assert source.read(range(14, 48)) == written[14:]
    with pytest.raises(DataError, match=r"^The row group of 'a.parquet#8' cannot be read: [^\n]*\.$"):
        source.read(range(8, 20))
    (tmp_path / "a.parquet").unlink()
    pq.write_table(pa.table({"image": pictures(3), "label": [0, 0, 1]}), tmp_path / "b.parquet")
    again = pickle.loads(pickle.dumps(source))
    with pytest.raises(DataError, match=r"The row group of 'a.parquet#0' cannot be read"):
        again.read([0])
    with pytest.raises(DataError, match=r"The row group of 'b.parquet#0' cannot be read: .*the file has changed"):
        again.read([30])
    assert again.read([47]) == written[47:]


@pytest.fixture
def groups_read(monkeypatch):
    """[(file, row group, columns)] of every row group read."""
    read = []
    original = pq.ParquetFile.read_row_group

    def spy(self, number, *args, columns, **rest):
        read.append((number, tuple(columns)))
        return original(self, number, *args, columns=columns, **rest)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    return read


def test_only_the_row_groups_that_are_needed_are_read_and_each_once(tmp_path, groups_read):
    write_parquet(tmp_path, images=as_struct(pictures(48)))
    source = open_source(tmp_path, MODEL)
    assert groups_read == [], "scanning reads no images"
    source.read(range(8, 10))
    source.read(range(10, 14))
    assert groups_read == [(1, ("image.bytes",))]
    source.read([13, 14, 15])
    assert groups_read == [(1, ("image.bytes",)), (2, ("image.bytes",))]
    del groups_read[:]
    again = open_source(tmp_path, MODEL)
    for start in range(0, 48, 3):
        again.read(range(start, start + 3))
    assert [number for number, _ in groups_read] == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    del groups_read[:]
    again.read(np.random.default_rng(0).permutation(48))
    assert sorted(number for number, _ in groups_read) == [0, 0, 0, 1, 1, 2, 2, 3, 4], "in any order, each once"


def test_a_row_group_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    monkeypatch.setattr("parchgrad.sources.chunked.MAX_GROUP_BYTES", 3000)
    with pytest.raises(DataError, match=r"Row group 0 of file 'a.parquet' holds \d+ bytes .* smaller row_group_size"):
        open_source(tmp_path, MODEL)


@pytest.mark.parametrize("make", ["folder", "parquet"])
def test_some_of_the_images_and_a_pickled_copy(request, tmp_path, make):
    source = open_source(request.getfixturevalue("folder")[0] if make == "folder" else write_parquet(tmp_path), MODEL)
    everything = source.read(range(len(source)))
    chosen = np.random.default_rng(0).permutation(len(source))[:7]
    part = source.take(chosen)
    assert part.read(range(7)) == [everything[i] for i in chosen]
    assert part.targets.tolist() == source.targets[chosen].tolist()
    assert [part.name(i) for i in range(7)] == [source.name(i) for i in chosen]
    smaller = part.take([5, 2])
    assert smaller.read([1, 0]) == [everything[chosen[2]], everything[chosen[5]]]
    assert (len(part), len(smaller), part.root) == (7, 2, source.root)
    prints = {view.fingerprint() for view in (source, part, smaller, source.take(chosen[::-1]))}
    assert len(prints) == 4
    assert source.take(range(len(source))).fingerprint() == source.fingerprint()
    copy = pickle.loads(pickle.dumps(part))
    assert copy.read(range(7)) == part.read(range(7))
    assert (copy.fingerprint(), copy.classes, copy.name(3)) == (part.fingerprint(), part.classes, part.name(3))


def test_a_pickled_copy_carries_no_images(tmp_path):
    source = open_source(write_parquet(tmp_path), MODEL)
    before = len(pickle.dumps(source))
    source.read(range(48))
    assert len(pickle.dumps(source)) == before


def test_the_fingerprint_changes_with_the_data(tmp_path):
    def fingerprint(**changes):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return open_source(write_parquet(root, **changes), MODEL).fingerprint()

    first = fingerprint()
    assert first == fingerprint(), "the same data elsewhere"
    classes = classes_of(48)
    classes[20] = 2 if classes[20] != 2 else 3
    changed = {
        "label": fingerprint(labels=pa.array(classes)),
        "image": fingerprint(images=pa.array([*pictures(47), b""])),
        "file": fingerprint(sizes={**SIZES, "a.parquet": 29, "b.parquet": 18}),
        "name": fingerprint(sizes={("b2.parquet" if name == "b.parquet" else name): n for name, n in SIZES.items()}),
    }
    assert len({first, *changed.values()}) == 5, changed


def test_the_same_file_with_other_targets_or_another_column_has_another_fingerprint(tmp_path):
    with_columns(label=["cat", "cat", "dog", "dog", "tree", "tree"], thumb=pictures(6, seed=9))(tmp_path / "data")
    other_order = dataclasses.replace(MODEL, labels=LABELS[::-1])
    sources = [
        open_source(tmp_path / "data", MODEL),
        open_source(tmp_path / "data", other_order),
        open_source(tmp_path / "data", MODEL, image_column="thumb"),
    ]
    assert len({source.fingerprint() for source in sources}) == 3


def test_the_fingerprint_of_a_folder_changes_with_the_data(folder):
    root, _ = folder
    first = open_source(root, MODEL).fingerprint()
    assert open_source(root, MODEL).fingerprint() == first
    (root / "tree" / "0.png").write_bytes(b"longer than before" * 99)
    second = open_source(root, MODEL).fingerprint()
    (root / "tree" / "9.png").write_bytes(b"new")
    third = open_source(root, MODEL).fingerprint()
    (root / "tree").rename(root / "dog")
    assert len({first, second, third, open_source(root, MODEL).fingerprint()}) == 4


# Object storage: a server on this machine's loopback


@pytest.fixture(scope="module")
def store():
    """A server that speaks S3, keys in the environment; the query that names it."""
    server = pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "made-up")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("NO_PROXY", "127.0.0.1")
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        try:
            yield f"endpoint_override=127.0.0.1:{running.get_host_and_port()[1]}&scheme=http"
        finally:
            running.stop()


@pytest.fixture(scope="module")
def bucket(store, tmp_path_factory):
    """The data set of `write_parquet` under bucket/data, and the same on disk."""
    from pyarrow import fs

    local = write_parquet(tmp_path_factory.mktemp("local"))
    remote, _ = fs.FileSystem.from_uri(f"s3://bucket?{store}&allow_bucket_creation=true")
    remote.create_dir("bucket")
    fs.copy_files(str(local), "bucket/data", source_filesystem=fs.LocalFileSystem(), destination_filesystem=remote)
    return f"s3://bucket/data?{store}", local


def test_object_storage_gives_what_the_disk_gives(bucket, store, groups_read):
    uri, local = bucket
    here = open_source(local, MODEL)
    keyed = uri.replace("s3://", "s3://AKEY:se%2Fcret@")
    for there in (open_source(uri, MODEL), open_source(keyed, MODEL)):
        assert there.root == "s3://bucket/data"
        assert there.read(range(48)) == pictures(48)
        assert there.targets.tolist() == here.targets.tolist()
        assert there.name(40) == here.name(40)
        assert there.fingerprint() == here.fingerprint()
        assert (there.start_method, here.start_method) == ("spawn", None)
    del groups_read[:]
    one = open_source(f"s3://bucket/data/a.parquet?{store}", MODEL)
    assert (one.name(29), one.read([29, 28])) == ("a.parquet#29", pictures(48)[29:27:-1])
    assert groups_read == [(4, ("image",))]


def test_object_storage_says_what_is_wrong(bucket, store, tmp_path):
    from pyarrow import fs

    for place in ("bucket/absent", "nobucket/data"):
        with pytest.raises(DataError, match=f"^'s3://{place}' (does not exist|cannot be listed)"):
            open_source(f"s3://{place}?{store}", MODEL)
    with pytest.raises(DataError, match=r"^'s3://bucket/data' cannot be opened: .*'nosuch'") as caught:
        open_source(f"s3://AKEY:cret@bucket/data?{store}&nosuch=1", MODEL)
    assert "cret@" not in str(caught.value)
    with pytest.raises(DataError, match=r"^'s3://bu ket/data' cannot be opened") as caught:
        open_source("s3://AKEY:cret@bu ket/data", MODEL)
    assert "cret" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be opened"):
        open_source("nosuchscheme://bucket/data", MODEL)
    remote, _ = fs.FileSystem.from_uri(f"s3://bucket?{store}")
    table = pa.table({"image": pictures(4), "label": [0, 0, 1, 1]})
    with remote.open_output_stream("bucket/stream/a.arrow") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"'a.arrow' is an Arrow stream, which has no index"):
        open_source(f"s3://bucket/stream?{store}", MODEL)
    with remote.open_output_stream("bucket/file/a.arrow") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert open_source(f"s3://bucket/file?{store}", MODEL).read(range(4)) == pictures(4)


def test_fsspec_opens_what_pyarrow_does_not_know(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    write_parquet(tmp_path)
    memory.put(str(tmp_path), "/made-up-data", recursive=True)
    try:
        source = open_source("memory://made-up-data", MODEL)
        assert source.read(range(48)) == pictures(48)
        assert source.name(0) == "a.parquet#0"
    finally:
        memory.rm("/made-up-data", recursive=True)


def test_a_uri_is_shown_without_its_secrets():
    assert shown("s3://KEY:secret@bucket/a/b?endpoint_override=x&token=y") == "s3://bucket/a/b"
    assert shown("abfs://container@account/a?sas=secret") == "abfs://container@account/a"
    assert shown("/data/a?b") == "/data/a?b"


# Worker processes


class Reads(Dataset):
    """Five images an item, as a builder's workers read them."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return -(-len(self.source) // 5)

    def __getitem__(self, item):
        return self.source.read(range(5 * item, min(5 * item + 5, len(self.source))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_worker_processes_read_the_same(bucket, where, method):
    source = open_source(bucket[0] if where == "s3" else bucket[1], MODEL)
    assert source.read([0, 20]) == [pictures(48)[0], pictures(48)[20]], "this process has it open too"
    loader = DataLoader(Reads(source), batch_size=None, num_workers=2, multiprocessing_context=method, collate_fn=list)
    assert [image for part in loader for image in part] == pictures(48)
