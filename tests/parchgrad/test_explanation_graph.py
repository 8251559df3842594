"""The explanation graph against the dense PyTorch engine: the rule, the mixed batch, convolutions of every kind.

Each network is traced once in float32. Widened to float64 it is run by onnx's own evaluator and must agree to 1e-9;
as it is, by ONNX Runtime, to 1e-4 of the map's size.
"""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.graph.explanation import BACKWARDS, explanation_graph
from parchgrad.graph.prediction import trace_prediction
from parchgrad.rule import CONSERVE
from parchgrad.tables import SelectionTable
from tests.oracles.tolerance import array, assert_each_close, relative_l2
from tests.parchgrad import networks
from tests.parchgrad.graphs import INFINITY, Session, reference, widened
from tests.parchgrad.networks import CLASSES, Branching, build, table_for

EXACT, NEAR = 1e-9, 1e-4


class Kinds(nn.Module):
    """Convolutions of the other kinds: each stride, group and padding goes back in a way of its own."""

    def __init__(self):
        super().__init__()
        self.even = nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.widening = nn.Conv2d(8, 16, (3, 2), padding=(1, 0), groups=8)
        self.strided_groups = nn.Conv2d(16, 12, 3, stride=(2, 1), padding=2, dilation=2, groups=4)
        self.valid = nn.Conv2d(12, 8, (1, 2))
        self.much_padded = nn.Conv2d(8, 6, 2, padding=3, padding_mode="replicate")
        self.reaching_out = nn.Conv2d(6, 6, 1, padding=2)  # its padding is wider than its kernel
        self.skip = nn.Conv2d(8, 6, 1, stride=2)
        self.same = nn.Conv2d(6, 7, (2, 4), padding="same")
        self.head = nn.Linear(7, CLASSES)

    def forward(self, images):
        z = F.relu(self.norm(self.depthwise(F.relu(self.even(images)))))
        y = F.leaky_relu(self.strided_groups(F.relu(self.widening(z))), 0.25)
        y = self.reaching_out(torch.tanh(self.much_padded(self.valid(y))))
        y = y + self.skip(z).mean((2, 3), keepdim=True)
        return self.head(F.relu(self.same(y)).mean((2, 3)))


class Pooled(nn.Module):
    """Overlapping max and average pooling between branches, a gate and a join of channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.left = nn.Conv2d(8, 6, 3, padding=1)
        self.right = nn.Conv2d(8, 5, 1)
        self.down = nn.Conv2d(11, 9, 3, stride=2, padding=1, padding_mode="reflect")
        self.head = nn.Linear(9, CLASSES)

    def forward(self, images):
        z = F.max_pool2d(F.relu(self.norm(self.stem(images))), 3, 2, 1)
        z = z * torch.sigmoid(self.excite(F.silu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        z = torch.cat([self.left(z), F.avg_pool2d(self.right(z), 3, 1, 1)], 1)
        return self.head(F.relu(self.down(F.max_pool2d(F.elu(z), 2, 1))).mean((2, 3)))


class Mobile(nn.Module):
    """Depthwise convolutions between pointwise ones, poolings beside convolutions and behind ReLUs, and a gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depth_norm = nn.BatchNorm2d(12)
        self.narrow = nn.Conv2d(12, 8, 1)
        self.strided = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
        self.multiplied = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(16, 6, 1)
        self.excite = nn.Conv2d(6, 16, 1)
        self.last = nn.Conv2d(16, 10, 3)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, images):
        z = F.max_pool2d(F.relu(F.relu(self.stem_norm(self.stem(images)))), 3, 2, 1)
        y = F.hardswish(self.depth_norm(self.depth(F.silu(self.wide(z)))))
        z = F.max_pool2d(self.narrow(y) + z, 2, 1)
        z = F.max_pool2d(self.strided(z), 2, 1, 1)
        z = F.relu6(self.multiplied(z))
        z = z * F.hardsigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        return self.head(F.max_pool2d(F.gelu(self.last(z)), 2, 2, ceil_mode=True).mean((2, 3)))


