"""The Starlette app mounted into the BentoML service: all routes, and what holds for every one of them.

`Envelope` goes around BentoML's own routes too (/livez, /readyz): request id, metrics, one form of errors.
"""

import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import admin, attacks, class_graphs, layers, logs, metrics, native, openapi, tracing, traffic
from service.errors import LIBRARY_CODES, ServiceError, from_exception
from service.page import routes as page
from service.protocols import v1, v2

log = logging.getLogger(__name__)

BENTOML_ROUTES = ("/livez", "/readyz", "/healthz")
PROTOCOL_PATHS = ("/v2", "/v1")
OTHER = "other"  # route label of every path that is none of ours: callers choose paths

# Statuses that Starlette and BentoML answer by themselves, as plain text.
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 503: "not_ready", 504: "deadline_exceeded"}


def error_body(path: str, error: ServiceError) -> dict[str, Any]:
    """The native form, or the Open Inference Protocol's on its paths."""
    if path in PROTOCOL_PATHS or path.startswith(tuple(f"{prefix}/" for prefix in PROTOCOL_PATHS)):
        return {"error": error.message}
    return {"error": {"code": error.code, "message": error.message}}


def _from_status(method: str, path: str, status: int, headers: Mapping[str, str]) -> ServiceError:
    """`headers`: of the answer that Starlette or BentoML would have given."""
    allowed = ", ".join(sorted(filter(None, re.split("[, ]+", headers.get("allow", "")))))
    messages = {
        404: f"There is nothing at {path[:200]!r}.",
        405: f"{method[:16]} is not allowed at {path[:200]!r}; use {allowed}.",
        500: "The service failed on this request; its log says why.",
        503: "The model is still loading, or did not load; the log says which.",
        504: "No answer in time.",
    }
    return ServiceError(_CODE_OF_STATUS.get(status, "internal"), messages.get(status, messages[500]))


async def _on_error(request: Request, error: Exception) -> Response:
    answer = from_exception(error)
    metrics.refused(answer.code)
    return JSONResponse(error_body(request.url.path, answer), status_code=answer.status, headers=answer.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _from_status(request.method, request.url.path, error.status_code, Headers(error.headers))
    metrics.refused(answer.code)
    return JSONResponse(error_body(request.url.path, answer), status_code=answer.status, headers=error.headers)


def create_app() -> Starlette:
    """All our routes. Who serves it sets `app.state.pipeline` and `app.state.needs_key` before the first request."""
    handlers: dict[Any, Any] = {HTTPException: _on_http_exception, ServiceError: _on_error}
    handlers |= {kind: _on_error for kind, _ in LIBRARY_CODES}
    routes: list[BaseRoute] = [*native.ROUTES, *v2.ROUTES, *v1.ROUTES, *admin.ROUTES]
    routes += [*page.ROUTES, *class_graphs.ROUTES, *layers.ROUTES, *attacks.ROUTES, *traffic.ROUTES]
    routes.append(Route("/docs.json", openapi.view, methods=["GET"]))
    return Starlette(routes=routes, exception_handlers=handlers)


class Envelope:
    """ASGI middleware: echoes or makes X-Request-Id, counts and times, turns plain-text errors into ours."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = self._template(scope)
        ident = request_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {}).update(request_id=ident, route=route)
        logs.request_id.set(ident)
        unread = _has_body(Headers(scope=scope))
        replacement: bytes | None = None  # the body to send instead of a plain-text error's

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body", False))
            return message

        async def enveloped(message: Message) -> None:
            nonlocal replacement
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                if message["status"] == 307:
                    # BentoML's router redirects /predict/ to whatever host the caller named; we redirect nobody.
                    message = {**message, "status": 404}
                    del headers["location"]
                    headers["content-type"] = "text/plain"
                told.status = status = message["status"]
                headers["X-Request-Id"] = ident
                if unread:  # uvicorn would read, and throw away, whatever the caller goes on sending
                    headers["Connection"] = "close"
                if status >= 400 and headers.get("content-type", "").startswith("text/plain"):
                    error = _from_status(scope["method"], scope["path"], status, headers)
                    metrics.refused(error.code)
                    replacement = json.dumps(error_body(scope["path"], error)).encode()
                    headers["content-type"], headers["content-length"] = "application/json", str(len(replacement))
                    for name, value in error.headers.items():
                        headers[name] = value
                tracing.answered(told, method=scope["method"])  # its span ends with the last of the answer
            elif message["type"] == "http.response.body" and replacement is not None:
                message = {**message, "body": replacement}
                replacement = b""
            await send(message)

        with metrics.request(route) as told:
            try:
                await self._app(scope, received, enveloped)
            except Exception:
                # Starlette has answered 500 and raised on; raising further would make uvicorn close the connection.
                log.exception("Request %s failed for a reason of ours.", ident)
                told.code = "internal"
            finally:
                if told.code == "ok" and told.status >= 400:  # what answered has no codes: a readiness, BentoML itself
                    told.code = _CODE_OF_STATUS.get(told.status, "internal")
                logs.answered(told, ident, method=scope["method"], path=scope["path"])

    def _template(self, scope: Scope) -> str:
        if scope["path"] in BENTOML_ROUTES:
            return str(scope["path"])
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return OTHER


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def request_id(given: str) -> str:
    """The id a caller gave, or a new one where it gave none that may stand in a header and a log."""
    return given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
