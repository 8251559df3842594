"""What `benchmarks.saturation` found: what a replica's work costs, its latencies by load beside the model's, as JSON,
table and picture. Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.queueing import Figures, Lane, Replica, at_rate, capacity

P50, P99 = "tab:blue", "tab:red"
CURVE_POINTS, CURVE_REQUESTS = 24, 20_000


class SaturationFileError(Exception):
    """A file that is not what `benchmarks.saturation --json` writes."""


@dataclass(frozen=True)
class Costs:
    """CPU milliseconds of one kind of request, medians of rounds, and what the whole came to under full load.

    `calls[b - 1]`: one device call of b images; `travel`: what a lone request takes longer than all its parts.
    `cores` is how much of its core the service got when it was full, by the CPU time it used; `call_when_full` the
    device's milliseconds an image there over what `calls` says for the batches it had.
    """

    calls: tuple[float, ...]
    decode: float
    render: float
    loop: float
    travel: float
    cores: float
    call_when_full: float
    highest: float  # requests a second, closed loop

    @property
    def lane(self) -> Lane:
        decode, render, loop, travel = (ms / 1000 for ms in (self.decode, self.render, self.loop, self.travel))
        return Lane(tuple(ms / 1000 for ms in self.calls), decode, render, loop, travel)


@dataclass(frozen=True)
class Point:
    """One load of one kind, beside what the model makes of the very same arrivals; seconds.

    `late` is how late the callers were at worst in 99 of 100 requests, `client_ms` their CPU time a request, `others`
    the share of the service's core that other processes had, of which what it did not need itself is no loss.
    """

    kind: str
    fraction: float  # of the model's capacity
    rate: float
    p50: float
    p99: float
    batch: float
    refused: float
    late: float
    others: float
    client_ms: float
    model: Figures


@dataclass(frozen=True)
class Saturation:
    """One run. `machine` says on what, in words."""

    machine: str
    decoders: int
    max_queue: int
    costs: dict[str, Costs]
    points: list[Point]

    def replica(self, *kinds: str) -> Replica:
        """The model's replica with one lane for each of `kinds`, all by default."""
        chosen = [self.costs[kind] for kind in kinds or self.costs]
        return Replica(
            tuple(costs.lane for costs in chosen),
            cores=statistics.mean(costs.cores for costs in chosen),
            decoders=self.decoders,
            max_queue=self.max_queue,
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Saturation:
        """Raises SaturationFileError."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            costs = {kind: Costs(**{**one, "calls": tuple(one["calls"])}) for kind, one in found["costs"].items()}
            points = [Point(**{**one, "model": Figures(**one["model"])}) for one in found["points"]]
            return cls(**{**found, "costs": costs, "points": points})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SaturationFileError(
                f"{path}: expected what `benchmarks.saturation --json` writes, found {type(error).__name__}: {error}."
            ) from None


def medians(points: Sequence[Point]) -> list[Point]:
    """One point for each kind and fraction: the medians of its rounds, figure by figure."""
    groups: dict[tuple[str, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.kind, point.fraction), []).append(point)
    return [_median(group) for _, group in sorted(groups.items())]


def _median(group: Sequence[Point]) -> Point:
    def middle(rows: Sequence[object]) -> dict[str, Any]:
        columns = {name: [getattr(row, name) for row in rows] for name in asdict(rows[0])}  # type: ignore[call-overload]
        return {name: statistics.median(values) for name, values in columns.items() if isinstance(values[0], float)}

    return replace(group[0], **middle(group), model=Figures(**middle([point.model for point in group])))


def table_of_costs(run: Saturation) -> Table:
    view = Table(
        "CPU ms", "device, 1 image", "device, an image of a full batch", "decode", "render", "loop", "travel",
        "capacity, model", "highest, measured", "cores it got", "device when full / alone",
        title="what a request costs",
    )  # fmt: skip
    for kind, costs in run.costs.items():
        view.add_row(
            kind, f"{costs.calls[0]:.1f}", f"{costs.calls[-1] / len(costs.calls):.1f} of {len(costs.calls)}",
            f"{costs.decode:.1f}", f"{costs.render:.1f}", f"{costs.loop:.1f}", f"{costs.travel:.1f}",
            f"{capacity(run.replica(kind)):.1f}/s", f"{costs.highest:.1f}/s", f"{costs.cores:.2f}",
            f"{costs.call_when_full:.2f}",
        )  # fmt: skip
    return view


def table_of_points(run: Saturation) -> Table:
    view = Table(
        "requests", "load", "images/s", "p50 ms", "model", "ratio", "p99 ms", "model", "ratio", "batch", "model",
        "refused", "model", "callers late ms", "others on the core",
        title="measured, beside the model under the same arrivals",
    )  # fmt: skip
    for point in medians(run.points):
        model = point.model
        view.add_row(
            point.kind, f"{point.fraction:.2f}", f"{point.rate:.1f}",
            f"{1000 * point.p50:.0f}", f"{1000 * model.p50:.0f}", f"{point.p50 / model.p50:.2f}",
            f"{1000 * point.p99:.0f}", f"{1000 * model.p99:.0f}", f"{point.p99 / model.p99:.2f}",
            f"{point.batch:.1f}", f"{model.batch:.1f}", f"{point.refused:.1%}", f"{model.refused:.1%}",
            f"{1000 * point.late:.1f}", f"{point.others:.1%}",
        )  # fmt: skip
    return view


def draw(run: Saturation, path: Path) -> None:
    """Latency over load, one panel a kind: the model's curves, the measured points of every round."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(run.costs), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for index, kind in enumerate(run.costs, 1):
        axes = figure.add_subplot(1, len(run.costs), index)
        replica = run.replica(kind)
        most = capacity(replica)
        points = [point for point in run.points if point.kind == kind]
        last = 1.05 * max([1.0, *(point.rate / most for point in points)])
        rates = [most * last * step / CURVE_POINTS for step in range(1, CURVE_POINTS + 1)]
        curve = [at_rate(replica, rate, count=CURVE_REQUESTS) for rate in rates]
        for name, colour in (("p50", P50), ("p99", P99)):
            axes.plot(rates, [1000 * getattr(one, name) for one in curve], color=colour, label=f"{name}, model")
            axes.plot(
                [point.rate for point in points],
                [1000 * getattr(point, name) for point in points],
                "o", color=colour, markersize=4, alpha=0.7, label=f"{name}, measured",
            )  # fmt: skip
        axes.axvline(most, color="0.5", linestyle=":", label="capacity, model")
        axes.set(title=f"/{kind}", xlabel="images a second", yscale="log", xlim=(0, None))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        if index == 1:
            axes.set_ylabel("milliseconds")
            axes.legend(fontsize=8, loc="lower right")
    with rc_context({"svg.hashsalt": "saturation"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
