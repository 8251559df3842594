"""Baselines: maps without a model against slow loops, Grad-CAM and LRP against their formulas."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.errors import MissingPackageError, OptionError, UnsupportedModelError
from parchgrad.evaluation.baselines import centre_maps, edge_maps, grad_cam_maps, lrp_maps, random_maps
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing
from tests.oracles.tolerance import assert_close, assert_each_close, relative_l2
from tests.parchgrad import networks
from tests.parchgrad.networks import CLASSES, batch, build, table_for

PREPROCESSING = Preprocessing(size=(12, 10), resize=14, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture
def cam():
    return pytest.importorskip("pytorch_grad_cam")


@pytest.fixture
def zennit():
    return pytest.importorskip("zennit")


def explainer_of(model):
    return Explainer(model, table_for(model))


def wide(images=3):
    return torch.randn(images, 3, 12, 10, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "maps",
    [random_maps(), random_maps(3, 0.1), centre_maps(), edge_maps(PREPROCESSING)],
    ids=["random", "smooth", "centre", "edges"],
)
def test_maps_without_a_model_depend_on_nothing_but_the_image(maps):
    images = wide()
    before = images.clone()
    together = maps(images, [0, 1, 2])
    assert together.shape == (3, 12, 10)
    assert bool((together >= 0).all())
    assert bool((together.amax((1, 2)) > 0).all())
    backwards = maps(images.flip(0).contiguous(memory_format=torch.channels_last), [7, 7, 7]).flip(0)
    assert torch.equal(backwards, together)
    for i in range(3):
        assert torch.equal(maps(images[i : i + 1], [4])[0], together[i])
    assert torch.equal(images, before)


def test_random_maps_are_uniform_and_each_image_has_its_own():
    images = torch.randn(2, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    one, other = random_maps(5)(images, [0, 0])
    for noise in (one, other):
        assert_close(np.quantile(noise, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], 0.03)
        # Neighbours know nothing of each other.
        assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05
    assert relative_l2(random_maps(6)(images, [0, 0])[0], one) > 0.5
    assert torch.equal(random_maps(5)(images.double(), [0, 0])[0], one)


def test_smooth_random_maps_are_the_same_noise_blurred():
    images = wide(1)
    noise = random_maps(5)(images, [0])[0].numpy()
    sigma = 0.1 * 10
    reach = int(4 * sigma + 0.5)
    kernel = np.array([math.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)])
    kernel /= kernel.sum()
    padded = np.pad(noise, reach, mode="symmetric")
    blurred = np.zeros_like(noise)
    for i in range(noise.shape[0]):
        for j in range(noise.shape[1]):
            blurred[i, j] = kernel @ padded[i : i + 2 * reach + 1, j : j + 2 * reach + 1] @ kernel
    expected = (blurred - blurred.min()) / (blurred.max() - blurred.min())
    assert_close(random_maps(5, 0.1)(images, [0])[0], expected, 1e-10)


def test_centre_is_a_gaussian_of_a_quarter_of_each_side():
    found = centre_maps()(torch.zeros(2, 3, 12, 10), [0, 1])
    for i in range(12):
        for j in range(10):
            expected = math.exp(-((i - 5.5) ** 2) / (2 * 3.0**2) - (j - 4.5) ** 2 / (2 * 2.5**2))
            assert float(found[1, i, j]) == pytest.approx(expected, rel=1e-12)
    narrow = centre_maps(0.1)(torch.zeros(1, 3, 11, 11), [0])[0]
    assert float(narrow[5, 5]) == 1.0
    assert float(narrow[5, 0]) == pytest.approx(math.exp(-((5 / 11) ** 2) / 0.02))


def test_edges_equal_sobels_kernels_on_the_image_as_it_was():
    original = torch.rand(2, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (PREPROCESSING.mean, PREPROCESSING.std))
    grey = (0.299 * original[:, 0] + 0.587 * original[:, 1] + 0.114 * original[:, 2])[:, None]
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
    kernels = torch.stack([across, across.T])[:, None]
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    expected = gradient.square().sum(1).sqrt()
    assert_each_close(edge_maps(PREPROCESSING)((original - mean) / std, [0, 0]), expected, 1e-10)


def test_edges_of_a_flat_image_are_none():
    assert float(edge_maps(PREPROCESSING)(torch.full((1, 3, 6, 6), 0.7), [0]).max()) < 1e-12


@pytest.mark.parametrize(
    "make", [lambda: random_maps(0, -0.1), lambda: random_maps(0, math.nan), lambda: centre_maps(0)]
)
def test_widths_out_of_range_are_refused(make):
    with pytest.raises(OptionError):
        make()


def stretched(maps):
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("network", [networks.Branching, networks.OverwrittenInput], ids=lambda n: n.__name__)
def test_grad_cam_equals_its_formula(cam, network):
    model = build(network)
    images, targets = batch(4), [1, 3, 0, 4]
    kept = []
    handle = model.join.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = model(images.clone())
    handle.remove()
    (grad,) = torch.autograd.grad(logits[range(4), targets].sum(), kept[0])
    coarse = F.relu((grad.mean((2, 3), keepdim=True) * kept[0]).sum(1)).detach()
    full = F.interpolate(stretched(coarse)[:, None], images.shape[2:], mode="bilinear")[:, 0]
    assert_each_close(grad_cam_maps(explainer_of(model), "join")(images, targets), stretched(full), 1e-5)


def test_grad_cam_is_of_the_layer_and_not_of_the_activation_written_over_it(cam):
    plain, in_place = build(networks.ReusedRelu), build(networks.ReusedRelu)
    in_place.act = nn.ReLU(inplace=True)
    images, targets = batch(3), [0, 1, 2]
    maps = [grad_cam_maps(explainer_of(model), "join")(images, targets) for model in (plain, in_place)]
    assert_each_close(maps[1], maps[0], 1e-6)


def test_grad_cam_leaves_the_model_alone(cam):
    model = build().train()
    state = copy.deepcopy(model.state_dict())
    maps = grad_cam_maps(explainer_of(model), "join")
    first = maps(batch(2), [1, 3])
    assert torch.equal(maps(batch(2), [1, 3]), first)
    assert model.training
    assert all(not part._forward_hooks for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("network", "layer"), [(networks.Branching, "nowhere"), (networks.Branching, "head"),
                                                (networks.InPlaceRelu, "right")])  # fmt: skip
def test_grad_cam_refuses_layers_that_are_none(cam, network, layer):
    model = build(network)
    with pytest.raises(OptionError, match=layer):
        grad_cam_maps(explainer_of(model), layer)(batch(2), [1, 3])


# LRP


def jacobian(function, x):
    """The matrix of a linear function of one image, column by column."""
    origin = function(torch.zeros_like(x)[None])[0].flatten()
    columns = []
    for i in range(x.numel()):
        unit = torch.zeros(x.numel(), dtype=x.dtype)
        unit[i] = 1.0
        columns.append(function(unit.view_as(x)[None])[0].flatten() - origin)
    return torch.stack(columns, 1), origin


def z_plus(function, x, relevance):
    """Each output's relevance goes to the inputs that push it up, in proportion, as does what its bias pushes."""
    weight, bias = jacobian(function, x)
    pushes = (weight * x.flatten()).clamp(min=0)
    total = pushes.sum(1) + bias.clamp(min=0)
    shares = torch.where(total[:, None] > 0, pushes / total[:, None], torch.zeros(()).to(pushes))
    return (shares.T @ relevance.flatten()).view_as(x)


