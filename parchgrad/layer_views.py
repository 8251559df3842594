"""One image's way through a network and back, layer by layer: what is to be looked at, and no picture of it.

For every call of a convolution of the table, in forward order: its strongest channels, the gradient that arrives there,
and what the rule (method.md section 2) makes of it. Two passes of the dense engine, whose own hooks tell what they did:
one under the rule and one without. After CNN Explainer (Wang et al., 2020), which shows the way forward alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.options import Options, per_image
from parchgrad.rule import Factors, side_moments, side_sums
from parchgrad.runtimes.view import gap_features
from parchgrad.tables import LayerTable, network_of

if TYPE_CHECKING:
    from parchgrad.explainer import Explainer, Target
    from parchgrad.runtimes import Tell

Array = NDArray[np.float32]

METHODS = ("gradient", "input_x_gradient", "guided_backprop")  # those of one way back through every layer
ORDERS = ("activation", "gradient", "table")
MOST_CHANNELS = 64
MOST_SIDE = 64  # positions along a map's longer side; a larger one is averaged down to it


@dataclass(frozen=True, eq=False)
class ChannelView:
    """One channel of a layer. Maps are `(h, w)`, float32, averaged down to at most MOST_SIDE along a side.

    The gradient after the rule is `factor` times `before`, position by position.
    """

    index: int
    selected: bool
    feature: float  # GAP feature: mean of ReLU of the convolution's output
    deviations: float | None  # of the feature from the table's mean, in its standard deviations; None: not comparable
    rank: int | None  # among the layer's channels in the table, for the target, 0 the best; None: the target has no row
    log_p: float | None  # natural logarithm of its Welch p-value there
    factor: float  # what the rule multiplies its gradient by
    plain_share: float  # of the layer's gradient energy, the sum of squares, without the rule anywhere
    before_share: float  # of that of the gradient that arrives
    after_share: float  # and of what the rule lets on
    activation: Array  # ReLU of the convolution's output
    plain: Array
    before: Array


@dataclass(frozen=True)
class RuleView:
    """The numbers of method.md section 2 in one layer, of the gradient that arrives; all in its own units."""

    m: float  # variance of S_H over the positions; the second moment where there is one position
    n: float  # of S_L
    k: float  # their covariance
    a: float
    b: float
    selected_factor: float  # a b
    unselected_factor: float  # b; 0 for infinite gamma
    identity: bool  # the gradient passes unchanged: both factors are 1
    sd_before: float  # standard deviation of S_H + S_L over the positions
    sd_after: float  # of the sum after the rule


@dataclass(frozen=True, eq=False)
class LayerView:
    """One call of a convolution. `plain` is without the rule in any layer; `before` is the gradient that arrives here
    in the explained pass, changed already by the rule in later layers; `after` is what this layer's rule lets on.

    `selected_*_share`: the part of the layer's gradient energy, the sum of its squares, that is the selected channels'.
    """

    name: str
    call: int  # 0, and on where the network calls the layer again
    calls: int
    kind: str  # the module's class
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    shape: tuple[int, ...]  # (C, h, w)
    active: bool  # the rule acts here
    selected: tuple[int, ...]  # channels, rising; empty where the rule does not act
    rule: RuleView | None  # None where it does not act
    plain_energy: float
    before_energy: float
    after_energy: float
    selected_plain_share: float
    selected_before_share: float
    selected_after_share: float
    sum_selected: Array  # S_H as it arrives, (h, w)
    sum_unselected: Array  # S_L
    sum_after: Array  # the sum of all channels after the rule
    channels: tuple[ChannelView, ...]  # the strongest: selected ones, then others


@dataclass(frozen=True, eq=False)
class NetworkView:
    """The prediction, the map's two forms at the image (mean magnitude over colours) and the layers between them."""

    logits: Array  # (classes,)
    probabilities: Array  # (classes,)
    target: int
    options: Options
    order: str
    plain: Array  # (h, w), of the gradient without the rule
    ruled: Array  # (h, w), of the explained one
    identity_layers: int
    layers: tuple[LayerView, ...]


