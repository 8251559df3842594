"""A saved answer of the service made again: each map with its own options, and compared.

What must be the same is compared before anything is computed: weights, table and image by their digests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from parchgrad import __version__
from parchgrad.answers import AnswerError, Explanation, Prediction, Result, encoded_as, read_answer
from parchgrad.errors import DataError, OptionError, UncoveredTargetError
from parchgrad.explainer import Explainer
from parchgrad.golden import MAP_TOLERANCE
from parchgrad.models import Model, load_model
from parchgrad.options import Options
from parchgrad.preprocessing import decode_image
from parchgrad.render import REDUCTION_OF_POLARITY
from parchgrad.tables import load_table

# Relative L2 that the order of float32 sums may make: on the same versions and kind of device, where threads and batch
# differ (measured up to 0.003), and on others, where a ReLU on the edge flips a path. Where it is another option, such
# as a quantile of 0.11 in place of 0.1, the map is off by 0.4 and more.
SAME_SOFTWARE_TOLERANCE = 0.01
OTHER_SOFTWARE_TOLERANCE = MAP_TOLERANCE
PROBABILITY_TOLERANCE = 0.01

EQUAL, DIFFERENT, NO_MAP, NO_IMAGE = "equal", "different", "no map", "no image"

# Options that an answer carries only of the method that has them.
_OF_METHOD = {
    "steps": "integrated_gradients",
    "samples": "smoothgrad",
    "noise": "smoothgrad",
    "noise_seed": "smoothgrad",
}


@dataclass(frozen=True)
class Comparison:
    """One explanation of an answer beside the same made again.

    status: `equal`, `different`, `no map` (the answer holds none to compare with), `no image` (no given image is
    the one it was made of); with a `reason` unless equal.
    distance: relative L2 of the two maps, in units of the new one.  quantisation: what of it the answer's encoding
    alone makes.  tolerance: quantisation and what the order of sums may make; `equal` is a distance within it, and
    probabilities within PROBABILITY_TOLERANCE.
    rank_correlation: Spearman's, of the pixels, the new map encoded as the answer's.
    probability_difference: the largest of the answer's classes.
    Figures are None where nothing was computed for them.
    """

    image: str  # its path, or the digest where there is none
    target: Prediction | None
    status: str
    reason: str = ""
    distance: float | None = None
    quantisation: float | None = None
    tolerance: float | None = None
    rank_correlation: float | None = None
    probability_difference: float | None = None


def replay(
    answer: str | os.PathLike[str],
    images: Iterable[str | os.PathLike[str]],
    *,
    models_dir: str | os.PathLike[str] = "models",
    tables_dir: str | os.PathLike[str] = "selection_tables",
    device: str = "cpu",
    tolerance: float | None = None,
) -> list[Comparison]:
    """Make the maps of a saved /explain answer again, from the same images, model and table, and compare.

    Images are found by their digests, in any order; those of the answer that are not given are `no image`.
    `tolerance` is the relative L2 that two maps may be apart beside what the answer's encoding makes; by default
    SAME_SOFTWARE_TOLERANCE where versions and device are the answer's, else OTHER_SOFTWARE_TOLERANCE. Raises
    DataError where the file is no such answer, an image is not of it, or weights or table are not those it names;
    ModelError, TableError where the model or its table is not there.
    """
    whole = _read(Path(answer))
    results = read_answer(whole)
    files = _by_digest(images, results)
    model, explainer = _loaded(whole, Path(models_dir), Path(tables_dir), device)
    if tolerance is None:
        same = whole.get("software") == _software(explainer)
        tolerance = SAME_SOFTWARE_TOLERANCE if same else OTHER_SOFTWARE_TOLERANCE
    comparisons = []
    for result in results:
        if result.error is not None or result.image_sha256 not in files:
            comparisons += _without_image(result)
        else:
            name, data = files[result.image_sha256]
            pixels = model.preprocessing.apply(decode_image(data, name))[0][None]
            comparisons += _compared(explainer, name, pixels, result, tolerance)
    return comparisons


def _read(path: Path) -> Mapping[str, Any]:
    try:
        whole = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"Answer '{path}' cannot be read: {error}.") from error
    except ValueError as error:
        raise AnswerError(f"Answer '{path}' is not JSON: {error}.") from error
    if not isinstance(whole, dict):
        raise AnswerError(f"Answer '{path}' is not an answer of /explain: it is no object.")
    return whole


def _by_digest(images: Iterable[str | os.PathLike[str]], results: Iterable[Result]) -> dict[str, tuple[str, bytes]]:
    """Path and bytes of each image by sha256. Raises DataError for an image that is none of the answer's."""
    expected = [result.image_sha256 for result in results if result.image_sha256 is not None]
    files = {}
    for path in map(Path, images):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"Image '{path}' cannot be read: {error}.") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest not in expected:
            known = ", ".join(dict.fromkeys(expected)) or "none"
            raise DataError(f"Image '{path}' has sha256 {digest}, the answer's images have {known}.")
        files[digest] = str(path), data
    return files


