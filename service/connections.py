"""HTTP connections as uvicorn has them, with bounds on a request's head and on who never reads, and our form of 400.

uvicorn's default with httptools has none of them: a header without end fills the memory, a connection that never
finishes its head stays for ever, and so does an answer that is never read. Of the bodies, body.py bounds what the
routes read.
"""

import array
import asyncio
import contextvars
import fcntl
import json
import termios
from functools import partial
from typing import Any, cast

import uvicorn.config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.settings import Settings

MAX_HEAD_BYTES = 65_536  # request line and headers: what h11, uvicorn's other parser, allows


class Connection(HttpToolsProtocol):
    """One connection; refuses a head too large or too slow, and bytes that are neither body nor head without end.

    Ends where the caller has read nothing of its answer between two looks, `answer_timeout_ms` apart.
    """

    def __init__(self, settings: Settings, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_seconds = settings.head_timeout_ms / 1000
        self._answer_seconds = settings.answer_timeout_ms / 1000
        self._deadline: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # `cycle` is the last request begun, which may still wait
        self._surplus = 0  # bytes of the message being received that are no body: its head, chunk sizes, trailers
        self._refusal = "The request is no HTTP that RFC 9112 allows."
        self._context = contextvars.copy_context()  # of no request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        if self._look is not None:
            self._look.cancel()
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

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Our form instead of uvicorn's plain text, for what never became a request; then the connection ends.

        Behind a request that is still being answered there is no 400, as the caller would take it for that answer.
        """
        if self._ends_with_answer():
            return
        content = json.dumps({"error": {"code": "malformed_request", "message": self._refusal}}).encode()
        self.transport.write(
            STATUS_LINE[400] + b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        self.transport.close()
        self._watch_reader()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        # A pipelined request is begun where the one before it ends, and would be logged and traced as a part of it.
        self._context.copy().run(super()._start_asgi_task, cycle, app)

    def _ends_with_answer(self) -> bool:
        """Where requests that came whole are still to be answered, they are the last; nothing more is read."""
        running = self._running
        if running is None or running.response_complete or (running.more_body and not running.response_started):
            return False
        last = running if self.cycle.more_body else self.cycle
        last.keep_alive = False  # uvicorn closes behind its answer
        self.flow.pause_reading()
        return True

    def _await_head(self) -> None:
        self._head_came()
        self._deadline = self.loop.call_later(self._head_seconds, self._head_is_late)

    def _head_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_is_late(self) -> None:
        if not self._ends_with_answer():
            self.timeout_keep_alive_handler()

    def _watch_reader(self) -> None:
        if self._look is None and self.transport.get_write_buffer_size():
            self._look = self.loop.call_later(self._answer_seconds, self._look_at_reader, self._unread_bytes())

    def _look_at_reader(self, before: int) -> None:
        """The keep-alive timer only closes, which waits for the buffer to empty, however long that takes."""
        self._look = None
        if self._unread_bytes() == before:
            self.transport.abort()
        else:
            self._watch_reader()

    def _unread_bytes(self) -> int:
        """Written and not yet acknowledged: our buffer, and the kernel's, which takes more only in large pieces."""
        in_kernel = array.array("i", [0])
        fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        return self.transport.get_write_buffer_size() + in_kernel[0]


def install(settings: Settings) -> None:
    """Make it uvicorn's default: BentoML's worker names no protocol, and offers no way to."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = cast(str, partial(Connection, settings))  # which may be what makes one
