"""Exported programs: the same layers and the same explanation as the network, and nothing in a file ever runs."""

import io
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
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
        assert_close(one, other, 2e-4)  # float32, in another order of sums, through layers where the signal dies away
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


def signature(content):
    return content["graph_module"]["module_call_graph"][0]["signature"]


def tree_of(key, change):
    """The nesting of inputs or outputs, changed below its outermost part where there is one."""

    def apply(content, code):
        version, tree = json.loads(signature(content)[key])
        signature(content)[key] = json.dumps([version, change(tree)])

    return edit(apply)


ENUM = json.dumps({"__enum__": 1, "fqn": "tests.parchgrad.stranger:A", "name": "x"})
# A compiled library with an archive behind it is opened by `ctypes.cdll`; this name is none, and would raise OSError.
LIBRARY = json.dumps({"__enum__": 1, "fqn": "ctypes:cdll", "name": "./net.pt2"})


def keyword_context(context):
    def change(tree):
        tree["children_spec"][1]["context"] = context
        return tree

    return tree_of("in_spec", change)


def tuple_context(context):
    return tree_of("out_spec", lambda tree: {"type": "builtins.tuple", "context": context, "children_spec": [tree]})


def extra_key(tree):
    return {**tree, "more": ENUM}


def wrong_count(tree):
    tree["children_spec"][1]["context"] = '["a"]'
    return tree


TENSOR = {"as_tensor": {"name": "conv2d"}}


def given(name, arg, kind=1):
    return {"name": name, "arg": arg, "kind": kind}


def insert(target, inputs, outputs=(), place=1):
    """A node put into the graph after the first, whose outputs have the shape of the first weight."""

    def apply(content, code):
        values = graph(content)["tensor_values"]
        first = next(iter(values))
        inputs_of_weight = json.loads(json.dumps(inputs).replace("@weight", first))
        for name in outputs:
            values[name] = values[first]
        graph(content)["nodes"].insert(place, {
            "target": target, "inputs": inputs_of_weight, "outputs": [{"as_tensor": {"name": n}} for n in outputs],
            "metadata": {"nn_module_stack": "L__self__,,a.B"}, "is_hop_single_tensor_return": None, "name": "added",
        })  # fmt: skip

    return edit(apply)


WEIGHT = {"as_tensor": {"name": "@weight"}}


def two(*changes):
    def apply(records, trap):
        for change in changes:
            change(records, trap)

    return apply


def first_weight_doubled(place=0):
    return insert("torch.ops.aten.mul_.Tensor", [given("self", WEIGHT), given("other", WEIGHT)], ["added"], place)


def view_written(target, inputs):
    """A view of a weight, or what may be one, and then a write into it."""
    write = insert("torch.ops.aten.relu_.default", [given("self", {"as_tensor": {"name": "view"}})], ["added"], 1)
    return two(insert(target, [given("self", WEIGHT), *inputs], ["view"], 0), write)


def size_text(text):
    return edit(lambda content, code: batch_size_as_code(content, text))


def top(**changes):
    return edit(lambda content, code: content.update(changes))


