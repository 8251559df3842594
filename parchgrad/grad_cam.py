"""Grad-CAM: the map that a feature map and a score's gradient there make; pure tensor functions. It runs no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_cam(values: Tensor, gradients: Tensor, size: Sequence[int]) -> Tensor:
    """Grad-CAM `(B, H, W)` of the size (H, W), of feature maps `values` `(B, C, h, w)` and the score's gradient there:

        cam(x, y) = max(0, sum over k of A_k(x, y) * mean over all places of gradient_k)

    (Selvaraju et al. 2017, equations 1 and 2), enlarged bilinearly, each value in the middle of its place. It is not
    stretched to 0..1 as packages do it: a score times ten has a map times ten. float32 or wider.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    weights = gradients.to(wide).mean(dim=(2, 3), keepdim=True)
    cam = (weights * values.to(wide)).sum(dim=1, keepdim=True).clamp(min=0)
    return F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
