"""Exports: the gate before them, what is in the files, what Triton and OpenVINO read of them, the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from google.protobuf import text_format
from onnx import TensorProto, helper
from PIL import Image
from torch import nn
from tritonclient.grpc import model_config_pb2

import parchgrad
from parchgrad import golden
from parchgrad.cli import cli
from parchgrad.errors import ExportError
from parchgrad.explainer import Explainer
from parchgrad.export import export_onnx, export_openvino, export_triton, parity, write
from parchgrad.export.engines import Engine, onnx_runtime, openvino_cpu
from parchgrad.models import add_model, build_network, load_model
from parchgrad.runtimes.onnx_metadata import METADATA_KEY, read_metadata
from parchgrad.tables import SelectionTable, load_table

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FACTORY = "tests.parchgrad.factories:small"
CLASSES = 5
INPUT = {"size": (24, 20), "rule": "stretch"}


def package(root, rule="stretch"):
    """A small model with BatchNorm statistics of its own, and a table for all its classes but the last."""
    torch.manual_seed(0)
    network = build_network(FACTORY, CLASSES, {})
    network.norm.running_mean.normal_(0.0, 0.3)
    network.norm.running_var.uniform_(0.5, 2.0)
    labels = [f"klass {number}, früher {number}" for number in range(CLASSES)]
    add_model("tiny", architecture=FACTORY, weights=network.state_dict(), labels=labels,
              preprocessing={**INPUT, "rule": rule}, models_dir=root / "models")  # fmt: skip
    model = load_model(root / "models/tiny")
    SelectionTable.random(model, CLASSES - 1, 0).save(root / "tables/tiny/1")
    return model, load_table(root / "tables/tiny", model)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    return root, *package(root)


@pytest.fixture(scope="module")
def entry(project, tmp_path_factory):
    """A Triton repository's entry, and what the export said."""
    _, model, table = project
    repository = tmp_path_factory.mktemp("repository")
    return repository / "tiny", export_triton(model, table, repository, max_batch_size=4, threads=3)


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoilt(make, change):
    """`explanation_graph` whose graph has been changed."""

    def made(*arguments, **options):
        graph = make(*arguments, **options)
        change(graph.graph)
        return graph

    return made


def scaled_attributions(graph, by=1.01):
    graph.initializer.append(helper.make_tensor("too_much", TensorProto.FLOAT, [], [by]))
    for node in graph.node:
        node.output[:] = ["right" if name == "attributions" else name for name in node.output]
    graph.node.append(helper.make_node("Mul", ["right", "too_much"], ["attributions"]))


def shifted_logits(graph):
    (head,) = [one for one in graph.initializer if one.name == "head.bias"]
    values = onnx.numpy_helper.to_array(head) + np.float32([0.01, 0, 0, 0, 0])
    head.CopyFrom(onnx.numpy_helper.from_array(values, head.name))


def never_covered(graph):
    for node in graph.node:
        node.output[:] = ["truly" if name == "covered" else name for name in node.output]
    graph.node.append(helper.make_node("Not", ["truly"], ["covered"]))


# --- the files ------------------------------------------------------------------------------------------------


