"""`config.pbtxt` of a Triton Inference Server's model repository, for a graph that its ONNX Runtime backend runs."""

from __future__ import annotations

import onnx
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2 as triton

CONFIG_FILE = "config.pbtxt"
LABELS_FILE = "labels.txt"
GRAPH_FILE = "model.onnx"

_TYPES: dict[int, int] = {
    TensorProto.FLOAT: triton.TYPE_FP32,
    TensorProto.INT64: triton.TYPE_INT64,
    TensorProto.BOOL: triton.TYPE_BOOL,
}
# Outputs of one number a class: Triton's classification extension names their largest by the labels file.
_OF_CLASSES = ("logits", "probabilities")


def config(name: str, graph: onnx.ModelProto, max_batch_size: int, queue_microseconds: int, threads: int) -> str:
    """The text of `config.pbtxt`; `threads` 0 leaves their number to ONNX Runtime.

    Triton adds the batch axis itself, and knows no tensors without another: those of shape (batch,) are
    (batch, 1) to its clients. Requests of equal shapes are put together into batches, for at most
    `queue_microseconds`.
    """
    entry = triton.ModelConfig(
        name=name,
        platform="onnxruntime_onnx",
        backend="onnxruntime",
        max_batch_size=max_batch_size,
        default_model_filename=GRAPH_FILE,
        version_policy=triton.ModelVersionPolicy(latest=triton.ModelVersionPolicy.Latest(num_versions=1)),
        dynamic_batching=triton.ModelDynamicBatching(max_queue_delay_microseconds=queue_microseconds),
        parameters={"intra_op_thread_count": triton.ModelParameter(string_value=str(threads))},
    )
    for value in graph.graph.input:
        entry.input.append(triton.ModelInput(name=value.name, data_type=_type(value), dims=_dims(value)))
        if _only_batch(value):
            entry.input[-1].reshape.SetInParent()
    for value in graph.graph.output:
        entry.output.append(
            triton.ModelOutput(
                name=value.name,
                data_type=_type(value),
                dims=_dims(value),
                label_filename=LABELS_FILE if value.name in _OF_CLASSES else "",
            )
        )
        if _only_batch(value):
            entry.output[-1].reshape.SetInParent()
    text: str = text_format.MessageToString(entry)
    return text


def _type(value: onnx.ValueInfoProto) -> int:
    return _TYPES[value.type.tensor_type.elem_type]


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Without the batch axis; -1 for what is symbolic."""
    inner = value.type.tensor_type.shape.dim[1:]
    return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in inner] or [1]


def _only_batch(value: onnx.ValueInfoProto) -> bool:
    return len(value.type.tensor_type.shape.dim) == 1
