"""What points share at the entry convolution: the same maps as without sharing, and as little computed as should be."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.errors import AbandonedError
from parchgrad.explainer import Explainer
from parchgrad.runtimes.dense import DenseEngine
from parchgrad.runtimes.pruned.convolution import Convolution
from tests.oracles.tolerance import assert_each_close, relative_l2
from tests.parchgrad import networks
from tests.parchgrad.networks import batch, build, table_for

INFINITY = math.inf

# Every method, what prunes, what scales, and what the dense engine takes, side by side.
MIXED = {
    "method": ["integrated_gradients", "smoothgrad", "gradient", "integrated_gradients", "smoothgrad"] * 2,
    "steps": [5, 5, 5, 3, 5, 1, 5, 5, 4, 5],
    "samples": [3, 4, 3, 3, 2, 3, 5, 3, 3, 3],
    "noise_seed": list(range(10)),
    "gamma": [INFINITY, INFINITY, 2.0, 3.0, 0.5, INFINITY, INFINITY, 2.0, INFINITY, 0.0],
    "rule": [True, True, True, True, True, True, False, True, True, False],
    "conserve": ["exact", "independent", "none", "exact", "none"] * 2,
    "quantile": [0.1, 0.3, 0.3, 0.2, 0.5, 0.05, 0.3, 0.3, 1.0, 0.1],  # of 1.0 the gradient passes unchanged
    "selection": ["class"] * 3 + ["instance"] + ["class"] * 6,
}
TARGETS = [1, 2, 3, 4, -1, 1, 0, 2, 3, 1]


class Entry(nn.Module):
    """The entry convolution in question, and a depthwise one behind it or not."""

    def __init__(self, activation, normed=True, behind_groups=1, **geometry):
        super().__init__()
        self.entry = nn.Conv2d(3, **geometry)
        channels = self.entry.out_channels
        self.norm = nn.BatchNorm2d(channels) if normed else nn.Identity()
        self.activation = activation
        self.behind = nn.Conv2d(channels, channels, 3, padding=1, groups=behind_groups)
        self.last = nn.Conv2d(channels, 12, 1)
        self.head = nn.Linear(12, networks.CLASSES)

    def forward(self, images):
        z = F.silu(self.behind(self.activation(self.norm(self.entry(images)))))
        return self.head(F.relu(self.last(z)).mean((2, 3)))


class Pooled(Entry):
    """ReLU goes with the pooling that follows."""

    def forward(self, images):
        z = F.max_pool2d(F.relu(self.norm(self.entry(images))), 2)
        return self.head(F.relu(self.last(torch.tanh(self.behind(z)))).mean((2, 3)))


class Halved(Entry):
    """No entry convolution: another step reads the images first."""

    def forward(self, images):
        return super().forward(images * 0.5)


ENTRIES = {
    "relu": lambda: Entry(nn.ReLU(), out_channels=16, kernel_size=3, padding=1),
    "pooled": lambda: Pooled(None, out_channels=16, kernel_size=3, stride=2),
    "silu": lambda: Entry(nn.SiLU(), out_channels=16, kernel_size=5, stride=2),
    "hardswish, depthwise behind": lambda: Entry(nn.Hardswish(), behind_groups=16, out_channels=16, kernel_size=3),
    "relu6, depthwise behind": lambda: Entry(nn.ReLU6(), behind_groups=16, out_channels=16, kernel_size=3, stride=2),
    "none, 1x1": lambda: Entry(nn.Identity(), normed=False, out_channels=16, kernel_size=1),
    "tanh, grouped": lambda: Entry(nn.Tanh(), out_channels=12, kernel_size=3, groups=3),
    "grouped, depthwise behind": lambda: Entry(
        nn.Tanh(), behind_groups=12, out_channels=12, kernel_size=3, groups=3, dilation=2
    ),
    "itself depthwise": lambda: Entry(nn.Sigmoid(), out_channels=3, kernel_size=3, groups=3, padding=1),
}


def made(network, dtype=torch.float64):
    return build(network, dtype=dtype)


def both(explainer, images, targets, **options):
    """The explanation with and without sharing."""
    found = explainer.explain(images, targets, **options)
    explainer._runtime._shares = False
    try:
        return found, explainer.explain(images, targets, **options)
    finally:
        explainer._runtime._shares = True


def assert_same(found, expected, relative=1e-12):
    for one, other in zip(found.attributions, expected.attributions, strict=True):
        assert relative_l2(one, other) <= relative
    for name in ("logits", "targets", "identity_layers", "layers_used", "covered", "complete"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    gaps = found.completeness_gap, expected.completeness_gap
    assert torch.equal(gaps[0].isnan(), gaps[1].isnan())
    torch.testing.assert_close(*gaps, rtol=0, atol=1e-10, equal_nan=True)


@pytest.fixture
def computed(monkeypatch):
    """How many images went through the convolution that reads images, and gradients back to them."""
    counts = {"outputs": 0, "gradients": 0}
    forward, whole, through = Convolution._forward, Convolution._whole, Convolution._through

    def counted(call, what):
        def wrapper(self, values, *args):
            if self.name == "entry":
                counts[what] += len(values)
            return call(self, values, *args)

        return wrapper

    monkeypatch.setattr(Convolution, "_forward", counted(forward, "outputs"))
    monkeypatch.setattr(Convolution, "_whole", counted(whole, "gradients"))
    monkeypatch.setattr(Convolution, "_through", counted(through, "gradients"))
    return counts


@pytest.mark.parametrize("per_pass", [1, 4, 100])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_shared_is_as_unshared(entry, per_pass):
    model = made(entry)
    explainer = Explainer(model, table_for(model), backward="pruned")
    assert explainer._runtime._pruned._compiled.program.entry.name == "entry"
    options = {**MIXED, "baseline": batch(1, seed=7)[0], "pixels_per_pass": per_pass * 144}
    found, expected = both(explainer, batch(10), TARGETS, **options)
    assert_same(found, expected)
    dense = Explainer(model, table_for(model), backward="dense").explain(batch(10), TARGETS, **options)
    assert_each_close(found.attributions, dense.attributions, 1e-9)
    assert found.identity_layers.tolist() == dense.identity_layers.tolist()


def test_in_float32_and_over_slices(monkeypatch):
    """Packed weights; and passes cut into parts, images' points among two of them."""
    model = made(ENTRIES["relu6, depthwise behind"])
    wide = Explainer(model, table_for(model)).explain(batch(10), TARGETS, **MIXED)
    model.float()
    explainer = Explainer(model, table_for(model), backward="pruned")
    monkeypatch.setattr("parchgrad.runtimes.pruned.engine._LARGEST_MAPPING", 5 * (4 * 16 * 5 * 5))
    found, expected = both(explainer, batch(10, dtype=torch.float32), TARGETS, **MIXED)
    assert 1 < explainer._runtime._pruned._compiled.confirmed[torch.Size((3, 12, 12))] < 10
    for one, other, exact in zip(found.attributions, expected.attributions, wide.attributions, strict=True):
        assert relative_l2(one, exact) <= max(1e-5, 10 * relative_l2(other, exact))


