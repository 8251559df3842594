"""Every operator's gradient in the explanation graph against autograd of the same function written in torch.

A prediction is made by hand of ONNX nodes: images -> convolution -> the operator -> logits, linear in the operator's
result with a weight of its own for each number. With quantile 0 the graph gives the plain gradient: in float64 by
onnx's own evaluator, and in float32 by ONNX Runtime, which knows no convolution of float64.
"""

import math
from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.graph.derivatives import DERIVATIVES
from parchgrad.graph.explanation import BACKWARDS, explanation_graph
from parchgrad.graph.prediction import OPSET, Prediction
from parchgrad.tables import SelectionTable
from tests.oracles.tolerance import assert_close
from tests.parchgrad.graphs import Session, reference

CLASSES, CHANNELS = 3, 4
SIZE = (6, 7)  # rows and columns must not be mistaken for each other


class Written:
    """An ONNX prediction being written. `z` is the convolution's result (batch, CHANNELS, height, width)."""

    z = "z"

    def __init__(self, dtype):
        self.dtype, self.nodes, self.stored = np.dtype(dtype), [], []

    def op(self, kind, *inputs, **attributes):
        return self.ops(1, kind, *inputs, **attributes)[0]

    def ops(self, results, kind, *inputs, **attributes):
        """Inputs that are no names are constants."""
        names = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        number = len(self.nodes)
        outputs = [f"{kind.lower()}_{number}_{i}" for i in range(results)]
        self.nodes.append(helper.make_node(kind, names, outputs, name=f"node_{kind}_{number}", **attributes))
        return outputs

    def constant(self, value):
        """Integers are int64; everything else of the graph's type."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else self.dtype)
        name = f"stored_{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(array, name))
        return name


def numbers(*shape, seed=7):
    """Random ones that a float32 holds exactly: both types compute the same function."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


WEIGHT, BIAS = numbers(CHANNELS, 3, 3, 3, seed=1) * 0.5, numbers(CHANNELS, seed=2)


def predicted(written, function, dtype, size, weight, bias, padding, symbolic):
    """The prediction as ONNX, and the same as a torch function of the images."""
    onto = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
    w = Written(dtype)
    pads = [padding] * 4
    w.nodes.append(helper.make_node("Conv", ["images", "weight", "bias"], ["z"], name="node_conv", pads=pads))
    for name, array in (("weight", weight), ("bias", bias)):
        w.stored.append(numpy_helper.from_array(array.astype(dtype), name))
    y = written(w)

    def in_torch(images):
        z = F.conv2d(images, torch.from_numpy(weight), torch.from_numpy(bias), padding=padding)
        return logits_of(function(z), symbolic)

    with torch.no_grad():
        result = function(torch.zeros(1, CHANNELS, *(s - 2 + 2 * padding for s in size), dtype=torch.float64))
    if symbolic:  # however large: the sum over positions of the squares
        axes = list(range(2, result.dim()))
        flat = w.op("ReduceSum", w.op("Mul", y, y), axes, keepdims=0) if axes else w.op("Mul", y, y)
    else:
        flat = w.op("Flatten", y, axis=1)
    width = result.shape[1] if symbolic else result[0].numel()
    w.nodes.append(helper.make_node("Gemm", [flat, w.constant(numbers(width, CLASSES))], ["logits"], name="node_head"))
    sides = ["height", "width"] if symbolic else list(size)
    graph = helper.make_graph(
        w.nodes,
        "prediction",
        [helper.make_tensor_value_info("images", onto, ["batch", 3, *sides])],
        [helper.make_tensor_value_info("logits", onto, ["batch", CLASSES])],
        w.stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)
    return Prediction(inferred, {"node_conv": "conv"}), in_torch


def logits_of(y, symbolic):
    if symbolic:
        y = (y * y).reshape(*y.shape[:2], -1).sum(2)
    y = y.reshape(len(y), -1)
    return y @ torch.from_numpy(numbers(y.shape[1], CLASSES))


def gradient(function, images, targets):
    """Of each image's target logit, image by image, by autograd."""
    found = []
    for image, target in zip(torch.from_numpy(images), targets, strict=True):
        image = image[None].clone().requires_grad_()
        function(image)[0, target].backward()
        found.append(image.grad[0].numpy())
    return np.stack(found)


def graph_of(prediction, backward):
    table = SelectionTable.random(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, CHANNELS, 3))), CLASSES, 0)
    return explanation_graph(prediction, table, backward=backward)


def assert_gradient(
    written, function, *, images=None, weight=WEIGHT, bias=BIAS, padding=1, symbolic=False, size=SIZE, narrow=1e-5
):
    """In both types, by both backward passes, for batches of 1 and 3."""
    images = numbers(3, 3, *size, seed=3) if images is None else images
    targets = [2, 0, 1]
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, narrow)):
        prediction, in_torch = predicted(written, function, dtype, size, weight, bias, padding, symbolic)
        expected = gradient(in_torch, images, targets)
        assert np.abs(expected).max() > 0
        for backward in BACKWARDS:
            graph = graph_of(prediction, backward)
            onnx.checker.check_model(graph, full_check=True)
            run = Session(graph) if dtype == np.float32 else lambda *given, g=graph: reference(g, *given)
            for batch in (1, 3):
                found = run(images[:batch].astype(dtype), targets[:batch], 0.0)
                assert found["attributions"].dtype == dtype
                assert_close(found["attributions"], expected[:batch], tolerance)
                assert found["covered"].all()
                assert not found["identity_layers"].any()
    return expected


# --- element by element -------------------------------------------------------------------------------------------