def _loaded(whole: Mapping[str, Any], models_dir: Path, tables_dir: Path, device: str) -> tuple[Model, Explainer]:
    """The model that the answer names, and its explainer. Raises DataError where weights or table are others."""
    named = whole.get("model")
    keys = ("name", "version", "weights_sha256", "table_sha256")
    if not isinstance(named, dict) or not all(isinstance(named.get(key), str) for key in keys):
        raise AnswerError(f"The answer does not name its model: it needs {', '.join(keys)}.")
    if not all(_is_folder_name(named[key]) for key in keys[:2]):
        raise AnswerError(f"The answer's model is {named['name']!r}, version {named['version']!r}: no folder's names.")
    model = load_model(models_dir / named["name"] / named["version"])
    _check_digest(f"Model '{model.name}'", "weights_sha256", model.weights_sha256, named)
    table = load_table(tables_dir / named["name"] / named["version"], model)
    _check_digest(f"Table '{table.name}'", "table_sha256", table.table_sha256, named)
    return model, Explainer(model, table, device)


def _is_folder_name(text: str) -> bool:
    return Path(text).name == text and text not in (".", "..")


def _check_digest(what: str, name: str, found: str, named: Mapping[str, str]) -> None:
    if found != named[name]:
        raise DataError(f"{what}, version {named['version']}, has {name} {found}, the answer has {named[name]}.")


def _software(explainer: Explainer) -> dict[str, str]:
    """As the service says it in its answers."""
    return {"parchgrad": __version__, "runtime": f"torch {torch.__version__}", "device": str(explainer.device)}


def _without_image(result: Result) -> list[Comparison]:
    name = "an image" if result.image_sha256 is None else f"sha256 {result.image_sha256}"
    if result.error is not None:
        return [Comparison(name, None, NO_MAP, f"the image failed with {result.error.code}")]
    targets = [explanation.target for explanation in result.explanations] or [None]
    return [Comparison(name, target, NO_IMAGE, "it is not among the images given") for target in targets]


def _compared(
    explainer: Explainer, name: str, pixels: torch.Tensor, result: Result, tolerance: float
) -> list[Comparison]:
    """One comparison for each explanation of the image `pixels` `(1, 3, h, w)`."""
    probabilities = explainer.predict(pixels.to(explainer.device)).float().softmax(dim=1)[0].cpu().numpy()
    if not result.explanations:
        difference = _largest_difference(probabilities, result.predictions)
        return [
            _judged(Comparison(name, None, NO_MAP, "it is an answer of /predict", probability_difference=difference))
        ]
    comparisons = []
    for explanation in result.explanations:
        target = explanation.target
        difference = _largest_difference(probabilities, (*result.predictions, *([] if target is None else [target])))
        bare = Comparison(name, target, NO_MAP, _why_none(explanation), probability_difference=difference)
        comparisons.append(_judged(bare if bare.reason else _with_map(explainer, pixels, explanation, bare, tolerance)))
    return comparisons


def _why_none(explanation: Explanation) -> str:
    """Why there is no map to compare with; empty where there is one."""
    if explanation.error is not None:
        return f"the map failed with {explanation.error.code}"
    if explanation.status != "ok":
        return f"{explanation.status}: {explanation.reason}"
    if isinstance(explanation.saliency, bytes):
        return "the answer holds a picture, not the map's values (saliency=png)"
    return "" if explanation.saliency is not None else "the answer was asked for without its map (saliency=none)"


def _largest_difference(probabilities: NDArray[np.float32], classes: Iterable[Prediction]) -> float:
    """NaN where the answer holds one."""
    differences = [0.0]
    for one in classes:
        if not 0 <= one.index < len(probabilities):
            raise AnswerError(f"The answer names class {one.index}; the model has 0..{len(probabilities) - 1}.")
        differences.append(abs(float(probabilities[one.index]) - one.probability))
    return float(np.max(differences))


