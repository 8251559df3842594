"""The bundled network: its shape, and that it sees every place alike whatever the picture's size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scenes.network import scene_net


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return scene_net().eval()


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (256, 256), (48, 80), (97, 131)], ids=str)
def test_it_takes_pictures_of_many_sizes(network, shape):
    with torch.inference_mode():
        assert network(torch.randn(2, 3, *shape)).shape == (2, 10)


def test_the_number_of_classes_is_the_callers():
    assert scene_net(num_classes=3)(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_batch_mates_do_not_meet(network):
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(images)[2:3], network(images[2:3]))


def test_it_is_fully_convolutional_before_its_pooling(network):
    """Content moved by the network's stride moves the features by one place, border effects aside."""
    stride = 16
    picture = torch.zeros(1, 3, 256, 256)
    picture[..., 112:144, 112:144] = torch.randn(1, 3, 32, 32)
    moved = torch.roll(picture, shifts=(stride, -stride), dims=(2, 3))
    with torch.inference_mode():
        features, shifted = network.features(picture), network.features(moved)
    assert features.shape[2:] == (16, 16)
    there = torch.roll(features, shifts=(1, -1), dims=(2, 3))
    centre = slice(4, 12)
    torch.testing.assert_close(shifted[..., centre, centre], there[..., centre, centre])


def test_a_corner_is_not_seen_from_the_opposite_one(network):
    picture = torch.randn(1, 3, 256, 256)
    changed = picture.clone()
    changed[..., :32, :32] = 0
    with torch.inference_mode():
        features, others = network.features(picture), network.features(changed)
    assert not torch.equal(features[..., :2, :2], others[..., :2, :2])
    torch.testing.assert_close(features[..., 12:, 12:], others[..., 12:, 12:])


def test_it_has_strides_norms_and_skips(network):
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.stride == (2, 2) for m in convolutions)
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert any(isinstance(m, nn.Identity) for m in network.modules())
