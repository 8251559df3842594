"""What the statistics of a full-scale selection table cost: `python -m benchmarks.table_statistics`.

53 layers as in ResNet-50 (26,560 channels), 1000 classes, 1.28 million images, made-up moments: seconds and
peak memory of the whole table on one thread, and process CPU time a test (a class and a channel) beside the
obvious loop of `scipy.stats.ttest_ind` over the features.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import scipy
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from parchgrad.statistics import ClassMoments, ranks, welch_log_p

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """How large a table: channels of each layer, classes, images of each class."""

    layers: tuple[int, ...]
    classes: int
    images: int
    loop_tests: int  # of the obvious loop, a round

    @property
    def channels(self) -> int:
        return sum(self.layers)


def resnet50_widths() -> tuple[int, ...]:
    widths = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        widths += [4 * width, *([width, width, 4 * width] * blocks)]  # the shortcut, then the blocks
    return tuple(widths)


FULL = Scale(resnet50_widths(), classes=1000, images=1280, loop_tests=40)
SMALL = Scale((64, 128, 256), classes=50, images=200, loop_tests=40)


def class_means(scale: Scale, channels: int, generator: np.random.Generator) -> Array:
    """Mean of a gamma-distributed GAP feature, `(K, C)`: every class shifts every channel, a few by a lot."""
    shift = 0.1 * generator.standard_normal((scale.classes, channels))
    strong = generator.random((scale.classes, channels)) < 0.05
    shift[strong] += generator.exponential(0.8, int(strong.sum()))
    return generator.lognormal(-2.0, 0.7, channels) * np.exp(shift)


SHAPE = 8.0  # of the gamma distribution: its variance is mean^2 / SHAPE


def made_up_moments(scale: Scale, seed: int = 0) -> ClassMoments:
    """Moments as of `scale.images` images a class, layer by layer, so that nothing else is large."""
    generator = np.random.default_rng(seed)
    moments = ClassMoments(scale.classes, scale.channels)
    moments.count[:] = scale.images
    start = 0
    for channels in scale.layers:
        layer = moments.columns(start, start + channels)
        mean = class_means(scale, channels, generator)
        mean *= 1 + generator.standard_normal(mean.shape) / np.sqrt(SHAPE * scale.images)
        layer.sum[:] = scale.images * mean
        layer.squares[:] = scale.images * mean**2 * (1 + 1 / SHAPE)
        # Low parts as real sums have them; untouched zeros would not even take memory.
        layer.sum_low[:], layer.squares_low[:] = layer.sum * 2.0**-56, layer.squares * 2.0**-56
        start += channels
    return moments


def table(moments: ClassMoments, layers: tuple[int, ...]) -> list[tuple[Array, NDArray[np.int16]]]:
    """log p and ranks of every layer: what a selection table keeps."""
    rows, start = [], 0
    for channels in layers:
        t, log_p = welch_log_p(moments.columns(start, start + channels))
        rows.append((log_p, ranks(log_p, t)))
        start += channels
    return rows


def loop(features: Array, labels: NDArray[np.int64], classes: NDArray[np.int64]) -> tuple[Array, Array]:
    """t and p of one channel for `classes`, one SciPy test at a time."""
    results = [
        stats.ttest_ind(features[labels == c], features[labels != c], equal_var=False, alternative="greater")
        for c in classes
    ]
    return np.array([r.statistic for r in results]), np.array([r.pvalue for r in results])


def full_table(scale: Scale) -> dict[str, float]:
    """Once, before anything else has taken memory: seconds, peak memory of the process, and what log p are like."""
    moments = made_up_moments(scale)
    start, start_cpu = time.perf_counter(), time.process_time()
    rows = table(moments, scale.layers)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    log_p = np.concatenate([log_p.ravel()[::101] for log_p, _ in rows])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_mib": peak,
        "moments_mib": sum(a.nbytes for a in vars(moments).values()) / 2**20,
        "share_log_p_below_-690": float((log_p < -690).mean()),
        "share_p_above_0.05": float((log_p > np.log(0.05)).mean()),
        "least_log_p": float(log_p.min()),
    }


def accumulation(scale: Scale, rounds: int) -> dict[str, list[float]]:
    """Images a CPU second that `ClassMoments.update` takes, batches of 64."""
    generator = np.random.default_rng(1)
    features = generator.gamma(SHAPE, 0.1, (64, scale.channels)).astype(np.float32)
    moments = ClassMoments(64, scale.channels)
    orders = {"one class a batch": np.zeros(64, np.int64), "every image another class": np.arange(64)}
    rates: dict[str, list[float]] = {name: [] for name in orders}
    for number in range(rounds + 1):
        for name, rows in orders.items():
            start = time.process_time()
            for _ in range(4):
                moments.update(features, rows)
            if number:
                rates[name].append(4 * 64 / (time.process_time() - start))
    return rates


def beside_the_loop(scale: Scale, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Process CPU microseconds a test, interleaved, and how far the two agree on the same features."""
    generator = np.random.default_rng(2)
    labels = np.repeat(np.arange(scale.classes), scale.images)
    generator.shuffle(labels)
    width = max(scale.layers) // 4
    moments = made_up_moments(Scale((width,), scale.classes, scale.images, 0))
    spent: dict[str, list[float]] = {"loop": [], "table": []}
    worst_log_p, worst_t, compared = 0.0, 0.0, 0
    for number in range(rounds + 1):
        mean = class_means(scale, 1, generator)[:, 0]
        features = generator.gamma(SHAPE, mean[labels] / SHAPE)
        classes = generator.choice(scale.classes, scale.loop_tests, replace=False)
        start = time.process_time()
        expected_t, p = loop(features, labels, classes)
        middle = time.process_time()
        table(moments, (width,))
        end = time.process_time()
        if number:
            spent["loop"].append((middle - start) / scale.loop_tests * 1e6)
            spent["table"].append((end - middle) / (scale.classes * width) * 1e6)
        ours = ClassMoments(scale.classes, 1)
        ours.update(features[:, None], labels)
        t, log_p = (values[classes, 0] for values in welch_log_p(ours))
        # Elsewhere SciPy's p has underflowed, or its distance from 1 is rounding.
        comparable = (p > 1e-300) & (p < 0.9)
        compared += int(comparable.sum())
        difference = np.abs(log_p[comparable] / np.log(p[comparable]) - 1)
        worst_log_p = max(worst_log_p, float(difference.max(initial=0)))
        worst_t = max(worst_t, float(np.abs(t / expected_t - 1).max()))
    return spent, {"log_p_relative": worst_log_p, "log_p_compared": compared, "t_relative": worst_t}


