"""The published procedure as its research code goes about it: one image at a time, hooks on every convolution.

Kept: per image one forward and one backward pass; forward hooks that take ReLU statistics; full backward hooks that
choose channels by p-value, take both sides' variances and compute the convolution's input gradient a second time;
`inplace=False` everywhere. Infinite gamma, with conservation. Not kept: gradients of parameters, which are no part of
the method and would make it slower still; the seed's factor (the softmax value, a constant for each image); and what
method.md section 6 calls wrong: it never writes into `grad_outputs`, adds no epsilon and takes the second moment of
maps of one position. Its maps are therefore ours.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parchgrad import SelectionTable


def prepared(network: nn.Module, table: SelectionTable) -> nn.Module:
    """A frozen copy of the network, in eval mode, nothing in place, each convolution with its p-values `(K, C)`."""
    model = copy.deepcopy(network).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for name, layer in table.layers.items():
        model.get_submodule(name).log_p = layer.log_p
    return model


def published_maps(model: nn.Module, images: Tensor, targets: list[int], quantile: float) -> Tensor:
    """Gradients `(B, 3, h, w)` of what `prepared` returned."""
    return torch.cat(
        [_map(model, image[None], target, quantile) for image, target in zip(images, targets, strict=True)]
    )


def _map(model: nn.Module, image: Tensor, target: int, quantile: float) -> Tensor:
    convolutions = [module for module in model.modules() if hasattr(module, "log_p")]
    handles = []
    for convolution in convolutions:
        convolution.target, convolution.quantile = target, quantile
        handles.append(convolution.register_forward_hook(forward_hook))
        handles.append(convolution.register_full_backward_hook(backward_hook))
    image = image.clone().requires_grad_()
    logits = model(image)
    seed = torch.zeros_like(logits)
    seed[0, target] = 1.0
    logits.backward(gradient=seed)
    for handle in handles:
        handle.remove()
    assert image.grad is not None
    return image.grad


def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    activation = F.relu(output.detach())
    module.gap = F.adaptive_avg_pool2d(activation, 1)[0, :, 0, 0]
    module.relu_ratio = (activation > 0).sum().item() / activation[0, 0].numel()
    module.relu_position = inputs[0][0] > 0


def backward_hook(
    module: nn.Conv2d, grad_inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    grad = grad_outputs[0].clone()
    log_p = module.log_p[module.target]
    wanted = max(1, int(len(log_p) * module.quantile))
    high = log_p <= torch.kthvalue(log_p, wanted).values
    low = ~high
    if high.any() and low.any():
        m = variance(grad[0, high].sum(dim=0))
        n = variance(grad[0, low].sum(dim=0))
        if m > 1e-12 * (m + n):
            grad[0, high] *= math.sqrt((m + n) / m)
            grad[0, low] *= 0.0
    shape, weight = grad_inputs[0].shape, module.weight
    return (
        torch.nn.grad.conv2d_input(shape, weight, grad, module.stride, module.padding, module.dilation, module.groups),
    )


def variance(sums: Tensor) -> float:
    """Over the positions; of one position, its square."""
    return sums.var().item() if sums.numel() > 1 else sums.item() ** 2
