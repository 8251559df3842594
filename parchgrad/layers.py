"""Which layers take part: the convolutions of a network, by dotted name."""

from __future__ import annotations

from torch import nn

from parchgrad.errors import UnsupportedModelError


class Convolution(nn.Module):
    """Base of a convolution that is no module of torch.nn, such as one of an exported program.

    Its result is the convolution's own output, `(batch, out_channels, *spatial)`.
    """

    out_channels: int


_KINDS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    Convolution,
)

# Quantised and fused-for-quantising modules: no gradient, or an output that is not the convolution's own.
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.", "torch.nn.qat.")


def is_convolution(module: nn.Module) -> bool:
    """Whether the rule can act at the module's output; what stands in the way of it is for `convolutions` to say."""
    return isinstance(module, _KINDS)


def convolutions(module: nn.Module) -> dict[str, int]:
    """Name -> output channels of every convolution, in `named_modules` order (registration order).

    Grouped, depthwise, 1x1 (squeeze-and-excitation) and transposed ones are all convolutions: the rule acts on
    the gradient at their output. Raises UnsupportedModelError, naming the module, for a lazy convolution that
    has no weights yet and for quantised ones.
    """
    found = {}
    for name, layer in module.named_modules():
        kind = type(layer)
        if kind.__module__.startswith(_QUANTISED) and hasattr(layer, "out_channels"):
            raise UnsupportedModelError(
                f"Module '{name}' is a quantised convolution ({kind.__module__}.{kind.__name__}), which has no "
                "gradient to explain; give the float network."
            )
        if not isinstance(layer, _KINDS):
            continue
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise UnsupportedModelError(
                f"Module '{name}' is a lazy convolution ({kind.__name__}) without weights; "
                "run the network on an image once, or load its weights, first."
            )
        found[name] = layer.out_channels
    return found
