"""The audit log: what a line holds, that lines are whole, and what happens where they cannot be written."""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import audit
from service.audit import Audit, LogFile
from service.errors import ServiceError
from service.pipeline import Origin
from service.settings import Settings, SettingsError
from tests.service.conftest import LABELS, Home, counted, files, picture, png
from tests.service.serving import PROJECT_ROOT, Server, serving

FULL = Path("/dev/full")
ORIGIN = Origin("/explain", "r-1", "shop")
REFUSED = ServiceError("image_corrupt", "no line shows this")
SERVED: Any = SimpleNamespace(
    name="tiny",
    version="1",
    engine=SimpleNamespace(
        model=SimpleNamespace(weights_sha256="w", labels=LABELS), table=SimpleNamespace(table_sha256="t")
    ),
)


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def lost() -> float:
    return counted("parchgrad_audit_lost_total")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def audited(home: Home, path: Path) -> Iterator[Server]:
    key = hashlib.sha256(b"the-token").hexdigest()
    settings = home.settings | {"audit_log": path, "api_keys": f"shop:{key}", "workers": 2}
    with serving(home.root / "bentoml-audited", settings=settings) as running:
        running.client.headers["X-API-Key"] = "the-token"
        yield running


def test_a_line_for_each_image(audited: Server, path: Path) -> None:
    before = len(lines(path)) if path.exists() else 0
    images = [png(picture(1)), b"no image", png(picture(2))]
    options = {"target": "3", "quantile": "0.25", "gamma": "2", "polarity": "positive"}
    response = audited.client.post("/explain", files=files(*images), data=options, headers={"X-Request-Id": "r-7"})
    answer = response.json()
    assert response.status_code == 200
    first, bad, second = lines(path)[before:]
    for index, line in ((0, first), (2, second)):
        result = answer["results"][index]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert [line[name] for name in ("request_id", "caller", "route", "image", "status")] == [
            "r-7", "shop", "/explain", index, "ok"
        ]  # fmt: skip
        assert line["image_sha256"] == hashlib.sha256(images[index]).hexdigest()
        assert line["model"] == answer["model"]
        assert line["prediction"] == result["predictions"][0]
        written, answered = line["explanation"], result["explanation"]
        assert written.pop("targets") == [answered["target"] | {"status": "ok"}]
        assert {name: answered.get(name) for name in written} == written
        assert (written["quantile"], written["gamma"]) == (0.25, 2.0)
        assert {"status", "method", "rule", "selection", "conserve", "layers", "seed", "polarity"} <= written.keys()
    assert (bad["status"], bad["error"], bad["image"]) == ("error", "image_unsupported", 1)
    assert bad["image_sha256"] is None
    assert "prediction" not in bad


def test_lines_of_other_answers(audited: Server, path: Path) -> None:
    image = png(picture(4))
    before = len(lines(path))

    def post(route: str, **options: str) -> dict[str, Any]:
        response = audited.client.post(route, files=files(image), data=options)
        assert response.status_code == 200
        return dict(response.json()["results"][0])

    top = post("/explain", target="top:10")
    post("/explain", explain_when="confidence<0.0000001")
    post("/predict")
    several, skipped, predicted = lines(path)[before:]
    assert [target["status"] for target in several["explanation"]["targets"]] == [
        one["status"] for one in top["explanations"]
    ]
    assert several["explanation"]["status"] == "error"  # the table has no row for two of the ten classes
    assert skipped["explanation"]["status"] == "skipped"
    assert skipped["explanation"]["reason"]
    assert (predicted["route"], predicted["status"]) == ("/predict", "ok")
    assert "explanation" not in predicted


def test_no_token_and_no_image_in_it(audited: Server, path: Path) -> None:
    text = path.read_text()
    assert "the-token" not in text
    assert max(map(len, text.splitlines())) < 3000


def record(log: Audit, *outcomes: ServiceError, origin: Origin = ORIGIN) -> None:
    asyncio.run(log.record(origin, SERVED, outcomes))


def test_nothing_is_written_where_no_log_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record(Audit(Settings()), REFUSED)
    assert list(tmp_path.iterdir()) == []


def test_a_log_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Audit(Settings(audit_log=str(path)))
    record(log, REFUSED)
    path.rename(tmp_path / "log.1")
    LogFile(path).append(b'{"other": "worker"}\n')  # which was first to begin the new file
    record(log, REFUSED, REFUSED)
    assert len(lines(path)) == 3
    path.unlink()
    record(log, REFUSED, REFUSED, REFUSED)
    log.close()
    assert [len(lines(tmp_path / name)) for name in ("log.1", "log")] == [1, 3]
    assert path.stat().st_mode & 0o007 == 0


