"""The audit log: one JSON line for each image answered, written before its answer is sent. Never an image or a token.

Whole lines only: the workers append to one file under its lock, and a line that did not fit is taken back.
"""

import asyncio
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from service import metrics
from service.errors import ServiceError
from service.settings import PREFIX, PROJECT_ROOT, Settings, SettingsError

if TYPE_CHECKING:  # the pipeline knows the log; the log knows of it the shapes only
    from service.engine import Engine, Result
    from service.pipeline import Origin, Outcome
    from service.repository import Served

log = logging.getLogger(__name__)

WARN_EVERY = 60.0  # seconds


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
        fcntl.flock(fd, fcntl.LOCK_EX)
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


class Audit:
    """One worker's writer. What comes while a write is under way goes into the next one, together."""

    def __init__(self, settings: Settings) -> None:
        self._file = LogFile(PROJECT_ROOT / settings.audit_log) if settings.audit_log else None
        self._required = settings.audit_required
        self._thread = ThreadPoolExecutor(1, "audit")
        self._waiting: list[tuple[bytes, int, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._warned = -math.inf

    async def record(self, origin: "Origin", served: "Served", outcomes: "Sequence[Outcome | ServiceError]") -> None:
        """Write a line for each outcome, and wait until they are written.

        Raises ServiceError(audit_unavailable) where they cannot be and PARCHGRAD_AUDIT_REQUIRED says they must.
        """
        if self._file is None or not outcomes:
            return
        entries = [entry(origin, served, outcome, index) for index, outcome in enumerate(outcomes)]
        lines = b"".join(json.dumps(one, allow_nan=False).encode() + b"\n" for one in entries)
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((lines, len(entries), written))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(self._file))
        try:
            await written
        except OSError as error:
            if self._required:
                raise ServiceError("audit_unavailable", "The audit log cannot be written; the log says why.") from error

    async def _write(self, file: LogFile) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                lines = b"".join(lines for lines, _, _ in group)
                failure: OSError | None = None
                try:
                    await asyncio.get_running_loop().run_in_executor(self._thread, file.append, lines)
                except OSError as error:
                    failure = error
                    self._count_lost(sum(count for _, count, _ in group), error)
                for _, _, written in group:
                    if written.done():  # its caller went away
                        continue
                    if failure is None:
                        written.set_result(None)
                    else:
                        written.set_exception(failure)
        finally:
            self._writer = None

    def _count_lost(self, lines: int, error: OSError) -> None:
        if not self._required:
            metrics.audit_lost.inc(lines)
        if time.monotonic() - self._warned >= WARN_EVERY:
            self._warned = time.monotonic()
            log.error(
                "The audit log cannot be written (%s); %s.",
                error,
                "requests are refused" if self._required else "answers go out without a line",
            )

    def close(self) -> None:
        """Finish what is being written, then close the file."""
        self._thread.shutdown()
        if self._file is not None:
            self._file.close()


def entry(origin: "Origin", served: "Served", outcome: "Outcome | ServiceError", index: int) -> dict[str, Any]:
    """All that is written of one image; `image` is its place in the request."""
    engine = served.engine
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": origin.request_id,
        "caller": origin.caller,
        "route": origin.route,
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


def _explanation(engine: "Engine", outcome: "Outcome") -> dict[str, Any]:
    from service.answers import effective_options  # answers.py stands above the pipeline, which stands above this

    request = outcome.request
    assert request.options is not None  # the caller has looked
    explanation: dict[str, Any]
    if outcome.missing is not None:
        explanation = {"status": outcome.missing.status, "reason": outcome.missing.reason}
    else:
        made = [one.saliency is not None and bool(np.isfinite(one.saliency).all()) for one in outcome.results]
        targets = [
            _class(engine, result, result.target) | {"status": "ok" if ok else "error"}
            for result, ok in zip(outcome.results, made, strict=True)
        ]
        explanation = {"status": "ok" if all(made) else "error", "targets": targets}
    return explanation | {"polarity": request.asked.polarity} | effective_options(request.options)


def _class(engine: "Engine", result: "Result", index: int) -> dict[str, Any]:
    probability = float(result.probabilities[index])
    return {
        "index": index,
        "label": engine.model.labels[index],
        "probability": probability if math.isfinite(probability) else None,
    }
