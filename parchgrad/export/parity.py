"""Whether an exported graph does what the PyTorch engine does: the same images, targets and options through both.

The reference is the dense engine in float64. A float32 map may differ from it without anything being wrong: where a
ReLU's input or the two largest values of a max-pool lie closer together than float32 resolves, the gradient takes
another path. Such a map is told from a wrong one by how far the PyTorch engines' own float32 maps are off, and the
float64 map of images that differ by what float32 rounds away; or by its being one of those maps itself, as where a
layer's variance is more than float64's rounding and less than float32's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parchgrad.errors import ExportError
from parchgrad.explainer import Explainer, Explanation
from parchgrad.export.engines import Engine, said
from parchgrad.models import Model
from parchgrad.options import Options
from parchgrad.patterns import match
from parchgrad.quantiles import quantile_of_layers
from parchgrad.tables import SelectionTable

Array = NDArray[Any]
Advance = Callable[[], None]

ITEMS = 8
# Which of the items go through the graph together.
BATCHES = ((0,), (5, 6, 7), tuple(range(ITEMS)))

LOGITS_TOLERANCE = 1e-4  # of their range
PROBABILITY_TOLERANCE = 1e-5
MAP_TOLERANCE = 1e-3  # relative L2; above it a map must be as far off as float32 itself takes it
RANK_TOLERANCE = 0.01  # 1 - Spearman's correlation; the same
# A float32 map may be this many times as far off as the worst of those known to be right, which are few draws.
SLACK = 3.0
# And no further than this: where maps known to be right differ by more, whether this one is cannot be told.
LARGEST = 0.2
# Share of a map's largest value that is no more than rounding.
NOTHING = 1e-6
# What is rounded away, relative to a pixel: float32's 6e-8 as it adds up over a network's layers.
ROUNDING = 1e-6
ROUNDED_DRAWS = 4


@dataclass(frozen=True)
class Picture:
    """An image of the check, `(3, h, w)` float32, normalised, and what it is."""

    name: str
    pixels: Tensor


@dataclass(frozen=True)
class Item:
    """One image with its target and options."""

    picture: Picture
    target: int  # -1: the predicted class
    options: dict[str, Any]  # of Explainer.explain


@dataclass(frozen=True)
class Judged:
    """How one item came out of one batch. Errors are relative; `verdict` is same, tie, undecided or off."""

    image: str
    target: int
    options: dict[str, Any]
    batch: int
    verdict: str
    why: str  # where it is off
    logits_error: float
    map_error: float
    rank_correlation: float
    float32_map_errors: dict[str, float]  # of the PyTorch engines
    rounded_map_error: float  # of the float64 map of rounded images; 0 where it was not needed
    flips: int  # ReLUs and max-pools that decide otherwise in float32 than in float64


def check(
    engine: Engine,
    model: Model,
    table: SelectionTable,
    pictures: Sequence[Picture],
    other_size: Sequence[Picture] = (),
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """Run the graph on `pictures`, all of one size, and on each of `other_size` alone; the report, JSON types only.

    `advance` is called after each item's reference. Raises ExportError, with figures, where the graph differs.
    """
    reference = _Reference(model, table)
    items = _items(pictures, table)
    expected = []
    for item in items:
        expected.append(reference.of(item))
        advance()
    judged = []
    for batch in BATCHES:
        judged += _judged(engine, reference, [items[i] for i in batch], [expected[i] for i in batch])
    for picture in other_size:
        item = dataclasses.replace(items[1], picture=picture)
        judged += _judged(engine, reference, [item], [reference.of(item)])
        advance()
    report = _report(engine, judged)
    if wrong := [one for one in judged if one.verdict == "off"]:
        worst = max(wrong, key=lambda one: _finite(one.map_error))
        raise ExportError(
            f"The exported graph of model '{model.name}' is off in {len(wrong)} of {len(judged)} checks on "
            f"{engine.name}; the worst is image '{worst.image}', target {worst.target}, options {worst.options}: "
            f"{worst.why}. Nothing was written."
        )
    if 2 * report["undecided"] > len(judged):
        raise ExportError(
            f"The exported graph of model '{model.name}' cannot be judged: of {len(judged)} maps {report['undecided']} "
            "are such that float32's last digits decide them, in PyTorch as well; give other images (--images). "
            "Nothing was written."
        )
    return report


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _items(pictures: Sequence[Picture], table: SelectionTable) -> list[Item]:
    """Eight items of mixed targets and options, whatever number of pictures there are."""
    names = table.layer_names
    half = len(names) // 2
    upper = list(names[half:])
    schedule = {name: 0.5 if i < half else 0.1 for i, name in enumerate(names)}
    options: list[dict[str, Any]] = [
        {},  # the table's own
        {"quantile": 0.1, "gamma": math.inf, "layers": ["*"]},
        {"rule": False},
        {"quantile": 0.3, "gamma": 2.0, "layers": ["*"]},
        {"quantile": schedule, "gamma": math.inf, "layers": ["*"]},
        {"quantile": 0.2, "gamma": 1.0, "layers": upper},
        {"gamma": 0.5},
        {"quantile": 1.0, "layers": ["*"]},  # all channels: no layer has two sides
    ]
    covered = [table.classes[(i * 7) % len(table.classes)] for i in range(ITEMS)]
    targets = [-1, *covered[1:]]
    if outside := sorted(set(range(len(table.labels))) - set(table.classes)):
        targets[6] = outside[0]
    return [Item(pictures[i % len(pictures)], targets[i], options[i]) for i in range(ITEMS)]


@dataclass(frozen=True)
class _Expected:
    """What the engines in PyTorch make of an item."""

    exact: Explanation
    float32: dict[str, Explanation]  # by backward pass
    flips: int


class _Reference:
    """The engines in PyTorch: float64 and dense, which is right, and those in float32."""

    def __init__(self, model: Model, table: SelectionTable) -> None:
        self.table = table
        self._module = model.module
        self._double = deepcopy(model.module).double()
        self._exact = Explainer(dataclasses.replace(model, module=self._double), table, "cpu", backward="dense")
        fast = Explainer(model, table, "cpu")
        self._float32 = {"dense": Explainer(model, table, "cpu", backward="dense")}
        if fast.backward != "dense":
            self._float32[fast.backward] = fast

    def of(self, item: Item) -> _Expected:
        pixels = item.picture.pixels[None]
        return _Expected(
            self.exact(item, pixels),
            {name: _explained(explainer, item, pixels) for name, explainer in self._float32.items()},
            _flips(self._module, self._double, pixels),
        )

    def exact(self, item: Item, pixels: Tensor) -> Explanation:
        return _explained(self._exact, item, pixels.double())


def _explained(explainer: Explainer, item: Item, images: Tensor) -> Explanation:
    return explainer.explain(images, item.target, uncovered="nan", **item.options)


def _judged(
    engine: Engine, reference: _Reference, items: Sequence[Item], expected: Sequence[_Expected]
) -> list[Judged]:
    inputs = graph_inputs(
        torch.stack([item.picture.pixels for item in items]).numpy(),
        [item.target for item in items],
        [one.exact.options[0] for one in expected],
        reference.table,
    )
    try:
        found = engine.run(inputs)
    except Exception as error:  # an engine's own exceptions have no common base
        raise ExportError(
            f"{engine.name} cannot run the exported graph on a batch of {len(items)} images of "
            f"{tuple(inputs['images'].shape[2:])}: {said(error)}"
        ) from error
    rows = [{name: value[i] for name, value in found.items()} for i in range(len(items))]
    return [_judge(reference, item, one, row, len(items)) for item, one, row in zip(items, expected, rows, strict=True)]


def graph_inputs(
    images: NDArray[np.float32], targets: Sequence[int], options: Sequence[Options], table: SelectionTable
) -> dict[str, Array]:
    """The graph's inputs for images `(B, 3, h, w)` and an image's target and options each.

    The quantile has one column where every image has one number for all layers, else one a layer.
    """
    names = table.layer_names
    rows = []
    for one in options:
        chosen = quantile_of_layers(one.quantile, match(names, one.layers)) if one.rule else {}
        rows.append([chosen.get(name, 0.0) for name in names])
    quantile = np.array(rows, dtype=np.float32).reshape(len(rows), len(names))
    if len(names) and (quantile == quantile[:, :1]).all():
        quantile = quantile[:, :1]
    return {
        "images": images,
        "targets": np.array(targets, dtype=np.int64),
        "quantile": quantile,
        "gamma": np.array([one.gamma for one in options], dtype=np.float32),
    }


def _judge(reference: _Reference, item: Item, expected: _Expected, found: dict[str, Array], batch: int) -> Judged:
    exact = expected.exact
    right = exact.attributions[0].numpy()
    logits = exact.logits[0].numpy()
    spread = float(np.ptp(logits)) or float(np.abs(logits).max()) or 1.0
    logits_error = float(np.abs(found["logits"] - logits).max()) / spread
    covered = bool(exact.covered[0])
    float32 = {
        name: _distance(one.attributions[0].numpy(), right) if covered else 0.0
        for name, one in expected.float32.items()
    }
    identities = [one.identity_layers[0].item() for one in expected.float32.values()]
    map_error, correlation, rounded, verdict = 0.0, 1.0, 0.0, "same"
    why = _plainly_wrong(found, exact, identities, logits_error)
    if covered and not why:
        map_error = _distance(found["attributions"], right)
        correlation = _correlation(found["saliency"], exact.saliency()[0].numpy())
        verdict, why, rounded = _verdict(
            reference, item, expected, found, map_error, correlation, max(float32.values())
        )
    return Judged(
        image=item.picture.name,
        target=item.target,
        options=_shown(item.options),
        batch=batch,
        verdict="off" if why else verdict,
        why=why,
        logits_error=logits_error,
        map_error=map_error,
        rank_correlation=correlation,
        float32_map_errors=float32,
        rounded_map_error=rounded,
        flips=expected.flips,
    )


def _verdict(
    reference: _Reference,
    item: Item,
    expected: _Expected,
    found: dict[str, Array],
    map_error: float,
    correlation: float,
    float32: float,
) -> tuple[str, str, float]:
    """On a map: the verdict, why it is off, and how far rounding the image takes the right one, where that was asked.

    `float32` is how far off the PyTorch engines' own maps are.
    """
    exact = expected.exact
    same = found["identity_layers"] == exact.identity_layers[0].item()
    if same and map_error <= MAP_TOLERANCE and 1 - correlation <= RANK_TOLERANCE:
        return "same", "", 0.0
    if _as_in_float32(found, expected):
        return "tie", "", 0.0
    if not same:
        return (
            "off",
            f"its identity_layers is {found['identity_layers']}; no map of PyTorch's with as many is its own",
            0.0,
        )
    saliency = exact.saliency()[0].numpy()
    ranks = [_correlation(one.saliency()[0].numpy(), saliency) for one in expected.float32.values()]
    bounds, rounded = _Bounds(float32, 1 - min(ranks)), 0.0
    if not bounds.allow(map_error, correlation):
        rounded = _widen(bounds, reference, item, exact, map_error, correlation)
    if bounds.allow(map_error, correlation):
        return "tie", "", rounded
    if bounds.undecided(map_error):
        return "undecided", "", rounded
    why = (
        f"its map is off by {map_error:.3g} (relative L2), of rank correlation {correlation:.4f}; "
        f"float32 explains {bounds.distance:.3g}, {1 - bounds.rank:.4f}"
    )
    return "off", why, rounded


def _as_in_float32(found: dict[str, Array], expected: _Expected) -> bool:
    """Whether the map is that of one of PyTorch's own float32 engines, which may decide otherwise than float64."""
    return any(
        found["identity_layers"] == one.identity_layers[0].item()
        and _distance(found["attributions"], one.attributions[0].numpy()) <= MAP_TOLERANCE
        for one in expected.float32.values()
    )


