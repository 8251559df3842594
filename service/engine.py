"""The model as the service runs it: what every engine is asked, what it takes and gives. Runs nothing itself.

An engine is one version of a model with its table on one runtime: PyTorch (`torch_engine.py`) or an exported graph on
ONNX Runtime (`onnx_engine.py`). Nothing of it is asynchronous: all of it runs in threads of its own. Between the
service and an engine go NumPy arrays only, so that nothing else of the service knows torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from parchgrad.errors import AbandonedError
from parchgrad.evaluation.maps import Figures, figures

if TYPE_CHECKING:
    from parchgrad.attacks.attack import Attack
    from parchgrad.attacks.comparison import Attacked
    from parchgrad.drift import LayerDrift
    from parchgrad.layer_views import NetworkView
    from parchgrad.options import Options
    from parchgrad.preprocessing import Preprocessing

T = TypeVar("T")
Array = np.ndarray[Any, Any]
Wanted = Callable[[], list[bool]]

PREDICTED = -1  # target of a job that explains whatever class is predicted

# How a runtime says that it had no memory, where that is an exception of no class of its own: torch's CPU allocator;
# ONNX Runtime's arena, its allocator, C++ and CUDA behind it.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "Failed to allocate memory",
    "bad_alloc",
    "is smaller than requested bytes",
    "CUDA out of memory",
    "CUDA failure 2:",
)


@dataclass(frozen=True)
class Explained:
    """How a job is to be explained: `target` a class index or PREDICTED, `reduction` of Explanation.saliency."""

    target: int
    options: Options
    reduction: str


@dataclass(frozen=True)
class Job:
    """One image for the device: `tensor` normalised float32 (3, h, w); without `explained`, only predicted."""

    tensor: Array
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

    logits: Array  # (classes,)
    probabilities: Array  # (classes,)
    target: int = PREDICTED
    saliency: Array | None = None  # (h, w); None also where the target has no row in the table
    covered: bool = True
    identity_layers: int = 0

    @cached_property
    def figures(self) -> Figures | None:
        """Of the map, computed once: the answer and the metrics have the same; None without a map."""
        return None if self.saliency is None else figures(self.saliency)


class DeviceMemoryError(Exception):
    """The device has not the memory for this batch; a smaller one may fit."""


class ServedModel(Protocol):
    """What the service asks of a model."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def preprocessing(self) -> Preprocessing: ...
    def class_index(self, target: object) -> int:
        """Index of a class given by index, name or id. Raises parchgrad.errors.UnknownTargetError."""


class ServedTable(Protocol):
    """What the service asks of a selection table."""

    @property
    def name(self) -> str: ...
    @property
    def table_sha256(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def classes(self) -> tuple[int, ...]: ...
    def manifest(self) -> dict[str, Any]: ...


class Engine(Protocol):
    """One version of a model and its table, loaded."""

    @property
    def model(self) -> ServedModel: ...
    @property
    def table(self) -> ServedTable: ...
    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that the rule may act on, in the order in which quantiles are given one by one."""

    @property
    def device(self) -> str: ...
    @property
    def runtime(self) -> str:
        """Its name and version, as answers carry them: `torch 2.14.1`."""

    @property
    def platform(self) -> str:
        """What the Open Inference Protocol calls it."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of a map whose caller gives none, as JSON: the table's, and this runtime's own."""

    @property
    def cannot(self) -> dict[str, str]:
        """Options of which this runtime takes less than others do: what it takes of them, in words."""

    @property
    def no_drift(self) -> str | None:
        """Why `drift` cannot be asked; None where it can."""

    @property
    def no_network(self) -> str | None:
        """Why the network itself, its layers and gradients, cannot be looked into; None where it can."""

    def drift(self, tensor: Array, target: int) -> Mapping[str, LayerDrift]:
        """By layer, how far an image `(3, h, w)` is from the table's in the channels of a class that has a row.

        Raises DeviceMemoryError.
        """

    def layers(self, tensor: Array, target: int, options: Options, channels: int, order: str) -> NetworkView:
        """One image's way through the network and back; see parchgrad.layer_views. Not asked where `no_network`.

        Raises what `layer_views` raises, and DeviceMemoryError.
        """

    def attack(
        self, tensor: Array, attack: Attack, options: Options, reduction: str, most: int, wanted: Callable[[], bool]
    ) -> Attacked:
        """What an attack does to one image; see parchgrad.attacks.comparison. Not asked where `no_network`.

        `wanted` is asked between the steps. Raises what `attacked` raises, and DeviceMemoryError.
        """

    def self_test(self) -> None:
        """Explain the golden image and compare. Raises parchgrad.errors.GoldenError."""

    def options(self, given: Mapping[str, Any]) -> Options:
        """`given` over the table's defaults, held to model, table and runtime. Raises parchgrad.errors.OptionError."""

    def capacity(self, job: Job) -> int:
        """How many jobs like this one go into one call."""

    def run(self, jobs: Sequence[Job], wanted: Wanted | None = None) -> list[Result | None]:
        """Results in the order of `jobs`, which share one group. Raises DeviceMemoryError.

        `wanted`, asked between the passes of an explanation: for each job, whether somebody waits for it. One that is
        not wanted is given up, and its result is None.
        """


@dataclass(frozen=True)
class Room:
    """What one call of the device may take.

    A call may end early for its own callers, never for others: what it takes is what everybody else waits.
    """

    images: int
    pixels: int  # of input, times passes

    def capacity(self, job: Job) -> int:
        pixels = int(job.tensor.shape[-2] * job.tensor.shape[-1]) * job.passes
        return max(1, min(self.images, self.pixels // pixels))


@dataclass(frozen=True)
class Computed:
    """What an engine gave for a batch of explanations, row by row."""

    logits: Array  # (B, classes) float32
    probabilities: Array  # (B, classes) float32
    targets: list[int]
    covered: list[bool]
    complete: list[bool]
    identity_layers: list[int]
    maps: Mapping[str, Array]  # by reduction: (B, h, w) float32

    def results(self, asked: Sequence[Explained]) -> list[Result | None]:
        return [
            Result(
                logits=self.logits[i],
                probabilities=self.probabilities[i],
                target=self.targets[i],
                saliency=self.maps[one.reduction][i] if self.covered[i] else None,
                covered=self.covered[i],
                identity_layers=self.identity_layers[i],
            )
            if self.complete[i]
            else None
            for i, one in enumerate(asked)
        ]


def columns(asked: Sequence[Explained]) -> dict[str, Any]:
    """The options of a batch as `explain` takes them: for each option a value an image."""
    each = [one.options for one in asked]
    return {f.name: [getattr(options, f.name) for options in each] for f in fields(each[0])}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on the device or beside it."""
    torch = sys.modules.get("torch")  # what has not been imported has raised nothing
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)


def attempted(
    run: Callable[[], list[Result | None]], images: int, give_back: Callable[[], None]
) -> list[Result | None]:
    """What `run` gives for so many images; None for each where nobody wants any of them. Raises DeviceMemoryError."""
    try:
        return within_memory(run, images, give_back)
    except AbandonedError:
        return [None] * images


def within_memory(run: Callable[[], T], images: int, give_back: Callable[[], None]) -> T:
    """What `run` gives for so many images. Raises DeviceMemoryError where there was no memory, after `give_back`."""
    try:
        return run()
    except Exception as error:  # the runtimes' own have no class in common but this
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the exception's frames hold the arrays that are to be given back.
    give_back()
    raise DeviceMemoryError(f"The device has not the memory for {images} images.")
