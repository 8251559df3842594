"""What is watched of predictions and explanations while they are answered; docs/watching.md says what it means.

Of every image the class and confidence, of every map made with the rule its figures. Of a few images, drawn by lot and
looked at after their answer where no other image waits: how far the map agrees with the plain gradient's, and how far
the class's channels are from where the table's images had them. An answer is never changed by it, nor fails with it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from prometheus_client import Histogram

from parchgrad.evaluation.maps import agreement
from parchgrad.patterns import match
from parchgrad.render import REDUCTION_OF_POLARITY
from service import metrics
from service.engine import PREDICTED, Explained, Job, Result
from service.repository import Served

if TYPE_CHECKING:
    from parchgrad.options import Options
    from service.pipeline import Outcome

log = logging.getLogger(__name__)

SEEN = 10  # times a class is predicted before it has a label of its own
OTHER = "other"
REST = 0.05  # seconds: the answer is written and sent before its image is looked at
FARTHEST = 100.0  # deviations: what lies beyond counts as this, or one absurd tensor would decide every mean
DEFAULT_REDUCTION = "mean_abs"


class ClassLabels:
    """The label of each class of one model, a closed set: the first `most` classes seen often, and `other`."""

    def __init__(self, labels: Sequence[str], most: int) -> None:
        self._labels, self._most = labels, most
        self._times = Counter((*labels, OTHER))
        self._seen: Counter[int] = Counter()
        self._named: dict[int, str] = {}

    def seen(self, index: int) -> str:
        """The class's label, which it may get by being seen this time."""
        if index not in self._named and len(self._named) < self._most:
            self._seen[index] += 1
            if self._seen[index] >= SEEN:
                name = self._labels[index]
                # Two classes of one name are two, and a class named `other` is not the others.
                self._named[index] = name if self._times[name] == 1 else f"{name} ({index})"
        return self.of(index)

    def of(self, index: int) -> str:
        """The class's label as it is now."""
        return self._named.get(index, OTHER)


@dataclass(frozen=True)
class _Version:
    """What does not change while one version of a model serves."""

    default: Options  # the table's own
    default_layers: int  # that the rule acts in under them
    plain: Options  # the plain gradient
    rows: frozenset[int]  # classes that the table has a row for
    labels: ClassLabels


