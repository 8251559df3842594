"""The pruned backward pass of a batch at once, for a GPU: between images and gradients nothing is read by the host.

What depends on values cannot be branched on then. So channels are chosen by tables of indices whose sizes follow from
the options alone, and an image whose gradient turns out to pass unchanged where only the selected channels' was
computed is marked (`BatchRule.undone`) for the dense engine, in a single look at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parchgrad.defaults import CONSERVE
from parchgrad.rule import Conserve, Factors, apply_factors, factors_of_sums, side_sums
from parchgrad.runtimes import Plan
from parchgrad.runtimes.pruned.gradient import Channels, Gradient, empty_like
from parchgrad.selection import best_ranked
from parchgrad.tables import SelectionTable


@dataclass(frozen=True)
class Group:
    """The images of a batch that select equally many channels in a layer, and so go together."""

    images: tuple[int, ...]
    places: Tensor | None  # the same on the device, (n,) long; None = all images in order
    count: int  # of channels; 0: the whole gradient is needed

    def of(self, tensor: Tensor) -> Tensor:
        """The group's part of a batch."""
        return tensor if self.places is None else tensor.index_select(0, self.places)

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        """The batch with the group's part replaced, out of place."""
        return part if self.places is None else tensor.index_copy(0, self.places, part)


class BatchRule:
    """The rule in one layer for a batch of `B` images, on the device."""

    def __init__(
        self,
        selected: Tensor,
        best: Tensor,
        active: Tensor,
        gamma: Tensor,
        conserve: Conserve,
        groups: Sequence[Group],
    ) -> None:
        """`selected` (B, C) bool; `best` (B, C) long, the channels from the best-ranked on; `active` (B,) bool: where
        the rule acts."""
        self.groups = tuple(groups)
        self._selected, self._best, self._active = selected, best, active
        self._sides = torch.stack((selected, ~selected), dim=1)
        self._both_sides = selected.any(dim=1) & ~selected.all(dim=1)
        self._gamma, self._conserve = gamma, conserve
        self.unchanged = active  # (B,) bool: the gradient passed unchanged; until one comes by, none is changed
        self.undone = torch.zeros_like(active)  # (B,) bool: and would have been needed whole

    def scaled(self, grad: Tensor, images: Sequence[int], scale: Tensor | None) -> Tensor:
        """The rule on the whole gradient `(B, C, *spatial)`, out of place. `images` are all, in order."""
        every = Group(tuple(images), None, 0)
        return self.whole(grad, every, self.factors(grad, scale, every))

    def factors(self, grad: Tensor, scale: Tensor | None, group: Group, channels: Tensor | None = None) -> Factors:
        """Both sides' factors of a group's images from their gradient, of all channels or of `channels` `(n, k)`, the
        others being zero. `scale` `(C,)`: of the gradient's channels, in the sums alone."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        sides = group.of(self._sides).to(wide)
        sides = sides if scale is None else sides * scale.to(wide)
        if channels is not None:
            sides = sides.gather(2, channels[:, None].expand(-1, 2, -1))
        found = factors_of_sums(
            side_sums(grad, sides),
            self._selected.shape[1],
            group.of(self._both_sides),
            group.of(self._gamma),
            Conserve(*(group.of(mask) for mask in self._conserve)),
        )
        self.unchanged = group.put(self.unchanged, found.identity & group.of(self._active))
        return found

    def whole(self, grad: Tensor, group: Group, factors: Factors) -> Tensor:
        """The group's gradient `(n, C, *spatial)` under the rule."""
        return apply_factors(grad, group.of(self._selected), factors)

    def some(self, values: Tensor, channels: Tensor, group: Group, factors: Factors) -> Tensor:
        """The group's gradient at `channels` `(n, k)` under the rule."""
        return apply_factors(values, group.of(self._selected).gather(1, channels), factors)

    def selected_of(self, group: Group) -> Tensor:
        """The group's selected channels, `(n, k)`; of a class outside the table some others, to which the rule does
        nothing, so that such an image is marked."""
        return group.of(self._best[:, : group.count])

    def mark_undone(self, group: Group, factors: Factors) -> None:
        """The images of a group of which the selected channels alone were computed, and more were needed."""
        self.undone = group.put(self.undone, factors.identity)