def above_zero(w):
    return w.op("Add", w.op("Mul", w.z, w.z), 0.5)


def float32(value):
    """As a node's attribute is stored."""
    return float(np.float32(value))


def hard_sigmoid(x, alpha, beta):
    return (alpha * x + beta).clamp(0, 1)


ELEMENTWISE = {
    "Relu": (lambda w: w.op("Relu", w.z), F.relu),
    "LeakyRelu": (lambda w: w.op("LeakyRelu", w.z, alpha=0.25), lambda z: F.leaky_relu(z, 0.25)),
    "LeakyRelu-default": (lambda w: w.op("LeakyRelu", w.z), lambda z: F.leaky_relu(z, 0.01)),
    "LeakyRelu-negative": (lambda w: w.op("LeakyRelu", w.z, alpha=-0.5), lambda z: F.leaky_relu(z, -0.5)),
    "Clip-0-1": (lambda w: w.op("Clip", w.z, 0.0, 1.0), lambda z: z.clamp(0.0, 1.0)),
    "Clip-low": (lambda w: w.op("Clip", w.z, -0.75), lambda z: z.clamp(min=-0.75)),
    "Clip-high": (lambda w: w.op("Clip", w.z, "", 0.5), lambda z: z.clamp(max=0.5)),
    "Clip-both": (lambda w: w.op("Clip", w.z, -0.375, 0.625), lambda z: z.clamp(-0.375, 0.625)),
    "Clip-none": (lambda w: w.op("Clip", w.z, -np.inf, np.inf), lambda z: z),
    "Clip-below-zero": (lambda w: w.op("Clip", w.z, -2.0, -0.25), lambda z: z.clamp(-2.0, -0.25)),
    "Max": (lambda w: w.op("Max", w.z, 0.25), lambda z: z.clamp(min=0.25)),
    "Max-reversed": (lambda w: w.op("Max", np.array([-0.5]), w.z), lambda z: z.clamp(min=-0.5)),
    "Min": (lambda w: w.op("Min", w.z, 0.25), lambda z: z.clamp(max=0.25)),
    "Sigmoid": (lambda w: w.op("Sigmoid", w.z), torch.sigmoid),
    "Tanh": (lambda w: w.op("Tanh", w.z), torch.tanh),
    "HardSigmoid": (lambda w: w.op("HardSigmoid", w.z, alpha=0.25, beta=0.375), lambda z: hard_sigmoid(z, 0.25, 0.375)),
    "HardSigmoid-default": (lambda w: w.op("HardSigmoid", w.z), lambda z: hard_sigmoid(z, 0.2, 0.5)),
    "HardSwish": (lambda w: w.op("HardSwish", w.op("Mul", w.z, 2.0)), lambda z: F.hardswish(2 * z)),
    "Erf": (lambda w: w.op("Erf", w.z), torch.erf),
    "Gelu": (lambda w: w.op("Gelu", w.z), F.gelu),
    "Gelu-written-out": (
        lambda w: w.op("Mul", w.op("Mul", w.z, w.op("Add", w.op("Erf", w.op("Div", w.z, math.sqrt(2))), 1.0)), 0.5),
        F.gelu,
    ),
    "Elu": (lambda w: w.op("Elu", w.z, alpha=0.5), lambda z: F.elu(z, 0.5)),
    "Elu-default": (lambda w: w.op("Elu", w.z), F.elu),
    "Softplus": (lambda w: w.op("Softplus", w.z), lambda z: (1 + z.exp()).log()),
    "Mish": (lambda w: w.op("Mul", w.z, w.op("Tanh", w.op("Softplus", w.z))), F.mish),
    "Sqrt": (lambda w: w.op("Sqrt", above_zero(w)), lambda z: (z * z + 0.5).sqrt()),
    "Exp": (lambda w: w.op("Exp", w.z), torch.exp),
    "Reciprocal": (lambda w: w.op("Reciprocal", above_zero(w)), lambda z: 1 / (z * z + 0.5)),
    "Pow-2": (lambda w: w.op("Pow", w.z, 2.0), lambda z: z**2),
    "Pow-3-vector-of-one": (lambda w: w.op("Pow", w.z, np.array([3.0])), lambda z: z**3),
    "Pow-half": (lambda w: w.op("Pow", above_zero(w), -0.5), lambda z: (z * z + 0.5) ** -0.5),
    "Pow-1": (lambda w: w.op("Pow", w.z, 1.0), lambda z: z),
    "Neg": (lambda w: w.op("Neg", w.z), torch.neg),
    "Identity": (lambda w: w.op("Tanh", w.op("Identity", w.z)), torch.tanh),
    "Cast": (lambda w: w.op("Tanh", w.op("Cast", w.z, to=helper.np_dtype_to_tensor_dtype(w.dtype))), torch.tanh),
    "CastLike": (lambda w: w.op("Tanh", w.op("CastLike", w.z, 1.0)), torch.tanh),
    "swish": (lambda w: w.op("Mul", w.z, w.op("Sigmoid", w.z)), F.silu),
    "swish-reversed": (lambda w: w.op("Mul", w.op("Sigmoid", w.z), w.z), F.silu),
    "sigmoid-of-another": (
        lambda w: w.op("Mul", w.z, w.op("Sigmoid", w.op("Tanh", w.z))),
        lambda z: z * z.tanh().sigmoid(),
    ),
    # The sigmoid is read twice: what the swish leaves out of it must not be lost for the other reader.
    "swish-and-more": (
        lambda w: (lambda s: w.op("Add", w.op("Mul", w.z, s), w.op("Mul", s, 3.0)))(w.op("Sigmoid", w.z)),
        lambda z: F.silu(z) + 3 * z.sigmoid(),
    ),
    "square-by-Mul": (lambda w: w.op("Mul", w.z, w.z), lambda z: z * z),
    "twice-by-Add": (lambda w: w.op("Tanh", w.op("Add", w.z, w.z)), lambda z: (2 * z).tanh()),
    "nothing-by-Sub": (lambda w: w.op("Sub", w.op("Mul", w.z, 2.0), w.z), lambda z: z),
    "one-by-Div": (lambda w: w.op("Add", w.op("Div", w.z, w.z), w.z), lambda z: z),
}

