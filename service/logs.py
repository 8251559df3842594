"""Lines of the log: which request each belongs to, as text or as JSON, and the line of a request's end.

BentoML's handlers stay; what they write is formed here. A caller's text never begins a line: in JSON it is a string,
in text whatever follows a line's end is indented.
"""

import logging
from collections.abc import Sequence
from contextvars import Context, ContextVar
from typing import Any

from bentoml._internal import log as bentoml_log
from opentelemetry import trace
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from service.metrics import Told
from service.settings import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that is being answered

access_log = logging.getLogger("bentoml.parchgrad.access")  # beneath BentoML's logger, which has the handlers

CONFIGURED = ("", "bentoml", "uvicorn.error", "circus")  # the loggers to which BentoML gives handlers
TEXT = "%(asctime)s %(levelname_bracketed)s %(component)s %(message)s%(request_note)s%(trace_msg)s"
MAX_NAMED = 8  # requests in a line that is about a batch of them
# Beside what Python has on every record: what BentoML's filter puts there for its text, and uvicorn for a terminal.
_OF_TEXT = ("levelname_bracketed", "component", "trace_msg", "service_name", "request_note", "color_message")
# Control characters move a terminal's cursor, and some viewers take these for a line's end.
_ESCAPED = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029)
}


class RequestFilter(logging.Filter):
    """Puts the request's id and its trace's on every record of a handler; it takes none away."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        span = trace.get_current_span().get_span_context()
        record.trace_id = format(span.trace_id, "032x") if span.trace_flags.sampled else ""
        return True


class TextLines(logging.Formatter):
    """BentoML's line, and the request's id where the message does not name it."""

    def __init__(self) -> None:
        super().__init__(TEXT, bentoml_log.DATE_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        # Here and not in the filter: what a wrong log call raises is caught where lines are formed, and only there.
        ident = getattr(record, "request_id", "")
        record.request_note = f" (request={ident})" if ident and ident not in record.getMessage() else ""
        return super().format(record).translate(_ESCAPED).replace("\n", "\n    ")


class JsonLines(JsonFormatter):
    """One object a line. Of a request's end the parts are fields."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message", "process"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            reserved_attrs=[*RESERVED_ATTRS, *_OF_TEXT],
            timestamp=True,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        if access := log_data.pop("access", None):
            log_data |= {"message": "answered", **access}
        first = {"timestamp": log_data.pop("timestamp")}
        return first | {k: v for k, v in log_data.items() if v or k not in ("request_id", "trace_id")}


def install(settings: Settings) -> None:
    """Give BentoML's handlers our lines: those of a worker, which are there, and a supervisor's, which come later."""
    lines = JsonLines if settings.log_format == "json" else TextLines
    for name in CONFIGURED:
        for handler in logging.getLogger(name).handlers:
            if any(isinstance(one, bentoml_log.TraceRecordFilter) for one in handler.filters):
                handler.setFormatter(lines())
                handler.addFilter(RequestFilter())
    if settings.log_format == "json":
        bentoml_log.CLI_LOGGING_CONFIG["formatters"]["simple"] = {"()": JsonLines}
        bentoml_log.CLI_LOGGING_CONFIG["root"]["handlers"] = ["defaulthandler"]  # none: Python's last resort, bare text
        logging.captureWarnings(True)


def together(contexts: Sequence[Context]) -> Context:
    """Where work for several requests at once is done: its lines name all of them."""
    idents = dict.fromkeys(context.get(request_id, "") for context in contexts)
    if len(idents) == 1:
        return contexts[0].copy()
    shared = Context()
    shared.run(request_id.set, ",".join(list(filter(None, idents))[:MAX_NAMED]))
    return shared


def answered(told: Told, ident: str, *, method: str = "", path: str = "") -> None:
    """The line of a request's end; `method` and `path` of HTTP."""
    milliseconds = 1000 * told.seconds
    fields = {
        "method": method, "route": told.route, "path": path, "status": told.status, "code": told.code,
        "milliseconds": round(milliseconds, 1), "kind": told.kind, "model": told.model, "version": told.version,
    }  # fmt: skip
    # %r: what a caller sends must not begin a line of its own.
    said = f"{method} {path!r}" if method else told.route
    extra = {"access": {name: value for name, value in fields.items() if value != ""}}
    access_log.info("%s %s %.1f ms %s", said, told.status, milliseconds, ident, extra=extra)
