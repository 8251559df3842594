"""GAP features of a network's convolutions: one number an image and channel (method.md, Words)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parchgrad.errors import UnsupportedModelError
from parchgrad.layers import convolutions
from parchgrad.runtimes.pytorch import gap_features, private_view


class GapNetwork:
    """A model that answers with the GAP features of its convolutions.

    `layers` are the convolutions to look at, all of which must run in prediction. `point` is where: at the
    `convolution`'s own output, or after the `activation`, where the network's own normalisation and activation
    have acted on it.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[str], device: torch.device | None, point: str = "convolution"
    ) -> None:
        self._module = private_view(module, device)
        self._device = device
        self._dtype = next(p for p in self._module.parameters() if p.is_floating_point()).dtype
        self._layers = tuple(layers)
        self._found: dict[str, Tensor] = {}
        self._following = _Following(self._found) if point == "activation" else None
        for name in self._layers:
            self._module.get_submodule(name).register_forward_hook(self._hook(name))

    def features(self, images: Tensor) -> Tensor:
        """GAP features `(B, N)` of normalised `images` `(B, 3, h, w)`, layers side by side, on the CPU."""
        self._found.clear()
        with torch.inference_mode(), self._following or nullcontext():
            self._module(images.to(self._device, self._dtype))
        for name in self._layers:
            if name not in self._found:
                raise UnsupportedModelError(f"Layer '{name}' took no part in the model's forward pass.")
        gap = torch.cat([self._found[name] for name in self._layers], dim=1).cpu()
        self._found.clear()
        return gap

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            _require_first(name, self._found)
            self._found[name] = _gap_in_cache(output) if output.device.type == "cpu" else gap_features(output)
            if self._following is not None:
                self._following.follow(name, output)

        return hook


# Numbers that stay in a core's cache together.
_IN_CACHE = 1 << 18


def _gap_in_cache(output: Tensor) -> Tensor:
    """`gap_features` a few images at a time: on a processor, fresh memory for a whole batch's ReLU is what costs."""
    gap = output.new_empty(output.shape[:2])
    together = max(1, _IN_CACHE // output[0].numel())
    scratch = torch.empty_like(output[:together])
    for start in range(0, len(output), together):
        images = output[start : start + together]
        positive = torch.clamp(images, min=0, out=scratch[: len(images)])
        torch.mean(positive.flatten(2), 2, out=gap[start : start + together])
    return gap


def running_layers(module: nn.Module, image: Tensor) -> tuple[str, ...]:
    """The convolutions that run in prediction, in registration order, found by one pass of `image` `(1, 3, h, w)`.

    Others serve training only, such as auxiliary heads. Raises UnsupportedModelError for one that runs twice: its
    feature would be ambiguous.
    """
    view = private_view(module)
    seen: dict[str, Tensor] = {}
    names = tuple(convolutions(module))

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(module: nn.Module, args: object, output: Tensor) -> None:
            _require_first(name, seen)
            seen[name] = output

        return note

    for name in names:
        view.get_submodule(name).register_forward_hook(hook(name))
    weights = next(p for p in view.parameters() if p.is_floating_point())
    with torch.inference_mode():
        view(image.to(weights.device, weights.dtype))
    return tuple(name for name in names if name in seen)


def _require_first(name: str, seen: dict[str, Tensor]) -> None:
    if name in seen:
        raise UnsupportedModelError(
            f"Layer '{name}' runs twice in one forward pass; its GAP feature would be ambiguous."
        )


_NORMALISATIONS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm"})
_ACTIVATIONS = frozenset(
    name + suffix
    for name in (
        *("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "threshold"),
        *("silu", "hardswish", "mish", "gelu", "softplus", "sigmoid", "hardsigmoid", "logsigmoid", "tanh", "clamp"),
    )
    for suffix in ("", "_")
)


class _Following(TorchFunctionMode):
    """Follows each convolution's output through normalisation to its activation and notes the feature there.

    Sees modules and functions alike. Where no activation comes directly, as before a residual sum, the feature is the
    mean of ReLU of the normalised output.
    """

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self._found = found
        self._followed: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own

    def __enter__(self) -> _Following:
        self._followed.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def follow(self, name: str, output: Tensor) -> None:
        self._followed[id(output)] = (name, output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, _ = self._followed.get(id(args[0]), ("", None)) if args else ("", None)
        result = func(*args, **(kwargs or {}))
        if not name:
            return result
        operation = getattr(func, "__name__", "")
        if operation in _ACTIVATIONS:
            del self._followed[id(args[0])]
            self._found[name] = result.flatten(2).mean(dim=2)
        elif operation in _NORMALISATIONS:
            del self._followed[id(args[0])]
            self._found[name] = gap_features(result)
            self.follow(name, result)
        elif result is args[0]:
            # Something else was written into it: what follows is no longer this convolution's alone.
            del self._followed[id(args[0])]
        return result
