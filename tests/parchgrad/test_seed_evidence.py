"""The seed `evidence`: its weights, where they act, and both engines against the map oracle."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.errors import OptionError
from parchgrad.explainer import Explainer
from parchgrad.runtimes.evidence_seed import extent, last_map, weighed
from parchgrad.runtimes.pruned.engine import PrunedEngine
from parchgrad.runtimes.view import private_view
from parchgrad.tables import SelectionTable
from tests.oracles import maps
from tests.oracles.maps import Options
from tests.oracles.tolerance import assert_close, assert_each_close, relative_l2
from tests.parchgrad import networks, test_families
from tests.parchgrad.networks import batch, build, table_for
from tests.parchgrad.test_explainer import VARIANTS, by_name, explain_with, used

# --- the weights ---


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_weights_are_the_oracles_and_out_of_place():
    grad, values = drawn(3, 5, 4, 2), drawn(3, 5, 4, 2, seed=1)
    before = grad.clone(), values.clone()
    expected = torch.cat([maps.weighed(grad[i : i + 1], values[i : i + 1]) for i in range(3)])
    assert_each_close(weighed(grad, values), expected, 1e-12)
    assert torch.equal(grad, before[0])
    assert torch.equal(values, before[1])
    some = weighed(grad, values, torch.tensor([True, False, True]))
    assert torch.equal(some[1], grad[1])
    assert torch.equal(some[[0, 2]], weighed(grad, values)[[0, 2]])


def test_with_global_average_pooling_it_is_the_gradient_of_the_mean_cubed_class_map():
    head, values = drawn(6), drawn(1, 6, 5, 5, seed=1).requires_grad_()
    cubed = torch.einsum("c,bchw->bhw", head, values).clamp(min=0).pow(3).mean()
    (expected,) = torch.autograd.grad(cubed, values)
    found = weighed((head / 25)[None, :, None, None].expand(1, 6, 5, 5), values.detach())
    assert_close(found / found.norm(), expected / expected.norm(), 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_go_through(scale, dtype):
    """Of the gradient, and not of the values, however small their product."""
    grad, values = drawn(2, 5, 3, 3, dtype=dtype), drawn(2, 5, 3, 3, dtype=dtype, seed=1)
    expected, tolerance = weighed(grad, values), 1e-6 if dtype == torch.float32 else 1e-12
    assert_each_close(weighed(grad * scale, values) / scale, expected, tolerance)
    assert_each_close(weighed(grad, values * scale), expected, tolerance)
    assert_each_close(weighed(grad * scale, values * 1e-30) / scale, expected, tolerance)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_evidence_an_image_keeps_its_gradient_and_the_others_have_theirs(value):
    grad, values = drawn(3, 5, 3, 3), drawn(3, 5, 3, 3, seed=1)
    if value == 0.0:
        grad[1], values[1] = grad[1].abs(), -values[1].abs()  # against the class everywhere
    else:
        values[1, 0, 2, 2] = value
    found = weighed(grad, values)
    assert torch.equal(found[1], grad[1])
    assert torch.equal(found[[0, 2]], weighed(grad[[0, 2]], values[[0, 2]]))
    assert not torch.equal(found[0], grad[0])


def test_halves_are_weighed_in_float32():
    """And are not finite only where the weighed gradient is beyond them: docs/evidence.md."""
    grad, values = drawn(1, 5, 3, 3, dtype=torch.float16) * 1e-3, drawn(1, 5, 3, 3, dtype=torch.float16, seed=1)
    found = weighed(grad, values)
    assert found.dtype == torch.float16
    assert_close(found.double(), weighed(grad.double(), values.double()), 1e-3)
    loud = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
    loud[..., 3, 3] = 1  # its weight, 4096 squared, is none of float16
    grad = torch.full_like(loud, 1e-3)
    assert_close(weighed(grad, loud)[..., 3, 3].double(), grad[..., 3, 3].double() * 4096**2, 1e-3)
    assert weighed(grad * 10, loud)[..., 3, 3].isinf().all()


# --- the last map ---

MAP, ONE, END = (1, 8, 4, 4), (1, 8, 1, 1), (1, 8)
FLAT, TURNED = (1, 8, 16), (1, 16, 8)


@pytest.mark.parametrize(
    ("calls", "shapes", "expected"),
    [
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": MAP, "b": MAP, "y": END}, "b"),
        ([("a", "x"), ("b", "a"), ("y", "ab")], {"a": MAP, "b": MAP, "y": END}, "a"),
        ([("a", "x"), ("b", "a"), ("c", "ab"), ("y", "c")], {"a": MAP, "b": MAP, "c": MAP, "y": END}, "c"),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": MAP, "b": ONE, "y": END}, "a"),
        ([("n", "x"), ("a", "x"), ("y", "an")], {"n": None, "a": MAP, "y": END}, "a"),
        ([("a", "x"), ("w", ""), ("y", "aw")], {"a": MAP, "w": (5, 8), "y": END}, "a"),
        ([("a", "x"), ("idle", "x"), ("y", "a")], {"a": MAP, "idle": MAP, "y": END}, "a"),
        ([("a", "x"), ("t", "a"), ("b", "t"), ("y", "b")], {"a": MAP, "t": (), "b": MAP, "y": END}, "b"),
        ([("a", "x"), ("f", "a"), ("y", "f")], {"a": MAP, "f": (1, 8, 16), "y": END}, "a"),
        ([("a", "x"), ("f", "a"), ("y", "f")], {"a": MAP, "f": (1, 17, 8), "y": END}, None),
        ([("a", "x"), ("f", "a"), ("b", "f"), ("y", "b")], {"a": MAP, "f": (1, 17, 8), "b": MAP, "y": END}, "b"),
        ([("a", "x"), ("b", "a"), ("c", "b"), ("y", "c")], {"a": MAP, "b": ONE, "c": MAP, "y": END}, "a"),
        ([("a", "x"), ("b", "a"), ("c", "b"), ("y", "c")], {"a": MAP, "b": ONE, "c": (1, 1, 1, 8), "y": END}, "a"),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": (1, 4, 4, 8), "b": (1, 8), "y": END}, None),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": (1, 4, 4, 8), "b": (1, 1, 1, 8), "y": END}, None),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": (1, 4, 4, 8), "b": (1, 16, 8), "y": END}, None),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": MAP, "b": (1, 20, 1, 1), "y": END}, "a"),
        ([("a", "x"), ("y", "ax")], {"a": MAP, "y": END}, None),
        ([("y", "x")], {"y": END}, None),
        ([("a", "x"), ("f", "a"), ("t", "f"), ("y", "t")], {"a": MAP, "f": FLAT, "t": TURNED, "y": END}, "a"),
        ([("a", "x"), ("t", "a"), ("y", "t")], {"a": MAP, "t": TURNED, "y": END}, None),
        ([("a", "x"), ("f", "a"), ("m", "f"), ("y", "m")], {"a": MAP, "f": FLAT, "m": FLAT, "y": END}, None),
        ([("a", "x"), ("t", "a"), ("m", "t"), ("y", "m")], {"a": MAP, "t": TURNED, "m": TURNED, "y": END}, None),
        ([("a", "x"), ("t", "a"), ("m", "t"), ("s", "tm"), ("y", "s")],
         {"a": MAP, "t": TURNED, "m": (1, 16, 9), "s": TURNED, "y": END}, None),
        ([("a", "x"), ("f", "a"), ("t", "f"), ("y", "t")], {"a": MAP, "f": (1, 128), "t": TURNED, "y": END}, None),
        ([("a", "x"), ("f", "a"), ("t", "f"), ("y", "t")], {"a": MAP, "f": (), "t": TURNED, "y": END}, None),
        ([("a", "x"), ("p", "a"), ("t", "p"), ("y", "t")], {"a": MAP, "p": END, "t": (1, 4, 2), "y": END}, "a"),
        ([("a", "x"), ("f", "a"), ("t", "f"), ("y", "t")],
         {"a": (1, 16, 4, 4), "f": (1, 16, 16), "t": (1, 16, 16), "y": (1, 16)}, None),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": MAP, "b": (1, 4, 4, 8), "y": (1, 128)}, None),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": (1, 4, 4, 4), "b": (1, 4, 4, 4), "y": (1, 4)}, None),
        ([("a", "x"), ("b", "a"), ("y", "b")], {"a": (1, 4, 4, 4), "b": (1, 4, 1, 1), "y": (1, 4)}, "a"),
        ([("a", "x"), ("b", "a"), ("p", "b"), ("y", "p")], {"a": (1, 4, 4, 8), "b": MAP, "p": ONE, "y": END}, "b"),
        ([("a", "x"), ("f", "a"), ("b", "f"), ("y", "b")],
         {"a": MAP, "f": FLAT, "b": (1, 1, 8, 16), "y": (1, 1)}, None),
        ([("a", "x"), ("p", "a"), ("t", "p"), ("y", "t")], {"a": MAP, "p": ONE, "t": (1, 4, 2), "y": END}, "a"),
        ([("a", "x"), ("b", "a"), ("p", "b"), ("y", "p")],
         {"a": MAP, "b": (1, 128, 1, 1), "p": TURNED, "y": END}, None),
    ],
    ids=[
        "chain", "leapt over", "joined", "one position", "a size", "a weight", "a branch nobody reads", "a split",
        "flattened", "tokens", "tokens and a map", "copies of one position", "one position, channels last",
        "channels last", "channels last, pooled", "channels last, flattened", "a convolution over all",
        "the image read again", "no map", "flattened, then turned", "turned", "flattened, then mixed",
        "turned, then mixed", "turned, then mixed beside", "flattened to one, then tokens", "split into tokens",
        "pooled, then in groups", "as many channels as positions", "turned to channels last, flattened",
        "a cube", "a cube, pooled with its axes kept", "channels last turned back", "tokens as an image of one channel",
        "pooled with its axes kept, then in groups", "all positions as channels, then tokens",
    ],
)  # fmt: skip
def test_the_last_map(calls, shapes, expected):
    assert last_map(calls, {"x": (1, 3, 9, 9), **shapes}, "x", "y") == expected


def test_what_carries_a_gradient():
    floating = torch.zeros(1, 2)
    assert extent(floating) == (1, 2)
    assert extent((floating, 3)) == extent({"a": [floating]}) == ()
    assert [extent(one) for one in (torch.zeros(2, dtype=torch.long), floating.shape, 3, None, "a")] == [None] * 5


# --- the engines ---

ENGINES = ("pruned", "dense", "together")


def explainer_of(engine, model, table):
    if engine != "together":
        return Explainer(model, table, backward=engine)
    made = Explainer(model, table, backward="pruned")
    made._runtime._pruned = PrunedEngine(private_view(model), table, together=True)  # as on a GPU
    return made


def assert_equals_oracle(model, table, images, options, relative=1e-8, engines=ENGINES):
    expected, answers = maps.explain_batch(model, table, images, options)
    for engine in engines:
        found = explain_with(explainer_of(engine, model, table), images, options)
        assert_each_close(found.attributions, expected, relative)
        assert found.identity_layers.tolist() == [answer.identity_layers for answer in answers], engine
    assert float(np.abs(expected).max()) > 0


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "probability"])
def test_with_every_option_it_equals_the_oracle(variant):
    model = build()
    options = [Options(target=t, **VARIANTS[variant], seed="evidence") for t in (1, None)]
    assert_equals_oracle(model, table_for(model), batch(2), options)


TRACED = [one for one in networks.ALL if one not in (networks.Hooked, networks.ViewedOutput, networks.SlicedRelu)]


@pytest.mark.parametrize("network", TRACED, ids=by_name)
def test_with_every_kind_of_network_it_equals_the_oracle(network):
    model = build(network)
    options = [Options(target=t, quantile=0.3, layers=used(model), seed="evidence") for t in (0, 3)]
    twice = network in (networks.ReusedConvolution, networks.ReusedBeforePooling)
    assert_equals_oracle(model, table_for(model), batch(2), options, engines=("dense",) if twice else ENGINES)


# Large enough for the last maps of theirs to have several positions.
LAST = {
    "squeezenet1_1": "classifier_2",
    "mobilenet_v2": "features_18_2",
    "resnet18": "layer4_1_relu_1",
    "vgg11_bn": "avgpool",
    "densenet121": "relu",
    "efficientnet_b0": "features_8_2",
    "convnext_tiny": "iadd_17",
}


@pytest.mark.parametrize("name", LAST)
def test_with_families_it_equals_the_oracle(name):
    model = test_families.network(name)
    images = torch.rand(1, 3, 65, 65, generator=torch.Generator().manual_seed(3)).double()
    table = SelectionTable.random(model, test_families.CLASSES, 0)
    assert_equals_oracle(model, table, images, [Options(seed="evidence")])
    dense = Explainer(model, table, backward="dense")
    found = dense.explain(images, seed="evidence").attributions
    assert [str(node) for node in dense._runtime._dense._last_maps.values()] == [LAST[name]]
    assert relative_l2(found, dense.explain(images).attributions) > 0.1


class Pooled(networks.Branching):
    """The maximum over all positions: looked at before the ReLU that it follows."""

    def forward(self, images):
        z = F.relu(self.join(F.relu(self.norm(self.stem(images)))))
        return self.head(F.max_pool2d(z, z.shape[-1]).flatten(1))


class GlobalDepthwise(networks.Branching):
    """A depthwise convolution over all positions: what comes back is of the selected channels alone."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Conv2d(12, 12, 6, groups=12)

    def forward(self, images):
        z = F.silu(self.join(F.relu(self.norm(self.stem(images)))))
        return self.head(self.pool(z).flatten(1))


