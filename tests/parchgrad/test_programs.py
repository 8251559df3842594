"""Exported programs: the same layers and the same explanation as the network, and nothing in a file ever runs."""

import io
import json
import math
import os
import pickle
import zipfile

import pytest
import torch
import yaml
from torch import nn
from torch.export import Dim
from torch.export.pt2_archive import PT2ArchiveWriter

from parchgrad.architectures import build_network
from parchgrad.errors import ModelError, UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.layers import convolutions
from parchgrad.models import add_model, load_model
from parchgrad.programs import load_program, reduce_program
from parchgrad.tables import SelectionTable
from tests.oracles.tolerance import assert_close
from tests.parchgrad import networks

# torch's own, on its way through a program.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

LABELS = ["cat", "dog", "tree", "bus", "sun"]


ANY_BATCH = ({0: Dim("batch")},)


def export(network, path, size=12, *, batch=2, dynamic=ANY_BATCH):
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small network and the file it was exported to."""
    network = networks.build(networks.Branching, dtype=torch.float32)
    return network, export(network, tmp_path_factory.mktemp("exported") / "net.pt2")


def added(root, path, **changes):
    given = {"weights": path, "labels": LABELS, "preprocessing": {"resize": 14}, "models_dir": root}
    return add_model("net", **{**given, **changes})


def of_eager(network, images):
    """The convolutions that run, and a table over them: auxiliary heads are no part of a program."""
    ran = []
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in convolutions(network)
    ]
    with torch.no_grad():
        classes = network(images.clone()).shape[1]
    for hook in hooks:
        hook.remove()
    idle = [name for name in convolutions(network) if name not in ran]
    return ran, SelectionTable.random(network, classes, 0, idle_layers=idle)


def assert_same_explanation(network, program, size):
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    ran, table = of_eager(network, images)
    assert convolutions(program) == {name: channels for name, channels in convolutions(network).items() if name in ran}
    settings = {
        "quantile": 0.3, "gamma": [math.inf, 2.0, math.inf], "conserve": ["independent", "exact", "none"],
        "method": ["gradient", "integrated_gradients", "smoothgrad"], "steps": 3, "samples": 3,
    }  # fmt: skip
    expected = Explainer(network, table).explain(images, [0, 1, 2], **settings)
    exported_table = SelectionTable.random(program, expected.logits.shape[1], 0)
    found = Explainer(program, exported_table).explain(images, [0, 1, 2], **settings)
    assert_close(found.logits, expected.logits, 1e-6)
    for one, other in zip(found.attributions, expected.attributions, strict=True):
        assert float(other.abs().max()) > 0
        assert_close(one, other, 1e-6)
    assert found.layers_used.tolist() == expected.layers_used.tolist()
    assert found.identity_layers.tolist() == expected.identity_layers.tolist()


@pytest.mark.parametrize("network", [n for n in networks.ALL if n is not networks.Hooked], ids=lambda n: n.__name__)
def test_every_kind_of_network_is_explained_as_before_it_was_exported(network, tmp_path):
    """Branches, in-place and reused parts, transposed and parametrised convolutions."""
    eager = networks.build(network, dtype=torch.float32)
    assert_same_explanation(eager, load_program(export(eager, tmp_path / "net.pt2")), 12)


@pytest.mark.parametrize(("name", "size"), [("shufflenet_v2_x0_5", 33), ("mobilenet_v3_small", 33)])
def test_torchvision_networks_are_explained_as_before_they_were_exported(name, size, tmp_path):
    torch.manual_seed(0)
    eager = build_network(name, 4).eval()
    assert_same_explanation(eager, load_program(export(eager, tmp_path / "net.pt2", size)), size)


def test_the_package_of_a_program_explains_as_the_package_of_the_network(saved, tmp_path):
    """From `add_model` to the map: same layers, same explanation."""
    network, path = saved
    folder = added(tmp_path, path)
    assert sorted(p.name for p in folder.iterdir()) == ["labels.txt", "model.yaml", "program.pt2"]
    model = load_model(folder)
    assert (model.architecture, model.weights_source) == ("program", "file net.pt2")
    assert model.preprocessing.size == (12, 12), "the size it was exported for"
    images = torch.randn(2, 3, 12, 12)
    eager = SelectionTable.random(network, 5, 0)
    expected = Explainer(network, eager).explain(images, [1, 4], quantile=0.3)
    found = Explainer(model, SelectionTable.random(model, 5, 0)).explain(images, ["dog", "sun"], quantile=0.3)
    assert_close(found.attributions, expected.attributions, 1e-6)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_packages_program_is_checked_like_weights(saved, tmp_path):
    folder = added(tmp_path, saved[1])
    data = bytearray((folder / "program.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "program.pt2").write_bytes(data)
    with pytest.raises(ModelError, match=r"program.pt2 has sha256 \w{64}, model.yaml says"):
        load_model(folder)


def test_sample_inputs_do_not_travel_with_the_package(saved, tmp_path):
    """They may be someone's photographs, and they are a pickle."""
    folder = added(tmp_path, saved[1])
    for path, expected in ((saved[1], True), (folder / "program.pt2", False)):
        with zipfile.ZipFile(path) as archive:
            samples = [archive.read(name) for name in archive.namelist() if "sample_inputs" in name]
        assert any(samples) is expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": None}, "an exported program comes without labels"),
    ({"labels": LABELS[:4]}, r"answers one image with \(1, 5\), expected logits of shape \(1, 4\)"),
    ({"arguments": {"width": 3}}, "takes neither arguments nor the name of weights"),
    ({"pretrained": "IMAGENET1K_V1"}, "takes neither arguments nor the name of weights"),
    ({"architecture": "resnet18"}, "'net.pt2' is an exported program; its architecture is 'program'"),
    ({"preprocessing": {"size": (16, 16)}}, "was exported for images of 12 x 12 pixels, got 16 x 16"),
    ({"architecture": "program", "weights": None}, "give its .pt2 as weights"),
])  # fmt: skip
def test_what_does_not_fit_a_program_is_refused(saved, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        added(tmp_path, saved[1], **changes)
    assert not list(tmp_path.rglob("*.*"))


def test_a_program_for_one_batch_size_is_refused(tmp_path):
    network = networks.build(networks.Branching, dtype=torch.float32)
    path = export(network, tmp_path / "net.pt2", batch=1, dynamic=None)
    with pytest.raises(UnsupportedModelError, match=r"exported for batches of 1; export it for any: .*Dim\('batch'\)"):
        load_program(path)


def test_a_program_exported_in_training_mode_is_refused(tmp_path):
    network = networks.build(networks.Branching, dtype=torch.float32).train()
    with pytest.raises(UnsupportedModelError, match=r"training mode \(batch_norm.*\); call model.eval\(\)"):
        load_program(export(network, tmp_path / "net.pt2"))


def test_a_hook_exported_into_a_convolution_is_refused_by_name(tmp_path):
    """The convolution's own output is no longer a module's."""
    network = networks.build(networks.Hooked, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="Convolution 'right' of the program gives more than its own"):
        load_program(export(network, tmp_path / "net.pt2"))


def test_a_program_of_any_size_keeps_to_its_bounds(tmp_path):
    network = networks.build(networks.Branching, dtype=torch.float32)
    sides = {0: Dim("batch"), 2: Dim("height", min=8, max=40), 3: Dim("width", min=8, max=40)}
    program = load_program(export(network, tmp_path / "net.pt2", dynamic=(sides,))).eval()
    images = torch.randn(2, 3, 20, 31)
    assert_close(program(images), network(images), 1e-6)
    assert program.sides.only is None
    with pytest.raises(UnsupportedModelError, match=r"exported for images of 8\.\.40 x 8\.\.40 pixels, got 12 x 41"):
        program(torch.randn(1, 3, 12, 41))


class TwoInputs(networks.Branching):
    def forward(self, images, scale):
        return super().forward(images * scale)


def test_a_program_of_two_inputs_is_refused(tmp_path):
    network = networks.build(TwoInputs, dtype=torch.float32)
    given, batch = (torch.randn(2, 3, 12, 12), torch.ones(2, 1, 1, 1)), Dim("batch")
    torch.export.save(
        torch.export.export(network, given, dynamic_shapes=({0: batch}, {0: batch})), tmp_path / "net.pt2"
    )
    with pytest.raises(UnsupportedModelError, match="takes 2 inputs, expected images alone"):
        load_program(tmp_path / "net.pt2")


class WithoutGradient(networks.Branching):
    def forward(self, images):
        with torch.no_grad():
            images = images * 2.0
        return super().forward(images)


def test_a_program_that_switches_gradients_is_refused(tmp_path):
    network = networks.build(WithoutGradient, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="switches gradients or autocast, or branches, inside"):
        load_program(export(network, tmp_path / "net.pt2"))


# --- files made to harm ---------------------------------------------------------------------------------------------


class Opens:
    """A pickle that makes a folder when read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rewritten(path, out, change):
    """The archive at `path` with its records, by name, changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    change(records)
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in records.items():
            if name not in (".data/version", "byteorder", ".data/serialization_id"):
                writer.write_bytes(name, content)
    out.write_bytes(buffer.getvalue())
    return out


def edit(change, record="models/model.json"):
    def apply(records, trap):
        content = json.loads(records[record])
        change(content, f"__import__('pathlib').Path({str(trap)!r}).touch()")
        records[record] = json.dumps(content).encode()

    return apply


def graph(content):
    return content["graph_module"]["graph"]


def rename_input(content, code):
    """The input's name becomes part of a Python function's head."""
    named = f"x=({code})"
    text = json.dumps(content).replace('"name": "images"', f'"name": {json.dumps(named)}')
    content.clear()
    content.update(json.loads(text.replace('"images": {', f"{json.dumps(named)}: {{")))


def batch_size_as_code(content, code):
    text = json.dumps(content)
    found = next(v for v in find(content, "expr_str"))
    content.clear()
    content.update(json.loads(text.replace(json.dumps(found), json.dumps(code))))


def find(value, key):
    if isinstance(value, dict):
        for name, child in value.items():
            if name == key:
                yield child
            yield from find(child, key)
    elif isinstance(value, list):
        for child in value:
            yield from find(child, key)


def first_target(target):
    return edit(lambda content, code: graph(content)["nodes"][0].update(target=target))


def other_tree(content, code):
    signature = content["graph_module"]["module_call_graph"][0]["signature"]
    signature["out_spec"] = signature["out_spec"].replace('"type": null', '"type": "collections.defaultdict"')


def pickled_weight(content, code):
    next(iter(content["config"].values()))["use_pickle"] = True


def custom_object(content, code):
    graph(content)["inputs"].append({"as_custom_obj": {"name": "x", "class_fqn": "a.b"}})


def library(records, trap):
    records["data/aotinductor/model/x.so"] = b"\x7fELF"


WEIGHTS = "data/weights/model_weights_config.json"
HARMFUL = {
    "size-is-code": (edit(batch_size_as_code), r"expr_str .*__import__.* is not of an ATen program"),
    "name-is-code": (edit(rename_input), r"name .*__import__.* is not of an ATen program"),
    "target-is-os": (first_target("torch.serialization.os.system"), "target 'torch.serialization.os.system' is not"),
    "target-opens-a-file": (first_target("torch.ops.aten.from_file.default"), "target 'torch.ops.aten.from_file"),
    "target-is-private": (first_target("torch.ops.aten.__init__.__globals__"), "target 'torch.ops.aten.__init__"),
    "target-calls": (first_target("_operator.methodcaller"), "target '_operator.methodcaller' is not"),
    "tree-imports": (edit(other_tree), "out_spec holds more than tuples, lists and dicts"),
    "pickled-weight": (edit(pickled_weight, WEIGHTS), "is stored as a pickle, which may run code"),
    "custom-object": (edit(custom_object), "not one that this PyTorch writes .*custom object"),
    "compiled-library": (library, "holds compiled libraries"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMFUL.values(), ids=HARMFUL.keys())
def test_a_program_that_could_run_code_is_refused_and_does_not_run(saved, tmp_path, case):
    change, message = case
    trap = tmp_path / "ran"
    path = rewritten(saved[1], tmp_path / "bad.pt2", lambda records: change(records, trap))
    with pytest.raises(ModelError, match=message):
        load_program(path)
    assert not trap.exists()


def test_pickled_sample_inputs_and_guards_are_left_out_unread(saved, tmp_path):
    """What harms in these records is not met: the rest of the program loads and works."""
    trap = tmp_path / "ran"

    def arm(records):
        records["data/sample_inputs/model.pt"] = pickle.dumps(Opens(trap))
        edit(lambda content, code: content.update(guards_code=[code]))(records, trap)

    path = rewritten(saved[1], tmp_path / "armed.pt2", arm)
    images = torch.randn(2, 3, 12, 12)
    assert_close(load_program(path)(images), saved[0](images), 1e-6)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Opens(trap)))
    assert trap.exists(), "the trap is a real one"


def test_what_is_written_is_what_was_checked(saved, tmp_path):
    """Reducing what is reduced changes nothing but the archive's own id."""
    once = tmp_path / "once.pt2"
    once.write_bytes(reduce_program(saved[1]))
    twice = tmp_path / "twice.pt2"
    twice.write_bytes(reduce_program(once))

    def records(path):
        with zipfile.ZipFile(path) as archive:
            return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}

    assert records(once) == records(twice)


@pytest.mark.parametrize("content", [b"", b"hello", "zip", "torch"], ids=["empty", "text", "other-zip", "state-dict"])
def test_a_file_that_is_no_program_is_refused_by_name(tmp_path, content):
    path = tmp_path / "odd.pt2"
    if content == "torch":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", "c")
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"Program 'odd.pt2'"):
        added(tmp_path / "models", path)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    network = networks.build(networks.Branching, dtype=torch.float32)
    with torch.no_grad():
        network.left.weight[0] = math.nan
    with pytest.raises(ModelError, match=r"tensor 'left.weight' holds NaN"):
        added(tmp_path / "models", export(network, tmp_path / "net.pt2"))


def test_a_program_package_whose_file_is_swapped_for_a_harmful_one_is_refused(saved, tmp_path):
    """With the right digest too: each load checks the program again."""
    import hashlib

    folder = added(tmp_path / "models", saved[1])
    trap = tmp_path / "ran"
    change, message = HARMFUL["size-is-code"]
    rewritten(saved[1], folder / "program.pt2", lambda records: change(records, trap))
    manifest = yaml.safe_load((folder / "model.yaml").read_text())
    manifest["weights"]["sha256"] = hashlib.sha256((folder / "program.pt2").read_bytes()).hexdigest()
    (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(ModelError, match=message):
        load_model(folder)
    assert not trap.exists()
