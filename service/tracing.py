"""Traces: the spans of a request, from the server's own to decode, queue, device and render.

BentoML makes the provider, the exporter and the span of an HTTP request, from the configuration that `install` gives
it. Off unless PARCHGRAD_TRACES_URL says where they go; then nothing here does more than look at one variable.
docs/tracing.md shows a trace.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import Context
from functools import partial
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from opentelemetry import context as current
from opentelemetry import propagate, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from parchgrad import __version__
from service import metrics
from service.metrics import Told
from service.settings import PREFIX, Settings, SettingsError

P = ParamSpec("P")
T = TypeVar("T")

EXPORTER = "opentelemetry.exporter.otlp.proto.http"
PATH = "/v1/traces"  # where collectors listen (OTLP specification, "OTLP/HTTP request")
# Probes and scrapes come every few seconds, and say nothing of a request.
UNTRACED = r"^https?://[^/]+/(metrics|livez|readyz|healthz|v2/health/live|v2/health/ready)$"
UNTRACED_CALLS = ("ServerLive", "ServerReady")
EXPORT_SECONDS = 5  # one export with its repetitions
LAST_EXPORT_SECONDS = 5.0  # how long a worker's end may wait for a collector
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE")

_tracer: Tracer | None = None  # of this process, once its server is made and where traces are on
_provider: Any = None


# --- the server ---------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raises SettingsError where traces are asked for and what sends them is not there."""
    try:
        there = find_spec(EXPORTER) is not None
    except ModuleNotFoundError:
        there = False
    if settings.traces_url and not there:
        raise SettingsError(
            f"{PREFIX}TRACES_URL",
            settings.traces_url,
            f"none, or the package {EXPORTER}, which `pip install 'parchgrad[tracing]'` brings",
        )


def install(settings: Settings) -> dict[str, Any]:
    """BentoML's `tracing=`. Also takes the place of the middleware it is about to add, to know its provider."""
    if not settings.traces_url:
        return {}
    from opentelemetry.instrumentation import asgi

    middleware = asgi.OpenTelemetryMiddleware

    def with_ours(app: Any, *, tracer_provider: Any, **named: Any) -> Any:
        _begin(tracer_provider)
        # A span for each message of the server's would be one for every piece of an upload; BentoML offers no choice.
        return middleware(app, tracer_provider=tracer_provider, exclude_spans=["receive", "send"], **named)

    asgi.OpenTelemetryMiddleware = with_ours  # type: ignore[assignment, misc]  # BentoML imports it from there
    return {
        "exporter_type": "otlp",
        "sample_rate": settings.traces_sample,
        "timeout": EXPORT_SECONDS,
        "excluded_urls": [UNTRACED],
        "otlp": {"protocol": "http", "endpoint": endpoint(settings.traces_url)},
    }


def endpoint(url: str) -> str:
    """The collector's address, with the path of OTLP/HTTP where it names none."""
    return url if urlsplit(url).path.strip("/") else url.rstrip("/") + PATH


def _begin(provider: Any) -> None:
    global _tracer, _provider
    trace.set_tracer_provider(provider)
    # Of what callers send only `traceparent` is read: each entry of a bad `baggage` would be a warning in the log.
    propagate.set_global_textmap(TraceContextTextMapPropagator())
    _tracer, _provider = trace.get_tracer("parchgrad", __version__), provider


async def close() -> None:
    """Send what is left. uvicorn ends a worker by its signal, so that nothing registered with `atexit` would run."""
    if _provider is None:
        return
    loop, sent = asyncio.get_running_loop(), asyncio.Event()

    def send() -> None:
        _provider.shutdown()
        with suppress(RuntimeError):  # the loop has ended: it took too long
            loop.call_soon_threadsafe(sent.set)

    threading.Thread(target=send, name="last-spans", daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_EXPORT_SECONDS):
            await sent.wait()


# --- a request ----------------------------------------------------------------------------------------------------


def call(service: str, method: str, headers: Mapping[str, str]) -> AbstractContextManager[Any]:
    """The span of a gRPC call, which goes on with its caller's trace."""
    if _tracer is None or method in UNTRACED_CALLS:
        return nullcontext()
    return _tracer.start_as_current_span(
        f"{service}/{method}",
        context=propagate.extract(headers),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        record_exception=False,
        set_status_on_exception=False,
    )


