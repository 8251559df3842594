"""A saved answer of the service made again: each map with its own options, and compared.

What must be the same is compared before anything is computed: weights, table and image by their digests. Then all that
an answer says but its request id is held to what comes out here.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from parchgrad import __version__
from parchgrad.answers import AnswerError, Explanation, Prediction, Quality, Result, encoded_as, read_answer
from parchgrad.errors import (
    DataError,
    ModelError,
    OptionError,
    ParchGradError,
    TableError,
    UncoveredTargetError,
)
from parchgrad.evaluation.maps import gini
from parchgrad.explainer import Explainer
from parchgrad.golden import MAP_TOLERANCE
from parchgrad.models import Model, load_model
from parchgrad.options import Options
from parchgrad.preprocessing import Placement, decode_image, exif_orientation
from parchgrad.render import REDUCTION_OF_POLARITY
from parchgrad.tables import load_table
from parchgrad.versions import is_version

# Relative L2 that the order of float32 sums may make: on the same versions and kind of device, where threads and batch
# differ (measured up to 0.003), and on others, where a ReLU on the edge flips a path. Where it is another option, such
# as a quantile of 0.11 in place of 0.1, the map is off by 0.4 and more.
SAME_SOFTWARE_TOLERANCE = 0.01
OTHER_SOFTWARE_TOLERANCE = MAP_TOLERANCE
PROBABILITY_TOLERANCE = 0.01
BOX_TOLERANCE = 1e-6  # pixels of the original

EQUAL, DIFFERENT, NO_MAP, NO_IMAGE = "equal", "different", "no map", "no image"

# Options that an answer carries only of the method that has them.
_OF_METHOD = {
    "steps": "integrated_gradients",
    "samples": "smoothgrad",
    "noise": "smoothgrad",
    "noise_seed": "smoothgrad",
}
# Options without effect on a plain method, which its answer may leave out.
_OF_RULE = {"quantile", "alpha", "gamma", "selection", "conserve", "layers", "normality_filter"}


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
    mismatches: what else the answer says otherwise: transform and quality, a clause each; with one it is `different`.
    versions: a sentence where the answer's software or device is not what is here.
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
    mismatches: tuple[str, ...] = ()
    versions: str = ""


@dataclass(frozen=True)
class _Image:
    """An image as the model sees it: `pixels` `(1, 3, h, w)`."""

    name: str
    pixels: torch.Tensor
    placement: Placement
    orientation: int


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
    SAME_SOFTWARE_TOLERANCE where versions and device are the answer's, else OTHER_SOFTWARE_TOLERANCE; as much may the
    Gini index be off. Raises DataError where the file is no such answer, an image is not of it, weights or table are
    not those it names, or a class has another label; ModelError, TableError where the model or its table is not there.
    """
    whole = _read(Path(answer))
    results = read_answer(whole)
    files = _by_digest(images, results)
    model, explainer = _loaded(whole, Path(models_dir), Path(tables_dir), device)
    others = _other_software(whole.get("software"), explainer)
    if tolerance is None:
        tolerance = OTHER_SOFTWARE_TOLERANCE if others else SAME_SOFTWARE_TOLERANCE
    versions = f"Versions differ ({others}): {tolerance:g} is allowed." if others else ""
    comparisons = []
    for result in results:
        if result.error is not None or result.image_sha256 not in files:
            comparisons += _without_image(result)
        else:
            image = _prepared(model, *files[result.image_sha256])
            comparisons += _compared(explainer, model.labels, image, result, tolerance)
    return [replace(one, versions=versions) for one in comparisons]


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
    inside = Path(named["name"]) / named["version"]
    _check_version(models_dir / inside, f"Model '{named['name']}'", ModelError)
    model = load_model(models_dir / inside)
    _check_digest(f"Model '{model.name}'", "weights_sha256", model.weights_sha256, named)
    _check_version(tables_dir / inside, f"Table '{named['name']}'", TableError)
    table = load_table(tables_dir / inside, model)
    _check_digest(f"Table '{table.name}'", "table_sha256", table.table_sha256, named)
    return model, Explainer(model, table, device)


