"""A table's page: numbers against slow loops, photographs against one at a time, HTML against hostile labels."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from parchgrad.errors import OptionError, TableError, UncoveredTargetError
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Placement, Preprocessing
from parchgrad.sources import ImageFolder
from parchgrad.table_page import figures, photographs, write_page
from parchgrad.table_page.heat_map import heat_map
from parchgrad.table_page.history import history, in_words
from parchgrad.table_page.page import pictured_channels, pictured_layers
from parchgrad.tables import LayerTable, SelectionTable
from tests.oracles import selection
from tests.oracles.tolerance import assert_close

HOSTILE = (
    "<script>alert(1)</script>",
    "\"quoted\" & 'single' $\\frac$ {{ 7 * 7 }}",
    "a long name " * 16 + "end of 200 char",
    "</script><img src=x onerror=alert(2)>",
    "鯉 \u2028 plain",
)


def layer_table(classes, channels, seed):
    """Ranks that follow made-up p-values; channel 1 dead, every third channel normal."""
    generator = np.random.default_rng(seed)
    log_p = -generator.exponential(4.0, (classes, channels))
    rank = np.argsort(np.argsort(log_p, axis=1), axis=1).astype(np.int16)
    std = generator.uniform(0.5, 1, channels)
    std[1] = 0
    normality = np.where(np.arange(channels) % 3 == 0, 0.5, 0.001)
    mean = generator.uniform(0, 1, channels)
    tensors = [torch.from_numpy(values) for values in (log_p, rank, mean, std, normality)]
    return LayerTable(*tensors)


def made_table(labels=HOSTILE, widths=(12, 30, 17), covered=None, **fields):
    covered = tuple(range(len(labels))) if covered is None else covered
    layers = {f"layer{i}.<conv>": layer_table(len(covered), width, i) for i, width in enumerate(widths)}
    given = {"name": "made", "model_name": "net", "weights_sha256": "0" * 64, "built": {"by": "<i>tests</i>"}} | fields
    return SelectionTable(
        labels=tuple(labels), classes=covered, layers=layers, images_per_class=(20,) * len(covered), **given
    )


def selected_by_loops(layer, quantile, normality_filter):
    """One set of channels a class."""
    count = max(1, int(quantile * layer.channels + 1e-9))
    return [
        {
            c
            for c in range(layer.channels)
            if int(row[c]) < count and not (normality_filter and float(layer.normality_p[c]) >= 0.05)
        }
        for row in layer.rank
    ]


# --- numbers ---


@pytest.mark.parametrize("normality_filter", [False, True])
@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 8])
def test_owned_shared_common_and_unused_channels(classes, quantile, normality_filter):
    layer = layer_table(classes, 30, 0)
    sets = selected_by_loops(layer, quantile, normality_filter)
    times = [sum(c in chosen for chosen in sets) for c in range(30)]
    mask = figures.selected_channels(layer, quantile, normality_filter)
    assert [set(np.flatnonzero(row)) for row in mask] == sets
    found = figures.ownership(layer, mask, quantile, normality_filter)
    assert found.owned == sum(t == 1 for t in times)
    assert found.shared == sum(2 <= t <= classes / 2 for t in times)
    assert found.common == sum(t >= 2 and t > classes / 2 for t in times)
    assert found.unused == sum(t == 0 for t in times)
    assert found.owned + found.shared + found.common + found.unused == found.channels == 30
    assert found.dead == 1
    assert found.owned_by_class.tolist() == [sum(times[c] == 1 for c in chosen) for chosen in sets]
    assert found.classes_by_channel.tolist() == times
    ordered = sorted(times)
    assert found.quarters == [ordered[0], ordered[7], ordered[14], ordered[22], ordered[29]]
    allowed = [c for c in range(30) if not normality_filter or c % 3]
    assert found.selectable == len(allowed)


@pytest.mark.parametrize(("classes", "width", "count"), [(1, 5, 2), (2, 4, 1), (3, 4, 2), (4, 3, 2)])
def test_chance_is_the_mean_over_all_ways_to_choose(classes, width, count):
    """Every combination of the classes' choices, of which the filter lets all but channel 0 through."""
    layer = layer_table(classes, width, 0)
    layer.normality_p[:] = 0.001
    layer.normality_p[0] = 0.5
    choices = list(itertools.combinations(range(width), count))
    owned, shares, times = [], [], []
    for chosen in itertools.product(choices, repeat=classes):
        sets = [set(one) - {0} for one in chosen]
        owned.append(sum(sum(c in one for one in sets) == 1 for c in range(width)))
        times.append(sum(1 in one for one in sets))
        if classes > 1:
            shares.append(len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1))
    mask = figures.selected_channels(layer, count / width, True)
    found = figures.ownership(layer, mask, count / width, True)
    assert_close(found.chance_owned, np.mean(owned))
    if classes > 1:
        assert_close(found.chance, np.mean(shares))
    assert list(found.chance_quarters) == np.quantile(times, [0.25, 0.75], method="inverted_cdf").tolist()


