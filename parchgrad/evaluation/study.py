"""An evaluation: every method over every picture by every measure, piece by piece, each piece recorded when done.

Cheap measures are over all pictures. What takes hundreds of passes a map - curves, checks - is over the first
photographs whose class the network finds: where it does not, there is no evidence to be taken away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parchgrad.evaluation import maps as figures
from parchgrad.evaluation import perturbation, sanity
from parchgrad.evaluation.cases import Case, choose
from parchgrad.evaluation.cost import Cost, costs
from parchgrad.evaluation.images import Picture, Progress
from parchgrad.evaluation.journal import Found, Journal
from parchgrad.evaluation.methods import Method, Unavailable
from parchgrad.evaluation.perturbation import Curve
from parchgrad.evaluation.results import MeanCurve, Results, Row, Shown
from parchgrad.evaluation.workers import Do, workers
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing
from parchgrad.tables import network_of

Floats = NDArray[np.float64]

# What a journal's findings mean: another number, and an unfinished evaluation begins anew.
FORMAT = 1
# Points of a mean curve: enough to draw it.
CURVE_POINTS = 51
# What does not decide the results.
VOLATILE = ("command", "finished")
MOSAIC, PHOTOGRAPH = "mosaic", "photograph"


@dataclass(frozen=True)
class Effort:
    """How much of the expensive is done.

    curves: photographs that pixels are taken from.  checks: photographs of the checks.  step: pixels at a time of
    insertion and deletion; None: `rows` rows of the picture, of 224 x 224 one being RISE's step.  road: the fractions
    that are imputed.  depths: steps of the cascade from the last layer to the first, at most.  noises: of
    max-sensitivity.  rounds: of measuring costs.  resamples: of the bootstrap.  seed: of noise, random weights and
    tables.
    """

    curves: int = 12
    checks: int = 10
    step: int | None = None
    rows: int = 1
    road: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    depths: int = 8
    noises: int = 10
    rounds: int = 7
    resamples: int = 2000
    seed: int = 0

    def pixels(self, height: int, width: int) -> int:
        """Taken at a time from a picture of this size."""
        return self.step or min(self.rows, max(1, height // 8)) * width


QUICK = Effort(curves=1, checks=1, rows=14, road=(0.5,), depths=2, noises=2, rounds=1, resamples=500)


@dataclass(frozen=True)
class Subject:
    """What is evaluated on what: at least one photograph, all of one size. `labels` are the model's, by class."""

    explainer: Explainer
    methods: Sequence[Method]
    mosaics: Sequence[Picture]
    photographs: Sequence[Picture]
    labels: Sequence[str]
    preprocessing: Preprocessing
    batch_size: int = 8  # photographs; a mosaic counts as four
    workers: int = 1  # processes: see `workers`

    def of(self, kind: str) -> Sequence[Picture]:
        return self.mosaics if kind == MOSAIC else self.photographs


@dataclass(frozen=True)
class _Piece:
    """What a worker is told to do: one of WORK, with its arguments."""

    name: str
    kind: str
    arguments: tuple[Any, ...]
    passes: float  # about as many forward passes of a photograph


def key_of(settings: Mapping[str, Any]) -> str:
    """A digest of all that decides the results: what `journal_in` keeps evaluations apart by."""
    deciding = {name: value for name, value in settings.items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps([FORMAT, deciding], sort_keys=True).encode()).hexdigest()


