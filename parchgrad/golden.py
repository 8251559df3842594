"""The golden record: an input whose logits and map are known, by which a deployment proves itself.

It lies beside the table it was made with. The input is a synthetic pattern, so that no photograph of anyone's
data travels with a table.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import interpolate

from parchgrad.errors import GoldenError
from parchgrad.files import write_tensors
from parchgrad.models import Model

if TYPE_CHECKING:
    from parchgrad.explainer import Explainer, Explanation

GOLDEN_FILE = "golden.safetensors"

# Machines sum in different orders, and a ReLU on the edge then flips a path; another table's map is off by 1
# and more.
LOGITS_TOLERANCE = 0.01
MAP_TOLERANCE = 0.2


def record(explainer: Explainer, folder: str | os.PathLike[str]) -> Path:
    """Explain the pattern for the table's first class, under the table's defaults, and write the record."""
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
    path = Path(folder) / GOLDEN_FILE
    if not path.is_file():
        raise GoldenError(f"Table folder '{folder}' has no {GOLDEN_FILE}; 'parchgrad table build' writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            recorded: dict[str, str] = json.loads((file.metadata() or {}).get("digests", "{}"))
            image, logits = file.get_tensor("image").float(), file.get_tensor("logits")
            saliency, target = file.get_tensor("saliency"), int(file.get_tensor("target"))
    except (SafetensorError, ValueError) as error:
        raise GoldenError(f"Golden record '{path}' cannot be read: {error}.") from error
    for what, digest in _digests(explainer).items():
        if recorded.get(what) != digest:
            raise GoldenError(f"Golden record '{path}': {what} is {recorded.get(what)}, loaded is {digest}.")
    explanation = _explained(explainer, image, target)
    _compare("logits", explanation.logits.cpu().float(), logits, LOGITS_TOLERANCE)
    _compare("saliency map", explanation.saliency().cpu().float(), saliency, MAP_TOLERANCE)


def _explained(explainer: Explainer, image: Tensor, target: int) -> Explanation:
    """In full float32: TF32, cuDNN's default for convolutions, moves some maps by more than the tolerance."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return explainer.explain(image, target)


def _pattern(size: tuple[int, int]) -> Tensor:
    """Smooth coloured noise in normalised units, `(1, 3, h, w)`, representable in float16."""
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
    if not isinstance(explainer.model, Model):
        raise GoldenError("A golden record needs a model package, not a bare module.")
    return explainer.model


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise GoldenError(f"Golden {what} has shape {tuple(found.shape)}, recorded {tuple(expected.shape)}.")
    distance = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not distance <= tolerance:
        raise GoldenError(f"Golden {what} is off by {distance:.3g} (relative L2), allowed {tolerance}.")