class BeforePooling(Branching):
    """A convolution straight before the mean: its gradient is the same everywhere, and passes unchanged."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        return self.head(self.join(z).mean((2, 3)))


class Small(Branching):
    """A plain one."""

    def forward(self, images):
        z = F.relu(self.left(F.relu(self.norm(self.stem(images)))))
        return self.head(F.relu(self.join(z)).mean((2, 3)))


# By 0.7 one multiplies, and by 1/6 the other's gate, which in the graph are a float32's.
ROUNDED = {networks.InPlaceOnBranch: 1e-7, Mobile: 1e-7}


@lru_cache
def traced(network, size=(12, 13), native=False):
    """The network in float32 and its prediction graph."""
    model = build(network, dtype=torch.float32)
    return model, trace_prediction(model, size, native)


# Its weights are computed while it is exported: its float64 graph is exported as such.
COMPUTING = (networks.Parametrized,)


def exported_wide(network, size):
    return trace_prediction(build(network, dtype=torch.float32).double(), size, False)


def table_of(model, prediction, **given):
    """A table of the layers that take part."""
    table = table_for(model, **given)
    running = {name: layer for name, layer in table.layers.items() if name in prediction.layers.values()}
    idle = tuple(name for name in table.layers if name not in running)
    return replace(table, layers=running, idle_layers=idle)


def images_of(batch, size=(12, 13), seed=0):
    """Of float32, so that both types see the same pictures."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator)


