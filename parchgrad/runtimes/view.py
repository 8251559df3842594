"""A private view of a network: its module tree over the same weights, free to be hooked."""

from __future__ import annotations

import copy
from types import CellType

import torch
from torch import Tensor, nn

from parchgrad.errors import UnsupportedModelError


def private_view(module: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """A copy of the module tree over the same weights: eval mode, frozen, free to be hooked.

    Parameters and buffers alias the originals' storage (until moved to another device), so no memory is
    spent and in-place updates of the original show here; flags and `.grad` are the view's own. Forward hooks
    are part of what a model computes and come along as they are now; backward hooks would alter the
    explanation and do not. Raises UnsupportedModelError where a copy would not be the model: a module that
    cannot be copied, or reaches another through a function's closure, which goes on meaning the original.
    """
    tensors: dict[int, object] = {id(b): b.detach() for b in module.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    try:
        view = copy.deepcopy(module, tensors)
    except Exception as error:
        raise UnsupportedModelError(
            f"The model's modules cannot be copied: {type(error).__name__}: {error}."
        ) from error
    for name, part in view.named_modules():
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
        for attribute, value in vars(part).items():
            if _closes_over_a_module(value):
                raise UnsupportedModelError(
                    f"Attribute '{attribute}' of module '{name}' is a function with another module in its closure."
                )
    view.eval().requires_grad_(False)
    return view if device is None else view.to(device)


def _closes_over_a_module(value: object) -> bool:
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != CellType()]
    return any(isinstance(getattr(held, "__self__", held), nn.Module) for held in cells)


def gap_features(output: Tensor) -> Tensor:
    """GAP features of a convolution's own output `(B, C, *spatial)`: mean of ReLU, `(B, C)`."""
    return torch.relu(output).flatten(2).mean(dim=2)
