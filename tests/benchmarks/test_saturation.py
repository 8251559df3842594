"""The saturation run on made-up figures: what is computed of them, its file, tables and picture, and both commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import replicas, saturation
from benchmarks.load_clients import Load, Reply
from benchmarks.queueing import Figures, Lane, Replica, capacity
from benchmarks.saturation import Calibration, Sent, costs_of, most_in_a_call, point_of, sizes
from benchmarks.saturation_report import (
    Costs,
    Point,
    Saturation,
    SaturationFileError,
    draw,
    medians,
    table_of_costs,
    table_of_points,
)
from benchmarks.served import Subject
from service.settings import Settings

CALIBRATION = Calibration(
    calls={1: 0.010, 2: 0.016, 3: 0.024},
    render=0.001,
    rest=0.003,
    loop=0.002,
    device=0.009,
    batch=2.5,
    highest=70.0,
    lone=0.018,
)
COSTS = Costs((10.0, 16.0, 22.0), 2.0, 1.0, 2.0, 3.0, cores=0.95, call_when_full=1.1, highest=70.0)
MODEL = Figures(30.0, 30.0, 0.0, 0.03, 0.02, 0.05, 0.09, 1.2, 0.1, 1.0, 0.4)
POINTS = [
    Point("predict", 0.5, rate, 0.020, p99, 1.2, 0.0, 0.001, 0.01, 0.5, replace(MODEL, p99=p99 / 2))
    for rate, p99 in ((30.0, 0.08), (31.0, 0.20), (32.0, 0.10))
]
RUN = Saturation("made up", 2, 64, {"predict": COSTS, "explain": replace(COSTS, calls=(30.0, 50.0, 70.0))}, POINTS)


@pytest.fixture
def file(tmp_path):
    RUN.save(tmp_path / "run.json")
    return tmp_path / "run.json"


def shown(table):
    console = Console(width=250, record=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_costs_are_medians_of_rounds():
    slow = replace(CALIBRATION, loop=0.009, calls={1: 0.030, 2: 0.016, 3: 0.024})
    costs = costs_of([CALIBRATION, slow, CALIBRATION], 3)
    assert costs.calls == pytest.approx((10.0, 16.0, 24.0))
    assert (costs.decode, costs.render, costs.loop) == pytest.approx((2.0, 1.0, 2.0))
    assert costs.travel == pytest.approx(18 - 10 - 3 - 2)
    assert costs.cores == pytest.approx(70 * 0.014)
    assert costs.call_when_full == pytest.approx(0.009 / (0.020 / 2.5))
    assert costs.lane.calls[1] == pytest.approx(0.016)
    assert costs.lane.beside == pytest.approx(0.005)


def test_more_than_its_core_it_cannot_have_got():
    assert costs_of([replace(CALIBRATION, highest=100.0)], 3).cores == 1.0


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [1]), (7, [*range(1, 8)]), (20, [*range(1, 9), 16, 20]), (32, [*range(1, 9), 16, 32])],
)
def test_the_sizes_that_are_measured(most, expected):
    assert sizes(most) == expected


def test_the_batch_is_bounded_as_the_service_bounds_it():
    settings = Settings()
    subject = Subject(settings.models_dir, settings.tables_dir, settings.model)
    height, width = subject.tensors()[0].shape[-2:]
    assert most_in_a_call(subject, settings) == min(settings.max_batch, settings.batch_pixels // (height * width))


def test_latency_counts_from_when_a_request_was_due():
    replies = [
        Reply(1.5, 0.1, 200, None, b"", late=0.5),
        Reply(2.0, 0.1, 200, None, b""),
        Reply(3.0, 0.0, 429, "1", b""),
    ]
    sent = Sent(0.5, np.array([1.0, 2.0, 3.0]), Load(replies, 3.0, 0.006), 1.0, 0.02)
    point = point_of("predict", sent, RUN)
    assert point.p50 == pytest.approx((0.6 + 0.1) / 2)
    assert point.rate == pytest.approx(1.0)
    assert point.refused == pytest.approx(1 / 3)
    assert point.client_ms == pytest.approx(2.0)
    assert point.model.p50 == pytest.approx(0.015 / 0.95 + 0.003)
    assert sent.late == pytest.approx(0.49)


def test_a_point_is_the_medians_of_its_rounds():
    (point,) = medians(POINTS)
    assert (point.rate, point.p99, point.model.p99) == (31.0, 0.10, 0.05)


def test_a_run_is_read_as_it_was_written(file):
    assert Saturation.load(file) == RUN


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"costs": {"predict": {"calls": [1]}}, "points": []}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(SaturationFileError, match=r"other.json: expected what `benchmarks.saturation --json` writes"):
        Saturation.load(tmp_path / "other.json")


def test_the_tables_say_what_was_found():
    costs = shown(table_of_costs(RUN))
    assert f"{capacity(RUN.replica('predict')):.1f}/s" in costs
    assert "7.3 of 3" in costs
    points = shown(table_of_points(RUN))
    assert [cell.strip() for cell in points.splitlines()[-2].split("│")[1:-1]] == [
        "predict", "0.50", "31.0", "20", "20", "1.00", "100", "50", "2.00", "1.2", "1.2", "0.0%", "0.0%", "1.0", "1.0%",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["curve.svg", "curve.png"])
def test_the_picture_is_small_and_the_same_again(tmp_path, name, monkeypatch):
    monkeypatch.setattr("benchmarks.saturation_report.CURVE_POINTS", 3)
    monkeypatch.setattr("benchmarks.saturation_report.CURVE_REQUESTS", 500)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw(RUN, tmp_path / folder / name)
    written = (tmp_path / "a" / name).read_bytes()
    assert 1000 < len(written) < 100_000
    assert written == (tmp_path / "b" / name).read_bytes()


def test_one_core_is_not_enough(monkeypatch):
    monkeypatch.setattr(saturation.os, "sched_getaffinity", lambda _: {0}, raising=False)
    result = CliRunner().invoke(saturation.main, [])
    assert result.exit_code == 2
    assert "Needs Linux and two cores" in result.output


@pytest.mark.parametrize("wrong", [["--load", "0"], ["--kind", "dream"], ["--seconds", "0.1"], ["--rounds", "0"]])
def test_impossible_arguments_are_refused(wrong):
    assert CliRunner().invoke(saturation.main, wrong).exit_code == 2


def asked(*arguments):
    return CliRunner().invoke(replicas.main, [*arguments, "--count", "1000"])


def value(output, name):
    (row,) = (line for line in output.splitlines() if name in line)
    return row.split("│")[2].strip()


def test_replicas_for_a_rate(file):
    result = asked("--measured", str(file), "--rate", "500", "--p99-ms", "300", "--explained", "0")
    assert result.exit_code == 0
    number = int(value(result.output, "replicas"))
    assert number > 500 / capacity(RUN.replica("predict"))
    more = asked("--measured", str(file), "--rate", "500", "--p99-ms", "300", "--explained", "0.5")
    assert int(value(more.output, "replicas")) > number


def test_replicas_of_figures_given():
    figures = ("--device-ms", "10", "--device-ms-per-image", "6", "--max-batch", "3", "--decode-ms", "2")
    slow, fast = (asked(*figures, "--rate", "500", *more) for more in ((), ("--gpu",)))
    assert int(value(slow.output, "replicas")) > int(value(fast.output, "replicas"))


def test_without_a_rate_there_is_a_table():
    result = asked("--device-ms", "60")
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["1", "2", "4", "8", "16"]
    assert all(0 < int(row[-1]) <= int(row[0]) * 1000 / 60 + 1 for row in rows)


def test_the_longest_queue_is_answered_in_time():
    replica = Replica((Lane((0.1,), travel=1.0),))
    assert replicas.longest_queue(replica, (1.0,), 10.0) == pytest.approx(10 * (8.0 - 1.1), abs=1)
    assert replicas.longest_queue(replica, (1.0,), 0.01) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --measured or --device-ms"),
        (["--device-ms", "400", "--p99-ms", "300", "--rate", "1"], "Not even a lone request"),
    ],
)
def test_what_cannot_be_answered(arguments, message):
    result = asked(*arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_a_kind_that_was_not_measured(tmp_path):
    replace(RUN, costs={"predict": COSTS}).save(tmp_path / "run.json")
    result = asked("--measured", str(tmp_path / "run.json"), "--rate", "5")
    assert result.exit_code == 2
    assert "no figures of explain" in result.output
    (tmp_path / "run.json").write_text(json.dumps({}))
    assert "expected what" in asked("--measured", str(tmp_path / "run.json"), "--rate", "5").output
