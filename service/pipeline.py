"""The one path of data: encoded image -> tensor -> batch -> result. Every route, native or protocol, calls it.

Decoding has threads of its own under a pixel budget, predictions and maps one each, and none ever blocks the event
loop. A prediction is answered even where its map is not: the caller asked for it on a condition, the queue is too
long, or the map would come too late.
"""

import asyncio
import contextvars
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from PIL.Image import Image as Pixels
from PIL.Image import Resampling

from parchgrad.errors import UnknownTargetError
from parchgrad.labels import nearest
from parchgrad.render import REDUCTION_OF_POLARITY
from service import device_memory, images, metrics, tracing
from service.audit import Audit
from service.batching import DeadlineError, QueueFullError
from service.body import BodyMemory
from service.engine import (
    PREDICTED,
    Array,
    DeviceMemoryError,
    Explained,
    Job,
    Result,
    ServedModel,
    is_out_of_memory,
)
from service.errors import ServiceError, from_exception
from service.fleet import Fleet
from service.repository import Served
from service.schemas import ExplainWhen, ImageOptions
from service.settings import Settings
from service.watching import Watch

if TYPE_CHECKING:
    from parchgrad.options import Options
    from parchgrad.preprocessing import Placement

log = logging.getLogger(__name__)

T = TypeVar("T")
Found = TypeVar("Found")

MAX_PICTURE_SIDE = 1024  # pixels: a picture of the map needs no more, whatever the photograph had
MAX_STRIP_SIDE = 4096  # pixels: but a narrow one is to be as wide as its map
LAG_SLEEP = 0.01  # seconds
MAP_SHARE = 0.8  # of an image's time; what remains is for the prediction without its map

Image: TypeAlias = IO[bytes] | Array  # an encoded file, or a normalised float32 tensor (3, h, w)


@dataclass(frozen=True)
class Origin:
    """Who asked: the route's template, the request's id, and the name of the caller's key where there is one."""

    route: str
    request_id: str
    caller: str | None = None


@dataclass(frozen=True)
class Request:
    """One image and what is asked of it, checked: `options` None = only predict; deadlines on the loop's clock."""

    image: Image
    asked: ImageOptions
    deadline: float
    map_deadline: float
    options: "Options | None"
    target: int  # class index or PREDICTED
    when_classes: frozenset[int]  # the classes of `explain_when`, as indices
    draws: bool  # the answer needs a picture to draw on


@dataclass(frozen=True)
class Prepared:
    """A decoded image: the model's input, where it lies on the upright original, and what to draw on."""

    tensor: Array
    placement: "Placement | None"  # None where the caller sent the model's input itself
    orientation: int
    backdrop: Pixels | None
    sha256: str  # of the encoded file; of the tensor's bytes where there was none


@dataclass(frozen=True)
class MissingMap:
    """Why there is a prediction and no map."""

    status: Literal["skipped", "shed", "timeout"]
    reason: str


@dataclass(frozen=True)
class Outcome:
    """All that is known of one image; `results` has one entry a map (k of them for `top:k`).

    Where `missing` says why there is no map, it has one entry: the prediction.
    """

    request: Request
    prepared: Prepared
    results: list[Result]
    missing: MissingMap | None = None

    @property
    def first(self) -> Result:
        return self.results[0]


