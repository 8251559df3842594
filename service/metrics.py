"""Every metric of the service: name, unit, help, buckets; and the text `/metrics` answers with.

Labels come from closed sets only: route templates, HTTP statuses, the codes of errors.STATUS, job kinds.
BentoML's own request metrics are switched off (service.py): they label by raw path, which callers choose.
"""

import os
import re
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # BentoML's supervisor sets it for every worker

requests = Counter("parchgrad_requests", "HTTP requests answered, by route template and status.", ["route", "status"])
rejects = Counter("parchgrad_rejects", "Requests and images refused, by error code.", ["reason"])
dropped = Counter(
    "parchgrad_dropped",
    "Images nobody waited for any more: cancelled or expired in the queue, interrupted between two of their passes.",
    ["reason"],
)
request_seconds = Histogram(
    "parchgrad_request_seconds", "From the request's first byte to the last of the answer.", ["route"], buckets=SECONDS
)
decode_seconds = Histogram("parchgrad_decode_seconds", "Bytes of one image to its normalised tensor.", buckets=SECONDS)
queue_seconds = Histogram("parchgrad_queue_seconds", "One image's wait for the device.", ["kind"], buckets=SECONDS)
device_seconds = Histogram("parchgrad_device_seconds", "One batch on the device.", ["kind"], buckets=SECONDS)
render_seconds = Histogram("parchgrad_render_seconds", "Results of one request to its answer's bytes.", buckets=SECONDS)
batch_images = Histogram("parchgrad_batch_images", "Images in one device call.", ["kind"], buckets=IMAGES)
out_of_memory = Counter("parchgrad_out_of_memory", "Batches the device had no memory for.", ["kind"])
maps_missing = Counter(
    "parchgrad_maps_missing", "Images answered with a prediction and no map: skipped, shed or timeout.", ["status"]
)
audit_lost = Counter(
    "parchgrad_audit_lost", "Lines of the audit log that could not be written while their answers went out."
)
loop_lag_seconds = Histogram(
    "parchgrad_loop_lag_seconds", "How late the event loop wakes a task that sleeps 10 ms.", buckets=SECONDS
)
admitted = Gauge(
    "parchgrad_admitted_images", "Images and maps admitted and not yet answered.", multiprocess_mode="livesum"
)
queue_depth = Gauge("parchgrad_queue_depth_images", "Images waiting for the device.", multiprocess_mode="livesum")
in_flight = Gauge("parchgrad_in_flight_requests", "Requests being answered.", multiprocess_mode="livesum")
ready = Gauge("parchgrad_ready_workers", "Workers whose golden image matched.", multiprocess_mode="livesum")
model_info = Gauge(
    "parchgrad_model_info",
    "1 for the model and table served.",
    ["model", "version", "weights_sha256", "table_sha256"],
    multiprocess_mode="livemax",
)

CONTENT_TYPE = CONTENT_TYPE_LATEST


def workers_folder() -> Path | None:
    """The folder that the workers of one service share, emptied when it starts; None outside `bentoml serve`."""
    folder = os.environ.get(MULTIPROCESS_DIR)
    return Path(folder) if folder else None


def exposition() -> bytes:
    """All workers' metrics under `bentoml serve`, this process's otherwise; Prometheus text format."""
    if MULTIPROCESS_DIR not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_dead_workers() -> None:
    """Remove the live gauges of workers that are gone, or their last value would be summed for ever.

    Called when a worker starts: the supervisor replaces a killed worker, and nobody else tidies up after it.
    """
    folder = workers_folder()
    for file in folder.glob("gauge_live*_*.db") if folder else ():
        owner = re.search(r"_(\d+)\.db$", file.name)
        if owner and not Path("/proc", owner[1]).exists() and Path("/proc").exists():
            file.unlink(missing_ok=True)