def explained(model, table, images, targets, quantile, gamma, conserve, dtype=torch.float64):
    """By the dense engine; quantile 0 is a layer that the rule leaves alone. A copy of the model is used."""
    batch, names = len(images), table.layer_names
    wide = np.broadcast_to(
        np.asarray(quantile, dtype=np.float64).reshape(-1, np.shape(quantile)[-1] if np.ndim(quantile) == 2 else 1),
        (batch, len(names)),
    )
    options = {
        "rule": [bool((row > 0).any()) for row in wide],
        "layers": [[n for n, q in zip(names, row, strict=True) if q > 0] or ["*"] for row in wide],
        "quantile": [{n: float(q) for n, q in zip(names, row, strict=True) if q > 0} or 0.5 for row in wide],
        "gamma": list(np.broadcast_to(gamma, (batch,)).astype(float)),
    }
    twin = build(type(model), dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    return Explainer(twin.to(dtype).eval(), table, backward="dense").explain(
        images.to(dtype), targets, conserve=conserve, uncovered="nan", **options
    )


def assert_same(found, expected, tolerance=None, norm=None):
    """Every output of the graph; numbers entry by entry, or each map by its norm."""
    for name in ("identity_layers", "covered"):
        assert found[name].tolist() == getattr(expected, name).tolist(), name
    assert found["target"].tolist() == expected.targets.tolist()
    pairs = [
        (found["attributions"], expected.attributions),
        (found["saliency"], expected.saliency()),
        (found["logits"], expected.logits),
        (found["probabilities"], expected.probabilities()),
    ]
    for ours, theirs in pairs:
        if tolerance is not None:
            assert_each_close(ours, theirs, tolerance)
            continue
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(np.isnan(one), np.isnan(array(other)))
            assert np.isnan(one).all() or relative_l2(one, other) <= norm


def assert_as_dense(network, images, targets, quantile, gamma, conserve="independent", narrow=NEAR, **given):
    """In float64 and float32, by both backward passes; the float64 explanation."""
    model, prediction = traced(network, tuple(images.shape[2:]))
    wide = exported_wide(network, tuple(images.shape[2:])) if network in COMPUTING else widened(prediction)
    table = table_of(model, prediction, **given)
    expected = explained(model, table, images, targets, quantile, gamma, conserve)
    for backward in BACKWARDS:
        graph = explanation_graph(wide, table, backward=backward, conserve=conserve)
        found = reference(graph, images.double().numpy(), targets, quantile, gamma)
        assert found["attributions"].dtype == np.float64
        assert_same(found, expected, ROUNDED.get(network, EXACT))
        graph = explanation_graph(prediction, table, backward=backward, conserve=conserve)
        onnx.checker.check_model(graph, full_check=True)
        assert_same(Session(graph)(images.numpy(), targets, quantile, gamma), expected, norm=narrow)
    return expected


MIXED = {
    "targets": [1, 2, -1, 0, -1, 4],
    "quantile": [0.1, 0.3, 1.0, 0.0, 0.5, 0.3],
    "gamma": [INFINITY, 3.0, INFINITY, 1.0, 0.0, INFINITY],
}
# What PyTorch exports with operators that have no rule: transposed convolutions, and writing into a part.
WITHOUT_A_RULE = {
    networks.Transposed: "ConvTranspose",
    networks.ViewedOutput: "ScatterND",
    networks.SlicedRelu: "ScatterND",
}
TRACEABLE = [
    network
    for network in networks.ALL
    if network not in (networks.ReusedConvolution, networks.ReusedBeforePooling, *WITHOUT_A_RULE)
] + [Kinds, Pooled, Mobile, BeforePooling]


@pytest.mark.parametrize("network", TRACEABLE, ids=lambda one: one.__name__)
@pytest.mark.parametrize("conserve", CONSERVE)
def test_a_mixed_batch_is_as_dense(network, conserve):
    if conserve != "independent" and network not in (
        Branching,
        networks.OnePosition,
        Kinds,
        Pooled,
        Mobile,
        BeforePooling,
    ):
        pytest.skip("how the factors are found does not depend on what the network is made of")
    size = (25, 28) if network in (Kinds, Pooled, Mobile) else (12, 13)
    expected = assert_as_dense(network, images_of(6, size), **MIXED, conserve=conserve)
    layers = int(expected.layers_used[0])
    assert expected.layers_used.tolist() == [layers, layers, layers, 0, layers, layers]
    assert expected.identity_layers[2] == layers, "all channels are selected: nothing is left to be weighed"
    assert expected.identity_layers[3] == 0
    assert float(expected.attributions.abs().amax((1, 2, 3)).min()) > 0


@pytest.mark.parametrize("conserve", CONSERVE)
def test_wide_maps(conserve):
    """Where there are few positions the gradient goes back in another way than where there are many."""
    assert_as_dense(Branching, images_of(6, (24, 26)), **MIXED, conserve=conserve)


@pytest.mark.parametrize("conserve", CONSERVE)
def test_a_quantile_for_each_layer(conserve):
    generator = np.random.default_rng(3)
    quantile = generator.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0], size=(6, 4)).astype(np.float32)
    quantile[4], quantile[5] = 0.0, [0.0, 0.0, 0.5, 0.0]
    # A layer off is another thing than all of its channels: only the second counts as unchanged.
    quantile[3] = [0.0, 1.0, 0.5, 0.5]
    expected = assert_as_dense(
        Branching,
        images_of(6),
        [0, 1, 2, 3, 4, -1],
        quantile.astype(np.float64).round(6),
        [INFINITY, 2.0, 0.5] * 2,
        conserve,
    )
    assert expected.identity_layers[3] == 1
    assert expected.layers_used.tolist() == (quantile > 0).sum(1).tolist()