def test_jaccard_and_the_most_similar_pairs():
    layers = [layer_table(6, width, width) for width in (12, 30, 17)]
    masks = [figures.selected_channels(layer, 0.3, False) for layer in layers]
    common = sum(figures.in_common(mask) for mask in masks)
    found = figures.jaccard(common)
    sets = [
        {(i, c) for i, layer in enumerate(layers) for c in selected_by_loops(layer, 0.3, False)[k]} for k in range(6)
    ]
    expected = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    assert_close(found, expected)
    pairs = sorted(
        ((expected[a][b], a, b) for a in range(6) for b in range(a + 1, 6)), key=lambda p: (-p[0], p[1], p[2])
    )
    for pair, (value, a, b) in zip(figures.most_similar(found, common, 4), pairs[:4], strict=True):
        assert (pair.first, pair.second, pair.in_common) == (a, b, len(sets[a] & sets[b]))
        assert_close(pair.jaccard, value)
    assert_close(figures.mean_of_pairs(found), np.mean([p[0] for p in pairs]))


def test_jaccard_of_classes_that_select_nothing_is_zero():
    assert figures.jaccard(figures.in_common(np.zeros((2, 5), bool))).tolist() == [[0, 0], [0, 0]]


def test_chance_is_what_random_tables_give():
    generator = np.random.default_rng(0)
    masks, owners = [], []
    for width, quantile in ((40, 0.1), (100, 0.25)):
        layer = layer_table(400, width, 0)
        layer.rank[:] = torch.from_numpy(np.argsort(generator.random((400, width)), axis=1))
        masks.append(figures.selected_channels(layer, quantile, False))
        owners.append(figures.ownership(layer, masks[-1], quantile, False))
    for mask, owner in zip(masks, owners, strict=True):
        mean = figures.mean_of_pairs(figures.jaccard(figures.in_common(mask)))
        assert abs(mean - owner.chance) < 0.001
    found = figures.jaccard(sum(figures.in_common(mask) for mask in masks))
    assert abs(figures.mean_of_pairs(found) - figures.chance_jaccard(owners)) < 0.003


def test_like_classes_stand_side_by_side():
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    similarity = np.where(group[:, None] == group, 0.8, 0.1) + np.eye(9) * 0.2
    order = figures.similarity_order(similarity)
    assert sorted(order) == list(range(9))
    assert (np.diff(group[order]) != 0).sum() == 2


@pytest.mark.parametrize("turned", [True, False])
def test_blocks_are_the_groups_in_the_order_of_the_map(turned, monkeypatch):
    monkeypatch.setattr(figures, "OPTIMAL_ORDER_CLASSES", 400 if turned else 1)
    generator = np.random.default_rng(1)
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 3])
    similarity = np.where(group[:, None] == group, 0.8, 0.1) + generator.random((10, 10)) * 0.05
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1)
    order = figures.similarity_order(similarity)
    found = figures.blocks(similarity, order, 4)
    assert sorted(sorted(block.rows) for block in found) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]], "class 9 is alone"
    assert [block.start for block in found] == sorted(block.start for block in found)
    for block in found:
        assert order[block.start : block.start + 3].tolist() == block.rows
        a, b, c = block.rows
        assert_close(block.mean, (similarity[a, b] + similarity[a, c] + similarity[b, c]) / 3)