def answered(told: Told, *, method: str = "", grpc_status: int | None = None) -> None:
    """Write what is known of the request into its span; `method` of HTTP, or the status of gRPC."""
    if not _is_sampled():
        return
    span = trace.get_current_span()
    span.set_attributes(_of_model(told.model, told.version, told.kind))
    if told.code != "ok" or told.status < 400:  # a readiness that says no has no code
        span.set_attribute("parchgrad.code", told.code)
    if grpc_status is not None:
        span.set_attribute("rpc.grpc.status_code", grpc_status)
    else:
        # Not BentoML's name, which is the raw path: callers choose paths.
        method = method if method in METHODS else "HTTP"
        known = told.route.startswith("/")
        span.update_name(f"{method} {told.route}" if known else method)
        if known:
            span.set_attribute("http.route", told.route)
    if told.status >= 500:
        span.set_attribute("error.type", told.code)
        span.set_status(Status(StatusCode.ERROR))


# --- its parts ----------------------------------------------------------------------------------------------------


def called(name: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)` in a span beneath the one of this context's request."""
    if _tracer is None or not _is_sampled():
        return function(*args, **kwargs)
    told = metrics.current()
    attributes = _of_model(told.model, told.version, told.kind) if told else {}
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            _fail(span, error)
            raise


def rendered(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)`, timed and in a span as the rendering of the request in hand."""
    return called("render", partial(metrics.rendered, function, *args, **kwargs))


def note(name: str, value: str | int) -> None:
    """An attribute of the span in hand."""
    if _is_sampled():
        trace.get_current_span().set_attribute(f"parchgrad.{name}", value)


def queued(place: Context, seconds: float, model: str, version: str, kind: str, dropped: str = "") -> None:
    """An image's wait for the device, over now; `place` is the context of its request, `dropped` why it left."""
    if _tracer is None:
        return
    parent = place.run(current.get_current)
    if not _is_sampled(parent):
        return
    now = time.time_ns()
    start = now - int(seconds * 1e9)
    span = _tracer.start_span("queue", parent, attributes=_of_model(model, version, kind), start_time=start)
    if dropped:
        span.set_attribute("error.type", dropped)
        span.set_status(Status(StatusCode.ERROR))
    span.end(now)


def device(places: Sequence[Context], model: str, version: str, kind: str) -> AbstractContextManager[None]:
    """A device call of a batch, of one image for each context of `places`.

    Each image has a span of its own beneath its own request, so that a request's trace is whole in every viewer;
    all but the first link to the first, and all carry its id, by which the others are found. One span for all would
    stand in one request's trace, or in none.
    """
    return nullcontext() if _tracer is None else _on_device(_tracer, places, model, version, kind)


@contextmanager
def _on_device(tracer: Tracer, places: Sequence[Context], model: str, version: str, kind: str) -> Iterator[None]:
    parents = [parent for parent in (place.run(current.get_current) for place in places) if _is_sampled(parent)]
    attributes = {**_of_model(model, version, kind), "parchgrad.batch.images": len(places)}
    start = time.time_ns()
    spans: list[Span] = []
    for parent in parents:
        links = [Link(spans[0].get_span_context())] if spans else []
        spans.append(tracer.start_span("device", parent, attributes=attributes, links=links, start_time=start))
    for span in spans:
        span.set_attribute("parchgrad.batch.id", format(spans[0].get_span_context().span_id, "016x"))
    try:
        yield
    except BaseException as error:
        for span in spans:
            _fail(span, error)
        raise
    finally:
        end = time.time_ns()
        for span in spans:
            span.end(end)


def _is_sampled(context: current.Context | None = None) -> bool:
    """Whether the request is to be exported: BentoML records those that are not, too."""
    return _tracer is not None and trace.get_current_span(context).get_span_context().trace_flags.sampled


def _of_model(model: str, version: str, kind: str) -> dict[str, str | int]:
    return {"parchgrad.model.name": model, "parchgrad.model.version": version, "parchgrad.kind": kind}


def _fail(span: Span, error: BaseException) -> None:
    """The code a caller is told, and the sentence; of what is none of our errors only the class."""
    code = getattr(error, "code", None)
    if isinstance(code, str):
        span.set_attribute("error.type", code)
        span.set_status(Status(StatusCode.ERROR, str(error)))
    else:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(Status(StatusCode.ERROR))
