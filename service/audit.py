"""The audit log: one JSON line for each image answered, written before its answer is sent. Never an image or a token.

Whole lines only: the workers append to one file under its lock, and a line that did not fit is taken back. A file
that is stuck (its lock is held, its file system hangs) is one that cannot be written: nobody waits for it for long.
"""

import asyncio
import errno
import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import metrics
from service.errors import ServiceError
from service.settings import PREFIX, PROJECT_ROOT, Settings, SettingsError

if TYPE_CHECKING:  # the pipeline knows the log; the log knows of it the shapes only
    from service.engine import Engine, Result
    from service.pipeline import Origin, Outcome
    from service.repository import Served

log = logging.getLogger(__name__)

WARN_EVERY = 60.0  # seconds
LOCK_TRIES, LOCK_PAUSE = 200, 0.01  # seconds; the other workers hold the lock for one write
WAIT_SECONDS = 5.0  # longer than two writes that do not get the lock: the one under way and one's own
WAITING_LINES = 10_000


def check(settings: Settings) -> None:
    """Raises SettingsError where the log's file cannot be opened."""
    if settings.audit_log:
        try:
            LogFile(PROJECT_ROOT / settings.audit_log).open()
        except OSError as error:
            raise SettingsError(
                f"{PREFIX}AUDIT_LOG", settings.audit_log, f"a file that can be appended to ({error.strerror})"
            ) from None


class LogFile:
    """A file that several processes append whole lines to, and that may be renamed away (logrotate) at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def open(self) -> None:
        self.close()
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def append(self, lines: bytes) -> None:
        """All of `lines`, or none of them and an OSError."""
        fd = self._current()
        _lock(fd)
        try:
            self._append(fd, lines)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def _append(self, fd: int, lines: bytes) -> None:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            lines = b"\n" + lines  # a writer was killed within its line: that one stays broken, ours does not
        try:
            written = 0
            while written < len(lines):  # a nearly full disk takes the beginning of it
                written += os.write(fd, memoryview(lines)[written:])
        except OSError:
            with suppress(OSError):  # a device or a pipe has no end to cut
                os.ftruncate(fd, size)
            raise

    def _current(self) -> int:
        """The descriptor of what stands at the path now."""
        if self._fd is not None:
            try:
                there, ours = os.stat(self._path), os.fstat(self._fd)
            except FileNotFoundError:
                self.close()
            else:
                if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                    self.close()
        if self._fd is None:
            self.open()
        assert self._fd is not None  # open() has set it or raised
        return self._fd


def _lock(fd: int) -> None:
    """Raises BlockingIOError where somebody keeps the lock for longer than a write takes."""
    for _ in range(LOCK_TRIES):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE)
    raise BlockingIOError(errno.EWOULDBLOCK, f"its lock was not free for {LOCK_TRIES * LOCK_PAUSE:g} s")


@dataclass(frozen=True)
class Lines:
    """One request's entries; `written` is done once they are in the file, and cancelled where nobody wants them now."""

    entries: list[dict[str, Any]]
    written: "Future[None]" = field(default_factory=Future)


class Writer:
    """A thread that appends what is waiting. What comes while a write is under way goes into the next one, together.

    A daemon, which no executor's thread is: the process ends although the file system does not answer.
    """

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._changed = threading.Condition()
        self._waiting: list[Lines] = []
        self._pending = 0  # lines that are waiting or being written
        self._busy_since: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def add(self, lines: Lines) -> None:
        """Raises OSError where there is no hope that they are written soon."""
        with self._changed:
            if self._closed:
                raise OSError("it is closed")
            if self._busy_since is not None and time.monotonic() - self._busy_since > WAIT_SECONDS:
                raise OSError(f"a write has not ended for more than {WAIT_SECONDS:g} s")
            if self._pending >= WAITING_LINES:
                raise OSError(f"{self._pending} lines are waiting, the most is {WAITING_LINES}")
            self._waiting.append(lines)
            self._pending += len(lines.entries)
            self._changed.notify()

    def close(self) -> None:
        """Write what is waiting and close the file, or leave both to a thread that hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(WAIT_SECONDS)

    def _run(self) -> None:
        while group := self._take():
            self._write(group)
        self._file.close()

    def _take(self) -> list[Lines]:
        """All that is waiting, once there is something; nothing once the writer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            group, self._waiting = self._waiting, []
            self._busy_since = time.monotonic()
            return group

    def _write(self, group: list[Lines]) -> None:
        encoded: list[tuple[Lines, bytes]] = []
        for lines in group:
            if lines.written.set_running_or_notify_cancel():
                try:
                    encoded.append((lines, _encoded(lines.entries)))
                except ValueError as error:
                    lines.written.set_exception(error)
        failure: Exception | None = None
        try:
            self._file.append(b"".join(content for _, content in encoded))
        except Exception as error:  # the thread lives on, and whoever waits is told
            failure = error
        with self._changed:
            self._pending -= sum(len(lines.entries) for lines in group)
            self._busy_since = None
        for lines, _ in encoded:
            if failure is None:
                lines.written.set_result(None)
            else:
                lines.written.set_exception(failure)


