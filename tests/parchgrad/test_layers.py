"""Convolutions by name, of every kind, and the patterns that choose among them."""

import pytest
import torch
from torch import nn

from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.layers import Convolution, convolutions
from parchgrad.patterns import match
from parchgrad.tables import SelectionTable
from tests.oracles import maps
from tests.oracles.maps import Options
from tests.oracles.tolerance import assert_each_close, relative_l2

NAMES = ("stem", "block.0.conv", "block.0.se.fc1", "block.0.se.fc2", "block.1.conv", "block.1.se.fc1", "head")


@pytest.mark.parametrize(("patterns", "expected"), [
    (["*"], NAMES),
    (["head", "stem"], ("stem", "head")),
    (["block.*"], NAMES[1:6]),
    (["*", "!*.se.*"], ("stem", "block.0.conv", "block.1.conv", "head")),
    (["!*.se.*", "*"], ("stem", "block.0.conv", "block.1.conv", "head")),
    (["!*.se.*"], ("stem", "block.0.conv", "block.1.conv", "head")),
    (["!*.se.*", "!stem"], ("block.0.conv", "block.1.conv", "head")),
    (["block.*", "!block.1.*"], NAMES[1:4]),
    (["block.*", "!stem"], NAMES[1:6]),
], ids=str)  # fmt: skip
def test_patterns(patterns, expected):
    assert match(NAMES, patterns) == expected


@pytest.mark.parametrize(("patterns", "value"), [
    (["layer9.*"], "layer9.*"), (["*", "!layer9.*"], "!layer9.*"), (["!*.gate"], "!*.gate"),
    (["!*"], "!*"), (["stem", "!stem"], "stem,!stem"), (["!!stem"], "!!stem"),
], ids=str)  # fmt: skip
def test_a_pattern_that_fits_nothing_or_leaves_nothing_is_refused(patterns, value):
    with pytest.raises(OptionError, match="Option 'layers' is ") as caught:
        match(NAMES, patterns)
    assert caught.value.value == value


def test_no_layers_at_all_are_refused_not_a_crash():
    with pytest.raises(OptionError, match="a network without convolutions"):
        match((), ["*"])


class Own(Convolution):
    """A convolution of no torch.nn kind."""

    out_channels = 7


KINDS = {
    "plain": (nn.Conv2d(4, 8, 3), 8),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), 8),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), 8),
    "pointwise": (nn.Conv2d(4, 8, 1), 8),
    "1d": (nn.Conv1d(4, 8, 3), 8),
    "3d": (nn.Conv3d(4, 8, 3), 8),
    "transposed-1d": (nn.ConvTranspose1d(4, 8, 3), 8),
    "transposed-2d": (nn.ConvTranspose2d(4, 8, 3, groups=2), 8),
    "transposed-3d": (nn.ConvTranspose3d(4, 8, 3), 8),
    "of-another-library": (Own(), 7),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_convolution_is_found(case):
    layer, channels = case
    assert convolutions(nn.Sequential(nn.ReLU(), nn.Sequential(layer, nn.Linear(2, 2)))) == {"1.0": channels}


@pytest.mark.parametrize("kind", [nn.LazyConv1d, nn.LazyConv2d, nn.LazyConvTranspose2d])
def test_a_lazy_convolution_without_weights_is_refused_by_name(kind):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), kind(8, 3))
    with pytest.raises(UnsupportedModelError, match=f"Module '1' is a lazy convolution \\({kind.__name__}\\)"):
        convolutions(network)


def test_a_lazy_convolution_that_has_run_is_one_like_any_other():
    network = nn.Sequential(nn.LazyConv2d(8, 3))
    network(torch.zeros(1, 3, 8, 8))
    assert convolutions(network) == {"0": 8}


@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|TypedStorage|deprecated)")
def test_a_quantised_convolution_is_refused_by_name():
    quantised = pytest.importorskip("torch.ao.nn.quantized")
    network = nn.Sequential(nn.ReLU(), quantised.Conv2d(3, 4, 3))
    with pytest.raises(UnsupportedModelError, match=r"Module '1' is a quantised convolution .*give the float network"):
        convolutions(network)


class Grouped(nn.Module):
    """Depthwise, grouped, and squeeze-and-excitation by 1x1 convolutions of 1x1 maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 8, 3, groups=4)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        z = torch.relu(self.grouped(torch.relu(self.depthwise(torch.relu(self.stem(images))))))
        gate = torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(10.0 * z.mean((2, 3), keepdim=True)))))
        return self.head((z * gate).mean((2, 3)))


@pytest.mark.parametrize("only", ["depthwise", "grouped", "squeeze", "excite"])
def test_the_rule_acts_on_grouped_depthwise_and_squeeze_excite_convolutions(only):
    """Each alone, against the loop oracle, and it changes the map."""
    torch.manual_seed(0)
    model = Grouped().double().eval()
    table = SelectionTable.random(model, 5, 0)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    options = [Options(target=t, quantile=0.4, layers=(only,)) for t in (1, 3)]
    found = Explainer(model, table).explain(images, [1, 3], quantile=0.4, layers=[only])
    expected, answers = maps.explain_batch(model, table, images, options)
    assert_each_close(found.attributions, expected, 1e-9)
    assert [answer.layers_used for answer in answers] == found.layers_used.tolist() == [1, 1]
    plain = Explainer(model, table).explain(images, [1, 3], rule=False)
    for one, other in zip(found.attributions, plain.attributions, strict=True):
        assert relative_l2(one, other) > 1e-4
