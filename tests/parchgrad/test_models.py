"""Model packages: what is added loads again, whatever is wrong is refused by name, nothing is unpickled."""

import hashlib
import importlib
import pickle
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

from parchgrad.errors import ModelError, UnknownTargetError, WeightsError
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from tests.oracles.tolerance import assert_close

LABELS = ["cat", "dog", "tree", "bus"]
INPUT = Preprocessing(size=(40, 48), resize=56, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bicubic")
FACTORY = "tests.parchgrad.factories:small"


@pytest.fixture(scope="module")
def weights():
    """A trained-looking state dict of the user's own network."""
    torch.manual_seed(0)
    state = build_network(FACTORY, 4).state_dict()
    state["norm.running_mean"] += 0.3
    return state


def added(root, state, **changes):
    options = {"architecture": FACTORY, "weights": state, "labels": LABELS, "preprocessing": INPUT, "models_dir": root}
    return add_model("net", **{**options, **changes})


def write_pth(state, path):
    torch.save(state, path)
    return path


def write_wrapped(state, path):
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    return path


def write_safetensors(state, path):
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("write", [lambda s, p: s, write_pth, write_wrapped, write_safetensors],
                         ids=["state-dict", "pth", "pth-data-parallel-checkpoint", "safetensors"])  # fmt: skip
def test_what_is_added_loads_again(tmp_path, weights, write):
    folder = added(tmp_path / "models", write(weights, tmp_path / "weights.pth"))
    assert folder == tmp_path / "models" / "net" / "1"
    assert sorted(p.name for p in folder.iterdir()) == ["labels.txt", "model.yaml", "weights.safetensors"]
    for path in (folder, folder.parent, str(folder)):
        model = load_model(path)
        assert (model.name, model.version, model.architecture) == ("net", "1", FACTORY)
        assert model.labels == tuple(LABELS)
        assert model.weights_sha256 == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        assert model.preprocessing == INPUT
        assert not any(module.training for module in model.module.modules())
        for key, value in model.module.state_dict().items():
            assert torch.equal(value, weights[key])
    assert not [p for p in (tmp_path / "models" / "net").iterdir() if p.name != "1"], "scraps left behind"


def test_a_torchvision_architecture_by_name(tmp_path):
    torch.manual_seed(0)
    state = build_network("squeezenet1_1", 4).state_dict()
    folder = added(tmp_path, state, architecture="squeezenet1_1")
    model = load_model(folder)
    images = torch.randn(1, 3, 40, 48)
    expected = build_network("squeezenet1_1", 4)
    expected.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model.module(images), expected.eval()(images))


def test_weights_without_auxiliary_heads_are_complete(tmp_path):
    """torchvision's training-only heads may be missing, but only whole."""
    network = build_network("googlenet", 4)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("aux")}
    load_model(added(tmp_path, state, architecture="googlenet"))
    partial = dict(network.state_dict())
    partial.pop("aux1.fc1.weight")
    with pytest.raises(WeightsError, match=r"lack tensor 'aux1.fc1.weight'"):
        added(tmp_path, partial, architecture="googlenet")


def test_arguments_reach_the_factory(tmp_path):
    torch.manual_seed(0)
    state = build_network(FACTORY, 4, {"width": 5}).state_dict()
    model = load_model(added(tmp_path, state, arguments={"width": 5}))
    assert model.module.first.out_channels == 5
    with pytest.raises(WeightsError, match=r"'first.weight' has shape \(5, 3, 3, 3\).*\(6, 3, 3, 3\)"):
        added(tmp_path, state)


def test_versions_are_integers_and_the_highest_is_taken(tmp_path, weights):
    for version in (None, None, 10):
        added(tmp_path, weights, version=version)
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["1", "10", "2"]
    assert load_model(tmp_path / "net").version == "10"
    assert load_model(tmp_path / "net" / "2").version == "2"
    assert added(tmp_path, weights).name == "11"
    with pytest.raises(ModelError, match="'net' already has a version 2"):
        added(tmp_path, weights, version=2)
    with pytest.raises(ModelError, match="version is 0, expected an integer >= 1"):
        added(tmp_path, weights, version=0)


