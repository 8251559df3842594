"""What a socket can do to the running service: heads and bodies too large, too slow, without end, or no HTTP at all."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from service.connections import HEAD_SECONDS, MAX_HEAD_BYTES
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, serving

BODY_TIMEOUT_MS = 1500
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
RAW = HEAD + b"Content-Type: image/png\r\n"
BOUNDED = {"max_image_bytes": 200_000, "max_images": 2, "body_timeout_ms": BODY_TIMEOUT_MS}


@pytest.fixture(scope="module")
def bounded(home: Home) -> Iterator[Server]:
    with serving(home.root / "bentoml-bounded", settings=home.settings | BOUNDED) as running:
        assert good(running)  # what the first request opens for good is open
        yield running


def good(server: Server) -> bool:
    answer = server.client.post("/predict", files=files(png(picture())))
    return answer.status_code == 200 and answer.json()["results"][0]["status"] == "ok"


def descriptors(server: Server) -> int:
    (worker,) = server.workers()
    return int(worker.num_fds())


@contextmanager
def nothing_left(server: Server) -> Iterator[None]:
    """The service answers afterwards, and has no more open descriptors than before."""
    before = descriptors(server)
    yield
    assert good(server)
    assert eventually(lambda: descriptors(server) <= before)


def eventually(holds: Callable[[], bool]) -> bool:
    """Asked a hundred times, a quarter of a second apart: a worker closes in its own time."""
    for _ in range(100):
        if holds():
            return True
        time.sleep(0.25)
    return False


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        yield connection


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    content = b""
    with suppress(ConnectionResetError):  # it closed while more of ours was on its way
        while chunk := connection.recv(65536):
            content += chunk
    return content


def exchanged(server: Server, sent: bytes) -> bytes:
    """What the server answers before it closes the connection."""
    with connected(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        return received(connection)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> str:
    """The code of the last answer on the connection, which must be in our form."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return str(json.loads(body)["error"]["code"])


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"v" * 2 * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"X" * 2 * MAX_HEAD_BYTES + b": v\r\n\r\n",
        b"X-Many: v\r\n" * 10_000 + b"\r\n",
    ],
    ids=["value", "name", "many"],
)
def test_a_head_too_large(bounded: Server, head: bytes) -> None:
    with nothing_left(bounded):
        answer = exchanged(bounded, HEAD + head)
        assert status(answer) == 400
        assert error(answer) == "malformed_request"
        assert b"65536 bytes" in answer


def test_a_target_too_long(bounded: Server) -> None:
    with nothing_left(bounded):
        answer = exchanged(bounded, b"GET /?" + b"a" * 2 * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status(answer) == 400


@pytest.mark.parametrize("piece", [b"v" * 65536, b"v\r\nX: " * 8192], ids=["one", "many"])
def test_a_head_without_end_costs_no_memory(bounded: Server, piece: bytes) -> None:
    before, sent = bounded.resident_bytes(), 0
    with nothing_left(bounded), connected(bounded) as connection, suppress(ConnectionError):
        connection.sendall(HEAD + b"X: ")
        while sent < 200_000_000:
            sent += connection.send(piece)
    assert sent < 20_000_000  # what the buffers between us take; the rest was never read
    assert bounded.resident_bytes() < before + 20_000_000


def test_a_head_of_the_size_that_may_be(bounded: Server) -> None:
    filler = b"X-Long: " + b"v" * (MAX_HEAD_BYTES - 1000) + b"\r\n"
    answer = exchanged(bounded, b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + filler + b"\r\n")
    assert status(answer) == 200


def test_half_open_connections_stop_nobody_and_are_closed(bounded: Server) -> None:
    """Silent ones, heads that stop, heads that trickle, and lines that begin nothing."""
    start = time.monotonic()
    with nothing_left(bounded), ExitStack() as stack:
        open_before = descriptors(bounded)
        idle = [stack.enter_context(connected(bounded)) for _ in range(200)]
        for connection, sent in zip(idle, [b"", b"GET /li", HEAD, b"\r\n"] * 50, strict=True):
            connection.sendall(sent)
        assert good(bounded)

        def closed() -> bool:
            for connection, more in zip(idle, [b"", b"", b"X: y\r\n", b"\r\n"] * 50, strict=True):
                with suppress(ConnectionError):
                    connection.sendall(more)
            return descriptors(bounded) < open_before + 20

        assert eventually(closed)
        assert time.monotonic() - start >= HEAD_SECONDS - 1
        assert [received(connection) for connection in idle] == [b""] * 200


def test_a_kept_connection_may_not_trickle_either(bounded: Server) -> None:
    with connected(bounded) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status(connection.recv(65536)) == 200
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert received(connection) == b""


@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 1000\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"],
    ids=["declared", "chunked"],
)
def test_a_slow_body(bounded: Server, body: bytes) -> None:
    start = time.monotonic()
    with nothing_left(bounded):
        answer = exchanged(bounded, RAW + body)
        assert (status(answer), error(answer)) == (504, "deadline_exceeded")
        assert time.monotonic() - start >= BODY_TIMEOUT_MS / 1000