@pytest.mark.parametrize("classes", [1, 2])
def test_one_and_two_classes_have_an_order(classes):
    assert figures.similarity_order(np.eye(classes)).tolist() == list(range(classes))


@pytest.mark.parametrize("count", [1, 4, 100])
def test_strongest_channels_of_a_layer(count):
    layer = layer_table(3, 12, 0)
    expected = [sorted(range(12), key=lambda c, row=row: float(row[c]))[:count] for row in layer.log_p]
    assert figures.strongest(layer, count).tolist() == expected


def test_pictured_channels_come_from_all_depths():
    table = made_table(widths=(12, 30, 17, 9, 11, 8, 13))
    names = list(table.layers)

    def ranked(name, rank):
        layer = table.layers[name]
        return min(c for c in range(layer.channels) if int(layer.rank[2, c]) == rank)

    # The last layer's p-values are by far the smallest, and must not take all places.
    table.layers[names[-1]].log_p[2] -= 1000
    assert pictured_channels(table, names, 2, 3) == [(names[i], ranked(names[i], 0)) for i in (0, 3, 6)]
    assert pictured_channels(table, names, 2, 7) == [(name, ranked(name, 0)) for name in names]
    assert pictured_channels(table, names, 2, 1) == [(names[0], ranked(names[0], 0))]
    two = [names[1], names[4]]
    assert pictured_channels(table, two, 2, 4) == [(name, ranked(name, rank)) for name in two for rank in (0, 1)]
    table.layers[names[3]].log_p[2] = np.nan
    assert pictured_channels(table, names, 2, 3) == [(names[i], ranked(names[i], 0)) for i in (0, 6)]


@pytest.mark.parametrize(
    ("widths", "shown", "expected"),
    [
        ((12, 30, 5), (0, 1, 2), (0, 1)),
        ((12, 5, 30), (0, 1, 2), (0, 1, 2)),
        ((12, 30, 5), (0, 1), (0, 1)),
        ((12, 30, 5), (2,), (2,)),
        ((12, 5, 30), (0, 1), (0, 1)),
        ((12, 30, 3), (0, 1, 2), (0, 1, 2)),
    ],
    ids=["the logits", "as wide but not last", "not shown", "nothing else", "last of those shown", "covered classes"],
)
def test_the_layer_of_class_scores_is_not_pictured(widths, shown, expected):
    table = made_table(widths=widths, covered=(0, 2, 3))
    names = list(table.layers)
    assert pictured_layers(table, [names[i] for i in shown]) == [names[i] for i in expected]


def test_p_value_histogram():
    layer = layer_table(4, 30, 0)
    layer.log_p[0, 0], layer.log_p[0, 1] = 0.0, -np.inf
    layer.log_p[3] = np.nan
    found = figures.p_values(layer, 20)
    p = [np.exp(float(v)) for v in layer.log_p[:3].flatten()]
    counts = [sum(i / 20 <= v < (i + 1) / 20 or (i == 19 and v == 1) for v in p) for i in range(20)]
    assert_close(found.density, [c * 20 / 90 for c in counts])
    assert_close(found.below_001, sum(v < 0.001 for v in p) / 90)
    assert (found.tested, found.untested) == (90, 30)


def test_a_layer_without_p_values_has_an_empty_histogram():
    layer = layer_table(2, 6, 0)
    layer.log_p[:] = np.nan
    assert figures.p_values(layer, 4).tested == 0