def _plainly_wrong(
    found: dict[str, Array], exact: Explanation, identities: Sequence[float], logits_error: float
) -> str:
    """What no rounding explains; nothing where all is well. `identities`: how many layers float32 passes unchanged."""
    if not logits_error <= LOGITS_TOLERANCE:
        return f"its logits are off by {logits_error:.3g} of their range, allowed {LOGITS_TOLERANCE:g}"
    same = {"target": [exact.targets[0].item()], "covered": [exact.covered[0].item()]}
    if bool(exact.covered[0]):
        same["identity_layers"] = [exact.identity_layers[0].item(), *identities]
    for name, values in same.items():
        if found[name] not in values:
            return f"its {name} is {found[name]}, expected {values[0]}"
    attributions = found["attributions"]
    shares = np.exp(found["logits"].astype(np.float64) - found["logits"].max())
    if not np.abs(found["probabilities"] - shares / shares.sum()).max() <= PROBABILITY_TOLERANCE:
        return "its probabilities are not the softmax of its logits"
    if not bool(exact.covered[0]):
        return "" if np.isnan(attributions).all() else "its target has no row in the table, but its map is not NaN"
    own = np.abs(attributions.astype(np.float64)).mean(axis=0)
    if not np.allclose(found["saliency"], own, rtol=1e-4, atol=1e-6 * float(own.max(initial=0.0)) + 1e-30):
        return "its saliency is not the mean magnitude of its attributions"
    return ""


