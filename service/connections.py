"""HTTP connections as uvicorn has them, with a bound on a request's head, in bytes and in time, and our form of 400.

uvicorn's default with httptools has neither bound: a header without end fills the memory, and a connection that
never finishes its head stays for ever. Of the bodies, body.py bounds what the routes read.
"""

import asyncio
import json
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 65_536  # request line and headers: what h11, uvicorn's other parser, allows
HEAD_SECONDS = 10.0  # from connecting, or from the first byte of a later request, to the head's end


class Connection(HttpToolsProtocol):
    """One connection; refuses a head too large or too slow, and bytes that are neither body nor head without end."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._deadline: asyncio.TimerHandle | None = None
        self._surplus = 0  # bytes of the message being received that are no body: its head, chunk sizes, trailers
        self._refusal = "The request is no HTTP that RFC 9112 allows."

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._surplus += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._surplus > MAX_HEAD_BYTES:
            self._refusal = f"The request's head, or what stands between its chunks, passes {MAX_HEAD_BYTES} bytes."
            self.send_400_response("")
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()  # empty lines, say, which end uvicorn's keep-alive timer and begin nothing

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_came()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = f"The request's head passes {MAX_HEAD_BYTES} bytes."
            raise ValueError(self._refusal)  # which ends the parsing; uvicorn then answers 400
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        # Twice its length: what frames a chunk of five bytes or more is forgiven.
        self._surplus = max(0, self._surplus - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._surplus = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Our form instead of uvicorn's plain text, for what never became a request; then the connection ends."""
        content = json.dumps({"error": {"code": "malformed_request", "message": self._refusal}}).encode()
        self.transport.write(
            STATUS_LINE[400] + b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        self.transport.close()

    def _await_head(self) -> None:
        self._head_came()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _head_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def install() -> None:
    """Make it uvicorn's default: BentoML's worker names no protocol, and offers no way to."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__qualname__}"