class Pipeline:
    """One worker's models, decoders and limits. Not ready until the models are loaded, nor once it drains."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self.fleet = Fleet(settings, metrics.workers_folder(), self._tell_ready)
        self.repository = self.fleet.repository
        self.bodies = BodyMemory(settings.max_bodies_bytes)
        self._audit = Audit(settings)
        self._watches: list[asyncio.Task[None]] = []
        self._explanations = Watch(settings.watch_rate, settings.watch_classes, self._busy)
        self._admitted = 0
        self._decoders = ThreadPoolExecutor(settings.decode_workers, "decode")
        self._budget = images.PixelBudget(settings.max_image_pixels)

    async def start(self) -> None:
        """Load the models, and begin what else lives on the event loop; the server listens once this has returned."""
        self.repository.start()
        self.fleet.start()
        watches = _watch_loop(), device_memory.watch(self._torch_devices)
        self._watches = [asyncio.get_running_loop().create_task(watch) for watch in watches]
        await self.fleet.wait_behind_others()

    @property
    def ready(self) -> bool:
        return self.repository.ready and not self.draining

    @property
    def watch(self) -> Watch:
        """What is watched of this worker's answers."""
        return self._explanations

    def drain(self) -> None:
        """Be ready no more; requests are answered as before."""
        self.draining = True
        self._tell_ready()

    def _tell_ready(self) -> None:
        metrics.ready.set(int(self.ready))

    async def close(self) -> None:
        self.drain()
        for watch in self._watches:
            watch.cancel()
        await self._explanations.close()
        await self.fleet.close()
        await self.repository.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._audit.close)

    def _busy(self) -> bool:
        """Whether an image waits for a device thread, which all models share, or none is to be given more to do."""
        return self.draining or any(one.waiting for one in self.repository.listing())

    def _torch_devices(self) -> list[str]:
        """`cpu` or `cuda:N`, where torch runs a model."""
        devices = [one.engine.device for one in self.repository.listing() if one.engine.runtime.startswith("torch ")]
        return ["cuda:0" if device == "cuda" else device for device in devices]

    def check(
        self,
        served: Served,
        images: Sequence[Image],
        asked: Sequence[ImageOptions],
        *,
        explain: bool,
        draw: bool,
        arrival: float,
    ) -> list[Request]:
        """Hold every option against model and table, before anything is decoded. Raises what the library raises."""
        known: dict[str, Request] = {}  # one set of options is held against the model once
        requests = []
        for image, one in zip(images, asked, strict=True):
            if (key := repr(one)) not in known:
                known[key] = self._checked(served, image, one, explain=explain, draw=draw, arrival=arrival)
            requests.append(replace(known[key], image=image))
        return requests

    def _checked(
        self, served: Served, image: Image, asked: ImageOptions, *, explain: bool, draw: bool, arrival: float
    ) -> Request:
        engine, model, settings = served.engine, served.engine.model, self.settings
        classes = len(model.labels)
        timeout = asked.timeout_ms or settings.timeout_ms
        for name, value, limit in (
            ("timeout_ms", timeout, settings.max_timeout_ms),
            ("explain_timeout_ms", asked.explain_timeout_ms or 1, settings.max_timeout_ms),
            ("top_k", asked.top_k or 1, classes),
        ):
            if value > limit:
                raise ServiceError("option_invalid", f"Option '{name}' is {value}; allowed: an integer in 1..{limit}.")
        if (asked.top_targets or 1) > classes:
            raise ServiceError(
                "option_invalid", f"Option 'target' is {asked.target!r}; the model has {classes} classes."
            )
        named = explain and asked.target != "predicted" and asked.top_targets is None
        when = asked.explain_when
        map_timeout = asked.explain_timeout_ms or MAP_SHARE * timeout
        return Request(
            image=image,
            asked=asked,
            deadline=arrival + timeout / 1000,
            map_deadline=arrival + min(map_timeout, timeout) / 1000,
            options=engine.options(asked.explain) if explain else None,
            target=class_index(model, asked.target, "'target' is", ", predicted or top:k") if named else PREDICTED,
            when_classes=frozenset(
                class_index(model, name, "'explain_when' names") for name in (when.classes if when else ())
            ),
            draws=draw or (explain and asked.saliency == "png"),
        )

    async def run(self, served: Served, requests: Sequence[Request], origin: Origin) -> list[Outcome | ServiceError]:
        """Each image's outcome, or its own error; raises ServiceError(queue_full) for all of them together."""
        most, bound = self.settings.max_queue, self.settings.shed_bound
        jobs = sum(request.asked.top_targets or 1 for request in requests)
        if jobs > most:
            raise ServiceError("option_invalid", f"The request asks for {jobs} maps; allowed: at most {most}.")
        # One prediction an image still fits where its maps no longer do.
        too_much = self._admitted >= bound or self._admitted + jobs > most
        shed = too_much and any(request.options for request in requests)
        jobs = len(requests) if shed else jobs
        if self._admitted + jobs > most:
            raise ServiceError("queue_full", f"{self._admitted} images or maps are waiting, the most is {most}.")
        missing = MissingMap("shed", f"{self._admitted} images or maps are waiting.") if shed else None
        self._admitted += jobs
        metrics.admitted.inc(jobs)
        try:
            outcomes = await asyncio.gather(*(self._outcome(served, request, missing) for request in requests))
            for outcome in outcomes:
                if isinstance(outcome, Outcome) and outcome.missing:
                    metrics.maps_missing.labels(served.name, served.version, outcome.missing.status).inc()
            self._explanations.saw(served, [one for one in outcomes if isinstance(one, Outcome)])
            await self._audit.record(origin, served, outcomes)  # admitted still: a slow log must not let more in
        finally:
            self._admitted -= jobs
            metrics.admitted.dec(jobs)
        return outcomes

    async def look(
        self, served: Served, request: Request, look: Callable[[Prepared], tuple[Result, Found]], origin: Origin
    ) -> tuple[Outcome, Found]:
        """What `look` finds in one image, in the device thread of maps: admitted, decoded, timed and written down like
        any image, and not watched, as it is no explanation. Where others' maps are shed it is refused.

        Raises ServiceError. What has not begun when the caller leaves, or its time is up, never does.
        """
        most = self.settings.max_queue
        if self._admitted >= most:
            raise ServiceError("queue_full", f"{self._admitted} images or maps are waiting, the most is {most}.")
        if self._admitted >= self.settings.shed_bound:
            raise ServiceError("map_shed", f"{self._admitted} images or maps are waiting.")
        self._admitted += 1
        metrics.admitted.inc()
        try:
            found = await self._held(request, self._looked(served, request, look))
            outcome = found if isinstance(found, ServiceError) else found[0]
            await self._audit.record(origin, served, [outcome])
        finally:
            self._admitted -= 1
            metrics.admitted.dec()
        if isinstance(found, ServiceError):
            raise found
        return found

    async def _looked(
        self, served: Served, request: Request, look: Callable[[Prepared], tuple[Result, Found]]
    ) -> tuple[Outcome, Found]:
        prepared = await self._prepared(served, request)
        result, found = await served.on_map_lane(partial(look, prepared))
        _require_finite(result)
        return Outcome(request, prepared, [result]), found

    async def change(self, origin: Origin, name: str, *, served: bool) -> None:
        """Load or unload a model in every worker, and write down who asked for it. Raises ServiceError."""
        result = "ok"
        try:
            await (self.fleet.load(name) if served else self.fleet.unload(name))
        except ServiceError as error:
            result = error.code
            raise
        finally:
            await self._audit.record_change(origin, name, served=served, result=result)

    async def _outcome(self, served: Served, request: Request, missing: MissingMap | None) -> Outcome | ServiceError:
        return await self._held(request, self._answered(served, request, missing))

    async def _answered(self, served: Served, request: Request, missing: MissingMap | None) -> Outcome:
        prepared = await self._prepared(served, request)
        if request.options is None:
            outcome = Outcome(request, prepared, [await _predicted(served, request, prepared)])
        else:
            outcome = await _explained(served, request, request.options, prepared, missing)
        _require_finite(outcome.first)
        return outcome

    async def _held(self, request: Request, work: Coroutine[Any, Any, T]) -> T | ServiceError:
        """`work` held to the image's deadline, and what it raises as the error that the caller is told."""
        try:
            async with asyncio.timeout_at(request.deadline):
                return await work
        except images.ImageError as error:
            return ServiceError(error.code, error.message)
        except QueueFullError:
            return ServiceError("queue_full", f"{self.settings.max_queue} images are waiting, the most that may.")
        except DeviceMemoryError as error:
            return ServiceError("out_of_memory", str(error))
        except (DeadlineError, TimeoutError):
            milliseconds = request.asked.timeout_ms or self.settings.timeout_ms
            return ServiceError("deadline_exceeded", f"No answer within {milliseconds} ms.")
        except Exception as error:
            if is_out_of_memory(error):
                return ServiceError("out_of_memory", "There is not the memory to decode this image now.")
            answer = from_exception(error)
            if answer.code == "internal":
                log.exception("An image failed for a reason of ours.")
            return answer

    async def _prepared(self, served: Served, request: Request) -> Prepared:
        decode = partial(tracing.called, "decode", self._prepare, served, request)
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._decoders, run, decode)

    def _prepare(self, served: Served, request: Request) -> Prepared:
        start = time.perf_counter()
        if isinstance(request.image, np.ndarray):
            return Prepared(request.image, None, 1, None, hashlib.sha256(request.image.tobytes()).hexdigest())
        data = request.image.read(self.settings.max_image_bytes + 1)
        encoded = images.inspect(data, self.settings.image_limits)
        tracing.note("image.pixels", encoded.pixels)
        with self._budget.hold(encoded.pixels):
            picture = encoded.decode()
            tensor, placement = served.engine.model.preprocessing.array(picture.image)
            backdrop = _backdrop(picture.image, placement, *tensor.shape[-2:]) if request.draws else None
        digest = hashlib.sha256(data).hexdigest()
        metrics.decode_seconds.labels(served.name, served.version).observe(time.perf_counter() - start)
        return Prepared(tensor, placement, picture.orientation, backdrop, digest)


