"""The prediction graph: the network's own logits, plain operators, and which convolution is which layer."""

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.graph.prediction import trace_prediction
from parchgrad.layers import convolutions
from parchgrad.programs import load_program
from scenes.network import scene_net
from tests.parchgrad import networks

REUSED = (networks.ReusedConvolution, networks.ReusedBeforePooling)
ONCE = [network for network in networks.ALL if network not in REUSED]


def logits_of(prediction, images):
    session = onnxruntime.InferenceSession(prediction.model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]


def assert_predicts(prediction, module, images):
    with torch.no_grad():
        expected = module(images.clone()).numpy()
    np.testing.assert_allclose(logits_of(prediction, images), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def assert_layers(prediction, module):
    """Every convolution's node has the layer of its weights."""
    nodes = {node.name: node for node in prediction.model.graph.node if node.op_type in ("Conv", "ConvTranspose")}
    assert set(prediction.layers) == set(nodes)
    channels = convolutions(module)
    stored = {one.name: one.dims for one in prediction.model.graph.initializer}
    for name, layer in prediction.layers.items():
        weight = stored[nodes[name].input[1]]
        (group,) = [a.i for a in nodes[name].attribute if a.name == "group"]
        assert (weight[1] * group if nodes[name].op_type == "ConvTranspose" else weight[0]) == channels[layer]


def kinds(prediction):
    return collections.Counter(node.op_type for node in prediction.model.graph.node)


def shape(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("native", [False, True], ids=["fixed size", "native"])
@pytest.mark.parametrize("network", ONCE, ids=[network.__name__ for network in ONCE])
def test_the_graph_predicts_what_the_network_does(network, native):
    module = networks.build(network, dtype=torch.float32)
    prediction = trace_prediction(module, (12, 12), native)
    onnx.checker.check_model(prediction.model)
    assert_layers(prediction, module)
    for images in (1, 4):
        assert_predicts(prediction, module, networks.batch(images, 12, dtype=torch.float32))
    if native:
        other = torch.randn(3, 3, 17, 22, generator=torch.Generator().manual_seed(0))
        assert_predicts(prediction, module, other)


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "convnext_tiny"])
def test_torchvision_families_become_plain_operators(name):
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None).eval()
    prediction = trace_prediction(module, (64, 64), False)
    assert_predicts(prediction, module, networks.batch(3, 64, dtype=torch.float32))
    assert_layers(prediction, module)
    assert set(prediction.layers.values()) == set(convolutions(module))
    # No size is computed while it runs, and nothing is stored that nobody reads.
    assert not {"Shape", "Expand", "Constant", "Identity", "CastLike", "Gather"} & set(kinds(prediction))
    read = {value for node in prediction.model.graph.node for value in node.input}
    assert {one.name for one in prediction.model.graph.initializer} <= read


@pytest.mark.filterwarnings("default::UserWarning")  # of torch.export.save, about its own format
def test_an_exported_program_is_a_network_too(tmp_path):
    module = networks.build(dtype=torch.float32)
    images = networks.batch(2, 12, dtype=torch.float32)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "program.pt2")
    prediction = trace_prediction(load_program(tmp_path / "program.pt2"), (12, 12), False)
    assert_predicts(prediction, module, networks.batch(3, 12, dtype=torch.float32))
    assert_layers(prediction, module)


def test_batch_norm_stays_apart_from_its_convolution():
    assert kinds(trace_prediction(scene_net(), (64, 64), False))["BatchNormalization"] == 15


class Shifted(networks.Branching):
    """Takes its images apart by colour, as GoogLeNet and Inception do."""

    def forward(self, images):
        return super().forward(torch.cat([images[:, 0:1] * 2, images[:, 1].unsqueeze(1), images[:, 2:]], 1))


def test_slices_that_take_everything_are_gone():
    module = networks.build(Shifted, dtype=torch.float32)
    prediction = trace_prediction(module, (12, 12), False)
    assert_predicts(prediction, module, networks.batch(3, 12, dtype=torch.float32))
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in prediction.model.graph.initializer}
    cut = [node for node in prediction.model.graph.node if node.op_type == "Slice"]
    assert [stored[node.input[3]].tolist() for node in cut] == [[1], [1]]


def test_a_convolution_without_bias_has_none():
    graph = trace_prediction(scene_net(), (64, 64), False).model.graph
    assert {len(node.input) for node in graph.node if node.op_type == "Conv"} == {2}