class BatchRules:
    """A table on the device, and what it says for each batch."""

    def __init__(self, table: SelectionTable, device: torch.device) -> None:
        self._device = device
        self._names = table.layer_names
        self._widths = [layer.channels for layer in table.layers.values()]
        self._starts = [sum(self._widths[:i]) for i in range(len(self._widths))]
        self._rank = table.rank.to(device)
        self._row_of_class = table.row_of_class.to(device)
        # Of each channel of all layers side by side: its layer's start, and its number there.
        widths = torch.tensor(self._widths)
        self._start = torch.tensor(self._starts).repeat_interleave(widths).to(device)
        self._number = torch.cat([torch.arange(width) for width in self._widths]).to(device)

    def of(self, targets: Tensor, plan: Plan) -> dict[str, BatchRule]:
        """The rule of every layer in which it acts on some image; `targets` `(B,)` on the device."""
        rows = self._row_of_class.index_select(0, targets)
        count = plan.count * plan.active
        known = (rows >= 0)[:, None]
        rows = rows.clamp(min=0)
        selected = best_ranked(self._rank, rows, staged(count, self._device) * known, self._widths)
        ranks = self._rank.index_select(0, rows).long()
        # Ranks are an order: the channel of rank r goes to place r of its layer.
        best = torch.empty_like(ranks).scatter_(1, ranks + self._start, self._number.expand_as(ranks))
        active = staged(plan.active, self._device)
        gamma = staged(plan.gamma, self._device)
        masks = Conserve.of([CONSERVE[i] for i in plan.conserve.tolist()], len(plan), torch.device("cpu"))
        conserve = Conserve(*(staged(mask, self._device) for mask in masks))
        groups = _Groups(self._device)
        infinite = (plan.gamma == math.inf).tolist()
        # A last layer of one channel a class has its gradient in the target's alone, which it may not select.
        logits = self._names[-1] if self._widths[-1] == len(self._row_of_class) else None
        rules = {}
        for i, (name, width, start) in enumerate(zip(self._names, self._widths, self._starts, strict=True)):
            if bool(plan.active[:, i].any()):  # of the plan, which the host holds
                counts = [
                    k if prunes and k < width and name != logits else 0
                    for k, prunes in zip(count[:, i].tolist(), infinite, strict=True)
                ]
                rules[name] = BatchRule(
                    selected[i], best[:, start : start + width], active[:, i], gamma, conserve, groups.of(counts)
                )
        return rules


class _Groups:
    """Groups of a batch by count; the same ones in most layers, whose indices are copied once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied: dict[tuple[int, ...], Tensor] = {}

    def of(self, counts: Sequence[int]) -> list[Group]:
        several = sorted(set(counts))
        if len(several) == 1:
            return [Group(tuple(range(len(counts))), None, several[0])]
        found = [(k, tuple([image for image, mine in enumerate(counts) if mine == k])) for k in several]
        return [Group(images, self._indices(images), k) for k, images in found]

    def _indices(self, images: tuple[int, ...]) -> Tensor:
        if images not in self._copied:
            self._copied[images] = staged(torch.tensor(images), self._device)
        return self._copied[images]


@dataclass(frozen=True)
class Kernel:
    """A convolution's weight as the gradient sees it (BatchNorm folded), and how it moves over the input."""

    weight: Tensor  # (out, in / groups, kh, kw)
    scale: Tensor | None  # (out,): of the folded output's gradient, in the rule's sums
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def depthwise(self) -> bool:
        out_channels, per_group = self.weight.shape[:2]
        return self.groups == out_channels and per_group == 1 and self.groups > 1


