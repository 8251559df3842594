"""What a socket can do to the running service: heads and bodies too large, too slow, without end, or no HTTP at all."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPResponse
from threading import Thread

import pytest
import uvicorn
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

from service.connections import MAX_HEAD_BYTES, Connection
from service.settings import Settings
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, serving

BODY_TIMEOUT_MS = 1500
HEAD_TIMEOUT_MS = 2000
BODIES_BYTES = 30_000_000
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
RAW = HEAD + b"Content-Type: image/png\r\n"
BOUNDED = {
    "max_image_bytes": 200_000, "max_images": 2, "body_timeout_ms": BODY_TIMEOUT_MS, "head_timeout_ms": HEAD_TIMEOUT_MS,
}  # fmt: skip


@pytest.fixture(scope="module")
def bounded(home: Home) -> Iterator[Server]:
    with serving(home.root / "bentoml-bounded", settings=home.settings | BOUNDED) as running:
        assert good(running)  # what the first request opens for good is open
        yield running


@pytest.fixture(scope="module")
def roomy(home: Home) -> Iterator[Server]:
    """Images of the usual size, and room for two and a half bodies of 12 MB."""
    with serving(home.root / "bentoml-roomy", settings=home.settings | {"max_bodies_bytes": BODIES_BYTES}) as running:
        assert good(running)
        yield running


@dataclass
class Bare:
    """A server with nothing of ours but its connections: `/large`, `/pieces` answer at once, `/slow` after a while."""

    server: uvicorn.Server
    thread: Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"


LARGE = 30_000_000  # more than the kernel's buffers take
ANSWER_SECONDS = 0.5
SLOW_SECONDS = 0.8


async def _bare_app(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    path, pieces = scope["path"].encode(), [bytes(LARGE)]
    if path == b"/slow":
        await asyncio.sleep(SLOW_SECONDS)
        pieces = [path]
    elif path == b"/pieces":
        pieces = [bytes(LARGE // 30)] * 30
    length = (b"content-length", str(sum(map(len, pieces))).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    for left in reversed(range(len(pieces))):
        await send({"type": "http.response.body", "body": pieces[left], "more_body": left > 0})


@contextmanager
def barely_serving() -> Iterator[Bare]:
    settings = Settings(head_timeout_ms=400, answer_timeout_ms=int(1000 * ANSWER_SECONDS))
    # A partial is what makes one: uvicorn asks no more of it.
    protocol: type[asyncio.Protocol] = partial(Connection, settings)  # type: ignore[assignment]
    config = uvicorn.Config(_bare_app, port=0, http=protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    bare = Bare(server, Thread(target=server.run))
    bare.thread.start()
    try:
        assert eventually(lambda: server.started)
        yield bare
    finally:
        server.should_exit = server.force_exit = True
        bare.thread.join()


@pytest.fixture(scope="module")
def bare() -> Iterator[Bare]:
    with barely_serving() as running:
        yield running


def good(server: Server) -> bool:
    """Over a connection that does not stay: one that does is a descriptor more."""
    answer = server.client.post("/predict", files=files(png(picture())), headers={"Connection": "close"})
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
    """Asked five hundred times, a twentieth of a second apart: a worker closes in its own time."""
    for _ in range(500):
        if holds():
            return True
        time.sleep(0.05)
    return False


@contextmanager
def connected(server: Server | Bare) -> Iterator[socket.socket]:
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


def exchanged(server: Server | Bare, sent: bytes) -> bytes:
    """What the server answers before it closes the connection."""
    with connected(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        return received(connection)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def first_status(connection: socket.socket) -> int:
    """Of the one answer that comes, read to its end, on a connection that stays."""
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


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
        assert time.monotonic() - start >= HEAD_TIMEOUT_MS / 1000
        assert [received(connection) for connection in idle] == [b""] * 200


def test_a_kept_connection_may_not_trickle_either(bounded: Server) -> None:
    with connected(bounded) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert first_status(connection) == 200
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


def test_many_slow_bodies_stop_nobody(bounded: Server) -> None:
    with nothing_left(bounded), ExitStack() as stack:
        slow = [stack.enter_context(connected(bounded)) for _ in range(50)]
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
        answer += received(connection)
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


def test_requests_behind_one_another(bounded: Server) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with nothing_left(bounded):
        kept = exchanged(bounded, request * 20 + b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert kept.count(b"HTTP/1.1 200") == 21


def test_garbage_after_an_answer(bounded: Server) -> None:
    with nothing_left(bounded), connected(bounded) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert first_status(connection) == 200
        connection.sendall(JUNK)
        answer = received(connection)
        assert (status(answer), error(answer)) == (400, "malformed_request")


JUNK = b"\x00garbage\r\n\r\n"


@pytest.mark.parametrize(
    "junk",
    [
        JUNK,
        HEAD + b"X-Long: " + b"v" * 2 * MAX_HEAD_BYTES + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /livez HTTP/1.1\r\n",  # and no more, for longer than a head may take
    ],
    ids=["junk", "long head", "broken body", "half a head"],
)
@pytest.mark.parametrize(("requests", "pause"), [(1, 0), (1, 0.3), (2, 0)])
def test_an_answer_being_made_survives_what_comes_behind_its_request(
    bare: Bare, junk: bytes, requests: int, pause: float
) -> None:
    """It comes, it alone, and the connection ends: a 400 would be taken for it."""
    with connected(bare) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n" * requests)
        time.sleep(pause)
        with suppress(ConnectionError):
            connection.sendall(junk)
        answer = received(connection)
    answered = answer.count(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"/slow") == answered
    assert 1 <= answered <= requests
    if junk == JUNK:
        assert answered == requests
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_what_breaks_off_its_own_body_is_told(bare: Bare) -> None:
    """No answer is being made yet, so this is it."""
    answer = exchanged(bare, b"POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")
    assert (status(answer), error(answer)) == (400, "malformed_request")


@pytest.mark.parametrize("kept", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
@pytest.mark.parametrize(("path", "requests"), [(b"/large", 1), (b"/large", 3), (b"/pieces", 1)])
def test_who_does_not_read_loses_the_answer(bare: Bare, kept: bytes, path: bytes, requests: int) -> None:
    """Where it is whole and waits to be sent, and where the next one or its own rest waits for room."""
    connections = bare.server.server_state.connections
    assert eventually(lambda: not connections)
    start = time.monotonic()
    with connected(bare) as connection:
        connection.sendall((b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path, kept)) * requests)
        assert eventually(lambda: bool(connections))
        assert eventually(lambda: not connections)
        assert time.monotonic() - start >= ANSWER_SECONDS
        assert len(received(connection)) < LARGE
    assert eventually(lambda: not bare.server.server_state.tasks)


def test_who_reads_slowly_gets_it_all(bare: Bare) -> None:
    """For several times as long as one may read nothing, a piece far smaller than the kernel takes at once."""
    start, got = time.monotonic(), 0
    with connected(bare) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        while time.monotonic() - start < 6 * ANSWER_SECONDS:
            got += len(connection.recv(70_000))
            time.sleep(ANSWER_SECONDS / 5)
        assert got < LARGE / 10
        got += len(received(connection))
    assert got > LARGE


def test_a_server_that_stops_waits_for_nobody_who_does_not_read() -> None:
    with barely_serving() as server, connected(server) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert eventually(lambda: server.server.server_state.total_requests == 1)
        server.server.should_exit = True
        assert eventually(lambda: not server.thread.is_alive())


def upload_of(size: int, multipart: bool, path: bytes = b"/predict") -> bytes:
    """A request with one image of `size` bytes that are no image."""
    kind, start, end = b"image/png", b"", b""
    if multipart:
        kind = b"multipart/form-data; boundary=b"
        start = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        end = b"\r\n--b--\r\n"
    body = start + bytes(size) + end
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (path, kind, len(body)) + body


@pytest.mark.parametrize("multipart", [False, True], ids=["raw", "multipart"])
def test_uploads_on_their_way_share_a_bound(roomy: Server, multipart: bool) -> None:
    """In memory and on disk; the one too many is told so, and closing one makes room."""
    whole = upload_of(12_000_000, multipart)
    with nothing_left(roomy), ExitStack() as stack:
        half_way = [stack.enter_context(connected(roomy)) for _ in range(2)]
        for connection in half_way:
            connection.sendall(whole[:-10])
        refused = exchanged(roomy, whole)
        assert (status(refused), error(refused)) == (429, "queue_full")
        assert b"\r\nretry-after: 1\r\n" in refused.lower()
        assert status(exchanged(roomy, upload_of(12_000_000, not multipart))) == 429
        assert good(roomy)  # a small one has room
        half_way[0].close()
        assert eventually(lambda: status(exchanged(roomy, whole)) == 415)
        half_way[1].sendall(whole[-10:])
        assert status(received(half_way[1])) == 415


def test_uploads_give_their_share_back_however_they_end(roomy: Server) -> None:
    """Two and a half of them would fill it for ever."""
    large = upload_of(12_000_000, True)
    unfinished = large[:-10] + b"X" * 10
    for sent, expected in (
        (large, 415), (upload_of(12_000_000, False), 415), (unfinished, 400),
        (upload_of(12_000_000, True, b"/explain?no_such=1"), 422),
        (upload_of(12_000_000, True, b"/predict?model=x"), 404),
        (upload_of(12_000_000, False, b"/predict?timeout_ms=0"), 422), (upload_of(20_060_000, False), 413),
    ):  # fmt: skip
        for _ in range(3):
            assert status(exchanged(roomy, sent)) == expected
    with connected(roomy) as whole_and_gone:
        whole_and_gone.sendall(large)
    assert eventually(lambda: status(exchanged(roomy, upload_of(19_000_000, False))) == 415)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "GET", "CONNECT"])
def test_methods_that_a_route_has_not(bounded: Server, method: str) -> None:
    with nothing_left(bounded):
        answer = exchanged(bounded, f"{method} /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert (status(answer), error(answer)) == (405, "method_not_allowed")


def test_upgrades_are_not_taken(bounded: Server) -> None:
    upgrade = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: %b\r\n\r\n"
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
