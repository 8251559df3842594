"""Every family of networks as one graph, each exported and run in a process of its own.

What it takes to write the graph, how large its file is, whether its maps are those of the dense PyTorch engine, and
what they cost over the prediction alone.
"""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.graph_cases import (
    DATA,
    QUANTILE,
    SCENES,
    Subject,
    explained,
    explanation_call,
    feeds,
    prediction_call,
    session,
    subject,
    traced,
)
from benchmarks.measuring import STATUS, interleaved, ratios
from parchgrad import Explainer
from parchgrad.errors import ParchGradError

FAMILIES = (
    "alexnet", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "squeezenet1_1",
    "densenet121", "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
    "shufflenet_v2_x0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", SCENES,
)  # fmt: skip
IMAGES = 3


@dataclass(frozen=True)
class Family:
    """One network. Distances are relative L2; those of maps are `IMAGES`, one a picture."""

    name: str
    size: int = 0
    trained: bool = False
    trace_seconds: float = 0.0  # wall-clock, as the next three
    build_seconds: float = 0.0
    write_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the three together
    peak_mib: float = 0.0  # resident, of the whole process until then
    file_mb: float = 0.0
    logits: float = 0.0  # the largest distance of a picture's logits
    maps: list[float] = field(default_factory=list)  # to the dense PyTorch engine, both in float32
    rounding: list[float] = field(default_factory=list)  # of that engine itself: float32 to float64
    predict: list[float] = field(default_factory=list)  # CPU seconds, batch 1
    ratios: list[float] = field(default_factory=list)  # explanation over prediction, round by round
    why_not: str = ""  # it does not export


def family(name: str, runs: int, data: Path = DATA) -> Family:
    """Measured in another process."""
    asked = json.dumps({"name": name, "runs": runs, "data": str(data)})
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.graph_families", asked], check=True, stdout=subprocess.PIPE, text=True
    )
    return Family(**json.loads(ran.stdout.splitlines()[-1]))


def measured(found: Subject, runs: int, data: Path = DATA) -> Family:
    torch.set_num_threads(1)
    start, cpu = time.monotonic(), time.process_time()
    try:
        prediction = traced(found)
        after_trace = time.monotonic()
        graph = explained(found, prediction, "pruned")
    except ParchGradError as error:
        return Family(found.name, found.size, found.trained, why_not=str(error))
    after_build = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(graph, Path(folder) / "model.onnx")
        end, cpu, peak = time.monotonic(), time.process_time() - cpu, _peak_mib()
        size = (Path(folder) / "model.onnx").stat().st_size
    images, targets = found.pictures(IMAGES, data), found.targets(IMAGES)
    explaining = session(graph)
    names = [one.name for one in explaining.get_outputs()]
    mine = dict(zip(names, explaining.run(None, feeds(images, targets)), strict=True))
    single, double = (
        Explainer(network, found.table, backward="dense").explain(
            images.to(dtype), targets, quantile=QUANTILE, gamma=math.inf, layers=["*"]
        )
        for network, dtype in (
            (found.network, torch.float32),
            (copy.deepcopy(found.network).double(), torch.float64),
        )
    )
    calls = {
        "predict": prediction_call(session(prediction.model), images[:1]),
        "explain": explanation_call(explaining, images[:1], targets[:1]),
    }
    seconds = interleaved(calls, runs)
    return Family(
        found.name,
        found.size,
        found.trained,
        trace_seconds=after_trace - start,
        build_seconds=after_build - after_trace,
        write_seconds=end - after_build,
        cpu_seconds=cpu,
        peak_mib=peak,
        file_mb=size / 1e6,
        logits=max(_distances(mine["logits"], single.logits.numpy())),
        maps=_distances(mine["attributions"], single.attributions.numpy()),
        rounding=_distances(single.attributions.numpy(), double.attributions.numpy()),
        predict=seconds["predict"],
        ratios=ratios(seconds["explain"], seconds["predict"]),
    )


def _distances(found: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> list[float]:
    return [
        float(np.linalg.norm((one - other).ravel()) / np.linalg.norm(other.ravel()))
        for one, other in zip(found.astype(np.float64), right.astype(np.float64), strict=True)
    ]


def _peak_mib() -> float:
    """Of this process alone: what getrusage tells begins with its parent's."""
    found = re.search(r"^VmHWM:\s+(\d+)", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) / 1024 if found else math.nan


def rows(families: list[Family]) -> list[list[str]]:
    """A heading and a line for each."""
    lines = [
        ["network", "weights", "trace s", "build s", "peak MiB", "file MB", "logits", "maps, median", "maps, largest",
         "PyTorch float32, largest", "predict ms", "b/a"]
    ]  # fmt: skip
    for one in families:
        name = f"{one.name} ({one.size})"
        if one.why_not:
            lines.append([name, "", f"does not export: {one.why_not}", *[""] * 9])
            continue
        lines.append(
            [
                name, "real" if one.trained else "random", f"{one.trace_seconds:.1f}", f"{one.build_seconds:.1f}",
                f"{one.peak_mib:.0f}", f"{one.file_mb:.1f}", f"{one.logits:.0e}",
                f"{statistics.median(one.maps):.0e}", f"{max(one.maps):.0e}", f"{max(one.rounding):.0e}",
                f"{1000 * statistics.median(one.predict):.1f}", f"{statistics.median(one.ratios):.2f}",
            ]
        )  # fmt: skip
    return lines


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    data = Path(question["data"])
    print(json.dumps(asdict(measured(subject(question["name"], data), question["runs"], data))))
