"""Listed images: each has the class that its file says, whatever folder it lies in; everything wrong is said first."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from parchgrad.errors import DataError
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import ImageFolder, ListedImages, open_listed

LABELS = ("cat", "dog", "tree", "crane", "crane")
MODEL = Model(
    name="net", version="1", architecture="none", weights_sha256="", labels=LABELS,
    class_ids=("n01", "n02", "n03", "n04", "n05"), preprocessing=Preprocessing(size=(8, 8), resize=8),
    module=nn.Identity(), folder=Path(),
)  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """Six images at the top and below, and what is no image."""
    for name in ("a.JPEG", "b.png", "c.jpg", "deep/d.jpg", "deep/er/e.png", "deep/b2.png"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"bytes of {name}".encode())
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def listed(root, tmp_path):
    """Opens the images with labels of a CSV file of this text."""

    def opened(text, name="labels.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return open_listed(root, MODEL, tmp_path / name)

    return opened


def labelled(source):
    return {source.name(i): target for i, target in enumerate(source.targets.tolist())}


def test_a_label_is_a_name_an_id_or_an_index(listed):
    source = listed(
        "\ufeffimage,label\na,tree\nb.png,n02\nimages/deep/d.jpg,3\ndeep/b2,n05\ndeep/er/e,0\nz,nothing we know\n"
    )
    expected = {"deep/er/e.png": 0, "b.png": 1, "a.JPEG": 2, "deep/d.jpg": 3, "deep/b2.png": 4}
    assert labelled(source) == expected
    assert list(labelled(source)) == list(expected), "classes ascending"
    assert isinstance(source, ListedImages)
    assert (source.targets.dtype, source.classes) == (np.int64, (0, 1, 2, 3, 4))
    assert source.unlabelled == ("c.jpg",)


@pytest.mark.parametrize(
    "header", ["image_id,label", "image,wnid", "x1,image_id,wnid,y1", " image , label "], ids=lambda text: text
)
def test_the_columns_have_the_names_that_boxes_have(listed, header):
    row = {"image": "c", "image_id": "c", "label": "n03", "wnid": "n03"}
    source = listed(f"{header}\n{','.join(row.get(column.strip(), '7') for column in header.split(','))}\n")
    assert labelled(source) == {"c.jpg": 2}


def test_rows_of_boxes_are_labels_that_agree(listed):
    boxes = "image_id,wnid,class_idx,W,H,x1,y1,x2,y2\n"
    source = listed(boxes + "a,n02,7,5,5,0,0,1,1\na,n02,7,5,5,2,2,3,3\nc,n01,7,5,5,0,0,1,1\n")
    assert labelled(source) == {"c.jpg": 0, "a.JPEG": 1}
    # Two words for one class agree too.
    assert labelled(listed("image,label\na,n02\na,dog\na,1\n")) == {"a.JPEG": 1}
    with pytest.raises(DataError, match=r"^Image 'a\.JPEG' has labels of the classes 1 \('n02'\), 0 \('cat'\); exp"):
        listed("image,label\na,n02\na,cat\n")


def voc(*names):
    box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
    objects = "".join(f"<object>{'' if name is None else f'<name>{name}</name>'}{box}</object>" for name in names)
    return f"<annotation>{objects}</annotation>"


def test_annotations_label_an_image_by_its_objects(root, tmp_path):
    folder = tmp_path / "annotations"
    (folder / "deep").mkdir(parents=True)
    for name, objects in {"a": ["dog", "n02"], "deep/d": ["tree"], "c": []}.items():
        (folder / f"{name}.xml").write_text(voc(*objects))
    source = open_listed(root, MODEL, folder)
    assert labelled(source) == {"a.JPEG": 1, "deep/d.jpg": 2}
    assert "c.jpg" in source.unlabelled
    (folder / "c.xml").write_text(voc("cat", "dog"))
    with pytest.raises(DataError, match=r"Image 'c\.jpg' has labels of the classes 0 \('cat'\), 1 \('dog'\)"):
        open_listed(root, MODEL, folder)
    (folder / "c.xml").write_text(voc("cat", None))
    with pytest.raises(DataError, match="a box of image 'c' has no label"):
        open_listed(root, MODEL, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na,cow\n", r"^Image 'a\.JPEG' is of no class of model 'net': .*'cow'"),
        ("image,label\na,5\n", r"^Image 'a\.JPEG' is of no class of model 'net'"),
        ("image,label\na,crane\n", r"^Image 'a\.JPEG' is of class 'crane', a name of several classes"),
        ("image,label\na,\n", r"labels\.csv', line 2: column 'label' is empty"),
        ("image,label\n,cat\n", r"labels\.csv', line 2: column 'image' is empty"),
        ("image,label\na,cat\nb\n", r"labels\.csv', line 3: 1 values; expected 2"),
        ("image,class\na,cat\n", r"have the columns \['image', 'class'\]; expected image and label"),
        ("", r"have the columns \[\]"),
        ("image,label\nz,cat\n", r"None of the 6 images of '.*images' has a label, 'a\.JPEG' to .* is of 'z'"),
        ("image,label\n", r"None of the 6 images of .*; there are no labels"),
        ("image,label\na,cat\na.JPEG,dog\nx/a.JPEG,cat\n", None),
        ("image,label\nx/b2,cat\ny/b2,dog\n", r"'deep/b2\.png' fits the labels of 'x/b2' and 'y/b2'"),
        ('image,label\n"a,cat\n', r"Labels '.*labels\.csv' cannot be read"),
    ],
)
def test_what_is_wrong_with_labels_is_said(listed, text, message):
    if message is None:  # the name in full comes first
        assert labelled(listed(text)) == {"a.JPEG": 1}
        return
    with pytest.raises(DataError, match=message):
        listed(text)


def test_a_label_of_two_images_is_refused(root, listed):
    (root / "deep" / "c.png").write_bytes(b"another")
    with pytest.raises(DataError, match=r"Labels of 'c' fit the images 'c\.jpg' and 'deep/c\.png'"):
        listed("image,label\nc,cat\n")


def test_a_folder_without_images_and_a_file_of_another_kind_are_refused(root, tmp_path):
    (tmp_path / "labels.csv").write_text("image,label\na,cat\n")
    for folder in ("empty", "absent"):
        if folder == "empty":
            (tmp_path / folder).mkdir()
        with pytest.raises(DataError, match=f"{folder}' holds no images"):
            open_listed(tmp_path / folder, MODEL, tmp_path / "labels.csv")
    for name in ("absent.csv", "labels.json"):
        with pytest.raises(DataError, match=name):
            open_listed(root, MODEL, tmp_path / name)


def test_it_reads_as_a_folder_of_classes_does(root, tmp_path):
    """A folder a class, opened by its folders and by a list of the same, is the same source."""
    for name, label in (("a.JPEG", "dog"), ("b.png", "cat"), ("c.jpg", "dog"), ("deep/d.jpg", "cat")):
        (tmp_path / "classes" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / label / Path(name).name).write_bytes((root / name).read_bytes())
    (tmp_path / "labels.csv").write_text("image,label\na,dog\nb,cat\nc,dog\nd,cat\n")
    folder = ImageFolder.scan(tmp_path / "classes", MODEL)
    source = open_listed(tmp_path / "classes", MODEL, tmp_path / "labels.csv")
    assert source.fingerprint() == folder.fingerprint()
    assert (source.root, source.classes, len(source)) == (folder.root, folder.classes, len(folder))
    assert (source.run_length, source.start_method) == (folder.run_length, folder.start_method)
    assert source.run_starts.tolist() == folder.run_starts.tolist()
    assert source.read([3, 0]) == folder.read([3, 0])
    assert source.path(2) == folder.path(2)
    part = pickle.loads(pickle.dumps(source.take([3, 1])))
    assert part.read([0, 1]) == folder.read([3, 1])
    assert (part.name(0), part.targets.tolist()) == (folder.name(3), folder.targets[[3, 1]].tolist())
    source.path(0).unlink()
    assert isinstance(source.read([0])[0], DataError)