def _require_finite(result: Result) -> None:
    """Raises ServiceError(prediction_not_finite)."""
    if not np.isfinite(result.logits).all():
        raise ServiceError("prediction_not_finite", "The model's output overflows float32 for this input.")


def class_index(model: ServedModel, text: str, option_is: str, also: str = "") -> int:
    """The class that an option's text names; `also`: what else it may say. Raises ServiceError(unknown_class)."""
    try:
        return model.class_index(text)
    except UnknownTargetError:
        similar = nearest(text, model.labels)
        allowed = f"an index in 0..{len(model.labels) - 1}, a class name or id{also}"
        hint = f" Did you mean {similar!r}?" if similar else ""
        message = f"Option {option_is} {text[:64]!r}; allowed: {allowed}.{hint}"
    raise ServiceError("unknown_class", message)


async def _watch_loop() -> None:
    """How long the event loop is held: a sleep that ends late was kept waiting."""
    clock = asyncio.get_running_loop().time
    while True:
        start = clock()
        await asyncio.sleep(LAG_SLEEP)
        metrics.loop_lag_seconds.observe(max(0.0, clock() - start - LAG_SLEEP))


async def _predicted(served: Served, request: Request, prepared: Prepared) -> Result:
    return await served.submit(Job(prepared.tensor), request.deadline)


