"""Activation drift against a loop in float64, on PyTorch and on an exported graph."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from parchgrad.defaults import Defaults
from parchgrad.drift import Reference, layer_drift
from parchgrad.errors import ModelError, UncoveredTargetError
from parchgrad.explainer import Explainer
from parchgrad.features import points_reached
from parchgrad.graph.explanation import explanation_graph
from parchgrad.graph.features import noted
from parchgrad.graph.prediction import trace_prediction
from parchgrad.preprocessing import Preprocessing
from parchgrad.runtimes.onnx_runtime import OnnxExplainer
from parchgrad.tables import NORMALITY_LEVEL
from tests.oracles.tolerance import assert_close
from tests.parchgrad.networks import Branching, batch, build, table_for
from tests.parchgrad.test_onnx_runtime import described, write


def test_distance_and_shift_of_a_layer():
    found = layer_drift([1.0, 6.0, 7.0, 9.0], [0.0, 2.0, 8.0, 1.0], [1.0, 2.0, 0.0, 4.0], [True, True, True, False])
    assert found.distance == pytest.approx(math.sqrt((1 + 4) / 2))  # the third varies not, the fourth is not chosen
    assert found.shift == pytest.approx(1.5)
    opposite = layer_drift([1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [True, True])
    assert (opposite.distance, opposite.shift) == (pytest.approx(1.0), pytest.approx(0.0))
    assert layer_drift([1.0], [0.0], [0.0], [True]) is None
    assert layer_drift([1.0], [0.0], [1.0], [False]) is None


def test_only_the_layers_and_channels_of_the_defaults_are_compared():
    channels = {"a": 4, "b": 10, "c": 2}
    defaults = Defaults(quantile={"b": 0.2, "c": 0.1}, layers=("b", "c"))
    normality = np.zeros(16)
    normality[4 + 9] = NORMALITY_LEVEL  # of the best in `b`
    rank = [*range(4), *reversed(range(10)), 1, 0]
    gap = np.arange(16.0)
    reference = Reference.of(channels, defaults, np.zeros(16), np.ones(16))
    found = reference.drift(gap, rank)
    assert list(found) == ["b", "c"]
    assert found["b"].shift == pytest.approx((12 + 13) / 2)  # two of ten: ranks 1 and 0
    assert found["c"].shift == pytest.approx(15)  # one of two, the second
    filtered = Reference.of(channels, defaults, np.zeros(16), np.ones(16), normality, NORMALITY_LEVEL)
    assert filtered.drift(gap, rank)["b"].shift == pytest.approx(12)


def oracle(network, table, image, target, counts):
    """By hooks and loops: distance and shift of each layer, of z at the convolutions' own outputs."""
    seen = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[0]}))
        for name in table.layers
    ]
    with torch.no_grad():
        network(image[None])
    for hook in hooks:
        hook.remove()
    row, result = table.classes.index(target), {}
    for name, layer in table.layers.items():
        z = []
        for channel in range(layer.channels):
            if layer.rank[row, channel] < counts[name] and layer.std[channel] > 0:
                gap = sum(max(float(v), 0.0) for v in seen[name][channel].flatten()) / seen[name][channel].numel()
                z.append((gap - float(layer.mean[channel])) / float(layer.std[channel]))
        if z:
            result[name] = math.sqrt(sum(v * v for v in z) / len(z)), sum(z) / len(z)
    return result


@pytest.mark.parametrize("backward", ["pruned", "dense"])
def test_the_explainers_drift_is_the_loops(backward):
    network = build()
    table = table_for(network, covered=[2, 0, 4, 1], quantile=0.3)
    explainer, images = Explainer(network, table, backward=backward), batch()
    found = explainer.drift(images, [0, 2, None])
    predicted = int(network(images[2:]).argmax())
    counts = {name: max(1, math.floor(0.3 * layer.channels + 1e-9)) for name, layer in table.layers.items()}
    for image, target, drift in zip(images, (0, 2, predicted), found, strict=True):
        expected = oracle(network, table, image, target, counts)
        assert list(drift) == list(expected)
        for name, (distance, shift) in expected.items():
            assert_close([drift[name].distance, drift[name].shift], [distance, shift], 1e-9)
    with pytest.raises(UncoveredTargetError):
        explainer.drift(images, [0, 3, 2])