def test_quantiles_as_decimals_were_meant():
    """0.1 as a float32 is a little more than 0.1, 0.3 a little more than 0.3; 0.7 less: 7 of 10 all the same."""

    class Ten(Branching):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
            self.join = nn.Conv2d(10, 100, 3)
            self.head = nn.Linear(100, CLASSES)

        def forward(self, images):
            return self.head(F.relu(self.join(F.relu(self.norm(self.stem(images))))).mean((2, 3)))

    model, prediction = traced(Ten)
    table = table_of(model, prediction)
    quantiles = [0.01, 0.1, 0.29, 0.3, 0.57, 0.58, 0.7, 0.9, 0.001, 0.29999, 1 / 3]
    images, targets = images_of(1).expand(len(quantiles), -1, -1, -1), [1] * len(quantiles)
    expected = explained(
        model, table, images, targets, np.array(quantiles)[:, None].repeat(2, 1), INFINITY, "independent"
    )
    for backward in BACKWARDS:
        graph = explanation_graph(widened(prediction), table, backward=backward)
        assert_same(reference(graph, images.double().numpy(), targets, quantiles, INFINITY), expected, EXACT)


GAMMAS = [0.0, 2.0**-20, 0.125, 1.0, 37.0, 1e6, INFINITY]  # a float32 holds them


@pytest.mark.parametrize("conserve", CONSERVE)
def test_every_gamma(conserve):
    images = images_of(1).expand(len(GAMMAS), -1, -1, -1)
    assert_as_dense(Branching, images, [2] * len(GAMMAS), 0.3, GAMMAS, conserve)


@pytest.mark.parametrize("conserve", CONSERVE)
def test_layers_of_one_position(conserve):
    """Of squeeze-and-excitation, and a whole network whose maps have shrunk to one."""
    assert_as_dense(networks.OnePosition, images_of(4), [0, 1, 2, 3], 0.5, [INFINITY, 2.0, 0.0, INFINITY], conserve)
    assert_as_dense(Small, images_of(4, (2, 2)), [0, 1, 2, 3], 0.5, [INFINITY, 2.0, 0.0, INFINITY], conserve)


@pytest.mark.parametrize("conserve", CONSERVE)
def test_a_constant_gradient_passes_unchanged(conserve):
    expected = assert_as_dense(
        BeforePooling, images_of(4), [0, 1, 2, 3], [0.4, 0.3, 0.5, 0.7], [INFINITY, 2.0, 0.5, INFINITY], conserve
    )
    assert expected.identity_layers.tolist() == [1] * 4
    assert expected.layers_used.tolist() == [2] * 4


@pytest.mark.parametrize("factor", [1e-6, 1e-20, 1e12])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_gradient_scaled_is_a_map_scaled(factor, backward):
    model, prediction = traced(Branching)
    table = table_of(model, prediction)
    scaled = onnx.ModelProto()
    scaled.CopyFrom(prediction.model)
    heads = [one for one in scaled.graph.initializer if one.name.startswith("head.")]
    assert len(heads) == 2
    for one in heads:
        one.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one) * np.float32(factor), one.name))
    asked = images_of(3).numpy(), [0, 1, 2], [0.1, 0.5, 0.3], [INFINITY, 2.0, 0.5]
    for conserve in CONSERVE:
        before = Session(explanation_graph(prediction, table, backward=backward, conserve=conserve))(*asked)
        graph = explanation_graph(replace(prediction, model=scaled), table, backward=backward, conserve=conserve)
        after = Session(graph)(*asked)
        assert_each_close(after["attributions"].astype(np.float64) / factor, before["attributions"], 1e-5)
        assert after["identity_layers"].tolist() == before["identity_layers"].tolist()


def test_a_target_outside_the_table_has_no_attribution():
    targets = [0, 1, 2, 3, -1, 1]
    expected = assert_as_dense(
        Branching, images_of(6), targets, [0.3, 0.3, 0.3, 0.3, 0.3, 0.0], INFINITY, covered=[4, 2, 0]
    )
    predicted = int(expected.targets[4])
    assert expected.covered.tolist() == [True, False, True, False, predicted in (4, 2, 0), True]
    assert torch.isnan(expected.attributions).flatten(1).all(1).tolist() == (~expected.covered).tolist()


