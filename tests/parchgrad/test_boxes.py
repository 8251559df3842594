"""Boxes and masks on a model's input against the pixels themselves, and the files they come from."""

import csv
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from parchgrad.errors import DataError
from parchgrad.evaluation.boxes import (
    Annotation,
    Box,
    boxes_by_image,
    mask_of_boxes,
    mask_of_image,
    read_boxes,
    read_csv,
    read_mask,
    read_voc,
)
from parchgrad.preprocessing import Placement, Preprocessing, read_image

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_val"
needs_boxes = pytest.mark.skipif(
    not (DATA / "boxes.csv").is_file(), reason="no ../shared/data/imagenet_val/boxes.csv: real boxes are not here"
)
SQUEEZENET = Preprocessing((224, 224), resize=256)


def boxes(*edges):
    return Annotation(tuple(Box(*one) for one in edges))


def union_loop(edges, placement, size):
    """Pixel by pixel: whether its middle, in the original, is in a box."""
    left, top, right, bottom = placement.crop_box
    mask = np.zeros(size, bool)
    for i, j in np.ndindex(size):
        x, y = left + (j + 0.5) * (right - left) / size[1], top + (i + 0.5) * (bottom - top) / size[0]
        mask[i, j] = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in edges)
    return mask


def test_the_union_of_boxes_is_where_a_pixels_middle_is_in_one():
    generator = np.random.default_rng(0)
    placement = Placement((500, 375), (68.75, 10.5, 431.25, 364.5))
    compared = 0
    for _ in range(20):
        corners = generator.uniform(0, (500, 375), (2, 2, 2))
        edges = [(*corners[k].min(axis=0), *corners[k].max(axis=0)) for k in range(2)]
        found = mask_of_boxes(boxes(*edges), placement, (29, 41))
        expected = union_loop(edges, placement, (29, 41))
        assert found.kept + found.outside == 2
        if found.kept == sum(union_loop([one], placement, (29, 41)).any() for one in edges):  # none without a middle
            np.testing.assert_array_equal(found.mask, expected)
            compared += 1
    assert compared > 15