def test_an_image_of_the_tables_mean_has_no_drift():
    """Mean and deviation are the table's own: features one deviation above it are at distance 1 and shift 1."""
    network = build()
    table = table_for(network, quantile=1.0)
    explainer, image = Explainer(network, table), batch(1)
    gap = explainer._runtime.features(image)[0].numpy()
    start, layers = 0, {}
    for name, layer in table.layers.items():
        own = torch.from_numpy(gap[start : start + layer.channels])
        start += layer.channels
        layers[name] = replace(layer, mean=own - 1.5, std=torch.full_like(own, 1.5))
    moved = Explainer(network, replace(table, layers=layers)).drift(image, 0)[0]
    for one in moved.values():
        assert (one.distance, one.shift) == (pytest.approx(1.0), pytest.approx(1.0))


def test_the_features_share_the_networks_weights():
    network = build()
    explainer = Explainer(network, table_for(network))
    explainer.drift(batch(1), 0)
    theirs = {p.data_ptr() for p in explainer._runtime._features._module.parameters()}
    assert theirs == {p.data_ptr() for p in network.parameters()}


class Gated(nn.Module):
    """SiLU written as x * sigmoid(x), a ReLU after BatchNorm, a normalisation before a sum, and a plain last one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 8, 1)
        self.between = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, images):
        z = nn.functional.silu(self.first(images))
        z = z + nn.functional.relu(self.norm(self.second(z)))
        z = z + self.between(self.third(z))
        return self.head(self.last(z).mean((2, 3)))


def exported(network, table, size, folder):
    model = explanation_graph(trace_prediction(network, size, native=False), table)
    preprocessing = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(Preprocessing(size=size, rule="stretch")).items()
    }
    metadata = described(
        model__labels=list(table.labels), model__input=preprocessing, graph__layers=list(table.layer_names),
        table={key: value for key, value in table.manifest().items() if key != "labels"}, graph__backward="pruned",
    )  # fmt: skip
    metadata["features"] = json.loads(noted(model))
    return model, metadata, OnnxExplainer(write(folder, model, metadata), threads=1)


@pytest.mark.parametrize("kind", [Branching, Gated])
@pytest.mark.parametrize("point", ["convolution", "activation"])
def test_both_runtimes_find_the_same_drift(kind, point, tmp_path):
    network = build(kind, dtype=torch.float32)
    images = batch(3, dtype=torch.float32)
    table = table_for(network, covered=[2, 0, 4], quantile=0.3)
    if point == "activation":
        points = points_reached(network, table.layer_names, images[:1])
        table = replace(table, statistics_point=point, built={"by": "tests", "points": points})
    expected = Explainer(network, table).drift(images, [0, 2, 4])
    _, _, explainer = exported(network, table, (12, 12), tmp_path)
    assert explainer.no_drift is None
    found = explainer.drift(images.numpy(), [0, 2, 4])
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine) == list(theirs)
        for name in theirs:
            here, there = mine[name], theirs[name]
            assert_close([here.distance, here.shift], [there.distance, there.shift], 1e-4)


class Scaled(nn.Module):
    """Activations that go on: times a number, cut off, gated once more; and one times a parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.of_one = nn.Parameter(torch.full((1,), 1.3))
        self.of_each = nn.Parameter(torch.linspace(0.5, 1.5, 8)[:, None, None])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        z = F.relu(self.a(x)) * 1.7
        z = F.silu(self.b(z)).clamp(max=0.1) / 0.3
        z = F.relu(self.c(z)) * self.of_each
        z = F.relu(self.d(z)) * self.of_one
        return self.head(z.mean((2, 3)))


def test_scaled_activations_are_followed_as_far_as_torch_follows_them(tmp_path):
    network = build(Scaled, dtype=torch.float32)
    images = batch(3, dtype=torch.float32)
    table = table_for(network, covered=[2, 0, 4], quantile=0.3)
    points = points_reached(network, table.layer_names, images[:1])
    assert set(points.values()) == {"activation"}
    table = replace(table, statistics_point="activation", built={"by": "tests", "points": points})
    expected = Explainer(network, table).drift(images, [0, 2, 4])
    _, _, explainer = exported(network, table, (12, 12), tmp_path)
    for mine, theirs in zip(explainer.drift(images.numpy(), [0, 2, 4]), expected, strict=True):
        assert list(mine) == ["a", "b", "c"]  # of the last it cannot be told in the graph: not compared
        for name, here in mine.items():
            assert_close([here.distance, here.shift], [theirs[name].distance, theirs[name].shift], 1e-4)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gap = nn.Parameter(torch.ones(()))  # named as a part of the features' own graph once was
        self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        z = torch.relu(self.norm(self.a(x))) * self.gap
        return self.head(torch.relu(self.b(z)).mean((2, 3)))


