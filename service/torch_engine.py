"""A model package and its selection table on PyTorch. torch is imported when an engine is made, never before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from parchgrad.errors import ModelError, TableError
from service import memory
from service.engine import (
    PREDICTED,
    Array,
    Computed,
    Explained,
    Job,
    Result,
    Room,
    Wanted,
    attempted,
    columns,
    within_memory,
)
from service.settings import PREFIX, Settings, SettingsError

if TYPE_CHECKING:
    from parchgrad.attacks.attack import Attack
    from parchgrad.attacks.comparison import Attacked
    from parchgrad.attacks.gradients import Attacker
    from parchgrad.drift import LayerDrift
    from parchgrad.layer_views import NetworkView
    from parchgrad.options import Options

log = logging.getLogger(__name__)

LAYER_SIDE = 48  # positions along a map of /layers: 52 layers of 8 channels in less than 1.5 MB, half of it compressed


class TorchEngine:
    """See service.engine.Engine. Raises what the library raises when model or table is not right."""

    platform = "parchgrad_pytorch"

    def __init__(self, settings: Settings, name: str, version: str) -> None:
        """Raises SettingsError where torch sees no such device, TableError where there is no table."""
        import torch

        import parchgrad

        _check_device(settings.device)
        table = settings.tables_dir / name / version
        if not table.is_dir():
            raise TableError(f"There is no selection table for {name}/{version}; expected one in {table}.")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.model = parchgrad.load_model(settings.models_dir / name / version)
        if self.model.name != name:
            raise ModelError(f"Model folder '{name}/{version}' holds model '{self.model.name}', expected '{name}'.")
        self.table = parchgrad.load_table(table, self.model, mapped=settings.map_tables)
        self.explainer = parchgrad.Explainer(self.model, self.table, device=settings.device, backward=settings.backward)
        if self.explainer.dense_because is not None:
            log.info("Model %s/%s has the dense backward pass: %s", name, version, self.explainer.dense_because)
        self._look_for_last_map()
        if settings.attacks:
            self._prepare_attacks()
        self.runtime = f"torch {torch.__version__}"
        self._room = Room(settings.max_batch, settings.batch_pixels)

    @property
    def defaults(self) -> dict[str, Any]:
        return self.table.defaults.to_json()

    @property
    def cannot(self) -> dict[str, str]:
        return {}

    @property
    def no_drift(self) -> str | None:
        return None

    @property
    def no_network(self) -> str | None:
        return None

    def drift(self, tensor: Array, target: int) -> Mapping[str, LayerDrift]:
        import torch

        image = torch.from_numpy(tensor)[None]
        (drift,) = within_memory(lambda: self.explainer.drift(image, [target]), 1, _release_cached_memory)
        return drift

    def layers(self, tensor: Array, target: int, options: Options, channels: int, order: str) -> NetworkView:
        import torch

        from parchgrad.layer_views import layer_views

        image = torch.from_numpy(tensor)

        def look() -> NetworkView:
            return layer_views(
                self.explainer, image, target, options, channels=channels, order=order, most_side=LAYER_SIDE
            )

        return within_memory(look, 1, _release_cached_memory)

    def attack(
        self, tensor: Array, attack: Attack, options: Options, reduction: str, most: int, wanted: Callable[[], bool]
    ) -> Attacked:
        from parchgrad.attacks.comparison import attacked

        def run() -> Attacked:
            return attacked(
                self.explainer,
                self._attacker,
                self.model.preprocessing,
                self.model.preprocessing.restore(tensor),
                attack,
                reduction=reduction,
                options=columns([Explained(PREDICTED, options, reduction)]),
                most=most,
                wanted=wanted,
            )

        return within_memory(run, 1, _release_cached_memory)

    def _prepare_attacks(self) -> None:
        """Here, that no request waits for captum's import."""
        from parchgrad.attacks.gradients import require_captum
        from parchgrad.errors import MissingPackageError

        try:
            require_captum()
        except MissingPackageError as error:
            log.warning("Model %s/%s: %s", self.model.name, self.model.version, error)

    @cached_property
    def _attacker(self) -> Attacker:
        from parchgrad.attacks.gradients import Attacker

        return Attacker(self.explainer.network, self.model.preprocessing)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self.explainer.layer_names

    @property
    def device(self) -> str:
        return str(self.explainer.device)

    def self_test(self) -> None:
        from parchgrad import golden

        golden.check(self.explainer, self.table.in_folder)

    def options(self, given: Mapping[str, Any]) -> Options:
        from parchgrad.options import per_image
        from parchgrad.patterns import match

        (options,) = per_image(1, self.table.defaults, given)
        match(self.layer_names, options.layers)
        self.explainer.require_statistics([options], look=False)  # the event loop waits for this
        return options

    def _look_for_last_map(self) -> None:
        """Here, that `options` may know: it is a trace and some predictions. Raises DeviceMemoryError.

        Pictures of other sizes than the package's are looked at with their batch, which is refused as `options` would.
        """
        from parchgrad.errors import OptionError
        from parchgrad.options import Options

        try:
            within_memory(
                lambda: self.explainer.require_statistics([Options(rule=False, seed="evidence")]),
                1,
                _release_cached_memory,
            )
        except OptionError as error:
            log.info("Model %s/%s: %s", self.model.name, self.model.version, error)

    def capacity(self, job: Job) -> int:
        return self._room.capacity(job)

    def run(self, jobs: Sequence[Job], wanted: Wanted | None = None) -> list[Result | None]:
        return attempted(lambda: self._run(jobs, wanted), len(jobs), _release_cached_memory)

    def _run(self, jobs: Sequence[Job], wanted: Wanted | None) -> list[Result | None]:
        import torch

        from parchgrad.methods import PIXELS_PER_PASS

        images = torch.stack([torch.from_numpy(job.tensor) for job in jobs])
        asked = [job.explained for job in jobs if job.explained is not None]
        if not asked:
            logits = self.explainer.predict(images)
            each_softmax = logits.float().softmax(dim=1)
            both = zip(logits.float().cpu().numpy(), each_softmax.cpu().numpy(), strict=True)
            return [Result(row, softmax) for row, softmax in both]
        explanation = self.explainer.explain(
            images,
            [one.target for one in asked],
            uncovered="nan",
            wanted=wanted,
            pixels_per_pass=min(self._room.pixels, PIXELS_PER_PASS),
            **columns(asked),
        )
        computed = Computed(
            logits=explanation.logits.float().cpu().numpy(),
            probabilities=explanation.probabilities().float().cpu().numpy(),
            targets=explanation.targets.tolist(),
            covered=explanation.covered.tolist(),
            complete=explanation.complete.tolist(),
            identity_layers=explanation.identity_layers.tolist(),
            maps={
                reduction: explanation.saliency(reduction).float().cpu().numpy()
                for reduction in {one.reduction for one in asked}
            },
        )
        return computed.results(asked)


def _check_device(device: str) -> None:
    """Raises SettingsError where torch sees no such device."""
    import torch

    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in known:
        raise SettingsError(f"{PREFIX}DEVICE", device, f"a device that is here: {', '.join(known)}")


def _release_cached_memory() -> None:
    import torch

    memory.give_back()  # what malloc keeps of the failed batch is wanted elsewhere
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