def epsilon_rule(function, x, relevance):
    weight, bias = jacobian(function, x)
    pushes = weight * x.flatten()
    return ((pushes / (pushes.sum(1) + bias)[:, None]).T @ relevance.flatten()).view_as(x)


class Residual(nn.Module):
    """BatchNorm in another order than it runs, a sum and a mean that are no modules."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images):
        z = F.relu(self.norm(self.first(images)))
        y = self.second(z)
        y += z
        return self.head(torch.relu(y).mean((2, 3)))


def test_lrp_equals_its_rules_one_layer_at_a_time(zennit):
    model = build(Residual).eval()
    images, targets = batch(3, size=6), [1, 3, 0]
    expected = []
    with torch.no_grad():
        for image, target in zip(images, targets, strict=True):
            stem = lambda x: model.norm(model.first(x))  # noqa: E731
            z = F.relu(stem(image[None]))[0]
            y = model.second(z[None])[0]
            r = F.relu(y + z)
            pooled = r.mean((1, 2))
            logits = model.head(pooled)
            start = torch.zeros_like(logits)
            start[target] = logits[target]
            of_pooled = epsilon_rule(model.head, pooled, start)
            of_r = of_pooled[:, None, None] * torch.where(
                pooled[:, None, None] > 0, r / r.sum((1, 2), keepdim=True), torch.zeros(()).double()
            )
            total = torch.where(y + z == 0, torch.ones(()).double(), y + z)
            of_y, of_z = y / total * of_r, z / total * of_r
            of_z = of_z + z_plus(lambda x: model.second(x), z, of_y)
            expected.append(z_plus(stem, image, of_z).sum(0).clamp(min=0))
    found = lrp_maps(explainer_of(model), epsilon=1e-12)(images, targets)
    # zennit adds 1e-6 to each denominator; here none is added.
    assert_each_close(found, torch.stack(expected), 1e-3)


def test_lrp_of_functions_is_lrp_of_modules(zennit):
    class Modules(Residual):
        def __init__(self):
            super().__init__()
            self.act, self.pool = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)

        def forward(self, images):
            z = self.act(self.norm(self.first(images)))
            z = self.act(self.second(z))
            return self.head(torch.flatten(self.pool(z), 1))

    class Functions(Residual):
        def forward(self, images):
            z = F.relu(self.norm(self.first(images)), inplace=True)
            z = self.second(z).relu_()
            return self.head(F.adaptive_avg_pool2d(z, 1).flatten(1))

    images, targets = batch(3), [0, 2, 4]
    one, other = (lrp_maps(explainer_of(build(network)))(images, targets) for network in (Modules, Functions))
    assert float(one.max()) > 0
    assert_each_close(other, one, 1e-12)


@pytest.mark.parametrize("network", [networks.InPlaceRelu, networks.Branching, networks.ReusedRelu, networks.Smooth])
def test_lrp_in_a_batch_is_lrp_alone_and_the_model_stays_as_it_was(zennit, network):
    model = build(network).train()
    state = copy.deepcopy(model.state_dict())
    images, targets = batch(3), [1, 3, 0]
    maps = lrp_maps(explainer_of(model))
    together = maps(images, targets)
    assert bool((together >= 0).all())
    for i in range(3):
        assert_close(maps(images[i : i + 1], targets[i : i + 1])[0], together[i], 1e-10)
    assert model.training
    assert model.stem.bias is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (networks.OnePosition, "mul"),
        (networks.ReusedConvolution, "runs again"),
        (networks.Parametrized, "computed"),
        (networks.Hooked, "hooks"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_lrp_refuses_what_it_has_no_rule_for(zennit, network, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        lrp_maps(explainer_of(build(network)))


def test_lrp_refuses_a_batch_norm_that_follows_no_layer(zennit):
    class Before(Residual):
        def forward(self, images):
            return self.head(F.relu(self.norm(F.relu(self.first(images)))).mean((2, 3)))

    with pytest.raises(UnsupportedModelError, match="merges a BatchNorm"):
        lrp_maps(explainer_of(build(Before)))


@pytest.mark.parametrize(("package", "make"), [("pytorch_grad_cam", lambda e: grad_cam_maps(e, "join")),
                                               ("zennit", lrp_maps)])  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, make):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package}.*parchgrad\[evaluate\]"):
        make(explainer_of(build()))