def test_an_input_of_the_images_own_pixels_has_the_boxes_own():
    placement = Placement((6, 4), (0.0, 0.0, 6.0, 4.0))
    found = mask_of_boxes(boxes((1, 2, 4, 3), (3, 0, 4, 3)), placement, (4, 6))
    assert found.mask.astype(int).tolist() == [
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert (found.kept, found.outside, found.degenerate, found.valid) == (2, 0, 0, True)


def test_boxes_without_area_in_the_crop_are_counted_and_make_an_image_invalid():
    placement = Placement((100, 50), (25.0, 0.0, 75.0, 50.0))
    outside, touching, thin, turned = (0, 0, 20, 50), (0, 0, 25, 50), (30, 10, 30, 40), (60, 10, 40, 40)
    found = mask_of_boxes(boxes(outside, touching, thin, turned), placement, (10, 10))
    assert (found.kept, found.outside, found.degenerate, found.valid) == (0, 2, 2, False)
    assert not found.mask.any()
    found = mask_of_boxes(boxes(outside, (20, 5, 35, 500), thin), placement, (10, 10))
    assert (found.kept, found.outside, found.degenerate, found.valid) == (1, 1, 1, True)
    np.testing.assert_array_equal(found.mask, union_loop([(25, 5, 35, 50)], placement, (10, 10)))
    assert not mask_of_boxes(Annotation(()), placement, (10, 10)).valid
    upright = Placement((50, 100), (0.0, 25.0, 50.0, 75.0))
    found = mask_of_boxes(boxes((0, 0, 50, 20), (0, 80, 50, 100), (5, 20, 500, 35)), upright, (10, 10))
    assert (found.kept, found.outside, found.degenerate) == (1, 2, 0)
    np.testing.assert_array_equal(found.mask, union_loop([(5, 25, 50, 35)], upright, (10, 10)))


def test_a_box_smaller_than_a_pixel_has_one():
    placement = Placement((100, 100), (0.0, 0.0, 100.0, 100.0))
    found = mask_of_boxes(boxes((31, 76, 34, 79)), placement, (10, 10))
    assert np.argwhere(found.mask).tolist() == [[7, 3]]
    found = mask_of_boxes(boxes((99.9, 99.9, 100, 100), (0, 0, 100, 0.001)), placement, (10, 10))
    assert np.argwhere(found.mask).tolist() == [[0, j] for j in range(10)] + [[9, 9]]


def test_boxes_of_one_label():
    placement = Placement((10, 10), (0.0, 0.0, 10.0, 10.0))
    both = Annotation((Box(0, 0, 2, 2, "cat"), Box(5, 5, 9, 9, "dog")))
    assert mask_of_boxes(both, placement, (10, 10)).mask.sum() == 4 + 16
    assert mask_of_boxes(both, placement, (10, 10), label="cat").mask.sum() == 4
    assert not mask_of_boxes(both, placement, (10, 10), label="cow").valid


@pytest.mark.parametrize(
    "preprocessing",
    [SQUEEZENET, Preprocessing((96, 128), rule="stretch"), Preprocessing((64, 64), rule="native", max_side=200)],
    ids=lambda one: one.rule,
)
@pytest.mark.parametrize("size", [(500, 375), (333, 500), (61, 70)])
def test_boxes_and_masks_go_where_the_pixels_go(preprocessing, size):
    """A white box drawn on a black image is, on the input, where the mask says, but for pixels at its rim."""
    width, height = size
    edges = [int(width * 0.3), int(height * 0.05), int(width * 0.8), int(height * 0.6)]
    original = np.zeros((height, width), bool)
    original[edges[1] : edges[3], edges[0] : edges[2]] = True
    picture = PIL.Image.fromarray(np.repeat(original[..., None] * np.uint8(255), 3, 2))
    pixels, placement = preprocessing.apply(picture)
    white = preprocessing.restore(pixels)[..., 0] / 255.0
    shape = white.shape
    for mask in (
        mask_of_boxes(boxes(edges), placement, shape).mask,
        mask_of_image(original, placement, shape),
    ):
        sure = (white < 0.25) | (white > 0.75)
        assert sure.mean() > 0.97
        np.testing.assert_array_equal(mask[sure], white[sure] > 0.5)


def test_boxes_of_an_image_of_another_size_are_refused():
    placement = Placement((500, 375), (0.0, 0.0, 500.0, 375.0))
    one = Annotation((Box(0, 0, 9, 9),), (375, 500))
    with pytest.raises(DataError, match="375 x 500 pixels; the upright image has 500 x 375"):
        mask_of_boxes(one, placement, (10, 10))
    with pytest.raises(DataError, match="375 x 500 pixels; expected 500 x 375"):
        mask_of_image(np.ones((500, 375), bool), placement, (10, 10))
    assert mask_of_boxes(Annotation(one.boxes, (500, 375)), placement, (10, 10)).valid


CSV = """image,x0,y0,x1,y1,label
a.jpg,1,2.5,30,40,cat
"b, c.jpg",0,0,5,5,
a.jpg,-3,2,30,1e2,dog
"""


def test_a_csv_has_a_row_a_box(tmp_path):
    file = tmp_path / "boxes.csv"
    expected = {
        "a.jpg": Annotation((Box(1, 2.5, 30, 40, "cat"), Box(-3, 2, 30, 100, "dog"))),
        "b, c.jpg": Annotation((Box(0, 0, 5, 5, None),)),
    }
    for text in (CSV, "\ufeff" + CSV.replace("\n", "\r\n") + "\r\n"):
        file.write_text(text, encoding="utf-8", newline="")
        assert read_csv(file) == read_boxes(file) == expected
    file.write_text("label,y1,x1,y0,x0,image,more\ncat,40,30,2.5,1,a.jpg,?\n")
    assert read_csv(file) == {"a.jpg": Annotation((Box(1, 2.5, 30, 40, "cat"),))}
    file.write_text("image_id,wnid,W,H,x1,y1,x2,y2\na,n01,50,60,1,2,3,4\n")
    assert read_csv(file) == {"a": Annotation((Box(1, 2, 3, 4, "n01"),), (50, 60))}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"have the columns \[\]; expected image, x0, y0, x1, y1"),
        ("image,x0,y0,x1\n", r"columns \['image', 'x0', 'y0', 'x1'\]; expected image, x0"),
        ("image,x0,y0,x1,y1\na,1,2,3\n", "line 2: 4 values; expected 5"),
        ("image,x0,y0,x1,y1\na,1,2,3,4\nb,1,2,three,4\n", "line 3: x1 is 'three'; expected a number"),
        ("image,x0,y0,x1,y1\na,1,nan,3,4\n", "line 2: y0 is 'nan'; expected a number"),
        ("image,x0,y0,x1,y1\na,1,,3,4\n", "line 2: y0 is ''; expected a number"),
        ("image,x0,y0,x1,y1\n ,1,2,3,4\n", "line 2: column 'image' is empty"),
        (
            "image,x0,y0,x1,y1,W,H\na,1,2,3,4,5,6\na,1,2,3,4,5,7\n",
            r"line 3: image 'a' has size \(5, 7\); expected \(5, 6",
        ),
        ("image,x0,y0,x1,y1,W,H\na,1,2,3,4,5.5,6\n", "line 2: the size is 5.5 x 6; expected whole numbers"),
        ('image,x0,y0,x1,y1\n"a,1,2,3,4\n', "cannot be read: unexpected end of data"),
    ],
)
def test_a_csv_that_is_wrong_is_refused_by_line(tmp_path, text, said):
    file = tmp_path / "boxes.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=said) as refused:
        read_csv(file)
    assert str(file) in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    file = tmp_path / "boxes.csv"
    for read in (read_csv, read_voc, read_mask):
        with pytest.raises(DataError, match=r"boxes\.csv' cannot be read"):
            read(file)
    file.write_bytes(b"image,x0,y0,x1,y1\n\xff\xfe,1,2,3,4\n")
    with pytest.raises(DataError, match=r"boxes\.csv' cannot be read"):
        read_csv(file)
    with pytest.raises(DataError, match=r"neither a folder of \.xml files"):
        read_boxes(tmp_path / "boxes.txt")
    with pytest.raises(DataError, match=r"has no \.xml file"):
        read_boxes(tmp_path)


