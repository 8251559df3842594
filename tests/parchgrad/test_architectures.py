"""Architectures by name and what their publishers give with them: torchvision's and timm's, without a network."""

import math
import sys
import urllib.error

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models as zoo

from parchgrad.architectures import build_network, published
from parchgrad.cli import cli
from parchgrad.errors import ModelError, UnsupportedModelError, WeightsError
from parchgrad.explainer import Explainer
from parchgrad.layers import convolutions
from parchgrad.models import add_model, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.tables import SelectionTable
from tests.oracles import maps
from tests.oracles.maps import Options
from tests.oracles.tolerance import assert_close, assert_each_close

IMAGENET = 1000


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def squeezenet():
    """A state dict of the 1000 classes, as a download would give."""
    torch.manual_seed(0)
    return build_network("squeezenet1_1", IMAGENET).state_dict()


@pytest.fixture
def downloads(monkeypatch, squeezenet):
    """What was asked to be downloaded, each answered with SqueezeNet's weights."""
    asked = []

    def answer(weights, *args, **kwargs):
        asked.append(str(weights))
        return dict(squeezenet)

    monkeypatch.setattr(zoo.WeightsEnum, "get_state_dict", answer)
    return asked


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


# --- torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", zoo.list_models(module=zoo))
def test_every_torchvision_architecture_comes_with_labels_and_preprocessing(architecture):
    """Of each of its weights, equal to torchvision's own transform where they take their image from."""
    names = [w.name for w in zoo.get_model_weights(architecture) if w.name != "IMAGENET1K_FEATURES"]
    for name in names:
        found = published(architecture, name)
        weights = zoo.get_weight(f"{type(zoo.get_model_weights(architecture).DEFAULT).__name__}.{name}")
        assert found.source == f"torchvision {weights}"
        assert found.file == weights.url.rsplit("/", 1)[1]
        assert list(found.labels) == weights.meta["categories"]
        assert len(found.labels) == IMAGENET
        preset, ours = weights.transforms(), Preprocessing(**found.preprocessing)
        assert [*ours.size, ours.resize] == [*preset.crop_size * 2, *preset.resize_size]
        assert [list(ours.mean), list(ours.std)] == [list(preset.mean), list(preset.std)]
        assert ours.interpolation == preset.interpolation.value


@pytest.mark.parametrize("architecture", ["resnet50", "efficientnet_b1", "mnasnet1_3"])
def test_published_preprocessing_is_torchvisions_to_the_pixel(architecture):
    """Bilinear and bicubic, sizes that round."""
    preset = zoo.get_model_weights(architecture).DEFAULT.transforms()
    image = picture(321, 287)
    found, _ = Preprocessing(**published(architecture).preprocessing).apply(image)
    assert_close(found, preset(image), 1e-6)


@pytest.mark.parametrize(("architecture", "pretrained", "file", "expected"), [
    ("resnet50", None, None, "IMAGENET1K_V2"),
    ("resnet50", "DEFAULT", "own.pth", "IMAGENET1K_V2"),
    ("resnet50", "IMAGENET1K_V1", None, "IMAGENET1K_V1"),
    ("resnet50", None, "resnet50-11ad3fa6.pth", "IMAGENET1K_V2"),
    ("resnet50", None, "resnet50-0676ba61.pth", "IMAGENET1K_V1"),
    ("resnet50", None, "own.pth", "IMAGENET1K_V1"),
    ("resnet50", None, "", "IMAGENET1K_V1"),
    ("vgg16", None, None, "IMAGENET1K_V1"),
])  # fmt: skip
def test_which_published_weights_are_meant(architecture, pretrained, file, expected):
    assert published(architecture, pretrained, file).source.endswith(f".{expected}")