@click.command(help="Print what the statistics of a full-scale selection table cost.")
@click.option("--runs", type=click.IntRange(7), default=7, show_default=True)
@click.option("--small", is_flag=True, help="A small table, in seconds.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(runs: int, small: bool, json_file: Path | None) -> None:
    scale = SMALL if small else FULL
    full = full_table(scale)
    rates = accumulation(scale, runs)
    spent, agreement = beside_the_loop(scale, runs)
    ratios = [one / other for one, other in zip(spent["loop"], spent["table"], strict=True)]
    images = scale.classes * scale.images
    view = Table(
        "figure", "value", "spread", title=f"{scale.channels} channels, {scale.classes} classes, {images} images"
    )
    view.add_row("whole table: wall s (CPU s)", f"{full['seconds']:.1f} ({full['cpu_seconds']:.1f})", "once")
    view.add_row("peak memory of the process, MiB", f"{full['peak_rss_mib']:.0f}", "once")
    view.add_row("  of which the moments, MiB", f"{full['moments_mib']:.0f}", "")
    view.add_row("share of log p below -690", f"{full['share_log_p_below_-690']:.1%}", "")
    view.add_row("share of p above 0.05", f"{full['share_p_above_0.05']:.1%}", "")
    view.add_row("least log p", f"{full['least_log_p']:.0f}", "")
    view.add_section()
    for name, values in rates.items():
        view.add_row(f"images/CPU s accumulated, {name}", *_median_and_spread(values, ".0f"))
    view.add_section()
    view.add_row("loop of ttest_ind, CPU us a test", *_median_and_spread(spent["loop"], ".0f"))
    view.add_row("table from moments, CPU us a test", *_median_and_spread(spent["table"], ".3f"))
    view.add_row("loop / table", *_median_and_spread(ratios, ".0f"))
    view.add_row(
        f"largest relative difference of {agreement['log_p_compared']} log p", f"{agreement['log_p_relative']:.1e}", ""
    )
    view.add_row("largest relative difference of t", f"{agreement['t_relative']:.1e}", "")
    console = Console(width=110)
    console.print(view)
    console.print(f"numpy {np.__version__}, scipy {scipy.__version__}")
    if json_file is not None:
        figures = {"table": full, "images_per_cpu_second": rates, "cpu_us_per_test": spent, "agreement": agreement}
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _median_and_spread(values: list[float], form: str) -> tuple[str, str]:
    return f"{statistics.median(values):{form}}", f"{min(values):{form}}-{max(values):{form}}"


if __name__ == "__main__":
    main()
