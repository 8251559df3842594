"""How much one channel does to another: contributions between a network's layers, measured on images.

After Summit (Hohman et al. 2019), which multiplies weights by activations between neighbouring layers. Here it is
gradient times activation, so that batch normalisation, pooling, concatenation, gates and skip connections lie on
the way as they are, and the network itself says which layers are neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.runtimes.view import private_view

Pair = tuple[str, str]  # layer, a layer after it


@dataclass
class Influence:
    """What images say together; sums over images, float64, where the network ran."""

    contributions: dict[Pair, Tensor] = field(default_factory=dict)  # (selected of the first, of the second)
    features: dict[str, Tensor] = field(default_factory=dict)  # layer -> (selected,): their GAP features
    images: int = 0

    def add(self, other: Influence) -> None:
        """Add what other images say of the same channels."""
        for pair, contribution in other.contributions.items():
            self.contributions[pair] = self.contributions.get(pair, 0.0) + contribution
        for name, feature in other.features.items():
            self.features[name] = self.features.get(name, 0.0) + feature
        self.images += other.images

    def weights(self) -> dict[Pair, Tensor]:
        """Share of each second channel's feature that comes by way of each first one; 0 where there is no feature."""
        shares = {}
        for (first, second), contribution in self.contributions.items():
            feature = self.features[second]
            shares[first, second] = torch.where(feature > 0, contribution / feature.clamp(min=1e-300), 0.0)
        return shares


class InfluenceNetwork:
    """A model that answers with the contributions of channels to those of the next layers.

    For one image, channels j and k with outputs `a_j`, `a_k` of their convolutions and `f_k = mean over (h, w) of
    ReLU(a_k)`, the GAP feature of the table:

        C(j, k) = sum over (h, w) of  d f_k / d a_j  *  ReLU(a_j)

    where the derivative goes through everything between the two except other `layers`, whose outputs count as given:
    k's next layers are exactly those that the network leads to without another of `layers` in between. In a chain of
    convolutions and ReLUs the C(j, k) of all j, and what the bias gives, sum to f_k.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], device: torch.device | None = None) -> None:
        self._module = private_view(module, device)
        self._device = device
        self._dtype = next(p for p in self._module.parameters() if p.is_floating_point()).dtype
        self._layers = tuple(layers)
        self._selected: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._found = Influence()
        for name in self._layers:
            layer = self._module.get_submodule(name)
            layer.register_forward_hook(self._hook(name, _rows_of(layer)))

    def measure(self, images: Tensor, selected: Mapping[str, Tensor]) -> tuple[Influence, dict[str, Tensor]]:
        """What normalised `images` `(B, 3, h, w)` say of the `selected` channels of each layer, `(n,)` long.

        Also the layers' own outputs `(B, C, ...)`, on the device. Raises UnsupportedModelError for a layer that runs
        twice or not at all.
        """
        self._selected = {name: selected[name].to(self._device) for name in self._layers}
        self._outputs, self._found = {}, Influence(images=len(images))
        try:
            with torch.enable_grad():
                self._module(images.to(self._device, self._dtype))
            for name in self._layers:
                if name not in self._outputs:
                    raise UnsupportedModelError(f"Layer '{name}' took no part in the model's forward pass.")
            return self._found, {name: output.detach() for name, output in self._outputs.items()}
        finally:
            self._outputs, self._found = {}, Influence()

    def _hook(self, name: str, rows: Rows | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if name in self._outputs:
                raise UnsupportedModelError(f"Layer '{name}' runs twice in one forward pass; its part is ambiguous.")
            self._contribute(name, rows, args, output)
            # Cut: what comes after sees this layer's output as given. The copy, as an in-place ReLU may follow.
            self._outputs[name] = output.detach().requires_grad_()
            return self._outputs[name].clone()

        return hook

    def _contribute(self, name: str, rows: Rows | None, args: tuple[Any, ...], output: Tensor) -> None:
        """Now, and not after the pass: what the convolution was given may be written over by what follows."""
        channels = self._selected[name]
        features = torch.relu(output.detach()[:, channels]).flatten(2).mean(2)
        self._found.features[name] = features.double().sum(0)
        if not output.requires_grad:
            return  # the first layers: nothing of ours before them
        before = dict(self._outputs)
        for place, channel in enumerate(channels.tolist()):
            row = output[:, channel] if rows is None or len(args) != 1 else rows(args[0], channel)
            feature = torch.relu(row).flatten(1).mean(1).sum()
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                feature, list(before.values()), retain_graph=True, allow_unused=True
            )
            for first, gradient in zip(tuple(before), gradients, strict=True):
                if gradient is None:
                    del before[first]  # does not lead here
                    continue
                here = self._selected[first]
                activity = torch.relu(before[first].detach()[:, here])
                pair = self._found.contributions.setdefault(
                    (first, name), activity.new_zeros(len(here), len(channels), dtype=torch.float64)
                )
                pair[:, place] = (gradient[:, here] * activity).flatten(2).sum(2).double().sum(0)


Rows = Callable[[Tensor, int], Tensor]


def _rows_of(layer: nn.Module) -> Rows | None:
    """One output channel of a convolution by itself, `(B, h, w)`: its gradient costs that channel's weights alone.

    None for what is no plain convolution of torch.nn, whose output is then gone back through as a whole.
    """
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if type(layer) not in plain or layer._forward_pre_hooks or layer._forward_hooks:
        return None
    convolution: Any = layer
    single = copy.copy(convolution)
    single.groups = 1
    inputs = convolution.in_channels // convolution.groups
    outputs = convolution.out_channels // convolution.groups

    def row(given: Tensor, channel: int) -> Tensor:
        first = channel // outputs * inputs
        bias = None if convolution.bias is None else convolution.bias[channel : channel + 1]
        mine = given[:, first : first + inputs]
        answer: Tensor = single._conv_forward(mine, convolution.weight[channel : channel + 1], bias)
        return answer[:, 0]

    return row