def test_a_repository_entry_has_all_its_files_and_no_scraps(entry):
    folder, exported = entry
    assert sorted(tree(folder)) == [
        "1/golden.safetensors", "1/model.onnx", "1/parity.json", "config.pbtxt", "labels.txt"
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert exported.path == folder / "1/model.onnx"
    assert json.loads((folder / "1/parity.json").read_text()) == exported.report


def test_labels_are_a_line_each(entry, project):
    assert (entry[0] / "labels.txt").read_text(encoding="utf-8").splitlines() == list(project[1].labels)


def test_the_card_says_all_that_a_runtime_needs(entry, project):
    _, model, table = project
    graph = onnx.load(entry[0] / "1/model.onnx")
    assert (graph.producer_name, graph.producer_version) == ("parchgrad", parchgrad.__version__)
    assert "selection table 'random' of 4 classes" in graph.doc_string
    assert all(value.doc_string for value in (*graph.graph.input, *graph.graph.output))
    props = {prop.key: prop.value for prop in graph.metadata_props}
    assert list(props) == [METADATA_KEY]
    card = json.loads(props[METADATA_KEY])
    assert card["model"]["weights_sha256"] == model.weights_sha256
    assert card["table"]["table_sha256"] == table.table_sha256
    assert "labels" not in card["table"]
    assert card["graph"] == {
        "backward": "pruned", "conserve": "independent", "seed": "logit", "dtype": "float32",
        "opset": graph.opset_import[0].version, "layers": ["first", "second"],
    }  # fmt: skip
    read = read_metadata(props[METADATA_KEY], "model.onnx")
    assert read.model.preprocessing == model.preprocessing
    assert read.model.labels == model.labels
    assert read.table.defaults == table.defaults


def test_the_golden_record_is_the_pytorch_engines(entry, project):
    _, model, table = project
    record = golden.read(entry[0] / "1/golden.safetensors")
    assert record.image.shape == (1, 3, 24, 20)
    assert record.digests == {"weights_sha256": model.weights_sha256, "table_sha256": table.table_sha256}
    with_dtypes = onnxruntime.InferenceSession(entry[0] / "1/model.onnx")
    explained = Explainer(model, table).explain(torch.from_numpy(record.image), record.target)
    record.compare(explained.logits.numpy(), explained.saliency().numpy())
    inputs = parity.graph_inputs(record.image, [record.target], explained.options, table)
    logits, saliency = with_dtypes.run(["logits", "saliency"], inputs)
    record.compare(logits, saliency)


def test_one_file_with_its_report_beside_it(project, tmp_path):
    _, model, table = project
    exported = export_onnx(model, table, tmp_path / "tiny.onnx", backward="dense", conserve="exact")
    assert sorted(tree(tmp_path)) == ["tiny.golden.safetensors", "tiny.onnx", "tiny.parity.json"]
    card = json.loads(onnx.load(exported.path).metadata_props[0].value)
    assert (card["graph"]["backward"], card["graph"]["conserve"]) == ("dense", "exact")


def test_one_file_proves_itself(project, tmp_path):
    _, model, table = project
    exported = export_onnx(model, table, tmp_path / "tiny.onnx")
    parchgrad.OnnxExplainer(exported.path).self_test()


def test_a_file_is_replaced_only_when_told_and_only_an_export(project, tmp_path):
    _, model, table = project
    path = tmp_path / "tiny.onnx"
    path.write_text("somebody's")
    for force, said in ((False, "exists already; --force replaces it"), (True, "is no exported graph")):
        with pytest.raises(ExportError, match=said):
            export_onnx(model, table, path, force=force)
    assert path.read_text() == "somebody's"
    path.unlink()
    export_onnx(model, table, path, external_data=True)
    with pytest.raises(ExportError, match=r"tiny\.onnx' exists already"):
        export_onnx(model, table, path)
    export_onnx(model, table, path, force=True)
    assert sorted(tree(tmp_path)) == ["tiny.golden.safetensors", "tiny.onnx", "tiny.parity.json"]


def test_what_a_killed_export_left_goes_with_the_next(project, tmp_path):
    _, model, table = project
    scrap = tmp_path / ".tiny.onnx.killed.new"
    scrap.mkdir()
    export_onnx(model, table, tmp_path / "tiny.onnx")
    assert not scrap.exists()


def test_weights_in_a_file_of_their_own(project, tmp_path):
    _, model, table = project
    exported = export_onnx(model, table, tmp_path / "tiny.onnx", external_data=True)
    assert sorted(tree(tmp_path)) == ["tiny.golden.safetensors", "tiny.onnx", "tiny.onnx.data", "tiny.parity.json"]
    assert exported.report["checks"] == 12
    onnxruntime.InferenceSession(exported.path)


def test_what_is_too_large_for_one_file_is_refused(project, tmp_path, monkeypatch):
    _, model, table = project
    monkeypatch.setattr(write, "LARGEST_FILE", 1000)
    with pytest.raises(ExportError, match="an ONNX file holds 2 GB; give external_data"):
        export_onnx(model, table, tmp_path / "tiny.onnx")
    assert not tree(tmp_path)


# --- Triton ---------------------------------------------------------------------------------------------------

TRITON_TYPES = {"TYPE_FP32": TensorProto.FLOAT, "TYPE_INT64": TensorProto.INT64, "TYPE_BOOL": TensorProto.BOOL}


def triton_shape(tensor):
    """The shape that the graph gets or gives, batch axis first: `reshape` counts where there is one."""
    return ["batch", *(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)]


@pytest.fixture(scope="module")
def config(entry):
    return text_format.Parse((entry[0] / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_triton_reads_the_configuration(config):
    assert (config.name, config.backend, config.platform) == ("tiny", "onnxruntime", "onnxruntime_onnx")
    assert config.default_model_filename == "model.onnx"
    assert config.max_batch_size == 4
    assert config.HasField("dynamic_batching")
    assert config.version_policy.latest.num_versions == 1
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert {output.name for output in config.output if output.label_filename == "labels.txt"} == {
        "logits", "probabilities"
    }  # fmt: skip


@pytest.mark.parametrize("side", ["input", "output"])
def test_every_tensor_is_the_graphs(config, entry, side):
    graph = onnx.load(entry[0] / "1/model.onnx").graph
    described = {tensor.name: tensor for tensor in getattr(config, side)}
    assert [value.name for value in getattr(graph, side)] == list(described)
    for value in getattr(graph, side):
        tensor = described[value.name]
        assert TRITON_TYPES[model_config_pb2.DataType.Name(tensor.data_type)] == value.type.tensor_type.elem_type
        assert len(tensor.dims) > 0, "Triton refuses tensors without dimensions"
        sides = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim[1:]]
        assert triton_shape(tensor) == ["batch", *sides]


def test_what_is_there_is_replaced_only_when_told(project, entry, tmp_path):
    _, model, table = project
    export_triton(model, table, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="exists already; --force replaces it"):
        export_triton(model, table, tmp_path)
    (tmp_path / "tiny/config.pbtxt").write_text('name: "mine"\n')
    with pytest.raises(ExportError, match=r"config\.pbtxt' is there already and is another"):
        export_triton(replace(model, version="2"), table, tmp_path)
    assert tree(tmp_path) == {**before, "tiny/config.pbtxt": b'name: "mine"\n'}
    export_triton(model, table, tmp_path, force=True)
    assert tree(tmp_path)["tiny/config.pbtxt"] == before["tiny/config.pbtxt"]


def test_what_is_no_export_is_never_replaced(project):
    root, model, table = project
    before = tree(root)
    for export in (export_triton, export_openvino):
        with pytest.raises(ExportError, match="is no exported graph, which --force would replace"):
            export(model, table, root / "models", force=True)
    assert tree(root) == before


def test_a_second_version_joins_the_first(project, tmp_path):
    _, model, table = project
    export_triton(model, table, tmp_path)
    export_triton(replace(model, version="2"), table, tmp_path)
    assert {"tiny/1/model.onnx", "tiny/2/model.onnx"} < set(tree(tmp_path))


# --- the gate -------------------------------------------------------------------------------------------------


def test_the_report_has_every_check_of_mixed_batches(entry):
    report = entry[1].report
    assert (report["checks"], report["same"], report["ties"]) == (12, 12, 0)
    assert report["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    items = report["items"]
    assert [item["batch"] for item in items] == [1, 3, 3, 3, *[8] * 8]
    assert len({json.dumps(item["options"]) for item in items}) == 8
    assert len({item["target"] for item in items}) > 3
    assert items[0]["image"] == "golden pattern"
    assert 0 < report["largest_map_error"] < 1e-5
    assert set(items[0]["float32_map_errors"]) == {"dense", "pruned"}
    # Plain JSON: no NaN, no infinity.
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled_attributions, "its saliency is not the mean magnitude of its attributions"),
        (shifted_logits, "its logits are off by"),
        (never_covered, "its covered is"),
    ],
    ids=["attributions", "logits", "covered"],
)
def test_a_graph_that_is_off_is_not_written(project, tmp_path, monkeypatch, change, said):
    _, model, table = project
    export_triton(model, table, tmp_path / "before")
    before = tree(tmp_path)
    monkeypatch.setattr(write, "explanation_graph", spoilt(write.explanation_graph, change))
    for export in (
        lambda: export_triton(model, table, tmp_path / "before", force=True),
        lambda: export_triton(model, table, tmp_path / "new"),
        lambda: export_onnx(model, table, tmp_path / "tiny.onnx"),
    ):
        with pytest.raises(ExportError, match=f"of model 'tiny' is off in .* of 12 checks on onnxruntime .*{said}"):
            export()
    assert tree(tmp_path) == before
    assert not (tmp_path / "new/tiny").exists()