def _is_folder_name(text: str) -> bool:
    return Path(text).name == text and text not in (".", "..")


def _check_version(folder: Path, what: str, error: type[ParchGradError]) -> None:
    """Raises `error`, naming the versions that are there."""
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        there = sorted((p.name for p in beside if is_version(p.name)), key=int)
        raise error(
            f"{what} has no version {folder.name} in '{folder.parent}'; there are: {', '.join(there) or 'none'}."
        )


def _check_digest(what: str, name: str, found: str, named: Mapping[str, str]) -> None:
    if found != named[name]:
        raise DataError(f"{what}, version {named['version']}, has {name} {found}, the answer has {named[name]}.")


def _other_software(found: object, explainer: Explainer) -> str:
    """How the answer's software differs from what is here, in words; empty where it is the same."""
    said = found if isinstance(found, dict) else {}
    here = {"parchgrad": __version__, "runtime": f"torch {torch.__version__}", "device": str(explainer.device)}
    words = {"parchgrad": "parchgrad ", "runtime": "", "device": "device "}
    return "; ".join(
        f"{words[name]}{said.get(name, f'{name} not said' if not words[name] else 'not said')}, here {value}"
        for name, value in here.items()
        if said.get(name) != value
    )


def _prepared(model: Model, name: str, data: bytes) -> _Image:
    pixels, placement = model.preprocessing.apply(decode_image(data, name))
    with PIL.Image.open(io.BytesIO(data)) as file:
        if file.format != "TIFF":  # loading turns a TIFF and forgets its orientation; a PNG's may follow the pixels
            file.load()
        return _Image(name, pixels[None], placement, exif_orientation(file))


def _without_image(result: Result) -> list[Comparison]:
    name = "an image" if result.image_sha256 is None else f"sha256 {result.image_sha256}"
    if result.error is not None:
        return [Comparison(name, None, NO_MAP, f"the image failed with {result.error.code}")]
    targets = [explanation.target for explanation in result.explanations] or [None]
    return [Comparison(name, target, NO_IMAGE, "it is not among the images given") for target in targets]


def _compared(
    explainer: Explainer, labels: Sequence[str], image: _Image, result: Result, tolerance: float
) -> list[Comparison]:
    """One comparison for each explanation of the image."""
    targets = [one.target for one in result.explanations if one.target is not None]
    _check_labels(labels, (*result.predictions, *targets))
    probabilities = explainer.predict(image.pixels.to(explainer.device)).float().softmax(dim=1)[0].cpu().numpy()
    if not result.explanations:
        difference = _largest_difference(probabilities, result.predictions)
        reason = "it is an answer of /predict"
        return [_judged(Comparison(image.name, None, NO_MAP, reason, probability_difference=difference))]
    comparisons = []
    for explanation in result.explanations:
        target = explanation.target
        difference = _largest_difference(probabilities, (*result.predictions, *([] if target is None else [target])))
        one = Comparison(
            image.name,
            target,
            NO_MAP,
            _why_none(explanation),
            probability_difference=difference,
            mismatches=_other_transform(explanation, image),
        )
        comparisons.append(
            _judged(one if one.reason else _with_map(explainer, image.pixels, explanation, one, tolerance))
        )
    return comparisons


def _check_labels(labels: Sequence[str], classes: Iterable[Prediction]) -> None:
    """Raises AnswerError for a class that the model does not have, or calls otherwise."""
    for one in classes:
        if not 0 <= one.index < len(labels):
            raise AnswerError(f"The answer names class {one.index}; the model has 0..{len(labels) - 1}.")
        if one.label != labels[one.index]:
            raise AnswerError(
                f"The answer calls class {one.index} {one.label!r:.100}, the model {labels[one.index]!r}."
            )


def _other_transform(explanation: Explanation, image: _Image) -> tuple[str, ...]:
    """What the answer says otherwise of where the map lies. Raises AnswerError where a map comes without it."""
    said, placement = explanation.transform, image.placement
    if said is None:
        if explanation.status == "ok":
            raise AnswerError("An explanation of the answer has a map and no transform.")
        return ()
    found = []
    if said.original_size != placement.original_size:
        found.append(f"original_size is {list(said.original_size)}, here {list(placement.original_size)}")
    if said.exif_orientation != image.orientation:
        found.append(f"exif_orientation is {said.exif_orientation}, here {image.orientation}")
    if not np.allclose(said.crop_box, placement.crop_box, rtol=0, atol=BOX_TOLERANCE):
        found.append(f"crop_box is {list(said.crop_box)}, here {list(placement.crop_box)}")
    return tuple(found)


