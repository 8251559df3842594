"""OpenVINO's IR from an ONNX graph, around two faults of its CPU runtime (seen in 2026.4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
from onnx import helper, numpy_helper

from parchgrad.errors import ExportError
from parchgrad.export.engines import said


def write_ir(graph: onnx.ModelProto, onnx_file: Path, path: Path) -> None:
    """Convert `onnx_file`, which holds the `adapted` graph, to `path` (`.xml`) and the weights beside it (`.bin`).

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


def adapt(graph: onnx.GraphProto) -> None:
    """Change the graph, in place, where OpenVINO computes something else than ONNX says.

    HardSigmoid's beta of 0 is taken for the default of 0.5: it becomes next to nothing. A Conv and a ConvTranspose
    of the same weights, even in two copies, get the weights of one in the order of the other: those of the
    ConvTranspose are stored transposed and turned back by an operator.
    """
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "HardSigmoid" and attribute.name == "beta" and attribute.f == 0.0:
                attribute.f = float(np.finfo(np.float32).tiny)
    stored = {one.name: one for one in graph.initializer}
    both = {node.input[1] for node in graph.node if node.op_type == "Conv"} & {
        node.input[1] for node in graph.node if node.op_type == "ConvTranspose"
    }
    nodes = []
    for node in graph.node:
        if node.op_type == "ConvTranspose" and node.input[1] in both and node.input[1] in stored:
            name, turn = node.input[1], [1, 0, *range(2, len(stored[node.input[1]].dims))]
            kept, back = f"{name}/turned", f"{name}/turned_back"
            if kept not in stored:
                weights = numpy_helper.to_array(stored[name]).transpose(turn)
                stored[kept] = numpy_helper.from_array(np.ascontiguousarray(weights), kept)
                graph.initializer.append(stored[kept])
                nodes.append(helper.make_node("Transpose", [kept], [back], name=back, perm=turn))
            node.input[1] = back
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