class Spoilt:
    """An engine that gives what the graph in `path` gives, with the maps of `factor` times the size."""

    def __init__(self, path, change):
        self._right = onnx_runtime(path)
        self._change = change

    def run(self, inputs):
        found = self._right.run(inputs)
        found["attributions"] = self._change(found["attributions"])
        found["saliency"] = np.abs(found["attributions"]).mean(axis=1)
        return found


def moved(attributions):
    return attributions + 0.002 * np.roll(attributions, 1, axis=3)


def test_a_wrong_map_is_told_from_what_float32_decides(project, entry):
    """An error of 0.2 % passes only where maps known to be right are off by as much."""
    _, model, table = project
    pictures = parity.default_pictures(model, golden.read(entry[0] / "1/golden.safetensors").image)
    engine = Engine("spoilt", Spoilt(entry[0] / "1/model.onnx", moved).run)
    with pytest.raises(ExportError, match=r"off by 0\.002.*float32 explains 0\.001") as no:
        parity.check(engine, model, table, pictures)
    assert "Nothing was written" in str(no.value)


def test_a_map_may_be_as_far_off_as_float32_takes_it_but_no_further():
    bounds = parity._Bounds(distance=0.01, rank=0.02)
    assert bounds.allow(0.029, 0.95)
    assert not bounds.allow(0.031, 0.95)
    assert not bounds.allow(0.029, 0.93)
    bounds.see(0.5, 0.99)
    assert bounds.allow(0.19, 0.95)
    assert not bounds.allow(0.21, 0.95)
    assert not bounds.allow(math.nan, 0.95)
    assert not parity._Bounds(0.0, 0.0).allow(0.0011, 1.0)
    # Beyond that it decides nothing, unless it is off by more than what is known to be right.
    assert bounds.undecided(1.4)
    assert not bounds.undecided(1.6)
    assert not bounds.undecided(math.nan)
    assert not parity._Bounds(0.19, 0.0).undecided(0.3)