class Watch:
    """One worker's. Lives on the event loop; figures are computed in threads, what is drawn on the device of maps."""

    def __init__(self, rate: float, classes: int, busy: Callable[[], bool]) -> None:
        """`rate`: share of the images to look at; `busy`: whether any image waits, or the worker is to stop."""
        self._rate, self._classes, self._busy = rate, classes, busy
        self._lot = random.Random()  # of its own, from the system's entropy: no caller can foresee it
        self._versions: WeakKeyDictionary[Served, _Version] = WeakKeyDictionary()
        self._labels: dict[tuple[str, str], ClassLabels] = {}  # outlive a reload: the set stays closed
        self._task: asyncio.Task[str] | None = None
        self._told: set[str] = set()  # what the log has been told

    async def saw(self, served: Served, outcomes: Sequence[Outcome]) -> None:
        """Count what was made; called while the caller still holds its lease of the version."""
        try:
            version = self._version(served)
            for outcome in outcomes:
                self._count(served, version, outcome)
            drawn = [(one, result) for one in outcomes for result in one.results if _has_map(one, result)]
            if drawn:
                await asyncio.to_thread(_observe_maps, served, version, drawn)
            for outcome in outcomes:
                if self._lot.random() < self._rate:
                    self._begin(served, version, outcome)
        except Exception:  # whatever it is: the answer is right without it
            self._tell("figures", "An image's figures could not be observed; it is answered all the same.")

    async def close(self) -> None:
        """Give up what is being looked at; the device ends the step it is in."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _version(self, served: Served) -> _Version:
        known = self._versions.get(served)
        if known is None:
            engine = served.engine
            default = engine.options({})
            key = served.name, served.version
            labels = self._labels.get(key)
            if labels is None or labels._labels != engine.model.labels:
                labels = self._labels[key] = ClassLabels(engine.model.labels, self._classes)
            known = self._versions[served] = _Version(
                default=default,
                default_layers=len(match(engine.layer_names, default.layers)),
                plain=engine.options({"method": "gradient", "rule": False}),
                rows=frozenset(engine.table.classes),
                labels=labels,
            )
        return known

    def _count(self, served: Served, version: _Version, outcome: Outcome) -> None:
        probabilities = outcome.first.probabilities
        index = int(probabilities.argmax())
        metrics.predicted.labels(served.name, served.version, version.labels.seen(index)).inc()
        metrics.confidence.labels(served.name, served.version).observe(float(probabilities[index]))

    def _begin(self, served: Served, version: _Version, outcome: Outcome) -> None:
        """Look at the image once it is answered, unless another is being looked at."""
        if self._task is not None and not self._task.done():
            metrics.watched.labels(served.name, served.version, "skipped").inc()
            return
        lease = ExitStack()
        lease.enter_context(served.lease())  # now: the request's own may end before the task begins
        work = self._look(served, version, outcome)
        # In the context of no request: its trace and its times have ended by then.
        self._task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())

        def ended(task: asyncio.Task[str]) -> None:
            """Also where it was cancelled before it began."""
            lease.close()
            result = "skipped" if task.cancelled() else task.result()
            metrics.watched.labels(served.name, served.version, result).inc()

        self._task.add_done_callback(ended)

    async def _look(self, served: Served, version: _Version, outcome: Outcome) -> str:
        try:
            await asyncio.sleep(REST)
            return "skipped" if self._busy() else await self._watched(served, version, outcome)
        except Exception:
            self._tell("watch", "An image that was answered could not be looked at.")
            return "failed"

    async def _watched(self, served: Served, version: _Version, outcome: Outcome) -> str:
        """`done`, or `skipped` where there is nothing that could be compared."""
        engine, tensor = served.engine, outcome.prepared.tensor
        first, done = outcome.first, False
        if first.saliency is not None and _has_map(outcome, first) and _is_default(version, outcome):
            job = Job(tensor, Explained(first.target, version.plain, DEFAULT_REDUCTION))
            (plain,) = await served.on_map_lane(lambda: engine.run([job]))
            if plain is not None and plain.saliency is not None:
                alike = await asyncio.to_thread(agreement, first.saliency, plain.saliency)
                _observe(metrics.map_gradient_agreement.labels(served.name, served.version), alike)
                done = True
        target = int(first.probabilities.argmax()) if first.target == PREDICTED else first.target
        if engine.no_drift is not None:
            self._tell(f"drift {served.name}/{served.version}", f"No activation drift is watched: {engine.no_drift}")
        elif target in version.rows:
            drift = await served.on_map_lane(lambda: engine.drift(tensor, target))
            for layer, one in drift.items():
                labels = served.name, served.version, layer
                _observe(metrics.activation_distance.labels(*labels), min(one.distance, FARTHEST))
                _observe(metrics.activation_shift.labels(*labels), float(np.clip(one.shift, -FARTHEST, FARTHEST)))
            distances = [min(one.distance, FARTHEST) for one in drift.values()]
            if distances and np.isfinite(distances).all():
                labels = served.name, served.version, version.labels.of(target)
                metrics.class_activation_distance.labels(*labels).observe(sum(distances) / len(distances))
            done = True
        return "done" if done else "skipped"

    def _tell(self, what: str, message: str) -> None:
        """Log once a worker; with the exception, where one is being handled."""
        if what not in self._told:
            self._told.add(what)
            log.warning("%s It is said once.", message, exc_info=True if what in ("figures", "watch") else None)


def _has_map(outcome: Outcome, result: Result) -> bool:
    """Whether there is a map of the rule's."""
    options = outcome.request.options
    return outcome.missing is None and options is not None and options.rule and result.saliency is not None


def _is_default(version: _Version, outcome: Outcome) -> bool:
    reduction = REDUCTION_OF_POLARITY[outcome.request.asked.polarity]
    return outcome.request.options == version.default and reduction == DEFAULT_REDUCTION


def _observe_maps(served: Served, version: _Version, drawn: Sequence[tuple[Outcome, Result]]) -> None:
    """The figures of each map; of one without mass or with a value that is not finite, nothing."""
    for outcome, result in drawn:
        options = outcome.request.options
        assert options is not None  # _has_map looked
        figures = result.figures
        if figures is None or math.isnan(figures.gini):
            continue
        labels = served.name, served.version, "default" if _is_default(version, outcome) else "other"
        metrics.map_gini.labels(*labels).observe(figures.gini)
        metrics.map_border_share.labels(*labels).observe(figures.border_share)
        metrics.map_centroid.labels(*labels, "x").observe(figures.x)
        metrics.map_centroid.labels(*labels, "y").observe(figures.y)
        same = options.layers == version.default.layers
        layers = version.default_layers if same else len(match(served.engine.layer_names, options.layers))
        metrics.map_identity_share.labels(*labels).observe(result.identity_layers / layers)


def _observe(histogram: Histogram, value: float) -> None:
    if math.isfinite(value):
        histogram.observe(value)