class OneConvolution(nn.Module):
    """Its first convolution gives its last map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, images):
        return self.head(F.relu(self.stem(images)).mean((2, 3)))


@pytest.mark.parametrize("network", [Pooled, GlobalDepthwise, OneConvolution], ids=by_name)
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
def test_shortcuts_at_the_last_map_are_as_dense(network, method):
    model = build(network)
    table, layers = table_for(model), used(model)
    options = {"quantile": 0.4, "layers": layers, "seed": "evidence", "method": method, "steps": 3}
    expected = Explainer(model, table, backward="dense").explain(batch(2), [1, 3], **options).attributions
    assert float(expected.abs().amax((1, 2, 3)).min()) > 0
    for engine in ("pruned", "together"):
        found = explainer_of(engine, model, table).explain(batch(2), [1, 3], **options).attributions
        assert_each_close(found, expected, 1e-10)
    plain = Explainer(model, table).explain(batch(2), [1, 3], **{**options, "seed": "logit"}).attributions
    assert relative_l2(expected, plain) > 1e-3 or network is Pooled  # a maximum is of one position


class Shrinking(networks.Branching):
    """Where its last map is depends on the picture's size: behind the small pooling or before it."""

    def forward(self, images):
        z = F.adaptive_avg_pool2d(F.relu(self.norm(self.stem(images))), images.shape[-1] // 12)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


def test_the_last_map_is_found_for_each_size():
    model = build(Shrinking)
    table, layers = table_for(model), used(model)
    options = {"seed": "evidence", "quantile": 0.3, "layers": layers}
    explainers = [explainer_of(engine, model, table) for engine in ENGINES]
    for size in (12, 24, 12):
        images = batch(2, size)
        expected, _ = maps.explain_batch(
            model, table, images, [Options(target=t, seed="evidence", quantile=0.3, layers=layers) for t in (1, 3)]
        )
        for explainer in explainers:
            assert_each_close(explainer.explain(images, [1, 3], **options).attributions, expected, 1e-8)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["gradient", "smoothgrad"])
