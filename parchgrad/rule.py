"""The gradient rule (method.md section 2): pure tensor functions, no model and no hooks.

`g` is the gradient at a convolution's output, `(batch, channels, *spatial)`. Per image, with `S_H` and
`S_L` the sums of g over selected and unselected channels, `M = Var S_H`, `N = Var S_L` and
`K = Cov(S_H, S_L)` over the positions, selected channels are multiplied by `b * a`, the others by `b`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parchgrad.defaults import CONSERVE


class Conserve(NamedTuple):
    """`conserve` of each image as two masks, `(batch,)` bool: neither is `independent`."""

    exact: Tensor
    none: Tensor

    @classmethod
    def of(cls, names: str | Sequence[str], batch: int, device: torch.device) -> Conserve:
        """One name for all, or one an image. Raises ValueError for others than CONSERVE."""
        each = [names] * batch if isinstance(names, str) else list(names)
        if len(each) != batch or not set(each) <= set(CONSERVE):
            raise ValueError(f"conserve is {names!r}; expected one of {CONSERVE}, or one for each image")
        exact, none = torch.tensor([[n == "exact" for n in each], [n == "none" for n in each]], device=device)
        return cls(exact, none)


# Relative to M + N: below it a variance is rounding noise, whatever the gradient's scale.
NEGLIGIBLE = 1e-12


class Factors(NamedTuple):
    """What each image's gradient is multiplied by; every field has shape `(batch,)`."""

    selected: Tensor
    unselected: Tensor
    identity: Tensor  # bool: the gradient passes unchanged (both factors are 1)


def channel_factors(
    grad: Tensor,
    selected: Tensor,
    gamma: float | Tensor,
    conserve: str | Sequence[str] | Conserve = "independent",
) -> Factors:
    """The factors `b * a` and `b` of method.md section 2, per image.

    Args:
        grad: gradient at the convolution's output, `(batch, channels, *spatial)`, any float dtype.
        selected: bool, `(batch, channels)`.
        gamma: sd of the selected side in units of the unselected side's, one number or `(batch,)`;
            infinity drops the unselected side.
        conserve: `independent` (the paper: K taken as 0), `exact`, or `none` (b = 1); one, or one an image,
            by name or, to spare building them anew at every layer, as masks.

    An image passes unchanged (`identity`) where one side is empty and where a side that the formula
    divides by has no variance beyond rounding: `M <= 1e-12 (M + N)`; for finite gamma also
    `N <= 1e-12 (M + N)`; for `exact` also a total variance before or after that vanishes likewise.
    Maps of one position have no variance: there the second moment stands in for it.
    """
    sides = torch.stack((selected, ~selected), dim=1)
    return factors_of_sums(side_sums(grad, sides), grad.shape[1], _both_sides(selected), gamma, conserve)


def side_sums(grad: Tensor, sides: Tensor) -> Tensor:
    """`S_H` and `S_L`, `(batch, 2, positions)` in float32 or wider, in one pass over the gradient.

    `sides` `(batch, 2, channels)` is what each channel counts for in either sum.
    """
    flat = grad.flatten(2)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    with torch.autocast(grad.device.type, enabled=False):
        return torch.bmm(sides.to(flat.dtype), flat)


def factors_of_sums(
    sums: Tensor,
    channels: int,
    both_sides: Tensor,
    gamma: float | Tensor,
    conserve: str | Sequence[str] | Conserve = "independent",
) -> Factors:
    """`channel_factors` from the side sums of `channels` channels; `both_sides` `(batch,)`: neither side is empty."""
    high, low = _centred(sums, channels)
    m, n = _variance(high), _variance(low)
    gamma = torch.as_tensor(gamma, dtype=m.dtype, device=m.device).expand(m.shape)
    infinite = torch.isinf(gamma)
    if not isinstance(conserve, Conserve):
        conserve = Conserve.of(conserve, len(m), m.device)
    exact, none = conserve

    a = torch.where(infinite, 1.0, gamma * torch.sqrt(n / m))
    # Both sides' weights before conservation, up to a common factor that keeps a huge gamma finite.
    larger = a.clamp(min=1.0)
    p = a / larger
    q = torch.where(infinite, 0.0, 1.0 / larger)
    apart = p * p * m + q * q * n
    # The variance of the sum itself, not M + N + 2K: where the two sides cancel, that would be rounding.
    before = torch.where(exact, _variance(high + low), m + n)
    after = torch.where(exact, _variance(p[:, None] * high + q[:, None] * low), apart)
    b = torch.where(none, larger, torch.sqrt(before / after))

    # Written as "not greater" so that the NaN of 0 / 0 counts as negligible.
    identity = ~(m > NEGLIGIBLE * (m + n)) | (~infinite & ~(n > NEGLIGIBLE * (m + n))) | ~both_sides
    cancels = max(NEGLIGIBLE, _rounding(m.dtype, channels))
    identity |= exact & (~(before > cancels * (m + n)) | ~(after > cancels * apart))
    return Factors(
        selected=torch.where(identity, 1.0, p * b),
        unselected=torch.where(identity, 1.0, q * b),
        identity=identity,
    )