# Of the image-dependent operand z (B, 4, 6, 7): by a stored one, by one of its own, both ways round.
TWO = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
}
STORED = {
    "number": numbers(),
    "whole": numbers(1, CHANNELS, *SIZE),
    "channel": numbers(CHANNELS, 1, 1),
    "row": numbers(SIZE[0], 1),
    "column": numbers(SIZE[1]),
}


def away_from_zero(array):
    return np.where(array < 0, array - 1, array + 1)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name):
    assert_gradient(*ELEMENTWISE[name])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", TWO)
def test_arithmetic_with_a_constant(kind, stored):
    constant = away_from_zero(STORED[stored])
    for first in (True, False):
        assert_gradient(
            lambda w, f=first: w.op(
                "Tanh", w.op("Mul", 0.25, w.op(kind, *((above_zero(w), constant) if f else (constant, above_zero(w)))))
            ),
            lambda z, f=first: (
                TWO[kind](
                    *((z * z + 0.5, torch.from_numpy(constant)) if f else (torch.from_numpy(constant), z * z + 0.5))
                )
                * 0.25
            ).tanh(),
            narrow=1e-4,  # where tanh is flat
        )


def test_a_constant_wider_than_the_image_s_operand():
    """The gradient is summed over what the operand was repeated along: of one channel, and of fewer axes."""
    plane = numbers(1, CHANNELS, *SIZE)
    for kind, formula in TWO.items():
        assert_gradient(
            lambda w, k=kind: w.op(
                "Tanh", w.op(k, w.op("ReduceMean", above_zero(w), [1], keepdims=1), away_from_zero(plane))
            ),
            lambda z, f=formula: f((z * z + 0.5).mean(1, keepdim=True), torch.from_numpy(away_from_zero(plane))).tanh(),
            narrow=1e-4,
        )
        assert_gradient(
            lambda w, k=kind: w.op(
                "Tanh", w.op(k, away_from_zero(plane), w.op("ReduceMean", above_zero(w), [2], keepdims=1))
            ),
            lambda z, f=formula: f(torch.from_numpy(away_from_zero(plane)), (z * z + 0.5).mean(2, keepdim=True)).tanh(),
            narrow=1e-4,
        )


# What the second operand is made of: as wide as the first, or repeated along some axes.
NARROWER = {"same": (), "gate": (2, 3), "of-one-channel": (1,), "of-one-row": (2,), "number": (1, 2, 3)}


@pytest.mark.parametrize("narrower", NARROWER)
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
def test_arithmetic_of_two_of_the_image(kind, narrower, symbolic):
    axes = NARROWER[narrower]

    def second(w):
        square = above_zero(w)
        return w.op("ReduceMean", square, list(axes), keepdims=1) if axes else square

    def in_torch(z):
        square = z * z + 0.5
        return square.mean(axes, keepdim=True) if axes else square

    assert_gradient(
        lambda w: w.op(kind, w.op("Tanh", w.z), second(w)),
        lambda z: TWO[kind](z.tanh(), in_torch(z)),
        symbolic=symbolic,
    )
    assert_gradient(
        lambda w: w.op(kind, second(w), w.op("Exp", w.z)), lambda z: TWO[kind](in_torch(z), z.exp()), symbolic=symbolic
    )


def test_fewer_axes_are_broadcast_over_the_batch_of_one_too():
    """(B, 4, 1, 1) with (B, 4, 6, 7), and a Reshape that drops no axis of the batch."""
    assert_gradient(
        lambda w: w.op("Mul", w.z, w.op("Reshape", w.op("ReduceMean", w.z, [2, 3], keepdims=0), [0, CHANNELS, 1, 1])),
        lambda z: z * z.mean((2, 3))[:, :, None, None],
    )


# --- kinks --------------------------------------------------------------------------------------------------------

# Whole numbers everywhere: the convolution's results lie on every kink and tie, exactly, in either type.
GRID = {
    "images": np.random.default_rng(5).integers(-2, 3, size=(3, 3, 9, 8)).astype(np.float64),
    "weight": np.zeros((CHANNELS, 3, 3, 3)),
    "bias": np.zeros(CHANNELS),
    "size": (9, 8),
}
for _k in range(CHANNELS):
    GRID["weight"][_k, _k % 3, 1, 1] = 1.0 if _k < 3 else -2.0

KINKS = {
    "Relu": (lambda w: w.op("Relu", w.z), F.relu, 0),
    "LeakyRelu": (lambda w: w.op("LeakyRelu", w.z, alpha=0.25), lambda z: F.leaky_relu(z, 0.25), 0),
    "Elu": (lambda w: w.op("Elu", w.z, alpha=0.5), lambda z: F.elu(z, 0.5), 0),
    # Of torch's two clippings at their bounds, ReLU6's and hardtanh's: networks are made of those.
    "Relu6": (lambda w: w.op("Clip", w.op("Mul", w.z, 3.0), 0.0, 6.0), lambda z: F.relu6(3 * z), 6),
    "Hardtanh": (lambda w: w.op("Clip", w.z, -1.0, 2.0), lambda z: F.hardtanh(z, -1.0, 2.0), -1),
    "HardSigmoid": (
        lambda w: w.op("HardSigmoid", w.z, alpha=0.25, beta=0.5),
        lambda z: F.hardtanh(z * 0.25 + 0.5, 0.0, 1.0),
        2,
    ),
}