async def _explained(
    served: Served, request: Request, options: "Options", prepared: Prepared, missing: MissingMap | None
) -> Outcome:
    """The maps asked for, or the prediction and why they are missing."""
    when, k = request.asked.explain_when, request.asked.top_targets
    predicted: Result | None = None
    if missing is None and (k or (when and not _sampled(when, prepared.sha256))):
        predicted = await _predicted(served, request, prepared)
        if when:
            missing = _skipped(when, request.when_classes, predicted, prepared.sha256)
    if missing is None:
        targets = best(predicted.probabilities, k) if predicted and k else [request.target]
        try:
            return Outcome(request, prepared, await _maps(served, request, options, prepared, targets))
        except DeadlineError:
            missing = MissingMap("timeout", "The map was not done in its share of the time.")
        except DeviceMemoryError as error:
            missing = MissingMap("shed", str(error))
    return Outcome(request, prepared, [predicted or await _predicted(served, request, prepared)], missing)


async def _maps(
    served: Served, request: Request, options: "Options", prepared: Prepared, targets: Sequence[int]
) -> list[Result]:
    """One result a target. Raises DeadlineError where any is not there at the maps' deadline."""
    reduction = REDUCTION_OF_POLARITY[request.asked.polarity]
    jobs = [Job(prepared.tensor, Explained(target, options, reduction)) for target in targets]
    tasks = [asyncio.ensure_future(served.submit(job, request.map_deadline)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # where one failed the image has failed: the others need not be computed
            task.cancel()


def _skipped(when: ExplainWhen, classes: frozenset[int], predicted: Result, sha256: str) -> MissingMap | None:
    """None where any of the conditions given holds, else why no map is made."""
    if _sampled(when, sha256):
        return None
    index = int(predicted.probabilities.argmax())
    confidence = float(predicted.probabilities[index])
    reasons = []
    if when.confidence_below is not None:
        if confidence < when.confidence_below:
            return None
        reasons.append(f"the confidence {confidence:.6g} is not below {when.confidence_below:g}")
    if classes:
        if index in classes:
            return None
        reasons.append(f"class {index} is not one of those to explain")
    if when.sample_rate is not None:
        reasons.append(f"the image is not in the sample of {when.sample_rate:g}")
    return MissingMap("skipped", f"Not explained: {'; '.join(reasons)}.")


def _sampled(when: ExplainWhen, sha256: str) -> bool:
    """Decided by the image itself, so that asking again decides the same."""
    return when.sample_rate is not None and int(sha256[:16], 16) < when.sample_rate * 2**64


def best(probabilities: "np.ndarray[tuple[int], np.dtype[np.float32]]", k: int) -> list[int]:
    """Indices of the k largest, largest first; ties go to the lower index, as arg-max has it."""
    return [int(i) for i in np.argsort(-probabilities, kind="stable")[:k]]


def _backdrop(image: Pixels, placement: "Placement", height: int, width: int) -> Pixels:
    """What the model saw of the original, in its own aspect: at its resolution up to MAX_PICTURE_SIDE, and no less
    than the map's up to MAX_STRIP_SIDE."""
    left, top, right, bottom = placement.crop_box
    box = (max(0.0, left), max(0.0, top), min(image.width, right), min(image.height, bottom))
    across, down = box[2] - box[0], box[3] - box[1]
    scale = min(1.0, MAX_PICTURE_SIDE / max(across, down))
    scale = max(scale, min(max(width / across, height / down), MAX_STRIP_SIDE / max(across, down)))
    size = max(1, round(across * scale)), max(1, round(down * scale))
    return image.resize(size, Resampling.BILINEAR, box=box, reducing_gap=3.0)
