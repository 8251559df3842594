"""OpenVINO's IR from an ONNX graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import openvino

from parchgrad.errors import ExportError
from parchgrad.export.engines import said


def write_ir(graph: onnx.ModelProto, onnx_file: Path, path: Path) -> None:
    """Convert `onnx_file`, which holds the graph, to `path` (`.xml`) and the weights beside it (`.bin`).

    The graph's metadata is the model's runtime information under the same keys. Raises ExportError.
    """
    try:
        # convert_model would turn the weights back already.
        converted = openvino.Core().read_model(onnx_file)
        for entry in graph.metadata_props:
            converted.set_rt_info(entry.value, [entry.key])
        # Left to itself it would round the weights to float16.
        openvino.save_model(converted, path, compress_to_fp16=False)
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"OpenVINO cannot convert the graph: {said(error)}") from error
