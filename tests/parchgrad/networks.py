"""Small networks for the tests, each with one thing that breaks careless hooks, and tables for them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.statistics import ClassMoments
from parchgrad.tables import LayerTable, SelectionTable
from tests.oracles.maps import CONVOLUTIONS

CLASSES = 5


class Branching(nn.Module):
    """Residual, BatchNorm, strides, groups, dilation, reflect and 'same' padding: where conservation matters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding="same", groups=2, dilation=2)
        self.right = nn.Conv2d(8, 8, 1)
        self.join = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        z = F.relu(self.left(z) + self.right(z) + z)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


class InPlaceRelu(Branching):
    """The convolution's own output is overwritten by an in-place ReLU before anyone else sees it."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, images):
        z = self.act(self.stem(images))
        z = self.act(self.left(z))
        return self.head(self.act(self.join(z)).mean((2, 3)))


class ReusedRelu(Branching):
    """One ReLU module in three places."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, images):
        z = self.act(self.norm(self.stem(images)))
        z = self.act(self.left(z) + self.right(z))
        return self.head(self.act(self.join(z)).mean((2, 3)))


class FunctionalRelu(Branching):
    """Every spelling of ReLU that is no module, in place and not."""

    def forward(self, images):
        z = torch.relu(self.norm(self.stem(images)))
        left, right = self.left(z).relu(), self.right(z).clamp(min=0)
        z = F.relu_(left + right)
        z = torch.relu_(self.join(z))
        return self.head(z.mean((2, 3)).relu_())


class InPlaceOnBranch(Branching):
    """A convolution's output feeds two branches; one adds into it in place, the other scaled it before."""

    def forward(self, images):
        z = self.norm(self.stem(images))
        scaled = z * 0.5
        z += self.right(scaled)
        z = F.relu(z, inplace=True)
        y = self.left(z)
        y.add_(z).mul_(0.7)
        F.relu(y, inplace=True)  # the return value is dropped: only the in-place effect counts
        return self.head(F.relu(self.join(y)).mean((2, 3)))


class ReusedConvolution(Branching):
    """The same convolution twice in one forward pass: the rule acts at each call."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        z = F.relu(self.right(z))
        z = F.relu(self.right(z) + z)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


class ReusedBeforePooling(Branching):
    """A convolution used twice whose second call sends back a constant gradient: unchanged there, ruled before."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        z = self.right(F.relu(self.right(z))).mean((2, 3))
        return self.head(F.pad(z, (0, 4)))


class OnePosition(nn.Module):
    """Squeeze-and-excitation: convolutions of 1x1 maps, whose variance is the second moment."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images):
        z = F.relu(self.body(images))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        return self.head((z * gate).mean((2, 3), keepdim=True)).flatten(1)


class Smooth(Branching):
    """No kinks: for integrated gradients' completeness."""

    def forward(self, images):
        z = torch.tanh(self.norm(self.stem(images)))
        z = torch.tanh(self.left(z) + self.right(z))
        return self.head(torch.tanh(self.join(z)).mean((2, 3)))


class OverwrittenInput(Branching):
    """Writes into the images it is given."""

    def forward(self, images):
        images.mul_(1.5)
        return super().forward(images)


class ViewedOutput(Branching):
    """Reads a convolution's output through views and splits, then writes into one of them."""

    def forward(self, images):
        z = self.norm(self.stem(images))
        low, high = z[:, :4] * 1.0, z[:, 4:]
        z = F.relu(torch.cat([high, low], 1))
        y = self.join(z)
        y[:, :3] *= 2.0
        return self.head(F.relu(y).flatten(2).mean(2))


class SlicedRelu(Branching):
    """An in-place ReLU of some channels only: autograd hides it inside a slice copy."""

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        y = self.join(z)
        y[:, :6].relu_()
        return self.head(torch.tanh(y).mean((2, 3)))


class Parametrized(Branching):
    """A convolution whose weight is computed anew at every call."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.join)


class Hooked(Branching):
    """The caller's own hook changes what a convolution gives: it is part of the model."""

    def __init__(self):
        super().__init__()
        self.right.register_forward_hook(double_output)


def double_output(_, __, output):
    return 2.0 * output


class Transposed(nn.Module):
    """Transposed convolutions: grouped, with stride, dilation and output padding, and one of 1x1 maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=4)
        self.wide = nn.ConvTranspose2d(12, 6, 2, dilation=2, bias=False)
        self.point = nn.ConvTranspose2d(6, 10, 1)
        self.gate = nn.ConvTranspose2d(6, 10, 1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, images):
        z = F.relu(self.norm(self.up(F.relu(self.stem(images)))))
        z = F.relu(self.wide(z))
        gate = torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        return self.head((F.relu(self.point(z) * gate)).mean((2, 3)))


ALL = (
    Branching,
    InPlaceRelu,
    ReusedRelu,
    FunctionalRelu,
    InPlaceOnBranch,
    ReusedConvolution,
    ReusedBeforePooling,
    OnePosition,
    Smooth,
    OverwrittenInput,
    ViewedOutput,
    SlicedRelu,
    Parametrized,
    Hooked,
    Transposed,
)


def build(network=Branching, seed=0, dtype=torch.float64):
    """A network in eval mode with BatchNorm statistics that are not the identity."""
    torch.manual_seed(seed)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.to(dtype).eval()


def batch(images=3, size=12, seed=0, dtype=torch.float64):
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def layer_table(channels, classes, seed):
    """Rows from made-up GAP features: real p-values, a dead channel (std 0), normal and non-normal channels."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 20)
    features = generator.exponential(0.1, (len(labels), channels)) + 0.1 * generator.random((classes, channels))[labels]
    features[:, ::3] = np.abs(generator.normal(0.4, 0.1, features[:, ::3].shape) + 0.05 * (labels[:, None] % 2))
    features[:, 1] = 0.0
    moments = ClassMoments(classes, channels)
    moments.update(features, labels)
    return LayerTable.from_moments(moments, features)


def table_for(model, classes=CLASSES, seed=0, covered=None, name="made-up", **defaults):
    """A table with everything in it: p-values over many orders of magnitude, statistics, normality."""
    covered = tuple(range(classes)) if covered is None else tuple(covered)
    layers = {
        layer: layer_table(module.out_channels, len(covered), seed + i)
        for i, (layer, module) in enumerate(model.named_modules())
        if isinstance(module, CONVOLUTIONS)
    }
    table = SelectionTable(
        name=name,
        model_name="",
        weights_sha256="",
        labels=tuple(f"class {c}" for c in range(classes)),
        classes=covered,
        layers=layers,
        images_per_class=(20,) * len(covered),
        built={"by": "tests"},
    )
    return table.with_defaults(**defaults) if defaults else table
