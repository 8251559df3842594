"""What is watched of predictions and explanations while they are answered; docs/watching.md says what it means.

Of every image the class and confidence; of every map made with the rule its figures, once it is answered. Of a few
images, drawn by lot and looked at after their answer where no other image waits: how far the map agrees with the plain
gradient's, and how far the class's channels are from where the table's images had them. Both go to the metrics and, as
counts, to the version's History. An answer is never changed by it, nor fails with it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from prometheus_client import Histogram

from parchgrad.evaluation.maps import agreement
from parchgrad.patterns import match
from parchgrad.render import REDUCTION_OF_POLARITY
from service import metrics
from service.class_labels import ClassLabels
from service.engine import PREDICTED, Array, DeviceMemoryError, Explained, Job, Result, is_out_of_memory
from service.repository import Served
from service.traffic_history import History, forget

if TYPE_CHECKING:
    from parchgrad.options import Options
    from service.pipeline import Outcome

log = logging.getLogger(__name__)

REST = 0.05  # seconds: the answer is written and sent before its image is looked at
MOST_PIXELS = 4_000_000  # of maps whose figures are not computed yet
NO_MEMORY_REST = 60.0  # seconds that a version is not looked at once there was no memory for it
SHARE_REST = 2.0  # seconds: so late the other workers know at most
FARTHEST = 100.0  # deviations: what lies beyond counts as this, or one absurd tensor would decide every mean
DEFAULT_REDUCTION = "mean_abs"


@dataclass(frozen=True)
class _Version:
    """What does not change while one version of a model serves."""

    default: Options  # the table's own
    default_layers: int  # that the rule acts in under them
    plain: Options  # the plain gradient
    rows: frozenset[int]  # classes that the table has a row for
    layer_names: tuple[str, ...]
    labels: ClassLabels
    history: History


@dataclass(frozen=True)
class _Map:
    """A map that was answered, and what its figures are observed under."""

    of: tuple[str, str, str]  # model, version, options
    result: Result
    layers: int  # that the rule was to act in
    history: History | None  # None: its options are not the table's own


@dataclass(frozen=True)
class _Image:
    """An image that was drawn: no more of it than is looked at."""

    tensor: Array
    saliency: Array | None  # only of a map under the table's own options
    asked: int  # class explained, or PREDICTED
    target: int  # class explained, or predicted


class Watch:
    """One worker's. Lives on the event loop; figures are computed in threads, what is drawn on the device of maps."""

    def __init__(self, rate: float, classes: int, busy: Callable[[], bool]) -> None:
        """`rate`: share of the images to look at; `busy`: whether any image waits, or the worker is to stop."""
        self._rate, self._classes, self._busy = rate, classes, busy
        self._lot = random.Random()  # of its own, from the system's entropy: no caller can foresee it
        self._versions: WeakKeyDictionary[Served, _Version] = WeakKeyDictionary()
        self._labels: dict[tuple[str, str], ClassLabels] = {}  # outlive a reload: the set stays closed
        self._histories: dict[tuple[str, str], History] = {}  # outlive a reload too
        self._task: asyncio.Task[str] | None = None
        self._maps: list[_Map] = []
        self._figures: asyncio.Task[None] | None = None
        self._sharing: asyncio.Task[None] | None = None
        self._resting: WeakKeyDictionary[Served, float] = WeakKeyDictionary()  # until when, on the loop's clock
        self._told: set[str] = set()  # what the log has been told

    def saw(self, served: Served, outcomes: Sequence[Outcome]) -> None:
        """Count what was made; called while the caller still holds its lease of the version. Computes nothing."""
        try:
            version = self._version(served)
            for outcome in outcomes:
                self._count(served, version, outcome)
            self._keep([one for outcome in outcomes for one in _maps(served, version, outcome)])
            for outcome in outcomes:
                if self._lot.random() < self._rate:
                    self._begin(served, version, outcome)
        except Exception:  # whatever it is: the answer is right without it
            self._tell("figures", "An image's figures could not be observed; it is answered all the same.")

    async def close(self) -> None:
        """Give up what is being looked at; the device ends the step it is in. What is kept of maps is forgotten."""
        tasks = [task for task in (self._task, self._figures, self._sharing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if (folder := metrics.workers_folder()) is not None:
            await asyncio.to_thread(forget, folder)

    def history(self, served: Served) -> History:
        """What was lately seen of a version in this worker."""
        return self._version(served).history

    def _version(self, served: Served) -> _Version:
        known = self._versions.get(served)
        if known is None:
            engine = served.engine
            default = engine.options({})
            key = served.name, served.version
            labels = self._labels.get(key)
            if labels is None or labels.labels != engine.model.labels:
                folder = metrics.workers_folder()
                labels = ClassLabels(engine.model.labels, self._classes, "/".join(key), folder)
                self._labels[key] = labels
            known = self._versions[served] = _Version(
                default=default,
                default_layers=len(match(engine.layer_names, default.layers)),
                plain=engine.options({"method": "gradient", "rule": False}),
                rows=frozenset(engine.table.classes),
                layer_names=tuple(engine.layer_names),
                labels=labels,
                history=self._history(served, match(engine.layer_names, default.layers)),
            )
        return known

    def _history(self, served: Served, layers: Sequence[str]) -> History:
        key = served.name, served.version
        identity = f"{served.engine.model.weights_sha256} {served.engine.table.table_sha256}"
        known = self._histories.get(key)
        if known is None or known.identity != identity:
            used = {id(version.history) for version in self._versions.values()}
            kept = {of: one for of, one in self._histories.items() if id(one) in used or not one.over}
            known = History(tuple(layers), self._classes, identity)
            self._histories = kept | {key: known}
        return known

    def _share(self) -> None:
        """Let the other workers know, a little later and all at once."""
        folder = metrics.workers_folder()
        if folder is not None and (self._sharing is None or self._sharing.done()):
            work = self._shared(folder)
            self._sharing = asyncio.get_running_loop().create_task(work, context=contextvars.Context())

    async def _shared(self, folder: Path) -> None:
        while todo := [(of, one) for of, one in self._histories.items() if one.changed]:
            await asyncio.sleep(SHARE_REST)
            try:
                for (name, version), one in todo:
                    await asyncio.to_thread(one.share, folder, f"{name}-{version}")
            except OSError:
                self._tell("traffic", "What was seen of the traffic could not be told to the other workers.")
                return  # with the next image it is tried again

    def _count(self, served: Served, version: _Version, outcome: Outcome) -> None:
        probabilities = outcome.first.probabilities
        index = int(probabilities.argmax())
        metrics.predicted.labels(served.name, served.version, version.labels.seen(index)).inc()
        metrics.confidence.labels(served.name, served.version).observe(float(probabilities[index]))

    def _keep(self, maps: list[_Map]) -> None:
        """Until they are answered, and their figures with them where the answer has them too."""
        pixels = sum(_pixels(one) for one in self._maps)
        if self._maps and pixels + sum(map(_pixels, maps)) > MOST_PIXELS:
            self._tell("maps", "More maps are made than their figures can be computed: those of some are left out.")
            return
        self._maps += maps
        if self._maps and (self._figures is None or self._figures.done()):
            work = self._observe_kept()
            self._figures = asyncio.get_running_loop().create_task(work, context=contextvars.Context())

    async def _observe_kept(self) -> None:
        while self._maps:
            await asyncio.sleep(REST)
            maps, self._maps = self._maps, []
            try:
                await asyncio.to_thread(_observe_maps, maps)
                self._share()
            except Exception:
                self._tell("figures", "The figures of maps that were answered could not be observed.")

    def _begin(self, served: Served, version: _Version, outcome: Outcome) -> None:
        """Look at the image once it is answered, unless another is being looked at, or there was no memory lately."""
        now = asyncio.get_running_loop().time()
        if (self._task is not None and not self._task.done()) or now < self._resting.get(served, 0.0):
            metrics.watched.labels(served.name, served.version, "skipped").inc()
            return
        lease = ExitStack()
        lease.enter_context(served.lease())  # now: the request's own may end before the task begins
        work = self._look(served, version, _drawn(version, outcome))
        # In the context of no request: its trace and its times have ended by then.
        self._task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())

        def ended(task: asyncio.Task[str]) -> None:
            """Also where it was cancelled before it began."""
            lease.close()
            result = "skipped" if task.cancelled() else task.result()
            metrics.watched.labels(served.name, served.version, result).inc()

        self._task.add_done_callback(ended)

    async def _look(self, served: Served, version: _Version, image: _Image) -> str:
        try:
            await asyncio.sleep(REST)
            return "skipped" if self._busy() else await self._watched(served, version, image)
        except Exception as error:
            if isinstance(error, DeviceMemoryError) or is_out_of_memory(error):
                self._resting[served] = asyncio.get_running_loop().time() + NO_MEMORY_REST
            self._tell("watch", "An image that was answered could not be looked at.")
            return "failed"

    async def _watched(self, served: Served, version: _Version, image: _Image) -> str:
        """`done`, or `skipped` where there is nothing that could be compared, or somebody waits by now."""
        engine, tensor, target, done = served.engine, image.tensor, image.target, False
        if image.saliency is not None:
            job = Job(tensor, Explained(image.asked, version.plain, DEFAULT_REDUCTION))
            (plain,) = await served.on_map_lane(lambda: engine.run([job]))
            if plain is not None and plain.saliency is not None:
                alike = await asyncio.to_thread(agreement, image.saliency, plain.saliency)
                _observe(metrics.map_gradient_agreement.labels(served.name, served.version), alike)
                version.history.mapped({"gradient_agreement": alike})
                done = True
        if engine.no_drift is not None:
            self._tell(f"drift {served.name}/{served.version}", f"No activation drift is watched: {engine.no_drift}")
        elif target in version.rows and not self._busy():
            drift = await served.on_map_lane(lambda: engine.drift(tensor, target))
            version.history.looked(target, drift)
            for layer, one in drift.items():
                labels = served.name, served.version, layer
                _observe(metrics.activation_distance.labels(*labels), min(one.distance, FARTHEST))
                _observe(metrics.activation_shift.labels(*labels), float(np.clip(one.shift, -FARTHEST, FARTHEST)))
            distances = [min(one.distance, FARTHEST) for one in drift.values()]
            if distances and np.isfinite(distances).all():
                labels = served.name, served.version, version.labels.of(target)
                metrics.class_activation_distance.labels(*labels).observe(sum(distances) / len(distances))
            done = True
        self._share()
        return "done" if done else "skipped"

    def _tell(self, what: str, message: str) -> None:
        """Log once a worker; with the exception, where one is being handled."""
        if what not in self._told:
            self._told.add(what)
            log.warning("%s It is said once.", message, exc_info=sys.exc_info()[0] is not None)


def _has_map(outcome: Outcome, result: Result) -> bool:
    """Whether there is a map of the rule's."""
    options = outcome.request.options
    return outcome.missing is None and options is not None and options.rule and result.saliency is not None


def _is_default(version: _Version, outcome: Outcome) -> bool:
    reduction = REDUCTION_OF_POLARITY[outcome.request.asked.polarity]
    return outcome.request.options == version.default and reduction == DEFAULT_REDUCTION


def _maps(served: Served, version: _Version, outcome: Outcome) -> list[_Map]:
    """The rule's maps of an outcome."""
    drawn = [result for result in outcome.results if _has_map(outcome, result)]
    if not drawn:
        return []
    options = outcome.request.options
    assert options is not None  # _has_map looked
    same = options.layers == version.default.layers
    layers = version.default_layers if same else len(match(version.layer_names, options.layers))
    default = _is_default(version, outcome)
    of = served.name, served.version, "default" if default else "other"
    return [_Map(of, result, layers, version.history if default else None) for result in drawn]


def _drawn(version: _Version, outcome: Outcome) -> _Image:
    first = outcome.first
    compared = _has_map(outcome, first) and _is_default(version, outcome)
    return _Image(
        tensor=outcome.prepared.tensor,
        saliency=first.saliency if compared else None,
        asked=first.target,
        target=int(first.probabilities.argmax()) if first.target == PREDICTED else first.target,
    )


def _pixels(one: _Map) -> int:
    return 0 if one.result.saliency is None else one.result.saliency.size


def _observe_maps(maps: Sequence[_Map]) -> None:
    """The figures of each map; of one without mass or with a value that is not finite, nothing."""
    for one in maps:
        figures = one.result.figures
        if figures is None or math.isnan(figures.gini):
            continue
        metrics.map_gini.labels(*one.of).observe(figures.gini)
        metrics.map_border_share.labels(*one.of).observe(figures.border_share)
        metrics.map_centroid.labels(*one.of, "x").observe(figures.x)
        metrics.map_centroid.labels(*one.of, "y").observe(figures.y)
        identity_share = one.result.identity_layers / one.layers
        metrics.map_identity_share.labels(*one.of).observe(identity_share)
        if one.history is not None:
            one.history.mapped(
                {
                    "gini": figures.gini,
                    "border_share": figures.border_share,
                    "centroid_x": figures.x,
                    "centroid_y": figures.y,
                    "identity_share": identity_share,
                }
            )


def _observe(histogram: Histogram, value: float) -> None:
    if math.isfinite(value):
        histogram.observe(value)