class TwoReaders(Entry):
    """The images go past the entry convolution as well."""

    def forward(self, images):
        return super().forward(images) + images.mean((1, 2, 3))[:, None] * torch.arange(5)


class UnchangedNearTheStart(nn.Module):
    """While every output of the entry is positive its gradient is the same everywhere, and passes unchanged."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 1)
        nn.init.ones_(self.entry.bias)
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, images):
        return self.head(torch.relu(self.entry(images)).mean((2, 3)))


def test_points_that_pass_unchanged_are_summed_whole(computed):
    """Beside those of the selected channels: two input gradients an image."""
    model = build(UnchangedNearTheStart)
    explainer = Explainer(model, table_for(model), backward="pruned")
    options = {"method": "integrated_gradients", "quantile": 0.3, "conserve": "none"}
    explainer.predict(batch(2))
    near = batch(2) * 1e-3
    assert explainer.explain(near, 1, quantile=0.3).identity_layers.tolist() == [1, 1]
    assert explainer.explain(batch(2), 1, quantile=0.3).identity_layers.tolist() == [0, 0]
    computed.update(outputs=0, gradients=0)
    explainer.explain(batch(2), 1, steps=12, **options)
    assert computed == {"outputs": 2 + 4, "gradients": 4}
    found, expected = both(explainer, batch(2), 1, steps=12, **options)
    assert_same(found, expected)
    assert found.identity_layers.tolist() == [1, 1], "the worst point"


class DepthwiseUnchangedNearTheStart(UnchangedNearTheStart):
    """There the depthwise convolution sends all channels back, elsewhere its selected ones."""

    def __init__(self):
        super().__init__()
        self.behind = nn.Conv2d(8, 8, 1, groups=8)
        nn.init.constant_(self.behind.bias, 0.5)

    def forward(self, images):
        return self.head(torch.relu(self.behind(torch.tanh(self.entry(images)))).mean((2, 3)))


@pytest.mark.parametrize("layers", [None, ["behind"], ["entry"]])
def test_points_of_other_channels_are_summed_together(layers, computed):
    model = build(DepthwiseUnchangedNearTheStart)
    explainer = Explainer(model, table_for(model), backward="pruned")
    options = {"method": "integrated_gradients", "quantile": 0.4, "layers": layers, "steps": 12}
    explainer.predict(batch(2))
    computed.update(outputs=0, gradients=0)
    found = explainer.explain(3 * batch(2), 1, **options)
    assert computed["outputs"] == 2 + 4
    assert computed["gradients"] == 2 * (1 if layers == ["entry"] else 2)
    assert_same(found, both(explainer, 3 * batch(2), 1, **options)[1])


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
def test_the_entry_runs_as_often_as_it_should(method, computed):
    """Three passes of four points: an input gradient each; two outputs an image on a line, else one a point."""
    model = made(ENTRIES["relu"])
    explainer = Explainer(model, table_for(model), backward="pruned")
    images = batch(2)
    explainer.predict(images)
    options = {"method": method, "steps": 6, "samples": 6, "quantile": 0.3, "pixels_per_pass": 4 * 144}
    for gamma, rule in ((INFINITY, True), (2.0, True), (None, False)):
        computed.update(outputs=0, gradients=0)
        explainer.explain(images, [1, 2], gamma=gamma, rule=rule, **options)
        predicted = 2 + (2 if method == "integrated_gradients" and not rule else 0)  # for the completeness gap
        points = 4 if method == "integrated_gradients" else 12
        assert computed == {"outputs": predicted + points, "gradients": 4}, "the middle pass has points of both images"
    explainer._runtime._shares = False
    computed.update(outputs=0, gradients=0)
    explainer.explain(images, [1, 2], **options)
    assert computed == {"outputs": 2 + 12, "gradients": 12}


def test_one_step_on_a_line_is_no_dearer(computed):
    model = made(ENTRIES["relu"])
    explainer = Explainer(model, table_for(model), backward="pruned")
    explainer.predict(batch(1))
    computed.update(outputs=0, gradients=0)
    explainer.explain(batch(1), 1, method="integrated_gradients", steps=1)
    assert computed == {"outputs": 2, "gradients": 1}


def test_an_image_nobody_wants_is_left_out():
    model = made(ENTRIES["relu"])
    explainer = Explainer(model, table_for(model), backward="pruned")
    asked = []

    def wanted():
        asked.append(None)
        return [True, len(asked) % 100 < 4, True]

    options = {"method": "integrated_gradients", "steps": 6, "pixels_per_pass": 4 * 144, "wanted": wanted}
    found = explainer.explain(batch(3), 1, **options)
    assert found.complete.tolist() == [True, False, True]
    alone = explainer.explain(batch(3)[2:], 1, method="integrated_gradients", steps=6)
    assert_each_close(found.attributions[2:], alone.attributions, 1e-12)
    with pytest.raises(AbandonedError):
        explainer.explain(batch(3), 1, **{**options, "wanted": lambda: [False] * 3})


def test_weights_changed_between_passes_are_those_of_the_next_pass():
    """What is kept of a line is of the weights it was computed with."""
    model = made(ENTRIES["relu"])
    explainer = Explainer(model, table_for(model), backward="pruned")
    options = {"method": "integrated_gradients", "steps": 6, "pixels_per_pass": 3 * 144, "quantile": 0.3}

    def explained(shares):
        asked = []

        def wanted():
            asked.append(None)
            if len(asked) == 4:  # before the second pass of the points
                with torch.no_grad():
                    model.entry.weight.mul_(1.5)
            return [True]

        explainer._runtime._shares = shares
        found = explainer.explain(batch(1), 1, wanted=wanted, **options).attributions
        with torch.no_grad():
            model.entry.weight.div_(1.5)
        return found

    steady = explainer.explain(batch(1), 1, **options).attributions
    shared, unshared = explained(True), explained(False)
    assert relative_l2(shared, unshared) <= 1e-12
    assert relative_l2(shared, steady) > 1e-3


@pytest.mark.parametrize("network", [Halved, TwoReaders, networks.OverwrittenInput])
def test_without_an_entry_convolution_nothing_is_shared(network):
    geometry = {"out_channels": 8, "kernel_size": 3}
    model = build(lambda: network(nn.ReLU(), **geometry) if issubclass(network, Entry) else network())
    explainer = Explainer(model, table_for(model), backward="pruned")
    assert explainer._runtime._pruned._compiled.program.entry is None
    found, expected = both(explainer, batch(2), 1, method="integrated_gradients", steps=3)
    assert torch.equal(found.attributions, expected.attributions)


def test_what_is_not_finite_is_the_dense_engines(monkeypatch):
    model = made(ENTRIES["relu"])
    explainer = Explainer(model, table_for(model), backward="pruned")
    explainer.predict(batch(1))
    images = batch(2)
    images[0, 0, 0, 0] = math.nan
    taken, gradients = [], DenseEngine.gradients
    monkeypatch.setattr(DenseEngine, "gradients", lambda self, *args: taken.append(None) or gradients(self, *args))
    found = explainer.explain(images, 1, method="integrated_gradients", steps=3)
    assert taken
    assert bool(found.attributions[0].isnan().any())
    assert bool(found.attributions[1].isfinite().all())


def test_in_inference_mode():
    model = made(ENTRIES["relu"])
    explainer = Explainer(model, table_for(model), backward="pruned")
    options = {"method": ["integrated_gradients", "smoothgrad"], "steps": 4, "samples": 3}
    with torch.inference_mode():
        found = explainer.explain(batch(2), 1, **options).attributions
    assert_each_close(found, explainer.explain(batch(2), 1, **options).attributions, 1e-12)
