"""How many replicas for how many images a second: `python -m benchmarks.replicas --rate 500 --p99-ms 300 ...`.

The costs of a request come from `benchmarks.saturation --json`, or are given one by one; the rest is the queueing model
(queueing.py), nothing is measured. Requests are taken to be spread over the replicas at random, as a Kubernetes
Service spreads connections: each replica then has arrivals of its own, as random as all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.queueing import Figures, Lane, Replica, at_rate, capacity, highest_rate, linear_calls
from benchmarks.saturation_report import Saturation, SaturationFileError
from service.settings import Settings

NUMBERS = (1, 2, 4, 8, 16)
TARGETS_MS = (100.0, 200.0, 500.0, 1000.0, 2000.0)
OF_THE_DEADLINE = 0.8  # that the last of a full queue may wait; the rest is for the noise that no model has


@dataclass(frozen=True)
class Answer:
    """Replicas for a load; `highest` requests a second of one replica at the target, `highest` x headroom is aimed at.

    `each` is what one does at its share of the load, `aimed` at the load that is aimed at: what an autoscaler holds
    its averages to. `max_queue` images are answered before the deadline.
    """

    replicas: int
    highest: float
    each: Figures
    aimed: Figures
    max_queue: int


def replicas_for(
    replica: Replica, shares: Sequence[float], rate: float, p99: float, headroom: float, deadline: float, count: int
) -> Answer | None:
    """Seconds; None where not even a lone request is answered within `p99`."""
    highest = highest_rate(replica, p99, shares, count=count)
    if not highest:
        return None
    replicas = math.ceil(rate / (headroom * highest))
    return Answer(
        replicas=replicas,
        highest=highest,
        each=at_rate(replica, rate / replicas, shares, count=count),
        aimed=at_rate(replica, headroom * highest, shares, count=count),
        max_queue=longest_queue(replica, shares, deadline),
    )


def longest_queue(replica: Replica, shares: Sequence[float], deadline: float) -> int:
    """Images that may be admitted so that the last is answered within OF_THE_DEADLINE; at least 1."""
    lone = max(lane.calls[-1] + lane.beside + lane.travel for lane in replica.lanes)
    return max(1, math.floor(capacity(replica, shares) * (OF_THE_DEADLINE * deadline - lone)))


def table_of_answer(answer: Answer, headroom: float, deadline: float) -> Table:
    view = Table("figure", "value", title="from the model, not measured")
    each, aimed = answer.each, answer.aimed
    for name, value in (
        ("replicas", f"{answer.replicas}"),
        ("images/s of one replica at the p99 wanted, at most", f"{answer.highest:.1f}"),
        (f"images/s of one replica aimed at, {headroom:.0%} of that", f"{headroom * answer.highest:.1f}"),
        ("each replica: images/s", f"{each.rate:.1f}"),
        ("each replica: p50, p95, p99 ms", f"{1000 * each.p50:.0f}, {1000 * each.p95:.0f}, {1000 * each.p99:.0f}"),
        ("each replica: images a device call", f"{each.batch:.1f}"),
        ("autoscaler: parchgrad_admitted_images a pod", f"{aimed.admitted:.1f}"),
        ("autoscaler: parchgrad_queue_depth_images a pod", f"{aimed.waiting:.1f}"),
        ("autoscaler: device busy a pod", f"{aimed.busy:.2f}"),
        (f"PARCHGRAD_MAX_QUEUE at most, deadline {deadline:g} s", f"{answer.max_queue}"),
    ):
        view.add_row(name, value)
    return view


def table_of_rates(replica: Replica, shares: Sequence[float], count: int) -> Table:
    """Images a second by replicas and p99."""
    highest = [highest_rate(replica, target / 1000, shares, count=count) for target in TARGETS_MS]
    title = "images a second at a p99 of at most, from the model"
    view = Table("replicas", *(f"{target:g} ms" for target in TARGETS_MS), title=title)
    for number in NUMBERS:
        view.add_row(f"{number}", *(f"{number * rate:.0f}" if rate else "-" for rate in highest))
    return view


def replica_of_file(path: Path, explained: float) -> tuple[Replica, tuple[float, ...]]:
    """What was measured, with lanes for what is asked for; and their shares."""
    run = Saturation.load(path)
    wanted = {"predict": 1 - explained, "explain": explained}
    lanes = {kind: share for kind, share in wanted.items() if share > 0}
    if missing := sorted(lanes.keys() - run.costs.keys()):
        raise click.UsageError(f"{path} has no figures of {', '.join(missing)}; it has {', '.join(run.costs)}.")
    return run.replica(*lanes), tuple(lanes.values())


@click.command(help="Print how many replicas answer --rate images a second, or without it a table of rates.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Images a second.")
@click.option("--p99-ms", type=click.FloatRange(0, min_open=True), default=500.0, show_default=True)
@click.option("--headroom", type=click.FloatRange(0, 1, min_open=True), default=0.7, show_default=True,
              help="Share of a replica's highest rate that is aimed at.")  # fmt: skip
@click.option("--deadline-ms", type=click.FloatRange(1), default=Settings().timeout_ms, show_default=True)
@click.option("--measured", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What `benchmarks.saturation --json` wrote; or give the figures below.")  # fmt: skip
@click.option("--explained", type=click.FloatRange(0, 1), default=1.0, show_default=True,
              help="Share of the images that get a map; with --measured.")  # fmt: skip
@click.option("--device-ms", type=click.FloatRange(0, min_open=True), help="Device call of one image.")
@click.option("--device-ms-per-image", type=click.FloatRange(0), help="Each further image of the call.")
@click.option("--max-batch", type=click.IntRange(1), default=7, show_default=True, help="Images in a call.")
@click.option("--decode-ms", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--render-ms", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--loop-ms", type=click.FloatRange(0), default=0.0, show_default=True, help="HTTP and the event loop.")
@click.option("--travel-ms", type=click.FloatRange(0), default=0.0, show_default=True, help="What costs no core.")
@click.option("--cores", type=click.FloatRange(0, min_open=True), help="Of a replica; as measured, else 1.")
@click.option("--decode-workers", type=click.IntRange(1), default=Settings().decode_workers, show_default=True)
@click.option("--gpu", is_flag=True, help="The device's time costs the cores nothing.")
@click.option("--count", type=click.IntRange(1000), default=20_000, show_default=True, help="Requests simulated.")
def main(
    rate: float | None,
    p99_ms: float,
    headroom: float,
    deadline_ms: float,
    measured: Path | None,
    explained: float,
    device_ms: float | None,
    device_ms_per_image: float | None,
    max_batch: int,
    decode_ms: float,
    render_ms: float,
    loop_ms: float,
    travel_ms: float,
    cores: float | None,
    decode_workers: int,
    gpu: bool,
    count: int,
) -> None:
    shares: tuple[float, ...] = (1.0,)
    if (measured is None) == (device_ms is None):
        raise click.UsageError("Give either --measured or --device-ms.")
    if measured is not None:
        try:
            replica, shares = replica_of_file(measured, explained)
        except SaturationFileError as error:
            raise click.UsageError(str(error)) from None
        if gpu:
            raise click.UsageError("--gpu takes --device-ms: what was measured is a device on the cores.")
        lanes, own_cores = replica.lanes, replica.cores if cores is None else cores
    else:
        further = device_ms if device_ms_per_image is None else device_ms_per_image
        calls = linear_calls((device_ms or 0.0) / 1000, (further or 0.0) / 1000, max_batch)
        lanes = (Lane(calls, decode_ms / 1000, render_ms / 1000, loop_ms / 1000, travel_ms / 1000),)
        own_cores = cores or 1.0
    # A queue that refuses nobody: its length is what is asked for.
    replica = Replica(lanes, own_cores, decode_workers, max_queue=10**9, device_on_cores=not gpu)
    console = Console(width=110)
    if rate is None:
        console.print(table_of_rates(replica, shares, count))
        return
    answer = replicas_for(replica, shares, rate, p99_ms / 1000, headroom, deadline_ms / 1000, count)
    if answer is None:
        raise click.ClickException(f"Not even a lone request is answered within {p99_ms:g} ms by these figures.")
    console.print(table_of_answer(answer, headroom, deadline_ms / 1000))


if __name__ == "__main__":
    main()
