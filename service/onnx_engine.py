"""An exported graph, model and table in one file, on ONNX Runtime. Neither it nor what it imports knows torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parchgrad.errors import ModelError, UnsupportedModelError
from service import memory
from service.engine import Array, Computed, Job, Result, Room, Wanted, attempted, columns, within_memory
from service.settings import PREFIX, Settings, SettingsError

if TYPE_CHECKING:
    from parchgrad.attacks.attack import Attack
    from parchgrad.attacks.comparison import Attacked
    from parchgrad.drift import LayerDrift
    from parchgrad.layer_views import NetworkView
    from parchgrad.options import Options


class OnnxEngine:
    """See service.engine.Engine. Raises what the library raises when the file is not right."""

    platform = "onnxruntime_onnx"

    def __init__(
        self, settings: Settings, name: str, version: str, check: Callable[[bytes], None] | None = None
    ) -> None:
        """`check` the file's content, before anything is made of it. Raises what `check` raises, and SettingsError
        where ONNX Runtime has no such device."""
        from parchgrad.runtimes.onnx_runtime import OnnxExplainer

        path = settings.graph(name, version)
        if not path.is_file():
            raise ModelError(f"There is no graph '{path}'; 'parchgrad export {name} --format triton' writes one.")
        providers = _providers(settings.device)
        content = path.read_bytes()  # once: what is made of it later is of what was checked, whatever lies there then
        if check is not None:
            check(content)
        self.explainer = OnnxExplainer(path, threads=settings.threads or None, providers=providers, content=content)
        del content
        memory.give_back()  # what opening took: else the next opening has it beside its own
        self.model, self.table = self.explainer.model, self.explainer.table
        held = f"{self.model.name}/{self.model.version}"
        if held != f"{name}/{version}":
            raise ModelError(f"Graph '{path}' holds model '{held}', expected '{name}/{version}'.")
        # What predicts alone, and what is watched, is made when it is first asked: now, and not while a request waits.
        self.explainer.prepare(drift=settings.watch_rate > 0, after_each=memory.give_back)
        self.explainer.predict(np.zeros((1, 3, *self.model.preprocessing.size), np.float32))
        self._room = Room(settings.max_batch, settings.batch_pixels)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self.explainer.graph.layers  # in the order of the columns of the graph's own `quantile`

    @property
    def defaults(self) -> dict[str, Any]:
        return self.table.defaults.to_json() | {"seed": self.explainer.graph.seed}

    @property
    def cannot(self) -> dict[str, str]:
        from parchgrad.runtimes.onnx_runtime import METHODS

        graph, absent = self.explainer.graph, "not with an exported graph"
        return {
            "method": ", ".join(METHODS),
            "seed": graph.seed,
            "conserve": graph.conserve,
            "selection": "class",
            "alpha": absent,
            "normality_filter": "false",
            **dict.fromkeys(("samples", "noise", "noise_seed"), absent),
        }

    @property
    def device(self) -> str:
        return self.explainer.device

    @property
    def runtime(self) -> str:
        return self.explainer.runtime

    @property
    def no_drift(self) -> str | None:
        return self.explainer.no_drift

    @property
    def no_network(self) -> str | None:
        return f"'{self.model.name}' is served from an exported graph, which shows its logits and its map and no layers"

    def drift(self, tensor: Array, target: int) -> Mapping[str, LayerDrift]:
        (drift,) = within_memory(lambda: self.explainer.drift(tensor[None], [target]), 1, memory.give_back)
        return drift

    def layers(self, tensor: Array, target: int, options: Options, channels: int, order: str) -> NetworkView:
        raise UnsupportedModelError(f"Layers: {self.no_network}.")

    def attack(
        self, tensor: Array, attack: Attack, options: Options, reduction: str, most: int, wanted: Callable[[], bool]
    ) -> Attacked:
        raise UnsupportedModelError(f"An attack: {self.no_network}.")

    def self_test(self) -> None:
        self.explainer.self_test()

    def options(self, given: Mapping[str, Any]) -> Options:
        from parchgrad.options import per_image
        from parchgrad.patterns import match

        (options,) = per_image(1, self.table.defaults, {"seed": self.explainer.graph.seed, **given})
        match(self.layer_names, options.layers)
        self.explainer.require_statistics([options])
        return options

    def capacity(self, job: Job) -> int:
        return self._room.capacity(job)

    def run(self, jobs: Sequence[Job], wanted: Wanted | None = None) -> list[Result | None]:
        return attempted(lambda: self._run(jobs, wanted), len(jobs), memory.give_back)

    def _run(self, jobs: Sequence[Job], wanted: Wanted | None) -> list[Result | None]:
        from parchgrad.runtimes.array_explanation import softmax

        images = np.stack([job.tensor for job in jobs])
        asked = [job.explained for job in jobs if job.explained is not None]
        if not asked:
            logits = self.explainer.predict(images)
            return [Result(row, each) for row, each in zip(logits, softmax(logits), strict=True)]
        explanation = self.explainer.explain(
            images,
            [one.target for one in asked],
            uncovered="nan",
            wanted=wanted,
            pixels_per_pass=self._room.pixels,
            **columns(asked),
        )
        computed = Computed(
            logits=explanation.logits,
            probabilities=explanation.probabilities(),
            targets=explanation.targets.tolist(),
            covered=explanation.covered.tolist(),
            complete=explanation.complete.tolist(),
            identity_layers=explanation.identity_layers.tolist(),
            maps={reduction: explanation.saliency(reduction) for reduction in {one.reduction for one in asked}},
        )
        return computed.results(asked)


def _providers(device: str) -> list[str]:
    """Raises SettingsError where ONNX Runtime has no such device."""
    import onnxruntime

    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        allowed = "a device that is here: cpu; this ONNX Runtime has no CUDA"
        raise SettingsError(f"{PREFIX}DEVICE", device, allowed)
    if device not in ("cuda", "cuda:0"):
        raise SettingsError(f"{PREFIX}DEVICE", device, "cpu, cuda or cuda:0 where an exported graph runs")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
