"""The capacity dashboard: what a worker does, what is left of it, and how many replicas the load needs."""

from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    INSTANCE,
    MODEL,
    VERSION,
    Limit,
    Query,
    Row,
    bars,
    mean,
    number,
    over_time,
    quantile,
    rate,
    watched,
)

UID = "parchgrad-capacity"
BUSY_TARGET = 0.7  # share of the time a device thread may work; above it waiting grows fast (docs/scaling.md)
IMAGES_A_SECOND = "img/s"
WORKERS = f"sum(parchgrad_ready_workers{{{INSTANCE}}})"
IMAGES = rate("parchgrad_batch_images_sum", MODEL)
# Device seconds a second, both kinds: on a CPU predictions and maps share the cores.
BUSY = rate("parchgrad_device_seconds_sum", MODEL)
BUSY_WORKER = f"{BUSY} / ({WORKERS} > 0)"

NOW = Row(
    "Now",
    (
        number(
            "Images",
            "Images through the device a second, predicted or explained.",
            IMAGES_A_SECOND,
            Query(IMAGES, "images"),
        ),
        number(
            "Images a worker",
            "The same over the ready workers; compare with what one can (docs/scaling.md).",
            IMAGES_A_SECOND,
            Query(f"{IMAGES} / ({WORKERS} > 0)", "images"),
        ),
        number(
            "Device busy",
            "Device seconds a second and worker, both kinds; above 0.7 waiting grows fast.",
            units.PercentUnit,
            Query(BUSY_WORKER, "busy"),
            limit=Limit(BUSY_TARGET, 0.85),
        ),
        number(
            "Headroom",
            "Images a second more, of the same kinds, before the device is 70 % busy; below 0 is too few workers.",
            IMAGES_A_SECOND,
            Query(f"{IMAGES} * ({BUSY_TARGET} / ({BUSY_WORKER} > 0) - 1)", "headroom"),
            limit=Limit(1, 0, below=True),
        ),
        number(
            "Workers needed",
            "Workers that keep the device 70 % busy under the load of this moment, at least one.",
            units.Short,
            Query(f"clamp_min(ceil({BUSY} / {BUSY_TARGET}), 1)", "workers"),
        ),
        number(
            "Memory",
            "Memory used over the limit, of the fullest device; on a CPU other things count against it too, and "
            "workers may be killed from 0.75 on.",
            units.PercentUnit,
            Query(
                f"max(parchgrad_device_memory_used_bytes{{{INSTANCE}}} / parchgrad_device_memory_total_bytes)", "used"
            ),
            limit=Limit(0.7, 0.9),
        ),
    ),
)

THROUGHPUT = Row(
    "Throughput",
    (
        over_time(
            "Images by kind",
            "Images through the device a second; explained ones also give their prediction.",
            IMAGES_A_SECOND,
            Query(rate("parchgrad_batch_images_sum", MODEL, "model", "version", "kind"), f"{VERSION} {{{{kind}}}}"),
            stack=True,
        ),
        over_time(
            "Images by instance",
            "The same for each instance; a lower line under the same load is a slower machine.",
            IMAGES_A_SECOND,
            Query(rate("parchgrad_batch_images_sum", MODEL, "instance"), "{{instance}}"),
        ),
        over_time(
            "Device seconds of an image",
            "What one image costs the device, in batches as they came; it falls as batches fill.",
            units.Seconds,
            Query(
                f"{rate('parchgrad_device_seconds_sum', MODEL, 'model', 'version', 'kind')} / "
                f"({rate('parchgrad_batch_images_sum', MODEL, 'model', 'version', 'kind')} > 0)",
                f"{VERSION} {{{{kind}}}}",
            ),
        ),
    ),
)