def study(
    subject: Subject,
    effort: Effort,
    settings: Mapping[str, Any],
    *,
    unavailable: Sequence[Unavailable] = (),
    notes: Sequence[str] = (),
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Results:
    """Measure everything. `settings`, JSON types, are kept with the results: all that is needed to repeat them.

    Pieces of work that `journal` holds are not done again. `progress(done, total)` counts forward passes,
    about. Memory does not grow with the number of pictures, but for a few numbers each.
    """
    journal = Journal() if journal is None else journal

    def work(piece: _Piece) -> Found:
        return WORK[piece.kind](subject, effort, *piece.arguments)

    with workers(subject.workers, work) as do:
        run = _Run(do, journal, progress)
        run.do([_Piece("costs", "costs", (), 1)])
        passes = {name: cost[0] for name, cost in journal.found["costs"].items()}
        every = sum(max(1.0, value) for value in passes.values())
        places = [*_place_pieces(subject, MOSAIC, every), *_place_pieces(subject, PHOTOGRAPH, every)]
        most = min(effort.curves, len(subject.photographs)), min(effort.checks, len(subject.photographs))
        curve = _curve_passes(subject, effort, passes)
        run.expect(places, most[0] * curve + most[1] * _check_passes(effort, every))
        run.do(places)
        found = _found_photographs(subject, journal)
        run.do([_Piece(f"perturbation/{i}", "perturbation", (i,), curve) for i in found[: effort.curves]])
        if checked := found[: effort.checks]:
            run.do(
                [
                    _Piece(
                        f"checks/{method.name}", "checks", (number, checked),
                        len(checked) * _check_passes(effort, max(1.0, passes[method.name])),
                    )
                    for number, method in enumerate(subject.methods)
                ]
            )  # fmt: skip
        run.finish()
    results = _results(subject, effort, journal, found)
    said = list(notes)
    if not found and effort.curves + effort.checks:
        said.append("The network finds the class of none of the photographs: no curves and no checks.")
    return replace(results, settings=dict(settings), unavailable=tuple(unavailable), notes=tuple(said))


def cases_of(subject: Subject, results: Results, *, each: int = 2, progress: Progress | None = None) -> list[Case]:
    """The pictures worth looking at, with every method's map: a few, so their maps are made again here.

    Worth it to `Results.ours`.
    """
    chosen = choose(results, each=each)

    def work(number: int) -> Case:
        reason, index = chosen[number]
        return _case(subject, results, reason, index)

    cases: dict[int, Case] = {}
    with workers(subject.workers, work) as do:
        for number, case in do(range(len(chosen))):
            cases[number] = case
            if progress is not None:
                progress(len(cases), len(chosen))
    return [cases[number] for number in range(len(chosen))]


def _case(subject: Subject, results: Results, reason: str, index: int) -> Case:
    shown = results.shown[index]
    picture = subject.of(shown.kind)[index if shown.kind == MOSAIC else index - len(subject.mosaics)]
    maps, values = {}, {}
    for method in subject.methods:
        saliency = _maps(method, [picture])[0]
        if np.isfinite(saliency).all():
            maps[method.name] = saliency.astype(np.float32)  # to be looked at: many at a time
            values[method.name] = {
                key: float(by_method[method.name][results.pictures[key].index(index)])
                for key, by_method in results.values.items()
                if method.name in by_method and index in results.pictures[key]
            }
    return Case(reason, shown, subject.preprocessing.restore(picture.image), picture.mask, maps, values)


class _Run:
    """Does pieces of work that are not done yet, and counts them."""

    def __init__(self, do: Do[_Piece], journal: Journal, progress: Progress | None) -> None:
        self._do, self._journal, self._progress = do, journal, progress
        self._done, self._total = 0.0, 1.0

    def expect(self, pieces: Sequence[_Piece], later: float) -> None:
        self._total = 1 + sum(piece.passes for piece in pieces) + later
        self._say()

    def do(self, pieces: Sequence[_Piece]) -> None:
        left = [piece for piece in pieces if piece.name not in self._journal.found]
        self._done += sum(piece.passes for piece in pieces) - sum(piece.passes for piece in left)
        for piece, found in self._do(left):
            self._journal.record(piece.name, found)
            self._done += piece.passes
            self._say()

    def finish(self) -> None:
        self._total = self._done
        self._say()

    def _say(self) -> None:
        if self._progress is not None:
            self._progress(round(self._done), max(round(self._total), round(self._done)))


def _costs(subject: Subject, effort: Effort) -> Found:
    picture = subject.photographs[0]
    measured = costs(subject.methods, subject.explainer, picture.image, picture.target, rounds=effort.rounds)
    return {name: [cost.passes, cost.low, cost.high] for name, cost in measured.items()}


def _place_pieces(subject: Subject, kind: str, passes: float) -> list[_Piece]:
    """All methods' maps of a batch, measured where the target is."""
    pictures = subject.of(kind)
    size = max(1, subject.batch_size // 4) if kind == MOSAIC else subject.batch_size
    weight = 4 if kind == MOSAIC else 1
    return [
        _Piece(
            f"{kind}/{start}",
            "places",
            (kind, start, min(start + size, len(pictures))),
            passes * weight * (min(start + size, len(pictures)) - start),
        )
        for start in range(0, len(pictures), size)
    ]


def _places(subject: Subject, effort: Effort, kind: str, start: int, stop: int) -> Found:
    pictures = subject.of(kind)[start:stop]
    values: dict[str, dict[str, list[float]]] = {}
    for method in subject.methods:
        for saliency, picture in zip(_maps(method, pictures), pictures, strict=True):
            for name, value in _figures(kind, saliency, picture).items():
                values.setdefault(name, {}).setdefault(method.name, []).append(value)
    return {"shown": _shown(subject, pictures), "values": values}


def _shown(subject: Subject, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    logits = torch.cat([subject.explainer.predict(images) for images, _ in _batches(pictures)])
    targets = torch.tensor([picture.target for picture in pictures])
    probabilities = perturbation.probability(logits.cpu(), targets)
    return [
        {"name": picture.name, "group": picture.group, "target": picture.target, "probability": p, "predicted": found}
        for picture, p, found in zip(
            pictures, probabilities.tolist(), (logits.cpu().argmax(dim=1) == targets).tolist(), strict=True
        )
    ]


def _figures(kind: str, saliency: Floats, picture: Picture) -> dict[str, float]:
    """Of a map. One without mass has none of it anywhere and points nowhere; one that is not there is not measured."""
    if kind == MOSAIC:
        return {
            "mosaic_mass": _placed(figures.mass_share, saliency, picture.mask),
            "mosaic_hits": _placed(figures.pointing_hit, saliency, picture.mask),
        }
    return {
        "object_mass": _placed(figures.mass_share, saliency, picture.mask),
        "object_density": _placed(figures.area_weighted_mass, saliency, picture.mask),
        "object_hits": _placed(figures.pointing_game, saliency, picture.mask),
        "gini": _if_there(figures.gini, saliency),
        "hoyer": _if_there(figures.hoyer, saliency),
        "entropy": _if_there(partial(figures.entropy, normalised=True), saliency),
    }


def _placed(measure: Callable[[Floats, NDArray[np.bool_]], float], saliency: Floats, mask: Any) -> float:
    if mask is None or not np.isfinite(saliency).all():
        return float("nan")
    return measure(saliency, mask) if saliency.max() > 0 else 0.0


def _if_there(measure: Callable[[Floats], float], saliency: Floats) -> float:
    return measure(saliency) if np.isfinite(saliency).all() else float("nan")


def _found_photographs(subject: Subject, journal: Journal) -> list[int]:
    """Those whose class is the prediction, in order."""
    return [index for index, one in enumerate(_all_shown(subject, journal, PHOTOGRAPH)) if one["predicted"]]


def _all_shown(subject: Subject, journal: Journal, kind: str) -> list[dict[str, Any]]:
    return [one for piece in _place_pieces(subject, kind, 0) for one in journal.found[piece.name]["shown"]]


def _curve_passes(subject: Subject, effort: Effort, passes: Mapping[str, float]) -> float:
    height, width = subject.photographs[0].image.shape[1:]
    a_map = 2 * (height * width / effort.pixels(height, width) + 1) + 2 * len(perturbation.TENTHS)
    # Imputing an image takes about as long as five passes.
    a_map += 2 * len(effort.road) * 5
    return sum(passes.values()) + len(passes) * a_map


def _perturbation(subject: Subject, effort: Effort, index: int) -> Found:
    picture = subject.photographs[index]
    images, targets = picture.image[None].to(subject.explainer.device), [picture.target]
    predict = subject.explainer.predict
    step = effort.pixels(*picture.image.shape[1:])
    measured: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[str, list[float]]] = {"insertion": {}, "deletion": {}}
    for method in subject.methods:
        saliency = np.stack(_maps(method, [picture]))
        common: dict[str, Any] = {"batch_size": subject.batch_size}
        inserted = perturbation.insertion(predict, images, saliency, targets, step=step, **common)
        deleted = perturbation.deletion(predict, images, saliency, targets, step=step, **common)
        odds = [
            perturbation.removal(
                predict, images, saliency, targets, least_first=least, score=perturbation.log_odds, **common
            )
            for least in (False, True)
        ]
        most, least = map(_probabilities, odds)
        roads = [
            perturbation.road(
                predict, images, saliency, targets, least_first=least, fractions=effort.road, seed=effort.seed, **common
            )
            for least in (False, True)
        ]
        found = {
            "insertion": inserted.area(),
            "deletion": deleted.area(),
            "morf_aopc": perturbation.aopc(most),
            "lerf_aopc": perturbation.aopc(least),
            "log_odds_gap": perturbation.gap(*odds),
            "road": perturbation.gap(*roads),
        }
        for name, value in found.items():
            measured.setdefault(name, {})[method.name] = float(value[0])
        for name, curve in (("insertion", inserted), ("deletion", deleted)):
            curves[name][method.name] = _drawn(curve)
    return {"values": measured, "curves": curves}


def _probabilities(curve: Curve) -> Curve:
    """Of log-odds."""
    with np.errstate(over="ignore"):
        return Curve(curve.fractions, 1 / (1 + np.exp(-curve.scores)))


def _drawn(curve: Curve) -> list[float]:
    """The one image's curve at CURVE_POINTS fractions."""
    drawn: Floats = np.interp(np.linspace(0, 1, CURVE_POINTS), curve.fractions, curve.scores[0])
    return list(map(float, drawn))


def _check_passes(effort: Effort, passes: float) -> float:
    """Of one photograph: the maps of max-sensitivity, two tests of random weights and, at most, two of tables."""
    return passes * (effort.noises + 1 + 2 + effort.depths + 1 + 3)


def _checks(subject: Subject, effort: Effort, number: int, which: Sequence[int]) -> Found:
    method = subject.methods[number]
    pictures = [subject.photographs[index] for index in which]
    images, targets = torch.stack([p.image for p in pictures]), [p.target for p in pictures]
    module, explainer = network_of(subject.explainer.model), subject.explainer
    # A method that looks at no network has the same maps whatever its weights.
    of = method.of or (lambda _: method.maps)
    size = subject.batch_size
    values: dict[str, list[float]] = {}
    drawn: dict[str, Any] = {"seed": effort.seed, "batch_size": size}
    values["max_sensitivity"] = sanity.max_sensitivity(
        method.maps, images, targets, samples=effort.noises, **drawn
    ).largest.tolist()
    if method.attributions is not None:
        values["completeness_gap"] = sanity.completeness_gap(
            method.attributions(images, targets), explainer.predict, images, targets, batch_size=size
        ).relative.tolist()
    rise = sanity.entropy_rise(of, module, images, targets, **drawn)
    # Under random weights a whole map may vanish, as where a ReLU cuts off the target: then nothing was tested.
    values["entropy_rise"] = np.where(rise.randomised > 0, rise.rise, np.nan).tolist()
    fall = sanity.cascade(of, module, images, targets, depths=effort.depths, **drawn)
    values["cascade"] = fall.similarity[-1].tolist()
    # Instance-wise selection does not ask the table's rows: there is nothing to shuffle.
    if method.explain is not None and method.explain.get("selection") != "instance":
        left = sanity.table_randomisation(
            explainer, images, targets, draw=effort.seed, batch_size=size, **(method.explain | {"uncovered": "nan"})
        )
        values["classes_similarity"], values["channels_similarity"] = left.classes.tolist(), left.channels.tolist()
    there = np.isfinite(fall.similarity)
    sums = np.where(there, fall.similarity, 0.0).sum(axis=1)
    means = np.divide(sums, there.sum(axis=1), out=np.full(len(sums), np.nan), where=there.any(axis=1))
    return {"values": values, "layers": list(fall.layers), "cascade": means.tolist()}


# By kind of piece.
WORK: dict[str, Callable[..., Found]] = {
    "costs": _costs,
    "places": _places,
    "perturbation": _perturbation,
    "checks": _checks,
}


def _maps(method: Method, pictures: Sequence[Picture]) -> list[Floats]:
    """A map `(h, w)` of each picture."""
    found: list[Floats] = []
    for images, targets in _batches(pictures):
        found += list(method.maps(images, targets).detach().cpu().double().numpy())
    return found


def _batches(pictures: Sequence[Picture]) -> Iterator[tuple[Tensor, list[int]]]:
    """Of pictures of one size."""
    for _, group in groupby(pictures, key=lambda picture: picture.image.shape):
        some = list(group)
        yield torch.stack([picture.image for picture in some]), [picture.target for picture in some]


def _results(subject: Subject, effort: Effort, journal: Journal, found: Sequence[int]) -> Results:
    offset = len(subject.mosaics)
    shown = [
        Shown(kind=kind, label=subject.labels[one["target"]], **one)
        for kind in (MOSAIC, PHOTOGRAPH)
        for one in _all_shown(subject, journal, kind)
    ]
    pictures: dict[str, tuple[int, ...]] = {}
    values: dict[str, dict[str, Floats]] = {}
    for kind, indices in ((MOSAIC, range(offset)), (PHOTOGRAPH, range(offset, len(shown)))):
        parts = [journal.found[piece.name]["values"] for piece in _place_pieces(subject, kind, 0)]
        for key in parts[0] if parts else ():
            together = {m.name: np.array([v for part in parts for v in part[key][m.name]]) for m in subject.methods}
            if any(np.isfinite(one).any() for one in together.values()):
                pictures[key], values[key] = tuple(indices), together
    curved = found[: effort.curves]
    parts = [journal.found[f"perturbation/{index}"] for index in curved]
    for key in parts[0]["values"] if parts else ():
        pictures[key] = tuple(offset + index for index in curved)
        values[key] = {m.name: np.array([part["values"][key][m.name] for part in parts]) for m in subject.methods}
    curves = {key: _mean_curves(subject, [part["curves"][key] for part in parts]) for key in ("insertion", "deletion")}
    checked = found[: effort.checks]
    layers: tuple[str, ...] = ()
    cascade = {}
    for method in subject.methods if checked else ():
        part = journal.found[f"checks/{method.name}"]
        layers, cascade[method.name] = tuple(part["layers"]), np.array(part["cascade"])
        for key, numbers in part["values"].items():
            pictures[key] = tuple(offset + index for index in checked)
            values.setdefault(key, {})[method.name] = np.array(numbers)
    measured_costs = {name: Cost(*cost) for name, cost in journal.found["costs"].items()}
    return Results(
        settings={},
        rows=tuple(Row.of(method, measured_costs.get(method.name)) for method in subject.methods),
        unavailable=(),
        shown=tuple(shown),
        pictures=pictures,
        values=values,
        curves=curves if parts else {},
        layers=layers,
        cascade=cascade,
        resamples=effort.resamples,
    )


def _mean_curves(subject: Subject, parts: Sequence[Mapping[str, list[float]]]) -> dict[str, MeanCurve]:
    found = {}
    for method in subject.methods:
        scores = np.array([part[method.name] for part in parts]).reshape(-1, CURVE_POINTS)
        scores = scores[np.isfinite(scores).all(axis=1)]
        if len(scores):
            found[method.name] = MeanCurve(np.linspace(0, 1, CURVE_POINTS), scores.mean(axis=0), len(scores))
    return found
