"""Class graphs: strength, influence and walks against slow oracles; built in one go or in pieces; asked and refused."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from parchgrad import activation_histograms
from parchgrad.build import build_table
from parchgrad.class_graph import build as build_module
from parchgrad.class_graph import load
from parchgrad.class_graph.build import Options, build, unfinished
from parchgrad.class_graph.influence import InfluenceNetwork
from parchgrad.class_graph.layout import positions, similarity
from parchgrad.class_graph.selected import selected
from parchgrad.class_graph.walks import DAMPING, Edges, most_walked, pagerank
from parchgrad.defaults import Defaults
from parchgrad.errors import (
    ClassGraphError,
    DataError,
    InUseError,
    NoClassGraphError,
    OptionError,
    TableError,
    UncoveredTargetError,
)
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing, decode_image
from parchgrad.sources import open_source
from parchgrad.store import write_table
from parchgrad.tables import SelectionTable, load_table
from tests.oracles.maps import CONVOLUTIONS
from tests.parchgrad.networks import (
    Branching,
    Hooked,
    InPlaceOnBranch,
    OnePosition,
    Parametrized,
    ReusedConvolution,
    Transposed,
    batch,
    table_for,
)
from tests.parchgrad.networks import build as build_small

LABELS = ["cat", "dog", "tree", "bus"]
FACTORY = "tests.parchgrad.factories:small"
LAYERS = ("first", "second")
IMAGES = 5  # a class
ROOT = Path(__file__).parents[2]


# Influence


def influence_by_differences(network, images, layers):
    """{(layer, later layer): (C, C)}: what each channel's activity, a millionth more of it, does to later features.

    Every layer's output is held at what it is, but for the one channel; features are read before they are held.
    """
    outputs, features, held = {}, {}, {}

    def hook(name):
        def replace(module, args, output):
            features[name] = output.detach().clamp(min=0).flatten(2).mean(2).sum(0)
            outputs[name] = output.detach().clone()
            return held.get(name, output).clone()

        return replace

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    with torch.no_grad():
        network(images.clone())
        given = dict(outputs)
        found = {}
        for first in layers:
            for channel in range(given[first].shape[1]):
                both = []
                for step in (1e-6, -1e-6):
                    held = {name: output.clone() for name, output in given.items()}
                    held[first][:, channel] += step * held[first][:, channel].clamp(min=0)
                    network(images.clone())
                    both.append(dict(features))
                for second in layers:
                    if second != first:
                        rows = found.setdefault((first, second), [])
                        rows.append((both[0][second] - both[1][second]) / 2e-6)
    for handle in handles:
        handle.remove()
    return {pair: torch.stack(rows) for pair, rows in found.items()}


@pytest.mark.parametrize("network", [Branching, InPlaceOnBranch, OnePosition, Hooked, Parametrized, Transposed])
def test_influence_is_what_a_little_more_activity_does(network):
    model, images = build_small(network), batch(images=2, size=13)
    layers = tuple(name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS))
    expected = influence_by_differences(model, images, layers)
    # Not in order, and not all of them.
    chosen = {name: torch.arange(model.get_submodule(name).out_channels).flip(0)[1::2] for name in layers}
    found, outputs = InfluenceNetwork(model, layers).measure(images, chosen)
    assert found.images == 2
    assert set(found.contributions) == {pair for pair, matrix in expected.items() if matrix.any()}
    for (first, second), contribution in found.contributions.items():
        matrix = expected[first, second][chosen[first]][:, chosen[second]]
        torch.testing.assert_close(contribution, matrix, rtol=1e-5, atol=1e-7)
    for name in layers:
        features = outputs[name].clamp(min=0).flatten(2).mean(2).sum(0)
        torch.testing.assert_close(found.features[name], features[chosen[name]])


def test_in_a_chain_without_biases_the_influences_are_shares():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip
    network = InfluenceNetwork(model, ("0", "3"))
    everything = {"0": torch.arange(6), "3": torch.arange(8)}
    found, _ = network.measure(batch(images=2), everything)
    found.add(network.measure(batch(images=1, seed=1), everything)[0])
    shares = found.weights()["0", "3"].sum(0)
    assert found.images == 3
    torch.testing.assert_close(shares, (found.features["3"] > 0).double())


def test_a_layer_that_runs_twice_has_no_influence_of_its_own():
    model = build_small(ReusedConvolution)
    chosen = {"stem": torch.arange(8), "right": torch.arange(8)}
    with pytest.raises(Exception, match="'right' runs twice"):
        InfluenceNetwork(model, tuple(chosen)).measure(batch(), chosen)


# Selection and strength


@pytest.mark.parametrize("filtered", [False, True])
def test_selected_channels_and_their_strength(filtered):
    table = table_for(build_small(), quantile=0.5, layers=("l*", "join"), normality_filter=filtered)
    found = selected(table)
    assert list(found.layers) == ["left", "join"]
    strength = found.strength()
    for row in range(len(table.classes)):
        channels = found.of_class(row)
        for name, here in found.slots.items():
            layer = table.layers[name]
            best = sorted(range(layer.channels), key=lambda c, of=layer: int(of.rank[row, c]))[: layer.channels // 2]
            expected = [c for c in best if not filtered or layer.normality_p[c] < 0.05]
            assert channels[name].tolist() == expected
            log_p = [float(layer.log_p[row, c]) for c in expected]
            strongest = [(value / min(log_p)) ** 0.5 for value in log_p]
            padding = [0.0] * (layer.channels // 2 - len(expected))
            np.testing.assert_allclose(strength[row, here], strongest + padding, rtol=1e-6)
    if filtered:
        assert (found.channel == -1).any()


# Walks and layout


def walk_graph():
    generator = np.random.default_rng(0)
    layer = np.array([0] * 4 + [1] * 5 + [2] * 3)
    pairs = [(i, j) for i in range(12) for j in range(12) if layer[j] == layer[i] + 1 and generator.random() < 0.7]
    source, target = np.array(pairs).T
    return layer, generator.random(12), Edges(source, target, generator.random(len(pairs)))


def test_pagerank_is_the_dense_power_iteration():
    _, strength, edges = walk_graph()
    there = np.ones(12, bool)
    there[5] = False
    edges = edges.take((edges.source != 5) & (edges.target != 5))
    strength[5] = 0.0
    move = np.zeros((12, 12))
    move[edges.source, edges.target] = edges.weight
    begin = strength / strength.sum()
    for node in range(12):
        move[node] = move[node] / move[node].sum() if move[node].any() else begin
    ranks = begin
    for _ in range(200):
        ranks = DAMPING * ranks @ move + (1 - DAMPING) * begin
    found = pagerank(strength, edges, there)
    np.testing.assert_allclose(found, ranks, atol=1e-8)
    assert found[5] == 0.0
    assert found.sum() == pytest.approx(1.0)


def test_what_is_kept_are_the_edges_that_are_walked_most():
    layer, strength, edges = walk_graph()
    walks = [
        strength[i] * w / sum(edges.weight[edges.source == i]) for i, w in zip(edges.source, edges.weight, strict=True)
    ]
    found = most_walked(strength, edges, layer, 2)
    for group in (1, 2):
        into = [e for e in range(len(walks)) if layer[edges.target[e]] == group]
        best = sorted(into, key=lambda e: -walks[e])[: 2 * int((layer == group).sum())]
        mine = layer[found.target] == group
        assert list(zip(found.source[mine], found.target[mine], strict=True)) == [
            (edges.source[e], edges.target[e]) for e in best
        ]


def test_classes_lie_as_far_apart_as_they_differ():
    one = np.array([[1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.2, 1.0]])
    two = np.array([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]])
    similar = similarity([one, two])
    cosine = (one[0] @ one[1]) / np.sqrt((one[0] @ one[0]) * (one[1] @ one[1]))
    assert similar[0, 1] == pytest.approx((cosine + 0.5 / np.sqrt(1.25)) / 2)
    assert similar[0, 2] == 0.0
    placed = positions(similar)  # three points always fit into a plane
    apart = np.linalg.norm(placed[:, None] - placed[None], axis=2)
    distance = np.sqrt(np.diag(similar)[:, None] + np.diag(similar) - 2 * similar)
    np.testing.assert_allclose(apart / apart[0, 1], distance / distance[0, 1], atol=1e-9)
    assert np.abs(placed).max() == 1.0
    assert positions(np.ones((1, 1))).tolist() == [[0.0, 0.0]]
    assert positions(np.ones((3, 3))).tolist() == [[0.0, 0.0]] * 3


# The pass, the file and what is asked of it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, images and a table of them; `models`, `data`, `tables` below one folder."""
    root = tmp_path_factory.mktemp("class_graph")
    torch.manual_seed(0)
    folder = add_model(
        "net", architecture=FACTORY, weights=build_network(FACTORY, 4).state_dict(), labels=LABELS,
        preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=root / "models",
    )  # fmt: skip
    model = load_model(folder)
    for number, name in enumerate(LABELS[:3]):
        (root / "data" / name).mkdir(parents=True)
        for i in range(IMAGES):
            generator = np.random.default_rng([number, i])
            pixels = generator.integers(0, 200, 3) + generator.integers(0, 56, (15 + i % 3, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / name / f"{i}.png")
    table = build_table(model, root / "data", defaults=Defaults(quantile=0.5), batch_size=4)
    write_table(table, root / "tables/net/1", model)
    return root, model


@pytest.fixture
def net(place, tmp_path):
    """Model, its table in a folder of this test's own, and the images."""
    root, model = place
    shutil.copytree(root / "tables", tmp_path / "tables")
    return model, load_table(tmp_path / "tables/net", model), open_source(root / "data", model)


OPTIONS = Options(images_per_class=4, exemplars=2, crop_pixels=16, batch_size=3)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_class_graph_says_what_the_images_say(net):
    model, table, source = net
    graph = build(model, table, source, OPTIONS)
    assert not unfinished(table.in_folder).exists()
    assert graph.classes == (0, 1, 2)
    assert graph.layers == LAYERS
    chosen = selected(table)
    tree = source.take(np.flatnonzero(source.targets == 2)[[0, 1, 2, 3]])
    pixels = [model.preprocessing.apply(decode_image(data, "x"))[0] for data in tree.read(range(4))]
    network = InfluenceNetwork(model.module, LAYERS)
    channels = {name: torch.from_numpy(of) for name, of in chosen.of_class(2).items()}
    influence, maps = network.measure(torch.stack(pixels), channels)
    view = graph.class_view(2)
    assert (view.index, view.label, view.images, view.nodes_in_all) == (2, "tree", 4, 6)
    assert [(node.layer, node.channel) for node in view.nodes] == [
        (name, int(channel)) for name in LAYERS for channel in channels[name]
    ]
    np.testing.assert_allclose([node.strength for node in view.nodes], chosen.strength_of(2), rtol=1e-6)
    assert sum(node.pagerank for node in view.nodes) == pytest.approx(1.0, abs=1e-5)
    weights = influence.weights()["first", "second"]
    assert view.edges
    for edge in view.edges:
        row = channels["first"].tolist().index(edge.source[1])
        column = channels["second"].tolist().index(edge.target[1])
        assert (edge.source[0], edge.target[0]) == LAYERS
        assert edge.weight == pytest.approx(float(weights[row, column]), rel=2e-3)
    assert [edge.weight for edge in view.edges] == sorted((edge.weight for edge in view.edges), reverse=True)
    gap = {name: maps[name].clamp(min=0).mean((2, 3)).double().numpy() for name in LAYERS}
    counts = graph.reference_counts(2)
    np.testing.assert_array_equal(graph.reference_edges, activation_histograms.EDGES)
    for row, name in enumerate(LAYERS):
        layer, mine = table.layers[name], channels[name].numpy()
        z = (gap[name][:, mine] - layer.mean.numpy()[mine]) / layer.std.numpy()[mine]
        expected = np.histogram(np.clip(z, -4, 8), activation_histograms.EDGES)[0]
        np.testing.assert_array_equal(counts[row], expected)


def test_what_is_asked_of_a_graph(net):
    model, table, source = net
    graph = build(model, table, source, OPTIONS)
    views = {index: graph.class_view(index) for index in graph.classes}
    few = graph.class_view(0, most_nodes=3)
    assert len(few.nodes) == 3
    assert {node.layer for node in few.nodes} == set(LAYERS)  # the layers take turns
    best = max((n for n in views[0].nodes if n.layer == "first"), key=lambda n: n.pagerank)
    assert best in few.nodes
    there = {(node.layer, node.channel) for node in few.nodes}
    assert all(edge.source in there and edge.target in there for edge in few.edges)
    for layer in LAYERS:
        for channel in range(6):
            expected = sorted(
                ((n.log_p, i, n.strength) for i, view in views.items() for n in view.nodes
                 if (n.layer, n.channel) == (layer, channel)),
            )  # fmt: skip
            found = graph.channel_view(layer, channel)
            assert [(s.log_p, s.index) for s in found.classes] == [(log_p, i) for log_p, i, _ in expected]
            np.testing.assert_allclose([s.strength for s in found.classes], [s for *_, s in expected], rtol=1e-6)
            assert (graph.exemplars(layer, channel) is None) == (found.exemplars == 0)
            assert bool(found.classes) >= bool(found.exemplars)
    (first, second) = graph.compare(0, 1)
    mine, theirs = ({n.channel for n in views[i].nodes if n.layer == "second"} for i in (0, 1))
    assert (first.layer, second.layer) == LAYERS
    assert (set(second.shared), set(second.only_a), set(second.only_b)) == (mine & theirs, mine - theirs, theirs - mine)
    summary = json.loads(json.dumps(graph.summary()))
    assert [one["label"] for one in summary["classes"]] == LABELS[:3]
    assert all(abs(one[axis]) <= 1 for one in summary["classes"] for axis in "xy")
    with pytest.raises(UncoveredTargetError, match=r"covers 3 of the model's 4 classes.*3 \(bus\)"):
        graph.class_view(3)
    for wrong in (lambda: graph.channel_view("third", 0), lambda: graph.exemplars("first", 6)):
        with pytest.raises(OptionError, match=r"'layer' is 'third'|'channel' is 6"):
            wrong()


def test_exemplars_are_the_pieces_of_the_images_with_the_largest_features(net):
    model, table, source = net
    graph = build(model, table, source, OPTIONS)
    images = [i for label in range(3) for i in np.flatnonzero(source.targets == label)[[0, 1, 2, 3]]]
    pixels = torch.stack([model.preprocessing.apply(decode_image(d, "x"))[0] for d in source.read(images)])
    network = InfluenceNetwork(model.module, LAYERS)
    _, maps = network.measure(pixels, {name: torch.arange(1) for name in LAYERS})
    checked = 0
    for channel in range(6):
        strip = graph.exemplars("second", channel)
        if strip is None:
            continue
        checked += 1
        features = maps["second"][:, channel].clamp(min=0).mean((1, 2))
        best = sorted((i for i in range(12) if features[i] > 0), key=lambda i: -float(features[i]))[:2]
        found = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")).astype(float)
        assert found.shape == (16, 16 * len(best), 3)
        for place, image in enumerate(best):
            seen = model.preprocessing.restore(pixels[image]).reshape(-1, 3)
            crop = found[:, place * 16 : (place + 1) * 16].reshape(-1, 3)
            # The colour tells the image; WebP and scaling change it a little.
            assert np.abs(crop.mean(0) - seen.mean(0)).max() < 15
    assert checked > 2
    size = graph.summary()["exemplars"]["bytes"]
    assert (graph.folder / "exemplars/strips.bin").stat().st_size == size
    without = build(model, table, source, Options(images_per_class=4))
    assert without.exemplars("second", 0) is None
    assert not (graph.folder / "exemplars").exists(), "no piece of an image stays where none was asked for"


def test_what_was_opened_stays_though_the_files_go(net):
    model, table, source = net
    graph = build(model, table, source, OPTIONS)
    at = next(c for c in range(6) if graph.exemplars("second", c))
    before = graph.exemplars("second", at)
    shutil.rmtree(graph.folder / "exemplars")
    assert graph.exemplars("second", at) == before


def test_a_graph_without_any_influence_is_asked_all_the_same(net):
    model, table, source = net
    graph = build(model, table.with_defaults(layers=("first",)).save(table.in_folder), source, OPTIONS)
    assert [graph.class_view(index).edges for index in range(3)] == [(), (), ()]


def test_strips_wider_than_their_format_are_refused_at_once():
    with pytest.raises(OptionError, match="at most 16383 pixels"):
        Options(exemplars=64, crop_pixels=256)


def test_going_on_gives_the_same_files(net, tmp_path):
    model, table, source = net
    build(model, table, source, OPTIONS)
    whole = files(table.in_folder)
    (table.in_folder / "class_graph.json").unlink()

    def interrupt(now):
        if now.classes == 2 and now.done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, table, source, OPTIONS, progress=interrupt)
    assert (unfinished(table.in_folder) / "1.safetensors").is_file()
    with pytest.raises(ClassGraphError, match=r"other images or with other options.*--restart"):
        build(model, table, source, Options(images_per_class=3))
    said = []
    build(model, table, source, OPTIONS, workers=1, progress=said.append)
    assert said[0].classes == 2
    assert files(table.in_folder) == whole