@pytest.mark.parametrize(("architecture", "pretrained", "message"), [
    ("resnet50", "IMAGENET1K_V9", "'resnet50' has no weights named 'IMAGENET1K_V9', but DEFAULT, IMAGENET1K_V1, "),
    ("vgg16", "IMAGENET1K_FEATURES", "'vgg16' has no weights named 'IMAGENET1K_FEATURES', but DEFAULT, IMAGENET1K_V1"),
    ("resnet9000", None, "'resnet9000' is not a torchvision classification model; .*timm/NAME.*module:factory"),
    ("a.b:c", "DEFAULT", "'a.b:c' has no published weights"),
])  # fmt: skip
def test_unknown_names_are_refused(architecture, pretrained, message):
    with pytest.raises(ModelError, match=message):
        published(architecture, pretrained)


HUBCONF = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef net(**_): pass\n"


@pytest.mark.parametrize(
    "architecture", ["torch.hub:load", "torch:hub.load", "torch.hub:_load_local", "torch.nn:Conv2d"]
)
def test_factories_of_torch_itself_are_refused(tmp_path, architecture):
    """`torch.hub:load` runs a file that the package brings along."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    arguments = {"repo_or_dir": str(tmp_path), "model": "net", "source": "local"}
    with pytest.raises(ModelError, match=f"'{architecture}' is PyTorch's own, expected a module of yours"):
        build_network(architecture, 2, arguments)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("argument", ["pretrained", "weights", "checkpoint_path", "model_name", "num_classes"])
@pytest.mark.parametrize("architecture", ["squeezenet1_1", "timm/resnet18", "tests.parchgrad.factories:small"])
def test_arguments_that_bring_weights_or_classes_are_refused(downloads, architecture, argument):
    """A package has its own weights, and nothing is downloaded when it is loaded."""
    if architecture.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ModelError, match=rf"'{architecture}' takes no argument '{argument}': a package has its own"):
        build_network(architecture, 2, {argument: "DEFAULT"})
    assert downloads == []


@pytest.mark.parametrize("ask", [published, lambda name: build_network(name, 2)], ids=["published", "build"])
@pytest.mark.parametrize("architecture", ["timm/hf-hub:owner/name", "timm/hf_hub:owner/name", "timm/local-dir:folder"])
def test_a_timm_model_of_another_place_is_refused_by_name(timm, architecture, ask):
    with pytest.raises(ModelError, match=rf"'{architecture}' is not one of timm .*'s models"):
        ask(architecture)


def test_with_a_weights_file_pretrained_chooses_labels_and_preprocessing_alone(tmp_path, downloads, squeezenet):
    torch.save(squeezenet, tmp_path / "mine.pth")
    folder = add_model(
        "squeezenet1_1", weights=tmp_path / "mine.pth", pretrained="IMAGENET1K_V1", models_dir=tmp_path / "models"
    )
    model = load_model(folder)
    assert (downloads, model.weights_source, model.labels[0]) == ([], "file mine.pth", "tench")
    assert published("resnet50", "IMAGENET1K_V2", "mine.pth").preprocessing["resize"] == 232
    assert published("resnet50", None, "mine.pth").preprocessing["resize"] == 256
    text = " ".join(CliRunner().invoke(cli, ["model", "add", "--help"]).output.split())
    assert "with --weights FILE, only whose labels and preprocessing" in text


def test_torchs_hub_under_another_name_is_refused():
    architecture = "torchvision._internally_replaced_utils:load_state_dict_from_url"
    with pytest.raises(ModelError, match="is PyTorch's own, expected a module of yours"):
        build_network(architecture, 2)


def test_a_name_alone_is_a_model_of_torchvision(tmp_path, downloads, squeezenet):
    folder = add_model("squeezenet1_1", models_dir=tmp_path)
    model = load_model(folder)
    assert downloads == ["SqueezeNet1_1_Weights.IMAGENET1K_V1"]
    assert model.architecture == "squeezenet1_1"
    assert model.weights_source == "torchvision SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert model.labels[0] == "tench"
    assert model.preprocessing == Preprocessing(size=(224, 224), resize=256)
    assert torch.equal(model.module.state_dict()["features.0.weight"], squeezenet["features.0.weight"])


def test_each_option_replaces_its_piece(tmp_path, downloads):
    labels = [f"n{i:08d} class {i}" for i in range(IMAGENET)]
    given = {"size": (112, 112), "mean": (0.1, 0.2, 0.3)}
    folder = add_model("small", architecture="squeezenet1_1", labels=labels, preprocessing=given, models_dir=tmp_path)
    model = load_model(folder)
    assert downloads, "the weights are still the published ones"
    assert model.class_ids[3] == "n00000003"
    assert model.preprocessing == Preprocessing(size=(112, 112), resize=128, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize(("changes", "expected"), [
    ({"size": (112, 112), "resize": 112}, {"size": (112, 112), "resize": 112}),
    ({"rule": "stretch"}, {"size": (224, 224), "rule": "stretch"}),
    ({"rule": "native"}, {"size": (224, 224), "rule": "native"}),
    ({"interpolation": "bicubic"}, {"size": (224, 224), "resize": 256, "interpolation": "bicubic"}),
], ids=str)  # fmt: skip
def test_preprocessing_piece_by_piece(tmp_path, downloads, changes, expected):
    model = load_model(add_model("squeezenet1_1", preprocessing=changes, models_dir=tmp_path))
    assert model.preprocessing == Preprocessing(**expected)


def test_with_a_weights_file_nothing_is_downloaded(tmp_path, downloads, squeezenet):
    torch.save(squeezenet, tmp_path / "mine.pth")
    model = load_model(add_model("squeezenet1_1", weights=tmp_path / "mine.pth", models_dir=tmp_path / "models"))
    assert downloads == []
    assert model.weights_source == "file mine.pth"
    assert model.labels[0] == "tench"
    assert model.preprocessing.resize == 256


def test_a_weights_file_of_other_classes_needs_labels(tmp_path, downloads):
    torch.manual_seed(0)
    state = build_network("squeezenet1_1", 7).state_dict()
    with pytest.raises(WeightsError, match=r"are for 7 classes \('classifier.1.weight'\), the labels of torchvision "
                       r".*V1 are 1000; give the labels of your own classes \(--labels\)"):  # fmt: skip
        add_model("squeezenet1_1", weights=state, models_dir=tmp_path)
    labels = [f"class {i}" for i in range(7)]
    assert len(load_model(add_model("squeezenet1_1", weights=state, labels=labels, models_dir=tmp_path)).labels) == 7


def test_without_a_network_the_error_says_what_to_pass(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    arguments = ["model", "add", "resnet50", "--models-dir", str(tmp_path / "models")]
    with pytest.raises(WeightsError) as caught:
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    message = str(caught.value)
    assert "'ResNet50_Weights.IMAGENET1K_V2' cannot be downloaded (<urlopen error Name or service not known>" in message
    assert "fetch resnet50-11ad3fa6.pth where there is a network and give the file: --weights FILE." in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("model.yaml"))


def test_what_is_in_the_download_cache_is_used(tmp_path, monkeypatch, no_network, squeezenet):
    """torch.hub's, under the file name of the published weights; its digest is checked."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache/hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(squeezenet, cache / "squeezenet1_1-b8a52dc0.pth")
    model = load_model(add_model("squeezenet1_1", models_dir=tmp_path / "models"))
    assert model.weights_source == "torchvision SqueezeNet1_1_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize(("given", "message"), [
    ({}, "architecture 'tests.parchgrad.factories:small' comes without labels; give them"),
    ({"labels": ["a", "b"]}, "architecture 'tests.parchgrad.factories:small' comes without weights; give them"),
])  # fmt: skip
def test_a_users_own_network_needs_labels_and_weights(tmp_path, given, message):
    with pytest.raises(ModelError, match=message):
        add_model("mine", architecture="tests.parchgrad.factories:small", models_dir=tmp_path, **given)