def pull(
    grad: Tensor, shape: torch.Size, kernel: Kernel, rule: BatchRule, whole: Callable[[Tensor, torch.Size], Tensor]
) -> Gradient:
    """The gradient `shape` at a convolution's input from that at its (folded) output, with the rule in between.

    `whole` is the ordinary input gradient, for groups that need it.
    """
    forms = [_form(kernel, group.count, grad.shape) for group in rule.groups]
    every = Group(tuple(range(len(grad))), None, 0)
    factors = rule.factors(grad, kernel.scale, every)
    if all(form is None for form in forms):
        return whole(rule.whole(grad, every, factors), shape)
    parts: list[_Part] = []
    for group, form in zip(rule.groups, forms, strict=True):
        here, mine = group.of(grad), Factors(*(group.of(field) for field in factors))
        if form is None:
            parts.append((group, None, whole(rule.whole(here, group, mine), _shape_of(group, shape))))
            continue
        channels = rule.selected_of(group)
        # Under an infinite gamma: what is not selected counts for nothing.
        values = rule.some(at(here, channels), channels, group, mine)
        parts.append((group, channels, form(kernel, channels, values, _shape_of(group, shape))))
        rule.mark_undone(group, mine)
    return _joined(parts, shape, kernel)


def pull_channels(
    grad: Channels,
    activation: Callable[[Tensor, Tensor], Tensor] | None,
    kept: Tensor | None,
    shape: torch.Size,
    kernel: Kernel,
    rule: BatchRule,
    whole: Callable[[Tensor, torch.Size], Tensor],
) -> Gradient:
    """`pull` of a gradient at the activation's result that is not zero in a few channels of each image only.

    All of them are taken on: a gradient that passes unchanged needs no more, and leaves nothing undone. `activation`
    is the derivative.
    """
    groups = _Groups(grad.values[0].device).of([0 if n is None else len(n) for n in grad.numbers])
    parts: list[_Part] = []
    for group in groups:
        values = torch.cat([working(grad.values[image]) for image in group.images])
        known = [numbers for image in group.images if (numbers := grad.numbers[image]) is not None]
        channels = torch.stack(known) if known else None
        if activation is not None and kept is not None:
            here = group.of(kept)
            values = activation(values, here if channels is None else at(here, channels))
        form = _form(kernel, group.count, values.shape, sparse=True)
        factors = rule.factors(values, kernel.scale, group, channels)
        mine = _shape_of(group, shape)
        if channels is None:
            parts.append((group, None, whole(rule.whole(values, group, factors), mine)))
            continue
        values = rule.some(values, channels, group, factors)
        if form is not None:
            parts.append((group, channels, form(kernel, channels, values, mine)))
            continue
        few = Channels(_shape_of(group, grad.shape), tuple(channels), tuple(values[:, None]))
        parts.append((group, None, whole(few.dense(), mine)))
    return _joined(parts, shape, kernel)


_Part = tuple[Group, Tensor | None, Tensor]  # a group, its channels if it was pruned, and its input gradient


def _joined(parts: Sequence[_Part], shape: torch.Size, kernel: Kernel) -> Gradient:
    """The groups' input gradients in the batch's order; of a depthwise convolution the channels that it read."""
    if kernel.depthwise and any(channels is not None for _, channels, _ in parts):
        numbers: list[Tensor | None] = [None] * shape[0]
        values: list[Tensor] = [parts[0][2]] * shape[0]
        for group, channels, answer in parts:
            for row, image in enumerate(group.images):
                numbers[image] = None if channels is None else channels[row]
                values[image] = answer[row : row + 1]
        return Channels(shape, tuple(numbers), tuple(values))
    if len(parts) == 1:
        return parts[0][2]
    first = parts[0][2]
    together = empty_like(first, shape)
    for group, _, answer in parts:
        assert group.places is not None
        together.index_copy_(0, group.places, answer)
    return together


def _shape_of(group: Group, shape: torch.Size) -> torch.Size:
    return torch.Size((len(group.images), *shape[1:]))


# Fewer selected channels than this are not worth the images that would be explained twice.
_FEW = 4

Form = Callable[[Kernel, Tensor, Tensor, torch.Size], Tensor]