def random_dropout(train):
    return insert("torch.ops.aten.dropout.default", [
        given("input", WEIGHT), given("p", {"as_float": 0.5}), given("train", {"as_bool": train}),
    ], ["added"], 0)  # fmt: skip


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
    "custom-object": (edit(custom_object), "inputs .*as_custom_obj.* is not of an ATen program"),
    "compiled-library": (library, "holds compiled libraries"),
    "enum-in-keywords": (keyword_context(ENUM), "its in_spec holds more than tuples, lists and dicts"),
    "library-in-keywords": (keyword_context(LIBRARY), "its in_spec holds more than tuples, lists and dicts"),
    "enum-among-keywords": (keyword_context(f"[{ENUM}]"), "its in_spec holds more than tuples, lists and dicts"),
    "enum-in-tuple": (tuple_context(ENUM), "its out_spec holds more than tuples, lists and dicts"),
    "keywords-without-children": (tree_of("in_spec", wrong_count), "its in_spec holds more than"),
    "tree-of-more-keys": (tree_of("out_spec", extra_key), "its out_spec holds more than"),
    "size-calls": (size_text("Max(Symbol('s77'), exec('1'))"), "expr_str .* is not of an ATen program"),
    "size-has-attributes": (size_text("Integer(1).__class__"), "expr_str .* is not of an ATen program"),
    "size-of-many-digits": (size_text("Integer(" + "9" * 30 + ")"), "expr_str .* is not of an ATen program"),
    "size-names-a-variable": (size_text("Max(True, False)"), "expr_str .* is not of an ATen program"),
    "size-without-end": (size_text("1" * 60 + "!"), "expr_str .* is not of an ATen program"),
    "size-too-long": (size_text("Integer(1)" + " " * 1000), "expr_str .* is not of an ATen program"),
    "symbols-to-count": (top(range_constraints={"u999999999999": {"min_val": 0, "max_val": 1}}), "name 'u9999"),
    "module-is-class": (edit(lambda content, code: content["graph_module"]["module_call_graph"].append(
        {"fqn": "a.__class__", "signature": None})), "fqn 'a.__class__' is not"),
    "writes-a-file": (insert("torch.ops.aten.save.default", [
        given("item", TENSOR), given("filename", {"as_string": "stolen.txt"})]), "target 'torch.ops.aten.save|does or"),
    "seeds": (insert("torch.ops.aten.manual_seed.default", [given("seed", {"as_int": 7})]),
              "'torch.ops.aten.manual_seed.default' does or gives something other than tensors"),
    "switches-gradients": (insert("torch.ops.aten.set_grad_enabled.default", [given("val", {"as_bool": False})]),
                           "'torch.ops.aten.set_grad_enabled.default' does or gives something other than tensors"),
    "prints": (insert("torch.ops.aten._print.default", [given("s", {"as_string": "hello"})]), "target .*_print"),
    "writes-a-weight": (first_weight_doubled(), "'torch.ops.aten.mul_.Tensor' writes into its own weights"),
    "writes-a-view": (view_written("torch.ops.aten.alias.default", []), "relu_.default' writes into its own weights"),
    "writes-what-may-be-a-view": (view_written("torch.ops.aten.type_as.default", [given("other", WEIGHT)]),
                                  "relu_.default' writes into its own weights"),
    "draws": (insert("torch.ops.aten.rand_like.default", [given("self", WEIGHT)], ["added"], 0),
              "'torch.ops.aten.rand_like.default' answers otherwise each time"),
    "drops-out": (random_dropout(True), r"training mode \(added\); call model.eval\(\)"),
    "memory-as-found": (insert("torch.ops.aten.empty_like.default", [given("self", WEIGHT)], ["added"], 0),
                        "target 'torch.ops.aten.empty_like.default' is not"),
    "arguments-shifted": (insert("torch.ops.aten.instance_norm.default", [
        given("input", WEIGHT), given("running_var", WEIGHT)], ["added"], 0), "the arguments of .*instance_norm"),
    "gathers": (insert("torch.ops.aten.instance_norm.default", [
        given("input", WEIGHT), given("weight", {"as_none": True}), given("bias", {"as_none": True}),
        given("running_mean", WEIGHT), given("running_var", WEIGHT), given("use_input_stats", {"as_bool": True}),
        given("momentum", {"as_float": 0.1}), given("eps", {"as_float": 0.1}),
        given("cudnn_enabled", {"as_bool": False})], ["added"], 0), "training mode"),
    "operator-unknown": (first_target("torch.ops.aten.conv_of_tomorrow.default"),
                         "its operator 'torch.ops.aten.conv_of_tomorrow.default' is not one of PyTorch"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMFUL.values(), ids=HARMFUL.keys())
def test_a_program_that_could_run_code_is_refused_and_does_not_run(saved, tmp_path, case):
    change, message = case
    trap = tmp_path / "ran"
    path = rewritten(saved[1], tmp_path / "bad.pt2", lambda records: change(records, trap))
    with pytest.raises(ModelError, match=message):
        load_program(path)
    assert not trap.exists()
    assert "tests.parchgrad.stranger" not in sys.modules


