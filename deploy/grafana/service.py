"""The service dashboard: is it up, how much does it answer, how fast, what is full, what is left out."""

from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    INSTANCE,
    JOB,
    MODEL,
    VERSION,
    Limit,
    Query,
    Row,
    bars,
    heat_map,
    listing,
    mean,
    number,
    over_time,
    quantile,
    rate,
    watched,
)

UID = "parchgrad-service"
ANSWERS = f'{MODEL}, kind=~"predict|explain"'
# Probes of a worker that loads or drains get 503 not_ready, as they should. `rejects` has no route to tell them by.
REFUSED = f'{MODEL}, code!="ok", route!~"/(livez|readyz|healthz|v2/health/.*)|grpc/Server(Live|Ready)"'
REASONS = f'{INSTANCE}, reason!="not_ready"'
ERROR_BUDGET, SLOW_BUDGET = 0.005, 0.01  # as in deploy/prometheus/rules/alerts.yml
IMAGES_A_SECOND = "img/s"  # Grafana prints a unit it does not know behind the number

NOW = Row(
    "Now",
    (
        number(
            "Requests",
            "Requests answered a second, health checks and scrapes too; a sudden fall is as bad as a rise.",
            units.RequestsPerSecond,
            Query(rate("parchgrad_requests_total", INSTANCE), "requests"),
        ),
        number(
            "Not answered",
            "Share of the last hour's requests to predict or explain with 5xx or 429 queue_full; the budget is 0.5 %.",
            units.PercentUnit,
            Query(f"max(parchgrad:errors:ratio_rate1h{{{JOB}}})", "not answered"),
            limit=Limit(ERROR_BUDGET, 14.4 * ERROR_BUDGET),
        ),
        number(
            "Late",
            "Share of the answers of the last hour that took over 1 s (predictions) or 4 s (explanations); "
            "the budget is 1 %.",
            units.PercentUnit,
            Query(f"max(parchgrad:slow:ratio_rate1h{{{JOB}}})", "late"),
            limit=Limit(SLOW_BUDGET, 14.4 * SLOW_BUDGET),
        ),
        number(
            "Workers ready",
            "Share of the workers there are to be that take requests; below 1 some load, drain, died or failed their "
            "golden image. 0 too where nothing reports.",
            units.PercentUnit,
            Query(
                f"sum(parchgrad_ready_workers{{{INSTANCE}}}) / sum(parchgrad_configured_workers{{{INSTANCE}}})"
                " or vector(0)",
                "ready",
            ),
            limit=Limit(1.0, 0.5, below=True),
        ),
        number(
            "Fullest queue",
            "Images admitted over images that may be, of the fullest instance; at 1 requests get 429.",
            units.PercentUnit,
            Query(f"max(parchgrad_admitted_images{{{INSTANCE}}} / parchgrad_admitted_limit_images)", "full"),
            limit=Limit(0.5, 0.8),
        ),
        number(
            "Alerts",
            "Alerts of ours that fire; any is one too many.",
            units.Short,
            Query('count(ALERTS{alertname=~"Parchgrad.*", alertstate="firing"}) or vector(0)', "firing"),
            limit=Limit(1, 3),
        ),
    ),
)

REQUESTS = Row(
    "Requests",
    (
        over_time(
            "Requests by route",
            "Requests answered a second, by route template; `other` are paths that are none of ours.",
            units.RequestsPerSecond,
            Query(rate("parchgrad_requests_total", MODEL, "route"), "{{route}}"),
            stack=True,
        ),
        over_time(
            "Errors by code",
            "Requests refused or failed a second, by status and code, health checks left out; 5xx and queue_full are "
            "ours, 4xx the callers'.",
            units.RequestsPerSecond,
            Query(
                f"{rate('parchgrad_requests_total', REFUSED, 'status', 'code')} > 0",  # many are 0 from the beginning
                "{{status}} {{code}}",
            ),
            stack=True,
        ),
        over_time(
            "Refused requests and images",
            "As before, and single images of a request that was otherwise answered; image_* says what callers send. "
            "Without not_ready, which most probes of /readyz get while a worker loads.",
            units.CountsPerSecond,
            Query(f"{rate('parchgrad_rejects_total', REASONS, 'reason')} > 0", "{{reason}}"),
            stack=True,
        ),
        over_time(
            "Budgets",
            "Requests not answered and answers late, as shares of an hour; a page is sent from 7.2 % and 14.4 %.",
            units.PercentUnit,
            Query(f"parchgrad:errors:ratio_rate1h{{{JOB}}}", "not answered"),
            Query(f"parchgrad:slow:ratio_rate1h{{{JOB}}}", "late: {{kind}}"),
            limit=Limit(ERROR_BUDGET, SLOW_BUDGET),
        ),
        over_time(
            "Requests by model",
            "Predictions and explanations answered a second, by model and version.",
            units.RequestsPerSecond,
            Query(rate("parchgrad_requests_total", ANSWERS, "model", "version", "kind"), f"{VERSION} {{{{kind}}}}"),
        ),
        over_time(
            "In flight",
            "Requests being answered at this moment; if it only grows, answers do not leave.",
            units.Short,
            Query(f"sum by (instance) (parchgrad_in_flight_requests{{{INSTANCE}}})", "{{instance}}"),
        ),
    ),
)