ROOM = Row(
    "Room",
    (
        over_time(
            "Device busy by kind",
            "Share of the time a worker's device thread works, predictions and maps have one each, and of both "
            "together, as they share cores or card; the alert is on the last.",
            units.PercentUnit,
            Query(f"parchgrad:device_busy:ratio_rate5m{{{INSTANCE}}}", "{{instance}} {{kind}}"),
            Query(f"sum by (instance) (parchgrad:device_busy:ratio_rate5m{{{INSTANCE}}})", "{{instance}} together"),
            limit=Limit(BUSY_TARGET, 0.85),
        ),
        over_time(
            "Workers needed and ready",
            "Workers for a device 70 % busy, by this moment and by the hour's peak, beside those "
            "ready; ready below the peak is too few.",
            units.Short,
            Query(f"ceil({BUSY} / {BUSY_TARGET})", "needed now"),
            Query(
                f"ceil(max_over_time(sum(rate(parchgrad_device_seconds_sum{{{MODEL}}}[5m]))[1h:1m]) / {BUSY_TARGET})",
                "needed at the hour's peak",
            ),
            Query(WORKERS, "ready"),
        ),
        over_time(
            "Wait for the device",
            "Mean and 99th percentile of the wait; when it passes the time of a batch, workers are missing.",
            units.Seconds,
            Query(mean("parchgrad_queue_seconds", MODEL, "kind"), "{{kind}} mean"),
            Query(quantile(0.99, "parchgrad_queue_seconds", MODEL, "kind"), "{{kind}} p99"),
        ),
    ),
)

BATCHES = Row(
    "Batches and cost",
    (
        over_time(
            "Images in a batch",
            "Mean and 90th percentile of the images in a device call; near MAX_BATCH there is no more to gain.",
            units.Short,
            Query(mean("parchgrad_batch_images", MODEL, "kind"), "{{kind}} mean"),
            Query(quantile(0.9, "parchgrad_batch_images", MODEL, "kind"), "{{kind}} p90"),
        ),
        over_time(
            "Cost of a map",
            "Device time of an image explained over one only predicted; it decides what a change of the mix costs.",
            units.Short,
            Query(f"parchgrad_explain_cost_ratio{{{MODEL}}} > 0", f"{VERSION} {{{{instance}}}}"),
        ),
        over_time(
            "Device calls",
            "Device calls a second; many small ones waste a GPU (MAX_DELAY_MS waits for more).",
            units.CountsPerSecond,
            Query(rate("parchgrad_batch_images_count", MODEL, "kind"), "{{kind}}"),
        ),
    ),
)

MEMORY = Row(
    "Memory and queue",
    (
        over_time(
            "Memory",
            "Used by all workers, and the limit: the control group's or the machine's on a CPU, the card's on a GPU.",
            units.BytesIEC,
            Query(f"parchgrad_device_memory_used_bytes{{{INSTANCE}}}", "{{instance}} {{device}} used"),
            Query(f"parchgrad_device_memory_total_bytes{{{INSTANCE}}}", "{{instance}} {{device}} limit"),
        ),
        over_time(
            "Images admitted",
            "Images admitted and not answered, and how many may be; what an autoscaler looks at.",
            units.Short,
            Query(f"parchgrad_admitted_images{{{INSTANCE}}}", "{{instance}} admitted"),
            Query(f"parchgrad_admitted_limit_images{{{INSTANCE}}}", "{{instance}} limit"),
        ),
        bars(
            "Share of the device by model",
            "Whose images fill the device; a model with more than its share may want replicas of its own.",
            units.PercentUnit,
            Query(
                f"{rate('parchgrad_device_seconds_sum', MODEL, 'model', 'version', 'kind')}"
                f" / on () group_left () ({BUSY} > 0)",
                f"{VERSION} {{{{kind}}}}",
            ),
        ),
    ),
)


def dashboard() -> Dashboard:
    rows = (NOW, THROUGHPUT, ROOM, BATCHES, MEMORY)
    return watched(UID, "ParchGrad: capacity", "What the workers do, what is left, how many are needed.", rows)