def _shown(options: dict[str, Any]) -> dict[str, Any]:
    """Options in a few words, for the report."""
    shown = dict(options)
    if isinstance(shown.get("quantile"), dict):
        shown["quantile"] = "0.5 in the lower half of the layers, 0.1 in the upper"
    if len(shown.get("layers", ())) > 1:
        shown["layers"] = "the upper half"
    if math.isinf(shown.get("gamma", 0.0)):
        shown["gamma"] = "inf"
    return shown


class _Bounds:
    """How far off a map may be for float32's sake, from what maps known to be right are off by."""

    def __init__(self, distance: float, rank: float) -> None:
        self._distance, self._rank = distance, rank

    @property
    def distance(self) -> float:
        return min(LARGEST, max(MAP_TOLERANCE, SLACK * self._distance))

    @property
    def rank(self) -> float:
        return max(RANK_TOLERANCE, SLACK * self._rank)

    def allow(self, distance: float, correlation: float) -> bool:
        return distance <= self.distance and 1 - correlation <= self.rank

    def undecided(self, distance: float) -> bool:
        """Whether maps known to be right differ by so much that this one says nothing of the graph."""
        return self._distance > LARGEST and distance <= SLACK * self._distance

    def see(self, distance: float, correlation: float) -> None:
        self._distance, self._rank = max(self._distance, distance), max(self._rank, 1 - correlation)


