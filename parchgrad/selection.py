"""Choosing channels (method.md section 1): pure tensor functions from ranks or features to masks.

`B` images, `C` channels. `count` `(B,)` is how many channels a quantile asks for; `log_alpha` `(B,)` float64
replaces it wherever it is not NaN. Masks are bool `(B, C)`; an empty mask is a legal answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_ranked(rank: Tensor, rows: Tensor, count: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Class-wise by quantile, for all layers of a table at once: a mask `(B, C)` for each.

    `rank` `(K, N)` int16 are the table's ranks, layers of these `widths` side by side; `rows` `(B,)` each image's
    row, `count` `(B, L)` how many channels it selects in each layer, 0 for none. Only the batch's own rows are
    read, in the type they are stored in.
    """
    ranks = rank.index_select(0, rows)
    wanted = count.to(rank.dtype)
    masks, start = [], 0
    for layer, width in enumerate(widths):
        masks.append(ranks.narrow(1, start, width) < wanted.narrow(1, layer, 1))
        start += width
    return masks


def by_class(rank: Tensor, log_p: Tensor | None, count: Tensor, log_alpha: Tensor) -> Tensor:
    """Class-wise: the `count` best-ranked channels, or all with `p <= alpha`.

    `rank` and `log_p` are the rows of each image's target, `(B, C)`; `log_p` may be left out when no
    image uses alpha.
    """
    by_count = rank < count[:, None]
    if log_p is None:
        return by_count
    return torch.where(torch.isnan(log_alpha)[:, None], by_count, log_p <= log_alpha[:, None])


def by_instance(gap: Tensor, mean: Tensor, std: Tensor, count: Tensor, log_alpha: Tensor) -> Tensor:
    """Instance-wise: `z = (gap - mean) / std`, `p = P(Z > z)`, then as `by_class`.

    `gap` `(B, C)` are the images' own GAP features, `mean` and `std` `(C,)` the table's. Ties go to the
    lower channel index; a channel with std 0 is never selected.
    """
    varies = std > 0
    z = torch.where(varies, (gap.to(std.dtype) - mean) / std, -math.inf)
    order = z.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(z.shape[1], device=z.device).expand_as(order))
    return by_class(rank, torch.special.log_ndtr(-z), count, log_alpha) & varies
