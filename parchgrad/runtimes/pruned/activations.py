"""Element-wise activations and their derivatives, as PyTorch's own backward operators compute them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`forward(x)`; `backward(grad, kept)`, where kept is the output or the input, any subset of elements."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    keeps_output: bool
    fused: tuple[str, tuple[float, ...]] | None = None  # what oneDNN calls it as the end of a convolution
    is_relu: bool = False


RELU = Activation(
    torch.relu,
    lambda grad, kept: _aten.threshold_backward(grad, kept, 0),
    keeps_output=True,
    fused=("relu", ()),
    is_relu=True,
)
SIGMOID = Activation(torch.sigmoid, lambda grad, kept: _aten.sigmoid_backward(grad, kept), keeps_output=True)
TANH = Activation(torch.tanh, lambda grad, kept: _aten.tanh_backward(grad, kept), keeps_output=True)
SILU = Activation(F.silu, lambda grad, kept: _aten.silu_backward(grad, kept), keeps_output=False)
HARDSWISH = Activation(F.hardswish, lambda grad, kept: _aten.hardswish_backward(grad, kept), keeps_output=False)
HARDSIGMOID = Activation(F.hardsigmoid, lambda grad, kept: _aten.hardsigmoid_backward(grad, kept), keeps_output=False)


def hardtanh(low: float, high: float) -> Activation:
    """Clamped to `low..high`; the gradient passes strictly between, so that output and input decide alike."""
    return Activation(
        lambda x: F.hardtanh(x, low, high),
        lambda grad, kept: _aten.hardtanh_backward(grad, kept, low, high),
        keeps_output=True,
        fused=("hardtanh", (low, high)),
    )


def gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, kept: _aten.gelu_backward(grad, kept, approximate=approximate),
        keeps_output=False,
    )


_OF_MODULE: dict[type[nn.Module], Activation] = {
    nn.ReLU: RELU,
    nn.Sigmoid: SIGMOID,
    nn.Tanh: TANH,
    nn.SiLU: SILU,
    nn.Hardswish: HARDSWISH,
    nn.Hardsigmoid: HARDSIGMOID,
}
_OF_FUNCTION: dict[Any, Activation] = {
    F.relu: RELU,
    torch.relu: RELU,
    F.relu6: hardtanh(0.0, 6.0),
    torch.sigmoid: SIGMOID,
    F.sigmoid: SIGMOID,
    torch.tanh: TANH,
    F.tanh: TANH,
    F.silu: SILU,
    F.hardswish: HARDSWISH,
    F.hardsigmoid: HARDSIGMOID,
}
_OF_METHOD = {"relu": RELU, "sigmoid": SIGMOID, "tanh": TANH}
_ALLOWED_KEYWORDS = {"inplace", "input"}


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a call is, or None for any other call."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) in (nn.Hardtanh, nn.ReLU6):
            assert isinstance(module, nn.Hardtanh)
            return hardtanh(module.min_val, module.max_val)
        if type(module) is nn.GELU:
            return gelu(module.approximate)
        return _OF_MODULE.get(type(module))
    if len(node.all_input_nodes) != 1 or len(node.args) > 1 or not set(node.kwargs) <= _ALLOWED_KEYWORDS:
        return None
    if node.op == "call_function" and node.target is not operator.getitem:
        return _OF_FUNCTION.get(node.target)
    return _OF_METHOD.get(str(node.target)) if node.op == "call_method" else None