def test_an_image_that_cannot_be_read(net, tmp_path):
    model, table, _ = net
    data = tmp_path / "data"
    for name in LABELS[:3]:
        (data / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (9, 9, 9)).save(data / name / "a.png")
    (data / "dog/b.png").write_bytes(b"no image")
    source = open_source(data, model, least_images=1)
    with pytest.raises(DataError, match=r"1 of 4 images cannot be read, more than the 10.00% allowed.*dog/b.png"):
        build(model, table, source, max_bad=0.1)
    graph = build(model, table, source, max_bad=0.5)
    assert [name for name, _ in graph.summary()["built"]["bad_images"]] == ["dog/b.png"]
    (data / "dog/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"No image of class 1 \(dog\) can be read"):
        build(model, table, open_source(data, model, least_images=1), max_bad=1.0)
    shutil.rmtree(data / "tree")
    with pytest.raises(DataError, match=r"has no image of class 2 \(tree\), which table 'net' covers"):
        build(model, table, open_source(data, model, least_images=1))


def test_a_graph_of_something_else_is_refused(net):
    model, table, source = net
    with pytest.raises(NoClassGraphError, match="has no class graph; build one: parchgrad class-graph build net"):
        load(table.in_folder, table)
    build(model, table, source, OPTIONS)
    manifest = table.in_folder / "class_graph.json"
    written = json.loads(manifest.read_text())
    wrong = {
        "weights_sha256 'x'|built for weights_sha256": {"model": {"weights_sha256": "x"}},
        "built for table_sha256": {"table_sha256": "x"},
        "has format version 0": {"format_version": 0},
        "class_graph.safetensors has sha256": {"tensors_sha256": "x"},
        "has other classes": {"classes": [0]},
        "is malformed: KeyError 'layers'": {"layers": None},
        "has 2 channels|has shape": {"layers": [{"name": "first", "channels": 6, "selected": 2}]},
        "strips.bin has": {"exemplars": {**written["exemplars"], "bytes": 1}},
    }
    for message, change in wrong.items():
        changed = {
            key: value for key, value in {**written, **change}.items() if value is not None or key == "exemplars"
        }
        manifest.write_text(json.dumps(changed))
        with pytest.raises(ClassGraphError, match=message):
            load(table.in_folder, table)
    manifest.write_text("{")
    with pytest.raises(ClassGraphError, match="is malformed"):
        load(table.in_folder, table)


def test_a_table_that_was_replaced_meanwhile_keeps_its_own(net, monkeypatch):
    model, table, source = net
    other = SelectionTable.random(model, 4, seed=0)

    def replaced(*given):
        write_table(other, table.in_folder, model)
        return positions(*given)

    monkeypatch.setattr(build_module, "positions", replaced)
    with pytest.raises(InUseError, match="was replaced by another"):
        build(model, table, source)
    assert not (table.in_folder / "class_graph.json").exists()


def test_a_table_of_another_model_is_refused(net):
    model, table, source = net
    other = dataclasses.replace(table, weights_sha256="x")
    with pytest.raises(TableError, match="weights_sha256 is 'x'"):
        build(model, other, source)


# The command line


def test_the_commands(net, place, typed):
    root, _ = place
    _, table, _ = net
    where = ("--models-dir", root / "models", "--tables-dir", table.in_folder.parents[1])
    found = typed("class-graph", "show", "net", *where)
    assert found.returncode == 1
    assert "has no class graph; build one" in found.stderr
    found = typed(
        "class-graph", "build", "net", "--data", root / "data", "--exemplars", 1, "--workers", 0, *where
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "3 classes, 15 images, 0 unreadable; 2 layers" in found.stdout
    assert "class_graph.safetensors (0.0" in found.stdout
    assert "holds pieces of data's images: up to 1 of each of" in found.stdout
    found = typed("class-graph", "show", "net", *where)
    assert all(label in found.stdout for label in LABELS[:3])
    found = typed("class-graph", "show", "net", "dog", "--edges", 1, *where)
    assert "1 dog: 6 channels" in found.stdout
    assert "(1.00)" in found.stdout
    found = typed("class-graph", "show", "net", "dog", "--against", 2, *where)
    assert "only tree" in found.stdout
    found = typed("class-graph", "show", "net", "--against", "dog", *where)
    assert (found.returncode, "name one before it" in found.stderr) == (2, True)
    found = typed("class-graph", "show", "net", "bus", *where)
    assert (found.returncode, "no row for target 3 (bus)" in found.stderr) == (1, True)
    found = typed("class-graph", "build", "net", "--data", root / "models", *where)
    assert found.returncode == 3
    found = typed("table", "verify", "net", *where)
    assert found.returncode == 0, "a class graph does not disturb its table"


def test_the_bundled_class_graph():
    table = load_table(ROOT / "selection_tables/scenes")
    graph = load(table.in_folder, table)
    assert len(graph.classes) == 10
    assert sum(path.stat().st_size for path in graph.folder.rglob("*")) < 2_000_000
    view = graph.class_view(0)
    strip = graph.exemplars(view.nodes[-1].layer, view.nodes[-1].channel)
    assert Image.open(io.BytesIO(strip)).format == "WEBP"