VOC = """<annotation>
  <folder>val</folder><filename>%s</filename>
  <size><width>500</width><height>375</height><depth>3</depth></size>
  <segmented>0</segmented>
  <scene><object><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></scene>
  <object><name>n01751748</name><pose>Unspecified</pose><difficult>0</difficult>
    <bndbox><xmin>111</xmin><ymin>108</ymin><xmax>441</xmax><ymax>193</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>
  <object><bndbox><ymax>4.5</ymax><xmax>3</xmax><ymin>2</ymin><xmin>1</xmin></bndbox></object>
</annotation>
"""
VOC_BOXES = (Box(111, 108, 441, 193, "n01751748"), Box(1, 2, 3, 4.5, None))


def test_pascal_vocs_xml_is_read_by_file_and_by_folder(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "one.xml").write_text(VOC)
    (tmp_path / "two.XML").write_text("<?xml version='1.0' encoding='utf-8'?><annotation/>")
    (tmp_path / "note.txt").write_text("not one of them")
    assert read_boxes(tmp_path / "val" / "one.xml") == {"one": Annotation(VOC_BOXES, (500, 375))}
    assert read_boxes(tmp_path) == {"two": Annotation(()), "val/one": Annotation(VOC_BOXES, (500, 375))}
    (tmp_path / "two.XML").write_text(VOC.replace("500", "0").replace("375", "0"))
    assert read_voc(tmp_path)["two"].size is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<annotation>", "<annotations>", "cannot be read: mismatched tag"),
        (VOC, "<html></html>", "the root is <html>; expected <annotation>"),
        ("<xmax>441</xmax>", "", "object 1: xmax is missing; expected a number"),
        ("4.5", "wide", "object 2: ymax is 'wide'; expected a number"),
        ("4.5", "9" * 500, "object 2: ymax is '9{80}...'; expected a number"),
        ("<object><bndbox>", "<object/><object><bndbox>", "object 2: no <bndbox>"),
        ("<width>500</width>", "", "width is missing; expected a number"),
        ("<width>500</width>", "<width>-5</width>", "the size is -5 x 375; expected whole numbers"),
    ],
)
def test_xml_that_is_wrong_is_refused_by_object(tmp_path, old, new, said):
    file = tmp_path / "one.xml"
    assert old in VOC
    file.write_text(VOC.replace(old, new))
    with pytest.raises(DataError, match=said) as refused:
        read_voc(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    "document_type",
    [
        '<!DOCTYPE annotation [<!ENTITY name SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY name "&a;&a;&a;&a;">]>',
        '<!DOCTYPE annotation [<!ENTITY % more SYSTEM "more.dtd"> %more;]>',
        "<!DOCTYPE annotation>",
    ],
)
def test_no_entity_of_xml_is_expanded(tmp_path, document_type):
    file = tmp_path / "one.xml"
    file.write_text(document_type + VOC.replace("n01751748", "&name;" if " name " in document_type else "x"))
    with pytest.raises(DataError, match="document type"):
        read_voc(file)


