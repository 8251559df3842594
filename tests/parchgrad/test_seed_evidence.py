"""The seed `evidence`: its weights, where they act, and both engines against the map oracle."""

import copy
import math

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
    grad, values = drawn(1, 5, 3, 3, dtype=torch.float16) * 1e-3, drawn(1, 5, 3, 3, dtype=torch.float16, seed=1)
    found = weighed(grad, values)
    assert found.dtype == torch.float16
    assert_close(found.double(), weighed(grad.double(), values.double()), 1e-3)


# --- the last map ---

MAP, ONE, END = (1, 8, 4, 4), (1, 8, 1, 1), (1, 8)


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
    ],
    ids=[
        "chain", "leapt over", "joined", "one position", "a size", "a weight", "a branch nobody reads", "a split",
        "flattened", "tokens", "tokens and a map", "copies of one position", "one position, channels last",
        "channels last", "channels last, pooled", "channels last, flattened", "a convolution over all",
        "the image read again", "no map",
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


class Untraceable(networks.Branching):
    """What it computes depends on the values."""

    def forward(self, images):
        return super().forward(images if float(images.detach().sum()) > 1e9 else images * 2)


REFUSED = {
    Tokens: r"no value \(batch, channels, height, width\) of this network lies on every path to its logits\.$",
    Untraceable: "where its evidence is cannot be told: The network's calls cannot be traced: ",
    networks.Hooked: "where its evidence is cannot be told: Module 'right' has forward hooks, ",
    networks.SlicedRelu: "where its evidence is cannot be told: 'relu_' writes into a tensor that is read through",
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
            size = (12, 12)

    explainer = Explainer(build(Tokens), table_for(build(Tokens)))
    from parchgrad.options import Options as Given

    explainer.require_statistics([Given(seed="evidence")])  # of a bare network no size is known
    explainer.model = Package()
    explainer.require_statistics([Given()])
    with pytest.raises(OptionError, match="Option 'seed' is 'evidence'"):
        explainer.require_statistics([Given(), Given(seed="evidence")])