def test_a_graph_whose_maps_decide_nothing_is_not_written(project, tmp_path, monkeypatch):
    _, model, table = project
    monkeypatch.setattr(parity, "MAP_TOLERANCE", -1.0)
    monkeypatch.setattr(parity, "LARGEST", -1.0)
    monkeypatch.setattr(parity, "SLACK", 100.0)
    with pytest.raises(ExportError, match=r"cannot be judged: of 12 maps \d+ are such .* give other images"):
        export_onnx(model, table, tmp_path / "tiny.onnx")
    assert not tree(tmp_path)


def test_ranks_of_what_is_next_to_nothing_do_not_count():
    generator = np.random.default_rng(0)
    right = np.zeros((20, 20))
    right[:10] = generator.random((10, 20)) + 0.1
    noise = 1e-9 * generator.random((20, 20))
    assert parity._correlation(right + noise, right) > 0.999
    assert parity._correlation(right + 1e-2 * generator.random((20, 20)), right) < 0.95
    assert parity._correlation(np.zeros((20, 20)), right) == 0.0


def test_kinks_that_decide_otherwise_are_counted():
    def network(bias):
        conv = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            conv.weight.zero_()
            conv.bias.copy_(torch.tensor(bias))
        return nn.Sequential(conv, nn.ReLU(inplace=True), nn.ReLU6(), nn.MaxPool2d(2)).eval()

    images = torch.ones(1, 3, 4, 4)
    one, other = network([1e-9, 1.0]), network([-1e-9, 1.0]).double()
    # One channel of 16 positions lies on another side of both kinks: at the second it is 0 there, and passes nothing.
    assert parity._flips(one, other, images) == 32
    assert parity._flips(one, network([1e-9, 1.0]).double(), images) == 0


