"""Running explanation graphs in the tests: slowly, in float64, as ONNX defines its operators; and in ONNX Runtime."""

import math

import numpy as np
import onnx
import onnxruntime
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import from_numpy

from parchgrad.graph.prediction import Prediction

INFINITY = math.inf


# Four operators that onnx's evaluator (1.23) has not as the standard defines them.


class Erf(OpRun):
    """Its own is of float32, whatever comes in."""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Pad(OpRun):
    """Its own knows no negative widths."""

    def _run(self, data, pads, constant_value=None, axes=None, mode=None):
        axes = list(range(data.ndim)) if axes is None else [int(axis) % data.ndim for axis in axes]
        widths = [(0, 0)] * data.ndim
        for number, axis in enumerate(axes):
            widths[axis] = (int(pads[number]), int(pads[number + len(axes)]))
        kept = tuple(
            slice(max(-low, 0), length - max(-high, 0)) for (low, high), length in zip(widths, data.shape, strict=True)
        )
        wider = [(max(low, 0), max(high, 0)) for low, high in widths]
        if mode in ("reflect", "edge"):
            return (np.pad(data[kept], wider, mode=mode),)
        value = 0.0 if constant_value is None else float(np.asarray(constant_value).reshape(()))
        return (np.pad(data[kept], wider, constant_values=value).astype(data.dtype),)


class MaxPool(OpRun):
    """Its own gives too many windows where it rounds up with a stride of 1."""

    def _run(
        self, x, auto_pad=None, ceil_mode=0, dilations=None, kernel_shape=None, pads=None, storage_order=0, strides=None
    ):
        top, left, bottom, right = pads or (0, 0, 0, 0)
        assert dilations in (None, [1, 1], (1, 1))
        images = from_numpy(np.array(x))
        if (top, left) != (bottom, right):  # PyTorch pads evenly
            images = F.pad(images, (left, right, top, bottom), value=-math.inf)
            top = left = 0
        found = F.max_pool2d(images, kernel_shape, strides or 1, (top, left), ceil_mode=bool(ceil_mode))
        return (found.numpy(),)


class ConvTranspose(OpRun):
    """Its own knows no groups."""

    def _run(
        self, x, w, b=None, auto_pad=None, dilations=None, group=1, kernel_shape=None, output_padding=None,
        output_shape=None, pads=None, strides=None,
    ):  # fmt: skip
        assert output_shape is None
        top, left, bottom, right = pads or (0, 0, 0, 0)
        found = F.conv_transpose2d(
            *(None if one is None else from_numpy(np.array(one)) for one in (x, w, b)),
            strides or 1, 0, 0, group or 1, dilations or 1,
        )  # fmt: skip
        more_rows, more_columns = output_padding or (0, 0)
        found = F.pad(found, (-left, more_columns - right, -top, more_rows - bottom))
        return (found.numpy(),)


def feeds(images, targets, quantile, gamma):
    """A graph's inputs; `quantile` is a number, one an image or (batch, layers), `gamma` a number or one an image."""
    images = np.asarray(images)
    batch = len(images)
    quantile = np.asarray(quantile, dtype=np.float32)
    return {
        "images": images,
        "targets": np.asarray([-1 if t is None else t for t in targets], dtype=np.int64),
        "quantile": quantile if quantile.ndim == 2 else np.full((batch, 1), quantile.reshape(-1, 1), dtype=np.float32),
        "gamma": np.array(np.broadcast_to(gamma, (batch,)), dtype=np.float32),
    }


def reference(graph, images, targets, quantile=0.1, gamma=INFINITY):
    """By onnx's own evaluator, in the graph's type: the definition of every operator, nothing fused."""
    evaluator = ReferenceEvaluator(graph, new_ops=[Erf, Pad, MaxPool, ConvTranspose])
    with np.errstate(all="ignore"):
        found = evaluator.run(None, feeds(images, targets, quantile, gamma))
    return dict(zip(evaluator.output_names, found, strict=True))


class Session:
    """A graph in ONNX Runtime on one core."""

    def __init__(self, graph):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images, targets, quantile=0.1, gamma=INFINITY):
        found = self._session.run(None, feeds(np.asarray(images, dtype=np.float32), targets, quantile, gamma))
        return dict(zip([one.name for one in self._session.get_outputs()], found, strict=True))


def widened(prediction):
    """The prediction in float64, its weights those of the float32 one."""
    model = onnx.ModelProto()
    model.CopyFrom(prediction.model)
    graph = model.graph
    for stored in graph.initializer:
        if stored.data_type == TensorProto.FLOAT:
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float64), stored.name))
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    onnx.checker.check_model(model, full_check=True)
    return Prediction(model, prediction.layers)