LATENCY = Row(
    "Latency, first byte in to last byte out",
    (
        heat_map(
            "Predictions",
            "How long predictions took; a second cloud above the first is a queue or a slow kind of request.",
            units.Seconds,
            "parchgrad_request_seconds",
            f'{MODEL}, kind="predict"',
        ),
        heat_map(
            "Explanations",
            "How long explanations took; methods of many passes form a cloud of their own.",
            units.Seconds,
            "parchgrad_request_seconds",
            f'{MODEL}, kind="explain"',
        ),
        over_time(
            "Median and 99th percentile",
            "Half, and 99 in 100, of the answers took at most this long; a p99 that leaves the median is queueing.",
            units.Seconds,
            Query(quantile(0.5, "parchgrad_request_seconds", ANSWERS, "kind"), "{{kind}} p50"),
            Query(quantile(0.99, "parchgrad_request_seconds", ANSWERS, "kind"), "{{kind}} p99"),
        ),
        over_time(
            "Where the time goes",
            "Mean seconds an image spends in each stage; the stage that grows is the one to look at.",
            units.Seconds,
            Query(mean("parchgrad_decode_seconds", MODEL), "decode"),
            Query(mean("parchgrad_queue_seconds", MODEL, "kind"), "queue, {{kind}}"),
            Query(mean("parchgrad_device_seconds", MODEL, "kind"), "device batch, {{kind}}"),
            Query(mean("parchgrad_render_seconds", MODEL, "kind"), "render, {{kind}}"),
        ),
        heat_map(
            "Wait for the device",
            "How long images queued; beyond the length of one device batch they wait for more than one.",
            units.Seconds,
            "parchgrad_queue_seconds",
            MODEL,
        ),
        over_time(
            "Slow ends of the stages",
            "The time in which 99 in 100 images, batches or answers passed the stage; a long end is somebody's wait.",
            units.Seconds,
            Query(quantile(0.99, "parchgrad_decode_seconds", MODEL), "decode"),
            Query(quantile(0.99, "parchgrad_queue_seconds", MODEL, "kind"), "queue, {{kind}}"),
            Query(quantile(0.99, "parchgrad_device_seconds", MODEL, "kind"), "device batch, {{kind}}"),
            Query(quantile(0.99, "parchgrad_render_seconds", MODEL, "kind"), "render, {{kind}}"),
        ),
    ),
)

SATURATION = Row(
    "Saturation",
    (
        over_time(
            "Admitted of what may be",
            "Images and maps admitted and not answered, over MAX_QUEUE of the workers; maps are shed above a half, "
            "requests refused at 1.",
            units.PercentUnit,
            Query(f"parchgrad_admitted_images{{{INSTANCE}}} / parchgrad_admitted_limit_images", "{{instance}}"),
            limit=Limit(0.5, 0.8),
            most=1.0,
        ),
        over_time(
            "Queue",
            "Images that wait for the device; decoding may hold as many more.",
            units.Short,
            Query(
                f"sum by (model, version, kind) (parchgrad_queue_depth_images{{{MODEL}}})", f"{VERSION} {{{{kind}}}}"
            ),
        ),
        over_time(
            "Event loop",
            "How late the event loop wakes, 99th percentile; above some 50 ms every answer is late by as much.",
            units.Seconds,
            Query(quantile(0.99, "parchgrad_loop_lag_seconds", INSTANCE, "instance"), "{{instance}}"),
            limit=Limit(0.05, 0.25),
        ),
    ),
)