def _with_map(
    explainer: Explainer, pixels: torch.Tensor, explanation: Explanation, bare: Comparison, tolerance: float
) -> Comparison:
    found = explanation.saliency
    assert isinstance(found, np.ndarray)
    assert explanation.encoding is not None
    made = _made_again(explainer, pixels, explanation)
    if found.shape != made.shape:
        raise AnswerError(f"The answer's map has shape {found.shape}, the model's maps have {made.shape}.")
    sent = encoded_as(made, explanation.encoding)
    quantisation = _distance(sent, made)
    return replace(
        bare,
        status=EQUAL,
        distance=_distance(found, made),
        quantisation=quantisation,
        tolerance=quantisation + tolerance,
        rank_correlation=_rank_correlation(found, sent),
    )


def _judged(one: Comparison) -> Comparison:
    """The comparison with its verdict. NaN is within no tolerance."""
    reasons = [one.reason] if one.reason else []
    differs = False
    if one.distance is not None and one.tolerance is not None and not one.distance <= one.tolerance:
        differs = True
        reasons.append(f"the map is off by {one.distance:.3g} (relative L2), allowed {one.tolerance:.3g}")
    if one.probability_difference is not None and not one.probability_difference <= PROBABILITY_TOLERANCE:
        differs = True
        reasons.append(f"a probability is off by {one.probability_difference:.3g}, allowed {PROBABILITY_TOLERANCE:g}")
    return replace(one, status=DIFFERENT if differs else one.status, reason="; ".join(reasons))


def _made_again(explainer: Explainer, pixels: torch.Tensor, explanation: Explanation) -> NDArray[np.float32]:
    """The map `(h, w)` for the same target under the same options. Raises AnswerError where they make no sense."""
    options, reduction = _options(explanation.options)
    if explanation.target is None:
        raise AnswerError("An explanation of the answer has a map and no target.")
    columns: dict[str, Any] = {field.name: [getattr(options, field.name)] for field in fields(options)}
    try:
        made = explainer.explain(pixels, explanation.target.index, **columns)
    except (OptionError, UncoveredTargetError) as error:
        raise AnswerError(f"The answer's options are none of this model's: {error}") from error
    saliency: NDArray[np.float32] = made.saliency(reduction)[0].float().cpu().numpy()
    return saliency


def _options(given: Mapping[str, Any]) -> tuple[Options, str]:
    """An explanation's options, and the reduction of its polarity; all of them must be there, and no other."""
    names = {field.name for field in fields(Options)}
    needed = (
        names - {"quantile", "alpha"} - {name for name, method in _OF_METHOD.items() if given.get("method") != method}
    )
    missing = sorted((needed | {"polarity"}) - given.keys())
    if missing or ("quantile" in given) == ("alpha" in given):
        what = ", ".join(missing) or "one of quantile and alpha"
        raise AnswerError(f"An explanation of the answer lacks what its map was made with: {what}.")
    unknown = sorted(given.keys() - names - {"polarity"})
    if unknown:
        raise AnswerError(f"An explanation of the answer has options that this version does not know: {unknown}.")
    if given["polarity"] not in REDUCTION_OF_POLARITY:
        raise AnswerError(
            f"The answer's polarity is {given['polarity']!r}; known are {', '.join(REDUCTION_OF_POLARITY)}."
        )
    chosen = {name: value for name, value in given.items() if name != "polarity"}
    try:
        options = Options(**{**chosen, "layers": tuple(chosen["layers"])})
    except (OptionError, TypeError) as error:
        raise AnswerError(f"The answer's options make no sense: {error}") from error
    return options, REDUCTION_OF_POLARITY[given["polarity"]]


def _distance(found: NDArray[np.float32], made: NDArray[np.float32]) -> float:
    """Relative L2, in units of `made`; 0 where both are zero, infinite where only `made` is."""
    off, size = np.linalg.norm(found.astype(np.float64) - made), np.linalg.norm(made.astype(np.float64))
    if size == 0:
        return 0.0 if off == 0 else float("inf")
    return float(off / size)


def _rank_correlation(found: NDArray[np.float32], made: NDArray[np.float32]) -> float | None:
    """Spearman's; None where a map is of one value, which has no ranks."""
    if found.min() == found.max() or made.min() == made.max():
        return None
    return float(np.corrcoef(rankdata(found), rankdata(made))[0, 1])
