"""The bundled network: a small residual CNN, fully convolutional up to its global average pooling."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_STEM = 24
# (channels, residual blocks) of the stages, each of which halves height and width, as the stem does.
_STAGES = ((48, 1), (72, 2), (112, 2))
# Wider than the last stage: room for channels that belong to one class, which is what a selection table looks for.
_HEAD = 240


def _normed(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, padded to keep height and width at stride 1, and batch normalisation."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


class Block(nn.Module):
    """Two 3×3 convolutions beside a skip connection.

    (batch, channels, h, w) -> (batch, out, h / stride, w / stride), rounded up.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = _normed(channels, out, 3, stride)
        self.second = _normed(out, out, 3)
        self.skip = nn.Identity() if stride == 1 and channels == out else _normed(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + self.skip(x))


class SceneNet(nn.Module):
    """Images (batch, 3, h, w), h and w of 16 or more -> logits (batch, classes). `features` has stride 16."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_normed(3, _STEM, 3, 2), nn.ReLU()]
        channels = _STEM
        for out, blocks in _STAGES:
            layers.append(Block(channels, out, stride=2))
            layers += [Block(out, out, stride=1) for _ in range(blocks - 1)]
            channels = out
        layers += [_normed(channels, _HEAD, 1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_HEAD, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.pool(self.features(images)).flatten(1)))


def scene_net(num_classes: int = 10) -> nn.Module:
    """The bundled network with fresh weights."""
    return SceneNet(num_classes)