def test_an_xml_file_is_read_no_farther_than_its_limit(tmp_path, monkeypatch):
    file = tmp_path / "one.xml"
    file.write_text(VOC)
    monkeypatch.setattr("parchgrad.evaluation.boxes.LARGEST_XML", len(VOC))
    assert read_voc(file)["one"].boxes == VOC_BOXES
    file.write_text(VOC + " ")
    with pytest.raises(DataError, match=f"more than {len(VOC)} bytes"):
        read_voc(file)


def test_a_mask_is_a_png_of_one_channel(tmp_path):
    file = tmp_path / "mask.png"
    levels = np.array([[0, 1, 255], [7, 0, 1]], np.uint8)
    palette = PIL.Image.fromarray(levels).convert("P")
    palette.putdata(levels.ravel().tolist())
    palette.putpalette([255] * 768)  # colours do not count: 0 is white here too
    for image in (PIL.Image.fromarray(levels), palette, PIL.Image.fromarray(levels.astype(np.uint16) * 256)):
        image.save(file)
        np.testing.assert_array_equal(read_mask(file), levels > 0)
    palette.save(file)
    np.testing.assert_array_equal(read_mask(file, value=1), levels == 1)
    PIL.Image.fromarray(levels > 0).save(file)
    with PIL.Image.open(file) as saved:
        assert saved.mode == "1"
    np.testing.assert_array_equal(read_mask(file), levels > 0)


def test_a_mask_of_colours_or_of_another_format_is_refused(tmp_path):
    file = tmp_path / "mask.png"
    for mode in ("RGB", "RGBA", "LA"):
        PIL.Image.new(mode, (3, 2)).save(file)
        with pytest.raises(DataError, match=f"has mode {mode}; expected one channel"):
            read_mask(file)
    PIL.Image.new("L", (3, 2)).save(file, format="JPEG")
    with pytest.raises(DataError, match="it is no PNG file"):
        read_mask(file)
    PIL.Image.new("L", (30, 20)).save(file, format="PNG")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"mask\.png' cannot be read"):
        read_mask(file)


def test_boxes_are_of_the_image_of_their_name():
    one, two, three = (Annotation((Box(0, 0, n, n),)) for n in (1, 2, 3))
    found = boxes_by_image({"a.jpg": one, "n01/b": two, "c": three}, ["a.jpg", "b.JPEG", "x/y/c.png", "d.jpg"])
    assert found == {"a.jpg": one, "b.JPEG": two, "x/y/c.png": three}
    assert boxes_by_image({"x/a.jpg": one}, ["y/a.jpg"]) == {"y/a.jpg": one}
    # The same last part in two folders: the whole name decides.
    found = boxes_by_image({"n01/b": one, "n02/b": two}, ["n02/b.jpg", "n01/b.jpg"])
    assert found == {"n01/b.jpg": one, "n02/b.jpg": two}
    with pytest.raises(DataError, match=r"'b\.jpg' fits the boxes of 'n01/b' and 'n02/b'"):
        boxes_by_image({"n01/b": one, "n02/b": two}, ["b.jpg"])
    with pytest.raises(DataError, match=r"Boxes of 'b' fit the images 'n01/b\.jpg' and 'n02/b\.jpg'"):
        boxes_by_image({"b": one}, ["n01/b.jpg", "n02/b.jpg"])


@needs_boxes
def test_imagenets_boxes_lie_on_its_photographs():
    """Read by name, of the size the photograph has; on the input the share that they have of the crop."""
    annotations = read_boxes(DATA / "boxes.csv")
    with (DATA / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(len(one.boxes) for one in annotations.values()) == len(rows)
    assert (annotations[rows[0]["image_id"]].boxes[0].label, annotations[rows[0]["image_id"]].size) == (
        rows[0]["wnid"],
        (int(rows[0]["W"]), int(rows[0]["H"])),
    )
    photographs = sorted(DATA.glob("*.JPEG"))[:12]
    found = boxes_by_image(annotations, [path.name for path in photographs])
    assert set(found) == {path.name for path in photographs}
    for path in photographs:
        _, placement = SQUEEZENET.apply(read_image(path))
        mask = mask_of_boxes(found[path.name], placement, (224, 224))
        assert mask.kept + mask.outside + mask.degenerate == len(found[path.name].boxes)
        assert mask.valid == mask.mask.any()
        left, top, right, bottom = placement.crop_box
        y, x = np.mgrid[: placement.original_size[1], : placement.original_size[0]] + 0.5
        crop = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        inside = np.zeros_like(crop)
        for box in found[path.name].boxes:
            inside[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = True
        assert mask.mask.mean() == pytest.approx((inside & crop).sum() / crop.sum(), abs=0.01)