def layer_views(
    explainer: Explainer,
    image: Tensor,
    target: Target = None,
    options: Options | None = None,
    *,
    channels: int = 8,
    order: str = "activation",
    most_side: int = MOST_SIDE,
) -> NetworkView:
    """What `explainer` does with `image`, `(3, h, w)` or `(1, 3, h, w)`, normalised, for `target` (None: predicted).

    Args:
        options: as of the explanation; default: the table's. Its selection is the explanation's own. Methods that
            take gradients at many points have no one way back to show, and `input_x_gradient` shows the gradient's.
        channels: how many a layer shows, in 1..MOST_CHANNELS: half of them the strongest selected, half the strongest
            of the others; where one side has fewer, the other has more.
        order: strongest by `activation` (GAP feature), `gradient` (energy of what arrives) or `table` (its rank).
        most_side: maps are averaged down to so many positions along their longer side, in 1..MOST_SIDE.

    Raises OptionError, UnknownTargetError, UncoveredTargetError, and UnsupportedModelError where a layer does not work
    on the image alone.
    """
    _integer("channels", channels, MOST_CHANNELS)
    _integer("most_side", most_side, MOST_SIDE)
    if order not in ORDERS:
        raise OptionError("order", order, ", ".join(ORDERS))
    if options is None:
        (options,) = per_image(1, explainer.table.defaults, {})
    if options.method not in METHODS:
        raise OptionError("method", options.method, ", ".join(METHODS))
    image = image[None] if image.dim() == 3 else image

    explained, plain = _Notes(), _Notes(outputs=False)
    found = explainer.watched(image, target, options, explained)
    class_index = int(found.targets)
    without = replace(options, rule=False)
    # Where the rule acts in no layer the explained pass is the plain one.
    unruled = explainer.watched(image, class_index, without, plain) if options.rule else found
    notes, beside = explained.calls, (plain if options.rule else explained).calls
    row = int(explainer.table.row_of_class[class_index])
    if order == "table" and row < 0:
        raise OptionError("order", order, f"activation, gradient: class {class_index} has no row in the table")

    modules = dict(network_of(explainer.model).named_modules())
    points = explainer.table.statistics_point == "convolution"
    asked = _Asked(options, channels, order, most_side)
    calls: dict[str, int] = {}
    for call in notes:
        calls[call.name] = calls.get(call.name, 0) + 1
    layers, seen = [], dict.fromkeys(calls, 0)
    for call, other in zip(notes, beside, strict=True):
        rows = _Row.of(explainer.table.layers[call.name], row, points)
        layers.append(_layer(call, other, modules[call.name], rows, asked, seen[call.name], calls[call.name]))
        seen[call.name] += 1
    logits = found.logits[0].float()
    return NetworkView(
        logits=_array(logits),
        probabilities=_array(logits.softmax(dim=0)),
        target=class_index,
        options=options,
        order=order,
        plain=_array(_small(unruled.gradients[0].abs().mean(dim=0), most_side)),
        ruled=_array(_small(found.gradients[0].abs().mean(dim=0), most_side)),
        identity_layers=int(found.identity_layers),
        layers=tuple(layers),
    )


@dataclass(frozen=True)
class _Asked:
    options: Options
    channels: int
    order: str
    most_side: int


class _Call:
    """What a pass did in one call of a layer; maps are `(C, h, w)`."""

    def __init__(self, name: str, output: Tensor, keep: bool) -> None:
        if output.shape[0] != 1:
            found = tuple(output.shape)
            raise UnsupportedModelError(f"Layer '{name}' gives {found} for one image; expected it to work on it alone.")
        self.name = name
        self.output = _maps(output).clone() if keep else None  # whoever comes next may write into it
        self.shape = tuple(output.shape[1:])
        self.grad = torch.zeros(_maps(output).shape, dtype=output.dtype, device=output.device)  # where none comes back
        self.selected: Tensor | None = None
        self.factors: Factors | None = None

    def tell(self, grad: Tensor, selected: Tensor | None, factors: Factors | None) -> None:
        self.grad = _maps(grad.detach()).clone()
        self.selected = None if selected is None else selected[0]
        self.factors = factors


class _Notes:
    """A witness that keeps what it is told, in forward order."""

    def __init__(self, *, outputs: bool = True) -> None:
        self.calls: list[_Call] = []
        self._outputs = outputs

    def ran(self, name: str, output: Tensor) -> Tell:
        self.calls.append(_Call(name, output, self._outputs))
        return self.calls[-1].tell


@dataclass(frozen=True)
class _Row:
    """What the table says of one layer's channels."""

    rank: list[int] | None
    log_p: list[float] | None
    mean: list[float] | None
    std: list[float] | None

    @classmethod
    def of(cls, layer: LayerTable, row: int, comparable: bool) -> _Row:
        """`row` -1: the target has none. `comparable`: the table's features are the ones shown here."""
        return cls(
            rank=None if row < 0 else layer.rank[row].tolist(),
            log_p=None if row < 0 else layer.log_p[row].tolist(),
            mean=layer.mean.tolist() if comparable else None,
            std=layer.std.tolist() if comparable else None,
        )

    def deviations(self, channel: int, feature: float) -> float | None:
        if self.mean is None or self.std is None or self.std[channel] <= 0:
            return None
        return (feature - self.mean[channel]) / self.std[channel]