def test_default_pictures_are_the_same_every_time(project):
    pattern = np.zeros((1, 3, 24, 20), np.float32)
    first, second = (parity.default_pictures(project[1], pattern) for _ in range(2))
    assert [one.name for one in first] == ["golden pattern", *(f"synthetic {n}" for n in range(1, 8))]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))
    assert len({one.pixels.sum().item() for one in first}) == 8


def test_a_native_model_is_checked_on_another_size_too(tmp_path, monkeypatch):
    model, table = package(tmp_path, rule="native")
    report = export_onnx(model, table, tmp_path / "tiny.onnx").report
    assert report["checks"] == 13
    assert report["items"][-1]["image"] == "synthetic 16x31"


@pytest.mark.parametrize("option", ["selection", "normality_filter"])
def test_defaults_that_no_graph_follows_are_refused(project, tmp_path, option):
    _, model, table = project
    given = {"selection": "instance", "normality_filter": True}[option]
    layers = {
        name: replace(layer, normality_p=torch.ones(layer.channels, dtype=torch.float64))
        for name, layer in table.layers.items()
    }
    tested = replace(table, layers=layers).with_defaults(**{option: given})
    with pytest.raises(ExportError, match=f"has the default {option} .* an ONNX graph takes"):
        export_onnx(model, tested, tmp_path / "tiny.onnx")
    assert not tree(tmp_path)


# --- OpenVINO -------------------------------------------------------------------------------------------------


def test_openvino_reads_its_own_files(project, tmp_path):
    openvino = pytest.importorskip("openvino")
    _, model, table = project
    exported = export_openvino(model, table, tmp_path, backward="dense")
    assert sorted(tree(tmp_path)) == [
        f"tiny/1/{name}" for name in ("golden.safetensors", "model.bin", "model.xml", "parity.json")
    ]
    assert exported.report["runtime"].startswith("openvino ")
    read = openvino.Core().read_model(exported.path)
    card = json.loads(read.get_rt_info([METADATA_KEY]).astype(str))
    assert card["model"]["name"] == "tiny"


@pytest.fixture(scope="module")
def scenes():
    model = load_model(ROOT / "models/scenes")
    return model, load_table(ROOT / "selection_tables/scenes", model)


def test_openvino_computes_the_very_onnx_file(scenes, tmp_path):
    """Two of its faults are gone round in the graph: a HardSigmoid of beta 0, and weights that two operators share."""
    pytest.importorskip("openvino")
    model, table = scenes
    file = tmp_path / "scenes.onnx"
    export_onnx(model, table, file, backward="dense")
    images = torch.randn(3, 3, 20, 14, generator=torch.Generator().manual_seed(0))
    inputs = {
        "images": nn.functional.interpolate(images, (80, 57), mode="bilinear").numpy(),
        "targets": np.array([-1, 3, 7]),
        "quantile": np.array([[0.1], [0.3], [0.0]], dtype=np.float32),
        "gamma": np.array([np.inf, 2.0, np.inf], dtype=np.float32),
    }
    found, expected = openvino_cpu(file).run(inputs), onnx_runtime(file).run(inputs)
    for name, value in expected.items():
        assert np.abs(found[name].astype(float) - value).max() <= 1e-5 * max(1.0, float(np.abs(value).max())), name


