"""The model as the service runs it: load, self-test, and one call for a batch of jobs. Nothing here is asynchronous.

All of it runs in threads of its own; torch is imported when the engine is made, never when this module is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from parchgrad.errors import AbandonedError
from service import memory
from service.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from parchgrad.options import Options

log = logging.getLogger(__name__)

PREDICTED = -1  # target of a job that explains whatever class is predicted


@dataclass(frozen=True)
class Explained:
    """How a job is to be explained: `target` a class index or PREDICTED, `reduction` of Explanation.saliency."""

    target: int
    options: Options
    reduction: str


@dataclass(frozen=True)
class Job:
    """One image for the device: `tensor` normalised float32 (3, h, w); without `explained`, only predicted."""

    tensor: Tensor
    explained: Explained | None = None

    @property
    def group(self) -> tuple[str, tuple[int, ...]]:
        return ("predict" if self.explained is None else "explain"), (*self.tensor.shape, self.passes)

    @property
    def passes(self) -> int:
        """How often the image goes through the network for its explanation."""
        if self.explained is None:
            return 1
        options = self.explained.options
        return {"integrated_gradients": options.steps, "smoothgrad": options.samples}.get(options.method, 1)


@dataclass(frozen=True)
class Result:
    """What the device gave for one job; arrays float32 on the CPU. A job only predicted has no saliency."""

    logits: np.ndarray[Any, Any]  # (classes,)
    probabilities: np.ndarray[Any, Any]  # (classes,)
    target: int = PREDICTED
    saliency: np.ndarray[Any, Any] | None = None  # (h, w); None also where the target has no row in the table
    covered: bool = True
    identity_layers: int = 0


class DeviceMemoryError(Exception):
    """The device has not the memory for this batch; a smaller one may fit."""


class Engine:
    """One version of a model and its table. Raises what the library raises when either is not right."""

    def __init__(self, settings: Settings, name: str, version: str) -> None:
        import torch

        import parchgrad
        from parchgrad.errors import ModelError

        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.model = parchgrad.load_model(settings.models_dir / name / version)
        if self.model.name != name:
            raise ModelError(f"Model folder '{name}/{version}' holds model '{self.model.name}', expected '{name}'.")
        table = settings.tables_dir / name / version
        self.table = parchgrad.load_table(table, self.model, mapped=settings.map_tables)
        self.explainer = parchgrad.Explainer(self.model, self.table, device=settings.device, backward=settings.backward)
        if self.explainer.dense_because is not None:
            log.info("Model %s/%s has the dense backward pass: %s", name, version, self.explainer.dense_because)
        self._max_batch, self._max_batch_pixels = settings.max_batch, settings.batch_pixels

    def self_test(self) -> None:
        """Explain the golden image and compare. Raises parchgrad.errors.GoldenError."""
        from parchgrad import golden

        assert self.table.folder is not None  # a loaded table has one
        golden.check(self.explainer, self.table.folder)

    def capacity(self, job: Job) -> int:
        """How many jobs like this one go into one call: bounded in images, and in input pixels times passes.

        A call may end early for its own callers, never for others: what it takes is what everybody else waits.
        """
        pixels = int(job.tensor.shape[-2] * job.tensor.shape[-1]) * job.passes
        return max(1, min(self._max_batch, self._max_batch_pixels // pixels))

    def options(self, given: dict[str, Any]) -> Options:
        """`given` over the table's defaults, held to model and table. Raises parchgrad.errors.OptionError."""
        from parchgrad.layers import match
        from parchgrad.options import per_image

        (options,) = per_image(1, self.table.defaults, given)
        match(self.explainer.layer_names, options.layers)
        self.explainer.require_statistics([options])
        return options

    def run(self, jobs: Sequence[Job], wanted: Callable[[], list[bool]] | None = None) -> list[Result | None]:
        """Results in the order of `jobs`, which share one group. Raises DeviceMemoryError.

        `wanted`, asked between the passes of an explanation: for each job, whether somebody waits for it. One that is
        not wanted is given up, and its result is None.
        """
        try:
            return self._run(jobs, wanted)
        except AbandonedError:
            return [None] * len(jobs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = f"The device has not the memory for {len(jobs)} images."
        # Outside the handler: the exception's frames hold the tensors that are to be given back.
        _release_cached_memory()
        raise DeviceMemoryError(message)

    def _run(self, jobs: Sequence[Job], wanted: Callable[[], list[bool]] | None) -> list[Result | None]:
        import torch

        from parchgrad.explainer import PIXELS_PER_PASS

        images = torch.stack([job.tensor for job in jobs])
        asked = [job.explained for job in jobs if job.explained is not None]
        if not asked:
            logits = self.explainer.predict(images)
            each_softmax = logits.float().softmax(dim=1)
            both = zip(logits.float().cpu().numpy(), each_softmax.cpu().numpy(), strict=True)
            return [Result(row, softmax) for row, softmax in both]
        each = [one.options for one in asked]
        columns: dict[str, Any] = {f.name: [getattr(options, f.name) for options in each] for f in fields(each[0])}
        explanation = self.explainer.explain(
            images,
            [one.target for one in asked],
            uncovered="nan",
            wanted=wanted,
            pixels_per_pass=min(self._max_batch_pixels, PIXELS_PER_PASS),
            **columns,
        )
        maps = {
            reduction: explanation.saliency(reduction).float().cpu().numpy()
            for reduction in {one.reduction for one in asked}
        }
        rows = explanation.logits.float().cpu().numpy()
        probabilities = explanation.probabilities().float().cpu().numpy()
        targets, covered = explanation.targets.tolist(), explanation.covered.tolist()
        identity, complete = explanation.identity_layers.tolist(), explanation.complete.tolist()
        return [
            Result(
                logits=rows[i],
                probabilities=probabilities[i],
                target=targets[i],
                saliency=maps[asked[i].reduction][i] if covered[i] else None,
                covered=covered[i],
                identity_layers=identity[i],
            )
            if complete[i]
            else None
            for i in range(len(jobs))
        ]


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory, on the device or beside it."""
    import torch

    # The CPU's allocator has no class of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _release_cached_memory() -> None:
    import torch

    memory.give_back()  # what malloc keeps of the failed batch is wanted elsewhere
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
