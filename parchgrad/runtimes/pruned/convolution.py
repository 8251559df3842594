"""A convolution with all that follows it in one go: folded BatchNorm, activation; and its pruned input gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parchgrad.runtimes.pruned import batched
from parchgrad.runtimes.pruned.activations import Activation
from parchgrad.runtimes.pruned.choice import Choice, LayerRule, per_channel
from parchgrad.runtimes.pruned.gradient import Channels, Gradient, channels_of, dense

Kept = tuple[torch.Size, Tensor | None]

_onednn = torch.ops.mkldnn

# Fewer input channels than a vector register has places: a transposed convolution wastes less of them.
_FEW_CHANNELS = 16


@dataclass(frozen=True)
class AtOutput:
    """One image's gradient at a convolution's output, after the rule: of some channels, or of all."""

    values: Tensor  # (1, k, h, w)
    channels: int
    numbers: Tensor | None = None  # (k,) long and rising; None: all of them
    choice: Choice | None = None  # which selects these, and keeps their weights' rows

    def times(self, factor: float) -> AtOutput:
        return replace(self, values=self.values * factor)

    def plus(self, other: AtOutput, factor: float) -> AtOutput:
        """This plus `factor` times another of the same channels, in place."""
        self.values.add_(other.values, alpha=factor)
        return self

    def spread(self) -> AtOutput:
        """The same as one of all channels."""
        shape = torch.Size((1, self.channels, *self.values.shape[2:]))
        return AtOutput(Channels(shape, (self.numbers,), (self.values,)).dense(), self.channels)


class Convolution:
    """`activation(batch_norm(convolution(x)))` in prediction, and the gradient at x from that at the result.

    The rule's gradient is that at the convolution's own output: with BatchNorm's `s = gamma / sqrt(var + eps)` folded
    into the weights, `s` times the gradient at the folded output. So only the two channel sums need s; the folded
    weights' input gradient of the folded output's gradient is already the right one.
    """

    by_image = True

    def __init__(
        self, name: str, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation | None
    ) -> None:
        self.name = name
        self.activation = activation
        self._groups = convolution.groups
        self._stride, self._dilation = _pair(convolution.stride), _pair(convolution.dilation)
        self._padding = _pair(convolution.padding)
        weight = self._source = convolution.weight.detach()
        self._bias = None if convolution.bias is None else convolution.bias.detach()
        self._scale: Tensor | None = None
        if norm is not None:
            self._scale, self._bias = scale_and_shift(self._bias, norm)
        on_cpu = weight.device.type == "cpu"
        # Plain loops compute float64 on the CPU, for which the order does not matter.
        self.channels_last = not (on_cpu and weight.dtype == torch.float64)
        self._format = torch.channels_last if self.channels_last else torch.contiguous_format
        self._folded: Tensor | None = None
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._packs = on_cpu and weight.dtype == torch.float32 and has_onednn
        self._packed: Tensor | None = None

        out_channels, per_group, height, width = weight.shape
        self._kernel = (height, width)
        self.depthwise = self._groups == out_channels and per_group == 1 and self._groups > 1
        self._prunes = self._groups == 1 or self.depthwise  # in other groups rows cannot be left out one by one
        reach = [d * (k - 1) for d, k in zip(self._dilation, (height, width), strict=True)]
        self._flipped_padding = (reach[0] - self._padding[0], reach[1] - self._padding[1])
        self._flips = self._stride == (1, 1) and min(self._flipped_padding) >= 0
        self._flips &= self.depthwise or per_group >= _FEW_CHANNELS
        self._pointwise = (height, width) == (1, 1) and self._padding == (0, 0) and self._groups == 1

    @property
    def _weight(self) -> Tensor:
        """The folded weights, made when first asked for: with packed ones a pruned pass needs only rows of them."""
        if self._folded is None:
            self._folded = self._scaled_source().contiguous(memory_format=self._format)
        return self._folded

    def _scaled_source(self) -> Tensor:
        return self._source if self._scale is None else self._source * self._scale[:, None, None, None]

    # --- prediction ---

    def run(self, x: Tensor) -> Tensor:
        return self._forward(x, self.activation)

    def record(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The result, and what `pull` needs of this call."""
        act = self.activation
        if act is None:
            return self._forward(x, None), (x.shape, None)
        if act.keeps_output:
            y = self._forward(x, act)
            return y, (x.shape, y)
        return self.record_of(self.output(x), x.shape)

    def output(self, x: Tensor) -> Tensor:
        """The result before the activation."""
        return self._forward(x, None)

    def record_of(self, z: Tensor, shape: torch.Size) -> tuple[Tensor, Kept]:
        """As `record` of an x of this shape, from its `output`."""
        act = self.activation
        y = z if act is None else act.forward(z)
        return y, (shape, None if act is None else y if act.keeps_output else z)

    def _forward(self, x: Tensor, act: Activation | None) -> Tensor:
        x = x.contiguous(memory_format=self._format)
        if self._packs and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            if self._packed is None:
                geometry = (self._padding, self._stride, self._dilation, self._groups)
                self._packed = _packed(self._scaled_source(), x, *geometry)
            end, numbers = act.fused if act is not None and act.fused is not None else ("none", ())
            geometry = (self._padding, self._stride, self._dilation, self._groups)
            y = _convolve_packed(x, self._packed, self._bias, geometry, end, numbers)
            return y if act is None or act.fused is not None else act.forward(y)
        z = F.conv2d(x, self._weight, self._bias, self._stride, self._padding, self._dilation, self._groups)
        return z if act is None else act.forward(z)

    # --- gradient ---

    def pull(self, grad: Gradient, kept: Kept, rule: LayerRule | batched.BatchRule | None) -> Gradient:
        """The gradient at the input from that at the result, with the rule in between."""
        shape, activated = kept
        if isinstance(rule, batched.BatchRule):
            geometry = (self._stride, self._padding, self._dilation, self._groups)
            kernel = batched.Kernel(self._weight, self._scale, *geometry)
            if isinstance(grad, Channels):
                derivative = None if self.activation is None else self.activation.backward
                return batched.pull_channels(grad, derivative, activated, shape, kernel, rule, self._whole)
            whole = self._activated(batched.working(grad), activated)
            return batched.pull(whole, shape, kernel, rule, self._whole)
        images = range(shape[0])
        no_image_prunes = rule is None or not self._prunes or not any(map(rule.prunes, images))
        if no_image_prunes and not isinstance(grad, Channels):
            grad = self._activated(grad, activated)
            grad = grad if rule is None else rule.scaled(grad, images, self._scale)
            return self._whole(grad, shape)
        parts = []
        for i in images:
            one = self._at_output(grad, activated, rule, i)
            parts.append((one.numbers, self._taken_back(one, torch.Size((1, *shape[1:])))))
        return self._joined(parts, shape)

    def at_output(self, grad: Gradient, kept: Kept, rule: LayerRule | None) -> AtOutput:
        """The first half of `pull`, of one image: what the rule leaves of the gradient at the output."""
        return self._at_output(grad, kept[1], rule, 0)

    def at_input(self, one: AtOutput, shape: torch.Size) -> Tensor:
        """The other half: the gradient at an input of this shape, `(1, in, H, W)`; linear in its values."""
        return dense(self._joined([(one.numbers, self._taken_back(one, shape))], shape))

    def _at_output(self, grad: Gradient, activated: Tensor | None, rule: LayerRule | None, image: int) -> AtOutput:
        if isinstance(grad, Channels):
            return self._of_channels(grad, image, activated, rule)
        kept = None if activated is None else activated[image : image + 1]
        return self._of_image(grad[image : image + 1], kept, rule, image)

    def _of_image(self, grad: Tensor, activated: Tensor | None, rule: LayerRule | None, image: int) -> AtOutput:
        """`grad` `(1, C, h, w)` is that of this image at the result."""
        prunes = self._prunes and rule is not None and rule.prunes(image)
        if rule is not None and prunes:
            choice, values = rule.choices[image], self._selected(grad, activated, rule, image)
            if choice is not None and values is not None:
                return AtOutput(values, grad.shape[1], choice.numbers, choice)
        grad = self._activated(grad, activated)
        if rule is not None and not prunes:
            grad = rule.scaled(grad, [image], self._scale)
        return AtOutput(grad, grad.shape[1])

    def _of_channels(self, grad: Channels, image: int, activated: Tensor | None, rule: LayerRule | None) -> AtOutput:
        """Of some channels of an image: the others add nothing, neither to the sums nor to the result."""
        some, values = grad.numbers[image], grad.values[image]
        numbers = torch.arange(grad.shape[1], device=values.device) if some is None else some
        if self.activation is not None and activated is not None:
            values = self.activation.backward(values, channels_of(activated, image, numbers))
        numbers, values = _restricted(numbers, values, self._scale, grad.shape[1], rule, image)
        one = AtOutput(values, grad.shape[1], numbers)
        return one if self._prunes else one.spread()

    def _taken_back(self, one: AtOutput, shape: torch.Size) -> Tensor:
        """One image's input gradient: of a depthwise convolution at these channels, else of all."""
        if one.numbers is None:
            return self._whole(one.values, shape)
        if one.choice is not None:
            return self._through(one.values, self._rows_of(one.choice, one.values, shape), shape)
        return self._through(one.values, self._prepared(self._rows(one.numbers), one.values, shape), shape)

    def _activated(self, grad: Tensor, activated: Tensor | None) -> Tensor:
        if self.activation is not None and activated is not None:
            grad = self.activation.backward(grad, activated)  # also of a slice, in one pass
        return grad.contiguous(memory_format=self._format)

    def _selected(self, grad: Tensor, activated: Tensor | None, rule: LayerRule, image: int) -> Tensor | None:
        """One image's gradient `(1, k, h, w)` at its selected channels, scaled; None where all pass unchanged."""
        choice = rule.choices[image]
        assert choice is not None
        if self.activation is not None and activated is not None:
            grad = self.activation.backward(grad, activated)
        sides = rule.sides_of(image, self._scale, grad, grad.shape[1])
        by_channel = grad.flatten(2)[0]  # (C, h w)
        pair = rule.factors(image, torch.mm(sides, by_channel.to(sides.dtype)), grad.shape[1])
        if pair is None:
            return None
        values = by_channel.t().index_select(1, choice.numbers).mul_(pair[0])
        return values.view(1, *grad.shape[2:], -1).permute(0, 3, 1, 2)

    def _joined(self, parts: Sequence[tuple[Tensor | None, Tensor]], shape: torch.Size) -> Gradient:
        """The images' input gradients: of all channels, or of a depthwise convolution's selected ones."""
        if self.depthwise and any(numbers is not None for numbers, _ in parts):
            return Channels(shape, tuple(numbers for numbers, _ in parts), tuple(values for _, values in parts))
        return parts[0][1] if len(parts) == 1 else torch.cat([values for _, values in parts])

    def _whole(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The ordinary input gradient, of all images together."""
        if self._pointwise:
            return self._product(grad, self._weight.flatten(1).to(grad.dtype), shape)
        # Only its form counts.
        like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=self._format)
        weight = self._weight.to(grad.dtype)
        answer: Tensor
        (answer, _, _) = torch.ops.aten.convolution_backward(
            grad, like, weight, None, self._stride, self._padding, self._dilation, False, (0, 0), self._groups,
            (True, False, False),
        )  # fmt: skip
        return answer

    def _rows_of(self, choice: Choice, values: Tensor, shape: torch.Size) -> Tensor:
        if choice.rows is None or choice.rows.dtype != values.dtype:
            choice.rows = self._prepared(self._rows(choice.numbers), values, shape)
        return choice.rows

    def _rows(self, numbers: Tensor) -> Tensor:
        """The weights' rows of these output channels, `(k, in / groups, kh, kw)`."""
        rows = self._source.index_select(0, numbers)
        return rows if self._scale is None else rows * self._scale.index_select(0, numbers)[:, None, None, None]

    def _prepared(self, rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
        """Rows in the form and order that `_through` reads them in."""
        rows = rows.to(values.dtype)
        if self._pointwise:
            return rows.flatten(1)
        groups = len(rows) if self.depthwise else 1
        packs = self._packs and values.dtype == torch.float32
        if self._flips:
            flipped = rows.flip(2, 3)
            flipped = flipped if self.depthwise else flipped.transpose(0, 1)
            return _packed(flipped, values, self._flipped_padding, (1, 1), self._dilation, groups) if packs else flipped
        if not packs:
            return rows
        packed: Tensor = _onednn._reorder_convolution_transpose_weight(
            rows, self._padding, self._missing(shape, values), self._stride, self._dilation, groups, tuple(values.shape)
        )
        return packed

    def _through(self, values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        """One image's input gradient `(1, in, H, W)` through prepared rows, of `values` `(1, k, h, w)`.

        Which of the forms is fastest was measured (docs/performance.md): a matrix product for 1x1 kernels, for
        stride 1 the convolution with flipped rows, a transposed convolution for the rest.
        """
        if self._pointwise:
            return self._product(values, rows, torch.Size((1, *shape[1:])))
        groups = values.shape[1] if self.depthwise else 1
        if self._flips:
            if rows.is_mkldnn:
                geometry = (self._flipped_padding, (1, 1), self._dilation, groups)
                return _convolve_packed(values, rows, None, geometry, "none", ())
            return F.conv2d(values, rows, None, 1, self._flipped_padding, self._dilation, groups)
        missing = self._missing(shape, values)
        if rows.is_mkldnn:
            answer: Tensor = _onednn._convolution_transpose_pointwise(
                values, rows, None, self._padding, missing, self._stride, self._dilation, groups, "none", [], ""
            )
            return answer
        return F.conv_transpose2d(values, rows, None, self._stride, self._padding, missing, groups, self._dilation)

    def _missing(self, shape: torch.Size, values: Tensor) -> list[int]:
        """Rows and columns at the end of the input that no window reached."""
        sides = zip(shape[2:], values.shape[2:], self._stride, self._padding, self._dilation, self._kernel, strict=True)
        return [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in sides]

    def _product(self, values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        """The input gradient of a 1x1 kernel, of images `(n, k, h, w)` through rows `(k, in)`."""
        images, _, height, width = values.shape
        positions = values.permute(0, 2, 3, 1).reshape(images * height * width, -1)
        answer = torch.mm(positions, rows).view(images, height, width, -1).permute(0, 3, 1, 2)
        if self._stride == (1, 1):
            return answer
        spread = torch.empty(shape, dtype=answer.dtype, device=answer.device, memory_format=self._format).zero_()
        spread[:, :, :: self._stride[0], :: self._stride[1]] = answer
        return spread


def _restricted(
    numbers: Tensor, values: Tensor, scale: Tensor | None, channels: int, rule: LayerRule | None, image: int
) -> tuple[Tensor, Tensor]:
    """The rule for one image's `values` of the channels `numbers` of `channels`: what is left of either."""
    choice = None if rule is None else rule.choices[image]
    if rule is None or choice is None:
        return numbers, values
    sides = rule.sides_of(image, scale, values, channels).index_select(1, numbers)
    pair = rule.factors(image, torch.mm(sides, values.flatten(2)[0].to(sides.dtype)), channels)
    if pair is None:
        return numbers, values
    inside = choice.selected.index_select(0, numbers)
    if pair[1] == 0:
        places = inside.nonzero()[:, 0]
        return numbers[places], channels_of(values, 0, places).mul_(pair[0])
    return numbers, (values * per_channel(inside, pair)[:, None, None]).to(values.dtype)


def scale_and_shift(bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """`norm` behind a convolution: the factor of each output channel and the bias there is then, `(C,)`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = ((0.0 if bias is None else bias) - norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def _packed(
    weight: Tensor,
    values: Tensor,
    padding: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Weights in the order that oneDNN reads them in for inputs like `values`, so that no call brings them into it."""
    packed: Tensor = _onednn._reorder_convolution_weight(weight, padding, stride, dilation, groups, tuple(values.shape))
    return packed


def _convolve_packed(
    values: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], end: str, numbers: Sequence[float]
) -> Tensor:
    """oneDNN's convolution with packed weights, ending in an activation; what torch.compile makes of one."""
    answer: Tensor = _onednn._convolution_pointwise(values, weight, bias, *geometry, end, list(numbers), "")
    return answer


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)
