"""FGSM and PGD on a network of ours: captum's steps, on pixels, between bounds. Knows neither maps nor channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parchgrad.attacks.attack import Attack
from parchgrad.attacks.corruptions import Picture, corrupted
from parchgrad.errors import AbandonedError, ModelError, OptionError, missing_package
from parchgrad.preprocessing import Preprocessing
from parchgrad.runtimes.view import private_view

if TYPE_CHECKING:
    from captum.robust import FGSM

STEP_SHARE = 2.5  # PGD's step is this times strength / steps: it can cross the ball, as Madry et al. have it


class Attacker:
    """Changes pictures against one network. Thread safe; the network is never touched.

    `network` takes images normalised as `preprocessing` says and answers `(B, K)` logits. One picture at a time: a
    sign turns where a gradient is all but zero, and its last bits depend on the batch it is computed in.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        self._network = _OfPixels(private_view(network), preprocessing).requires_grad_(False).eval()
        weight = next((p for p in network.parameters() if p.is_floating_point()), None)
        if weight is None:
            raise ModelError("The network has no weights; expected some, to follow their gradient.")
        self._device = weight.device

    def perturbed(
        self, picture: Picture, attack: Attack, label: int, wanted: Callable[[], bool] | None = None
    ) -> Picture:
        """The picture uint8 `(h, w, 3)` after `attack`; a new array. Strength 0 is the picture itself.

        Without a goal FGSM and PGD raise the cross-entropy of class `label`, with one they lower that of the goal.
        Every value stays within `attack.strength` levels of its own and within 0..255. The same seed gives the same
        picture on one machine. `wanted` is asked before every step; where it says no raises AbandonedError. Raises
        OptionError for a class that the network has not, MissingPackageError without captum.
        """
        if not attack.by_gradient:
            return corrupted(picture, attack)
        sought = label if attack.goal is None else attack.goal
        if attack.strength == 0:
            return picture.copy()
        step = self._step(sought, attack.goal is not None, wanted)
        centre = self._pixels(picture)
        radius = attack.strength / 255
        if attack.kind == "fgsm":
            return _levels(step(centre, radius))
        low, high = (centre - radius).clamp(min=0), (centre + radius).clamp(max=1)
        # captum's own PGD is this loop with a start drawn from torch's global generator, and no end but the last.
        generator = torch.Generator().manual_seed(attack.seed)
        noise = torch.rand(centre.shape, generator=generator, dtype=torch.float64).to(centre)
        here = low + (high - low) * noise
        for _ in range(attack.steps):
            here = step(here, STEP_SHARE * radius / attack.steps).clamp(low, high)
        return _levels(here)

    def loss(self, picture: Picture, label: int) -> float:
        """The cross-entropy of class `label`, in nats."""
        with torch.inference_mode():
            logits = self._network(self._pixels(picture)).double()
            return float(F.softplus(_odds_against(logits, torch.tensor([label], device=self._device))))

    def _step(
        self, sought: int, targeted: bool, wanted: Callable[[], bool] | None
    ) -> Callable[[Tensor, float], Tensor]:
        fgsm = _fgsm(self._network)
        target = torch.tensor([sought], device=self._device)

        def step(here: Tensor, size: float) -> Tensor:
            if wanted is not None and not wanted():
                raise AbandonedError("The attack is not wanted any more.")
            # captum warns where it has to ask for the gradient itself, and leaves the graph on what it answers.
            moved: Tensor = fgsm.perturb(here.detach().requires_grad_(), size, target, targeted=targeted)
            return moved.detach()

        return step

    def _pixels(self, picture: Picture) -> Tensor:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise OptionError("picture", f"{picture.dtype} {picture.shape}", "uint8 (h, w, 3)")
        channels_first = np.ascontiguousarray(picture.transpose(2, 0, 1))
        return torch.from_numpy(channels_first)[None].to(self._device, self._network.dtype) / 255


class _OfPixels(nn.Module):
    """The network over pixels in 0..1: it normalises inside. captum's bounds are then one number for all colours."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        weight = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        # Half floats have not the digits for a level of 255 near 1: pixels keep float32.
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self._network, self._of_weights = network, weight.dtype
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values, dtype=self.dtype, device=weight.device)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self._network(((pixels - self.mean) / self.std).to(self._of_weights))
        return logits


def require_captum() -> type[FGSM]:
    """captum's FGSM; the first call imports it, which takes a second. Raises MissingPackageError."""
    try:
        from captum.robust import FGSM
    except ModuleNotFoundError as error:
        if (named := missing_package("An attack by the gradient", error)) is None:
            raise
        raise named from error
    found: type[FGSM] = FGSM
    return found


def _fgsm(network: nn.Module) -> FGSM:
    fgsm = require_captum()(network, _odds_against, lower_bound=0.0, upper_bound=1.0)
    # By default a gradient below 1e-6 counts as none, and its pixel stays as it is.
    fgsm.zero_thresh = 0
    return fgsm


def _odds_against(logits: Tensor, targets: Tensor) -> Tensor:
    """Logarithm of the odds against the targets `(B,)`, one an image, as captum wants it; in nats.

    Cross-entropy is `softplus` of it, so its gradient has the same sign everywhere, which is all that the attacks
    take of it; but it does not vanish where the network is sure. Raises OptionError.
    """
    for target in targets.tolist():
        if not 0 <= target < logits.shape[1]:
            raise OptionError("class", target, f"an index in 0..{logits.shape[1] - 1}")
    own = F.one_hot(targets, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).logsumexp(dim=1) - logits[own]


def _levels(pixels: Tensor) -> Picture:
    levels: Picture = (pixels[0] * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return np.ascontiguousarray(levels.transpose(1, 2, 0))
