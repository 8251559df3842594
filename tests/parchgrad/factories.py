"""Factories a model package may name as its architecture, good and bad."""

import torch
from torch import nn


class Small(nn.Module):
    """Two convolutions, BatchNorm, a head; any input size."""

    def __init__(self, classes, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 6, 3, stride=2)
        self.head = nn.Linear(6, classes)

    def forward(self, images):
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(images))))).mean((2, 3)))


def small(num_classes, width=6):
    return Small(num_classes, width)


def no_network(num_classes):
    return {"classes": num_classes}


def failing(num_classes):
    raise RuntimeError("no such width")


def seven_outputs(num_classes):
    return Small(7, 6)


class Grey(Small):
    """Takes images of one channel."""

    def __init__(self, classes):
        super().__init__(classes, 6)
        self.first = nn.Conv2d(1, 6, 3, padding=1)


def grey(num_classes):
    return Grey(num_classes)


def dense(num_classes):
    """No convolution."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


class Patches(nn.Module):
    """A patch embedding and a mean: one convolution."""

    def __init__(self, classes):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.head = nn.Linear(6, classes)

    def forward(self, images):
        return self.head(torch.tanh(self.embed(images)).mean((2, 3)))


def patches(num_classes):
    return Patches(num_classes)
