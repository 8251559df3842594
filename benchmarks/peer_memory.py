"""Memory of the rows of `benchmarks.peers`, measured in a process of its own: `peak_memory` asks for one.

That process loads every package and the network, predicts once, and then forks for each row, so that no row
finds what another has left. The peers' packages are loaded before, hence in nobody's figure.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.measuring import EXACT_ALLOCATOR, Memory, can_measure_memory, memory_of
from benchmarks.peer_methods import PACKAGES, Case, case_of, row_named

# Classes that are explained before a table's size is asked about: more than any cache should keep.
MOST_CLASSES = 128


def peak_memory(model: str, batch: int, rows: list[str], classes: int | None = None) -> dict[str, Memory]:
    """Memory of each row that could be measured; with `classes` after up to MOST_CLASSES of them were explained."""
    if not can_measure_memory():
        return {}
    asked = json.dumps({"model": model, "batch": batch, "rows": rows, "classes": classes})
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.peer_memory", asked],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | EXACT_ALLOCATOR | {"OMP_NUM_THREADS": "1"},
    )
    return {name: Memory(**found) for name, found in json.loads(ran.stdout.splitlines()[-1]).items()}


def measured(asked: str) -> dict[str, dict[str, float]]:
    question = json.loads(asked)
    torch.set_num_threads(1)
    for module in (*PACKAGES.values(), "torch.fx.experimental.optimization"):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
    case = case_of(question["model"], question["batch"], question["classes"])
    with torch.inference_mode():
        case.network(case.images)
    found = {}
    for name in question["rows"]:
        answer = forked(partial(one_row, case, name, all_classes=question["classes"] is not None))
        if answer is not None:
            found[name] = asdict(answer)
    return found


def one_row(case: Case, name: str, *, all_classes: bool) -> Memory:
    def build() -> Callable[[], object]:
        call = row_named(name).build(case)
        return partial(call, case.targets) if not all_classes else lambda chosen=case.targets: call(chosen)

    def warm(call: Callable[..., object]) -> None:
        if not all_classes:
            call()
            return
        batch = len(case.targets)
        for first in range(0, min(case.classes, MOST_CLASSES), batch):
            call([(first + image) % case.classes for image in range(batch)])

    return memory_of(build, warm)


def forked(measure: Callable[[], Memory]) -> Memory | None:
    """What `measure` finds in a fork of this process; None where the fork did not live to tell."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure()))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        return None
    finally:
        process.join()


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])))
