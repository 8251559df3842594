"""The pruned engine: the runtime of networks that can be traced, for class-wise selection and plain gradients."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parchgrad.defaults import CONSERVE
from parchgrad.errors import UnsupportedModelError
from parchgrad.runtimes import AtLastMap, Gradients, Plan, Points
from parchgrad.runtimes.dense import checked_logits, is_memory, mixed_score, took_no_part
from parchgrad.runtimes.evidence_seed import NO_LAST_MAP, refusal
from parchgrad.runtimes.pruned.batched import BatchRules, staged
from parchgrad.runtimes.pruned.choice import Choice, LayerRule
from parchgrad.runtimes.pruned.convolution import AtOutput
from parchgrad.runtimes.pruned.program import Program, Record
from parchgrad.runtimes.pruned.sharing import EntryGradients, EntryOutputs, ends_of
from parchgrad.runtimes.pruned.tracing import trace
from parchgrad.runtimes.pruned.weights import State, Weights
from parchgrad.selection import by_class
from parchgrad.tables import NORMALITY_LEVEL, SelectionTable

_T = TypeVar("_T")

# Of channels and their weights' rows, kept for the next image of the same class and quantile.
CACHE_BYTES = 256 << 20

# Sizes of images that are remembered; they are found out anew beyond it.
_MOST_SIZES = 1024

# How far the program's logits may be from the network's, in square roots of the rounding unit and relative to the
# largest logit: folding and another order of sums move them by far less, another function by far more.
_TOLERANCE = 4.0


class UnlikeModelError(UnsupportedModelError):
    """The program is not what the network computes on these images; `always`: it is another function for good."""

    def __init__(self, reason: str, *, always: bool) -> None:
        super().__init__(reason)
        self.always = always


@dataclass(frozen=True)
class _Compiled:
    """A program, and what goes with the weights that it was made of."""

    weights: State
    program: Program
    choices: _Choices
    # Of images on which it answered as the network does: how many go together.
    confirmed: dict[torch.Size, int] = field(default_factory=dict)
    last_maps: dict[torch.Size, int] = field(default_factory=dict)  # of images of a size, as the program's


class PrunedEngine:
    """`view` is a private view of the network that the table is of. Thread safe.

    Raises UnsupportedModelError, see `trace` and Program. The program is compiled anew after the weights changed, and
    at the first image of each size its logits are compared with the network's own.

    `together`: batches are explained by `batch_gradients`; default: on a GPU.
    """

    def __init__(self, view: nn.Module, table: SelectionTable, *, together: bool | None = None) -> None:
        weights = next(p for p in view.parameters() if p.is_floating_point())
        self._device = weights.device
        self._view, self._table = view, table
        self._trace = trace(view)
        self._weights = Weights(view)
        self._compiling = threading.Lock()
        self._compiled = self._compile()
        self.together = self._device.type == "cuda" if together is None else together
        self._batch_rules = BatchRules(table, self._device) if self.together else None
        _keep_freed_memory()

    def takes_images(self, images: Tensor) -> bool:
        """Whether these are images for this engine: a fused activation makes zeros of NaN, and weights in the
        program's own order know no autocast."""
        if self.together:
            return True  # `batch_gradients` says afterwards which are not
        if torch.is_autocast_enabled(self._device.type):
            return False
        return math.isfinite(float(images.detach().sum(dtype=torch.promote_types(images.dtype, torch.float32))))

    def takes(self, plan: Plan) -> Tensor:
        """Which images of the plan, `(B,)` bool; the dense engine takes the others."""
        taken = ~(plan.instance | plan.guided)
        # How many channels these select depends on the class, which the host may not know.
        return taken & plan.log_alpha.isnan() & ~plan.normality_filter if self.together else taken

    def predict(self, images: Tensor) -> Tensor:
        """Logits `(B, K)` of images on the engine's device. Raises UnlikeModelError."""
        with torch.inference_mode(False), torch.no_grad():
            compiled = self._current()
            parts = []
            for start, end in self._slices(compiled, images):
                parts.append(self._slice_logits(compiled, images[start:end]))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slice_logits(self, compiled: _Compiled, images: Tensor) -> Tensor:
        logits: Tensor = self._confirmed(compiled, images, lambda: compiled.program.predict(images), lambda it: it)
        return logits

    def gradients(self, images: Tensor, targets: Tensor, plan: Plan) -> Gradients:
        """As `Runtime.gradients`, for a plan all of whose images `takes` says yes to. Raises UnlikeModelError."""
        with torch.inference_mode(False), torch.no_grad():
            compiled = self._current()
            images = images.clone() if images.is_inference() else images
            parts = []
            for start, end in self._slices(compiled, images):
                some = plan if end - start == len(images) else plan.take(torch.arange(start, end))
                parts.append(self._slice_gradients(compiled, images[start:end], targets[start:end], some))
        if len(parts) == 1:
            return parts[0]
        columns = zip(*((g.logits, g.targets, g.gradients, g.identity_layers) for g in parts), strict=True)
        return Gradients(*map(torch.cat, columns))

    def _slice_gradients(self, compiled: _Compiled, images: Tensor, targets: Tensor, plan: Plan) -> Gradients:
        record = self._recorded(compiled, images, plan)
        logits = record.logits
        targets = targets.to(self._device)
        targets = torch.where(targets < 0, logits.argmax(dim=1), targets)
        rules = self._rules(compiled, targets, plan)
        seed = _seed(logits, targets, plan.probability_weighted)
        gradients = _taken_back(compiled.program, record, seed, rules)
        unchanged = [[False] * len(plan)] if not rules else [rule.unchanged for rule in rules.values()]
        return Gradients(logits, targets, gradients, torch.tensor(unchanged, device=self._device).sum(dim=0))

    def at_last_map(self, images: Tensor, targets: Tensor, probability_weighted: Tensor) -> AtLastMap | None:
        """As `Runtime.at_last_map`; None where the program does not have the last map. Raises UnlikeModelError."""
        with torch.inference_mode(False), torch.no_grad():
            compiled = self._current()
            images = images.clone() if images.is_inference() else images
            parts = []
            for start, end in self._slices(compiled, images):
                some, weighted = images[start:end], probability_weighted[start:end]
                found = self._slice_at_last_map(compiled, some, targets[start:end], weighted)
                if found is None:
                    return None
                parts.append(found)
        columns = zip(*((p.logits, p.targets, p.values, p.gradients) for p in parts), strict=True)
        return AtLastMap(*map(torch.cat, columns))

    def _slice_at_last_map(
        self, compiled: _Compiled, images: Tensor, targets: Tensor, probability_weighted: Tensor
    ) -> AtLastMap | None:
        program = compiled.program
        nobody = torch.zeros(len(images), dtype=torch.bool, device=self._device)

        def call() -> Record:
            place = _last_map(compiled, images)
            return program.record(images, weigh_at=place, which=nobody, first=place or 0)

        record = self._confirmed(compiled, images, call, lambda record: record.logits)
        if record.weighing is None or not program.is_whole(record.weighing.number):
            return None
        targets = targets.to(self._device)
        targets = torch.where(targets < 0, record.logits.argmax(dim=1), targets)
        gradients = program.pull_to_last_map(record, _seed(record.logits, targets, probability_weighted))
        return AtLastMap(record.logits, targets, record.weighing.values, gradients)

    def shares(self, points: Points) -> bool:
        """Whether `sums` can do these."""
        program = self._compiled.program
        return program.by_image and program.entry is not None and not self.together and self.takes_images(points.images)

    def sums(self, points: Points, targets: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """As `Runtime.sums`, of points that it `shares` and a plan that it `takes`. Raises UnlikeModelError.

        The entry convolution's input gradient is computed once or twice an image, not at every point; and on a straight
        line its output twice.
        """
        with torch.inference_mode(False), torch.no_grad():
            compiled = self._current()
            entry = compiled.program.entry
            assert entry is not None
            outputs = points.kept.get("outputs")
            if not isinstance(outputs, EntryOutputs) or outputs.entry is not entry:  # the weights have changed since
                outputs = points.kept["outputs"] = EntryOutputs(entry)
            sums, unchanged = [], []
            gradients = EntryGradients(entry)
            ends = ends_of(points.rows)
            for start, end in self._slices(compiled, points.images):
                some = plan.take(torch.arange(start, end))
                each = self._at_entry(compiled, outputs, points, range(start, end), targets[start:end], some)
                for i, (one, count) in enumerate(each, start):
                    gradients.add(one, points.weights[i])
                    unchanged.append(count)
                    if ends[i]:
                        sums.append(gradients.at_input(torch.Size((1, *points.images.shape[1:]))))
                        gradients = EntryGradients(entry)
            return torch.cat(sums), torch.tensor(unchanged, device=self._device)

    def _at_entry(
        self,
        compiled: _Compiled,
        outputs: EntryOutputs,
        points: Points,
        which: range,
        targets: Tensor,
        plan: Plan,
    ) -> Iterator[tuple[AtOutput, int]]:
        """Point by point the gradient at the entry's output, and how many layers it passed unchanged."""
        program, images = compiled.program, points.images[which.start : which.stop]
        images = images.clone() if images.is_inference() else images
        record = self._recorded(compiled, images, plan, lambda: outputs.of(points, which))
        targets = targets.to(self._device)
        seed, rules = _seed(record.logits, targets, plan.probability_weighted), self._rules(compiled, targets, plan)
        for i in range(len(which)):
            alone = {name: rule.of(i) for name, rule in rules.items()}
            one = program.pull_to_entry(record.of(i), seed[i : i + 1], alone)
            yield one, sum(rule.unchanged[0] for rule in alone.values())

    def batch_gradients(self, images: Tensor, targets: Tensor, plan: Plan) -> tuple[Gradients, list[int]]:
        """`gradients` without waiting for the device before the end; and the images that are left to the dense engine.

        Those are the images which are not finite, and those whose gradient passes unchanged through a layer where
        only the selected channels' was computed: what their row holds is no explanation.
        """
        with torch.inference_mode(False), torch.no_grad():
            compiled = self._current() if self._weights.counted_since(self._compiled.weights) else self._compiled
            found, marks = self._queued(compiled, images.clone() if images.is_inference() else images, targets, plan)
            *left, changed = marks.tolist()  # the one look at the device
        if changed:
            self._current()
            return self.batch_gradients(images, targets, plan)
        return found, [image for image, here in enumerate(left) if here]

    def _queued(self, compiled: _Compiled, images: Tensor, targets: Tensor, plan: Plan) -> tuple[Gradients, Tensor]:
        """The gradients, and marks `(B + 1,)` bool: which images are left to the dense engine, and whether the weights
        are others than the compiled ones. Nothing is read by the host, once the images' size is confirmed."""
        assert self._batch_rules is not None
        changed = self._weights.differ_from(compiled.weights)
        record = self._recorded(compiled, images, plan)
        logits = record.logits
        targets = staged(targets, self._device)
        targets = torch.where(targets < 0, logits.argmax(dim=1), targets)
        rules = self._batch_rules.of(targets, plan)
        gradients = compiled.program.pull(record, _seed(logits, targets, plan.probability_weighted), rules)
        left = ~images.sum(dim=(1, 2, 3), dtype=torch.promote_types(images.dtype, torch.float32)).isfinite()
        unchanged = torch.zeros(len(plan), dtype=torch.long, device=self._device)
        for rule in rules.values():
            left, unchanged = left | rule.undone, unchanged + rule.unchanged
        gradients = gradients.to(images.dtype)  # under autocast of another
        return Gradients(logits, targets, gradients, unchanged), torch.cat((left, changed[None]))

    def _current(self) -> _Compiled:
        compiled = self._compiled
        if self._weights.unchanged_since(compiled.weights):
            return compiled
        with self._compiling:
            if not self._weights.unchanged_since(self._compiled.weights):
                self._compiled = self._compile()  # others may still be running the old one
            return self._compiled

    def _compile(self) -> _Compiled:
        with torch.inference_mode(False), torch.no_grad():
            weights = self._weights.state()  # before they are read
            program = Program(self._trace, self._view, self._table.layer_names)
            return _Compiled(weights, program, _Choices(self._table, self._device, program.row_bytes()))

    def _confirmed(
        self, compiled: _Compiled, images: Tensor, call: Callable[[], _T], logits_of: Callable[[_T], Any]
    ) -> _T:
        """What the program's `call` returns, its logits those of the table's classes and the network's own."""
        size = images.shape[1:]
        try:
            found = call()
        except UnsupportedModelError as error:
            raise UnlikeModelError(str(error), always=True) from error
        except Exception as error:
            if size in compiled.confirmed or is_memory(error):
                raise
            self._view(images.clone())  # which may well raise by itself, and says better why
            reason = f"The traced network fails where the network itself does not: {type(error).__name__}: {error}"
            raise UnlikeModelError(reason, always=True) from error
        if size not in compiled.confirmed:
            self._confirm(logits_of(found), self._view(images.clone()), size)
            if len(compiled.confirmed) >= _MOST_SIZES:
                compiled.confirmed.clear()
            compiled.confirmed[size] = self._room(compiled.program, images)
        checked_logits(logits_of(found), images, self._table)
        return found

    def _confirm(self, found: Any, expected: Any, size: torch.Size) -> None:
        if not isinstance(expected, Tensor):
            return  # no logits, which is for the caller to say
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            raise UnlikeModelError("The traced network returns something else than the network itself.", always=True)
        if not bool(expected.isfinite().all()):
            raise UnlikeModelError("The network's logits are not finite.", always=False)
        rounding = torch.finfo(expected.dtype).eps
        if expected.is_cuda and expected.dtype == torch.float32:
            rounding = 2.0**-10  # convolutions may be computed in TF32
        off = float((found.double() - expected.double()).abs().max()) / max(float(expected.abs().max()), 1e-300)
        if not off <= _TOLERANCE * math.sqrt(rounding):
            shape = " x ".join(str(side) for side in size)
            raise UnlikeModelError(
                f"On images of {shape} the traced network's logits are off by {off:.1e} of the largest.", always=True
            )

    def _slices(self, compiled: _Compiled, images: Tensor) -> Iterator[tuple[int, int]]:
        """The batch in as few parts as there is room for, and as even ones."""
        first = images[:1].clone() if images.is_inference() else images[:1]
        if images.shape[1:] not in compiled.confirmed:  # what there is room for is found out with one image
            self._confirmed(compiled, first, lambda: compiled.program.predict(first), lambda logits: logits)
        parts = math.ceil(len(images) / compiled.confirmed.get(images.shape[1:], sys.maxsize))
        return itertools.pairwise([round(len(images) * part / parts) for part in range(parts + 1)])

    def _room(self, program: Program, images: Tensor) -> int:
        """How many such images go together: on a processor, as many as leave no value beyond `_LARGEST_MAPPING`."""
        if self._device.type != "cpu":
            return sys.maxsize
        return max(1, _LARGEST_MAPPING // max(1, program.widest(images[:1])))

    def _recorded(
        self, compiled: _Compiled, images: Tensor, plan: Plan, outputs: Callable[[], Tensor] | None = None
    ) -> Record:
        """A prediction on which the plan can be carried out; `outputs` of the entry, where they are known.

        Raises UnlikeModelError, OptionError and, where a layer took no part, UnsupportedModelError.
        """
        program = compiled.program
        weighs = bool(plan.evidence.any())

        def call() -> Record:
            known = None if outputs is None else outputs()
            if not weighs:
                return program.record(images, known)
            return program.record(images, known, _last_map(compiled, images), staged(plan.evidence, self._device))

        record = self._confirmed(compiled, images, call, lambda record: record.logits)
        if weighs and record.weighing is None:
            raise refusal(NO_LAST_MAP)
        self._require_layers(program, plan)
        return record

    def _require_layers(self, program: Program, plan: Plan) -> None:
        active = zip(self._table.layer_names, plan.active.any(dim=0).tolist(), strict=True)
        missing = [name for name, used in active if used and name not in program.layers]
        if missing:
            raise took_no_part(missing, self._table)

    def _rules(self, compiled: _Compiled, targets: Tensor, plan: Plan) -> dict[str, LayerRule]:
        rows = self._table.row_of_class[targets.cpu()].tolist()
        active, gammas = plan.active, plan.gamma.tolist()
        conserve = [CONSERVE[i] for i in plan.conserve.tolist()]
        chosen = [compiled.choices.of(row, plan, i) for i, row in enumerate(rows)]
        rules = {}
        for number, (name, any_active) in enumerate(
            zip(self._table.layer_names, active.any(dim=0).tolist(), strict=True)
        ):
            if any_active:
                acts = active[:, number].tolist()
                each = [layers[number] if here else None for layers, here in zip(chosen, acts, strict=True)]
                rules[name] = LayerRule(each, gammas, conserve)
        return rules


class _Choices:
    """What classes select, layer by layer; the latest asked for stay, up to CACHE_BYTES. Thread safe.

    `row_bytes` is the size of one selected channel's weights in each layer.
    """

    def __init__(self, table: SelectionTable, device: torch.device, row_bytes: Mapping[str, int]) -> None:
        self._table, self._device, self._row_bytes = table, device, row_bytes
        self._kept: OrderedDict[tuple[object, ...], tuple[list[Choice], int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, row: int, plan: Plan, image: int) -> list[Choice]:
        """One choice for each layer of the table."""
        key = (
            row,
            plan.count[image].numpy().tobytes(),
            None if math.isnan(plan.log_alpha[image]) else float(plan.log_alpha[image]),  # NaN equals nothing
            bool(plan.normality_filter[image]),
        )
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found[0]
        made = self._made(row, plan, image)
        size = self._size(made)
        with self._lock:
            if key in self._kept:  # another thread was quicker
                return self._kept[key][0]
            self._kept[key] = made, size
            self._bytes += size
            while self._bytes > CACHE_BYTES:
                _, (_, freed) = self._kept.popitem(last=False)
                self._bytes -= freed
        return made

    def _size(self, made: list[Choice]) -> int:
        """What the choices will hold at most: the masks, the sides' weights, and the weights' rows."""
        total = 0
        for name, choice in zip(self._table.layer_names, made, strict=True):
            total += len(choice.selected) * 17 + len(choice.numbers) * 8
            if choice.both_sides:
                total += len(choice.numbers) * self._row_bytes.get(name, 0)
        return total

    def _made(self, row: int, plan: Plan, image: int) -> list[Choice]:
        chosen = []
        for number, layer in enumerate(self._table.layers.values()):
            if row < 0:
                selected = torch.zeros(layer.channels, dtype=torch.bool)
            else:
                one = slice(row, row + 1)
                count, log_alpha = plan.count[image : image + 1, number], plan.log_alpha[image : image + 1]
                selected = by_class(layer.rank[one], layer.log_p[one], count, log_alpha)[0]
            if bool(plan.normality_filter[image]) and layer.normality_p is not None:
                selected = selected & (layer.normality_p < NORMALITY_LEVEL)
            chosen.append(Choice(selected.to(self._device)))
        return chosen


def _last_map(compiled: _Compiled, images: Tensor) -> int | None:
    """The value at the network's last map, for images of this size."""
    size = images.shape[1:]
    place = compiled.last_maps.get(size)  # at once: other threads may clear them
    if place is None:
        place = compiled.program.last_map(images[:1])
        if len(compiled.last_maps) >= _MOST_SIZES:
            compiled.last_maps.clear()
        if place is not None:
            compiled.last_maps[size] = place
    return place


def _taken_back(program: Program, record: Record, seed: Tensor, rules: Mapping[str, LayerRule]) -> Tensor:
    """The gradients at the images `(B, 3, h, w)`, one image after the other where that can be: one image's gradients
    stay in a processor's cache, and there is memory for those of one only."""
    if len(seed) == 1 or not program.by_image:
        return program.pull(record, seed, rules)
    each = []
    for image in range(len(seed)):
        alone = {name: rule.of(image) for name, rule in rules.items()}
        each.append(program.pull(record.of(image), seed[image : image + 1], alone))
        for name, rule in rules.items():
            rule.unchanged[image] = alone[name].unchanged[0]
    return torch.cat(each)


def _seed(logits: Tensor, targets: Tensor, probability_weighted: Tensor) -> Tensor:
    """The gradient of the images' scores at the logits."""
    if not bool(probability_weighted.any()):
        return torch.zeros_like(logits).scatter_(1, targets[:, None], 1.0)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        score = mixed_score(leaf, targets, staged(probability_weighted, logits.device))
        (seed,) = torch.autograd.grad(score.sum(), leaf)
    return seed


# Of memory that glibc takes back from a program and gives it again; beyond it every value is a new mapping, which
# costs a fault a page at its first use.
_LARGEST_MAPPING = 32 << 20


def _keep_freed_memory() -> None:
    """glibc gives freed memory back to the system beyond twice the largest mapping freed so far, and takes it again
    page by page. One large mapping sets the bound (docs/performance.md)."""
    torch.empty(_LARGEST_MAPPING - (64 << 10), dtype=torch.uint8)