def _layer(call: _Call, other: _Call, module: Any, row: _Row, asked: _Asked, number: int, calls: int) -> LayerView:
    assert call.output is not None
    width = len(call.output)
    active = call.factors is not None
    selected = torch.zeros(width, dtype=torch.bool, device=call.grad.device) if call.selected is None else call.selected
    rule = None if call.factors is None else _rule(call, selected, call.factors, asked.options)
    high, low = (1.0, 1.0) if rule is None else (rule.selected_factor, rule.unselected_factor)
    factors = torch.full((width,), low, dtype=torch.float64, device=call.grad.device).masked_fill(selected, high)

    feature = gap_features(call.output[None])[0].double()
    before, plain = _energies(call.grad), _energies(other.grad)
    after = before * factors * factors
    strength = {"activation": feature, "gradient": before}.get(asked.order)
    order = (
        strength.argsort(descending=True, stable=True).tolist()
        if strength is not None
        else sorted(range(width), key=(row.rank or [0] * width).__getitem__)
    )
    shown = _shown(order, selected.tolist(), asked.channels)

    small = [_array(_small(maps[shown], asked.most_side)) for maps in (torch.relu(call.output), other.grad, call.grad)]
    shares = [_shares(energies).tolist() for energies in (plain, before, after)]
    is_selected, features, of_channel = selected.tolist(), feature.tolist(), factors.tolist()
    wide = call.grad.double()
    sides = torch.stack((wide[selected].sum(dim=0), wide[~selected].sum(dim=0)))
    sums = [_array(_small(one, asked.most_side)) for one in (sides[0], sides[1], high * sides[0] + low * sides[1])]
    chosen = [float(_shares(energies)[selected].sum()) for energies in (plain, before, after)]
    return LayerView(
        name=call.name,
        call=number,
        calls=calls,
        kind=type(module).__name__,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        groups=int(module.groups),
        shape=call.shape,
        active=active,
        selected=tuple(i for i, one in enumerate(is_selected) if one),
        rule=rule,
        plain_energy=float(plain.sum()),
        before_energy=float(before.sum()),
        after_energy=float(after.sum()),
        selected_plain_share=chosen[0],
        selected_before_share=chosen[1],
        selected_after_share=chosen[2],
        sum_selected=sums[0],
        sum_unselected=sums[1],
        sum_after=sums[2],
        channels=tuple(
            ChannelView(
                index=channel,
                selected=is_selected[channel],
                feature=features[channel],
                deviations=row.deviations(channel, features[channel]),
                rank=None if row.rank is None else row.rank[channel],
                log_p=None if row.log_p is None else row.log_p[channel],
                factor=of_channel[channel],
                plain_share=shares[0][channel],
                before_share=shares[1][channel],
                after_share=shares[2][channel],
                activation=small[0][i],
                plain=small[1][i],
                before=small[2][i],
            )
            for i, channel in enumerate(shown)
        ),
    )


def _rule(call: _Call, selected: Tensor, factors: Factors, options: Options) -> RuleView:
    """The factors are those that the pass used; the moments beside them are of the same sums, in float64."""
    sums = side_sums(call.grad[None], torch.stack((selected, ~selected))[None])[0].double()
    moments = side_moments(sums, len(selected))
    high, low = float(factors.selected[0]), float(factors.unselected[0])
    after = side_moments(torch.stack((high * sums[0], low * sums[1])), len(selected))
    infinite = math.isinf(options.gamma)
    identity = bool(factors.identity[0])
    return RuleView(
        m=moments.selected,
        n=moments.unselected,
        k=(moments.total - moments.selected - moments.unselected) / 2,
        a=1.0 if identity or infinite else high / low,
        b=1.0 if identity else high if infinite else low,
        selected_factor=high,
        unselected_factor=low,
        identity=identity,
        sd_before=math.sqrt(max(0.0, moments.total)),
        sd_after=math.sqrt(max(0.0, after.total)),
    )


def _shown(order: Sequence[int], selected: Sequence[bool], most: int) -> list[int]:
    """The first of each side in `order`, half of `most` each where there are as many, selected ones before others."""
    chosen = [channel for channel in order if selected[channel]]
    others = [channel for channel in order if not selected[channel]]
    first = min(len(chosen), max(most - most // 2, most - len(others)))
    return chosen[:first] + others[: most - first]


def _maps(values: Tensor) -> Tensor:
    """One image's maps `(1, C, *spatial)` as `(C, h, w)`: a line is of height 1, and a volume's slices lie in rows."""
    return values[0].reshape(values.shape[1], -1, values.shape[-1])


def _small(maps: Tensor, most: int) -> Tensor:
    """`(..., h, w)` averaged down to at most `most` along the longer side; its proportions stay, to the nearest."""
    height, width = maps.shape[-2:]
    scale = most / max(height, width)
    if scale >= 1:
        return maps
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return F.adaptive_avg_pool2d(maps.reshape(1, -1, height, width), size).reshape(*maps.shape[:-2], *size)


def _energies(grad: Tensor) -> Tensor:
    """Sum of squares of each channel `(C,)`, in float64."""
    wide = grad.double().flatten(1)
    return (wide * wide).sum(dim=1)


def _shares(energies: Tensor) -> Tensor:
    total = energies.sum()
    return energies / total if float(total) > 0 else torch.zeros_like(energies)


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().float().cpu().numpy())


def _integer(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise OptionError(name, value, f"an integer in 1..{most}")
