"""Engines that run an exported graph, each as one function from named arrays to named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import ExportError

Array = NDArray[Any]


@dataclass(frozen=True)
class Engine:
    """A graph, loaded. `run` takes and gives the graph's tensors by name."""

    name: str  # such as 'onnxruntime 1.32.0'
    run: Callable[[Mapping[str, Array]], dict[str, Array]]


def said(error: Exception) -> str:
    """An engine's error in one line; some begin with a line about their own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if " failed at " not in line) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def onnx_runtime(path: Path) -> Engine:
    """ONNX Runtime on the CPU. Raises ExportError where it refuses the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what it would print is of no use to whoever exports
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"ONNX Runtime does not take the exported graph: {said(error)}") from error
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return Engine(f"onnxruntime {onnxruntime.__version__}", run)


def openvino_cpu(path: Path) -> Engine:
    """OpenVINO on the CPU, in full float32, from its own files or an ONNX file. Raises ExportError."""
    import openvino

    core = openvino.Core()
    try:
        # Without the hint processors with bfloat16 or float16 units compute in those.
        compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ExportError(f"OpenVINO does not take the exported graph: {said(error)}") from error
    # An output may have other names beside the graph's own.
    names = [(number, name) for number, output in enumerate(compiled.outputs) for name in output.get_names()]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = compiled(dict(inputs))
        return {name: np.array(results[number]) for number, name in names}

    return Engine(f"openvino {openvino.__version__.partition('-')[0]}", run)
