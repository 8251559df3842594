"""GAP features after normalisation and activation: whatever way a network is written, compared with a plain loop."""

from __future__ import annotations

import dataclasses
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from parchgrad.build import Local, Reader, Work, build_table, gather, subject_of
from parchgrad.cli.shared import show_table
from parchgrad.errors import EvidenceError, OptionError, UnsupportedModelError
from parchgrad.evidence import Evidence
from parchgrad.features import GapNetwork, points_reached, running_layers
from parchgrad.layers import convolutions
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing
from parchgrad.programs import load_program
from parchgrad.sources import ImageFolder

IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A convolution `c` (and one beside it, `d`); what is `made` of it goes into a classifier."""

    def __init__(self, made, activation=None):
        super().__init__()
        torch.manual_seed(1)
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.layer_norm = nn.BatchNorm2d(4), nn.LayerNorm(4)
        self.group_norm = nn.GroupNorm(2, 4)
        for weight in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.layer_norm.bias):
            nn.init.uniform_(weight, -1.0, 1.0)
        self.head = nn.Linear(4, 2)
        self.made, self.activation = made, activation
        self.eval()

    def forward(self, images):
        return self.head(self.made(self, images).flatten(2).mean(2))


def exported(module, folder, images=IMAGES):
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "net.pt2")
    return load_program(folder / "net.pt2")


def noted(module, layer="c", images=IMAGES):
    """The point that a layer reaches, and its feature."""
    network = GapNetwork(module, [layer], None, "activation")
    feature = network.features(images)
    return network.points[layer], feature


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def means(maps):
    return maps.mean((2, 3))


def after_norm(activation):
    return lambda net, x: activation(net.norm(net.c(x)))


def by_hand(activation):
    return lambda net, x: activation(net.c(x))


def last_axis(net, x):
    return net.layer_norm(net.c(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def functional_norm(net, x):
    norm = net.norm
    return F.batch_norm(net.c(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)


def gated(net, x):
    z = net.c(x)
    return z.mul_(z.sigmoid())


def written_afterwards(net, x):
    z = F.relu_(net.c(x))
    pooled = z.mean((2, 3), keepdim=True)
    z.detach().mul_(0.5)
    return z + pooled


# What is made of the convolution (a module: of its normalised output), and plainly what its feature is the mean of.
ACTIVATED = {
    "relu module": (nn.ReLU(), after_norm(torch.relu)),
    "relu in place": (nn.ReLU(inplace=True), after_norm(torch.relu)),
    "relu function": (lambda n, x: F.relu(functional_norm(n, x)), after_norm(torch.relu)),
    "silu module": (nn.SiLU(), after_norm(F.silu)),
    "silu in place": (nn.SiLU(inplace=True), after_norm(F.silu)),
    "silu function": (lambda n, x: F.silu(functional_norm(n, x)), after_norm(F.silu)),
    "hardswish module": (nn.Hardswish(), after_norm(F.hardswish)),
    "hardswish in place": (nn.Hardswish(inplace=True), after_norm(F.hardswish)),
    "hardswish function": (lambda n, x: F.hardswish(functional_norm(n, x)), after_norm(F.hardswish)),
    "relu6": (nn.ReLU6(), after_norm(lambda z: z.clamp(0, 6))),
    "prelu": (nn.PReLU(4, init=0.3), after_norm(lambda z: F.leaky_relu(z, 0.3))),
    "keyword": (lambda n, x: F.silu(input=n.norm(input=n.c(x))), after_norm(F.silu)),
    "no normalisation": (by_hand(F.silu), by_hand(F.silu)),
    "group normalisation": (lambda n, x: F.gelu(n.group_norm(n.c(x))), lambda n, x: F.gelu(n.group_norm(n.c(x)))),
    "layer norm on the last axis": (lambda n, x: F.gelu(last_axis(n, x)), lambda n, x: F.gelu(last_axis(n, x))),
    "swish": (after_norm(lambda z: z * torch.sigmoid(z)), after_norm(F.silu)),
    "swish, gate first": (after_norm(lambda z: torch.sigmoid(z) * z), after_norm(F.silu)),
    "swish in place": (gated, by_hand(F.silu)),
    "hard swish": (after_norm(lambda z: z * F.relu6(z + 3) / 6), after_norm(F.hardswish)),
    "mish": (after_norm(lambda z: z * torch.tanh(F.softplus(z))), after_norm(F.mish)),
    "gelu": (after_norm(lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5))), after_norm(F.gelu)),
    "view": (by_hand(lambda z: F.silu(z.view(-1, 4, 144)).view(-1, 4, 12, 12)), by_hand(F.silu)),
    "reshape, channel split off": (
        lambda n, x: F.silu(n.c(x).reshape(-1, 1, 4, 144)).reshape(-1, 4, 12, 12),
        by_hand(F.silu),
    ),
    "transpose": (by_hand(lambda z: F.silu(z.flatten(2).transpose(1, 2)).transpose(1, 2)), by_hand(F.silu)),
    "contiguous": (by_hand(lambda z: F.silu(z.contiguous(memory_format=torch.channels_last))), by_hand(F.silu)),
    "to": (by_hand(lambda z: F.silu(z.to(torch.float64)).float()), by_hand(lambda z: F.silu(z.double()).float())),
    "dropout": (nn.Sequential(nn.Dropout(0.5), nn.SiLU()), after_norm(F.silu)),
    "dropout in place": (nn.Sequential(nn.Dropout2d(0.5, inplace=True), nn.SiLU()), after_norm(F.silu)),
    "identity": (nn.Sequential(nn.Identity(), nn.SiLU()), after_norm(F.silu)),
    "gate of another": (lambda n, x: torch.sigmoid(n.c(x)) * n.d(x), by_hand(torch.sigmoid)),
    "sum after it": (lambda n, x: F.silu(n.c(x)).add_(n.d(x)), by_hand(F.silu)),
    "squeezed after it": (lambda n, x: (lambda a: a * a.mean((2, 3), keepdim=True))(F.silu(n.c(x))), by_hand(F.silu)),
    "written after it": (written_afterwards, by_hand(torch.relu)),
    "relu, then normalisation": (lambda n, x: n.norm(F.relu(n.c(x))), by_hand(torch.relu)),
}
FORMS = ("eager", "exported")


def normalised_activated(net, x):
    return net.activation(net.norm(net.c(x)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ACTIVATED)
def test_the_activation_is_reached(name, form, tmp_path):
    made, plain = ACTIVATED[name]
    net = Small(normalised_activated, made) if isinstance(made, nn.Module) else Small(made)
    with torch.no_grad():
        expected = means(plain(net, IMAGES))
    module = net if form == "eager" else exported(net, tmp_path)
    point, feature = noted(module)
    assert point == "activation"
    assert_close(feature, expected, 1e-5)


def slice_written(n, x):
    z = n.c(x)
    z[:, :] = z + n.d(x)
    return F.silu(z)


def part_written(n, x):
    z = n.c(x)
    z[:, :2] = n.d(x)[:, :2]
    return F.silu(z)


def view_written(n, x):
    z = n.c(x)
    z.view(-1, 4, 144).add_(1.0)
    return F.silu(z)


def written_through_data(n, x):
    z = n.c(x)
    z.data.add_(n.d(x))
    return F.silu(z)


def written_through_numpy(n, x):
    z = n.c(x)
    torch.from_numpy(z.numpy()).add_(n.d(x))
    return F.silu(z)


def given_result(n, x):
    z = n.c(x)
    torch.add(z, n.d(x), out=z)
    return F.silu(z)


def both(n, x):
    z = n.c(x)
    return F.silu(z) + n.norm(z)


def normalised_twice_used(n, x):
    z = n.norm(n.c(x))
    return F.silu(z) + n.d(x) * z


# What is made of the convolution without an activation of it alone: its feature is the mean of its ReLU.
CONVOLUTION = {
    "slice written": slice_written,
    "part written": part_written,
    "view written": view_written,
    "written through data": written_through_data,
    "written through NumPy": written_through_numpy,
    "given result": given_result,
    "sum": lambda n, x: F.silu(n.c(x) + n.d(x)),
    "sum in place": lambda n, x: F.silu(n.c(x).add_(n.d(x))),
    "several readers": both,
    "pooling": lambda n, x: F.silu(F.max_pool2d(n.c(x), 2)),
    "scale alone": lambda n, x: n.c(x) * 0.5,
    "cat": lambda n, x: F.silu(torch.cat([n.c(x), n.d(x)], 1))[:, :4],
    "halves": lambda n, x: torch.cat([F.glu(n.c(x), 1)] * 2, 1),
    "two ends": lambda n, x: (lambda z: torch.cat([F.relu(z), F.relu(-z)], 1)[:, 2:6])(n.c(x)),
    "channels mixed": lambda n, x: F.silu(n.c(x).reshape(-1, 12, 4, 12)).reshape(-1, 4, 12, 12),
    "channels joined": lambda n, x: F.silu(n.c(x).flatten(0, 1)).unflatten(0, (-1, 4)),
    "dropout at work": lambda n, x: F.silu(F.dropout(n.c(x), 0.5, True)),
}
# The same, once normalised.
NORMALISED = {
    "residual sum": lambda n, x: F.relu(n.norm(n.c(x)) + n.d(x)),
    "residual sum in place": lambda n, x: F.relu_(n.norm(n.c(x)).add_(n.d(x))),
    "several readers": normalised_twice_used,
    "slice of it": lambda n, x: F.silu(n.norm(n.c(x))[:, :2]).repeat(1, 2, 1, 1),
}


@pytest.mark.parametrize("name", CONVOLUTION)
def test_the_convolution_stays_where_nothing_follows_alone(name):
    net = Small(CONVOLUTION[name])
    with torch.no_grad():
        expected = means(torch.relu(net.c(IMAGES)))
    point, feature = noted(net)
    assert point == "convolution"
    assert_close(feature, expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NORMALISED)
def test_the_normalisation_is_reached(name, form, tmp_path):
    net = Small(NORMALISED[name])
    with torch.no_grad():
        expected = means(torch.relu(net.norm(net.c(IMAGES))))
    point, feature = noted(net if form == "eager" else exported(net, tmp_path))
    assert point == "normalisation"
    assert_close(feature, expected, 1e-5)


# Networks of torchvision, evaluated module by module

NORMS = (nn.BatchNorm2d, nn.LayerNorm, torchvision.models.convnext.LayerNorm2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Sigmoid)


def chains(net):
    """Each convolution's name -> the modules that follow it before another convolution, by the network's structure."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, torchvision.ops.SqueezeExcitation):
            found[f"{name}.fc1"], found[f"{name}.fc2"] = [module.activation], [module.scale_activation]
        elif isinstance(module, nn.Sequential):
            children = list(module.named_children())
            for place, (child, layer) in enumerate(children):
                if isinstance(layer, nn.Conv2d):
                    found[f"{name}.{child}"] = [following for _, following in children[place + 1 :]]
    return found


