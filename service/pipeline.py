"""The one path of data: encoded image -> tensor -> batch -> result. Every route, native or protocol, calls it.

Decoding has threads of its own under a pixel budget, the device one thread, and neither ever blocks the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL.Image import Image, Resampling

from parchgrad.render import REDUCTION_OF_POLARITY
from service import images, metrics
from service.batching import Batcher, DeadlineError, QueueFullError
from service.engine import PREDICTED, Engine, Explained, Job, Result
from service.errors import ServiceError, from_exception
from service.schemas import ImageOptions
from service.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from parchgrad.options import Options
    from parchgrad.preprocessing import Placement

log = logging.getLogger(__name__)

MAX_PICTURE_SIDE = 1024  # pixels: a picture of the map needs no more, whatever the photograph had


@dataclass(frozen=True)
class Request:
    """One image and what is asked of it, checked: `options` None = only predict; `deadline` on the loop's clock."""

    image: IO[bytes]
    asked: ImageOptions
    deadline: float
    options: "Options | None"
    target: int  # class index or PREDICTED
    draws: bool  # the answer needs a picture to draw on


@dataclass(frozen=True)
class Prepared:
    """A decoded image: the model's input, where it lies on the upright original, and what to draw on."""

    tensor: "Tensor"
    placement: "Placement"
    orientation: int
    backdrop: Image | None


@dataclass(frozen=True)
class Outcome:
    """All that is known of one image; `results` has one entry a map (k of them for `top:k`)."""

    request: Request
    prepared: Prepared
    results: list[Result]

    @property
    def first(self) -> Result:
        return self.results[0]