BATCHES = Row(
    "Device batches",
    (
        heat_map(
            "Images in a batch: predictions",
            "Sizes of device calls that only predict; all at 1 under load means that nothing is batched.",
            units.Short,
            "parchgrad_batch_images",
            f'{MODEL}, kind="predict"',
        ),
        heat_map(
            "Images in a batch: explanations",
            "Sizes of device calls that explain; options that differ do not hinder a batch, methods do.",
            units.Short,
            "parchgrad_batch_images",
            f'{MODEL}, kind="explain"',
        ),
        over_time(
            "Seconds of a batch",
            "The time in which 99 in 100 device calls ended; images that come meanwhile wait for it.",
            units.Seconds,
            Query(
                quantile(0.99, "parchgrad_device_seconds", MODEL, "model", "version", "kind"),
                f"{VERSION} {{{{kind}}}}",
            ),
        ),
    ),
)

LEFT_OUT = Row(
    "Left out",
    (
        over_time(
            "Maps left out",
            "Images answered with a prediction, no map: `skipped` on request, `shed` under load, `timeout` of theirs.",
            IMAGES_A_SECOND,
            Query(rate("parchgrad_maps_missing_total", MODEL, "status"), "{{status}}"),
            stack=True,
            width=6,
        ),
        over_time(
            "Work dropped",
            "Images nobody waited for: `cancelled` by callers, `expired` in the queue, `interrupted` between passes.",
            IMAGES_A_SECOND,
            Query(rate("parchgrad_dropped_total", MODEL, "reason"), "{{reason}}"),
            stack=True,
            width=6,
        ),
        over_time(
            "Out of memory",
            "Batches in five minutes that the device had no memory for; they are halved once.",
            units.Short,
            Query(f"sum by (model, version) (increase(parchgrad_out_of_memory_total{{{MODEL}}}[5m]))", VERSION),
            width=6,
        ),
        over_time(
            "Audit lines lost",
            "Lines of the audit log in five minutes that were not written although the answers went out; any is bad.",
            units.Short,
            Query(f"sum by (instance) (increase(parchgrad_audit_lost_total{{{INSTANCE}}}[5m]))", "{{instance}}"),
            width=6,
        ),
    ),
)

WORKERS = Row(
    "Workers and models",
    (
        over_time(
            "Workers",
            "Workers there are to be, alive and ready; a saw is a crash loop, fewer alive are some that never came up.",
            units.Short,
            Query(f"sum by (instance) (parchgrad_configured_workers{{{INSTANCE}}})", "{{instance}} to be"),
            Query(f"sum by (instance) (parchgrad_workers{{{INSTANCE}}})", "{{instance}} alive"),
            Query(f"sum by (instance) (parchgrad_ready_workers{{{INSTANCE}}})", "{{instance}} ready"),
        ),
        bars(
            "Requests by instance",
            "Requests to predict or explain a second; very different lengths mean that load is not spread.",
            units.RequestsPerSecond,
            Query(rate("parchgrad_requests_total", ANSWERS, "instance"), "{{instance}}"),
        ),
        over_time(
            "Readiness changes",
            "How often an instance went from all workers ready to fewer, or back, in 15 minutes; a restart is two.",
            units.Short,
            Query(f"parchgrad:readiness:changes15m{{{INSTANCE}}}", "{{instance}}"),
            limit=Limit(2, 4),
        ),
        listing(
            "Models served",
            "What is loaded where, first twelve digits of the digests; one version with two digests is an error.",
            "max by (instance, model, version, runtime, device, weights, table) (label_replace(label_replace("
            f'parchgrad_model_info{{{MODEL}}} == 1, "weights", "$1", "weights_sha256", "(.{{0,12}}).*"), '
            '"table", "$1", "table_sha256", "(.{0,12}).*"))',
            ("instance", "model", "version", "runtime", "device", "weights", "table"),
        ),
    ),
)


def dashboard() -> Dashboard:
    rows = (NOW, REQUESTS, LATENCY, SATURATION, BATCHES, LEFT_OUT, WORKERS)
    return watched(UID, "ParchGrad: service", "Rates, errors, latencies, saturation and what is served.", rows)
