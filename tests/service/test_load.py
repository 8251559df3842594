"""The service under load, as its benchmark sees it: the clients count right, and nobody's answer is another's."""

import json
import socketserver
import threading
from collections.abc import Iterator

import pytest

from benchmarks.load_clients import (
    HUNG_UP,
    LOST,
    Connection,
    Load,
    Reply,
    Request,
    closed_loop,
    each_once,
    in_process_of_its_own,
    open_loop,
    wire,
)
from benchmarks.served import Counters, Subject, Usage, multipart, open_inference
from benchmarks.service_load import FORMS, Alone, Processes, Round, Row, alone, measure, ratios, requests_of
from tests.service.conftest import Home, picture, png
from tests.service.serving import Server


def replies_at(*finished: float) -> Load:
    """Each asked half a second before."""
    return Load([Reply(one - 0.5, 0.5, 200, None, b"") for one in finished], 1.0, 0.0)


def row(form: str, **figures: float) -> Row:
    chosen = dict.fromkeys(Row.__dataclass_fields__, 0.0) | figures
    return Row(**{**chosen, "form": form})


@pytest.fixture
def subject(home: Home) -> Subject:
    return Subject(home.root / "models", home.root / "tables", "tiny")


def test_a_rate_counts_from_the_end_of_one_batch_to_the_end_of_another() -> None:
    ends = [0.5, 1.0, 1.5, 2.0]
    load = replies_at(*(end for end in ends for _ in range(4)))
    assert load.rate(clients=4) == pytest.approx(8 / 1.0)  # from 0.5 to 1.5: the last batch was drained, not driven
    with pytest.raises(ValueError, match="4 replies to 4 clients are too few"):
        replies_at(1, 1, 1, 1).rate(clients=4)


def test_ratios_are_service_over_library() -> None:
    service = row("native predict", rate=45.0, device_ms=20.0, server_ms=25.0)
    found = ratios([Round(service, Alone(rate=50.0, cpu_ms=18.0), decoding_ms=3.0)])
    assert found == {
        "wall": [0.9],
        "CPU, device thread": [0.9],
        "CPU, worker": [18 / 25],
        "CPU, worker, with decoding": [21 / 25],
    }
    tensors = row("v2 predict", rate=45.0, device_ms=20.0, server_ms=25.0)
    (with_decoding,) = ratios([Round(tensors, Alone(50.0, 18.0), 3.0)])["CPU, worker, with decoding"]
    assert with_decoding == 18 / 25  # nothing is decoded


@pytest.mark.parametrize("kind", ["predict", "explain"])
def test_every_client_gets_the_answer_of_its_own_picture(server: Server, kind: str) -> None:
    """32 clients, 128 requests, eight pictures in turn: each answer is what that picture gets alone."""
    images = [png(picture(seed)) for seed in range(8)]
    requests = [wire(multipart(server.url, kind, [image])) for image in images]
    expected = [server.client.post(f"/{kind}", files={"image": ("x", image)}).json()["results"] for image in images]
    before = Counters.of(server)
    named = [Request(str(number % 8), requests[number % 8], frozenset({200})) for number in range(128)]
    with in_process_of_its_own() as clients:
        replies = clients.submit(each_once, server.url, named, 32).result()
    assert [reply.status for reply in replies] == [200] * 128
    for number, reply in enumerate(replies):
        (found,), (wanted,) = json.loads(reply.body)["results"], expected[number % 8]
        assert [one["index"] for one in found["predictions"]] == [one["index"] for one in wanted["predictions"]]
        assert found["predictions"][0]["probability"] == pytest.approx(
            wanted["predictions"][0]["probability"], rel=1e-4
        )
        if kind == "explain":
            assert found["explanation"]["target"]["index"] == wanted["explanation"]["target"]["index"]
            assert found["explanation"]["quality"]["gini"] == pytest.approx(
                wanted["explanation"]["quality"]["gini"], rel=1e-3
            )
    counted = Counters.of(server).since(before)
    assert counted.total("parchgrad_requests_total", route=f"/{kind}", status="200") == 128
    assert counted.total("parchgrad_batch_images_sum", kind=kind) == 128
    assert counted.mean("parchgrad_batch_images", kind=kind) > 1
    assert counted.total("parchgrad_decode_seconds_count") == 128


@pytest.mark.parametrize("form", FORMS)
def test_a_load_is_measured(server: Server, subject: Subject, form: str) -> None:
    with in_process_of_its_own() as one, in_process_of_its_own() as other:
        processes = Processes(one, other, other)
        found = measure(server, processes, form, requests_of(subject, server.url, form), clients=4, seconds=1.0)
    assert found.rate > 0
    assert 0 < found.p50 <= found.p99
    assert 1 <= found.batch <= 4
    assert found.device_ms < found.server_ms
    assert found.loop_ms < found.server_ms
    assert 0 <= found.late <= found.ticks
    assert found.ticks > 0
    assert found.bystander_ticks > 0


def test_the_library_alone_is_measured(subject: Subject) -> None:
    with in_process_of_its_own() as library:
        found = library.submit(alone, subject, "explain", 20, 0.2).result()
    assert found.rate > 0
    assert found.cpu_ms > 0


def test_usage_is_of_the_time_between(server: Server) -> None:
    before = Usage.of(server)
    request = wire(multipart(server.url, "explain", [png(picture())] * 16, data={"method": "smoothgrad"}))
    assert closed_loop(server.url, [request], 1, 0.0, 2).statuses() == {200: 2}
    used = Usage.of(server).since(before)
    assert 0 < used.device <= used.total < Usage.of(server).total
    assert used.loop < used.device


def test_a_v2_request_is_what_the_service_reads(server: Server, subject: Subject) -> None:
    for images in (subject.tensors()[:2], subject.files()[:2]):
        answer = server.client.send(open_inference(server.url, "tiny", "explain", images))
        assert answer.status_code == 200, answer.text
        length = int(answer.headers["inference-header-content-length"])
        shapes = {one["name"]: one["shape"] for one in json.loads(answer.content[:length])["outputs"]}
        assert shapes == {"probabilities": [2, 10], "saliency": [2, 64, 64]}


def test_an_open_loop_sends_all_it_was_told_to(server: Server) -> None:
    request = wire(multipart(server.url, "predict", [png(picture())]))
    load = open_loop(server.url, [request], rate=50.0, count=25)
    assert load.statuses() == {200: 25}
    assert max(reply.sent for reply in load.replies) >= 24 / 50  # at even steps, not all at once


# --- servers that do not behave -----------------------------------------------------------------------------


class _Closing(socketserver.BaseRequestHandler):
    """Answers the first request of a connection and closes it at the second; counts what it was sent."""

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno")
        self.request.recv(65536)


@pytest.fixture
def closing() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Closing) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def test_a_connection_that_closes_is_a_lost_request(closing: str) -> None:
    requests = [Request("any", b"GET / HTTP/1.1\r\n\r\n", frozenset({200}))] * 3
    first, second, third = each_once(closing, requests, clients=1)
    assert (first.status, first.retry_after, first.body) == (429, "7", b"no")
    assert (second.status, second.retry_after) == (LOST, None)
    assert third.status == 429  # on a connection of its own


def test_who_hangs_up_sends_only_so_much(closing: str) -> None:
    requests = [Request("any", b"GET / HTTP/1.1\r\n\r\n", frozenset({HUNG_UP}), 5)]
    assert [reply.status for reply in each_once(closing, requests, clients=2)] == [HUNG_UP]
    assert Connection(closing)  # nothing is opened before it is needed