# --- real weights ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data: real weights and photographs are not here")
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_real_weights_pass_the_gate_on_photographs(name, tmp_path):
    add_model(name, weights=DATA / f"weights/{name}.pth", models_dir=tmp_path / "models")
    model = load_model(tmp_path / "models" / name)
    SelectionTable.random(model, 1000, 0).save(tmp_path / "tables" / name / "1")
    table = load_table(tmp_path / "tables" / name, model)
    photographs = sorted((DATA / "imagenet_val").glob("*.JPEG"))[:8]
    report = export_triton(model, table, tmp_path / "graphs", images=photographs).report
    assert [one["batch"] for one in report["items"]] == [1] + [3] * 3 + [8] * 8
    assert {one["verdict"] for one in report["items"]} <= {"same", "tie"}
    assert sum(one["verdict"] == "same" for one in report["items"]) >= 6
    assert max(one["logits_error"] for one in report["items"]) <= 1e-5


def test_the_bundled_model_passes_the_gate_without_a_tie(scenes, tmp_path):
    model, table = scenes
    report = export_triton(model, table, tmp_path).report
    assert {one["verdict"] for one in report["items"]} == {"same"}
    assert max(one["map_error"] for one in report["items"]) <= 1e-5


# --- the command ----------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def where(root):
    return "--models-dir", root / "models", "--tables-dir", root / "tables"


def test_the_command_exports_and_says_how_it_was_checked(project, tmp_path):
    root, *_ = project
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in ("b.png", "a.png"):
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    result = invoke("export", "tiny", "--version", 1, "--out", tmp_path / "graphs", "--images", tmp_path / "images",
                    *where(root))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "12 images in batches of 1, 3, 8 on onnxruntime" in result.output
    report = json.loads((tmp_path / "graphs/tiny/1/parity.json").read_text())
    assert {item["image"] for item in report["items"]} == {"a.png", "b.png"}


def test_of_many_images_some_from_all_over_are_taken(project, tmp_path):
    images = [tmp_path / f"{number:02}.png" for number in range(16)]
    for path in images:
        Image.new("RGB", (20, 24)).save(path)
    pictures, others = write._read(images, project[1].preprocessing)
    assert [picture.name for picture in pictures] == [path.name for path in images[::2]]
    assert not others
    Image.new("RGB", (40, 30)).save(images[0])
    pictures, (other,) = write._read(images[:3], replace(project[1].preprocessing, rule="native", min_side=8))
    assert [picture.pixels.shape for picture in pictures] == [(3, 24, 20)] * 3
    assert other.pixels.shape == (3, 30, 40)


def test_the_command_writes_one_file(project, tmp_path):
    root, *_ = project
    result = invoke("export", "tiny", "--format", "onnx", "--out", tmp_path / "t.onnx", *where(root))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "t.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "onnx", "--threads", 2), "--threads does not go with --format onnx"),
        (("--format", "openvino", "--external-data"), "--external-data does not go with --format openvino"),
        (("--format", "tensorrt"), "'tensorrt' is not one of 'onnx', 'triton', 'openvino'"),
    ],
    ids=["threads", "external data", "format"],
)
def test_the_command_refuses_what_a_format_does_not_know(project, arguments, said):
    result = invoke("export", "tiny", *arguments, *where(project[0]))
    assert result.exit_code == 2
    assert said in result.output


def test_a_version_is_said_once(project):
    result = invoke("export", "tiny/1", "--version", 1, *where(project[0]))
    assert result.exit_code == 2
    assert "says a version already" in result.output


def test_a_folder_without_images_is_refused(project, tmp_path):
    with pytest.raises(parchgrad.errors.DataError, match="holds no images"):
        invoke("export", "tiny", "--images", tmp_path, *where(project[0]))