def test_what_comes_during_a_write_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, writes = tmp_path / "log", []
    free = threading.Event()
    append = LogFile.append

    def slow(file: LogFile, content: bytes) -> None:
        writes.append(content.count(b"\n"))
        free.wait()
        append(file, content)

    monkeypatch.setattr(LogFile, "append", slow)

    async def requests() -> None:
        log = Audit(Settings(audit_log=str(path)))
        tasks = [asyncio.create_task(log.record(Origin("/x", str(i), None), SERVED, [REFUSED])) for i in range(50)]
        while not writes:
            await asyncio.sleep(0.001)
        tasks[30].cancel()  # a caller that went away: its image was answered all the same
        assert not any(task.done() for task in tasks[:30])  # no answer before its line
        free.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        log.close()

    asyncio.run(requests())
    assert writes == [50] or (len(writes) == 2 and sum(writes) == 50)
    assert [line["request_id"] for line in lines(path)] == [str(i) for i in range(50)]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_and_a_log_that_is_required() -> None:
    before = lost()
    log = Audit(Settings(audit_log=str(FULL), audit_required=True))
    with pytest.raises(ServiceError, match="The audit log cannot be written") as error:
        record(log, REFUSED)
    assert (error.value.code, error.value.status) == ("audit_unavailable", 503)
    assert error.value.headers["Retry-After"]
    assert lost() == before  # nothing was answered that has no line
    log.close()


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_and_a_log_that_is_not(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    before, clock = lost(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(audit, "time", SimpleNamespace(monotonic=lambda: clock.now))
    log = Audit(Settings(audit_log=str(FULL)))
    with caplog.at_level(logging.ERROR):
        for clock.now in (1000.0, 1001.0, 1059.0, 1060.0, 1061.0):
            record(log, REFUSED, REFUSED)
    assert lost() - before == 10
    assert len(caplog.records) == 2
    assert "No space left" in caplog.text
    log.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process, as it were, holds the log's lock."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def hanging(path: Path) -> Iterator[None]:
    """A log that every write to hangs, as on a file system that does not answer: a full pipe nobody reads."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(end, b"\n" * 4096)
    try:
        yield
    finally:
        with suppress(BlockingIOError):
            while True:
                os.read(end, 1 << 20)
        os.close(end)


@pytest.mark.parametrize(("stuck", "said"), [(locked, "its lock was not free for 0.2 s"), (hanging, "longer than 1 s")])
@pytest.mark.parametrize("required", [True, False])
def test_nobody_waits_long_for_a_stuck_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stuck: Callable[[Path], AbstractContextManager[None]],
    said: str,
    required: bool,
) -> None:
    monkeypatch.setattr(audit, "LOCK_TRIES", 20)
    monkeypatch.setattr(audit, "WAIT_SECONDS", 1.0)
    before, path = lost(), tmp_path / "log"

    async def answers(log: Audit) -> list[str]:
        results = await asyncio.gather(
            *(log.record(ORIGIN, SERVED, [REFUSED, REFUSED]) for _ in range(4)), return_exceptions=True
        )
        return [result.code if isinstance(result, ServiceError) else repr(result) for result in results]

    with caplog.at_level(logging.ERROR), stuck(path):
        log = Audit(Settings(audit_log=str(path), audit_required=required))
        assert asyncio.run(answers(log)) == [("audit_unavailable" if required else "None")] * 4
        log.close()  # which ends
    assert lost() - before == (0 if required else 8)
    assert said in caplog.text
    if stuck is locked:
        assert lines(path) == []  # what was answered as lost is not written afterwards


def test_a_log_that_was_stuck_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LOCK_TRIES", 2)
    path = tmp_path / "log"
    log = Audit(Settings(audit_log=str(path), audit_required=True))
    with locked(path), pytest.raises(ServiceError, match="The audit log cannot be written"):
        record(log, REFUSED)
    record(log, REFUSED, origin=Origin("/x", "after", None))
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["after"]


def test_what_was_given_up_is_not_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LOCK_TRIES", 100_000)
    monkeypatch.setattr(audit, "WAIT_SECONDS", 0.5)
    path, writing = tmp_path / "log", threading.Event()
    append = LogFile.append

    def noted(file: LogFile, content: bytes) -> None:
        writing.set()
        append(file, content)

    monkeypatch.setattr(LogFile, "append", noted)

    async def requests(log: Audit) -> None:
        first = asyncio.create_task(log.record(Origin("/x", "under way", None), SERVED, [REFUSED]))
        await asyncio.to_thread(writing.wait)
        with pytest.raises(ServiceError, match="The audit log cannot be written"):
            await log.record(Origin("/x", "waiting", None), SERVED, [REFUSED])
        with pytest.raises(ServiceError, match="The audit log cannot be written"):
            await first

    log = Audit(Settings(audit_log=str(path), audit_required=True))
    with locked(path):
        asyncio.run(requests(log))
    monkeypatch.setattr(audit, "WAIT_SECONDS", 60.0)  # it is stuck no longer
    record(log, REFUSED, origin=Origin("/x", "after", None))
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["under way", "after"]


def test_what_waits_for_a_stuck_log_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "WAITING_LINES", 6)
    monkeypatch.setattr(audit, "WAIT_SECONDS", 1.0)
    before = lost()

    async def requests(log: Audit) -> None:
        waiting = [asyncio.create_task(log.record(ORIGIN, SERVED, [REFUSED, REFUSED])) for _ in range(3)]
        await asyncio.sleep(0)
        assert lost() == before
        await log.record(ORIGIN, SERVED, [REFUSED, REFUSED, REFUSED])
        assert lost() - before == 3  # at once
        assert "6 lines are waiting, the most is 6" in caplog.text
        assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)
        assert lost() - before == 9
        await asyncio.sleep(0.1)
        caplog.clear()
        monkeypatch.setattr(log, "_warned", 0.0)
        await log.record(ORIGIN, SERVED, [REFUSED])  # once a write is known to hang nobody waits at all
        assert "a write has not ended for more than 1 s" in caplog.text

    with hanging(tmp_path / "log"), caplog.at_level(logging.ERROR):
        log = Audit(Settings(audit_log=str(tmp_path / "log")))
        asyncio.run(requests(log))
        log.close()
    assert lost() - before == 10


def test_lines_become_text_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    dumps = json.dumps

    def noting(*arguments: Any, **options: Any) -> str:
        threads.append(threading.current_thread())
        return dumps(*arguments, **options)

    monkeypatch.setattr(audit, "json", SimpleNamespace(dumps=noting))
    log = Audit(Settings(audit_log=str(tmp_path / "log")))
    record(log, REFUSED, REFUSED)
    log.close()
    assert [thread.name for thread in threads] == ["audit"] * 2
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("stuck", [locked, hanging])
def test_a_server_with_a_stuck_log_answers_and_ends(
    home: Home, tmp_path: Path, stuck: Callable[[Path], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "log"
    settings = home.settings | {"audit_log": path}
    with serving(home.root / f"bentoml-{stuck.__name__}", settings=settings) as server, ExitStack() as stack:
        if stuck is hanging:
            path.unlink(missing_ok=True)
        stack.enter_context(stuck(path))
        response = server.client.post("/predict", files=files(png(picture())))
        assert response.status_code == 200
        assert server.metric("parchgrad_audit_lost_total") == 1
        assert server.stop() == 0
        assert "The audit log cannot be written" in server.log.read_text()


# Run in processes of their own. A file that may have `room` bytes takes the beginning of what is written.
APPEND = """
import json, os, resource, signal, sys
from pathlib import Path
from service.audit import LogFile
path, writer, count, length, room = Path(sys.argv[1]), *map(int, sys.argv[2:])
if room:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = LogFile(path)
try:
    for i in range(count):
        file.append(json.dumps({"writer": writer, "line": i, "text": "x" * length}).encode() + b"\\n")
except OSError:
    sys.exit(7)
"""


def appending(path: Path, writer: int, count: int, length: int, room: int = 0) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", APPEND, str(path), *map(str, (writer, count, length, room))]
    return subprocess.Popen(command, cwd=PROJECT_ROOT)


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert appending(path, 0, 1000, 50, room=1000).wait() == 7
    assert [line["line"] for line in lines(path)] == list(range(11))  # of 85 or 86 bytes each
    LogFile(path).append(b'{"line": "after"}\n')
    assert lines(path)[-1] == {"line": "after"}


def test_a_line_after_half_a_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"line": 1}\n{"li')  # a writer was killed
    LogFile(path).append(b'{"line": 2}\n')
    assert path.read_text().splitlines() == ['{"line": 1}', '{"li', '{"line": 2}']


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    processes = [appending(path, writer, 200, 9000) for writer in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    written = lines(path)
    for writer in range(4):
        assert [line["line"] for line in written if line["writer"] == writer] == list(range(200))


def test_a_log_that_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"PARCHGRAD_AUDIT_LOG='.*/no/log': expected a file .*No such file"):
        audit.check(Settings(audit_log=str(tmp_path / "no" / "log")))
    with pytest.raises(SettingsError, match="Is a directory"):
        audit.check(Settings(audit_log=str(tmp_path)))
    audit.check(Settings())


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("required", [True, False])
def test_what_a_caller_sees_of_a_full_disk(home: Home, required: bool) -> None:
    settings = home.settings | {"audit_log": FULL, "audit_required": str(required).lower()}
    with serving(home.root / f"bentoml-full-{required}", settings=settings) as server:
        response = server.client.post("/predict", files=files(png(picture())))
        if required:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "audit_unavailable"
            assert response.headers["Retry-After"]
        else:
            assert response.status_code == 200
            assert len(response.json()["results"][0]["predictions"]) == 5
        assert server.metric("parchgrad_audit_lost_total") == (0 if required else 1)
        assert "No space left on device" in server.log.read_text()
