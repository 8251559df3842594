"""`ParchGrad`: the explanation under captum's conventions, for people who already use captum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parchgrad.explainer import Explainer
from parchgrad.tables import SelectionTable


class ParchGrad:
    """`ParchGrad(model, table).attribute(inputs, target=...)`, as captum's attribution classes are called.

    The model is taken as it is at each call, its weights and device included, and left as it was.
    """

    def __init__(self, forward_func: nn.Module, table: SelectionTable) -> None:
        self.forward_func = forward_func
        self.table = table

    def attribute(
        self,
        inputs: Tensor,
        target: int | tuple[int, ...] | list[int] | Tensor | None = None,
        abs: bool = False,  # captum's name
        **options: Any,
    ) -> Tensor:
        """Attributions like `inputs` `(batch, 3, height, width)`; signed unless `abs`.

        `target` is one class index or one an image; None explains the predicted class (captum would ask
        for it). `options` are those of `Explainer.explain`.
        """
        targets = list(target) if isinstance(target, tuple) else target
        # Made for this one call, as the model is now: the dense backward pass needs no preparation.
        explanation = Explainer(self.forward_func, self.table, backward="dense").explain(inputs, targets, **options)
        attributions = explanation.attributions.to(inputs.device)
        return torch.abs(attributions) if abs else attributions
