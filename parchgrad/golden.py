"""The golden record: an input whose logits and map are known, by which a deployment proves itself.

It lies beside the table it was made with. The input is a synthetic pattern, so that no photograph of anyone's
data travels with a table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from parchgrad.errors import GoldenError
from parchgrad.files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from parchgrad.explainer import Explainer, Explanation
    from parchgrad.models import Model

GOLDEN_FILE = "golden.safetensors"

# Machines sum in different orders, and a ReLU on the edge then flips a path; another table's map is off by 1
# and more.
LOGITS_TOLERANCE = 0.01
MAP_TOLERANCE = 0.2


def record(explainer: Explainer, folder: str | os.PathLike[str]) -> Path:
    """Explain the pattern for the table's first class, under the table's defaults, and write the record."""
    import torch

    image = _pattern(_model(explainer).preprocessing.size)
    target = explainer.table.classes[0]
    explanation = _explained(explainer, image, target)
    path = Path(folder) / GOLDEN_FILE
    tensors = {
        "image": image.half(),
        "logits": explanation.logits.cpu().float(),
        "saliency": explanation.saliency().cpu().float(),
        "target": torch.tensor([target]),
    }
    # One entry: safetensors writes several in an order of chance, and the file would differ from time to time.
    write_tensors(path, tensors, metadata={"digests": json.dumps(_digests(explainer))})
    return path


def check(explainer: Explainer, folder: str | os.PathLike[str]) -> None:
    """Explain the recorded input again. Raises GoldenError, saying what differs and by how much."""
    import torch

    path = Path(folder) / GOLDEN_FILE
    if not path.is_file():
        raise GoldenError(f"Table folder '{folder}' has no {GOLDEN_FILE}; 'parchgrad table build' writes one.")
    recorded = read(path)
    for what, digest in _digests(explainer).items():
        if recorded.digests.get(what) != digest:
            raise differs(path, what, recorded.digests.get(what), digest)
    explanation = _explained(explainer, torch.from_numpy(recorded.image), recorded.target)
    recorded.compare(explanation.logits.cpu().float().numpy(), explanation.saliency().cpu().float().numpy())


@dataclass(frozen=True)
class Record:
    """What a golden record holds."""

    image: NDArray[np.float32]  # (1, 3, h, w), normalised
    target: int
    logits: NDArray[np.float32]  # (1, K)
    saliency: NDArray[np.float32]  # (1, h, w)
    digests: Mapping[str, str]  # of what made it

    def compare(self, logits: NDArray[np.float32], saliency: NDArray[np.float32]) -> None:
        """Raises GoldenError, saying what differs and by how much, where these are others than recorded."""
        _compare("logits", logits, self.logits, LOGITS_TOLERANCE)
        _compare("saliency map", saliency, self.saliency, MAP_TOLERANCE)


def read(path: Path) -> Record:
    """The record in a file. Raises GoldenError where it cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            digests: dict[str, str] = json.loads((file.metadata() or {}).get("digests", "{}"))
            return Record(
                image=file.get_tensor("image").astype(np.float32),
                target=int(file.get_tensor("target").item()),
                logits=file.get_tensor("logits"),
                saliency=file.get_tensor("saliency"),
                digests=digests,
            )
    except (SafetensorError, ValueError) as error:
        raise GoldenError(f"Golden record '{path}' cannot be read: {error}.") from error


def differs(path: Path, what: str, recorded: str | None, loaded: str) -> GoldenError:
    """The error that the record is of other weights, or of another table."""
    return GoldenError(f"Golden record '{path}': {what} is {recorded}, loaded is {loaded}.")


def _explained(explainer: Explainer, image: Tensor, target: int) -> Explanation:
    """In full float32: TF32, cuDNN's default for convolutions, moves some maps by more than the tolerance."""
    import torch

    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return explainer.explain(image, target)


def _pattern(size: tuple[int, int]) -> Tensor:
    """Smooth coloured noise in normalised units, `(1, 3, h, w)`, representable in float16."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 7, 7, generator=generator)
    fine = torch.randn(1, 3, 29, 29, generator=generator)
    smooth = interpolate(coarse, size, mode="bilinear") + 0.5 * interpolate(fine, size, mode="bilinear")
    return smooth.half().float()


def _digests(explainer: Explainer) -> dict[str, str]:
    return {
        "weights_sha256": _model(explainer).weights_sha256,
        "table_sha256": explainer.table.table_sha256,
    }


def _model(explainer: Explainer) -> Model:
    from parchgrad.models import Model

    if not isinstance(explainer.model, Model):
        raise GoldenError("A golden record needs a model package, not a bare module.")
    return explainer.model


def _compare(what: str, found: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> None:
    if found.shape != expected.shape:
        raise GoldenError(f"Golden {what} has shape {tuple(found.shape)}, recorded {tuple(expected.shape)}.")
    with np.errstate(invalid="ignore"):  # a damaged record may hold infinity, and be off by NaN
        off = found.astype(np.float64) - expected
    distance = float(np.linalg.norm(off)) / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)
    if not distance <= tolerance:
        raise GoldenError(f"Golden {what} is off by {distance:.3g} (relative L2), allowed {tolerance}.")
