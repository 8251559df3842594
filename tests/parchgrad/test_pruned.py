"""The pruned engine: the dense one's maps, for every kind of convolution and every torchvision family."""

import copy
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parchgrad.defaults import CONSERVE
from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.rule import channel_factors, image_factors, side_moments
from parchgrad.runtimes import Plan
from parchgrad.runtimes.pruned import engine
from parchgrad.tables import SelectionTable
from tests.oracles.tolerance import assert_each_close, relative_l2
from tests.parchgrad import networks, test_families
from tests.parchgrad.networks import batch, build, table_for

INFINITY = math.inf

# One image of each: what prunes, what scales, and what does neither, side by side.
MIXED = {
    "quantile": [0.1, 0.3, 0.05, 0.3, None, 0.5],
    "gamma": [INFINITY, 3.0, INFINITY, INFINITY, 1.0, 0.0],
    "conserve": ["exact", "independent", "none", "independent", "exact", "none"],
    "rule": [True, True, True, True, False, True],
}
TARGETS = [1, 2, 3, 1, 0, 2]


def assert_as_dense(model, table, images, targets, relative, **options):
    """The same explanation of both engines; that of the pruned one, and what it came from."""
    pruned = Explainer(model, table, backward="pruned")
    assert (pruned.backward, pruned.dense_because) == ("pruned", None)
    found = pruned.explain(images, targets, **options)
    expected = Explainer(model, table, backward="dense").explain(images, targets, **options)
    for one, other in zip(found.attributions, expected.attributions, strict=True):
        assert relative_l2(one, other) <= relative
    assert relative_l2(found.logits, expected.logits) <= relative
    for name in ("targets", "identity_layers", "layers_used", "covered"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert float(expected.attributions.abs().amax((1, 2, 3)).min()) > 0
    return found


@pytest.mark.parametrize(("name", "size"), test_families.FAMILIES.items(), ids=test_families.FAMILIES.keys())
def test_families_are_as_dense(name, size):
    model = test_families.network(name)
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    running = test_families.running_layers(model, images[:1])
    idle = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d) and n not in running]
    table = SelectionTable.random(model, test_families.CLASSES, 0, idle_layers=idle)
    targets = [1, 2, 2, 1, 1, 2]  # SqueezeNet's other logits are zero
    relative = 1e-8 if name in test_families.ILL_CONDITIONED else 1e-10
    found = assert_as_dense(model, table, images, targets, relative, **MIXED)
    plain = Explainer(model, table).explain(images[:1], 1, rule=False).attributions
    assert relative_l2(found.attributions[0], plain[0]) > 0.01
    again = Explainer(model, table, backward="pruned").explain(images[:1], 1, quantile=0.1, conserve="exact")
    assert relative_l2(again.attributions[0], found.attributions[0]) <= relative, "alone as among others"


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"])
def test_families_are_as_dense_in_float32(name):
    """No further from the map in float64 than the dense engine in float32 is: a ReLU at its edge moves either."""
    model = test_families.network(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table = SelectionTable.random(model, test_families.CLASSES, 0)
    options = {"quantile": [0.1, 0.3], "gamma": [INFINITY, 3.0], "conserve": ["exact", "independent"]}
    wide = Explainer(model, table, backward="dense").explain(images, [1, 2], **options)
    model.float()
    found, narrow = (
        Explainer(model, table, backward=b).explain(images.float(), [1, 2], **options) for b in ("pruned", "dense")
    )
    assert found.identity_layers.tolist() == wide.identity_layers.tolist()
    for one, other, expected in zip(found.attributions, narrow.attributions, wide.attributions, strict=True):
        assert relative_l2(one, expected) <= max(1e-5, 10 * relative_l2(other, expected))


class Between(nn.Module):
    """The convolution in question between others, with BatchNorm and an activation behind it."""

    def __init__(self, channels, normed, activation, **geometry):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.tested = nn.Conv2d(channels, **geometry)
        self.norm = nn.BatchNorm2d(self.tested.out_channels) if normed else nn.Identity()
        self.activation = activation
        self.last = nn.Conv2d(self.tested.out_channels, 18, 1)
        self.head = nn.Linear(18, networks.CLASSES)

    def forward(self, images):
        z = self.activation(self.norm(self.tested(torch.tanh(self.stem(images)))))
        return self.head(F.relu(self.last(z)).mean((2, 3)))


GEOMETRIES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "unpadded": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strided-unpadded": {"kernel_size": 3, "stride": 2},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "dilated-strided": {"kernel_size": 5, "stride": 3, "dilation": 2, "padding": 3},
    "pointwise": {"kernel_size": 1, "bias": False},
    "pointwise-strided": {"kernel_size": 1, "stride": 2},
    "pointwise-padded": {"kernel_size": 1, "padding": 1},
    "pointwise-strided-padded": {"kernel_size": 1, "stride": (3, 2), "padding": (0, 1)},
    "padded-beyond-reach": {"kernel_size": 3, "padding": 4},
    "padded-beyond-reach-strided": {"kernel_size": 2, "stride": 3, "padding": 3},
    "row": {"kernel_size": (1, 7), "padding": (0, 3)},
    "rectangular": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "stride-beyond-kernel": {"kernel_size": 2, "stride": 4},
    "large": {"kernel_size": 11, "stride": 4, "padding": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": 5, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}
GROUPS = {
    "one": (20, 26, 1),
    "few": (6, 26, 1),
    "grouped": (20, 30, 5),
    "depthwise": (20, 20, 20),
    "twice": (20, 40, 20),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_kind_of_convolution_is_as_dense(geometry, groups):
    """In both precisions and layouts, at two sizes through one explainer: packed weights outlive a size."""
    channels, out, groups = groups
    torch.manual_seed(0)
    normed = geometry.get("bias", True)
    model = Between(
        channels, normed, nn.Hardswish() if normed else nn.ReLU(), **geometry, out_channels=out, groups=groups
    )
    model = perturbed(model)
    table = table_for(model)
    for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = model.to(dtype)
        pruned, dense = (Explainer(model, table, backward=b) for b in ("pruned", "dense"))
        for format, size in ((torch.contiguous_format, (13, 18)), (torch.channels_last, (24, 15))):
            images = torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            images = images.to(dtype).contiguous(memory_format=format)
            for rows in (slice(0, 6), slice(0, 1), slice(3, 4)):
                options = {name: values[rows] for name, values in MIXED.items()}
                found = pruned.explain(images[rows], TARGETS[rows], **options)
                expected = dense.explain(images[rows], TARGETS[rows], **options)
                for one, other in zip(found.attributions, expected.attributions, strict=True):
                    assert relative_l2(one, other) <= relative
                assert found.identity_layers.tolist() == expected.identity_layers.tolist()
    assert pruned.backward == "pruned"


def perturbed(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, -1.0, 1.5)  # of either sign: the rule's sums need it too
    return model.double().eval()


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.25), nn.Sigmoid(), nn.Tanh(), nn.SiLU(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.2), nn.ELU(),
    nn.Softplus(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_activation_is_as_dense(activation, dtype):
    torch.manual_seed(0)
    model = perturbed(Between(20, True, activation, out_channels=20, kernel_size=3, groups=20)).to(dtype)
    images = batch(6, dtype=dtype) * 4
    relative = 1e-10 if dtype == torch.float64 else 1e-5
    assert_as_dense(model, table_for(model), images, TARGETS, relative, **MIXED)


OPTIONS = {
    "alpha": {"alpha": 0.3},
    "alpha-nothing": {"alpha": 1e-30},
    "quantile-one": {"quantile": 1.0},
    "schedule": {"quantile": {"stem": 0.5, "*": 0.2}},
    "normality": {"normality_filter": True, "quantile": 0.6},
    "layers": {"layers": ("left", "j*"), "quantile": 0.3},
    "one-layer": {"layers": "stem", "quantile": 0.3},
    "weighted": {"seed": "probability_weighted_logit", "quantile": 0.3},
    "input-x": {"method": "input_x_gradient", "quantile": 0.3},
    "integrated": {"method": "integrated_gradients", "steps": 4, "quantile": 0.3, "gamma": 2.0},
    "smoothgrad": {"method": "smoothgrad", "samples": 3, "quantile": 0.3},
    "mixed-selection": {"selection": ["class", "instance", "class"], "quantile": 0.4},
    "mixed-methods": {"method": ["gradient", "guided_backprop", "input_x_gradient"], "quantile": 0.4},
    "mixed-layers": {"layers": [("left",), ("stem", "join"), None], "quantile": 0.3},
    "plain": {"rule": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_is_as_dense(options):
    model = build()
    assert_as_dense(model, table_for(model), batch(3), [1, None, 3], 1e-10, **options)


def test_targets_without_a_row_are_as_dense():
    model = build()
    table = table_for(model, covered=(4, 0, 2))
    found, expected = (
        Explainer(model, table, backward=b).explain(batch(4), [4, 1, 2, 0], uncovered="nan", quantile=0.3)
        for b in ("pruned", "dense")
    )
    assert found.covered.tolist() == [True, False, True, True]
    assert_each_close(found.attributions, expected.attributions, 1e-10)


class Dead(networks.Branching):
    """Nothing comes back through the head; `left` runs for nobody, `right` not at all."""

    def __init__(self):
        super().__init__()
        self.join = nn.Conv2d(8, 24, 3, padding=1)
        self.head = nn.Linear(24, networks.CLASSES)
        nn.init.zeros_(self.head.weight)

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        self.left(z)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_gradient_of_zero_and_a_layer_nobody_reads_are_as_dense(dtype):
    model = build(Dead, dtype=dtype)
    table, images = table_for(model), batch(1, dtype=dtype)
    layers = ("stem", "left", "join")
    found, expected = (
        Explainer(model, table, backward=b).explain(images, 1, layers=layers) for b in ("pruned", "dense")
    )
    assert not found.attributions.any()
    assert found.identity_layers.tolist() == expected.identity_layers.tolist() == [3]
    for backward in ("pruned", "dense"):
        with pytest.raises(UnsupportedModelError, match="'right' of table 'made-up' took no part"):
            Explainer(model, table, backward=backward).explain(images, 1)


def test_what_backward_is_in_use_and_why():
    model, hooked = build(), build(networks.Hooked)
    table = table_for(model)
    assert (Explainer(model, table).backward, Explainer(model, table).dense_because) == ("pruned", None)
    dense = Explainer(model, table, backward="dense")
    assert (dense.backward, dense.dense_because) == ("dense", "backward='dense' was asked for")
    fallen = Explainer(hooked, table)
    assert fallen.backward == "dense"
    assert fallen.dense_because == "Module 'right' has forward hooks, which a traced network would not run."
    with pytest.raises(UnsupportedModelError, match="Module 'right' has forward hooks"):
        Explainer(hooked, table, backward="pruned")
    with pytest.raises(OptionError, match="Option 'backward' is 'sparse'; allowed: auto, dense, pruned"):
        Explainer(model, table, backward="sparse")


class FunctionalNorm(networks.Branching):
    """A BatchNorm that is a call on the module's own buffers, as timm's are; no gradient goes to a running mean."""

    def forward(self, images):
        z = F.relu(self.stem(images))
        norm = self.norm
        z = z + F.batch_norm(z, norm.running_mean * 2, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


def test_constants_are_not_differentiated():
    model = build(FunctionalNorm)
    table = table_for(model)
    options = {"targets": 1, "layers": ("stem", "join")}
    found, expected = (
        Explainer(model, table, backward=b).explain(batch(2), **options).attributions for b in ("pruned", "dense")
    )
    assert_each_close(found, expected, 1e-12)


class FiveDimensions(networks.Branching):
    """A mean over dimensions 2 and 3 that are no picture's."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        groups = z.unflatten(1, (4, 2)).permute(0, 1, 3, 4, 2).mean((2, 3))
        return self.head(F.relu(self.join(z * groups.flatten(1)[:, :, None, None])).mean((2, 3)))


def test_a_mean_that_is_not_over_positions_goes_to_the_dense_engine(caplog):
    model = build(FiveDimensions)
    table = table_for(model)
    explainer = Explainer(model, table)
    options = {"targets": 1, "layers": ("stem", "join")}
    expected = Explainer(model, table, backward="dense").explain(batch(2), **options)
    assert_each_close(explainer.explain(batch(2), **options).attributions, expected.attributions, 1e-12)
    assert "A mean over dimensions 2 and 3 of 5" in (explainer.dense_because or "")


def test_what_batch_fits_is_known_before_the_first(monkeypatch):
    """Also the first batch of a size goes in parts, so that its memory is that of any other."""
    model = build()
    explainer = Explainer(model, table_for(model), backward="pruned")
    monkeypatch.setattr(engine, "_LARGEST_MAPPING", 1)
    seen, record = [], engine.Program.record
    monkeypatch.setattr(
        engine.Program, "record", lambda self, x, *more: (seen.append(len(x)), record(self, x, *more))[1]
    )
    explainer.explain(batch(3), 1)
    assert seen == [1, 1, 1]


# --- the weights change ---


def changed(how, model):
    with torch.no_grad():
        if how == "optimizer":
            parameters = list(model.parameters())
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD(parameters, lr=0.05).step()
        elif how == "load_state_dict":
            model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
        elif how == "statistics":
            model.norm.running_var.mul_(3.0)
        elif how == "data":
            model.join.weight.data.mul_(0.5)
        elif how == "statistics' data":
            model.norm.running_var.data.mul_(3.0)
        elif how == "inference":
            with torch.inference_mode():
                model.right.weight.mul_(0.5)
        elif how == "bias":
            model.join.bias.add_(0.5)


@pytest.mark.parametrize(
    "how", ["optimizer", "load_state_dict", "statistics", "data", "statistics' data", "inference", "bias"]
)
def test_weights_changed_in_place_show(how):
    model = build()
    table, images = table_for(model), batch(2)
    pruned, dense = (Explainer(model, table, backward=b) for b in ("pruned", "dense"))
    before = pruned.explain(images, 1, quantile=0.3)
    changed(how, model)
    expected = dense.explain(images, 1, quantile=0.3)
    assert relative_l2(before.logits, expected.logits) > 1e-3
    assert_each_close(pruned.predict(images), expected.logits, 1e-10)
    assert_each_close(pruned.explain(images, 1, quantile=0.3).attributions, expected.attributions, 1e-10)
    assert pruned.backward == "pruned"


def test_unchanged_weights_are_compiled_once(monkeypatch):
    compiled, program = [], engine.Program

    def slow(*args):
        compiled.append(1)
        time.sleep(0.05)
        return program(*args)

    monkeypatch.setattr(engine, "Program", slow)
    model = build()
    model.join.bias.data[0] = math.nan  # equal to nothing, and yet unchanged
    explainer = Explainer(model, table_for(model))
    for _ in range(3):
        explainer.predict(batch(1))
    assert len(compiled) == 1
    model.norm.running_mean.add_(1.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: explainer.predict(batch(1)), range(16)))
    assert len(compiled) == 2


def test_a_replaced_parameter_shows_as_little_as_in_the_dense_engine():
    """Both hold the memory that the model had; a caller who swaps it makes a new explainer."""
    model = build()
    table, images = table_for(model), batch(2)
    pruned, dense = (Explainer(model, table, backward=b) for b in ("pruned", "dense"))
    model.join.weight.data = model.join.weight.data * 0.5
    model.right.weight = nn.Parameter(model.right.weight * 2.0)
    assert_each_close(pruned.predict(images), dense.predict(images), 1e-10)
    assert_each_close(Explainer(model, table).predict(images), model(images), 1e-10)


def test_a_model_and_explainer_made_in_inference_mode():
    """Such weights have no counter of changes, and autograd refuses them: the dense engine fails here."""
    torch.manual_seed(0)
    outside = Between(20, False, nn.ReLU(), out_channels=26, kernel_size=3).double()
    table = table_for(outside)
    expected = Explainer(outside, table, backward="dense").explain(batch(2), 1, quantile=0.3).attributions
    with torch.inference_mode():
        model = copy.deepcopy(outside)
        assert model.tested.weight.is_inference()
        explainer = Explainer(model, table, backward="pruned")
        inside = explainer.explain(batch(2) + 0.0, 1, quantile=0.3).attributions
    assert_each_close(inside, expected, 1e-10)
    assert_each_close(explainer.explain(batch(2), 1, quantile=0.3).attributions, expected, 1e-10)
    with torch.inference_mode():
        model.tested.weight.mul_(0.5)
    assert relative_l2(explainer.explain(batch(2), 1, quantile=0.3).attributions, expected) > 1e-3


# --- a program that is not the network ---


class Counting(networks.Branching):
    """What it computes depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * (1.0 if self.calls == 1 else 2.0)


class Remembering(networks.Branching):
    """Keeps a position code for the size that it first met: another size, another code."""

    def __init__(self):
        super().__init__()
        self.scale = {}

    def forward(self, images):
        return super().forward(images) * self.scale.setdefault("first", images.shape[-1] / 12)


class Noisy(networks.Branching):
    def forward(self, images):
        return super().forward(F.dropout(images))


class OfSize(networks.Branching):
    """A size read past the trace: the same as traced at 12 alone."""

    def forward(self, images):
        seen = super().forward(images)
        return seen if type(images) is not torch.Tensor or images.shape[-1] == 12 else seen.flip(1)


@pytest.mark.parametrize("network", [Counting, Noisy], ids=lambda n: n.__name__)
@pytest.mark.parametrize("call", ["explain", "predict"])
def test_a_network_that_is_not_its_trace_is_explained_by_the_dense_engine(network, call, caplog):
    model = build(network)
    explainer = Explainer(model, table_for(model))
    assert explainer.backward == "pruned"
    with caplog.at_level(logging.WARNING, "parchgrad"):
        getattr(explainer, call)(batch(2))
    assert explainer.backward == "dense"
    assert "the traced network's logits are off by" in explainer.dense_because
    assert [record.getMessage() for record in caplog.records if record.name.startswith("parchgrad")] == [
        f"The dense backward pass from here on: {explainer.dense_because}"
    ]
    strict = Explainer(build(network), table_for(model), backward="pruned")
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="On images of 3 x 12 x 12 the traced network's logits are off"):
            getattr(strict, call)(batch(2))


def test_every_size_is_compared_once(monkeypatch):
    model = build(OfSize)
    explainer = Explainer(model, table_for(model))
    calls, view = [], explainer._runtime._pruned._view
    monkeypatch.setattr(explainer._runtime._pruned, "_view", lambda images: calls.append(images.shape) or view(images))
    for _ in range(3):
        explainer.explain(batch(2), 1)
        explainer.predict(batch(3))
    assert calls == [(1, 3, 12, 12)]
    expected = Explainer(model, table_for(model), backward="dense").explain(batch(2, size=9), 1)
    assert_each_close(explainer.explain(batch(2, size=9), 1).attributions, expected.attributions, 1e-12)
    assert calls == [(1, 3, 12, 12), (1, 3, 9, 9)]
    assert explainer.backward == "dense"
    assert "On images of 3 x 9 x 9" in explainer.dense_because


class Fixed(networks.Branching):
    """Reshapes by a Python number that a trace keeps."""

    def __init__(self):
        super().__init__()
        self.side = [6]

    def forward(self, images):
        if type(images) is torch.Tensor:
            self.side[0] = (images.shape[-1] + 1) // 2
        z = F.relu(self.norm(self.stem(images))).reshape(-1, 8, self.side[0], self.side[0])
        return self.head(F.relu(self.join(z)).mean((2, 3)))


def test_a_program_that_fails_where_the_network_does_not_gives_way():
    model = build(Fixed)
    explainer = Explainer(model, table_for(model))
    explainer.explain(batch(2), 1, layers=("stem", "join"))
    assert explainer.backward == "pruned"
    explainer.explain(batch(1, size=9), 1, layers=("stem", "join"))
    assert explainer.dense_because.startswith(
        "The traced network fails where the network itself does not: RuntimeError"
    )


def test_an_error_of_the_networks_own_is_the_networks():
    model = build()
    explainer = Explainer(model, table_for(model), backward="pruned")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected input"):
            explainer.explain(torch.zeros(1, 4, 12, 12, dtype=torch.float64), 1)
    assert explainer.backward == "pruned"


class Listed(networks.Branching):
    """Hands several tensors on in a list, and takes one of what a function returns."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        z = torch.cat(z.chunk(2, 1)[::-1], 1)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


class Largest(networks.Branching):
    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        z = torch.max(self.join(z).flatten(2), 2)[0]
        return self.head(z)


class Halved(networks.Branching):
    """Several results of one call, each with its own way back; one is read twice."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        low, high = z.chunk(2, 1)
        low, (a, b) = low * high.sigmoid(), torch.split(high, [1, 3], dim=1)
        return self.head(F.relu(self.join(torch.cat((low, b, a), 1))).mean((2, 3)))


@pytest.mark.parametrize("network", [Halved, Largest], ids=lambda n: n.__name__)
def test_one_of_several_results_is_as_dense(network):
    model = build(network)
    assert_as_dense(model, table_for(model), batch(2), [1, 2], 1e-10, layers=("stem", "join"), quantile=0.3)


def test_a_list_of_tensors_goes_to_the_dense_engine():
    """Its gradient would be lost on the way back."""
    model = build(Listed)
    explainer = Explainer(model, table_for(model))
    explainer.predict(batch(2))
    found = explainer.explain(batch(2), 1, layers=("stem", "join"))
    assert "whose gradient is not known" in explainer.dense_because
    expected = Explainer(model, table_for(model), backward="dense").explain(batch(2), 1, layers=("stem", "join"))
    assert torch.equal(found.attributions, expected.attributions)


@pytest.mark.parametrize("bad", [math.nan, INFINITY])
def test_what_is_not_finite_is_the_dense_engines(bad):
    """A fused activation makes zeros of NaN: such images would be explained as if they were sound."""
    model = build(dtype=torch.float32)
    table, images = table_for(model), batch(2, dtype=torch.float32)
    explainer = Explainer(model, table, backward="pruned")
    explainer.predict(images)
    images[0, 1, 5, 5] = bad
    expected = Explainer(model, table, backward="dense").predict(images)
    assert torch.equal(explainer.predict(images), expected) or torch.equal(
        explainer.predict(images).isnan(), expected.isnan()
    )
    assert not explainer.predict(images)[0].isfinite().all()
    with torch.no_grad():
        model.join.weight.fill_(bad)
    assert explainer.predict(batch(2, dtype=torch.float32)).isnan().all()
    assert explainer.backward == "pruned"


def test_under_autocast_it_is_the_dense_engine():
    """Which computes each call in the type that autocast gives it."""
    model = build(dtype=torch.float32)
    table, images = table_for(model), batch(2, dtype=torch.float32)
    explainer = Explainer(model, table, backward="pruned")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = Explainer(model, table, backward="dense").explain(images, 1)
        assert torch.equal(explainer.explain(images, 1).attributions, expected.attributions)
        assert torch.equal(explainer.predict(images), expected.logits)
    assert explainer.backward == "pruned"


# --- what is kept ---


def plan_of(model, table, count, images=1):
    layers = len(table.layer_names)
    return Plan(
        active=torch.ones(images, layers, dtype=torch.bool),
        count=torch.full((images, layers), count),
        log_alpha=torch.full((images,), math.nan, dtype=torch.float64),
        gamma=torch.full((images,), INFINITY, dtype=torch.float64),
        conserve=torch.zeros(images, dtype=torch.long),
        instance=torch.zeros(images, dtype=torch.bool),
        guided=torch.zeros(images, dtype=torch.bool),
        normality_filter=torch.zeros(images, dtype=torch.bool),
        probability_weighted=torch.zeros(images, dtype=torch.bool),
        evidence=torch.zeros(images, dtype=torch.bool),
    )


def test_what_classes_select_is_kept_up_to_a_bound_the_latest_first(monkeypatch):
    model = build()
    table = table_for(model)
    row_bytes = dict.fromkeys(table.layer_names, 1000)
    choices = engine._Choices(table, torch.device("cpu"), row_bytes)
    plan = plan_of(model, table, 2)
    first = choices.of(0, plan, 0)
    size = choices._size(first)
    assert 4 * 2 * 1000 < size < 4 * 2 * 1000 + 2000
    monkeypatch.setattr(engine, "CACHE_BYTES", int(2.5 * size))
    second = choices.of(1, plan, 0)
    assert choices.of(0, plan, 0) is first, "kept"
    third = choices.of(2, plan, 0)
    assert choices.of(0, plan, 0) is first, "asked for after the second"
    assert choices.of(2, plan, 0) is third
    assert choices.of(1, plan, 0) is not second, "made way"
    assert (len(choices._kept), choices._bytes) == (2, 2 * size)
    monkeypatch.setattr(engine, "CACHE_BYTES", size // 2)
    choices.of(3, plan, 0)
    assert (len(choices._kept), choices._bytes) == (0, 0), "one that is larger than all is not kept"


def test_what_is_kept_is_of_one_selection():
    """Class, quantile of each layer, alpha and filter: each is a choice of its own."""
    model = build()
    table = table_for(model)
    choices = engine._Choices(table, torch.device("cpu"), {})
    plans = [plan_of(model, table, 2), plan_of(model, table, 3), plan_of(model, table, 2), plan_of(model, table, 2)]
    plans[2].log_alpha[0] = -1.0
    plans[3].normality_filter[0] = True
    found = [choices.of(row, plan, 0) for plan in plans for row in (0, 1, -1)]
    assert len({id(one) for one in found}) == len(found)
    assert not any(choice.selected.any() for choice in found[2])


def test_the_bytes_of_rows_are_those_of_the_weights():
    model = build()
    pruned = Explainer(model, table_for(model))._runtime._pruned
    found = pruned._compiled.program.row_bytes()
    assert found == {"right": 8 * 8, "join": 8 * 9 * 8}, "the plain convolutions' own, of 8 bytes a value"


def test_eight_threads_at_new_classes_and_sizes_get_what_they_get_alone():
    """Weights packed, rows kept and sizes compared for the first time, all at once."""
    model = perturbed(Between(20, True, nn.ReLU(), out_channels=26, kernel_size=3)).float()
    table = table_for(model)
    jobs = [
        (batch(2, size=10 + i % 3, seed=i, dtype=torch.float32), [i % 5, (i + 1) % 5], 0.1 + 0.2 * (i % 2))
        for i in range(8)
    ]
    alone = [Explainer(model, table).explain(i, t, quantile=q).attributions for i, t, q in jobs]
    for _ in range(5):
        explainer, start = Explainer(model, table), threading.Barrier(8)

        def work(job, explainer=explainer, start=start):
            start.wait()
            images, targets, quantile = job
            return [explainer.explain(images, targets, quantile=quantile).attributions for _ in range(2)]

        with ThreadPoolExecutor(8) as pool:
            for found, expected in zip(pool.map(work, jobs), alone, strict=True):
                assert all(torch.equal(one, expected) for one in found)


# --- the rule's factors of one image ---

SUMS = st.floats(-1.0, 1.0, allow_subnormal=False).map(lambda value: round(value, 3))


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    channels=st.integers(2, 6),
    positions=st.sampled_from([1, 2, 9]),
    gamma=st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0, 1e6, INFINITY]),
    conserve=st.sampled_from(CONSERVE),
    scale=st.sampled_from([1.0, 1e-12, 1e-30, 1e6]),
    shape=st.sampled_from(["any", "zero", "constant", "constant side", "cancelling"]),
)
def test_the_factors_of_one_image_are_those_of_many(data, channels, positions, gamma, conserve, scale, shape):
    values = data.draw(st.lists(SUMS, min_size=channels * positions, max_size=channels * positions))
    grad = torch.tensor(values, dtype=torch.float64).reshape(channels, positions)
    selected = torch.zeros(channels, dtype=torch.bool)
    selected[: data.draw(st.integers(1, channels - 1))] = True
    if shape == "zero":
        grad = grad * 0.0
    elif shape == "constant":
        grad = grad[:, :1].expand(-1, positions).clone()
    elif shape == "constant side":
        grad[selected] = 0.25
    elif shape == "cancelling":
        grad[~selected] = 0.0
        grad[-1] = -grad[selected].sum(0)
    grad = grad * scale
    expected = channel_factors(grad[None], selected[None], gamma, conserve)
    sums = torch.stack((grad[selected].sum(0), grad[~selected].sum(0)))
    found = image_factors(side_moments(sums, channels), gamma, conserve)
    assert (found is None) == bool(expected.identity)
    inside, outside = found or (1.0, 1.0)
    assert inside == pytest.approx(float(expected.selected), rel=1e-9)
    assert outside == pytest.approx(float(expected.unselected), rel=1e-9)


def test_a_copy_of_an_explained_model_is_another():
    """Programs hang on no module: a copy, changed, changes nothing for the first."""
    model = build()
    explainer = Explainer(model, table_for(model))
    expected = explainer.predict(batch(1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.join.weight.zero_()
    assert torch.equal(explainer.predict(batch(1)), expected)