def test_the_module_that_a_tree_would_import_is_a_real_one(saved, tmp_path):
    """torch imports it: in a process of its own, where the copy is not made."""
    (tmp_path / "stranger.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    change = keyword_context(ENUM.replace("tests.parchgrad.stranger", "stranger"))
    path = rewritten(saved[1], tmp_path / "bad.pt2", lambda records: change(records, tmp_path / "trap"))
    code = "import sys, torch; sys.path.insert(0, '.'); torch.export.load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, path.name], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(ModelError, match="its in_spec holds more"):
        load_program(path)
    assert not (tmp_path / "ran").exists()


def test_a_program_behind_a_compiled_library_is_its_program_alone(saved, tmp_path):
    """A file may be a library and an archive at once: the package holds the archive, written anew."""
    path = tmp_path / "both.pt2"
    path.write_bytes(b"\x7fELF" + bytes(100) + saved[1].read_bytes())
    folder = added(tmp_path / "models", path)
    assert (folder / "program.pt2").read_bytes()[:4] == b"PK\x03\x04"


def keyed(content, code):
    """Things beside what torch knows, and parts of which explaining needs nothing."""
    content["evil"] = code
    content["graph_module"]["metadata"] = {"custom": code}
    content["graph_module"]["treespec_namedtuple_fields"] = {code: {"field_names": [code]}}
    for node in graph(content)["nodes"]:
        node["metadata"].update(source_fn_stack=f"a,{code}", torch_fn=code, custom=code, from_node=code)
        node["evil"] = code
    for call in content["graph_module"]["module_call_graph"][1:]:
        call["signature"] = {"inputs": [], "outputs": [], "in_spec": code, "out_spec": code}


def test_parts_that_are_not_needed_are_left_out(saved, tmp_path):
    path = rewritten(saved[1], tmp_path / "net.pt2", lambda records: edit(keyed)(records, tmp_path / "trap"))
    assert b"evil" not in (content := reduce_program(path))
    assert b"__import__" not in content
    images = torch.randn(2, 3, 12, 12)
    assert_close(load_program(path)(images), saved[0](images), 1e-6)


class WritesItsInput(networks.Branching):
    def forward(self, images):
        return super().forward(images.mul_(1.5))


def test_answers_do_not_depend_on_how_often_a_program_ran(tmp_path):
    """Nor does what it is given change."""
    network = networks.build(WritesItsInput, dtype=torch.float32)
    program = load_program(export(network, tmp_path / "net.pt2")).requires_grad_(False)
    images = torch.randn(2, 3, 12, 12)
    before = images.clone()
    with torch.inference_mode():
        answers = [program(images) for _ in range(3)]
    assert torch.equal(images, before)
    assert torch.equal(answers[0], answers[2])
    assert_close(answers[0], network(before.clone()), 1e-6)


def copied(path, out, records=None, **options):
    """The archive at `path` written by `zipfile`, with further records."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", **options) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        for name, content in (records or {}).items():
            target.writestr(name, content)
    return out


def patched(path, offset, new):
    """With bytes of the last entry of the archive's directory changed."""
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x01\x02") + offset
    data[place : place + len(new)] = new
    path.write_bytes(data)
    return path


ARCHIVES = {
    "compressed": lambda path, out: copied(path, out, compression=zipfile.ZIP_DEFLATED),
    "bomb": lambda path, out: copied(
        path, out, {"net/data/weights/weight_999": b"\0" * 10**7}, compression=zipfile.ZIP_DEFLATED
    ),
    "method": lambda path, out: patched(copied(path, out), 10, b"\x4d\0"),
    "encrypted": lambda path, out: patched(copied(path, out), 8, b"\1"),
    "its-records-are-larger-than-the-file": lambda path, out: patched(copied(path, out), 20, b"\xff\xff\xff\x7f" * 2),
    "cut": lambda path, out: out.write_bytes(path.read_bytes()[:-3000]),
}


@pytest.mark.parametrize("make", ARCHIVES.values(), ids=ARCHIVES.keys())
def test_an_archive_that_torch_does_not_write_is_refused(saved, tmp_path, make):
    path = tmp_path / "bad.pt2"
    make(saved[1], path)
    with pytest.raises(ModelError, match=r"Program 'bad.pt2' cannot be read: .*") as caught:
        reduce_program(path)
    if make is ARCHIVES["its-records-are-larger-than-the-file"]:
        assert "its records are larger than the file" in str(caught.value), "before any is read"


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_record_that_is_there_twice_is_refused(saved, tmp_path):
    with zipfile.ZipFile(saved[1]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
    path = copied(saved[1], tmp_path / "bad.pt2", {name: b"{}"})
    with pytest.raises(ModelError, match="compressed, encrypted or repeated records"):
        reduce_program(path)


def test_only_tensors_that_are_named_are_kept(saved, tmp_path):
    path = rewritten(saved[1], tmp_path / "net.pt2", lambda records: records.update({
        "data/weights/weight_999": b"a stowaway", "data/constants/tensor_999": b"another"}))  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(reduce_program(path))) as archive:
        assert not [name for name in archive.namelist() if "999" in name]


def test_a_tensor_without_values_is_refused(saved, tmp_path):
    """Torch would make one of its size, however large."""

    def drop(records, trap):
        records["data/weights/weight_0"] = b""

    path = rewritten(saved[1], tmp_path / "bad.pt2", lambda records: drop(records, None))
    with pytest.raises(ModelError, match=r"'left.weight' has no values|has no values"):
        reduce_program(path)


def test_what_torch_logs_is_in_the_error(saved, tmp_path, caplog, capfd):
    """A tensor of the graph that no node gives: torch finds out, and logs a page about it."""

    def change(content, code):
        graph(content)["nodes"][1]["inputs"][0]["arg"] = {"as_tensor": {"name": "nowhere"}}

    path = rewritten(saved[1], tmp_path / "bad.pt2", lambda records: edit(change)(records, tmp_path))
    with caplog.at_level(logging.DEBUG), pytest.raises(ModelError, match=r"cannot be read: .*nowhere") as caught:
        load_program(path)
    assert "warnings above" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_adding_reads_the_users_file_once(saved, tmp_path, monkeypatch):
    """What is checked, what is loaded and what is kept are the same bytes."""
    from parchgrad import models, programs

    read, original = [], programs.reduce_program

    def counted(path):
        read.append(os.path.basename(path))
        return original(path)

    for module in (models, programs):
        monkeypatch.setattr(module, "reduce_program", counted)
    added(tmp_path / "models", shutil.copy(saved[1], tmp_path / "mine.pt2"))
    assert read == ["mine.pt2", "program.pt2"]


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