@pytest.mark.parametrize("name", KINKS)
def test_at_a_kink_as_torch(name):
    written, function, _ = KINKS[name]
    assert_gradient(written, function, **GRID)


def test_hard_swish_at_its_kinks():
    """0 at -3 and 1 at 3, where torch's versions differ: against the formula."""

    def slope(z):
        return torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z.double() / 3 + 0.5))

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return F.hardswish(z)

        @staticmethod
        def backward(ctx, grad):
            return grad * slope(ctx.saved_tensors[0])

    # 1 / 3 of a float32 is none of a float64: torch multiplies by 1 / 6.
    assert_gradient(lambda w: w.op("HardSwish", w.op("Mul", w.z, 1.5)), lambda z: Formula.apply(1.5 * z), **GRID)


# --- pooling ------------------------------------------------------------------------------------------------------

# kernel, stride, pads, ceil_mode, input: the second line each an odd one where windows end before the input does.
MAXIMA = {
    "2x2": ((2, 2), (2, 2), (0, 0), False, (6, 8)),
    "2x2-left-over": ((2, 2), (2, 2), (0, 0), False, (7, 9)),
    "2x2-stride-1": ((2, 2), (1, 1), (0, 0), False, (5, 6)),
    "2x2-stride-3": ((2, 2), (3, 3), (0, 0), False, (8, 10)),
    "2x2-ceil": ((2, 2), (2, 2), (0, 0), True, (7, 9)),
    "3x3-stride-2": ((3, 3), (2, 2), (0, 0), False, (7, 9)),
    "3x3-stride-2-left-over": ((3, 3), (2, 2), (0, 0), False, (8, 10)),
    "3x3-stride-2-ceil": ((3, 3), (2, 2), (0, 0), True, (8, 10)),
    "3x3-stride-2-padded": ((3, 3), (2, 2), (1, 1), False, (8, 9)),
    "3x3-stride-2-padded-ceil": ((3, 3), (2, 2), (1, 1), True, (8, 9)),
    "3x3-stride-1-padded": ((3, 3), (1, 1), (1, 1), False, (5, 6)),
    "3x3-stride-1-padded-ceil": ((3, 3), (1, 1), (1, 1), True, (5, 6)),
    "3x3-stride-3": ((3, 3), (3, 3), (1, 1), False, (9, 8)),
    "3x2-stride-2x1": ((3, 2), (2, 1), (1, 0), False, (7, 6)),
    "3x2-stride-1x3": ((3, 2), (1, 3), (1, 1), False, (6, 8)),
    "2x3-stride-3x2-ceil": ((2, 3), (3, 2), (0, 1), True, (8, 10)),
    "1x1-stride-2": ((1, 1), (2, 2), (0, 0), False, (5, 6)),
    "5x5-stride-1": ((5, 5), (1, 1), (2, 2), False, (6, 7)),
    "13-stride-1": ((13, 13), (1, 1), (6, 6), False, (6, 7)),
    "whole-picture": ((6, 7), (6, 7), (0, 0), False, (6, 7)),
}


def max_pool(w, x, kernel, stride, pads, ceil, **more):
    return w.op("MaxPool", x, kernel_shape=kernel, strides=stride, pads=[*pads, *pads], ceil_mode=int(ceil), **more)


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("name", MAXIMA)
def test_max_pool(name, symbolic, ties):
    kernel, stride, pads, ceil, size = MAXIMA[name]
    given = {"size": size}
    if ties:  # few different numbers, and after a ReLU whole windows of zeros
        images = np.random.default_rng(6).integers(-2, 2, size=(3, 3, *size)).astype(np.float64)
        given |= {"images": images, "weight": GRID["weight"], "bias": GRID["bias"]}
    add = 0.0 if not symbolic else 1.5  # of which the square has a gradient

    def written(w):
        x = w.op("Relu", w.z) if ties else w.z
        return w.op("Add", max_pool(w, x, kernel, stride, pads, ceil), add)

    def in_torch(z):
        return F.max_pool2d(F.relu(z) if ties else z, kernel, stride, pads, ceil_mode=ceil) + add

    assert_gradient(written, in_torch, symbolic=symbolic, **given)


def overlapping(w, x):
    return max_pool(w, x, (3, 3), (1, 1), (1, 1), False)


