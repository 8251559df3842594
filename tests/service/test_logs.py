"""service/logs.py: every line says which request it is of, and is one line, as text and as JSON."""

import asyncio
import contextvars
import io
import json
import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
from bentoml._internal.log import TraceRecordFilter

from service import logs
from service.batching import Batcher, Wanted
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, serving

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[[A-Z]+\] \[[^]]*\] ")
SECRET = "a-key-that-nobody-may-read"
TRIES = 600  # times a twentieth of a second


@pytest.fixture(scope="module")
def in_json(home: Home) -> Iterator[Server]:
    with serving(home.root / "bentoml_json", settings=home.settings | {"log_format": "json"}) as running:
        yield running


def written_lines(server: Server, ident: str) -> list[str]:
    """The whole log, once a line of it names the request: it is written after the answer went out."""
    for _ in range(TRIES):
        whole, _, _ = server.log.read_text().rpartition("\n")  # the last line may be half written
        if ident in whole:
            return whole.splitlines()
        time.sleep(0.05)
    raise AssertionError(f"no line of the log names {ident}")


def lines(server: Server, ident: str) -> list[dict[str, Any]]:
    """Of one request; every line of the log has to be an object."""
    everything = [json.loads(line) for line in written_lines(server, ident)]
    assert all(isinstance(one, dict) and {"timestamp", "level", "logger", "message"} <= set(one) for one in everything)
    return [one for one in everything if one.get("request_id") == ident]


def test_a_request_is_one_object(in_json: Server) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "Authorization": f"Bearer {SECRET}"}
    answer = in_json.client.post("/explain?target=1", files=files(png(picture())), headers=headers)
    assert answer.status_code == 200
    (line,) = lines(in_json, answer.headers["x-request-id"])
    then = datetime.fromisoformat(line.pop("timestamp"))
    assert then.utcoffset() is not None
    assert abs((datetime.now(UTC) - then).total_seconds()) < 3600
    assert line.pop("milliseconds") > 0
    assert line.pop("process") in [worker.pid for worker in in_json.workers()]
    assert line == {
        "level": "INFO", "logger": "bentoml.parchgrad.access", "message": "answered",
        "request_id": answer.headers["x-request-id"], "trace_id": trace,
        "method": "POST", "route": "/explain", "path": "/explain", "status": 200, "code": "ok",
        "kind": "explain", "model": "tiny", "version": "1",
    }  # fmt: skip
    assert SECRET not in in_json.log.read_text()