def _encoded(entries: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one, allow_nan=False).encode() + b"\n" for one in entries)


class Audit:
    """One worker's log, if the settings ask for one, and what becomes of a request whose lines cannot be written."""

    def __init__(self, settings: Settings) -> None:
        self._writer = Writer(LogFile(PROJECT_ROOT / settings.audit_log)) if settings.audit_log else None
        self._required = settings.audit_required
        self._warned = -math.inf

    async def record(self, origin: "Origin", served: "Served", outcomes: "Sequence[Outcome | ServiceError]") -> None:
        """Write a line for each outcome, and wait until they are written, WAIT_SECONDS at most.

        Raises ServiceError(audit_unavailable) where they cannot be and PARCHGRAD_AUDIT_REQUIRED says they must.
        """
        if self._writer is not None and outcomes:
            await self._append([entry(origin, served, outcome, index) for index, outcome in enumerate(outcomes)])

    async def record_change(self, origin: "Origin", name: str, *, served: bool, result: str) -> None:
        """Write a line for a load or an unload: who asked for it, and `ok` or the error's code. Raises as `record`."""
        if self._writer is not None:
            change = {"action": "load" if served else "unload", "model": name, "status": result}
            await self._append([_asked(origin) | change])

    async def _append(self, entries: list[dict[str, Any]]) -> None:
        assert self._writer is not None  # the callers have looked
        lines = Lines(entries)
        try:
            self._writer.add(lines)
            await _until_written(lines)
        except OSError as error:
            self._warn(error)
            if self._required:
                raise ServiceError("audit_unavailable", "The audit log cannot be written; the log says why.") from error
            metrics.audit_lost.inc(len(entries))

    def _warn(self, error: OSError) -> None:
        if time.monotonic() - self._warned >= WARN_EVERY:
            self._warned = time.monotonic()
            log.error(
                "The audit log cannot be written (%s); %s.",
                error,
                "requests are refused" if self._required else "answers go out without a line",
            )

    def close(self) -> None:
        """Finish what is being written and close the file; WAIT_SECONDS at most."""
        if self._writer is not None:
            self._writer.close()


async def _until_written(lines: Lines) -> None:
    """Raises OSError where they could not be, or not in time. A caller that goes away leaves its lines in place."""
    try:
        async with asyncio.timeout(WAIT_SECONDS) as limit:
            await asyncio.shield(asyncio.wrap_future(lines.written))
    except TimeoutError:
        if not limit.expired():  # the file system's own
            raise
        lines.written.cancel()  # what has not been begun is not written later: no line without its answer
        raise TimeoutError(f"it took longer than {WAIT_SECONDS:g} s") from None


def entry(origin: "Origin", served: "Served", outcome: "Outcome | ServiceError", index: int) -> dict[str, Any]:
    """All that is written of one image; `image` is its place in the request."""
    engine = served.engine
    line: dict[str, Any] = {
        **_asked(origin),
        "image": index,
        "image_sha256": None,
        "status": "error",
        "model": {
            "name": served.name,
            "version": served.version,
            "weights_sha256": engine.model.weights_sha256,
            "table_sha256": engine.table.table_sha256,
        },
    }
    if isinstance(outcome, ServiceError):
        return line | {"error": outcome.code}
    first = outcome.first
    line |= {
        "image_sha256": outcome.prepared.sha256,
        "status": "ok",
        "prediction": _class(engine, first, int(first.probabilities.argmax())),
    }
    if outcome.request.options is not None:
        line["explanation"] = _explanation(engine, outcome)
    return line


def _asked(origin: "Origin") -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": origin.request_id,
        "caller": origin.caller,
        "route": origin.route,
    }


def _explanation(engine: "Engine", outcome: "Outcome") -> dict[str, Any]:
    # answers.py stands above the pipeline, which stands above this
    from service.answers import effective_options, map_error

    request = outcome.request
    assert request.options is not None  # the caller has looked
    explanation: dict[str, Any]
    if outcome.missing is not None:
        explanation = {"status": outcome.missing.status, "reason": outcome.missing.reason}
    else:
        errors = [map_error(engine, result) for result in outcome.results]
        targets = [
            _class(engine, result, result.target) | ({"status": "error", "error": e.code} if e else {"status": "ok"})
            for result, e in zip(outcome.results, errors, strict=True)
        ]
        explanation = {"status": "error" if any(errors) else "ok", "targets": targets}
    return explanation | {"polarity": request.asked.polarity} | effective_options(request.options)


def _class(engine: "Engine", result: "Result", index: int) -> dict[str, Any]:
    probability = float(result.probabilities[index])
    return {
        "index": index,
        "label": engine.model.labels[index],
        "probability": probability if math.isfinite(probability) else None,
    }
