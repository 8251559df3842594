"""The golden record: the same model and table reproduce it, any other is refused."""

import dataclasses

import pytest
import torch

from parchgrad import golden
from parchgrad.errors import GoldenError
from parchgrad.explainer import Explainer
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from parchgrad.tables import SelectionTable, load_table


@pytest.fixture
def explainer(tmp_path):
    torch.manual_seed(0)
    architecture = "tests.parchgrad.factories:small"
    folder = add_model(
        "net", architecture=architecture, weights=build_network(architecture, 4).state_dict(), labels=list("abcd"),
        preprocessing=Preprocessing(size=(24, 20), resize=24), models_dir=tmp_path / "models",
    )  # fmt: skip
    model = load_model(folder)
    SelectionTable.random(model, [2, 0], 0).with_defaults(quantile=0.4).save(tmp_path / "table")
    return Explainer(model, load_table(tmp_path / "table", model))


def test_what_was_recorded_is_reproduced(explainer, tmp_path):
    path = golden.record(explainer, tmp_path / "table")
    assert path == tmp_path / "table" / "golden.safetensors"
    golden.check(explainer, tmp_path / "table")
    load_table(tmp_path / "table")


def test_without_a_record_there_is_no_check(explainer, tmp_path):
    with pytest.raises(GoldenError, match=r"has no golden.safetensors"):
        golden.check(explainer, tmp_path / "table")


def test_an_unreadable_record_is_refused(explainer, tmp_path):
    golden.record(explainer, tmp_path).write_bytes(b"hello" * 20)
    with pytest.raises(GoldenError, match="cannot be read"):
        golden.check(explainer, tmp_path)


def test_another_table_is_refused_by_digest(explainer, tmp_path):
    golden.record(explainer, tmp_path)
    other = dataclasses.replace(explainer.table, table_sha256="0" * 64)
    with pytest.raises(GoldenError, match=r"table_sha256 is \w{64}, loaded is 0{64}"):
        golden.check(Explainer(explainer.model, other), tmp_path)


def test_weights_changed_after_loading_are_noticed(explainer, tmp_path):
    golden.record(explainer, tmp_path)
    with torch.no_grad():
        explainer.model.module.second.weight.mul_(-1.0)
    with pytest.raises(GoldenError, match=r"is off by .*allowed"):
        golden.check(Explainer(explainer.model, explainer.table), tmp_path)


def test_rows_changed_after_loading_are_noticed(explainer, tmp_path):
    """Same digest, other channels: only the map can tell."""
    golden.record(explainer, tmp_path)
    other = SelectionTable.random(explainer.model, [2, 0], 1).with_defaults(quantile=0.4)
    other = dataclasses.replace(other, table_sha256=explainer.table.table_sha256)
    with pytest.raises(GoldenError, match="saliency map is off by"):
        golden.check(Explainer(explainer.model, other), tmp_path)


def test_a_bare_module_has_no_record(explainer, tmp_path):
    with pytest.raises(GoldenError, match="bare module"):
        golden.record(Explainer(explainer.model.module, explainer.table), tmp_path)