class Opens:
    """A pickle that runs code when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))], ids=["torch", "plain-pickle"]
)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, weights, save):
    trap = tmp_path / "ran"
    save({**weights, "extra": Opens(str(trap))}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"'weights.pth'"):
        added(tmp_path / "models", tmp_path / "weights.pth")
    assert not trap.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(build_network(FACTORY, 4), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"'weights.pth' holds more than tensors.*save its state dict"):
        added(tmp_path / "models", tmp_path / "weights.pth")


def changed(state, **changes):
    return {
        **{k: v for k, v in state.items() if changes.get(k, v) is not None},
        **{k: v for k, v in changes.items() if v is not None},
    }


WRONG_WEIGHTS = {
    "missing": (lambda s: changed(s, **{"first.weight": None}), "lack tensor 'first.weight'"),
    "unexpected": (lambda s: changed(s, extra=torch.ones(1)), "unexpected tensor 'extra'"),
    "shape": (lambda s: changed(s, **{"first.weight": torch.ones(6, 3, 5, 5)}),
              r"'first.weight' has shape \(6, 3, 5, 5\), the architecture has \(6, 3, 3, 3\)"),
    "nan": (lambda s: changed(s, **{"head.bias": torch.tensor([0.0, float("nan"), 0, 0])}), "'head.bias' holds NaN"),
    "labels-count": (lambda s: changed(s, **{"head.weight": torch.ones(7, 6), "head.bias": torch.ones(7)}),
                     r"'head\.(weight|bias)' has shape \(7.*the architecture has \(4"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_weights_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, weights, case):
    change, message = case
    with pytest.raises(WeightsError, match=message):
        added(tmp_path, change(weights))
    assert not list(tmp_path.rglob("*.*"))


FILES = {
    "empty.pth": b"", "text.pth": b"hello", "empty.safetensors": b"", "text.safetensors": b"hello" * 30,
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, "absent.pth", "absent.safetensors", "list.pth"])
def test_an_unreadable_weights_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    if name in FILES:
        path.write_bytes(FILES[name])
    if name == "list.pth":
        torch.save([torch.ones(3)], path)
    with pytest.raises(WeightsError, match=name):
        added(tmp_path / "models", path)


@pytest.mark.parametrize(("change", "message"), [
    ({"architecture": "resnet9000"}, "'resnet9000' is not a torchvision classification model"),
    ({"architecture": "fcn_resnet50"}, "'fcn_resnet50' is not a torchvision classification model"),
    ({"architecture": "no.such.module:net"}, "'no.such.module:net' cannot be imported"),
    ({"architecture": "tests.parchgrad.factories:absent"}, "'tests.parchgrad.factories:absent' cannot be imported"),
    ({"architecture": "tests.parchgrad.factories:no_network"}, "returned dict, expected torch.nn.Module"),
    ({"architecture": "tests.parchgrad.factories:failing"}, "cannot be built: RuntimeError: no such width"),
    ({"labels": []}, "no labels"),
    ({"labels": ["cat", "", "tree", "bus"]}, "label 1 is ''"),
    ({"labels": ["cat", "dog\nhorse", "tree", "bus"]}, "label 1 is"),
])  # fmt: skip
def test_a_package_that_cannot_work_is_refused(tmp_path, weights, change, message):
    with pytest.raises(ModelError, match=message):
        added(tmp_path, weights, **change)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["", "../net", "a/b", ".hidden", "net\n", "-x", "a b"], ids=repr)
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, weights, name):
    with pytest.raises(ModelError, match="Model name"):
        add_model(name, architecture=FACTORY, weights=weights, labels=LABELS, preprocessing=INPUT, models_dir=tmp_path)


@pytest.fixture
def package(tmp_path, weights):
    return added(tmp_path / "models", weights)


def edit(change):
    """A corruption of model.yaml."""

    def corrupt(folder):
        manifest = yaml.safe_load((folder / "model.yaml").read_text())
        change(manifest)
        (folder / "model.yaml").write_text(yaml.safe_dump(manifest))

    return corrupt


def flip(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def other_weights(folder):
    """Right digest, wrong tensors."""
    state = load_file(folder / "weights.safetensors")
    state["first.weight"] = state["first.weight"][:, :2].clone()
    save_file(state, folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    edit(lambda m: m["weights"].update(sha256=digest))(folder)


CORRUPT = {
    "digest": (flip, WeightsError, r"'net': weights.safetensors has sha256 \w{64}, model.yaml says \w{64}"),
    "other-weights": (other_weights, WeightsError, r"'first.weight' has shape \(6, 2, 3, 3\)"),
    "no-weights": (
        lambda f: (f / "weights.safetensors").unlink(),
        WeightsError,
        "'net' has no weights file 'weights.safetensors'",
    ),
    "no-labels": (lambda f: (f / "labels.txt").unlink(), ModelError, "labels.txt' cannot be read"),
    "fewer-labels": (
        lambda f: (f / "labels.txt").write_text("cat\ndog\n"),
        WeightsError,
        r"'head\.\w+' has shape \(4.*\(2",
    ),
    "no-manifest": (lambda f: (f / "model.yaml").unlink(), ModelError, "model.yaml"),
    "not-yaml": (lambda f: (f / "model.yaml").write_text("{: ["), ModelError, "cannot be read"),
    "a-list": (lambda f: (f / "model.yaml").write_text("[1]"), ModelError, "format version 'list'.*reads 1"),
    "yaml-that-runs-code": (
        lambda f: (f / "model.yaml").write_text("!!python/object/apply:os.getcwd []"),
        ModelError,
        "cannot be read",
    ),
    "version": (edit(lambda m: m.update(format_version=2)), ModelError, "format version 2; this library reads 1"),
    "no-architecture": (edit(lambda m: m.pop("architecture")), ModelError, "'architecture' is None, expected a str"),
    "weights-elsewhere": (
        edit(lambda m: m["weights"].update(file="../x.safetensors")),
        ModelError,
        "not the name of a file beside it",
    ),
    "labels-elsewhere": (
        edit(lambda m: m.update(labels="/etc/hostname")),
        ModelError,
        "not the name of a file beside it",
    ),
    "no-digest": (edit(lambda m: m["weights"].pop("sha256")), ModelError, "no sha256"),
    "arguments": (edit(lambda m: m.update(arguments=[1])), ModelError, "cannot be built.*not a mapping|arguments"),
    "unknown-input": (edit(lambda m: m["input"].update(colour=1)), ModelError, "'net': 'input' is malformed.*colour"),
    "bad-rule": (
        edit(lambda m: m["input"].update(rule="tile")),
        ModelError,
        "rule is 'tile'; expected shorter_side, stretch, native",
    ),
    "bad-size": (edit(lambda m: m["input"].update(size=[0, 5])), ModelError, "size is .*0, 5.*expected"),
    "size-is-text": (edit(lambda m: m["input"].update(size="large")), ModelError, "size is 'large'|malformed"),
    "bad-std": (
        edit(lambda m: m["input"].update(std=[0.1, 0.0, 0.1])),
        ModelError,
        "std is .*expected three numbers > 0",
    ),
    "small-resize": (
        edit(lambda m: m["input"].update(resize=20)),
        ModelError,
        "resize is 20; expected an integer >= 48",
    ),
}


@pytest.mark.parametrize("case", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_package_is_refused_by_name(package, case):
    corrupt, error, message = case
    corrupt(package)
    with pytest.raises(error, match=message):
        load_model(package)


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(ModelError, match=r"neither model.yaml nor a numbered version folder"):
        load_model(tmp_path / "absent")


def test_the_package_may_be_moved(package, tmp_path):
    shutil.move(package.parent, tmp_path / "elsewhere")
    assert load_model(tmp_path / "elsewhere").name == "net"


@pytest.mark.parametrize("labels", [["n01440764\tcat", "n02102040\tdog", "n3\ttree", "n4\tbus"],
                                    ["n01440764 cat", "n02102040 dog", "n02979186 tree", "n03000684 bus"]],
                         ids=["tab", "imagenet"])  # fmt: skip
def test_labels_may_carry_class_ids(tmp_path, weights, labels):
    model = load_model(added(tmp_path, weights, labels=labels))
    assert model.labels == tuple(LABELS)
    assert (
        model.class_index("n02102040")
        == model.class_index("dog")
        == model.class_index(1)
        == model.class_index("1")
        == 1
    )


@pytest.mark.parametrize("target", ["horse", 4, -1, "4", "-1", True, None, 1.0], ids=repr)
def test_an_unknown_class_is_refused(package, target):
    with pytest.raises(
        UnknownTargetError, match=r"Option 'target' is .*; allowed: an index in 0\.\.3 or a class name, such as 'cat'"
    ):
        load_model(package).class_index(target)


def test_the_factory_may_be_in_a_module_beside_the_caller(tmp_path, weights, monkeypatch):
    (tmp_path / "my_own_networks.py").write_text("from tests.parchgrad.factories import small as my_net\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert load_model(added(tmp_path / "models", weights, architecture="my_own_networks:my_net")).labels == tuple(
        LABELS
    )


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


SIZES = [
    (224, 224),
    (256, 256),
    (300, 200),
    (200, 300),
    (57, 55),
    (55, 57),
    (640, 481),
    (101, 333),
    (64, 64),
    (5, 7),
    (700, 60),
    (48, 40),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_shorter_side_equals_torchvisions_transforms_to_the_pixel(size, interpolation):
    """Resize, CenterCrop, ToTensor, Normalize, on sizes that round both ways."""
    preprocessing = Preprocessing(size=(40, 48), resize=56, mean=INPUT.mean, std=INPUT.std, interpolation=interpolation)
    mode = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}[interpolation]
    reference = v2.Compose([
        v2.Resize(56, interpolation=mode), v2.CenterCrop((40, 48)), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(INPUT.mean, INPUT.std),
    ])  # fmt: skip
    image = picture(*size)
    tensor, placement = preprocessing.apply(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 40, 48)
    assert_close(tensor, reference(image), 1e-6)
    assert placement.original_size == size


@pytest.mark.parametrize("size", [(1000, 30), (30, 1000), (1, 300), (17, 290)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_long_strip_gives_what_torchvision_gives_up_to_a_fraction_of_a_pixel(size):
    preprocessing = Preprocessing(size=(40, 48), resize=56)
    reference = v2.Compose(
        [v2.Resize(56), v2.CenterCrop((40, 48)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    image = picture(3, 3).resize(size, Image.Resampling.BICUBIC)  # smooth: a small shift changes little
    found = torch.from_numpy(preprocessing.restore(preprocessing.apply(image)[0])).permute(2, 0, 1).double()
    assert float((found - reference(image).double() * 255).abs().max()) < 4.0


def test_a_hostile_strip_costs_little():
    tensor, placement = Preprocessing(size=(224, 224), resize=256).apply(Image.new("RGB", (60_000, 1)))
    assert tensor.shape == (3, 224, 224)
    assert placement.original_size == (60_000, 1)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_crop_box_is_where_the_pixels_came_from(size):
    """A ramp of colour tells where each input pixel lies on the original."""
    width, height = size
    x = np.tile(np.linspace(0, 255, width)[None], (height, 1))
    y = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    image = Image.fromarray(np.stack([x, y, x], 2).round().astype(np.uint8))
    preprocessing = Preprocessing(size=(40, 48), resize=56)
    tensor, placement = preprocessing.apply(image)
    pixels = preprocessing.restore(tensor).astype(float)
    x0, y0, x1, y1 = placement.crop_box
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    centre_x, centre_y = (
        pixels[..., 0].mean() / 255 * (width - 1) + 0.5,
        pixels[..., 1].mean() / 255 * (height - 1) + 0.5,
    )
    assert abs(centre_x - (x0 + x1) / 2) <= 0.02 * width + 0.3
    assert abs(centre_y - (y0 + y1) / 2) <= 0.02 * height + 0.3
    assert (x1 - x0) / (y1 - y0) == pytest.approx(48 / 40, rel=0.05)


def test_stretch_takes_the_whole_image():
    preprocessing = Preprocessing(size=(40, 48), rule="stretch")
    reference = v2.Compose(
        [
            v2.Resize((40, 48)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    image = picture(100, 37)
    tensor, placement = preprocessing.apply(image)
    assert_close(tensor, reference(image), 1e-6)
    assert placement.crop_box == (0, 0, 100, 37)


@pytest.mark.parametrize(("size", "expected"), [
    ((100, 60), (100, 60)), ((64, 64), (64, 64)), ((400, 100), (200, 50)), ((100, 400), (50, 200)),
    ((20, 30), (32, 48)),
    ((200, 33), (200, 33)), ((1000, 20), (200, 32)), ((1, 1), (32, 32)), ((201, 150), (200, 149)),
], ids=str)  # fmt: skip
def test_native_keeps_the_size_within_its_bounds(size, expected):
    preprocessing = Preprocessing(size=(64, 64), rule="native", min_side=32, max_side=200)
    tensor, placement = preprocessing.apply(picture(*size))
    assert (tensor.shape[2], tensor.shape[1]) == expected
    assert placement.crop_box == (0, 0, *size)


@pytest.mark.parametrize("rule", ["shorter_side", "stretch", "native"])
def test_an_array_is_the_tensor_to_the_bit(rule):
    preprocessing = Preprocessing(size=(40, 32), resize=44, rule=rule, std=(0.3, 0.21, 0.7))
    image = picture(61, 53)
    array, placement = preprocessing.array(image)
    tensor, same = preprocessing.apply(image)
    assert (array.dtype, tuple(tensor.shape), placement) == (np.float32, array.shape, same)
    assert np.array_equal(array, tensor.numpy())
    assert np.array_equal(preprocessing.restore(array), preprocessing.restore(tensor))


def test_normalisation_is_that_of_torch_to_the_bit():
    levels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2).repeat(2, axis=1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (INPUT.mean, INPUT.std))
    expected = (torch.from_numpy(levels).permute(2, 0, 1).to(torch.float32) / 255 - mean) / std
    found = INPUT.normalise(Image.fromarray(levels))
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()  # engines choose kernels by it


def test_restoring_takes_a_tensor_of_any_kind():
    image = picture(20, 24)
    pixels = INPUT.normalise(image)
    for changed in (pixels.double(), pixels.half().requires_grad_()):
        assert np.array_equal(INPUT.restore(changed), np.asarray(image))


def test_normalise_and_restore_are_inverse():
    image = picture(48, 40)
    assert np.array_equal(INPUT.restore(INPUT.normalise(image)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_only_rgb_is_taken(mode):
    with pytest.raises(ModelError, match=f"RGB image, got mode {mode}"):
        INPUT.apply(Image.new(mode, (60, 60)))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("seven_outputs", r"answers one image with \(1, 7\), expected logits of shape \(1, 4\)"),
        ("grey", r"fails on one image of shape \(1, 3, 16, 16\)"),
    ],
)
def test_a_network_that_does_not_answer_is_not_added(tmp_path, factory, message):
    architecture = f"tests.parchgrad.factories:{factory}"
    with pytest.raises(ModelError, match=message):
        add_model(
            "odd",
            architecture=architecture,
            weights=build_network(architecture, 4).state_dict(),
            labels=["a", "b", "c", "d"],
            preprocessing=Preprocessing(size=(16, 16), rule="stretch"),
            models_dir=tmp_path,
        )
    assert not list(tmp_path.rglob("model.yaml"))


def test_building_a_network_leaves_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_network("squeezenet1_1", 4)
    assert torch.equal(torch.rand(1), expected)
