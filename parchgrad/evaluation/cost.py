"""What each method costs: the time of its maps in forward passes; no quality."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parchgrad.errors import OptionError
from parchgrad.evaluation.methods import Method
from parchgrad.explainer import Explainer

Clock = Callable[[], float]  # seconds

# A method of more passes than this is timed in few rounds: its ratio is steady, and its rounds are long.
MANY_PASSES = 20.0
FEW_ROUNDS = 3
# A prediction is timed over as many runs as take this long: one of a small network is as short as the noise.
LEAST_SECONDS = 0.02
MOST_RUNS = 20


@dataclass(frozen=True)
class Cost:
    """Prediction and map of one image, over a prediction alone."""

    passes: float  # median over the rounds
    low: float  # lower quartile
    high: float


def costs(
    methods: Sequence[Method],
    explainer: Explainer,
    image: Tensor,
    target: int,
    *,
    rounds: int = 7,
    clock: Clock | None = None,
) -> dict[str, Cost]:
    """Each method's cost for one `image` `(3, h, w)` of the model's input size, by name.

    Time of `maps` over that of `explainer.predict`, the same explainer's fastest way to predict alone. Methods that do
    not look at the network (`of` is None) have a prediction's time added, so that all are of prediction and map. After
    a warm-up, every round times a prediction and then each method, the second of two runs, so that a machine that
    slows down slows both; the median of the rounds' ratios stands beside their quartiles. Methods of more than 20
    passes have at most 3 rounds.

    The time is the process's CPU time, of all its threads, and the wall's on CUDA, where each is waited for. `clock`
    replaces it. Noisy are: other work on the machine, which takes caches and memory bandwidth from one and not the
    other; threads, whose waiting counts; the first rounds of a cold processor. A ratio is of this image size, batch 1
    and this machine: methods that do much beside passes (Grad-CAM enlarges its map, LRP sets up its rules at each
    call) cost fewer passes on larger networks. Raises OptionError for fewer than one round.
    """
    if rounds < 1:
        raise OptionError("rounds", rounds, "an integer of at least 1")
    seconds = clock or _clock(explainer.device)
    images, targets = image[None], [target]

    def timed(run: Callable[[], object], runs: int = 1) -> float:
        start = seconds()
        for _ in range(runs):
            run()
        return (seconds() - start) / runs

    def predict() -> Tensor:
        return explainer.predict(images)

    predict()
    once = timed(predict)
    runs = MOST_RUNS if once <= 0 else max(1, min(MOST_RUNS, round(LEAST_SECONDS / once)))
    once = timed(predict, runs)
    many = set()
    for method in methods:
        method.maps(images, targets)
        if timed(lambda maps=method.maps: maps(images, targets)) > MANY_PASSES * once:  # type: ignore[misc]
            many.add(method.name)
    ratios: dict[str, list[float]] = {method.name: [] for method in methods}
    for number in range(rounds):
        predict()
        alone = timed(predict, runs)
        for method in methods:
            if method.name in many and number >= FEW_ROUNDS:
                continue
            if method.name not in many:
                method.maps(images, targets)  # not timed: what ran before it has left its own in the caches
            taken = timed(lambda maps=method.maps: maps(images, targets))  # type: ignore[misc]
            ratios[method.name].append((taken + (alone if method.of is None else 0.0)) / alone)
    return {name: Cost(*np.quantile(found, (0.5, 0.25, 0.75)).tolist()) for name, found in ratios.items()}


def _clock(device: torch.device) -> Clock:
    if device.type != "cuda":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall
