"""Selection tables: choosing channels as the oracle does, a faithful round trip, and every corruption refused."""

import dataclasses
import hashlib
import json
import math
import shutil
import threading
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parchgrad.defaults import Defaults
from parchgrad.errors import OptionError, TableError, UncoveredTargetError
from parchgrad.files import new_folder
from parchgrad.quantiles import channels_of_quantile, quantile_of_layers
from parchgrad.selection import best_ranked, by_class, by_instance
from parchgrad.statistics import ClassMoments
from parchgrad.tables import LayerTable, SelectionTable, load_table
from tests.oracles import selection
from tests.oracles.tolerance import assert_close
from tests.parchgrad.networks import build, layer_table, table_for


@pytest.mark.parametrize(
    ("quantile", "channels", "expected"),
    [(0.1, 64, 6), (0.1, 10, 1), (0.1, 9, 1), (0.1, 1, 1), (0.1, 30, 3), (0.5, 3, 1), (0.99, 100, 99), (1.0, 7, 7),
     (1e-9, 500, 1), (0.05, 128, 6), (0.7, 10, 7), (0.3, 10, 3)],
)  # fmt: skip
def test_a_quantile_is_a_floor_but_never_nothing(quantile, channels, expected):
    assert channels_of_quantile(quantile, channels) == expected == selection.how_many(quantile, channels)


def random_rows(seed, images=4, channels=9):
    """Rows with ties in log p, as dead channels make them."""
    generator = np.random.default_rng(seed)
    log_p = -generator.integers(0, 5, (images, channels)).astype(float)
    t = generator.integers(0, 3, (images, channels)).astype(float)
    rank = np.array([selection.ranks(row, other) for row, other in zip(log_p, t, strict=True)])
    return torch.from_numpy(log_p), torch.from_numpy(rank.astype(np.int16))