# ReLUs before the pooling may be left to it only where nobody else reads them, and where there is nothing else.
BEHIND_RELUS = {
    "one": (lambda w: overlapping(w, w.op("Relu", w.z)), lambda z: F.max_pool2d(F.relu(z), 3, 1, 1)),
    "read-twice": (
        lambda w: (lambda y: w.op("Add", overlapping(w, y), w.op("Mul", y, 0.5)))(w.op("Relu", w.z)),
        lambda z: F.max_pool2d(F.relu(z), 3, 1, 1) + F.relu(z) / 2,
    ),
    "several": (
        lambda w: overlapping(w, w.op("Concat", w.op("Relu", w.z), w.op("Relu", w.op("Neg", w.z)), axis=1)),
        lambda z: F.max_pool2d(torch.cat([F.relu(z), F.relu(-z)], 1), 3, 1, 1),
    ),
    "beside-another": (
        lambda w: overlapping(w, w.op("Concat", w.op("Relu", w.z), w.op("Tanh", w.op("Sub", w.z, 2.0)), axis=1)),
        lambda z: F.max_pool2d(torch.cat([F.relu(z), (z - 2).tanh()], 1), 3, 1, 1),
    ),
    "one-of-several-read-twice": (
        lambda w: (
            lambda y: w.op(
                "Concat", overlapping(w, w.op("Concat", y, w.op("Relu", w.op("Neg", w.z)), axis=1)), y, axis=1
            )
        )(w.op("Relu", w.z)),
        lambda z: torch.cat([F.max_pool2d(torch.cat([F.relu(z), F.relu(-z)], 1), 3, 1, 1), F.relu(z)], 1),
    ),
}


@pytest.mark.parametrize("name", BEHIND_RELUS)
def test_max_pool_behind_relus(name):
    assert_gradient(*BEHIND_RELUS[name])


def test_max_pool_of_huge_and_of_negative_numbers():
    """The margins are below every number, and no difference from them overflows."""
    kernel, stride, pads = (3, 3), (2, 2), (1, 1)
    for factor in (1e30, -1e-30):
        assert_gradient(
            lambda w, f=factor: w.op(
                "Mul", max_pool(w, w.op("Mul", w.op("Sub", w.z, 100.0), f), kernel, stride, pads, False), 1 / f
            ),
            lambda z, f=factor: F.max_pool2d((z - 100) * f, kernel, stride, pads) / f,
            narrow=1e-4,
        )


