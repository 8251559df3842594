"""The PyTorch runtime, CPU or CUDA: the pruned engine where the network can be traced, else the dense one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.features import GapNetwork
from parchgrad.runtimes import AtLastMap, Gradients, Plan, Points, Witness
from parchgrad.runtimes.dense import DenseEngine
from parchgrad.runtimes.pruned.engine import PrunedEngine, UnlikeModelError
from parchgrad.runtimes.view import private_view
from parchgrad.tables import SelectionTable

_log = logging.getLogger(__name__)

BACKWARDS = ("auto", "dense", "pruned")


class PyTorchRuntime:
    """`module` and `table` on `device` (default: where the module's weights are).

    `backward` is `pruned` (raises UnsupportedModelError where the network cannot be traced, or turns out to be another
    function than its trace), `dense`, or `auto`: pruned where it can. Images that the pruned engine does not take, for
    their options or because they are not finite, go to the dense one either way, as do all under autocast.
    """

    def __init__(
        self,
        module: nn.Module,
        table: SelectionTable,
        device: str | torch.device | None = None,
        backward: str = "auto",
    ) -> None:
        if backward not in BACKWARDS:
            raise OptionError("backward", backward, ", ".join(BACKWARDS))
        if device is not None and any(tensor.device != torch.device(device) for tensor in module.parameters()):
            module = private_view(module, device)  # moved once, for all engines
        self._module, self._table = module, table
        self._features: GapNetwork | None = None
        self._featuring = threading.Lock()
        self._dense = DenseEngine(module, table, device)
        self._pruned: PrunedEngine | None = None
        self._shares = True  # benchmarks/many_points.py turns it off
        self.dense_because: str | None = None
        self._asked = backward
        if backward == "dense":
            self.dense_because = "backward='dense' was asked for"
            return
        try:
            with torch.inference_mode(False):  # a caller may be inside one; the engine's weights must be none of its
                self._pruned = PrunedEngine(private_view(module, device), table)
        except UnsupportedModelError as error:
            if backward == "pruned":
                raise
            self.dense_because = str(error)

    @property
    def backward(self) -> str:
        return "dense" if self._pruned is None else "pruned"

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self._dense.layer_names

    @property
    def device(self) -> torch.device:
        return self._dense.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dense.dtype

    def predict(self, images: Tensor) -> Tensor:
        images = images.detach().to(self.device)
        pruned = self._pruned
        if pruned is not None and pruned.takes_images(images):
            try:
                return pruned.predict(images)
            except UnlikeModelError as error:
                self._give_up(error)
        return self._dense.predict(images)

    def features(self, images: Tensor) -> Tensor:
        """GAP features `(B, N)` at the table's own point, layers side by side, on the CPU; one forward pass.

        The first call makes the network that notes them, over the same weights. Raises UnsupportedModelError.
        """
        with self._featuring:  # it holds what it has noted: one pass at a time
            if self._features is None:
                table = self._table
                points = None if table.statistics_point == "convolution" else table.built.get("points")
                self._features = GapNetwork(
                    self._module, table.layer_names, self.device, table.statistics_point, points
                )
            return self._features.features(images.detach())

    def require_last_map(self, size: Sequence[int], option: str = "seed", *, look: bool = True) -> None:
        """Raises OptionError where images of this size, (3, h, w), have no last map, which this one of OF_LAST_MAP
        needs; without `look` only where that is known already."""
        self._dense.require_last_map(size, option, look=look)

    def at_last_map(self, images: Tensor, targets: Tensor, probability_weighted: Tensor) -> AtLastMap:
        """By the pruned engine on a processor, where it takes the images and has the last map; else the dense one."""
        images = images.detach().to(self.device)
        pruned = self._pruned
        # On a GPU it says of an image that is not finite too late, see `batch_gradients`.
        if pruned is not None and not pruned.together and pruned.takes_images(images):
            try:
                found = pruned.at_last_map(images, targets, probability_weighted)
                if found is not None:
                    return found
            except UnlikeModelError as error:
                self._give_up(error)
        return self._dense.at_last_map(images, targets, probability_weighted)

    def sums(self, points: Points, targets: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        pruned = self._pruned
        if self._shares and pruned is not None and pruned.shares(points):
            taken = pruned.takes(plan)
            try:
                if bool(taken.all()):
                    return pruned.sums(points, targets, plan)
                if bool(taken.any()):
                    return self._mixed_sums(pruned, taken, points, targets, plan)
            except UnlikeModelError as error:
                self._give_up(error)
        return _summed(points, self._gradients(points.images, targets, plan))

    def _mixed_sums(
        self, pruned: PrunedEngine, taken: Tensor, points: Points, targets: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """The engine takes an image's options or not: all its points, or none."""
        present = sorted(set(points.rows))
        sums = points.images.new_zeros((len(present), *points.images.shape[1:]))
        unchanged = torch.zeros(len(points), dtype=torch.long, device=self.device)
        for ours in (True, False):
            where = (taken == ours).nonzero()[:, 0]
            some, of_some, mine = points.take(where.tolist()), targets[where.to(targets.device)], plan.take(where)
            found, counts = (
                pruned.sums(some, of_some, mine)
                if ours
                else _summed(some, self._dense.gradients(some.images, of_some, mine))
            )
            sums[[present.index(row) for row in sorted(set(some.rows))]] = found
            unchanged[where.to(self.device)] = counts
        return sums, unchanged

    def gradients(self, images: Tensor, targets: Tensor, plan: Plan) -> Gradients:
        return self._gradients(images, targets, plan)

    def watched(self, images: Tensor, targets: Tensor, plan: Plan, witness: Witness) -> Gradients:
        """`gradients` by the dense engine, whose every layer `witness` sees; the pruned one does not compute all."""
        return self._dense.gradients(images, targets, plan, witness)

    def _gradients(self, images: Tensor, targets: Tensor, plan: Plan) -> Gradients:
        images = images.detach().to(self.device)
        pruned = self._pruned
        if pruned is not None and pruned.takes_images(images):
            try:
                return self._shared(pruned, images, targets, plan)
            except UnlikeModelError as error:
                self._give_up(error)
        return self._dense.gradients(images, targets, plan)

    def _give_up(self, error: UnlikeModelError) -> None:
        """These images are the dense engine's, and all that follow where the program is another function."""
        if not error.always:
            return
        if self._asked == "pruned":
            raise error
        self._pruned, self.dense_because = None, str(error)
        _log.warning("The dense backward pass from here on: %s", error)

    def _shared(self, pruned: PrunedEngine, images: Tensor, targets: Tensor, plan: Plan) -> Gradients:
        """Each image by the engine that takes its options."""
        taken = pruned.takes(plan)
        if bool(taken.all()):
            return self._by_pruned(images, targets, plan, pruned)
        if not bool(taken.any()):
            return self._dense.gradients(images, targets, plan)
        parts = []
        by_pruned = partial(self._by_pruned, pruned=pruned)
        for gradients, which in ((by_pruned, taken), (self._dense.gradients, ~taken)):
            rows = which.nonzero()[:, 0]
            here = images[rows.to(self.device)]
            parts.append((rows, gradients(here, targets[rows.to(targets.device)], plan.take(rows))))
        order = torch.cat([rows for rows, _ in parts]).argsort().to(self.device)
        columns = zip(*((g.logits, g.targets, g.gradients, g.identity_layers) for _, g in parts), strict=True)
        return Gradients(*(torch.cat(column)[order] for column in columns))

    def _by_pruned(self, images: Tensor, targets: Tensor, plan: Plan, pruned: PrunedEngine) -> Gradients:
        if not pruned.together:
            return pruned.gradients(images, targets, plan)
        found, left = pruned.batch_gradients(images, targets, plan)
        if not left:
            return found
        rows = torch.tensor(left)
        places = rows.to(self.device)
        again = self._dense.gradients(images[places], found.targets[places], plan.take(rows))
        both = [(getattr(found, f.name), getattr(again, f.name)) for f in fields(Gradients)]
        return Gradients(*(ours.index_copy(0, places, dense.to(ours.dtype)) for ours, dense in both))


def _summed(points: Points, found: Gradients) -> tuple[Tensor, Tensor]:
    places = torch.unique(torch.tensor(points.rows), return_inverse=True)[1]
    gradients = found.gradients
    weights = torch.tensor(points.weights, dtype=gradients.dtype, device=gradients.device)
    sums = gradients.new_zeros((int(places[-1]) + 1, *gradients.shape[1:]))
    sums.index_add_(0, places.to(sums.device), gradients * weights[:, None, None, None])
    return sums, found.identity_layers
