"""What a program consists of: calls that predict and, given a gradient at their result, know that at their input.

`run` predicts; `record` also gives what `pull` needs. Every other call than those with a rule of their own here is
differentiated by autograd, alone (`Other`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.runtimes.pruned.activations import RELU, Activation
from parchgrad.runtimes.pruned.convolution import scale_and_shift
from parchgrad.runtimes.pruned.gradient import Channels, Gradient, channels_of, dense, empty_like, layout

_aten = torch.ops.aten


class Step(Protocol):
    """One call. `values` are its inputs in the order of the graph's edges.

    `by_image`: what is kept consists of tensors and sizes whose first axis is the images', so that `of_image` of it
    takes one image back alone.
    """

    by_image: bool

    def run(self, *values: Any) -> Any: ...

    def record(self, *values: Any) -> tuple[Any, Any]: ...

    def pull(self, grad: Gradient, kept: Any) -> tuple[Gradient | None, ...]:
        """The gradient at each input; None where there is none."""
        ...


class Same:
    """Hands on what it is given: dropout in prediction, Identity."""

    by_image = True

    def run(self, value: Tensor) -> Tensor:
        return value

    def record(self, value: Tensor) -> tuple[Tensor, None]:
        return value, None

    def pull(self, grad: Gradient, kept: None) -> tuple[Gradient]:
        return (grad,)


class Elementwise:
    """An activation by itself; a gradient of some channels stays one."""

    by_image = True

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    def run(self, x: Tensor) -> Tensor:
        return self._activation.forward(x)

    def record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self._activation.forward(x)
        return y, y if self._activation.keeps_output else x

    def pull(self, grad: Gradient, kept: Tensor) -> tuple[Gradient]:
        return (activated(self._activation, grad, kept),)


def activated(activation: Activation, grad: Gradient, kept: Tensor) -> Gradient:
    """The gradient before an activation."""
    if not isinstance(grad, Channels):
        return activation.backward(grad, kept)
    values = []
    for i, (numbers, one) in enumerate(zip(grad.numbers, grad.values, strict=True)):
        here = kept[i : i + 1] if numbers is None else channels_of(kept, i, numbers)
        values.append(activation.backward(one, here))
    return Channels(grad.shape, grad.numbers, tuple(values))


class Addition:
    """The sum of two values of one shape, with the activation that follows it."""

    by_image = True

    def __init__(self, activation: Activation | None) -> None:
        self._activation = activation

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        total = a + b
        if self._activation is None:
            return total
        return torch.relu_(total) if self._activation.is_relu else self._activation.forward(total)

    def record(self, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[torch.Size, torch.Size, Tensor | None]]:
        total = a + b
        if self._activation is None:
            return total, (a.shape, b.shape, None)
        y = torch.relu_(total) if self._activation.is_relu else self._activation.forward(total)
        return y, (a.shape, b.shape, y if self._activation.keeps_output else total)

    def pull(self, grad: Gradient, kept: tuple[torch.Size, torch.Size, Tensor | None]) -> tuple[Gradient, Gradient]:
        first, second, activation_kept = kept
        if self._activation is not None and activation_kept is not None:
            grad = activated(self._activation, grad, activation_kept)
        return _summed_to(grad, first), _summed_to(grad, second)


class Product:
    """The product of two values, one of which may be spread over positions: squeeze-and-excitation."""

    by_image = True

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def record(self, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return a * b, (a, b)

    def pull(self, grad: Gradient, kept: tuple[Tensor, Tensor]) -> tuple[Gradient, Gradient]:
        a, b = kept
        whole = dense(grad)
        return _summed_to(whole * b, a.shape), _summed_to(whole * a, b.shape)


class Concatenation:
    """Values side by side along `dim`."""

    by_image = True

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def run(self, *values: Tensor) -> Tensor:
        return torch.cat(values, self._dim)

    def record(self, *values: Tensor) -> tuple[Tensor, list[int]]:
        return torch.cat(values, self._dim), [value.shape[self._dim] for value in values]

    def pull(self, grad: Gradient, kept: list[int]) -> tuple[Gradient, ...]:
        return torch.split(dense(grad), kept, self._dim)


class MaxPooling:
    """Largest of each window, the first of equals; then ReLU where one stood before it: neither minds the order."""

    by_image = True

    def __init__(
        self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, *, rectified: bool
    ) -> None:
        self._kernel, self._stride = _both(kernel), _both(stride if stride not in (None, []) else kernel)
        self._padding, self._dilation, self._ceil_mode = _both(padding), _both(dilation), ceil_mode
        self.rectified = rectified  # the ReLU of what it is given comes with it

    def run(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(x, self._kernel, self._stride, self._padding, self._dilation, self._ceil_mode)
        return torch.relu_(y) if self.rectified else y

    def record(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, torch.Size]]:
        y, places = _aten.max_pool2d_with_indices(
            x, self._kernel, self._stride, self._padding, self._dilation, self._ceil_mode
        )
        if self.rectified:
            torch.relu_(y)
        return y, (y, places, x.shape)

    def pull(self, grad: Gradient, kept: tuple[Tensor, Tensor, torch.Size]) -> tuple[Tensor]:
        y, places, shape = kept
        grad = _laid_out_as(dense(grad), y)
        if self.rectified:
            grad = RELU.backward(grad, y)
        like = empty_like(grad, shape)  # only its form counts
        answer: Tensor = _aten.max_pool2d_with_indices_backward(
            grad, like, self._kernel, self._stride, self._padding, self._dilation, self._ceil_mode, places
        )
        return (answer,)


class Mean:
    """The mean over all positions, `(B, C)` or `(B, C, 1, 1)`."""

    by_image = True

    def __init__(self, keepdim: bool) -> None:
        self._keepdim = keepdim

    def run(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self._keepdim)

    def record(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        if x.dim() != 4:
            raise UnsupportedModelError(f"A mean over dimensions 2 and 3 of {x.dim()}.")
        return self.run(x), x.shape

    def pull(self, grad: Gradient, kept: torch.Size) -> tuple[Gradient]:
        images, channels, height, width = kept
        each = dense(grad).reshape(images, channels, 1, 1) / (height * width)
        if images == 1 and each.device.type == "cpu":
            # A class's own channel alone, where the mean is the logits.
            numbers = each[0, :, 0, 0].nonzero()[:, 0]
            if 0 < 10 * len(numbers) <= channels:
                return (Channels(kept, (numbers,), (each.index_select(1, numbers).expand(1, -1, height, width),)),)
        return (each.expand(kept),)


class AveragePooling:
    """Average pooling: `forward` of images, `backward` of a gradient and the images it belongs to."""

    by_image = True

    def __init__(self, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._forward, self._backward = forward, backward

    def run(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def record(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        return self._forward(x), x.shape

    def pull(self, grad: Gradient, kept: torch.Size) -> tuple[Tensor]:
        grad = dense(grad)
        return (self._backward(grad, empty_like(grad, kept)),)


def adaptive_average_pooling(size: Any) -> AveragePooling:
    """To `size` (height, width) windows that share the image."""
    return AveragePooling(
        lambda x: F.adaptive_avg_pool2d(x, size),
        lambda grad, like: _aten._adaptive_avg_pool2d_backward(grad, like),
    )


def average_pooling(
    kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> AveragePooling:
    """By windows, as `torch.nn.AvgPool2d`."""
    sides = (_both(kernel), _both(kernel if stride in (None, []) else stride), _both(padding))
    return AveragePooling(
        lambda x: F.avg_pool2d(x, *sides, ceil_mode, count_include_pad, divisor),
        lambda grad, like: _aten.avg_pool2d_backward(grad, like, *sides, ceil_mode, count_include_pad, divisor),
    )


class Flatten:
    """`(B, C, h, w)` to `(B, C h w)`."""

    by_image = True

    def run(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def record(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        return x.flatten(1), x.shape

    def pull(self, grad: Gradient, kept: torch.Size) -> tuple[Tensor]:
        return (dense(grad).reshape(kept),)


class Linear:
    """A fully connected layer."""

    by_image = True

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def record(self, x: Tensor) -> tuple[Tensor, None]:
        return self.run(x), None

    def pull(self, grad: Gradient, kept: None) -> tuple[Tensor]:
        grad = dense(grad)
        if grad.dim() == 2 and len(grad) == 1 and grad.device.type == "cpu" and grad.dtype in _BAGS:
            # Behind a ReLU most of it is zero: only the other rows are read.
            (active,) = grad[0].nonzero(as_tuple=True)
            if 2 * len(active) <= grad.shape[1]:
                start = torch.zeros(1, dtype=torch.long)
                weights = grad[0].index_select(0, active)
                return (F.embedding_bag(active, self._weight, start, mode="sum", per_sample_weights=weights),)
        return (grad @ self._weight.to(grad.dtype),)


_BAGS = (torch.float32, torch.float64)


class BatchNorm:
    """BatchNorm that could not be folded into a convolution: a factor and a shift of each channel."""

    by_image = True

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        factor, shift = scale_and_shift(None, norm)
        self._factor, self._shift = factor[:, None, None], shift[:, None, None]

    def run(self, x: Tensor) -> Tensor:
        return torch.addcmul(self._shift, x, self._factor)

    def record(self, x: Tensor) -> tuple[Tensor, None]:
        return self.run(x), None

    def pull(self, grad: Gradient, kept: None) -> tuple[Tensor]:
        whole = dense(grad)
        return (whole * self._factor.to(whole.dtype),)


class Part:
    """One of several results of a call."""

    by_image = True

    def __init__(self, number: int) -> None:
        self.number = number

    def run(self, values: Sequence[Tensor]) -> Tensor:
        return values[self.number]


class Other:
    """Any call, differentiated by autograd; `call` takes the values that come from other calls.

    Constants are not differentiated: some calls refuse it (the running mean of a `batch_norm`).
    """

    by_image = False

    def __init__(self, call: Callable[..., Any], of_images: Sequence[bool]) -> None:
        """`of_images` says of each value whether it depends on the images."""
        self._call = call
        self._of_images = tuple(of_images)

    def run(self, *values: Any) -> Any:
        return self._call(*values)

    def record(self, *values: Any) -> tuple[Any, Any]:
        leaves = [
            value.detach().requires_grad_()
            if of_images and isinstance(value, Tensor) and value.is_floating_point()
            else None
            for value, of_images in zip(values, self._of_images, strict=True)
        ]
        with torch.enable_grad():
            result = self._call(*[v if leaf is None else leaf for v, leaf in zip(values, leaves, strict=True)])
        if isinstance(result, Tensor):
            return result.detach(), (result, leaves)
        if isinstance(result, (tuple, list)) and any(isinstance(one, Tensor) for one in result):
            return type(result)(one.detach() if isinstance(one, Tensor) else one for one in result), (result, leaves)
        return result, None

    def pull(self, grad: Gradient | dict[int, Gradient], kept: Any) -> tuple[Tensor | None, ...]:
        result, leaves = kept
        if isinstance(grad, dict):
            outputs = [result[number] for number in grad]
            grads = [dense(one) for one in grad.values()]
        else:
            outputs, grads = [result], [dense(grad)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        if not wanted or not any(output.requires_grad for output in outputs):
            return (None,) * len(leaves)
        with torch.enable_grad():
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return tuple(None if leaf is None else next(found) for leaf in leaves)


def of_image(kept: Any, image: int) -> Any:
    """What a `by_image` step kept, of one image."""
    if isinstance(kept, Tensor):
        return kept[image : image + 1]
    if isinstance(kept, torch.Size):
        return torch.Size((1, *kept[1:]))
    if isinstance(kept, (tuple, list)):
        return type(kept)(of_image(one, image) for one in kept)
    return kept


def _summed_to(grad: Gradient, shape: torch.Size) -> Gradient:
    if grad.shape == shape:
        return grad
    return dense(grad).sum_to_size(shape)


def _laid_out_as(grad: Tensor, like: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last) if layout(like) is torch.channels_last else grad


def _both(value: Any) -> list[int]:
    return [int(value), int(value)] if isinstance(value, int) else [int(side) for side in value]