class Moments(NamedTuple):
    """`M`, `N` and `Var(S_H + S_L) = M + N + 2K` of one image in one layer."""

    selected: float
    unselected: float
    total: float
    rounding: float  # below it, relative to the squares summed, a variance is none


def side_moments(sums: Tensor, channels: int) -> Moments:
    """The moments of one image from its side sums `S_H` and `S_L`, `(2, positions)`.

    `channels` is how many terms a sum has. For a processor, where few numbers are quicker as Python's own than as
    tensors: in float64 and so in no need of `channel_factors`' common factor.
    """
    rounding, positions = _rounding(sums.dtype, channels), sums.shape[1]
    wide = sums.double()
    high = low = 0.0
    if positions > 1:
        means = wide.sum(dim=1) / positions
        high, low = means.tolist()
        if sums.dtype == torch.float64:
            wide, high_left, low_left = wide - means[:, None], 0.0, 0.0
        else:
            high_left, low_left = high, low  # float64 has the places to take them off afterwards
    else:
        high_left = low_left = 0.0
    (m, k), (_, n) = torch.mm(wide, wide.t()).tolist()
    m = m / positions - high_left * high_left
    n = n / positions - low_left * low_left
    k = k / positions - high_left * low_left
    # A side that is the same everywhere has no variance, and adds none to the sum's.
    if positions > 1 and m <= rounding * (m + high * high):
        m = k = 0.0
    if positions > 1 and n <= rounding * (n + low * low):
        n = k = 0.0
    return Moments(m, n, m + n + 2 * k, rounding)


def image_factors(moments: Moments, gamma: float, conserve: str) -> tuple[float, float] | None:
    """`channel_factors` of one image with channels on both sides: selected and unselected; None = unchanged."""
    m, n = moments.selected, moments.unselected
    if not m > NEGLIGIBLE * (m + n) or (gamma != math.inf and not n > NEGLIGIBLE * (m + n)):
        return None
    p, q = (1.0, 0.0) if gamma == math.inf else (gamma * math.sqrt(n / m), 1.0)
    apart = p * p * m + q * q * n
    if conserve == "none":
        return p, q
    before, after = m + n, apart
    if conserve == "exact":
        before = moments.total
        after = apart + p * q * (before - m - n)  # 2K = Var(S_H + S_L) - M - N
        cancels = max(NEGLIGIBLE, moments.rounding)
        if not before > cancels * (m + n) or not after > cancels * apart:
            return None
    b = math.sqrt(before / after)
    return p * b, q * b


def scale_channels(
    grad: Tensor,
    selected: Tensor,
    gamma: float | Tensor,
    conserve: str | Sequence[str] = "independent",
) -> Tensor:
    """`grad` under the rule: same shape and dtype, out of place. Arguments as `channel_factors`."""
    return apply_factors(grad, selected, channel_factors(grad, selected, gamma, conserve))


def apply_factors(grad: Tensor, selected: Tensor, factors: Factors) -> Tensor:
    """Multiply each channel `(batch, channels, *spatial)` by its side's factor, out of place."""
    per_channel = torch.where(selected, factors.selected[:, None], factors.unselected[:, None])
    shaped = per_channel.reshape(per_channel.shape + (1,) * (grad.dim() - 2))
    # A half-precision factor may overflow: multiply in the factors' wider type, then return to grad's.
    return (grad * shaped).to(grad.dtype)


def _centred(sums: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Both side sums, each `(batch, positions)`, centred, up to one common factor per image.

    The factors depend only on ratios, so both are divided by the image's largest magnitude: squares then
    neither underflow nor overflow, and the rule is scale-free in float32 too. Centred means that the mean
    square is the variance; a map of one position stays as it is, which makes it the second moment.
    """
    largest = sums.abs().amax(dim=(1, 2), keepdim=True)
    sums = sums / torch.where(largest > 0, largest, 1.0)
    if sums.shape[2] > 1:
        centred = sums - sums.mean(dim=2, keepdim=True)
        # A gradient that is the same at every position (a convolution before global pooling alone) has no
        # variance, but summing its channels in another order at each position leaves some.
        constant = _variance(centred) <= _rounding(sums.dtype, channels) * _variance(sums)
        sums = torch.where(constant[..., None], 0.0, centred)
    return sums[:, 0], sums[:, 1]


def _variance(centred: Tensor) -> Tensor:
    return (centred * centred).mean(dim=-1)


def _rounding(dtype: torch.dtype, channels: int) -> float:
    """Square of the relative rounding of a sum over channels: a variance below it, relative to the squares
    summed, is none. Roundings add up like a random walk, hence in proportion to the number of terms."""
    return float((8 * torch.finfo(dtype).eps) ** 2 * channels)


def _both_sides(selected: Tensor) -> Tensor:
    return selected.any(dim=1) & ~selected.all(dim=1)