def test_what_is_predicted_may_be_outside_the_table():
    model, _ = traced(Branching)
    images = images_of(8, seed=4)
    with torch.no_grad():
        common = int(model(images).argmax(1).mode().values)
    others = [c for c in range(CLASSES) if c != common]
    expected = assert_as_dense(Branching, images, [-1] * 8, 0.3, INFINITY, covered=others)
    assert not expected.covered.all()


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_mixed_batch_gives_what_each_image_gets_alone(backward):
    """To float32's rounding: a matrix product of another size may add up in another order."""
    for network, size in ((Branching, (12, 13)), (Pooled, (25, 28)), (Mobile, (25, 28))):
        model, prediction = traced(network, size)
        session = Session(explanation_graph(prediction, table_of(model, prediction), backward=backward))
        images = images_of(6, size).numpy()
        targets, quantile, gamma = MIXED["targets"], MIXED["quantile"], MIXED["gamma"]
        together = session(images, targets, quantile, gamma)
        for i in range(6):
            alone = session(images[i : i + 1], targets[i : i + 1], quantile[i : i + 1], gamma[i : i + 1])
            for name in ("attributions", "saliency", "logits", "probabilities"):
                assert_each_close(together[name][i : i + 1], alone[name], 1e-6)
            for name in ("target", "identity_layers", "covered"):
                assert together[name][i] == alone[name][0]
        turned = session(images[::-1], targets[::-1], quantile[::-1], gamma[::-1])
        assert_each_close(turned["attributions"][::-1], together["attributions"], 1e-6)


def test_the_order_of_the_table_s_layers_is_its_own():
    """Columns of `quantile` are the table's layers, whatever the order in which the network runs them."""
    model, prediction = traced(Branching)
    table = table_of(model, prediction)
    turned = replace(table, layers=dict(reversed(list(table.layers.items()))))
    quantile = np.array([[0.1, 0.5, 0.0, 0.9], [0.0, 1.0, 0.3, 0.2]])
    images, targets = images_of(2), [1, 2]
    expected = explained(model, table, images, targets, quantile, 2.0, "exact")
    for backward in BACKWARDS:
        graph = explanation_graph(widened(prediction), turned, backward=backward, conserve="exact")
        assert_same(reference(graph, images.double().numpy(), targets, quantile[:, ::-1], 2.0), expected, EXACT)


def test_layers_the_table_does_not_have_are_left_alone():
    model, prediction = traced(Branching)
    table = table_of(model, prediction)
    some = replace(table, layers={name: table.layers[name] for name in ("stem", "join")}, left_out=("left", "right"))
    images, targets = images_of(2), [1, 2]
    expected = explained(model, some, images, targets, 0.3, [INFINITY, 2.0], "independent")
    assert expected.layers_used.tolist() == [2, 2]
    for backward in BACKWARDS:
        graph = explanation_graph(widened(prediction), some, backward=backward)
        assert_same(reference(graph, images.double().numpy(), targets, 0.3, [INFINITY, 2.0]), expected, EXACT)


def test_conserve_is_the_table_s_where_it_is_not_given():
    model, prediction = traced(Branching)
    table = table_of(model, prediction, conserve="none")
    asked = images_of(1).numpy(), [1], 0.3, 2.0
    found = Session(explanation_graph(prediction, table))(*asked)["attributions"]
    of_none = Session(explanation_graph(prediction, table, conserve="none"))(*asked)["attributions"]
    of_exact = Session(explanation_graph(prediction, table, conserve="exact"))(*asked)["attributions"]
    assert np.array_equal(found, of_none)
    assert relative_l2(found, of_exact) > 0.01


def test_no_image_s_map_changes_with_other_weights_of_the_same_names():
    """Two graphs of two networks of one class: nothing is remembered between them."""
    model, prediction = traced(Small)
    other = build(Small, seed=1, dtype=torch.float32)
    table = table_of(model, prediction)
    asked = images_of(1).numpy(), [1], 0.3, INFINITY
    first = Session(explanation_graph(prediction, table))(*asked)
    Session(explanation_graph(trace_prediction(other, (12, 13), False), table))(*asked)
    again = Session(explanation_graph(prediction, table))(*asked)
    assert np.array_equal(first["attributions"], again["attributions"])