AVERAGES = {
    "2x2": ((2, 2), (2, 2), (0, 0), False, True, (6, 8)),
    "2x2-left-over": ((2, 2), (2, 2), (0, 0), False, False, (7, 9)),
    "3x3-stride-2": ((3, 3), (2, 2), (0, 0), False, False, (8, 10)),
    "3x3-stride-1-padded": ((3, 3), (1, 1), (1, 1), False, True, (5, 6)),
    "3x3-stride-1-padded-exclusive": ((3, 3), (1, 1), (1, 1), False, False, (5, 6)),
    "3x3-stride-2-padded-exclusive": ((3, 3), (2, 2), (1, 1), False, False, (8, 9)),
    "2x2-ceil-exclusive": ((2, 2), (2, 2), (0, 0), True, False, (7, 9)),
    "2x2-ceil": ((2, 2), (2, 2), (0, 0), True, True, (7, 9)),
    "3x3-stride-2-padded-ceil": ((3, 3), (2, 2), (1, 1), True, True, (8, 10)),
    "3x3-stride-2-padded-ceil-exclusive": ((3, 3), (2, 2), (1, 1), True, False, (8, 10)),
    "2x2-stride-3": ((2, 2), (3, 3), (0, 0), False, False, (8, 10)),
    "3x2-stride-1x2": ((3, 2), (1, 2), (1, 0), False, True, (6, 7)),
    "1x1": ((1, 1), (1, 1), (0, 0), False, False, (5, 6)),
    "1x1-stride-2": ((1, 1), (2, 2), (0, 0), False, False, (5, 6)),
    "whole-picture": ((6, 7), (6, 7), (0, 0), False, False, (6, 7)),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("name", AVERAGES)
def test_average_pool(name, symbolic):
    kernel, stride, pads, ceil, inclusive, size = AVERAGES[name]

    def written(w):
        return w.op(
            "AveragePool", w.z, kernel_shape=kernel, strides=stride, pads=[*pads, *pads], ceil_mode=int(ceil),
            count_include_pad=int(inclusive),
        )  # fmt: skip

    def in_torch(z):
        return F.avg_pool2d(z, kernel, stride, pads, ceil_mode=ceil, count_include_pad=inclusive)

    if symbolic and (ceil or (any(pads) and not inclusive)):
        with pytest.raises(UnsupportedModelError, match=r"AveragePool at .*depends on the picture's size"):
            assert_gradient(written, in_torch, symbolic=True, size=size)
    else:
        assert_gradient(written, in_torch, symbolic=symbolic, size=size)


def test_global_average_pool():
    for symbolic in (False, True):
        assert_gradient(
            lambda w: w.op("Tanh", w.op("GlobalAveragePool", w.z)),
            lambda z: z.mean((2, 3), keepdim=True).tanh(),
            symbolic=symbolic,
        )


# --- shape and place ----------------------------------------------------------------------------------------------

INDICES = [2, 0]
PLACES = {
    "Concat": (
        lambda w: w.op("Concat", w.z, w.op("Tanh", w.z), w.op("ReduceMean", w.z, [1], keepdims=1), axis=1),
        lambda z: torch.cat([z, z.tanh(), z.mean(1, keepdim=True)], 1),
    ),
    "Concat-rows": (
        lambda w: w.op("Concat", w.op("Tanh", w.z), w.op("ReduceMean", w.z, [-2], keepdims=1), axis=-2),
        lambda z: torch.cat([z.tanh(), z.mean(2, keepdim=True)], 2),
    ),
    "Concat-with-a-constant": (
        lambda w: w.op(
            "Concat", w.op("Slice", w.z, [0], [1], [1]), w.op("Mul", w.op("Slice", w.z, [1], [2], [1]), 0.0), axis=1
        ),
        lambda z: torch.cat([z[:, :1], z[:, 1:2] * 0], 1),
    ),
    "Concat-of-one": (lambda w: w.op("Tanh", w.op("Concat", w.z, axis=1)), torch.tanh),
    "Split": (
        lambda w: (lambda a, b: w.op("Mul", w.op("Slice", b, [0], [1], [1]), w.op("Tanh", a)))(
            *w.ops(2, "Split", w.z, [1, 3], axis=1)
        ),
        lambda z: z[:, 1:2] * z[:, :1].tanh(),
    ),
    "Split-equal-parts": (
        lambda w: (lambda a, b: w.op("Sub", b, w.op("Tanh", a)))(*w.ops(2, "Split", w.z, axis=-3, num_outputs=2)),
        lambda z: z[:, 2:] - z[:, :2].tanh(),
    ),
    "Split-one-unused": (
        lambda w: w.op("Tanh", w.ops(3, "Split", w.z, [1, 2, 1], axis=1)[1]),
        lambda z: z[:, 1:3].tanh(),
    ),
    "Slice-channels": (lambda w: w.op("Tanh", w.op("Slice", w.z, [1], [3], [1])), lambda z: z[:, 1:3].tanh()),
    "Slice-from-the-end": (
        lambda w: w.op("Tanh", w.op("Slice", w.z, [-2], [2**63 - 1], [-3], [1])),
        lambda z: z[:, -2:].tanh(),
    ),
    "Slice-of-a-slice": (
        lambda w: w.op("Tanh", w.op("Slice", w.op("Slice", w.z, [1], [4], [1]), [0], [-1], [1])),
        lambda z: z[:, 1:3].tanh(),
    ),
    "Slice-nothing-off": (lambda w: w.op("Tanh", w.op("Slice", w.z, [0], [99], [1])), torch.tanh),
    "Gather-one": (lambda w: w.op("Tanh", w.op("Gather", w.z, 2, axis=1)), lambda z: z[:, 2].tanh()),
    "Gather-last": (lambda w: w.op("Tanh", w.op("Gather", w.z, -1, axis=-3)), lambda z: z[:, -1].tanh()),
    "Gather-order": (
        lambda w: w.op("Tanh", w.op("Gather", w.z, [3, 1, 0, 2], axis=1)),
        lambda z: z[:, [3, 1, 0, 2]].tanh(),
    ),
    "Gather-some": (lambda w: w.op("Tanh", w.op("Gather", w.z, INDICES, axis=1)), lambda z: z[:, INDICES].tanh()),
    "Transpose": (
        lambda w: w.op("Tanh", w.op("Transpose", w.z, perm=[0, 2, 3, 1])),
        lambda z: z.permute(0, 2, 3, 1).tanh(),
    ),
    "Transpose-rotating": (
        lambda w: w.op("Tanh", w.op("Transpose", w.z, perm=[0, 3, 1, 2])),
        lambda z: z.permute(0, 3, 1, 2).tanh(),
    ),
    "Flatten": (lambda w: w.op("Tanh", w.op("Flatten", w.z)), lambda z: z.flatten(1).tanh()),
    "Unsqueeze-Squeeze": (
        lambda w: w.op("Tanh", w.op("Squeeze", w.op("Tanh", w.op("Unsqueeze", w.z, [2])), [2])),
        lambda z: z.tanh().tanh(),
    ),
}
FIXED_PLACES = {
    "Reshape": (lambda w: w.op("Tanh", w.op("Reshape", w.z, [0, -1])), lambda z: z.flatten(1).tanh()),
    "Reshape-groups": (
        lambda w: w.op("Tanh", w.op("Reshape", w.z, [0, 2, 2, *SIZE])),
        lambda z: z.unflatten(1, (2, 2)).tanh(),
    ),
    "channel-shuffle": (
        lambda w: w.op(
            "Tanh",
            w.op(
                "Reshape",
                w.op("Transpose", w.op("Reshape", w.z, [0, 2, 2, *SIZE]), perm=[0, 2, 1, 3, 4]),
                [0, CHANNELS, *SIZE],
            ),
        ),
        lambda z: z.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2).tanh(),
    ),
    "Slice-rows-and-columns": (
        lambda w: w.op("Tanh", w.op("Slice", w.z, [1, -6], [-2, 5], [2, 3])),
        lambda z: z[:, :, 1:-2, -6:5].tanh(),
    ),
    "Gather-row": (lambda w: w.op("Tanh", w.op("Gather", w.z, 4, axis=2)), lambda z: z[:, :, 4].tanh()),
    "Expand": (
        lambda w: w.op("Mul", w.z, w.op("Expand", w.op("ReduceMean", w.z, [2, 3], keepdims=1), [1, 1, *SIZE])),
        lambda z: z * z.mean((2, 3), keepdim=True),
    ),
    "Gemm": (
        lambda w: w.op(
            "Tanh", w.op("Gemm", w.op("Flatten", w.z), numbers(CHANNELS * SIZE[0] * SIZE[1], 5) * 0.1, numbers(5))
        ),
        lambda z: (
            z.flatten(1) @ torch.from_numpy(numbers(CHANNELS * SIZE[0] * SIZE[1], 5) * 0.1)
            + torch.from_numpy(numbers(5))
        ).tanh(),
    ),
    "Gemm-transposed": (
        lambda w: w.op(
            "Tanh",
            w.op(
                "Gemm", w.op("Flatten", w.z), numbers(5, CHANNELS * SIZE[0] * SIZE[1]), transB=1, alpha=0.125, beta=2.0
            ),
        ),
        lambda z: (0.125 * z.flatten(1) @ torch.from_numpy(numbers(5, CHANNELS * SIZE[0] * SIZE[1])).T).tanh(),
    ),
    "MatMul-stored": (
        lambda w: w.op("Tanh", w.op("MatMul", w.z, numbers(SIZE[1], 5))),
        lambda z: (z @ torch.from_numpy(numbers(SIZE[1], 5))).tanh(),
    ),
    "MatMul-stored-batch": (
        lambda w: w.op("Tanh", w.op("MatMul", w.z, numbers(1, CHANNELS, SIZE[1], 5))),
        lambda z: (z @ torch.from_numpy(numbers(1, CHANNELS, SIZE[1], 5))).tanh(),
    ),
    "MatMul-stored-first": (
        lambda w: w.op("Tanh", w.op("MatMul", numbers(1, CHANNELS, 5, SIZE[0]), w.z)),
        lambda z: (torch.from_numpy(numbers(1, CHANNELS, 5, SIZE[0])) @ z).tanh(),
    ),
    "MatMul-of-two": (
        lambda w: w.op("MatMul", w.op("Tanh", w.z), w.op("Transpose", w.z, perm=[0, 1, 3, 2])),
        lambda z: z.tanh() @ z.transpose(2, 3),
    ),
    "attention": (
        lambda w: (
            lambda x: w.op(
                "MatMul", w.op("Softmax", w.op("MatMul", x, w.op("Transpose", x, perm=[0, 2, 1])), axis=-1), x
            )
        )(w.op("Reshape", w.z, [0, CHANNELS, -1])),
        lambda z: (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x)(z.flatten(2)),
    ),
}