def _widen(
    bounds: _Bounds, reference: _Reference, item: Item, exact: Explanation, map_error: float, correlation: float
) -> float:
    """See how the float64 map moves with the images' last digits, until that is enough; the largest distance."""
    generator = torch.Generator().manual_seed(0)
    pixels = item.picture.pixels[None].double()
    right, saliency = exact.attributions[0].numpy(), exact.saliency()[0].numpy()
    largest = 0.0
    for _ in range(ROUNDED_DRAWS):
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        moved = reference.exact(item, pixels + ROUNDING * pixels.abs().amax() * noise)
        distance = _distance(moved.attributions[0].numpy(), right)
        largest = max(largest, distance)
        bounds.see(distance, _correlation(moved.saliency()[0].numpy(), saliency))
        if bounds.allow(map_error, correlation):
            break
    return largest


def _distance(found: Array, right: Array) -> float:
    """Relative L2; NaN where `found` has one."""
    difference = float(np.linalg.norm((found.astype(np.float64) - right).ravel()))
    norm = float(np.linalg.norm(right.ravel()))
    return difference / norm if norm > 0 else (0.0 if difference == 0 else math.inf)


def _correlation(found: Array, right: Array) -> float:
    """Spearman's, of two maps; 1 where both are constant.

    What is next to nothing counts as nothing: a pruned map is exactly zero over wide areas, and where an engine has
    the rounding of a sum there, its ranks would be of chance.
    """
    from scipy.stats import spearmanr

    floor = NOTHING * float(np.max(right, initial=0.0))
    one, other = (np.where(values > floor, values, 0.0).astype(np.float64).ravel() for values in (found, right))
    constant = [np.ptp(values) == 0 for values in (one, other)]
    if any(constant):
        return 1.0 if all(constant) else 0.0
    return float(spearmanr(one, other).statistic)