def test_the_contract_of_inputs_and_outputs():
    for native, sides in ((False, [12, 13]), (True, ["height", "width"])):
        model, prediction = traced(Small, native=native)
        before = prediction.model.SerializeToString(deterministic=True)
        for backward in BACKWARDS:
            graph = explanation_graph(prediction, table_of(model, prediction), backward=backward).graph
            shapes = {
                one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim]
                for one in (*graph.input, *graph.output)
            }
            assert shapes == {
                "images": ["batch", 3, *sides], "targets": ["batch"], "quantile": ["batch", "layers"],
                "gamma": ["batch"], "logits": ["batch", CLASSES], "probabilities": ["batch", CLASSES],
                "target": ["batch"], "saliency": ["batch", *sides], "attributions": ["batch", 3, *sides],
                "identity_layers": ["batch"], "covered": ["batch"],
            }  # fmt: skip
            assert len({node.name for node in graph.node}) == len(graph.node)
        assert prediction.model.SerializeToString(deterministic=True) == before, "the prediction is not touched"


# --- pictures of any size -----------------------------------------------------------------------------------------

SIZES = [(24, 32), (33, 26), (25, 25), (48, 31), (32, 49), (27, 40), (26, 27), (29, 29)]


@pytest.mark.parametrize("network", [Pooled, Kinds, Mobile, Branching], ids=lambda one: one.__name__)
def test_one_graph_for_pictures_of_any_size(network):
    model, prediction = traced(network, (28, 36), True)
    table = table_of(model, prediction)
    wide = widened(prediction)
    for backward in BACKWARDS:
        session = Session(explanation_graph(prediction, table, backward=backward))
        exact = explanation_graph(wide, table, backward=backward)
        for number, size in enumerate(SIZES):
            images, targets = images_of(2, size, seed=number), [1, -1]
            expected = explained(model, table, images, targets, [0.3, 0.5], [INFINITY, 2.0], "independent")
            assert_same(session(images.numpy(), targets, [0.3, 0.5], [INFINITY, 2.0]), expected, norm=NEAR)
            if number < 4:
                found = reference(exact, images.double().numpy(), targets, [0.3, 0.5], [INFINITY, 2.0])
                assert_same(found, expected, ROUNDED.get(network, EXACT))


def test_maps_of_one_position_in_a_graph_for_any_size():
    """Whether a map has one position is only known when the graph runs."""
    model, prediction = traced(Small, (28, 36), True)
    table = table_of(model, prediction)
    for backward in BACKWARDS:
        for conserve in CONSERVE:
            graph = explanation_graph(widened(prediction), table, backward=backward, conserve=conserve)
            for size in ((2, 2), (12, 13)):
                images, targets = images_of(2, size), [1, 3]
                expected = explained(model, table, images, targets, [0.3, 0.5], [INFINITY, 2.0], conserve)
                found = reference(graph, images.double().numpy(), targets, [0.3, 0.5], [INFINITY, 2.0])
                assert_same(found, expected, EXACT)


# --- what cannot be -----------------------------------------------------------------------------------------------


class Sorting(Branching):
    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        return self.head((self.join(z).flatten(2).sort(dim=2).values ** 2).mean(2))


class Summing(Branching):
    def forward(self, images):
        return self.head(self.join(self.stem(images)).cumsum(2).mean((2, 3)))


class Normalising(Branching):
    def forward(self, images):
        return self.head(F.relu(self.join(F.local_response_norm(self.stem(images), 3, 0.1))).mean((2, 3)))


REFUSED = {Sorting: "TopK", Summing: "CumSum", **WITHOUT_A_RULE}