def test_a_hundred_slow_bodies_stop_nobody(bounded: Server) -> None:
    with nothing_left(bounded), ExitStack() as stack:
        slow = [stack.enter_context(connected(bounded)) for _ in range(100)]
        for connection in slow:
            connection.sendall(RAW + b"Content-Length: 1000\r\n\r\nabc")
        assert good(bounded)
        assert {status(received(connection)) for connection in slow} == {504}


@pytest.mark.parametrize(
    ("chunk", "code"),
    [
        (b"10000\r\n" + bytes(65536) + b"\r\n", "body_too_large"),
        (b"1\r\nx\r\n", "malformed_request"),
        (b"1;" + b"e" * 65536 + b"\r\nx\r\n", "malformed_request"),
        (b"0\r\n" + b"X-Trailer: v\r\n" * 4096, "malformed_request"),
    ],
    ids=["chunks", "tiny", "extensions", "trailers"],
)
def test_chunks_without_end(bounded: Server, chunk: bytes, code: str) -> None:
    before, sent = bounded.resident_bytes(), 0
    with nothing_left(bounded), connected(bounded) as connection:
        connection.settimeout(0.5)
        answer = b""
        with suppress(ConnectionError):
            connection.sendall(RAW + b"Transfer-Encoding: chunked\r\n\r\n")
            while sent < 100_000_000 and not answer:
                sent += connection.send(chunk * max(1, 65536 // len(chunk)))
                with suppress(TimeoutError):
                    connection.settimeout(0.001)
                    answer = connection.recv(65536)
                connection.settimeout(0.5)
        assert sent < 20_000_000
        assert status(answer) in (400, 413)
        assert error(answer) == code
    assert bounded.resident_bytes() < before + 20_000_000


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GARBAGE\r\n\r\n",
        b"GET /livez HTTP/9.9\r\nHost: a\r\n\r\n",
        b"FROB /livez HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nNo colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1_0\r\n\r\n0123456789",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    ],
)
def test_what_is_no_http(bounded: Server, sent: bytes) -> None:
    with nothing_left(bounded):
        answer = exchanged(bounded, sent)
        assert (status(answer), error(answer)) == (400, "malformed_request")
        assert b"onnection: close" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n",
    ],
)
def test_no_request_is_smuggled(bounded: Server, head: bytes) -> None:
    """Whichever length another server would believe, the request hidden in the body is never answered."""
    hidden = b"GET /models HTTP/1.1\r\nHost: a\r\nX-Request-Id: hidden\r\n\r\n"
    with nothing_left(bounded):
        answer = exchanged(bounded, RAW + head + b"\r\n0\r\n\r\n" + hidden)
        assert status(answer) == 400
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"hidden" not in answer


def test_garbage_after_a_request(bounded: Server) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with nothing_left(bounded):
        answer = exchanged(bounded, request + b"\x00garbage\r\n\r\n")
        assert error(answer) == "malformed_request"
        kept = exchanged(bounded, request * 20 + b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert kept.count(b"HTTP/1.1 200") == 21


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "GET", "CONNECT"])
def test_methods_that_a_route_has_not(bounded: Server, method: str) -> None:
    with nothing_left(bounded):
        answer = exchanged(bounded, f"{method} /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert (status(answer), error(answer)) == (405, "method_not_allowed")


def test_upgrades_are_not_taken(bounded: Server) -> None:
    upgrade = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n"
    with nothing_left(bounded):
        assert status(exchanged(bounded, upgrade % b"h2c")) in (200, 400)
        socketed = upgrade.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n")
        assert status(exchanged(bounded, socketed % b"websocket")) in (200, 400, 403)


def test_a_client_that_waits_to_be_asked_for_its_body(bounded: Server) -> None:
    """`Expect: 100-continue`: refused by its declared length without a byte of it."""
    with nothing_left(bounded):
        answer = exchanged(bounded, RAW + b"Expect: 100-continue\r\nContent-Length: 999999999\r\n\r\n")
        assert (status(answer), error(answer)) == (413, "body_too_large")
        assert b"100 Continue" not in answer