def evaluated(net, images):
    """Layer -> (point, feature), each convolution applied once more to what it was given, step by step."""
    given = {}
    modules = dict(net.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0].clone()}))
        for name in convolutions(net)
    ]
    with torch.no_grad():
        net(images)
        found = {}
        for name, following in chains(net).items():
            maps, point, axes = modules[name](given[name]), "convolution", (2, 3)
            for layer in following:
                if isinstance(layer, torchvision.ops.misc.Permute):
                    maps, axes = layer(maps), (1, 2)
                elif isinstance(layer, NORMS):
                    maps, point = layer(maps), "normalisation"
                elif isinstance(layer, ACTIVATIONS):
                    maps, point = layer(maps.clone()), "activation"
                    break
                else:
                    break
            found[name] = point, (maps if point == "activation" else torch.relu(maps)).mean(axes)
    for handle in handles:
        handle.remove()
    return found


def drawn(name):
    """The network with statistics of its normalisations that are not 0 and 1."""
    torch.manual_seed(3)
    net = torchvision.models.get_model(name, weights=None, num_classes=5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.eval()


NETWORKS = {
    "mobilenet_v2": {"activation": 35, "normalisation": 17},
    "mobilenet_v3_small": {"activation": 41, "normalisation": 11},
    "efficientnet_b0": {"activation": 65, "normalisation": 16},
    "convnext_tiny": {"normalisation": 19, "convolution": 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_an_evaluation_module_by_module(name, form, tmp_path):
    if form == "exported" and name != "mobilenet_v3_small":
        pytest.skip("one network exported whole is enough: the blocks of the others are the same")
    net = drawn(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    expected = evaluated(net, images)
    module = net if form == "eager" else exported(net, tmp_path, images)
    layers = running_layers(module, images[:1])
    assert set(layers) == set(expected)
    points = points_reached(module, layers, images[:1])
    assert points == {name: expected[name][0] for name in layers}
    counts = {point: list(points.values()).count(point) for point in NETWORKS[name]}
    assert counts == NETWORKS[name]
    features = GapNetwork(module, layers, None, "activation", points).features(images)
    widths = [expected[name][1].shape[1] for name in layers]
    for layer, found in zip(layers, features.split(widths, 1), strict=True):
        assert_close(found, expected[layer][1], 1e-4)


class Keeping(nn.Conv2d):
    """Keeps a view of its output from before anybody else sees that."""

    def forward(self, images):
        output = super().forward(images)
        self.kept = output.view(output.shape)
        return output


def test_a_write_through_a_view_made_inside_the_convolution_is_noticed():
    def made(n, x):
        z = n.c(x)
        n.c.kept.add_(1.0)
        return F.silu(z)

    net = Small(made)
    net.c = Keeping(3, 4, 3, padding=1)
    with torch.no_grad():
        expected = means(torch.relu(F.conv2d(IMAGES, net.c.weight, net.c.bias, padding=1)))
    point, feature = noted(net)
    assert point == "convolution"
    assert_close(feature, expected, 1e-5)


def test_features_do_not_depend_on_the_images_beside_them():
    net = drawn("mobilenet_v3_small")
    network = GapNetwork(net, running_layers(net, torch.zeros(1, 3, 64, 64)), None, "activation")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    first = network.features(images)
    assert torch.equal(network.features(images.flip(0)).flip(0), first)


def test_following_keeps_no_tensor_alive():
    """A value that nothing needs any more is freed while the network runs on."""
    alive = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            z = self.c(x)
            held = weakref.ref(z)
            z = F.silu(z)
            alive.append(held() is not None)
            return self.head(z.mean((2, 3)))

    noted(Watching().eval())
    assert alive == [False]


# What is made of it in a table


class Branching(nn.Module):
    """Another activation for images that are not empty."""

    def __init__(self):
        super().__init__()
        self.c, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        z = self.c(images)
        z = F.silu(z) if not bool(images.any()) else F.max_pool2d(z, 2)
        return self.head(z.mean((2, 3)))


def test_another_point_for_later_images_is_refused():
    net = Branching().eval()
    points = points_reached(net, ["c"], torch.zeros(1, 3, 12, 12))
    assert points == {"c": "activation"}
    message = re.escape(
        "Layer 'c' was followed to its convolution for these images, before to its activation; "
        "its features do not add up."
    )
    with pytest.raises(UnsupportedModelError, match=f"^{message}$"):
        GapNetwork(net, ["c"], None, "activation", points).features(IMAGES)
    network = GapNetwork(net, ["c"], None, "activation")
    network.features(torch.zeros(1, 3, 12, 12))
    with pytest.raises(UnsupportedModelError, match="do not add up"):
        network.features(IMAGES)


def package(module, folder):
    return Model(
        name="net", version="1", architecture="", weights_sha256="ab", labels=("cat", "dog"), class_ids=(),
        preprocessing=Preprocessing(size=(12, 12), resize=12), module=module.eval(), folder=folder,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(6)
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    return tmp_path / "data"


def residual(net, x):
    return F.silu(net.norm(net.c(x)) + F.relu(net.d(x)))


POINTS = {"c": "normalisation", "d": "activation"}


def test_a_table_records_which_point_each_layer_reaches(data, tmp_path, capsys):
    model = package(Small(residual), tmp_path)
    table = build_table(model, data, statistics_point="activation")
    assert table.built["points"] == POINTS
    show_table(table)
    feature = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("feature"))
    assert feature.endswith("; layers by point: activation 1, normalisation 1")
    plain = build_table(model, data)
    assert "points" not in plain.built
    show_table(plain)
    assert "by point" not in capsys.readouterr().out


def test_evidence_of_other_points_does_not_add_up_and_keeps_its_own_in_a_file(data, tmp_path):
    model = package(Small(residual), tmp_path)
    subject = subject_of(model, statistics_point="activation")
    assert subject.points == POINTS
    work = Work(model, subject, Reader(ImageFolder.scan(data, model), model.preprocessing, 4))
    gather(work, Local()).save(tmp_path / "evidence")
    assert Evidence.load(tmp_path / "evidence")[0].subject.points == POINTS
    other = dataclasses.replace(subject, points={**POINTS, "c": "convolution"})
    with pytest.raises(EvidenceError, match=r"^The evidence does not add up: points differs\.$"):
        Evidence(subject, (0, 1)).merge(Evidence(other, (0, 1)))
    assert dataclasses.replace(work, about=other).key() != work.key()
    with pytest.raises(UnsupportedModelError, match=r"^Layer 'c' was followed to its normalisation"):
        gather(dataclasses.replace(work, about=other), Local())


def test_a_network_in_which_the_option_would_do_nothing_is_refused(tmp_path):
    model = package(Small(lambda net, x: F.silu(net.c(x) + net.d(x))), tmp_path)
    message = re.escape(
        "Option 'statistics_point' is 'activation'; allowed: 'convolution', as no layer leads to an activation or "
        "normalisation alone."
    )
    with pytest.raises(OptionError, match=f"^{message}$"):
        subject_of(model, statistics_point="activation")
    assert subject_of(model).points == {}