@pytest.mark.parametrize("network", REFUSED, ids=lambda one: one.__name__)
@pytest.mark.parametrize("backward", BACKWARDS)
def test_an_operator_without_a_rule_is_named(network, backward):
    model, prediction = traced(network)
    table = table_of(model, prediction)
    with pytest.raises(
        UnsupportedModelError, match=f"Operator {REFUSED[network]} at '.+'.*: .*no rule for its gradient"
    ):
        explanation_graph(prediction, table, backward=backward)


def test_local_response_normalisation_is_named():
    """It is exported as average pooling over channels, in three dimensions."""
    model, prediction = traced(Normalising)
    with pytest.raises(UnsupportedModelError, match=r"Operator AveragePool at '.+': its windows have 3 dimensions"):
        explanation_graph(prediction, table_of(model, prediction))


def test_layers_that_do_not_run_are_named():
    model, prediction = traced(Small)
    with pytest.raises(UnsupportedModelError, match="Layer 'right' of table 'made-up' takes no part"):
        explanation_graph(prediction, table_for(model))


def test_options_are_checked():
    model, prediction = traced(Small)
    table = table_of(model, prediction)
    with pytest.raises(OptionError, match=r"backward.*'auto'; allowed: pruned, dense"):
        explanation_graph(prediction, table, backward="auto")
    with pytest.raises(OptionError, match=r"conserve.*'all'; allowed: "):
        explanation_graph(prediction, table, conserve="all")


def test_random_tables():
    model, prediction = traced(Branching)
    table = SelectionTable.random(model, CLASSES, 3)
    images, targets = images_of(3), [0, -1, 4]
    expected = explained(model, table, images, targets, 0.25, [INFINITY, 1.5, INFINITY], "independent")
    for backward in BACKWARDS:
        graph = explanation_graph(widened(prediction), table, backward=backward)
        found = reference(graph, images.double().numpy(), targets, 0.25, [INFINITY, 1.5, INFINITY])
        assert_same(found, expected, EXACT)
    assert math.isfinite(float(expected.attributions.sum()))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_what_is_no_quantile_or_gamma_gives_no_attribution(backward):
    model = build(Branching, dtype=torch.float32)
    session = Session(explanation_graph(trace_prediction(model, (12, 12), False), table_for(model), backward=backward))
    quantile = np.array([[0.1], [math.nan], [-0.1], [1.5], [0.1], [0.1], [0.0]], dtype=np.float32)
    gamma = [INFINITY] * 4 + [math.nan, -1.0, 0.0]
    images = torch.randn(7, 3, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    found = session(images, [1] * 7, quantile, np.array(gamma))
    assert [bool(np.isfinite(one).all()) for one in found["attributions"]] == [True, *[False] * 5, True]
    assert np.isnan(found["saliency"][1:6]).all()
    assert np.isfinite(found["logits"]).all()
    images[2:, 0, 3, 3] = math.nan
    assert (
        np.isfinite(session(images, [1] * 7)["attributions"]).all(axis=(1, 2, 3)).tolist() == [True] * 2 + [False] * 5
    )


class Sorting(nn.Module):
    def forward(self, z):
        return z.sort(dim=1).values


class Sorted(Branching):
    """An operator without a rule, in a module of its own."""

    def __init__(self):
        super().__init__()
        self.between = nn.Sequential(Sorting())

    def forward(self, images):
        return self.head(F.relu(self.join(self.between(F.relu(self.stem(images))))).mean((2, 3)))


def test_the_module_of_an_operator_without_a_rule_is_named():
    model = build(Sorted, dtype=torch.float32)
    table = SelectionTable.random(model, CLASSES, 0, idle_layers=("left", "right"))
    with pytest.raises(UnsupportedModelError, match=r"Operator TopK at '.*' in module 'between\.0': there is no rule"):
        explanation_graph(trace_prediction(model, (12, 12), False), table)
