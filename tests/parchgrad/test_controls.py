"""A control is the same table but for what it tests: each class's order of channels, or whose they are."""

import pytest
import torch

from parchgrad.build import build_table
from parchgrad.defaults import Defaults
from parchgrad.evaluation.controls import random_control, shuffled_classes
from parchgrad.explainer import Explainer
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing
from tests.oracles.tolerance import relative_l2
from tests.parchgrad.networks import batch, build, table_for
from tests.parchgrad.test_build import write_images


def test_a_random_control_is_drawn_from_its_seed():
    model = build()
    explainer = Explainer(model, table_for(model, quantile=0.3))

    def maps(by):
        return by.explain(batch(2), [1, 3], quantile=0.4).saliency()

    control = maps(random_control(explainer, 0))
    assert torch.equal(maps(random_control(explainer, 0)), control)
    assert relative_l2(maps(random_control(explainer, 1)), control) > 0.05
    assert relative_l2(control, maps(explainer)) > 0.05


@pytest.mark.parametrize("make", [random_control, shuffled_classes])
@pytest.mark.parametrize("covered", [(4, 0, 2), (0, 2)], ids=str)
def test_a_control_covers_the_same_classes(covered, make):
    model = build()
    control = make(Explainer(model, table_for(model, covered=covered)), 0)
    assert control.table.classes == covered
    assert control.explain(batch(2), [0, 2]).saliency().isfinite().all()


@pytest.mark.parametrize("make", [random_control, shuffled_classes])
def test_a_control_follows_a_table_with_a_normality_filter(tmp_path, make):
    architecture, labels = "tests.parchgrad.factories:small", ["cat", "dog", "tree", "bus", "fish"]
    model = load_model(
        add_model(
            "net", architecture=architecture, weights=build_network(architecture, 5).state_dict(), labels=labels,
            preprocessing=Preprocessing(size=(12, 10), resize=14), models_dir=tmp_path / "models",
        )
    )  # fmt: skip
    for seed, label in enumerate(labels[:3]):
        write_images(tmp_path / "images" / label, 3, seed)
    table = build_table(model, tmp_path / "images", defaults=Defaults(normality_filter=True))
    control = make(Explainer(model, table), 0)
    assert control.table.defaults == table.defaults
    assert control.explain(torch.randn(2, 3, 12, 10), [0, 1]).saliency().isfinite().all()