def test_axes_have_names_and_every_value_a_shape():
    prediction = trace_prediction(scene_net(), (64, 96), True)
    graph = prediction.model.graph
    (images,), (logits,) = graph.input, graph.output
    assert (images.name, shape(images)) == ("images", ["batch", 3, "height", "width"])
    assert (logits.name, shape(logits)) == ("logits", ["batch", 10])
    shapes = {value.name: shape(value) for value in graph.value_info}
    made = {output for node in graph.node for output in node.output if output != "logits"}
    assert set(shapes) == made
    assert shapes["conv2d"] == ["batch", 24, "(((height - 1)//2)) + 1", "(((width - 1)//2)) + 1"]
    fixed = trace_prediction(scene_net(), (64, 96), False).model.graph
    assert shape(fixed.input[0]) == ["batch", 3, 64, 96]


def test_the_dtype_is_the_networks():
    prediction = trace_prediction(networks.build(), (12, 12), False)
    assert prediction.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE


def test_the_network_is_not_touched_and_nothing_is_printed(capfd):
    module = networks.build(networks.Hooked, dtype=torch.float32).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trace_prediction(module, (12, 12), False)
    assert module.training
    assert not module._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_no_path_of_this_machine_is_in_the_graph():
    text = trace_prediction(scene_net(), (64, 64), False).model.SerializeToString()
    assert b"/" + b"home" not in text
    assert b".py" not in text


class Tied(nn.Module):
    """Two layers of one weight on one input."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, bias=False)
        self.two = nn.Conv2d(3, 4, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, images):
        return (torch.relu(self.one(images)) + torch.sigmoid(self.two(images))).mean((2, 3))


def test_layers_that_share_weights_and_input_stay_two():
    prediction = trace_prediction(Tied(), (12, 12), False)
    assert sorted(prediction.layers.values()) == ["one", "two"]


@pytest.mark.parametrize("network", REUSED, ids=[network.__name__ for network in REUSED])
def test_a_convolution_called_twice_is_refused(network):
    with pytest.raises(UnsupportedModelError, match=r"^Module 'right' is called several times"):
        trace_prediction(networks.build(network), (12, 12), False)


class Bare(networks.Branching):
    def forward(self, images):
        return nn.functional.conv2d(super().forward(images)[..., None, None], torch.ones(5, 5, 1, 1)).flatten(1)


def test_a_convolution_that_is_no_module_is_refused():
    with pytest.raises(UnsupportedModelError, match="belongs to no convolution layer"):
        trace_prediction(networks.build(Bare, dtype=torch.float32), (12, 12), False)


class Doubtful(networks.Branching):
    def forward(self, images):
        return super().forward(images) * (2 if images.sum() > 0 else 3)


class OneSize(networks.Branching):
    def forward(self, images):
        return super().forward(images.reshape(2, 3, 12, 12))


@pytest.mark.parametrize("network", [Doubtful, OneSize], ids=["depends on pixels", "fixes the batch"])
def test_what_cannot_be_exported_is_refused_in_one_line(network, capfd):
    with pytest.raises(UnsupportedModelError, match=rf"^Model '{network.__name__}' cannot be exported to ONNX: ") as no:
        trace_prediction(networks.build(network, dtype=torch.float32), (12, 12), False)
    assert "\n" not in str(no.value)
    assert len(str(no.value)) < 500
    assert capfd.readouterr() == ("", "")


class Pair(networks.Branching):
    def forward(self, images):
        logits = super().forward(images)
        return logits, 2 * logits


def test_a_network_of_two_results_is_refused():
    with pytest.raises(UnsupportedModelError, match="gives 2 tensors; expected the logits alone"):
        trace_prediction(networks.build(Pair, dtype=torch.float32), (12, 12), False)


@pytest.mark.parametrize("geometry", [(2, 2, 1, 6, 7), (3, 4, 1, 10, 13), (2, 3, 1, 8, 9), (3, 2, 0, 16, 17)], ids=str)
def test_a_last_window_that_begins_in_the_padding_is_none(geometry):
    """ONNX's shape inference counts it; PyTorch and ONNX Runtime do not."""
    kernel, stride, padding, *size = geometry

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=True)

        def forward(self, images):
            return self.pool(self.conv(images)).flatten(1)

    model = Pooled().eval()
    images = torch.randn(2, 3, *size)
    found = trace_prediction(model, tuple(size), native=False).model
    expected = model(images).detach().numpy()
    (logits,) = found.graph.output
    assert logits.type.tensor_type.shape.dim[1].dim_value == expected.shape[1]
    session = onnxruntime.InferenceSession(found.SerializeToString())
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], expected, atol=1e-5)
