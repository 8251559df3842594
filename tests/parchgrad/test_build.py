"""Building a table: a tiny folder of images gives, layer by layer, what SciPy gives on features taken one by one."""

import dataclasses
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import nn

from parchgrad.build import build_table, hold_out
from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, ModelError, OptionError, TableError, UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.sources import ImageFolder
from parchgrad.tables import load_table
from tests.oracles import selection
from tests.oracles.tolerance import assert_close

LABELS = ["cat", "dog", "tree", "bus"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    # Both layers of one width: features of the wrong layer would fit in shape.
    state = build_network("tests.parchgrad.factories:small", 4).state_dict()
    state["first.bias"][2] = -50.0  # a dead channel
    folder = add_model(
        "net", architecture="tests.parchgrad.factories:small", weights=state, labels=LABELS,
        preprocessing=Preprocessing(size=(12, 12), resize=14), models_dir=tmp_path_factory.mktemp("models"),
    )  # fmt: skip
    return load_model(folder)


def write_images(folder, count, seed, sizes=((16, 20), (15, 15))):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        level = generator.integers(0, 200, 3)
        pixels = np.clip(level + generator.integers(0, 56, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three of the four classes, unequal in number; folders named by name and by index; a note among the images."""
    root = tmp_path_factory.mktemp("data")
    for folder, count, seed in (("tree", 9, 0), ("0", 5, 1), ("bus", 6, 2)):
        write_images(root / folder, count, seed)
    (root / "tree" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("no class")
    return root


def features_one_by_one(model, data):
    """{layer: (images, channels)} and labels: each image alone through a float32 model, features in float64 loops."""
    found = {"first": [], "second": []}
    labels = []
    with torch.no_grad():
        for index, folder in ((0, "0"), (2, "tree"), (3, "bus")):
            for path in sorted((data / folder).glob("*.png")):
                image = model.preprocessing.apply(Image.open(path).convert("RGB"))[0][None]
                z = model.module.first(image)
                found["first"].append(selection.gap_feature(z[0]))
                z = model.module.second(torch.relu(model.module.norm(torch.relu(z) * 0 + z)))
                found["second"].append(selection.gap_feature(z[0]))
                labels.append(index)
    return {name: np.stack(rows) for name, rows in found.items()}, np.array(labels)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_table_equals_the_oracle(model, data, batch_size):
    table = build_table(model, data, batch_size=batch_size)
    features, labels = features_one_by_one(model, data)
    assert table.classes == (0, 2, 3)
    assert table.images_per_class == (5, 9, 6)
    assert list(table.layers) == ["first", "second"]
    assert table.labels == tuple(LABELS)
    assert (table.model_name, table.weights_sha256) == ("net", model.weights_sha256)
    for name, layer in table.layers.items():
        for row, a_class in enumerate(table.classes):
            t, log_p = selection.welch(features[name], labels, a_class)
            alive = ~np.isnan(log_p)
            np.testing.assert_allclose(layer.log_p[row][alive], log_p[alive], rtol=1e-3)  # float32 features
            assert np.all(layer.log_p[row].numpy()[~alive] == 0.0)
            log_p, t = np.where(alive, log_p, 0.0), np.where(alive, t, 0.0)
            assert layer.rank[row].tolist() == selection.ranks(log_p, t)
        assert_close(layer.mean, features[name].mean(0), 1e-5)
        assert_close(layer.std, features[name].std(0, ddof=1), 1e-5)
        spread = features[name].std(0) > 0
        assert_close(
            layer.normality_p[torch.from_numpy(spread)], selection.normality_p(features[name][:, spread]), 1e-3
        )
    assert int(table.layers["first"].std.eq(0).sum()) == 1, "the dead channel"


def test_the_built_table_is_the_models_and_survives_saving(model, data, tmp_path):
    defaults = Defaults(quantile=0.3, gamma=4.0)
    table = build_table(model, data, defaults=defaults).save(tmp_path / "mine" / "7")
    loaded = load_table(tmp_path / "mine", model=model)
    assert (loaded.name, loaded.version, loaded.defaults) == (model.name, model.version, defaults)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    one = Explainer(model, table).explain(images, [0, 3])
    assert torch.equal(one.attributions, Explainer(model, loaded).explain(images, [0, 3]).attributions)


@pytest.mark.parametrize(
    "defaults",
    [Defaults(layers=("nosuch",)), Defaults(gamma=1e7), Defaults(normality_filter=True)],
    ids=["layers", "gamma", "filter-without-test"],
)
def test_defaults_that_do_not_fit_are_refused_before_any_image_is_read(model, data, defaults):
    calls = []
    with pytest.raises(TableError, match="default"):
        build_table(model, data, defaults=defaults, normality=False, progress=lambda *done: calls.append(done))
    assert not calls


def with_bad_image(data, tmp_path):
    """A copy of the images, one more beside them that is none."""
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "tree" / "zz.png").write_bytes(b"not an image")
    return copied


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_build_and_are_named(model, data, tmp_path, workers):
    message = (
        r"^1 of 21 images cannot be read, more than the 1.00% allowed. Image 'tree/zz.png' cannot be read: [^\n]*$"
    )
    with pytest.raises(DataError, match=message):
        build_table(model, with_bad_image(data, tmp_path), workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_unreadable_image_is_skipped_counted_and_listed(model, data, tmp_path, workers, batch_size):
    seen = []
    table = build_table(
        model, with_bad_image(data, tmp_path), max_bad=0.05, workers=workers, batch_size=batch_size,
        progress=seen.append,
    )  # fmt: skip
    assert table.images_per_class == (5, 9, 6)
    ((name, reason),) = table.built["bad_images"]
    assert name == "tree/zz.png"
    assert "tree/zz.png' cannot be read" in reason
    assert (seen[-1].done, seen[-1].total, seen[-1].bad) == (21, 21, 1)
    assert_equal_tables(table, build_table(model, data, batch_size=batch_size))


class FailingSource:
    """A store that is gone after its first images."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_source"), name)

    def __len__(self):
        return len(self._source)

    def __reduce__(self):
        return FailingSource, (self._source,)

    def read(self, indices):
        if indices[0] >= 8:
            raise DataError("The store has gone away.")
        return self._source.read(indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_fails_stops_the_build_and_is_no_bad_image(model, data, workers):
    source = FailingSource(ImageFolder.scan(data, model))
    with pytest.raises(DataError, match=r"^The store has gone away\.$"):
        build_table(model, source, batch_size=4, max_bad=1.0, workers=workers)


def assert_equal_tables(one, other):
    """To the last bit."""
    assert one.classes == other.classes
    assert one.images_per_class == other.images_per_class
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        for field in dataclasses.fields(layer):
            mine, theirs = getattr(layer, field.name), getattr(other.layers[name], field.name)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), (name, field.name)


def test_building_twice_gives_the_same_table(model, data):
    one, other = build_table(model, data, seed=3), build_table(model, data, seed=3)
    for name, layer in one.layers.items():
        for field in dataclasses.fields(layer):
            assert torch.equal(getattr(layer, field.name), getattr(other.layers[name], field.name))


def test_normality_may_be_left_out(model, data):
    assert all(layer.normality_p is None for layer in build_table(model, data, normality=False).layers.values())


def test_the_normality_subsample_is_balanced_and_limited(model, data, monkeypatch):
    """With room for 12 of the 20 images: four of each class, the same ones for the same seed."""
    monkeypatch.setattr("parchgrad.build.NORMALITY_IMAGES", 12)
    table = build_table(model, data)
    assert table.built["normality"]["images"] == 12
    features, _ = features_one_by_one(model, data)
    whole = selection.normality_p(features["second"])
    assert np.abs(table.layers["second"].normality_p.numpy() - whole).max() > 1e-3
    again = build_table(model, data)
    assert torch.equal(again.layers["second"].normality_p, table.layers["second"].normality_p)


def test_progress_counts_every_image_and_class(model, data):
    seen = []
    build_table(model, data, batch_size=8, progress=seen.append)
    assert [(now.done, now.classes) for now in seen] == [(0, 0), (8, 2), (16, 3), (20, 3)]
    assert {now.total for now in seen} == {20}


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(model, data, workers):
    assert_equal_tables(build_table(model, data, batch_size=4, workers=workers), build_table(model, data, batch_size=4))


def test_layers_may_be_left_out_by_pattern(model, data):
    table = build_table(model, data, layers=("*", "!first"))
    assert list(table.layers) == ["second"]
    assert table.left_out == ("first",)
    assert table.built["layer_patterns"] == ["*", "!first"]
    whole = build_table(model, data)
    assert torch.equal(table.layers["second"].log_p, whole.layers["second"].log_p)
    Explainer(model, table).explain(torch.zeros(1, 3, 12, 12), 0)
    with pytest.raises(OptionError, match="nosuch"):
        build_table(model, data, layers=("nosuch",))


def test_statistics_after_normalisation_and_activation(model, data):
    """`first` goes through BatchNorm and ReLU, `second` through ReLU alone: features taken there in a plain loop."""
    with torch.no_grad():
        model.module.norm.running_mean.fill_(0.1)
    try:
        table = build_table(model, data, statistics_point="activation")
        found = {"first": [], "second": []}
        with torch.no_grad():
            for folder in ("0", "tree", "bus"):
                for path in sorted((data / folder).glob("*.png")):
                    image = model.preprocessing.apply(Image.open(path).convert("RGB"))[0][None]
                    z = torch.relu(model.module.norm(model.module.first(image)))
                    found["first"].append(z[0].mean((1, 2)).numpy())
                    found["second"].append(torch.relu(model.module.second(z))[0].mean((1, 2)).numpy())
        for name, layer in table.layers.items():
            assert_close(layer.mean, np.mean(found[name], axis=0), 1e-5)
        plain = build_table(model, data)
        assert not torch.allclose(table.layers["first"].mean, plain.layers["first"].mean, rtol=1e-3)
        assert table.statistics_point == "activation"
        with pytest.raises(OptionError, match="class: table 'net' has its statistics after the activation"):
            Explainer(model, table).explain(torch.zeros(1, 3, 12, 12), 0, selection="instance")
    finally:
        model.module.norm.running_mean.zero_()


def test_benjamini_hochberg_adjusts_p_and_keeps_the_order(model, data):
    table, plain = build_table(model, data, control="benjamini_hochberg"), build_table(model, data)
    for name, layer in table.layers.items():
        adjusted = scipy.stats.false_discovery_control(plain.layers[name].log_p.exp().numpy(), axis=1)
        np.testing.assert_allclose(layer.log_p.exp().numpy(), adjusted, rtol=1e-9)
        assert torch.equal(layer.rank, plain.layers[name].rank)
    assert table.built["control"] == "benjamini_hochberg"


def many_images(root, count, first=0):
    """Empty files: what is held out is decided by names."""
    for name in ("tree", "bus"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, count):
            (root / name / f"{i}.png").touch()
    return root


def test_held_out_images_are_a_share_drawn_by_a_seed_each_by_itself(model, tmp_path):
    source = ImageFolder.scan(many_images(tmp_path, 500), model)
    kept = set(hold_out(source, 0.3, seed=3).names)
    assert 0.65 <= len(kept) / len(source) <= 0.75
    assert kept == set(hold_out(source, 0.3, seed=3).names)
    assert kept != set(hold_out(source, 0.3, seed=4).names)
    assert kept > set(hold_out(source, 0.5, seed=3).names)
    grown = ImageFolder.scan(many_images(tmp_path, 600, first=500), model)
    assert set(hold_out(grown, 0.3, seed=3).names) & set(source.names) == kept, "more images change nothing for these"
    assert np.bincount(hold_out(source, 0.999, seed=0).targets).tolist()[2:] == [2, 2], "two of each class stay"


def test_the_callers_model_is_left_as_it_was(model, data):
    before = {name: (len(m._forward_hooks), m.training) for name, m in model.module.named_modules()}
    build_table(model, data)
    assert before == {name: (len(m._forward_hooks), m.training) for name, m in model.module.named_modules()}


def test_images_of_many_sizes_under_the_native_rule(model, tmp_path):
    native = dataclasses.replace(
        model, preprocessing=Preprocessing(size=(12, 12), rule="native", min_side=8, max_side=30)
    )
    for folder, seed in (("cat", 0), ("dog", 1)):
        write_images(tmp_path / folder, 5, seed, sizes=((16, 20), (15, 15), (20, 16)))
    table = build_table(native, tmp_path, batch_size=4)
    alone = build_table(native, tmp_path, batch_size=1)
    for name, layer in table.layers.items():
        assert_close(layer.log_p, alone.layers[name].log_p, 1e-4)
    assert table.images_per_class == (5, 5)


class Twice(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, classes)

    def forward(self, images):
        return self.head(self.conv(self.conv(images)).mean((2, 3)))


def test_a_convolution_that_runs_twice_is_refused(model, data):
    twice = dataclasses.replace(model, module=Twice(4).eval())
    with pytest.raises(UnsupportedModelError, match="'conv' runs twice"):
        build_table(twice, data)


def empty(root):
    pass


def only_files(root):
    write_images(root / "cat", 2, 0)
    for path in (root / "cat").iterdir():
        path.rename(root / path.name)
    (root / "cat").rmdir()


def one_class(root):
    write_images(root / "cat", 3, 0)


def lonely_image(root):
    write_images(root / "cat", 3, 0)
    write_images(root / "dog", 1, 0)


def no_such_class(root):
    write_images(root / "cat", 3, 0)
    write_images(root / "horse", 3, 0)


def same_class_twice(root):
    write_images(root / "cat", 3, 0)
    write_images(root / "0", 3, 0)


def broken_image(root):
    write_images(root / "cat", 3, 0)
    write_images(root / "dog", 3, 0)
    (root / "dog" / "99.png").write_bytes(b"no image")


BAD_FOLDERS = {
    "empty": (empty, "holds no folders of images"),
    "files-only": (only_files, "holds no folders of images"),
    "one-class": (one_class, "holds 1 class; a table contrasts at least 2"),
    "lonely-image": (lonely_image, r"dog' holds 1 image\(s\); a class needs at least 2"),
    "no-such-class": (no_such_class, "horse' is named after no class of model 'net'"),
    "same-class-twice": (same_class_twice, r"second folder of class 0 \(cat\)"),
    "broken-image": (broken_image, "99.png' cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_folder_that_cannot_give_a_table_is_refused(model, tmp_path, case):
    make, message = case
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        build_table(model, tmp_path)


def test_a_path_that_is_no_folder_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="absent"):
        build_table(model, tmp_path / "absent")
    with pytest.raises((DataError, ModelError)):
        build_table(model, __file__)
