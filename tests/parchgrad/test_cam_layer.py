"""The default layer of Grad-CAM: what people choose on torchvision's networks, and networks that have none."""

import pytest
import torch
import torchvision
from torch import nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.evaluation.cam_layer import cam_layer_of
from scenes.network import scene_net
from tests.parchgrad import networks
from tests.parchgrad.networks import CLASSES, build


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("vgg11", "features.19"),
        ("alexnet", "features.11"),
        ("squeezenet1_1", "features"),
        ("mobilenet_v2", "features"),
        ("mobilenet_v3_small", "features"),
        ("densenet121", "features"),
        ("efficientnet_b0", "features"),
        ("convnext_tiny", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
        ("swin_t", "permute"),
    ],
)
def test_it_is_the_layer_people_choose(name, layer):
    assert cam_layer_of(torchvision.models.get_model(name, weights=None).train(), torch.zeros(3, 96, 96)) == layer


def test_squeezenets_layer_is_its_last_fire_and_not_the_class_scores():
    network = torchvision.models.squeezenet1_1(weights=None).eval()
    outputs = {}
    for name in ("features", "features.12"):
        part = network.get_submodule(name)
        part.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, output))
    network(torch.zeros(1, 3, 64, 64))
    assert outputs["features"] is outputs["features.12"]


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (lambda: scene_net(CLASSES), "features"),
        (networks.Branching, "join"),
        (networks.ReusedRelu, "join"),  # its one ReLU runs three times
        (networks.ReusedConvolution, "join"),
        (networks.Parametrized, "join"),
        (networks.OnePosition, "body"),
    ],
    ids=["scenes", "Branching", "ReusedRelu", "ReusedConvolution", "Parametrized", "OnePosition"],
)
def test_of_other_networks(network, layer):
    assert cam_layer_of(build(network), torch.zeros(3, 32, 32)) == layer


def test_as_many_channels_as_classes_are_no_class_scores_while_a_classifier_follows():
    parts = nn.Conv2d(3, CLASSES, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    assert cam_layer_of(nn.Sequential(*parts, nn.Linear(CLASSES, CLASSES)), torch.zeros(3, 9, 9)) == "1"
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, CLASSES, 3), nn.ReLU()), *parts[2:])
    assert cam_layer_of(one, torch.zeros(3, 9, 9)) == "0"


class Tokens(nn.Module):
    """Patches, mixed as a sequence."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, images):
        return self.head(self.mix(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    "network",
    [
        Tokens,
        networks.ReusedBeforePooling,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)),
        lambda: nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
    ids=["Tokens", "ReusedBeforePooling", "no map", "class scores alone"],
)
def test_where_none_fits_that_is_said(network):
    with pytest.raises(UnsupportedModelError, match="only pooling and classification"):
        cam_layer_of(build(network), torch.zeros(3, 32, 32))


def test_what_gives_no_logits_is_refused():
    with pytest.raises(UnsupportedModelError, match="expected logits"):
        cam_layer_of(nn.Conv2d(3, 4, 3), torch.zeros(3, 9, 9))


def test_the_network_stays_as_it_was():
    network = build(networks.Branching).train()
    cam_layer_of(network, torch.zeros(3, 32, 32))
    assert network.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    assert torch.equal(network.norm.running_mean, build(networks.Branching).norm.running_mean)
