"""What each call of a convolution sees on the way there and back, in float64: one image, one autograd call a pass.

Every convolution of a copy of the network is replaced by one that writes down its output and the gradient that arrives
there, and hands on what the loop oracle of the rule makes of it.
"""

import copy
import fnmatch
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tests.oracles import maps, rule
from tests.oracles.tolerance import array


@dataclass
class Call:
    """One call: output, gradient that arrives and gradient handed on, each (C, h, w)."""

    name: str
    output: np.ndarray
    selected: list
    factors: tuple | None = None  # of selected and unselected channels; None: unchanged
    before: np.ndarray = field(default=None)
    after: np.ndarray = field(default=None)


class Noted(torch.autograd.Function):
    """Identity forward; backward notes the gradient and applies the rule to it."""

    @staticmethod
    def forward(ctx, z, call, options):
        ctx.call, ctx.options = call, options
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        call, options = ctx.call, ctx.options
        call.before = array(grad[0])
        call.factors = rule.image_factors(grad[0], call.selected, options.gamma, options.conserve)
        call.after = rule.scale_image(grad[0], call.selected, options.gamma, options.conserve)
        return torch.from_numpy(call.after)[None], None, None


class Noting(nn.Module):
    """A convolution that notes its calls; `rows` None: the rule does not act there."""

    def __init__(self, convolution, name, rows, target, options, calls):
        super().__init__()
        self.convolution = convolution
        self.name, self.rows, self.target, self.options, self.calls = name, rows, target, options, calls

    def forward(self, images):
        z = self.convolution(images)
        selected = [False] * z.shape[1]
        if self.rows is not None:
            quantile = None if self.options.alpha is not None else maps.layer_quantile(self.options.quantile, self.name)
            selected = maps.choose(self.rows, z[0].detach(), self.target, self.options, quantile)
        self.calls.append(Call(self.name, array(z[0]), selected))
        return Noted.apply(z, self.calls[-1], self.options)


def calls_of(model, table, image, options, target):
    """The calls of one pass in forward order, and the gradient at the image (3, h, w)."""
    noting = copy.deepcopy(model).double().eval()
    calls, replacements = [], {}
    for name, module in noting.named_modules():
        if isinstance(module, maps.CONVOLUTIONS):
            acts = options.rule and any(fnmatch.fnmatchcase(name, pattern) for pattern in options.layers)
            rows = maps.rows_of(table, name) if acts else None
            replacements[id(module)] = Noting(module, name, rows, target, options, calls)
    for parent in list(noting.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements and not isinstance(parent, Noting):
                parent._modules[child_name] = replacements[id(child)]
    leaf = image.detach().double()[None].clone().requires_grad_(True)
    logits = noting(leaf + 0.0)
    (gradient,) = torch.autograd.grad(maps.seed_of(logits, target, options.seed), leaf)
    return calls, array(gradient[0])