def _flips(module: nn.Module, double: nn.Module, images: Tensor) -> int:
    """How many ReLUs (ReLU6, clamps) and max-pools decide otherwise in float32 than in float64."""
    narrow, wide = _Decisions(), _Decisions()
    with torch.no_grad():
        with narrow:
            module(images.clone())
        with wide:
            double(images.double())
    return sum(int((a != b).sum()) for a, b in zip(narrow.made, wide.made, strict=True))


_aten = torch.ops.aten
_RELUS = (_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default,
          _aten.clamp.default, _aten.clamp_.default, _aten.clamp_min.default, _aten.clamp_min_.default)  # fmt: skip
_POOLS = (_aten.max_pool2d_with_indices.default, _aten.adaptive_max_pool2d.default)


class _Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Notes on which side of its kink each activation lies, and which position each max-pool takes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RELUS:
            result = func(*args, **(kwargs or {}))
            if func in _POOLS:
                self.made.append(result[1])
            return result
        before = args[0].clone()
        result = func(*args, **(kwargs or {}))
        # Passed on as it is, or not; of an input of zero, at the kink itself, by what it is there.
        self.made.append((result == before) & (before != 0))
        return result


def _report(engine: Engine, judged: Sequence[Judged]) -> dict[str, Any]:
    kinds = [one.verdict for one in judged]
    decided = [one for one in judged if one.verdict != "undecided"]
    return {
        "runtime": engine.name,
        "reference": "PyTorch, float64, dense backward pass",
        "batches": sorted({one.batch for one in judged}),
        "checks": len(judged),
        "same": kinds.count("same"),
        "ties": kinds.count("tie"),
        "undecided": kinds.count("undecided"),
        "largest_logits_error": max(one.logits_error for one in judged),
        "largest_map_error": max((one.map_error for one in decided), default=0.0),
        "largest_map_error_of_pytorch_float32": max(e for one in judged for e in one.float32_map_errors.values()),
        "lowest_rank_correlation": min((one.rank_correlation for one in decided), default=1.0),
        "tolerances": {
            "logits": LOGITS_TOLERANCE, "map": MAP_TOLERANCE, "rank": RANK_TOLERANCE, "slack": SLACK,
            "largest_tie": LARGEST,
        },
        "items": [dataclasses.asdict(one) for one in judged],
    }  # fmt: skip


def default_pictures(model: Model, golden: NDArray[np.float32]) -> list[Picture]:
    """The golden record's pattern `(1, 3, h, w)`, and seven others drawn alike from fixed seeds, of its size."""
    size = (golden.shape[2], golden.shape[3])
    drawn = [Picture(f"synthetic {seed}", synthetic(size, seed)) for seed in range(1, ITEMS)]
    return [Picture("golden pattern", torch.from_numpy(golden[0])), *drawn]


def synthetic(size: tuple[int, int], seed: int) -> Tensor:
    """Smooth coloured noise of three scales, `(3, h, w)`, in normalised units."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        share * nn.functional.interpolate(torch.randn(1, 3, cells, cells, generator=generator), size, mode="bilinear")
        for cells, share in ((3 + seed, 1.0), (17, 0.5), (41, 0.25))
    ]
    return torch.stack(layers).sum(dim=0)[0]


def check_exportable(table: SelectionTable) -> None:
    """Raise ExportError where the table's own defaults are none that a graph can follow."""
    defaults = table.defaults
    for option, found, allowed in (
        ("selection", defaults.selection, "class"), ("normality_filter", defaults.normality_filter, False),
    ):  # fmt: skip
        if found != allowed:
            raise ExportError(
                f"Table '{table.name}' has the default {option} {found!r}; an ONNX graph takes {allowed!r} only."
            )