def _why_none(explanation: Explanation) -> str:
    """Why there is no map to compare with; empty where there is one."""
    if explanation.error is not None:
        return f"the map failed with {explanation.error.code}"
    if explanation.status != "ok":
        reason = str(explanation.reason).removeprefix("Not explained: ").rstrip(".")
        return f"{explanation.status}: {reason}"
    if isinstance(explanation.saliency, bytes):
        return "the answer holds a picture, not the map's values (saliency=png)"
    return "" if explanation.saliency is not None else "the answer was asked for without its map (saliency=none)"


def _largest_difference(probabilities: NDArray[np.float32], classes: Iterable[Prediction]) -> float:
    """NaN where the answer holds one."""
    return float(np.max([0.0, *(abs(float(probabilities[one.index]) - one.probability) for one in classes)]))


def _with_map(
    explainer: Explainer, pixels: torch.Tensor, explanation: Explanation, bare: Comparison, tolerance: float
) -> Comparison:
    found = explanation.saliency
    assert isinstance(found, np.ndarray)
    assert explanation.encoding is not None
    made, identity_layers = _made_again(explainer, pixels, explanation)
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
        mismatches=(*bare.mismatches, *_other_quality(explanation.quality, gini(made), identity_layers, tolerance)),
    )


def _other_quality(said: Quality | None, index: float, identity_layers: int, tolerance: float) -> list[str]:
    """What the answer says otherwise of the map; the Gini index may be off by `tolerance`. Raises AnswerError."""
    if said is None:
        raise AnswerError("An explanation of the answer has a map and no quality.")
    found = []
    claimed = math.nan if said.gini is None else said.gini  # of a map of zeros there is none
    if not (abs(claimed - index) <= tolerance or (said.gini is None and math.isnan(index))):
        found.append(f"gini is {claimed:.4g}, here {index:.4g}")
    if said.identity_layers != identity_layers:
        found.append(f"identity_layers is {said.identity_layers}, here {identity_layers}")
    return found


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
    reasons += one.mismatches
    status = DIFFERENT if differs or one.mismatches else one.status
    return replace(one, status=status, reason="; ".join(reasons))


def _made_again(
    explainer: Explainer, pixels: torch.Tensor, explanation: Explanation
) -> tuple[NDArray[np.float32], int]:
    """The map `(h, w)` for the same target under the same options, and its identity layers.

    Raises AnswerError where they make no sense.
    """
    options, reduction = _options(explanation.options)
    if explanation.target is None:
        raise AnswerError("An explanation of the answer has a map and no target.")
    columns: dict[str, Any] = {field.name: [getattr(options, field.name)] for field in fields(options)}
    try:
        made = explainer.explain(pixels, explanation.target.index, **columns)
    except (OptionError, UncoveredTargetError) as error:
        raise AnswerError(f"The answer's options are none of this model's: {error}") from error
    saliency: NDArray[np.float32] = made.saliency(reduction)[0].float().cpu().numpy()
    return saliency, int(made.identity_layers[0])


def _options(given: Mapping[str, Any]) -> tuple[Options, str]:
    """An explanation's options, and the reduction of its polarity; all that had an effect must be there, no unknown."""
    names = {field.name for field in fields(Options)}
    plain = given.get("rule") is False
    optional = {name for name, method in _OF_METHOD.items() if given.get("method") != method}
    optional |= _OF_RULE if plain else {"quantile", "alpha"}
    missing = sorted((names - optional | {"polarity"}) - given.keys())
    selecting = given.keys() & {"quantile", "alpha"}
    if missing or len(selecting) > 1 or not (selecting or plain):
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
        if "layers" in chosen:
            chosen["layers"] = tuple(chosen["layers"])
        options = Options(**chosen)
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
