"""The bundled model's maps find what they are asked for: a smaller run of `make figures`, with its control."""

import pytest

from parchgrad.evaluation.compare import compare, standard_methods
from parchgrad.explainer import Explainer
from parchgrad.models import load_model
from parchgrad.tables import load_table
from scenes.evaluate import mosaics, singles


@pytest.fixture(scope="module")
def model():
    return load_model("models/scenes")


def scores(model, pictures):
    methods = standard_methods(Explainer(model, load_table("selection_tables/scenes", model)))
    wanted = ("gradient", "ParchGrad", "ParchGrad, random channels")
    return {s.method: s for s in compare({name: methods[name] for name in wanted}, pictures)}


def test_on_mosaics_the_map_lies_in_the_targets_quarter(model):
    found = scores(model, mosaics(model, 48, 128))
    assert found["ParchGrad"].mass > 0.6
    assert found["ParchGrad"].hits > 0.8
    assert found["ParchGrad"].mass > found["gradient"].mass + 0.25
    assert found["ParchGrad, random channels"].mass < found["gradient"].mass


def test_on_single_scenes_the_map_lies_on_the_object(model):
    found = scores(model, singles(model, 48, 128))
    assert found["ParchGrad"].mass > 0.5
    assert found["ParchGrad"].mass > found["gradient"].mass + 0.15
    assert found["ParchGrad, random channels"].mass < found["gradient"].mass
