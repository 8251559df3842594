"""A short soak: mixed requests, a tenth of them wrong, and nothing left behind."""

import pytest

from benchmarks.load_clients import HUNG_UP, Reply, Request
from benchmarks.served import Subject
from benchmarks.soak import (
    BAD_SHARE,
    Growth,
    Sample,
    bad_requests,
    good_requests,
    left_behind,
    mixed,
    own_temporary_folder,
    soak,
    wrong_answers,
)
from tests.service.conftest import Home

POOL_THREADS = 16
COUNT, BLOCK = 600, 60
RIGHT = frozenset({200})


def samples(**changed: list[int]) -> list[Sample]:
    """Nine, of which three are the warm-up."""
    columns = {"resident": [0] * 9, "private": [0] * 9, "files": [5] * 9, "threads": [4] * 9, "temporary": [0] * 9}
    columns |= changed
    return [Sample(100 * i, **{name: values[i] for name, values in columns.items()}) for i in range(9)]


def test_a_soak_leaves_nothing_behind(home: Home) -> None:
    subject = Subject(home.root / "models", home.root / "tables", "tiny")
    with own_temporary_folder() as temporary, subject.server() as server:
        good, bad = good_requests(subject, server.url), bad_requests(subject, server.url, None)
        requests = mixed(good, bad, COUNT)
        found, replies = soak(server, temporary, requests, BLOCK)
        assert "Traceback" not in server.log.read_text()
        assert server.metric("parchgrad_admitted_images") == 0
        assert server.metric("parchgrad_queue_depth_images") == 0
    assert not wrong_answers(requests, replies)
    assert len(replies) == COUNT
    assert sum(reply.status != 200 for reply in replies) >= 0.9 * BAD_SHARE * COUNT
    assert [one.requests for one in found] == list(range(0, COUNT + 1, BLOCK))
    left = left_behind(found)
    assert left["files"] <= 0
    assert left["temporary"] <= 0
    assert left["threads"] < POOL_THREADS  # pools may still fill up after so short a warm-up; a leak would be hundreds


def test_a_tenth_is_bad_and_the_order_is_always_the_same() -> None:
    good = [Request(f"good {i}", b"", RIGHT) for i in range(7)]
    bad = [Request(f"bad {i}", b"", RIGHT) for i in range(3)]
    made = mixed(good, bad, 100)
    assert sum(one.name.startswith("bad") for one in made) == 10
    assert {one.name for one in made} == {one.name for one in [*good, *bad]}
    assert made == mixed(good, bad, 100)
    assert made != sorted(made, key=lambda one: one.name)


def test_wrong_answers_are_counted_by_request() -> None:
    requests = [Request("a", b"", RIGHT), Request("a", b"", RIGHT), Request("b", b"", frozenset({HUNG_UP}))]
    replies = [Reply(0, 0, status, None, b"why") for status in (200, 500, HUNG_UP)]
    assert wrong_answers(requests, replies) == {"a: 500 b'why'": 1}


@pytest.mark.parametrize("kind", ["files", "threads", "temporary"])
def test_what_grows_after_the_warm_up_is_left_behind(kind: str) -> None:
    none = {"files": 0, "threads": 0, "temporary": 0}
    assert left_behind(samples()) == none
    assert left_behind(samples(**{kind: [1, 9, 3, 5, 5, 5, 5, 9, 9]}))[kind] == 0  # as much as the warm-up had
    assert left_behind(samples(**{kind: [1, 9, 3, 5, 5, 5, 5, 9, 12]}))[kind] == 0  # one of the two may go again
    assert left_behind(samples(**{kind: [1, 9, 3, 5, 5, 5, 5, 12, 13]}))[kind] == 3


def test_growth_is_a_slope_with_its_error() -> None:
    requests = list(range(0, 1000, 100))
    grown = Growth.of([1e6 + 50 * number for number in requests], requests)
    assert grown.slope == pytest.approx(50_000)
    assert grown.error == pytest.approx(0, abs=1e-3)
    noisy = Growth.of([1e6 + (-1) ** i * 1000 for i in range(10)], requests)
    assert abs(noisy.slope) < 3 * noisy.error