def test_a_refusal_has_its_code(in_json: Server) -> None:
    answer = in_json.client.post("/predict?top_k=11", files=files(png(picture())), headers={"X-Request-Id": "mine-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (422, "mine-1")
    (line,) = lines(in_json, "mine-1")
    assert (line["status"], line["code"], line["model"]) == (422, "option_invalid", "tiny")


HOSTILE = '/a%0A2026-01-01 [INFO] x%0D%0A{"level":"INFO"}%E2%80%A8%1B[2J'


def test_a_path_begins_no_line(in_json: Server, server: Server) -> None:
    """In JSON, and in the text that is the default."""
    path = HOSTILE.replace(" ", "%20").replace('"', "%22").replace("{", "%7B").replace("}", "%7D")
    answer = in_json.client.get(path)
    assert answer.status_code == 404
    (line,) = lines(in_json, answer.headers["x-request-id"])
    assert line["path"] == '/a\n2026-01-01 [INFO] x\r\n{"level":"INFO"}\u2028\x1b[2J'
    answer = server.client.get(path)
    assert answer.status_code == 404
    assert all(LINE.match(one) for one in written_lines(server, answer.headers["x-request-id"]))
    assert "\x1b[2J" not in server.log.read_text()


def test_text_is_as_it_was(server: Server) -> None:
    answer = server.client.get("/models", headers={"X-Request-Id": "mine-2"})
    assert answer.status_code == 200
    (line,) = [one for one in written_lines(server, "mine-2") if "mine-2" in one]
    assert re.fullmatch(
        LINE.pattern + r"GET '/models' 200 [0-9.]+ ms mine-2 \(trace=[0-9a-f]{32},span=[0-9a-f]{16},sampled=0,"
        r"service.name=parchgrad\)",
        line,
    )


def test_requests_of_one_connection_keep_their_ids(in_json: Server) -> None:
    host, port = in_json.url.removeprefix("http://").split(":")
    asked = "".join(f"GET /models HTTP/1.1\r\nHost: x\r\nX-Request-Id: piped-{i}\r\n\r\n" for i in range(3))
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(asked.encode())
        received = b""
        while received.count(b"HTTP/1.1 200") < 3:
            received += connection.recv(65536)
    assert [len(lines(in_json, f"piped-{i}")) for i in range(3)] == [1, 1, 1]


# --- without a server -----------------------------------------------------------------------------------------


@pytest.fixture
def written() -> Iterator[dict[str, io.StringIO]]:
    """What a worker's handler writes of our loggers, in both forms."""
    log, streams, handlers = logging.getLogger("service"), {}, []
    for name, formatter in (("text", logs.TextLines()), ("json", logs.JsonLines())):
        streams[name] = io.StringIO()
        handler = logging.StreamHandler(streams[name])
        handler.addFilter(TraceRecordFilter())
        handler.addFilter(logs.RequestFilter())
        handler.setFormatter(formatter)
        log.addHandler(handler)
        handlers.append(handler)
    yield streams
    for handler in handlers:
        log.removeHandler(handler)


def test_an_error_of_a_callers_making_begins_no_line(written: dict[str, io.StringIO]) -> None:
    log = logging.getLogger("service.somewhere")
    token = logs.request_id.set("abc")
    try:
        try:
            raise ValueError("first\n2026-01-01 [INFO] second\r\x85third")
        except ValueError:
            log.exception("What failed: %s", "one\ntwo")
    finally:
        logs.request_id.reset(token)
    first, *others = written["text"].getvalue().splitlines()
    assert LINE.match(first)
    assert first.endswith("What failed: one")
    assert others[0] == "    two (request=abc)"
    assert all(line.startswith("    ") for line in others)
    assert others[-1] == "    2026-01-01 [INFO] second\\x0d\\x85third"
    (line,) = written["json"].getvalue().splitlines()
    found = json.loads(line)
    assert (found["message"], found["request_id"], found["level"]) == ("What failed: one\ntwo", "abc", "ERROR")
    assert found["exception"].endswith("second\r\x85third")


def test_a_log_call_that_is_wrong_harms_nobody(
    written: dict[str, io.StringIO], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever library makes it, while a request is in hand: logging reports it on stderr."""
    monkeypatch.setattr(logging.getLogger("service"), "propagate", False)  # pytest's own handler raises
    token = logs.request_id.set("abc")
    try:
        logging.getLogger("service.somewhere").warning("%d", "no number")
    finally:
        logs.request_id.reset(token)
    assert "--- Logging error ---" in capsys.readouterr().err
    assert written["text"].getvalue() == ""


def test_the_devices_lines_name_whoever_waits(written: dict[str, io.StringIO]) -> None:
    """One batch fails, is run again one by one: its own line names both, each later one its own request."""
    log = logging.getLogger("service.device")

    def run(jobs: Sequence[int], wanted: Wanted) -> list[int]:
        log.warning("device has %s", list(jobs))
        if len(jobs) > 1:
            raise ValueError("not together")
        return list(jobs)

    async def ask(batcher: Batcher[int, int], job: int) -> None:
        logs.request_id.set(f"request-{job}")
        await batcher.submit(job, asyncio.get_running_loop().time() + 60)

    async def both() -> None:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(run, lambda job: ("predict", 0), pool, capacity=lambda job: 4, max_queue=9)
            await asyncio.gather(ask(batcher, 1), ask(batcher, 2))
            await batcher.close()

    asyncio.run(both())
    found = [(one["message"], one["request_id"]) for one in map(json.loads, written["json"].getvalue().splitlines())]
    assert found == [
        ("device has [1, 2]", "request-1,request-2"),
        ("A batch of 2 failed (ValueError('not together')); its items run one by one.", "request-1,request-2"),
        ("device has [1]", "request-1"),
        ("device has [2]", "request-2"),
    ]


def test_images_of_one_request_together_are_its_own() -> None:
    context = contextvars.Context()
    context.run(logs.request_id.set, "one")
    assert logs.together([context, context.copy()]).get(logs.request_id) == "one"
    assert logs.together([contextvars.Context()]).get(logs.request_id, "") == ""