# --- photographs ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Channel 0 of `first` is the red of each pixel; the others are as drawn."""
    torch.manual_seed(0)
    state = build_network("tests.parchgrad.factories:small", 5).state_dict()
    state["first.weight"][0] = 0
    state["first.weight"][0, :, 1, 1] = torch.tensor([1.0, -1.0, -1.0])
    state["first.bias"][0] = 0
    state["first.bias"][3] = -50.0  # nothing excites it
    # What excites a channel least before its normalisation does so most after it.
    state["norm.weight"] *= -1
    state["norm.bias"] += 1
    folder = add_model(
        "net", architecture="tests.parchgrad.factories:small", weights=state,
        labels=[f"id{i}\t{label}" for i, label in enumerate(("cat", "dog", "<b>tree</b>", "bus", "sea"))],
        preprocessing=Preprocessing(size=(40, 40), resize=44), models_dir=tmp_path_factory.mktemp("models"),
    )  # fmt: skip
    return load_model(folder)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """Grey noise of two shapes; image 5 of class `bus` has a red square low on the right. One file is broken."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for folder in ("cat", "2", "bus"):
        (root / folder).mkdir()
        for i in range(7):
            height, width = (60, 90) if i % 2 else (50, 50)
            grey = generator.integers(60, 140, (height, width, 1))
            pixels = np.clip(grey + generator.integers(-30, 30, (height, width, 3)), 0, 255).astype(np.uint8)
            if folder == "bus" and i == 5:
                pixels[36:48, 52:64] = (250, 0, 0)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    (root / "cat" / "broken.png").write_bytes(b"no image")
    return ImageFolder.scan(root, model)


@pytest.fixture
def table(model):
    layers = {"first": layer_table(3, 6, 0), "second": layer_table(3, 6, 1)}
    layers["first"].log_p[2, 0], layers["first"].rank[2] = -80.0, torch.tensor([0, 1, 2, 3, 4, 5]).short()
    return SelectionTable(
        name="net", model_name=model.name, weights_sha256=model.weights_sha256, labels=model.labels,
        classes=(0, 2, 3), layers=layers, images_per_class=(8, 7, 7),
    )  # fmt: skip


def features_one_by_one(model, source, point="convolution"):
    """{layer: {image: features}}, each image alone."""
    found = {"first": {}, "second": {}}
    net = model.module
    with torch.no_grad():
        for i in range(len(source)):
            if "broken" in source.name(i):
                continue
            image = model.preprocessing.apply(Image.open(source.path(i)).convert("RGB"))[0][None]
            first, after = net.first(image), torch.relu(net.norm(net.first(image)))
            found["first"][i] = selection.gap_feature((first if point == "convolution" else after)[0])
            found["second"][i] = selection.gap_feature(net.second(after)[0])
    return found


@pytest.mark.parametrize("point", ["convolution", "activation"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_most_exciting_photographs_are_those_a_loop_finds(model, source, batch_size, point):
    channels = {"first": [0, 2, 3, 2], "second": [0, 5]}
    seen = []
    found = photographs.most_exciting(
        model, source, channels, 3, point=point, batch_size=batch_size, progress=lambda *n: seen.append(n)
    )
    features = features_one_by_one(model, source, point)
    for (layer, channel), best in found.by_channel.items():
        by_image = {i: float(values[channel]) for i, values in features[layer].items()}
        expected = [i for i in sorted(by_image, key=lambda i, f=by_image: (-f[i], i)) if by_image[i] > 0][:3]
        assert [e.index for e in best] == expected, (layer, channel)
        assert_close([e.feature for e in best], [by_image[i] for i in expected], relative=1e-5)
    if point == "convolution":
        assert found.by_channel["first", 3] == [], "nothing excites a dead channel"
    assert (found.images, len(found.unreadable)) == (21, 1)
    assert "broken" in str(found.unreadable[0])
    assert seen[-1] == (22, 22)


def test_the_crop_shows_what_excites_the_channel(model, source):
    best = photographs.most_exciting(model, source, {"first": [0]}, 2).by_channel["first", 0][0]
    assert source.name(best.index).endswith("bus/5.png")
    picture = photographs.picture(source, model.preprocessing, best)
    crop, photo = (
        Image.open(io.BytesIO(base64.b64decode(data.removeprefix("data:image/jpeg;base64,"))))
        for data in (picture.crop, picture.photo)
    )
    red = np.asarray(crop, float)
    assert (red[..., 0] > red[..., 1] + 100).mean() > 0.6
    # The photograph is whole, its cut edges dark: 90 x 60 pixels, of which the middle was seen.
    assert abs(photo.width / photo.height - 1.5) < 0.02
    values = np.asarray(photo.convert("L"), float)
    assert values[:, :10].mean() < 0.7 * values[:, 80:160].mean()


@pytest.mark.parametrize(
    ("spots", "inside", "outside"),
    [
        pytest.param({(2, 5): 3.0}, [(0.69, 0.31)], [(0.2, 0.8)], id="one spot"),
        pytest.param({(0, 0): 3.0, (7, 7): 2.9}, [(0.06, 0.06)], [(0.94, 0.94)], id="the strongest of two"),
        pytest.param({(3, 3): 3.0, (3, 4): 2.0, (3, 5): 2.5}, [(0.44, 0.44), (0.69, 0.44)], [], id="connected"),
        pytest.param(
            {(3, 2): 3.0} | {(3, x): 1.0 for x in range(3, 8)}, [(0.31, 0.44)], [(0.8, 0.44)], id="above half only"
        ),
    ],
)
def test_the_box_encloses_the_strongest_region(spots, inside, outside):
    activation = np.full((8, 8), -1.0)
    for place, value in spots.items():
        activation[place] = value
    left, top, right, bottom = photographs.exciting_box(activation)
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    assert min(right - left, bottom - top) >= 0.2 - 1e-9
    for points, expected in ((inside, True), (outside, False)):
        for x, y in points:
            assert (left < x < right and top < y < bottom) is expected


@pytest.mark.parametrize("activation", [np.ones((5, 7)), np.ones((1, 1)), np.ones(4)], ids=["even", "1x1", "no map"])
def test_the_box_of_an_even_map_is_the_whole_input(activation):
    assert photographs.exciting_box(activation) == (0, 0, 1, 1)


def test_a_box_lies_on_the_photograph_where_the_input_was_cut_from():
    placement = Placement(original_size=(90, 60), crop_box=(15.0, 0.0, 75.0, 60.0))
    assert photographs._on_photo((0.5, 0.0, 1.0, 0.25), placement) == (45, 0, 75, 15)


# --- the page ---

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.texts, self.scripts, self.names = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(table, path, **options):
    write_page(table, path, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_hostile_labels_are_text(tmp_path):
    page = page_of(made_table(), tmp_path / "page.html")
    raw = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in raw
    assert "<img src=x" not in raw
    assert page.names.count("script") == 2
    assert [entry["label"] for entry in page.data["classes"]] == list(HOSTILE)
    for label in HOSTILE:
        assert label in page.texts, "whole in the list of pairs"
    assert "<i>tests</i>" in page.text
    assert "layer0.<conv>" in page.text
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def assert_self_contained(path):
    raw = path.read_text(encoding="utf-8")
    page = Page(raw)
    for tag, name, value in page.attributes:
        if name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
            assert value.startswith(("#", "data:image/")), (tag, name, value[:80])
    assert "link" not in page.names
    style = re.search(r"<style>(.*?)</style>", raw, re.DOTALL).group(1)
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search(r"fetch|XMLHttp|import|innerHTML|eval|https?:", page.scripts[1])
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policy = next(value for tag, _, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")


@pytest.mark.parametrize("classes", [1, 2, 5, 18, 70])
def test_the_page_asks_nothing_of_the_network(classes, tmp_path):
    labels = [f"{HOSTILE[i % 5]} {i}" for i in range(classes)]
    write_page(made_table(labels), tmp_path / "page.html")
    assert_self_contained(tmp_path / "page.html")


def test_the_page_with_pictures(model, source, table, tmp_path):
    page = page_of(table, tmp_path / "page.html", model=model, images=source, channels_per_class=4, crops_per_channel=2)
    assert_self_contained(tmp_path / "page.html")
    assert page.attributes.count(("section", "class", "pictures")) == 3
    assert "bus/5.png" in [value for _, name, value in page.attributes if name == "title"]
    assert "1 could not be read" in page.text
    assert page.data["classes"][1]["id"] == "id2"
    assert "<b>tree</b>" in page.texts
    photos = [v for t, n, v in page.attributes if (t, n) == ("img", "src") and v.startswith("data:image/jpeg")]
    assert 0 < len(photos) <= 3 * 4 * 2 * 2
    assert max(len(v) for v in photos) < 40_000


def test_what_is_said_of_each_photograph(model, source, table, tmp_path):
    page = page_of(table, tmp_path / "page.html", model=model, images=source, quantile=0.5, crops_per_channel=3)
    features = features_one_by_one(model, source)
    said = re.sub(r"\s+", " ", page.text)
    names = list(table.layers)
    selected = {name: selected_by_loops(layer, 0.5, False) for name, layer in table.layers.items()}
    facts, heights = [], []
    for row, index in enumerate(table.classes):
        for name, channel in pictured_channels(table, names, row, 8):
            by_image = {i: float(values[channel]) for i, values in features[name].items() if values[channel] > 0}
            best = sorted(by_image, key=lambda i, f=by_image: -f[i])[:3]
            times = sum(channel in chosen for chosen in selected[name])
            own = sum(int(source.targets[i]) == index for i in best)
            facts.append((f"{name}, channel {channel}", str(times), str(own), str(len(best))))
            mean, std = (float(values[channel]) for values in (table.layers[name].mean, table.layers[name].std))
            if std > 0:
                heights += [f"{(by_image[i] - mean) / std:.1f}" for i in best]
    heading = r"(\w+, channel \d+) p = .*?, selected by (\d+) class(?:es)?; (\d+) of (\d+) photographs are of the class"
    assert re.findall(heading, said) == facts
    assert re.findall(r"(-?[\d.]+) sd above mean", said) == heights


def test_only_named_classes_get_pictures(model, source, table, tmp_path):
    page = page_of(table, tmp_path / "page.html", model=model, images=source, picture_classes=[3])
    assert [v for _, n, v in page.attributes if n == "data-row"] == ["2"]


def test_of_many_classes_none_gets_pictures_unasked(model, source, tmp_path):
    labels = tuple(str(i) for i in range(30))
    table = made_table(labels)
    page = page_of(table, tmp_path / "page.html")
    assert page.attributes.count(("section", "class", "pictures")) == 0
    assert "No images were given" in page.text


def test_the_data_behind_choosing_a_class(tmp_path):
    table = made_table(labels=tuple("abcdefg"), covered=(1, 3, 6))
    data = page_of(table, tmp_path / "page.html", quantile=0.25, channels_per_class=5).data
    assert data["layers"] == list(table.layers)
    assert [entry["index"] for entry in data["classes"]] == [1, 3, 6]
    for row, entry in enumerate(data["classes"]):
        for position, layer in enumerate(table.layers.values()):
            sets = selected_by_loops(layer, 0.25, False)
            best = sorted(range(layer.channels), key=lambda c, layer=layer, row=row: float(layer.log_p[row, c]))[:5]
            expected = []
            for c in best:
                log10 = float(layer.log_p[row, c]) / np.log(10)
                log10 = round(log10) if log10 <= -3 else round(log10, 3)
                expected += [c, log10, sum(c in chosen for chosen in sets), int(c in sets[row])]
            assert entry["strongest"][position] == expected
            alone = [c for c in sets[row] if sum(c in chosen for chosen in sets) == 1]
            assert entry["owned"][position] == len(alone)


def test_p_of_zero_and_a_missing_p_are_told_apart(tmp_path):
    table = made_table()
    layer = table.layers["layer0.<conv>"]
    layer.log_p[0][layer.rank[0] == 0], layer.log_p[1] = -np.inf, np.nan
    data = page_of(table, tmp_path / "page.html").data
    assert data["classes"][0]["strongest"][0][1] == "0"
    assert data["classes"][1]["strongest"][0][1::4] == [None] * 8


def test_a_table_of_activations_shows_whole_inputs(model, source, table, tmp_path):
    table = dataclasses.replace(table, statistics_point="activation")
    page = page_of(table, tmp_path / "page.html", model=model, images=source)
    assert "the crop is all that the network sees" in page.text
    assert "The yellow frame" not in page.text


def test_layers_and_quantile_follow_the_defaults_and_the_call(tmp_path):
    table = made_table().with_defaults(layers=("layer1*", "layer2*"), quantile={"layer1*": 0.1, "layer2*": 0.5})
    page = page_of(table, tmp_path / "page.html")
    assert page.data["layers"] == ["layer1.<conv>", "layer2.<conv>"]
    assert "0.1 to 0.5, by layer" in page.text
    assert "leave them out: layer0.<conv>." in page.text
    page = page_of(table, tmp_path / "page.html", layers=["*"], quantile=0.2)
    assert len(page.data["layers"]) == 3


def test_a_table_without_meaning_is_called_so(tmp_path):
    network = build_network("tests.parchgrad.factories:small", 5, {"width": 200})
    assert "tells next to nothing" in page_of(SelectionTable.random(network, 5, 0), tmp_path / "page.html").text
    assert "tells next to nothing" not in page_of(made_table(), tmp_path / "page.html").text


def test_untested_classes_are_told(model, source, table, tmp_path):
    for layer in table.layers.values():
        layer.log_p[1] = np.nan
    page = page_of(table, tmp_path / "page.html", model=model, images=source)
    assert "12 of the table’s values are missing" in page.text
    assert "could not be tested" in page.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels_per_class": 0}, OptionError, "'channels_per_class' is 0; allowed: an integer >= 1"),
        ({"crops_per_channel": 0}, OptionError, "'crops_per_channel' is 0; allowed: an integer >= 1"),
        ({"picture_classes": [9]}, OptionError, "'picture_classes' is 9; allowed: class indices in 0..4"),
        ({"picture_classes": [1]}, UncoveredTargetError, "has no row for class 1 \\(dog\\)"),
        ({"quantile": {"first": 0.1}}, OptionError, "'second' has none"),
        ({"quantile": 0.0}, OptionError, "'quantile' is 0.0"),
        ({"layers": ["third"]}, OptionError, "'layers' is 'third'"),
    ],
)
def test_wrong_options_are_refused_before_any_work(model, table, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        write_page(table, tmp_path / "page.html", model=model, **options)
    assert list(tmp_path.iterdir()) == []


def test_images_need_the_model_and_the_table_its_own(model, source, table, tmp_path):
    with pytest.raises(OptionError, match="the table's model, where images are given"):
        write_page(table, tmp_path / "page.html", images=source)
    with pytest.raises(TableError, match="weights_sha256 is '0"):
        write_page(made_table(), tmp_path / "page.html", model=model)


@pytest.mark.parametrize("classes", [2, 5, 61])
def test_the_heat_map_is_as_bright_as_classes_are_alike(classes):
    generator = np.random.default_rng(0)
    similarity = generator.random((classes, classes))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1)
    drawn = heat_map([str(i) for i in range(classes)], similarity)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.picture.split(",")[1]))).convert("RGB"), int)
    assert pixels.shape == (classes, classes, 3)
    assert (pixels[np.eye(classes, dtype=bool)] == 255).all()
    others = ~np.eye(classes, dtype=bool)
    brightness = pixels.sum(axis=2)[others][np.argsort(similarity[others])]
    assert (np.diff(brightness) >= -3).all(), "but for the rounding of colours"
    assert (drawn.low, drawn.high) == (similarity[others].min(), similarity[others].max())
    assert (drawn.cells is None) == (classes > 60)
    if drawn.cells:
        colours = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in line] for line in pixels.tolist()]
        assert [[cell[1] for cell in line] for line in drawn.cells] == colours


def table_rows(page):
    """Texts of the page's cells on one line: enough to find a row's numbers."""
    return re.sub(r"\s+", " ", page.text)


def test_counts_stand_beside_what_chance_gives(tmp_path):
    table = made_table()
    said = table_rows(page_of(table, tmp_path / "page.html", quantile=0.2))
    for layer in table.layers.values():
        sets, count = selected_by_loops(layer, 0.2, False), int(0.2 * layer.channels + 1e-9)
        owned = sum(sum(c in chosen for chosen in sets) == 1 for c in range(layer.channels))
        share = count / layer.channels
        assert f"{layer.channels} {count} {owned} ({layer.channels * 5 * share * (1 - share) ** 4:.1f})" in said
        pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
        ways = [math.comb(count, t) * math.comb(layer.channels - count, count - t) for t in range(count + 1)]
        chance = sum(w * t / (2 * count - t) for t, w in enumerate(ways)) / sum(ways)
        assert f"{np.mean(pairs):.3f} ({chance:.3f})" in said


def test_layers_whose_channels_are_all_shared_show_by_how_many_classes(tmp_path):
    table = made_table([f"class {i}" for i in range(70)])
    page = page_of(table, tmp_path / "page.html", quantile=0.3, channels_per_class=2)
    said = table_rows(page)
    assert "almost every channel is shared" in said
    for layer in table.layers.values():
        sets = selected_by_loops(layer, 0.3, False)
        times = sorted(sum(c in chosen for chosen in sets) for c in range(layer.channels))
        least, first, median, third, most = (times[max(0, -(-len(times) * i // 4) - 1)] for i in range(5))
        assert re.search(rf" {least} {first}–{third} \(\d+–\d+\) {median} {most} 0 1 ", said)
    assert "almost every channel" not in page_of(made_table(), tmp_path / "page.html").text


def test_a_map_without_names_can_be_read(tmp_path):
    labels = [f"class {i}" for i in range(70)]
    page = page_of(made_table(labels), tmp_path / "page.html")
    assert sorted(page.data["order"]) == list(range(70))
    assert [v for _, n, v in page.attributes if n == "data-classes"] == ["70"] * 4
    assert "Its blocks" in page.text
    listed = re.findall(r"class \d+(?=[;\n])", page.text[page.text.index("Its blocks") : page.text.index("By depth")])
    assert set(listed) <= set(labels)


def test_fewer_channels_than_asked_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("parchgrad.table_page.page.LISTED_CHANNELS", 45)
    assert "3 of 8 asked, to keep the page small" in page_of(made_table(), tmp_path / "page.html").text
    assert "to keep the page small" not in page_of(made_table(), tmp_path / "page.html", channels_per_class=3).text


def test_the_layer_left_out_of_the_pictures_is_named(model, source, table, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("parchgrad.table_page.page.pictured_layers", lambda table, layers: ["first"])
        page = page_of(table, tmp_path / "page.html", model=model, images=source, channels_per_class=3)
    assert "Left out: second, the last layer" in page.text
    assert not re.search(r"second, channel", page.text)
    page = page_of(table, tmp_path / "page.html", model=model, images=source, channels_per_class=3)
    assert "Left out: second" not in page.text


def test_whom_the_classes_are_compared_with(tmp_path):
    some = table_rows(page_of(made_table(labels=tuple("abcdefg"), covered=(1, 3, 6)), tmp_path / "page.html"))
    assert "the table’s other 2 classes" in some
    assert "the 4 classes of the model" in some
    assert "other 4 classes and with nothing else." in table_rows(page_of(made_table(), tmp_path / "page.html"))


def test_how_a_table_was_built_is_for_people():
    bad = [[f"{i}.png", "is no image"] for i in range(7)]
    sources = [{"root": "train", "images": 12_000, "fingerprint": "ab"}, {"root": "more", "images": 3}]
    found = history(
        {
            "data": sources,
            "bad_images": bad,
            "layer_patterns": ["a*", "b*"],
            "normality": {"images": 1000, "seed": 0},
            "new_thing": {"one": [1, [2, 3]], "two": None},
            "long": "x" * 500,
        }
    )
    assert dict(found) == {
        "images from": ["train: 12,000 images (fingerprint ab)", "more: 3 images"],
        "unreadable images left out": ["7", *(f"{i}.png: is no image" for i in range(5)), "and 2 more"],
        "layers chosen by": ["a*, b*"],
        "normality test": ["1,000 images, drawn with seed 0"],
        "new thing": ["one: 1, [2, 3]", "two: none"],
        "long": ["x" * 400 + " … (500 characters)"],
    }
    assert in_words({"layers": ["a*", "b*"], "normality_filter": False}) == "layers a*, b*; normality filter no"
    nothing = history({"data": "folder", "bad_images": [], "normality": None})
    assert nothing == [
        ("images from", ["folder"]),
        ("unreadable images left out", ["none"]),
        ("normality test", ["none"]),
    ]
