"""Every metric of the service: name, unit, help, buckets; what a request tells of itself; and what `/metrics` answers.

Labels come from closed sets only: route templates, HTTP statuses, the codes of errors.STATUS, kinds, and the models and
versions that serve; never what a caller wrote. docs/metrics.md has the same list for readers. BentoML's own request
metrics are switched off (service.py): they label by raw path, which callers choose.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from service.errors import STATUS

P = ParamSpec("P")
T = TypeVar("T")
Kind = Literal["predict", "explain", "other"]

# A GPU's batches are under a millisecond, a CPU's explanations of many passes take most of a minute.
SECONDS = (
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0,
)  # fmt: skip
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
M = ("model", "version")  # of the version that serves; both empty where a request resolved to none
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # BentoML's supervisor sets it for every worker

# --- requests ------------------------------------------------------------------------------------------------

requests = Counter(
    "parchgrad_requests",
    "Requests answered, by route template, status and error code; a gRPC call's status is its HTTP one.",
    ["route", *M, "kind", "status", "code"],
)
request_seconds = Histogram(
    "parchgrad_request_seconds",
    "From the request's first byte to the last of the answer.",
    ["route", *M, "kind"],
    buckets=SECONDS,
)
rejects = Counter("parchgrad_rejects", "Requests and images refused, by error code.", ["reason"])
in_flight = Gauge("parchgrad_in_flight_requests", "Requests being answered.", multiprocess_mode="livesum")
admitted = Gauge(
    "parchgrad_admitted_images", "Images and maps admitted and not yet answered.", multiprocess_mode="livesum"
)
admitted_limit = Gauge(
    "parchgrad_admitted_limit_images",
    "Most images and maps that the workers together admit; more get 429.",
    multiprocess_mode="livesum",
)
maps_missing = Counter(
    "parchgrad_maps_missing",
    "Images answered with a prediction and no map: skipped, shed or timeout.",
    [*M, "status"],
)
audit_lost = Counter(
    "parchgrad_audit_lost", "Lines of the audit log that could not be written while their answers went out."
)

# --- an image's way -------------------------------------------------------------------------------------------

decode_seconds = Histogram(
    "parchgrad_decode_seconds", "Bytes of one image to its normalised tensor.", M, buckets=SECONDS
)
queue_seconds = Histogram("parchgrad_queue_seconds", "One image's wait for the device.", [*M, "kind"], buckets=SECONDS)
queue_depth = Gauge(
    "parchgrad_queue_depth_images", "Images waiting for the device.", [*M, "kind"], multiprocess_mode="livesum"
)
device_seconds = Histogram("parchgrad_device_seconds", "One batch on the device.", [*M, "kind"], buckets=SECONDS)
batch_images = Histogram("parchgrad_batch_images", "Images in one device call.", [*M, "kind"], buckets=IMAGES)
render_seconds = Histogram(
    "parchgrad_render_seconds", "Results of one request to its answer's bytes.", [*M, "kind"], buckets=SECONDS
)
dropped = Counter(
    "parchgrad_dropped",
    "Images nobody waited for any more: cancelled or expired in the queue, interrupted between two of their passes.",
    [*M, "kind", "reason"],
)
out_of_memory = Counter("parchgrad_out_of_memory", "Batches the device had no memory for.", [*M, "kind"])
explain_cost_ratio = Gauge(
    "parchgrad_explain_cost_ratio",
    "Device seconds of an image explained in one pass over those of one only predicted, recent batches weighing most; "
    "0 once its model is unloaded.",
    M,
    multiprocess_mode="livemostrecent",
)

# --- workers --------------------------------------------------------------------------------------------------

workers = Gauge("parchgrad_workers", "Workers alive.", multiprocess_mode="livesum")
configured_workers = Gauge(
    "parchgrad_configured_workers", "Workers that there are to be: PARCHGRAD_WORKERS.", multiprocess_mode="livemax"
)
ready = Gauge("parchgrad_ready_workers", "Workers whose golden image matched.", multiprocess_mode="livesum")
model_info = Gauge(
    "parchgrad_model_info",
    "1 for the model and table served, 0 once it is not.",
    [*M, "weights_sha256", "table_sha256", "runtime", "device"],
    multiprocess_mode="livemax",
)
loop_lag_seconds = Histogram(
    "parchgrad_loop_lag_seconds", "How late the event loop wakes a task that sleeps 10 ms.", buckets=SECONDS
)
device_memory_used = Gauge(
    "parchgrad_device_memory_used_bytes",
    "Memory of all workers: resident on a CPU, reserved by torch on a GPU.",
    ["device"],
    multiprocess_mode="livesum",
)
device_memory_total = Gauge(
    "parchgrad_device_memory_total_bytes",
    "Memory there is: the control group's limit or the machine's, the card's on a GPU.",
    ["device"],
    multiprocess_mode="livemostrecent",
)

# --- explanations ---------------------------------------------------------------------------------------------

# Shares, with what is near 1 apart: Gini indices of sparse maps, and confidences, lie there.
_SHARES = (
    0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95,
    0.97, 0.99, 1.0,
)  # fmt: skip
# Few, as there is one of each for every layer of every model: what changes is seen in the mean, where in these.
_DISTANCES = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0)
_SHIFTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
_OF_MAP = [*M, "options"]  # `default`: the map was made under the table's own options, `other`: under the caller's

map_gini = Histogram(
    "parchgrad_map_gini", "Gini index of a map made with the rule: 0 flat, 1 one pixel.", _OF_MAP, buckets=_SHARES
)
map_border_share = Histogram(
    "parchgrad_map_border_share",
    "Share of a map's mass within a tenth of its sides' length from the border; 0.36 where it is flat.",
    _OF_MAP,
    buckets=_SHARES,
)
map_centroid = Histogram(
    "parchgrad_map_centroid",
    "Centre of a map's mass along an axis: x from left (0) to right (1), y from above (0) to below (1).",
    [*_OF_MAP, "axis"],
    buckets=(0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0),
)
map_identity_share = Histogram(
    "parchgrad_map_identity_share",
    "Share of the layers the rule was to act in whose gradient passed unchanged.",
    _OF_MAP,
    buckets=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
)
# The next and the shift may be negative: their sums may fall, which rate() takes for a restart: delta().
map_gradient_agreement = Histogram(
    "parchgrad_map_gradient_agreement",
    "Rank correlation of a map under the table's own options with the plain gradient's; of images looked at.",
    M,
    buckets=(-0.5, -0.2, -0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
activation_distance = Histogram(
    "parchgrad_activation_distance",
    "Root mean square of z = (feature - the table's mean) / its deviation over a class's channels, by layer.",
    [*M, "layer"],
    buckets=_DISTANCES,
)
activation_shift = Histogram(
    "parchgrad_activation_shift",
    "Mean of the same z, with its sign.",
    [*M, "layer"],
    buckets=_SHIFTS,
)
class_activation_distance = Summary(
    "parchgrad_class_activation_distance",
    "Mean activation distance over the layers, by class: those often predicted, and the others together.",
    [*M, "class_label"],
)
predicted = Counter(
    "parchgrad_predicted",
    "Images by predicted class: those often predicted, and the others together.",
    [*M, "class_label"],
)
confidence = Histogram("parchgrad_confidence", "Probability of the predicted class.", M, buckets=_SHARES)
watched = Counter(
    "parchgrad_watched",
    "Images drawn to be looked at: done, skipped as others waited or nothing could be compared, or failed.",
    [*M, "result"],
)

# --- what a request tells ---------------------------------------------------------------------------------------


@dataclass
class Told:
    """What is known of a request by its end; its route is from the start. Whoever learns a thing writes it here."""

    route: str
    model: str = ""
    version: str = ""
    kind: Kind = "other"  # until it is known what is asked
    status: int = 500
    code: str = "ok"
    render_seconds: float | None = None
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.start


_told: ContextVar[Told | None] = ContextVar("told", default=None)


@contextmanager
def request(route: str) -> Iterator[Told]:
    """Counts and times one request, HTTP or gRPC: everything within, its tasks and threads too, tells it what it is."""
    told = Told(route)
    token = _told.set(told)
    in_flight.inc()
    try:
        yield told
    finally:
        _told.reset(token)
        in_flight.dec()
        labels = told.model, told.version, told.kind
        requests.labels(route, *labels, str(told.status), told.code).inc()
        request_seconds.labels(route, *labels).observe(told.seconds)
        if told.render_seconds is not None:
            render_seconds.labels(*labels).observe(told.render_seconds)


def current() -> Told | None:
    """The request that is being answered here; None outside of one."""
    return _told.get()


def found(model: str, version: str) -> None:
    """The request in hand is answered by this version of this model."""
    if told := _told.get():
        told.model, told.version = model, version


def asked(kind: Kind) -> None:
    """The request in hand wants a map, or only predictions."""
    if told := _told.get():
        told.kind = kind


def refused(code: str) -> None:
    """The request in hand is refused, all of it. (An image that fails alone is counted in `rejects` only.)"""
    rejects.labels(code).inc()
    if told := _told.get():
        told.code = code


def rendered(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)`, whose time counts as the rendering of the request in hand; not where it raises."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    if told := _told.get():
        told.render_seconds = (told.render_seconds or 0.0) + time.perf_counter() - start
    return result


# The routes that answer images, and what counts against the service there: else the first errors of a new worker, all
# within one scrape, are the first value of a new series, and no rate ever sees them.
_INFERENCE: tuple[tuple[str, Kind], ...] = (
    ("/predict", "predict"),
    ("/explain", "explain"),
    ("/v1/models/{name}:predict", "predict"),
    ("/v1/models/{name}:explain", "explain"),
    *(
        (route, kind)
        for route in (
            "/v2/models/{name}/infer",
            "/v2/models/{name}/versions/{version}/infer",
            "grpc/ModelInfer",
        )
        for kind in get_args(Kind)[:2]
    ),
)
_BUDGETED = ("ok", "queue_full", *(code for code, status in STATUS.items() if status >= 500))


class Lane:
    """The metrics of one kind of images of one version, from the queue to the device. They all begin with 0."""

    def __init__(self, model: str, version: str, kind: str) -> None:
        labels = model, version, kind
        self.queue_depth = queue_depth.labels(*labels)
        self.queue_seconds = queue_seconds.labels(*labels)
        self.device_seconds = device_seconds.labels(*labels)
        self.batch_images = batch_images.labels(*labels)
        self.out_of_memory = out_of_memory.labels(*labels)
        self.dropped = {reason: dropped.labels(*labels, reason) for reason in ("cancelled", "expired", "interrupted")}


# --- the text -------------------------------------------------------------------------------------------------

CONTENT_TYPE = CONTENT_TYPE_LATEST


def begin_worker(max_queue: int, of: int) -> None:
    """Called once in every one `of` the workers: what it counts from the start, and the reasons not met yet."""
    forget_dead_workers()
    workers.set(1)
    configured_workers.set(of)
    admitted_limit.set(max_queue)
    for code in STATUS:
        rejects.labels(code)  # a rate begins with the first one only where there was a 0 before it


def begin_version(model: str, version: str) -> None:
    """Called when a version serves: what may be counted of it begins with 0."""
    for kind in ("predict", "explain"):
        Lane(model, version, kind)
    for status in ("skipped", "shed", "timeout"):
        maps_missing.labels(model, version, status)
    for route, kind in _INFERENCE:
        for code in _BUDGETED:
            requests.labels(route, model, version, kind, str(STATUS.get(code, 200)), code)
    for result in ("done", "skipped", "failed"):
        watched.labels(model, version, result)
    # The only summary: where workers share files this makes its file, which must not be opened at some later image.
    class_activation_distance.labels(model, version, "other")


def end_version(model: str, version: str) -> None:
    """Called once a version has ended: where workers share files a series cannot be taken away, only set to 0."""
    explain_cost_ratio.labels(model, version).set(0)


def workers_folder() -> Path | None:
    """The folder that the workers of one service share, emptied when it starts; None outside `bentoml serve`."""
    folder = os.environ.get(MULTIPROCESS_DIR)
    return Path(folder) if folder else None


def exposition() -> bytes:
    """All workers' metrics under `bentoml serve`, this process's otherwise; Prometheus text format."""
    if MULTIPROCESS_DIR not in os.environ:
        return generate_latest(REGISTRY)
    forget_dead_workers()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_dead_workers() -> None:
    """Remove the live gauges of workers that are gone, or their last value would be summed for ever.

    Nobody else tidies up after a worker that was killed. What it counted stays: counters never fall.
    """
    folder = workers_folder()
    for file in folder.glob("gauge_live*_*.db") if folder else ():
        owner = re.search(r"_(\d+)\.db$", file.name)
        if owner and is_gone(owner[1]):
            file.unlink(missing_ok=True)


def is_gone(pid: str) -> bool:
    """Whether a worker has ended; False where that cannot be told."""
    return Path("/proc").exists() and not Path("/proc", pid).exists()