@given(
    seed=st.integers(0, 10_000),
    quantiles=st.lists(st.sampled_from([0.01, 0.1, 0.34, 0.5, 0.8, 1.0]), min_size=4, max_size=4),
    alphas=st.lists(st.sampled_from([None, 1e-3, math.exp(-2.0), 0.05, 1.0]), min_size=4, max_size=4),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_class_wise_choice_equals_the_oracle_image_by_image(seed, quantiles, alphas):
    log_p, rank = random_rows(seed)
    count = torch.tensor([channels_of_quantile(q, 9) for q in quantiles])
    log_alpha = torch.tensor([math.nan if a is None else math.log(a) for a in alphas], dtype=torch.float64)
    chosen = by_class(rank, log_p, count, log_alpha)
    for image in range(4):
        expected = selection.by_class(log_p[image], rank[image], quantile=quantiles[image], alpha=alphas[image])
        assert chosen[image].tolist() == expected


@given(
    seed=st.integers(0, 10_000),
    quantiles=st.lists(st.sampled_from([0.01, 0.1, 0.34, 0.5, 0.8, 1.0]), min_size=4, max_size=4),
    alphas=st.lists(st.sampled_from([None, 1e-3, 0.05, 0.5, 1.0]), min_size=4, max_size=4),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_instance_wise_choice_equals_the_oracle_image_by_image(seed, quantiles, alphas):
    generator = np.random.default_rng(seed)
    gap = np.round(np.abs(generator.normal(0.5, 1.0, (4, 9))), 1)
    mean, std = np.round(generator.random(9), 1), np.round(generator.random(9) * 2, 0)
    count = torch.tensor([channels_of_quantile(q, 9) for q in quantiles])
    log_alpha = torch.tensor([math.nan if a is None else math.log(a) for a in alphas], dtype=torch.float64)
    chosen = by_instance(*map(torch.from_numpy, (gap, mean, std)), count, log_alpha)
    for image in range(4):
        expected = selection.by_instance(gap[image], mean, std, quantile=quantiles[image], alpha=alphas[image])
        assert chosen[image].tolist() == expected


def test_alpha_includes_its_own_value_in_both_selections():
    """`<=` in both (the research code has `<` for instances)."""
    log_p = torch.tensor([[math.log(0.05), math.log(0.05) - 1e-9, math.log(0.05) + 1e-9]], dtype=torch.float64)
    unused, log_alpha = torch.tensor([1]), torch.tensor([math.log(0.05)], dtype=torch.float64)
    assert by_class(torch.tensor([[1, 0, 2]]), log_p, unused, log_alpha).tolist() == [[True, True, False]]
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    half = torch.special.log_ndtr(torch.zeros(1, dtype=torch.float64))  # z = 0 has exactly this p
    chosen = by_instance(torch.tensor([[0.0, 1e-6, -1e-6]], dtype=torch.float64), zero, one, unused, half)
    assert chosen.tolist() == [[True, True, False]]


def test_alpha_may_select_nothing():
    log_p = torch.full((1, 3), -1.0, dtype=torch.float64)
    chosen = by_class(torch.tensor([[0, 1, 2]]), log_p, torch.tensor([1]), torch.tensor([-9.0], dtype=torch.float64))
    assert not chosen.any()


def test_a_channel_without_spread_is_never_selected_by_instance():
    gap, zero = torch.tensor([[9.0, 0.1]], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for count, log_alpha in ((2, math.nan), (1, 0.0)):
        chosen = by_instance(
            gap, torch.zeros(2).double(), zero, torch.tensor([count]), torch.tensor([log_alpha]).double()
        )
        assert chosen.tolist() == [[False, True]]


def test_layer_table_from_moments_equals_the_oracle():
    generator = np.random.default_rng(3)
    labels = generator.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    features = np.abs(generator.normal(labels[:, None] * 0.3, 1.0 + labels[:, None], (60, 6)))
    moments = ClassMoments(3, 6)
    moments.update(features, labels)
    layer = LayerTable.from_moments(moments, features[:40])
    for c in range(3):
        t, log_p = selection.welch(features, labels, c)
        np.testing.assert_allclose(layer.log_p[c], log_p, rtol=1e-9)
        assert layer.rank[c].tolist() == selection.ranks(log_p, t)
    assert_close(layer.mean, features.mean(0), 1e-12)
    assert_close(layer.std, features.std(0, ddof=1), 1e-12)
    assert_close(layer.normality_p, selection.normality_p(features[:40]), 1e-9)


def test_rows_follow_the_targets_one_by_one():
    table = table_for(build(), covered=(4, 0, 2))
    assert table.rows(torch.tensor([2, 4, 4, 0])).tolist() == [2, 0, 0, 1]
    with pytest.raises(
        UncoveredTargetError, match=r"'made-up' covers 3 of the model's 5 classes.*target 1 \(class 1\)"
    ):
        table.rows(torch.tensor([2, 1]))


def test_a_quantile_schedule_takes_the_first_glob_that_fits():
    names = ["stem", "left", "right", "join"]
    chosen = quantile_of_layers({"l*": 0.5, "join": 0.3, "*": 0.1}, names)
    assert chosen == {"stem": 0.1, "left": 0.5, "right": 0.1, "join": 0.3}
    assert quantile_of_layers(0.2, names) == dict.fromkeys(names, 0.2)
    with pytest.raises(OptionError, match="a value for every layer; 'stem' has none"):
        quantile_of_layers({"l*": 0.5}, names)


@pytest.mark.parametrize(
    ("quantile", "channels", "expected"),
    [
        (0.29, 100, 29),
        (0.58, 50, 29),
        (float(np.float32(0.7)), 10, 7),
        (0.1, 9, 1),
        (1e-9, 512, 1),
        (1.0, 7, 7),
        (0.999, 512, 511),
    ],
)
def test_a_quantile_counts_as_the_decimal_it_was_written_as(quantile, channels, expected):
    assert channels_of_quantile(quantile, channels) == expected


def test_random_tables_are_seeded_orders_without_meaning():
    model = build()
    first, again, other = (SelectionTable.random(model, [3, 1], seed) for seed in (0, 0, 1))
    assert first.classes == (3, 1)
    assert list(first.layers) == ["stem", "left", "right", "join"]
    for name, layer in first.layers.items():
        assert torch.equal(layer.rank, again.layers[name].rank)
        assert layer.rank.shape == (2, getattr(model, name).out_channels)
        for row in layer.rank:
            assert sorted(row.tolist()) == list(range(layer.channels))
    assert any(not torch.equal(first.layers[n].rank, other.layers[n].rank) for n in first.layers)
    join = first.layers["join"].rank
    assert not torch.equal(join[0], join[1]), "every class has its own order"
    assert len(SelectionTable.random(model, 4, 0).classes) == 4


@pytest.fixture
def saved(tmp_path):
    """A saved table and its folder."""
    schedule = {"join": 0.25, "*": 0.5}
    table = table_for(build(), covered=(4, 0, 2), quantile=schedule, conserve="exact", gamma=2.5, layers=("left", "j*"))
    return table.save(tmp_path / "made-up" / "3"), tmp_path / "made-up" / "3"


def test_what_is_saved_is_what_is_loaded(saved):
    table, folder = saved
    for loaded in (load_table(folder), load_table(folder.parent), load_table(str(folder))):
        assert (
            loaded.defaults
            == table.defaults
            == Defaults(quantile={"join": 0.25, "*": 0.5}, conserve="exact", gamma=2.5, layers=("left", "j*"))
        )
        for name in (
            "name",
            "version",
            "model_name",
            "weights_sha256",
            "labels",
            "classes",
            "images_per_class",
            "built",
        ):
            assert getattr(loaded, name) == getattr(table, name), name
        assert list(loaded.layers) == list(table.layers), "layer order"
        for name, layer in table.layers.items():
            for field in dataclasses.fields(layer):
                assert torch.equal(getattr(loaded.layers[name], field.name), getattr(layer, field.name))
        assert loaded.table_sha256 == hashlib.sha256((folder / "table.safetensors").read_bytes()).hexdigest()


def test_infinite_gamma_and_missing_normality_survive_strict_json(tmp_path):
    SelectionTable.random(build(), 3, 0).save(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "manifest.json").read_text(), parse_constant=refuse)
    loaded = load_table(tmp_path)
    assert loaded.defaults.gamma == math.inf
    assert loaded.layers["stem"].normality_p is None


def test_p_values_beyond_float_range_survive(tmp_path):
    table = table_for(build())
    layer = table.layers["stem"]
    log_p = layer.log_p.sort(1).values
    log_p[:, 0], log_p[:, 1] = -math.inf, -123456.789
    rank = torch.arange(8, dtype=torch.int16).expand(5, 8).contiguous()
    table.layers["stem"] = dataclasses.replace(layer, log_p=log_p, rank=rank)
    table.save(tmp_path)
    assert torch.equal(load_table(tmp_path).layers["stem"].log_p, log_p)


def test_the_highest_version_is_taken_as_a_number(tmp_path):
    for version in ("2", "10", "9"):
        dataclasses.replace(table_for(build()), version=version).save(tmp_path / version)
    (tmp_path / "11-draft").mkdir()
    assert load_table(tmp_path).version == "10"


def test_saving_again_replaces_and_leaves_no_scraps(saved):
    table, folder = saved
    table.with_defaults(gamma=7.0).save(folder)
    assert load_table(folder).defaults.gamma == 7.0
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "table.safetensors"]


def edit_manifest(change):
    """A corruption of manifest.json: `change(manifest)` in place."""

    def corrupt(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return corrupt


def edit_tensors(change):
    """A corruption of the tensors under a right digest: `change(tensors)` in place."""

    def corrupt(folder):
        path = folder / "table.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {key: value.clone() for key, value in load_file(path).items()}
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
        digest = hashlib.sha256((folder / "table.safetensors").read_bytes()).hexdigest()
        edit_manifest(lambda m: m.update(table_sha256=digest))(folder)

    return corrupt


def drop(*keys):
    return edit_manifest(lambda m: [m.pop(key) for key in keys])


def put(**values):
    return edit_manifest(lambda m: m.update(values))


def default(**values):
    return edit_manifest(lambda m: m["defaults"].update(values))


def tensor(name, function):
    return edit_tensors(lambda t: t.update({name: function(t[name])}))


def poke(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return edit_tensors(change)


def edit_layout(change):
    """A corruption of the layers that the tensors themselves name, under a right digest."""

    def corrupt(folder):
        path = folder / "table.safetensors"
        with safe_open(path, framework="pt") as file:
            layers = json.loads(file.metadata()["layers"])
        change(layers)
        save_file(load_file(path), path, {"layers": json.dumps(layers)})
        edit_manifest(lambda m: m.update(table_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))(folder)

    return corrupt


def swap_layers(layers):
    """Two layers of one width, in the order of another network."""
    layers[1], layers[2] = layers[2], layers[1]


def flip_byte(folder):
    path = folder / "table.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = folder / "table.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(lambda m: m.update(table_sha256=digest))(folder)


def duplicate_layer(manifest):
    manifest["layers"].append(manifest["layers"][0])


CORRUPTIONS = {
    "format-version": (put(format_version=1), r"format version 1.*reads 2"),
    "format-version-text": (put(format_version="2"), r"format version '2'.*reads 2"),
    "no-format-version": (drop("format_version"), "no format_version"),
    "manifest-not-json": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json' cannot be read"),
    "manifest-a-list": (lambda f: (f / "manifest.json").write_text("[]"), "no format_version"),
    "manifest-not-utf8": (lambda f: (f / "manifest.json").write_bytes(b'{"name": "\xff"}'), "cannot be read"),
    "no-manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "no-tensors": (lambda f: (f / "table.safetensors").unlink(), "has no table.safetensors"),
    "changed-byte": (flip_byte, r"'made-up'.*sha256 \w{64}.*manifest says \w{64}"),
    "truncated": (truncate, "'made-up'.*not a safetensors file"),
    "not-safetensors": (
        lambda f: (
            (f / "table.safetensors").write_bytes(b"hello" * 20),
            put(table_sha256=hashlib.sha256(b"hello" * 20).hexdigest())(f),
        ),
        "'made-up'.*not a safetensors file",
    ),
    "missing-layer": (edit_layout(lambda layers: layers.pop(1)), r"'made-up'.*has layer \('right', 8\) where.*'left'"),
    "swapped-layers": (
        edit_layout(swap_layers),
        r"'made-up'.*has layer \('right', 8\) where its manifest has \('left'",
    ),
    "no-layout": (edit_layout(lambda layers: layers.clear()), r"'made-up'.*has layer None where"),
    "missing-field": (edit_tensors(lambda t: t.pop("std")), "'made-up' has no 'std'"),
    "layer-not-in-manifest": (edit_manifest(lambda m: m["layers"].pop(1)), "left"),
    "duplicate-layer": (edit_manifest(duplicate_layer), r"'made-up'.*has layer None where its manifest has \('stem'"),
    "wrong-channel-count": (edit_manifest(lambda m: m["layers"][3].update(channels=13)), r"'join', 12\).*'join', 13\)"),
    "no-channel-count": (edit_manifest(lambda m: m["layers"][3].pop("channels")), "'made-up'.*channels"),
    "wrong-shape-rows": (
        tensor("log_p", lambda x: x[:2]),
        r"'stem': 'log_p' is .*\(2, 8\), expected .*\(3, 8\)",
    ),
    "wrong-shape-rank": (tensor("rank", lambda x: x[:, :-1]), r"'rank' has shape \(3, 35\).* 36 channels together"),
    "wrong-shape-mean": (tensor("mean", lambda x: x[:-1]), r"'mean' has shape \(35,\).* 36 channels together"),
    "wrong-shape-scalar": (tensor("log_p", lambda x: x[0, 0]), r"'log_p' has shape \(\)"),
    "wrong-shape-vector": (tensor("log_p", lambda x: x[0]), r"'stem': 'log_p' is .*\(8,\)"),
    "wrong-type": (tensor("log_p", lambda x: x.float()), "'stem': 'log_p' is torch.float32.*expected torch.float64"),
    "wrong-rank-type": (tensor("rank", lambda x: x.long()), "'stem': 'rank' is torch.int64.*expected torch.int16"),
    "nan-mean": (poke("mean", 30, math.nan), "'join': 'mean' and 'std' are not all finite"),
    "infinite-mean": (poke("mean", 30, math.inf), "'join': 'mean' and 'std' are not all finite"),
    "negative-std": (poke("std", 30, -1.0), "'join':.*a std is negative"),
    "nan-normality": (poke("normality_p", 30, math.nan), "'join': 'normality_p' holds NaN"),
    "statistics-point": (put(statistics_point="everywhere"), "'made-up': statistics_point is 'everywhere'"),
    "instance-default-after-activation": (
        edit_manifest(lambda m: (m.update(statistics_point="activation"), m["defaults"].update(selection="instance"))),
        "'made-up': default selection 'instance' needs",
    ),
    "class-outside": (put(classes=[4, 0, 5]), r"class 5 is outside 0\.\.4"),
    "class-repeats": (put(classes=[4, 0, 4]), "classes are empty or repeat"),
    "class-is-text": (put(classes=["4", "0", "2"]), "'made-up'"),
    "no-classes": (put(classes=[]), "classes are empty or repeat"),
    "too-few-classes": (put(classes=[4, 0], images_per_class=[20, 20]), r"\(3, 8\), expected .*\(2, 8\)"),
    "images-per-class": (put(images_per_class=[20, 20]), "images_per_class has 2 entries, expected 3"),
    "no-layers": (put(layers=[]), "no layers"),
    "layers-are-text": (put(layers="stem"), "'made-up'.*malformed"),
    "model-is-text": (put(model="stem"), "'made-up'.*malformed"),
    "unknown-default": (default(colour="blue"), "'made-up'.*malformed.*colour"),
    "bad-quantile-default": (default(quantile=1.5), "'made-up'.*quantile.*1.5"),
    "bad-gamma-default": (default(gamma=-1.0), "'made-up'.*gamma.*-1"),
    "nan-gamma-default": (default(gamma="nan"), "'made-up'.*gamma.*nan"),
    "bad-conserve-default": (default(conserve="sometimes"), "'made-up'.*conserve.*sometimes"),
    "bad-selection-default": (default(selection="none"), "'made-up'.*selection.*none"),
    "unknown-layer-default": (default(layers=["stme"]), "'made-up'.*stme"),
    "unknown-layer-in-schedule": (default(quantile={"stme": 0.1, "*": 0.1}), "'made-up'.*stme"),
    **{
        f"no-{key}": (drop(key), f"no '{key}'")
        for key in (
            "name",
            "version",
            "model",
            "table_sha256",
            "layers",
            "labels",
            "classes",
            "images_per_class",
            "defaults",
            "built",
            "idle_layers",
            "left_out",
            "statistics_point",
        )
    },
}

# What opening a table does not read; `parchgrad table verify` does.
WRONG_VALUES = {
    "nan-log-p": (poke("log_p", (1, 30), math.nan), "'join': 'log_p' holds NaN"),
    "positive-log-p": (poke("log_p", (1, 30), 0.5), "'join': a log p-value is positive, 0.5"),
    "rank-repeats": (tensor("rank", lambda x: x.clamp(max=5)), "'stem': 'rank' is not an order of its 8 channels"),
    "rank-negative": (tensor("rank", lambda x: x - 1), "'stem': 'rank' is not an order"),
    "rank-reversed": (
        tensor("rank", lambda x: torch.cat([7 - x[:, :8], x[:, 8:]], 1)),
        "'stem': 'rank' does not follow the log p-values",
    ),
}


@pytest.mark.parametrize("corruption", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values_under_a_right_digest_are_found(saved, corruption):
    corrupt, message = corruption
    corrupt(saved[1])
    loaded = load_table(saved[1])
    with pytest.raises(TableError, match=message):
        loaded.check_values()


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_corrupt_table_is_refused_by_name(saved, corruption):
    corrupt, message = corruption
    corrupt(saved[1])
    with pytest.raises(TableError, match=message):
        load_table(saved[1])


def package(module=None, **changes):
    """What a table sees of a model package."""
    module = build() if module is None else module
    labels = tuple(f"class {c}" for c in range(5))
    return types.SimpleNamespace(
        **{"name": "net", "weights_sha256": "a" * 64, "labels": labels, "module": module, **changes}
    )


def wider():
    model = build()
    model.join = torch.nn.Conv2d(8, 16, 3, padding=1)
    return model


def without_left():
    model = build()
    model.left = torch.nn.Identity()
    return model


def with_extra():
    model = build()
    model.extra = torch.nn.Conv2d(12, 4, 1)
    return model


SWAPPED = ("class 0", "class 1", "class 3", "class 2", "class 4")
OTHER_MODELS = {
    "name": ({"name": "other"}, "model is 'net', the model's is 'other'"),
    "weights": ({"weights_sha256": "b" * 64}, "weights_sha256 is 'a{64}', the model's is 'b{64}'"),
    "class-order": ({"labels": SWAPPED}, "class 2 is 'class 2', the model's is 'class 3'"),
    "class-count": ({"labels": SWAPPED[:4]}, "number of classes is 5, the model's is 4"),
    "channels": ({"module": wider()}, "layer 'join' has 12 channels, the model has 16"),
    "no-such-layer": ({"module": without_left()}, "layer 'left' is not a convolution of the model"),
    "more-layers": ({"module": with_extra()}, "extra"),
}


@pytest.mark.parametrize("case", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_a_table_of_another_model_is_refused(tmp_path, case):
    changes, message = case
    table = dataclasses.replace(table_for(build()), model_name="net", weights_sha256="a" * 64).save(tmp_path)
    table.check_model(package())
    load_table(tmp_path, model=package())
    with pytest.raises(TableError, match=message):
        table.check_model(package(**changes))
    with pytest.raises(TableError, match=message):
        load_table(tmp_path, model=package(**changes))


@pytest.mark.parametrize("field", ["mean", "std", "normality_p"])
def test_a_table_made_in_memory_is_checked_too(field):
    layer = layer_table(8, 5, 0)
    broken = dataclasses.replace(layer, **{field: getattr(layer, field) * math.nan})
    table = table_for(build())
    with pytest.raises(TableError, match=f"'stem'.*{field}"):
        dataclasses.replace(table, layers={**table.layers, "stem": broken})


def test_a_table_of_wrong_values_is_not_saved(tmp_path):
    layer = layer_table(8, 5, 0)
    table = table_for(build())
    table = dataclasses.replace(
        table, layers={**table.layers, "stem": dataclasses.replace(layer, log_p=layer.log_p * math.nan)}
    )
    with pytest.raises(TableError, match="'stem': 'log_p' holds NaN"):
        table.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_layers_left_out_are_not_missed(tmp_path):
    model = build()
    table = table_for(model)
    few = {name: layer for name, layer in table.layers.items() if name != "left"}
    with pytest.raises(TableError, match="no layer 'left'"):
        dataclasses.replace(table, layers=few).check_layers(model)
    left_out = dataclasses.replace(table, layers=few, left_out=("left",)).save(tmp_path)
    left_out.check_layers(model)
    assert load_table(tmp_path).left_out == ("left",)


def test_ranks_of_a_loaded_table_are_one_piece_of_the_file(saved):
    """The layers are views of it: a class's ranks lie together, and nothing is copied."""
    loaded = load_table(saved[1])
    assert loaded.rank.shape == (3, 36)
    assert loaded.rank.untyped_storage().data_ptr() == loaded.layers["stem"].rank.untyped_storage().data_ptr()
    for table in (loaded, saved[0]):
        assert torch.equal(table.rank, torch.cat([layer.rank for layer in table.layers.values()], 1))
    mixed = dataclasses.replace(loaded, layers=dict(reversed(list(loaded.layers.items()))))
    assert torch.equal(mixed.rank, torch.cat([layer.rank for layer in mixed.layers.values()], 1))


@pytest.mark.parametrize("rows", [1, 3])
def test_best_ranked_is_by_class_layer_by_layer(rows):
    table = table_for(build(), covered=tuple(range(rows)))
    widths = [layer.channels for layer in table.layers.values()]
    targets = torch.tensor([rows - 1, 0, rows - 1, rows // 2])
    count = torch.tensor([[1, 0, 8, 3], [2, 2, 2, 2], [0, 0, 0, 0], [8, 8, 8, 12]])
    masks = best_ranked(table.rank, targets, count, widths)
    for i, layer in enumerate(table.layers.values()):
        assert torch.equal(masks[i], by_class(layer.rank[targets], None, count[:, i], torch.full((4,), math.nan)))


def test_a_table_replaced_while_it_is_opened_is_one_of_the_two(tmp_path):
    """Its digest, its defaults and its values are of one table, however fast another process exchanges them."""
    folder = tmp_path / "1"
    ranks = {}
    for seed in (0, 1):
        with new_folder(tmp_path / f"made{seed}") as staged:
            saved = SelectionTable.random(build(), 3, seed).with_defaults(quantile=0.1 + seed / 2).save(staged)
        ranks[saved.table_sha256] = saved.rank.clone(), saved.defaults.quantile
    stop = threading.Event()

    def exchange():
        turn = 0
        while not stop.is_set():
            with new_folder(folder) as staged:
                shutil.copytree(tmp_path / f"made{turn % 2}", staged, dirs_exist_ok=True)
            turn += 1

    shutil.copytree(tmp_path / "made0", folder)
    writer = threading.Thread(target=exchange)
    writer.start()
    seen, refused = set(), []
    try:
        for _ in range(300):
            try:
                loaded = load_table(folder)
            except TableError as error:
                refused.append(str(error))
                continue
            rank, quantile = ranks[loaded.table_sha256]
            assert torch.equal(loaded.rank, rank)
            assert loaded.defaults.quantile == quantile
            seen.add(loaded.table_sha256)
    finally:
        stop.set()
        writer.join()
    assert len(seen) == 2
    assert all("replaced faster than it can be opened" in reason for reason in refused)