def test_a_network_without_convolutions_is_refused(tmp_path):
    architecture = "tests.parchgrad.factories:dense"
    state = build_network(architecture, 2).state_dict()
    with pytest.raises(UnsupportedModelError, match="'dense' has no convolution module, so no channels to select"):
        add_model(
            "dense", architecture=architecture, weights=state, labels=["a", "b"],
            preprocessing=Preprocessing((8, 8), "stretch"), models_dir=tmp_path,
        )  # fmt: skip


def test_a_network_of_one_convolution_is_added_with_a_note(tmp_path):
    """Such as a transformer's, whose patch embedding is one."""
    architecture = "tests.parchgrad.factories:patches"
    save_file(build_network(architecture, 2).state_dict(), tmp_path / "patches.safetensors")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    files = ["--weights", tmp_path / "patches.safetensors", "--labels", tmp_path / "labels.txt"]
    arguments = ["model", "add", "p", "--arch", architecture, *files, "--size", 16, "--models-dir", tmp_path / "models"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "its only convolution is 'embed'; the rule acts there and nowhere else" in result.stderr


@pytest.mark.parametrize("architecture", ["vit_b_16", "swin_t"])
def test_of_a_transformer_only_the_patch_embedding_takes_part(architecture):
    assert len(convolutions(build_network(architecture, 2))) == 1


def test_the_command_takes_what_is_published_and_shows_its_source(tmp_path, downloads):
    def output(*arguments):
        result = CliRunner().invoke(cli, [*arguments, "--models-dir", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    output("model", "add", "squeezenet1_1", "--mean", "0.5,0.5,0.5", "--pretrained", "IMAGENET1K_V1")
    shown = output("model", "show", "squeezenet1_1")
    assert "weights         torchvision SqueezeNet1_1_Weights.IMAGENET1K_V1" in shown
    assert "classes         1000: tench, goldfish" in shown
    assert "mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225)" in shown


# --- timm -----------------------------------------------------------------------------------------------------------

# One of each way in which timm's convolutions differ from torch's: 'same' padding by TensorFlow's rule, weights
# standardised at each pass, several branches a block, squeeze-and-excitation, mixed kernel sizes, split attention.
TIMM = {
    "resnet18.a1_in1k": 64,
    "tf_efficientnet_b0": 64,
    "mobilenetv3_small_050": 64,
    "regnety_002": 64,
    "convnext_atto": 64,
    "nf_regnet_b0": 64,
    "repvgg_a0": 64,
    "mixnet_s": 64,
    "resnest14d": 64,
}


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(("name", "size"), TIMM.items(), ids=TIMM.keys())
def test_timm_networks_equal_the_oracle(timm, name, size):
    torch.manual_seed(0)
    model = build_network(f"timm/{name}", 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("gain", "gamma", "bn3.weight", "bn2.weight")):  # some begin at nought
            nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.double().eval()
    table = SelectionTable.random(model, 4, 0)
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    found = Explainer(model, table).explain(images, 1, quantile=0.3, gamma=2.0)
    expected, answers = maps.explain_batch(model, table, images, [Options(target=1, quantile=0.3, gamma=2.0)])
    assert_each_close(found.attributions, expected, 1e-7)
    assert_each_close(found.logits, [answer.logits for answer in answers], 1e-9)
    assert found.layers_used.tolist() == [answers[0].layers_used] == [len(convolutions(model))]
    assert float(found.attributions.abs().max()) > 0


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet18.a1_in1k", {"size": (224, 224), "resize": 235, "interpolation": "bicubic"}),
    ("tf_efficientnet_b0", None),
    ("inception_v3", None),
    ("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384", {"size": (384, 384), "rule": "stretch"}),
], ids=str)  # fmt: skip
def test_timms_preprocessing_is_timms_to_the_pixel(timm, name, expected):
    ours = Preprocessing(**published(f"timm/{name}").preprocessing)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    image = picture(321, 287)
    assert_close(ours.apply(image)[0], timm.data.create_transform(**config)(image), 1e-6)
    for key, value in (expected or {}).items():
        if key not in ("mean", "std"):
            assert getattr(ours, key) == value


def test_published_timm_networks_have_a_rule(timm):
    """Every fortieth of the nearly two thousand; asking for all takes minutes."""
    refused = []
    for name in sorted(timm.list_pretrained())[::40]:
        offer = published(f"timm/{name}")
        assert offer.file
        try:
            assert Preprocessing(**offer.preprocessing).size[0] == timm.get_pretrained_cfg(name).input_size[1]
        except ModelError:
            refused.append(name)
    assert len(refused) <= 2


@pytest.mark.parametrize(("name", "message"), [
    ("vit_base_patch16_clip_384.openai_ft_in12k_in1k",
     "rule is \"timm's crop mode squash at 0.95 of 384 x 384\"; expected shorter_side, stretch"),
    ("volo_d4_448.sail_in1k", "resize is 389; expected an integer >= 448"),
])  # fmt: skip
def test_a_timm_transform_that_is_none_of_our_rules_is_refused_unless_replaced(timm, name, message):
    fields = published(f"timm/{name}").preprocessing
    with pytest.raises(ModelError, match=message):
        Preprocessing(**fields)
    assert Preprocessing(**{**fields, "rule": "stretch", "resize": None}).rule == "stretch"


def test_timm_labels_carry_wordnet_ids(timm):
    labels = published("timm/resnet18.a1_in1k").labels
    assert len(labels) == IMAGENET
    assert labels[0] == "n01440764\ttench, Tinca tinca"


def test_a_timm_package_from_a_file(timm, tmp_path):
    torch.manual_seed(0)
    state = build_network("timm/resnet18.a1_in1k", IMAGENET).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    arguments = ["model", "add", "resnet18", "--arch", "timm/resnet18.a1_in1k"]
    arguments += ["--weights", str(tmp_path / "model.safetensors"), "--models-dir", str(tmp_path / "models")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = load_model(tmp_path / "models/resnet18")
    assert (model.architecture, model.weights_source) == ("timm/resnet18.a1_in1k", "file model.safetensors")
    assert model.class_index("n01443537") == 1
    assert model.preprocessing.resize == math.floor(224 / 0.95)


def test_timms_download(timm, tmp_path, monkeypatch):
    torch.manual_seed(0)
    trained = timm.create_model("resnet18", num_classes=IMAGENET)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: (
        trained if kwargs.get("pretrained") else create(*args, **kwargs)))  # fmt: skip
    model = load_model(add_model("resnet18", architecture="timm/resnet18.a1_in1k", models_dir=tmp_path))
    assert model.weights_source == "timm resnet18.a1_in1k"
    assert torch.equal(model.module.state_dict()["fc.weight"], trained.fc.weight)


def test_without_a_network_timms_error_says_what_to_pass(timm, tmp_path, monkeypatch):
    create = timm.create_model

    def offline(*args, **kwargs):
        if kwargs.get("pretrained"):
            raise FileNotFoundError("An error happened while trying to locate\nthe file on the Hub")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"'timm/resnet18.a1_in1k' cannot be downloaded \(An error .* locate the "
                       r"file .*; fetch model.safetensors of timm/resnet18.a1_in1k on the Hugging Face"):  # fmt: skip
        add_model("resnet18", architecture="timm/resnet18.a1_in1k", models_dir=tmp_path)


@pytest.mark.parametrize(("architecture", "pretrained", "message"), [
    ("timm/nosuchnet", None, r"'timm/nosuchnet' is not one of timm .*'s models"),
    ("timm/resnet18.nosuchtag", None, "'timm/resnet18.nosuchtag' has no published weights tagged 'nosuchtag'"),
    ("timm/resnet18", "a1_in1k", "timm names its weights in the architecture, 'timm/NAME.a1_in1k'"),
])  # fmt: skip
def test_unknown_timm_names_are_refused(timm, architecture, pretrained, message):
    with pytest.raises(ModelError, match=message):
        published(architecture, pretrained)


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (published, lambda name: build_network(name, 2)):
        with pytest.raises(ModelError, match=r"'timm/resnet18' needs timm.*pip install 'parchgrad\[timm\]'"):
            ask("timm/resnet18")