@pytest.mark.parametrize("name", [*PLACES, *FIXED_PLACES])
def test_shape_and_place(name):
    assert_gradient(*(PLACES | FIXED_PLACES)[name])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in PLACES
        if name not in ("Flatten", "Transpose", "Transpose-rotating", "Gather-one", "Gather-last")
    ],
)
def test_place_in_pictures_of_any_size(name):
    assert_gradient(*PLACES[name], symbolic=True)


# --- padding ------------------------------------------------------------------------------------------------------

# left, right, top, bottom, as torch has it
PADS = {
    "constant": ("constant", (1, 2, 3, 4)),
    "constant-cutting": ("constant", (-1, 2, 3, -2)),
    "constant-cutting-all": ("constant", (-1, -2, -1, -2)),
    "reflect": ("reflect", (1, 2, 3, 4)),
    "reflect-columns": ("reflect", (6, 5, 0, 0)),
    "reflect-one-side": ("reflect", (0, 3, 2, 0)),
    "reflect-most": ("reflect", (6, 6, 5, 5)),
    "edge": ("replicate", (1, 2, 3, 4)),
    "edge-wide": ("replicate", (9, 0, 0, 8)),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("by_axes", [False, True], ids=["all", "axes"])
@pytest.mark.parametrize("name", PADS)
def test_pad(name, by_axes, symbolic):
    mode, (left, right, top, bottom) = PADS[name]
    of_onnx = {"replicate": "edge"}.get(mode, mode)

    def written(w):
        if by_axes:
            return w.op(
                "Pad", w.z, [left, top, right, bottom], "" if of_onnx != "constant" else 0.5, [-1, 2], mode=of_onnx
            )
        return w.op("Pad", w.z, [0, 0, top, left, 0, 0, bottom, right], mode=of_onnx)

    value = 0.5 if by_axes and mode == "constant" else 0.0
    assert_gradient(
        written, lambda z: F.pad(z, (left, right, top, bottom), mode=mode, value=value or None), symbolic=symbolic
    )


def test_pad_of_channels():
    assert_gradient(lambda w: w.op("Pad", w.z, [0, 1, 0, 0, 0, 2, 0, 0]), lambda z: F.pad(z, (0, 0, 0, 0, 1, 2)))


# --- sums and normalisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbolic", "keepdims"), [(False, 0), (False, 1), (True, 1)], ids=["fixed-0", "fixed-1", "symbolic"]
)
@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (2, 3), (-1, -2), (3, 2), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum"])
def test_reductions(kind, axes, keepdims, symbolic):
    reduce = {"ReduceMean": torch.mean, "ReduceSum": torch.sum}[kind]
    assert_gradient(
        lambda w: w.op("Tanh", w.op("Mul", w.op(kind, w.z, list(axes), keepdims=keepdims), 1 / 64)),
        lambda z: (reduce(z, dim=axes, keepdim=bool(keepdims)) / 64).tanh(),
        symbolic=symbolic,
    )


def test_batch_norm_that_no_convolution_takes_in():
    scale, shift, mean, variance = numbers(CHANNELS), numbers(CHANNELS), numbers(CHANNELS), numbers(CHANNELS) ** 2 + 0.5
    for epsilon in (1e-5, 0.125):
        assert_gradient(
            lambda w, e=epsilon: w.op("BatchNormalization", w.op("Tanh", w.z), scale, shift, mean, variance, epsilon=e),
            lambda z, e=epsilon: F.batch_norm(
                z.tanh(), *(torch.from_numpy(one) for one in (mean, variance, scale, shift)), False, 0.1, float32(e)
            ),
        )


def test_batch_norm_folded_into_its_convolution():
    """And one after a convolution that another operator reads too, which stays."""
    scale, shift, mean, variance = numbers(CHANNELS), numbers(CHANNELS), numbers(CHANNELS), numbers(CHANNELS) ** 2 + 0.5

    def normed(z):
        return F.batch_norm(z, *(torch.from_numpy(one) for one in (mean, variance, scale, shift)), False, 0.1, 0.125)

    def in_onnx(w):
        return w.op("BatchNormalization", w.z, scale, shift, mean, variance, epsilon=0.125)

    assert_gradient(lambda w: w.op("Tanh", in_onnx(w)), lambda z: normed(z).tanh())
    assert_gradient(lambda w: w.op("Mul", in_onnx(w), w.z), lambda z: normed(z) * z)