def test_a_mixed_batch_equals_one_by_one(engine, method):
    model, images = build(), batch(5)
    explainer = explainer_of(engine, model, table_for(model))
    columns = {
        "seed": ["evidence", "logit", "evidence", "probability_weighted_logit", None],
        "gamma": [math.inf, math.inf, 3.0, math.inf, math.inf],
        "selection": ["class", "class", "instance", "class", "class"],
        "rule": [True, True, True, True, False],
        "quantile": [0.3, 0.1, 0.4, 0.3, 0.3],
        "method": [method] * 5,
        "samples": [3] * 5,
    }
    together = explainer.explain(images, [0, 1, 2, 3, 4], **columns)
    for i in range(5):
        alone = explainer.explain(images[i : i + 1], i, **{name: values[i] for name, values in columns.items()})
        assert_each_close(together.attributions[i : i + 1], alone.attributions, 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_with_no_evidence_has_the_logits_map(engine):
    """Class 1 is seen nowhere: everything after the last ReLU speaks against it."""
    model = build()
    with torch.no_grad():
        model.head.weight[1] = -model.head.weight[1].abs()
    explainer = explainer_of(engine, model, table_for(model))
    found = explainer.explain(batch(2), [1, 2], seed="evidence", quantile=0.4).attributions
    plain = explainer.explain(batch(2), [1, 2], quantile=0.4).attributions
    assert_each_close(found[:1], plain[:1], 1e-12)
    assert relative_l2(found[1], plain[1]) > 0.01


def test_scaling_the_logits_scales_the_map():
    model, scaled = build(), build()
    with torch.no_grad():
        scaled.head.weight.mul_(1e-4)
    options = {"seed": "evidence", "quantile": 0.3}
    found, expected = (
        Explainer(m, table_for(m)).explain(batch(2), [1, 2], **options).attributions for m in (scaled, model)
    )
    assert_each_close(found / 1e-4, expected, 1e-10)


def test_changed_weights_are_seen_by_both_engines():
    model = build()
    table, options = table_for(model), {"seed": "evidence", "quantile": 0.3}
    explainers = [explainer_of(engine, model, table) for engine in ENGINES]
    for explainer in explainers:
        explainer.explain(batch(1), 1, **options)
    with torch.no_grad():
        model.join.weight.mul_(-0.7)
    expected = Explainer(copy.deepcopy(model), table, backward="dense").explain(batch(1), 1, **options).attributions
    for explainer in explainers:
        assert_each_close(explainer.explain(batch(1), 1, **options).attributions, expected, 1e-10)


def test_images_that_are_not_finite_are_left_to_the_dense_engine():
    model, images = build(), batch(2)
    images[0, 0, 3, 3] = math.nan
    explainer = Explainer(model, table_for(model), backward="pruned")
    found = explainer.explain(images, [1, 2], seed="evidence").attributions
    alone = explainer.explain(images[1:], 2, seed="evidence").attributions
    assert_each_close(found[1:], alone, 1e-10)


def test_no_score_says_what_the_attributions_should_add_up_to():
    model = build(networks.Smooth)
    explainer = Explainer(model, table_for(model))
    options = {"method": "integrated_gradients", "steps": 3, "rule": False}
    gap = explainer.explain(batch(2), 1, seed=["evidence", "logit"], **options).completeness_gap
    assert gap.isnan().tolist() == [True, False]


# --- what is refused ---


class Tokens(nn.Module):
    """A small vision transformer: a token of no place, mixed with those of places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.mix = nn.Linear(10, 10)
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, images):
        z = self.stem(images).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(images.shape[0], 1, 8), z], 1)
        return self.head(F.gelu(self.mix(z.transpose(1, 2))).mean(2))


class PooledTokens(nn.Module):
    """A small vision transformer without a token of its own: mixed, and then pooled."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(9, 9)
        self.head = nn.Linear(8, networks.CLASSES)

    def mixed(self, tokens):
        return tokens + self.mix(tokens.transpose(1, 2)).transpose(1, 2)

    def forward(self, images):
        return self.head(self.mixed(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


class Attention(PooledTokens):
    def mixed(self, tokens):
        return tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)


class MixedFlat(PooledTokens):
    def forward(self, images):
        return self.head(self.mix(self.stem(images).flatten(2)).mean(2))


class ChannelsLast(nn.Module):
    """As many channels as rows and columns, and they are last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 4, stride=4)
        self.head = nn.Linear(3, networks.CLASSES)

    def forward(self, images):
        return self.head(F.relu(self.stem(images).permute(0, 2, 3, 1)).mean((1, 2)))


class Untraceable(networks.Branching):
    """What it computes depends on the values."""

    def forward(self, images):
        return super().forward(images if float(images.detach().sum()) > 1e9 else images * 2)


NONE = r"no value \(batch, channels, height, width\) of this network lies on every path to its logits"
REFUSED = {
    **dict.fromkeys((Tokens, PooledTokens, Attention, MixedFlat, ChannelsLast), NONE),
    Untraceable: "where its last map is cannot be told: The network's calls cannot be traced: ",
    networks.Hooked: "where its last map is cannot be told: Module 'right' has forward hooks, ",
    networks.SlicedRelu: "where its last map is cannot be told: 'relu_' writes into a tensor that is read through",
}


@pytest.mark.parametrize("network", REFUSED, ids=by_name)
def test_a_network_without_a_last_map_is_refused_by_name_and_goes_on_working(network):
    model = build(network)
    explainer, layers = Explainer(model, table_for(model)), used(model)
    before = explainer.explain(batch(2), 1, layers=layers).attributions
    for seed in ("evidence", ["logit", "evidence"]):
        message = "Option 'seed' is 'evidence'; allowed: logit, probability_weighted_logit; " + REFUSED[network]
        with pytest.raises(OptionError, match=message) as caught:
            explainer.explain(batch(2), 1, layers=layers, seed=seed)
        assert (caught.value.option, caught.value.value) == ("seed", "evidence")
    assert torch.equal(explainer.explain(batch(2), 1, layers=layers).attributions, before)


def test_a_trace_that_is_another_function_is_refused(monkeypatch):
    model = build()
    explainer = Explainer(model, table_for(model), backward="dense")
    monkeypatch.setattr("parchgrad.runtimes.dense._Calls.__call__", lambda self, images: self.run(images * 1.01))
    with pytest.raises(OptionError, match="the network as it was traced answers something else than the network"):
        explainer.explain(batch(1), 1, seed="evidence")


def test_a_trace_that_fails_is_refused_and_want_of_memory_is_not(monkeypatch):
    model = build()
    explainer = Explainer(model, table_for(model))

    def failing(self, images):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr("parchgrad.runtimes.dense._Calls.__call__", failing)
        error = MemoryError()
        with pytest.raises(MemoryError):
            explainer.explain(batch(1), 1, seed="evidence")
        error = ValueError("of a size that was not foreseen")
        with pytest.raises(OptionError, match="as it was traced fails where the network itself does not"):
            Explainer(model, table_for(model)).explain(batch(1), 1, seed="evidence")
    assert explainer.explain(batch(1), 1, seed="evidence").attributions.isfinite().all()  # nothing was remembered


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_refused_for_the_weights_is_not_for_good(engine):
    model = build()
    explainer = explainer_of(engine, model, table_for(model))
    with torch.no_grad():
        kept = model.head.bias.clone()
        model.head.bias[0] = math.nan
    # Class 0 has no answer, the others have theirs.
    assert explainer.explain(batch(1), 1, seed="evidence").attributions.isfinite().all()
    assert not explainer._runtime._dense._last_maps  # held against noise that had an answer for part of the classes
    with torch.no_grad():
        model.head.bias.copy_(kept)
    assert explainer.explain(batch(1), 1, seed="evidence").attributions.isfinite().all()
    assert len(explainer._runtime._dense._last_maps) == 1


@pytest.mark.parametrize("fault", [ValueError("for now"), None], ids=["raises", "another answer"])
def test_a_trace_that_failed_once_is_asked_again(fault, monkeypatch):
    model = build()
    explainer = Explainer(model, table_for(model))

    def other(self, images):
        if fault is not None:
            raise fault
        return self.run(images * 1.01)

    with monkeypatch.context() as broken:
        broken.setattr("parchgrad.runtimes.dense._Calls.__call__", other)
        with pytest.raises(OptionError, match="as it was traced"):
            explainer.explain(batch(1), 1, seed="evidence")
    assert explainer.explain(batch(1), 1, seed="evidence").attributions.isfinite().all()


def test_a_known_size_waits_for_no_search_of_another():
    model = build()
    explainer = Explainer(model, table_for(model))
    before = explainer.explain(batch(1), 1, seed="evidence").attributions
    found = []
    thread = threading.Thread(
        target=lambda: found.append(explainer.explain(batch(1), 1, seed="evidence").attributions), daemon=True
    )
    with explainer._runtime._dense._looking:
        thread.start()
        thread.join(20)
        assert len(found) == 1
    assert torch.equal(found[0], before)


def test_the_remembered_last_map_may_be_forgotten_by_another_thread():
    """Between a look and the reading of what was there: here at each."""

    class Forgetful(dict):
        def __contains__(self, size):
            found = super().__contains__(size)
            self.clear()
            return found

        def get(self, size, default=None):
            found = super().get(size, default)
            self.clear()
            return found

    model = build()
    explainer = Explainer(model, table_for(model), backward="pruned")
    before = explainer.explain(batch(1), 1, seed="evidence").attributions
    compiled = explainer._runtime._pruned._compiled
    object.__setattr__(compiled, "last_maps", Forgetful(compiled.last_maps))
    explainer._runtime._dense._last_maps = Forgetful(explainer._runtime._dense._last_maps)
    assert torch.equal(explainer.explain(batch(1), 1, seed="evidence").attributions, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_after_an_exception_everything_is_as_before(engine, monkeypatch):
    model = build()
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    explainer = explainer_of(engine, model, table_for(model))
    before = explainer.explain(batch(2), 1, seed="evidence").attributions
    with monkeypatch.context() as broken:
        for place in ("dense", "pruned.program"):
            broken.setattr(f"parchgrad.runtimes.{place}.weighed", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            explainer.explain(batch(2), 1, seed="evidence")
    assert torch.equal(explainer.explain(batch(2), 1, seed="evidence").attributions, before)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_model_package_is_looked_at_in_its_own_size_before_there_are_images():
    class Package:
        class preprocessing:  # noqa: N801
            size, rule = (12, 12), "stretch"

    explainer = Explainer(build(Tokens), table_for(build(Tokens)))
    from parchgrad.options import Options as Given

    explainer.require_statistics([Given(seed="evidence")])  # of a bare network no size is known
    explainer.model = Package()
    explainer.require_statistics([Given()])
    with pytest.raises(OptionError, match="Option 'seed' is 'evidence'"):
        explainer.require_statistics([Given(), Given(seed="evidence")])
    Package.preprocessing.rule = "native"  # each picture has its own size
    explainer.require_statistics([Given(seed="evidence")])
    with pytest.raises(OptionError, match="Option 'seed' is 'evidence'"):
        explainer.explain(batch(1), 1, seed="evidence")


def test_without_looking_only_what_is_known_is_refused(monkeypatch):
    from parchgrad.options import Options as Given

    explainer = Explainer(build(Tokens), table_for(build(Tokens)))
    asked, size = [Given(seed="evidence")], (3, 12, 12)
    with monkeypatch.context() as blind:
        blind.setattr(type(explainer._runtime._dense), "_found_last_map", lambda *given: 1 / 0)
        explainer.require_statistics(asked, size, look=False)
    with pytest.raises(OptionError):
        explainer.require_statistics(asked, size)
    with pytest.raises(OptionError, match="Option 'seed' is 'evidence'"):
        explainer.require_statistics(asked, size, look=False)