@pytest.mark.parametrize("dead", [1e-6, 1e-8, 1e-20, 1e-41])
def test_a_channel_that_a_batch_norm_left_nothing_of_is_not_compared(dead, tmp_path):
    network = build(Normalised, dtype=torch.float32)
    images = batch(3, dtype=torch.float32)
    with torch.no_grad():
        network.norm.weight[3:] *= dead
    table = table_for(network, covered=[2, 0, 4], quantile=1.0)
    _, _, explainer = exported(network, table, (12, 12), tmp_path)
    known = table.layers["a"].std.clone()
    known[3:] = 0.0
    known[network.norm.weight == 0] = 0.0  # as it ever was
    assert 0 < (known > 0).sum() <= 3
    assert (explainer._features.std[:8] > 0).tolist() == (known > 0).tolist()
    layers = {name: replace(layer, std=known) if name == "a" else layer for name, layer in table.layers.items()}
    expected = Explainer(network, replace(table, layers=layers)).drift(images, [0, 2, 4])
    for mine, theirs in zip(explainer.drift(images.numpy(), [0, 2, 4]), expected, strict=True):
        assert list(mine) == list(theirs) == ["a", "b"]
        for name, here in mine.items():
            assert_close([here.distance, here.shift], [theirs[name].distance, theirs[name].shift], 1e-3)


def test_what_is_prepared_of_given_bytes_reads_the_file_no_more(tmp_path):
    network = build(dtype=torch.float32)
    table = table_for(network, covered=[2, 0, 4])
    image = batch(1, dtype=torch.float32).numpy()
    _, _, explainer = exported(network, table, (12, 12), tmp_path)
    expected = explainer.drift(image, [0])
    (path,) = tmp_path.rglob("*.onnx")
    content = path.read_bytes()
    path.write_bytes(b"another file")
    opened = OnnxExplainer(path, threads=1, content=content)
    opened.prepare(drift=True)
    assert opened.drift(image, [0]) == expected
    without = OnnxExplainer(path, threads=1, content=content)
    without.prepare(drift=False)
    assert np.array_equal(without.predict(image), opened.predict(image))
    assert "was opened without its features" in without.no_drift
    with pytest.raises(ModelError, match="was opened without its features"):
        without.drift(image, [0])


@pytest.mark.parametrize("prepared", [True, False])
def test_features_that_cannot_be_computed_are_tried_once(prepared, tmp_path, monkeypatch):
    network = build(dtype=torch.float32)
    table = table_for(network, covered=[2, 0, 4])
    image = batch(1, dtype=torch.float32).numpy()
    _, _, explainer = exported(network, table, (12, 12), tmp_path)
    tried = []

    def failing(*_):
        tried.append(1)
        raise MemoryError("bad_alloc")

    monkeypatch.setattr("parchgrad.runtimes.onnx_runtime._features_alone", failing)
    if prepared:
        explainer.prepare(drift=True)
    else:
        assert explainer.no_drift is None
        with pytest.raises(MemoryError):
            explainer.drift(image, [0])
    assert "cannot be computed: MemoryError: bad_alloc" in explainer.no_drift
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot be computed"):
            explainer.drift(image, [0])
    assert len(tried) == 1
    assert explainer.predict(image).shape == (1, 5)


def test_a_graph_of_before_has_no_drift_and_one_that_is_wrong_is_refused(tmp_path):
    network = build(dtype=torch.float32)
    table = table_for(network, covered=[2, 0, 4])
    model, metadata, explainer = exported(network, table, (12, 12), tmp_path)
    with pytest.raises(UncoveredTargetError):
        explainer.drift(batch(1, dtype=torch.float32).numpy(), [1])
    features = metadata.pop("features")
    (tmp_path / "old").mkdir()
    old = OnnxExplainer(write(tmp_path / "old", model, metadata), threads=1)
    assert "does not say where its features are; export it again" in old.no_drift
    with pytest.raises(ModelError, match="export it again"):
        old.drift(batch(1, dtype=torch.float32).numpy(), [0])
    (tmp_path / "wrong").mkdir()
    metadata["features"] = features | {"layers": features["layers"][1:]}
    with pytest.raises(ModelError, match="features of 3 layers, its table 4"):
        OnnxExplainer(write(tmp_path / "wrong", model, metadata))
    metadata["features"] = features | {"mean": features["mean"][:16]}
    with pytest.raises(ModelError, match="features of 3 channels"):
        OnnxExplainer(write(tmp_path / "wrong", model, metadata))