@pytest.mark.parametrize("axis", [-1, 1, 2, 3])
def test_layer_norm(axis):
    shape = (CHANNELS, *SIZE)[axis if axis < 0 else axis - 1 :]
    scale, shift = numbers(*shape), numbers(*shape, seed=8)
    assert_gradient(
        lambda w: w.op("LayerNormalization", w.z, scale, shift, axis=axis, epsilon=0.125),
        lambda z: F.layer_norm(z, shape, torch.from_numpy(scale), torch.from_numpy(shift), 0.125),
    )
    assert_gradient(
        lambda w: w.op("LayerNormalization", w.z, scale, axis=axis),
        lambda z: F.layer_norm(z, shape, torch.from_numpy(scale), None, float32(1e-5)),
        narrow=1e-4,
    )


def test_layer_norm_over_channels_last():
    """As ConvNeXt has it, in pictures of any size."""
    scale, shift = numbers(CHANNELS), numbers(CHANNELS, seed=8)

    def written(w):
        last = w.op("Transpose", w.z, perm=[0, 2, 3, 1])
        return w.op("Transpose", w.op("LayerNormalization", last, scale, shift, epsilon=0.125), perm=[0, 3, 1, 2])

    def in_torch(z):
        last = z.permute(0, 2, 3, 1)
        normed = F.layer_norm(last, (CHANNELS,), torch.from_numpy(scale), torch.from_numpy(shift), 0.125)
        return normed.permute(0, 3, 1, 2)

    for symbolic in (False, True):
        assert_gradient(written, in_torch, symbolic=symbolic)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_softmax(axis):
    for symbolic in (False, True):
        assert_gradient(lambda w: w.op("Softmax", w.z, axis=axis), lambda z: z.softmax(axis), symbolic=symbolic)


# --- what has no rule ---------------------------------------------------------------------------------------------

# What the message says -> the prediction, its operator, the shape it gives.
REFUSED = {
    "no rule for its gradient": (lambda w: w.op("Sin", w.z), "Sin", (4, 6, 7)),
    "dilated": (lambda w: w.op("MaxPool", w.z, kernel_shape=[2, 2], dilations=[2, 2]), "MaxPool", (4, 4, 5)),
    "(only its first result|no rule for its gradient)": (
        lambda w: (lambda y, i: w.op("Mul", y, w.op("CastLike", i, y)))(*w.ops(2, "MaxPool", w.z, kernel_shape=[2, 2])),
        "MaxPool",
        (4, 5, 6),
    ),
    "auto_pad SAME_UPPER": (
        lambda w: w.op("MaxPool", w.z, kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
        "MaxPool",
        (4, 6, 7),
    ),
    "auto_pad SAME_LOWER": (
        lambda w: w.op("AveragePool", w.z, kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
        "AveragePool",
        (4, 6, 7),
    ),
    "tanh": (lambda w: w.op("Gelu", w.z, approximate="tanh"), "Gelu", (4, 6, 7)),
    "steps": (lambda w: w.op("Slice", w.z, [0], [6], [2], [2]), "Slice", (4, 3, 7)),
    "twice": (lambda w: w.op("Gather", w.z, [0, 0, 1], axis=1), "Gather", (3, 6, 7)),
    "wrap": (lambda w: w.op("Pad", w.z, [0, 0, 1, 1, 0, 0, 1, 1], mode="wrap"), "Pad", (4, 8, 9)),
    "cuts in mode 'reflect'": (lambda w: w.op("Pad", w.z, [0, 0, 1, -1, 0, 0, 1, 1], mode="reflect"), "Pad", (4, 8, 7)),
    "exponent": (lambda w: w.op("Pow", w.z, w.z), "Pow", (4, 6, 7)),
    "bounds are computed": (lambda w: w.op("Clip", w.z, w.op("ReduceMin", w.z, keepdims=0)), "Clip", (4, 6, 7)),
    "batch axis": (lambda w: w.op("ReduceMean", w.z, [0, 1], keepdims=1), "ReduceMean", (1, 6, 7)),
    "along the batch": (lambda w: w.op("Concat", w.z, w.z, axis=0), "Concat", (4, 6, 7)),
}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_rule_is_refused_by_name(what, backward):
    written, operator, shape = REFUSED[what]
    prediction, _ = predicted(written, lambda z: torch.zeros(1, *shape), np.float32, SIZE, WEIGHT, BIAS, 1, False)
    with pytest.raises(UnsupportedModelError, match=f"^Operator {operator} at 'node_{operator}_.*{what}"):
        graph_of(prediction, backward)


def test_every_operator_with_a_rule_is_in_this_file():
    """Each is written in some prediction above, or here named with where it is."""
    written = set()
    for one, *_ in (*ELEMENTWISE.values(), *PLACES.values(), *FIXED_PLACES.values(), *KINKS.values()):
        w = Written(np.float64)
        one(w)
        written.update(node.op_type for node in w.nodes)
    own_tests = {
        "AveragePool", "BatchNormalization", "GlobalAveragePool", "LayerNormalization", "MaxPool", "Pad", "ReduceSum",
        "Softmax",
    }  # fmt: skip
    assert set(DERIVATIVES) - written - own_tests == set()
