"""The layer at which Grad-CAM is made where nobody names one; no maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import dropout, pooling

from parchgrad.errors import UnsupportedModelError
from parchgrad.runtimes.view import private_view

_POOLING = (
    *(pooling._AvgPoolNd, pooling._MaxPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd),
    *(dropout._DropoutNd, nn.Identity, nn.Flatten),
)


@dataclass(frozen=True)
class _Call:
    """One run of a module in a prediction."""

    name: str
    module: nn.Module
    within: tuple[int, ...]  # runs it happened in, by the number they began with, the outermost first
    number: int
    shape: tuple[int, ...] | None  # of its output; None: not a tensor
    leaf: bool  # no other module ran in it

    @property
    def weighs(self) -> bool:
        return any(True for _ in self.module.parameters())

    @property
    def spatial(self) -> bool:
        return self.shape is not None and len(self.shape) == 4 and self.shape[0] == 1 and self.positions > 1

    @property
    def positions(self) -> int:
        return 0 if self.shape is None or len(self.shape) != 4 else self.shape[2] * self.shape[3]


def cam_layer_of(module: nn.Module, image: Tensor) -> str:
    """The dotted name of the layer people choose for Grad-CAM: the last feature map before the classifier.

    Found in one prediction of `image` `(3, h, w)`. The last innermost module to run counts whose output is (B, C, h, w)
    with more than one position and that is no pooling or dropout. Where the network's very last weights give the
    class scores at every position, as SqueezeNet's last convolution does, it is the last before these. Of the modules
    around it whose output has the same height and width the outermost is named, as their output is what goes on:
    `layer4` of a ResNet with its sum and ReLU, `features` of SqueezeNet, MobileNet, DenseNet, EfficientNet and
    ConvNeXt (the same tensor as `features.12` of SqueezeNet 1.1), `features.29` of VGG16, before its pooling.

    Raises UnsupportedModelError where no module fits: none has such an output, it is used again elsewhere, or what
    follows is more than pooling and classification, as in a vision transformer.
    """
    calls = _calls(private_view(module), image)
    root = calls.pop()
    if root.shape is None or len(root.shape) != 2:
        raise UnsupportedModelError(f"The network's output is of shape {root.shape}, expected logits (batch, classes).")
    times: dict[str, int] = {}
    for call in calls:
        times[call.name] = times.get(call.name, 0) + 1
    leaves = [call for call in calls if call.leaf]
    last = next((call for call in reversed(leaves) if call.weighs), None)
    if last is not None and last.spatial and last.shape is not None and last.shape[1] == root.shape[1]:
        # What holds the class scores' layer ends after it.
        calls = calls[: calls.index(last)]
        leaves = [call for call in calls if call.leaf]
    ended = {call.number: call for call in calls}
    for call in reversed(leaves):
        if call.spatial and not isinstance(call.module, _POOLING):
            around = [ended[number] for number in (*call.within, call.number) if number in ended]
            for one in around:
                if one.spatial and times[one.name] == 1 and _size(one) == _size(call):
                    return one.name
        if call.weighs and not (call.shape is not None and (len(call.shape) == 2 or call.positions == 1)):
            break  # neither a feature map that can be taken, nor classification
    raise UnsupportedModelError(
        "No module gives a feature map (B, C, h, w) that only pooling and classification follow."
    )


def _size(call: _Call) -> tuple[int, ...]:
    return () if call.shape is None else call.shape[2:]


def _calls(view: nn.Module, image: Tensor) -> list[_Call]:
    """The runs of the view's modules in the order they end; the network's own is the last. `view` is hooked for it."""
    ended: list[_Call] = []
    running: list[int] = []
    begun = 0
    busy: set[int] = set()  # runs in which another module ran

    def begin(*_: object) -> None:
        nonlocal begun
        busy.update(running)
        running.append(begun)
        begun += 1

    def end(name: str, part: nn.Module, output: object) -> None:
        number = running.pop()
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        ended.append(_Call(name, part, tuple(running), number, shape, number not in busy))

    for name, part in view.named_modules():
        if "parametrizations" in name.split("."):
            continue  # computes a weight, not a feature map
        part.register_forward_pre_hook(begin)
        part.register_forward_hook(lambda part, _, output, name=name: end(name, part, output))
    weights = next((p for p in view.parameters() if p.is_floating_point()), image)
    with torch.no_grad():
        view(image[None].to(device=weights.device, dtype=weights.dtype, copy=True))
    return ended
