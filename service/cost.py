"""What a map costs beside a prediction, live: device seconds an image of each kind, of one version of a model."""

from collections.abc import Sequence

from service import metrics
from service.engine import Job

DECAY = 0.95  # a batch: the last twenty or so make the figure


class Mean:
    """Seconds an image, each image of a batch weighing `DECAY` times one of the next batch."""

    def __init__(self) -> None:
        self._sums = 0.0, 0.0  # seconds and images: one object, as another thread reads it

    def add(self, seconds: float, images: int) -> None:
        before = self._sums
        self._sums = DECAY * before[0] + seconds, DECAY * before[1] + images

    @property
    def value(self) -> float | None:
        """None before the first batch, and where the clock saw no time pass."""
        seconds, images = self._sums
        return seconds / images if seconds else None


class Cost:
    """Of one version in this worker. Maps of several passes do not count: their price is their own number of passes.

    Predictions and maps have a thread each, so that each mean has one writer; either may find the other's a batch old.
    """

    def __init__(self, model: str, version: str) -> None:
        self._model, self._version = model, version
        self._means = {"predict": Mean(), "explain": Mean()}

    def add(self, jobs: Sequence[Job], seconds: float) -> None:
        """One batch that was computed whole."""
        if jobs[0].passes != 1:
            return
        self._means[jobs[0].group[0]].add(seconds, len(jobs))
        predicted, explained = self._means["predict"].value, self._means["explain"].value
        if predicted and explained:
            metrics.explain_cost_ratio.labels(self._model, self._version).set(explained / predicted)
