"""A collector of traces on loopback: what OTLP over HTTP brings to it, span by span."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRIES = 200  # times a tenth of a second


@dataclass(frozen=True)
class Arrived:
    """One span; ids are hex, times nanoseconds."""

    name: str
    trace: str
    ident: str
    parent: str
    start: int
    end: int
    kind: int
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    failed: bool
    resource: dict[str, Any]


@dataclass
class Collector:
    url: str
    spans: list[Arrived] = field(default_factory=list)

    def trace(self, ident: str, root: str) -> dict[str, list[Arrived]]:
        """By name, the spans of a trace, once the one called `root` is there: it ends last."""
        for _ in range(TRIES):
            found = [span for span in list(self.spans) if span.trace == ident]
            if any(span.name == root for span in found):
                return {name: [one for one in found if one.name == name] for name in {one.name for one in found}}
            time.sleep(0.1)
        raise AssertionError(f"no span {root!r} of the trace {ident} among {[(s.name, s.trace) for s in self.spans]}")


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                collector.spans.extend(_spans(body))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _spans(body: bytes) -> Iterator[Arrived]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Arrived(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.kind,
                    _values(span.attributes),
                    [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    span.status.code == 2,
                    _values(resource.resource.attributes),
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