def _form(kernel: Kernel, count: int, grad: torch.Size, *, sparse: bool = False) -> Form | None:
    """How a group's input gradient is computed from `count` channels of a gradient of this shape; None: from the
    whole one, with zeros in it. `sparse`: the other channels are zero without the rule.

    Not measured on a GPU yet: `benchmarks.gpu` prints what each form costs there.
    """
    # That all the selected are dead is no rare case where they are few, or maps of one position; and little work.
    little = count < _FEW or math.prod(grad[2:]) == 1
    if not count or (little and not sparse) or not (kernel.groups == 1 or kernel.depthwise):
        return None
    if kernel.depthwise:
        return by_depthwise
    if tuple(kernel.weight.shape[2:]) == (1, 1) and kernel.padding == (0, 0):
        return by_product
    return by_flipped if kernel.stride == (1, 1) and min(_flipped_padding(kernel)) >= 0 else by_transposed


def by_product(kernel: Kernel, channels: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A 1x1 kernel: the positions' values times each image's own rows."""
    images, _, height, width = values.shape
    rows = kernel.weight.flatten(1)[channels].to(values.dtype)  # (n, k, in)
    answer = torch.bmm(values.flatten(2).transpose(1, 2), rows).view(images, height, width, -1).permute(0, 3, 1, 2)
    if kernel.stride == (1, 1):
        return answer
    spread = torch.zeros(shape, dtype=answer.dtype, device=answer.device)
    spread[:, :, :: kernel.stride[0], :: kernel.stride[1]] = answer
    return spread


def by_flipped(kernel: Kernel, channels: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Stride 1: one convolution with flipped rows, a group an image."""
    rows = _rows(kernel, channels, values).flip(3, 4).transpose(1, 2)  # (n, in, k, kh, kw)
    padding = _flipped_padding(kernel)
    answer = F.conv2d(_side_by_side(values), rows.flatten(0, 1), None, 1, padding, kernel.dilation, len(values))
    return answer.view(shape)


def by_transposed(kernel: Kernel, channels: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """One transposed convolution, a group an image."""
    rows = _rows(kernel, channels, values).flatten(0, 1)
    return _transposed(kernel, values, rows, len(values), shape).view(shape)


def by_depthwise(kernel: Kernel, channels: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """One channel in and out: one transposed convolution of the selected, whose input channels alone it gives."""
    rows = _rows(kernel, channels, values).flatten(0, 1)
    return _transposed(kernel, values, rows, len(rows), shape).view(*channels.shape, *shape[2:])


def at(values: Tensor, channels: Tensor) -> Tensor:
    """Of `(n, C, h, w)` the channels `(n, k)` of each image, `(n, k, h, w)`."""
    return values.gather(1, channels[:, :, None, None].expand(-1, -1, *values.shape[2:]))


def _rows(kernel: Kernel, channels: Tensor, values: Tensor) -> Tensor:
    """The weights' rows of each image's channels, `(n, k, in / groups, kh, kw)`."""
    rows = kernel.weight.index_select(0, channels.flatten()).to(values.dtype)
    return rows.contiguous().view(*channels.shape, *rows.shape[1:])


def _side_by_side(values: Tensor) -> Tensor:
    """The images' channels as those of one image."""
    return values.reshape(1, -1, *values.shape[2:])


def _transposed(kernel: Kernel, values: Tensor, rows: Tensor, groups: int, shape: torch.Size) -> Tensor:
    geometry = zip(
        shape[2:], values.shape[2:], kernel.stride, kernel.padding, kernel.dilation, rows.shape[2:], strict=True
    )
    missing = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in geometry]
    return F.conv_transpose2d(
        _side_by_side(values), rows, None, kernel.stride, kernel.padding, missing, groups, kernel.dilation
    )


def _flipped_padding(kernel: Kernel) -> tuple[int, int]:
    height, width = kernel.weight.shape[2:]
    return (
        kernel.dilation[0] * (height - 1) - kernel.padding[0],
        kernel.dilation[1] * (width - 1) - kernel.padding[1],
    )


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device without waiting for what is queued there: a GPU fetches it from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def working(grad: Tensor) -> Tensor:
    """The gradient in the type that convolutions are computed in, autocast's where that is on."""
    device = grad.device.type
    return grad.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else grad