class Pipeline:
    """One worker's model with its queues. Loads in the device thread; until then, and if that fails, not ready."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine: Engine | None = None
        self.failure: str | None = None  # why it never became ready
        self._admitted = 0
        self._device = ThreadPoolExecutor(1, "device")
        self._decoders = ThreadPoolExecutor(settings.decode_workers, "decode")
        self._budget = images.PixelBudget(settings.max_image_pixels)
        self._batcher: Batcher[Job, Result] | None = None
        self._device.submit(self._load)

    @property
    def ready(self) -> bool:
        return self.engine is not None

    def require_engine(self) -> Engine:
        """The loaded engine. Raises ServiceError(not_ready)."""
        if self.engine is None:
            raise ServiceError("not_ready", self.failure or "The model is still loading.")
        return self.engine

    async def close(self) -> None:
        if self._batcher is not None:
            await self._batcher.close()
        metrics.ready.set(0)
        self.engine = None
        self._device.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def check(
        self, files: Sequence[IO[bytes]], asked: Sequence[ImageOptions], *, explain: bool, draw: bool, arrival: float
    ) -> list[Request]:
        """Hold every option against model and table, before anything is decoded. Raises what the library raises."""
        engine = self.require_engine()
        classes = len(engine.model.labels)
        requests = []
        for file, one in zip(files, asked, strict=True):
            timeout = one.timeout_ms or self.settings.timeout_ms
            for name, value, limit in (
                ("timeout_ms", timeout, self.settings.max_timeout_ms),
                ("top_k", one.top_k or 1, classes),
            ):
                if value > limit:
                    raise ServiceError(
                        "option_invalid", f"Option '{name}' is {value}; allowed: an integer in 1..{limit}."
                    )
            if (one.top_targets or 1) > classes:
                raise ServiceError(
                    "option_invalid", f"Option 'target' is {one.target!r}; the model has {classes} classes."
                )
            named = explain and one.target != "predicted" and one.top_targets is None
            requests.append(
                Request(
                    image=file,
                    asked=one,
                    deadline=arrival + timeout / 1000,
                    options=engine.options(one.explain) if explain else None,
                    target=engine.model.class_index(one.target) if named else PREDICTED,
                    draws=draw or (explain and one.saliency == "png"),
                )
            )
        return requests

    async def run(self, requests: Sequence[Request]) -> list[Outcome | ServiceError]:
        """Each image's outcome, or its own error; raises ServiceError(queue_full) for all of them together."""
        most = self.settings.max_queue
        jobs = sum(request.asked.top_targets or 1 for request in requests)
        if jobs > most:
            raise ServiceError("option_invalid", f"The request asks for {jobs} maps; allowed: at most {most}.")
        if self._admitted + jobs > most:
            raise ServiceError("queue_full", f"{self._admitted} images or maps are waiting, the most is {most}.")
        self._admitted += jobs
        try:
            return await asyncio.gather(*(self._outcome(request) for request in requests))
        finally:
            self._admitted -= jobs

    async def _outcome(self, request: Request) -> Outcome | ServiceError:
        try:
            async with asyncio.timeout_at(request.deadline):
                prepared = await asyncio.get_running_loop().run_in_executor(self._decoders, self._prepare, request)
                return Outcome(request, prepared, await self._results(request, prepared))
        except images.ImageError as error:
            return ServiceError(error.code, error.message)
        except QueueFullError:
            return ServiceError("queue_full", f"{self.settings.max_queue} images are waiting, the most that may.")
        except (DeadlineError, TimeoutError):
            milliseconds = request.asked.timeout_ms or self.settings.timeout_ms
            return ServiceError("deadline_exceeded", f"No answer within {milliseconds} ms.")
        except Exception as error:
            answer = from_exception(error)
            if answer.code == "internal":
                log.exception("An image failed for a reason of ours.")
            return answer

    async def _results(self, request: Request, prepared: Prepared) -> list[Result]:
        if request.options is None:
            return [await self._submit(Job(prepared.tensor), request.deadline)]
        targets = [request.target]
        if k := request.asked.top_targets:
            predicted = await self._submit(Job(prepared.tensor), request.deadline)
            targets = best(predicted.probabilities, k)
        reduction = REDUCTION_OF_POLARITY[request.asked.polarity]
        jobs = [Job(prepared.tensor, Explained(target, request.options, reduction)) for target in targets]
        tasks = [asyncio.ensure_future(self._submit(job, request.deadline)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed the image has failed: the others need not be computed
                task.cancel()

    async def _submit(self, job: Job, deadline: float) -> Result:
        if self._batcher is None:  # made here, where the event loop runs that it belongs to
            engine = self.require_engine()
            self._batcher = Batcher(
                engine.run,
                lambda job: job.group,
                self._device,
                capacity=engine.capacity,
                max_queue=self.settings.max_queue,
                max_delay=self.settings.max_delay_ms / 1000,
            )
        return await self._batcher.submit(job, deadline)

    def _prepare(self, request: Request) -> Prepared:
        start = time.perf_counter()
        data = request.image.read(self.settings.max_image_bytes + 1)
        encoded = images.inspect(data, self.settings.image_limits)
        with self._budget.hold(encoded.pixels):
            picture = encoded.decode()
            tensor, placement = self.require_engine().model.preprocessing.apply(picture.image)
            backdrop = _backdrop(picture.image, placement, *tensor.shape[-2:]) if request.draws else None
        metrics.decode_seconds.observe(time.perf_counter() - start)
        return Prepared(tensor, placement, picture.orientation, backdrop)

    def _load(self) -> None:
        try:
            engine = Engine(self.settings)
            if self.settings.self_test:
                engine.self_test()
        except Exception as error:  # the worker stays alive to say on /readyz and in its log what is wrong
            log.exception("The model was not loaded.")
            self.failure = f"The model was not loaded: {error}"
            return
        metrics.model_info.labels(
            engine.model.name, engine.model.version, engine.model.weights_sha256, engine.table.table_sha256
        ).set(1)
        metrics.ready.set(1)
        self.engine = engine


def best(probabilities: "np.ndarray[tuple[int], np.dtype[np.float32]]", k: int) -> list[int]:
    """Indices of the k largest, largest first; ties go to the lower index, as arg-max has it."""
    return [int(i) for i in np.argsort(-probabilities, kind="stable")[:k]]


def _backdrop(image: Image, placement: "Placement", height: int, width: int) -> Image:
    """What the model saw of the original: at its own resolution up to MAX_PICTURE_SIDE, and no less than the map's."""
    left, top, right, bottom = placement.crop_box
    box = (max(0.0, left), max(0.0, top), min(image.width, right), min(image.height, bottom))
    scale = min(1.0, MAX_PICTURE_SIDE / max(box[2] - box[0], box[3] - box[1]))
    size = max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale))
    if size[0] < width or size[1] < height:
        size = width, height
    return image.resize(size, Resampling.BILINEAR, box=box, reducing_gap=3.0)
