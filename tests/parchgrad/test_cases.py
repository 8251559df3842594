"""The pictures chosen for a gallery against what a loop over the values finds."""

import math

import numpy as np
import pytest

from parchgrad.errors import OptionError
from parchgrad.evaluation.cases import choose
from tests.parchgrad.results import picture, results

NAN = math.nan


def reasons(found, method=None, each=2):
    return {index: reason for reason, index in choose(found, method, each)}


def test_best_and_worst_by_mass():
    found = reasons(results({"mosaic_mass": {"ParchGrad": [0.5, 0.9, 0.12, NAN, 0.6, 0.8, 0.3]}}))
    assert found == {
        1: "ParchGrad's best mass on its quarter: 0.90",
        5: "ParchGrad's second best mass on its quarter: 0.80",
        2: "ParchGrad's worst mass on its quarter: 0.12",
        6: "ParchGrad's second worst mass on its quarter: 0.30",
    }


def test_misses_are_those_of_which_the_model_is_surest():
    shown = [picture(i, probability=p) for i, p in enumerate((0.2, 0.9, 0.95, 0.5))]
    found = reasons(results({"mosaic_hits": {"ParchGrad": [0, 0, 1, 0]}}, shown=shown))
    assert found == {
        1: "ParchGrad points to a wrong quarter, though the model gives the class 0.90",
        3: "ParchGrad points to a wrong quarter, where the model gives the class 0.50",
    }, "a surprise only where the model is sure"


def test_a_map_of_zeros_points_nowhere():
    values = {"object_hits": {"ParchGrad": [0, 0, 1]}, "object_mass": {"ParchGrad": [NAN, 0.2, 0.6]}}
    found = reasons(results(values), each=3)
    assert 0 not in found
    assert found[1].endswith("it points beside the object, where the model gives the class 0.50")


def test_without_a_method_it_is_the_row_of_the_results():
    values = {"random map": [0.9, 0.1], "ParchGrad quantile 0.3": [0.5, 0.6]}
    found = choose(results({"mosaic_mass": values}), each=1)
    assert found[0] == ("ParchGrad quantile 0.3's best mass on its quarter: 0.60", 1)
    del values["ParchGrad quantile 0.3"]
    found = choose(results({"mosaic_mass": values | {"gradient": [0.5, 0.6]}}), each=1)
    assert found[0] == ("gradient's best mass on its quarter: 0.60", 1)
    assert choose(results({})) == []


def test_a_picture_chosen_twice_is_shown_once_with_both_reasons():
    values = {"object_mass": {"ParchGrad": [0.1, 0.5, 0.6]}, "object_hits": {"ParchGrad": [0, 1, 1]}}
    assert reasons(results(values), each=1)[0] == (
        "ParchGrad's worst mass on the object: 0.10; it points beside the object, where the model gives the class 0.50"
    )


def test_of_few_pictures_none_is_both_best_and_worst():
    assert list(reasons(results({"insertion": {"ParchGrad": [0.2, 0.4, 0.3]}})).values()) == [
        "ParchGrad's best insertion: 0.40",
        "ParchGrad's second best insertion: 0.30",
        "ParchGrad's worst insertion: 0.20",
    ]
    assert list(reasons(results({"insertion": {"ParchGrad": [0.2]}})).values()) == ["ParchGrad's best insertion: 0.20"]


def test_gains_and_losses_against_the_gradient_and_grad_cam():
    values = {
        "ParchGrad": [0.5, 0.5, 0.5, 0.5, 0.9, 0.1],
        "gradient": [0.4, 0.1, 0.7, 0.5, 0.9, 0.1],
        "Grad-CAM": [0.2, 0.5, 0.5, NAN, 0.9, 0.1],
    }
    found = choose(results({"mosaic_mass": values}), each=1)
    assert found[2:] == [
        ("ParchGrad's largest gain against gradient: mass on its quarter 0.50, gradient 0.10", 1),
        ("ParchGrad's largest loss against gradient: mass on its quarter 0.50, gradient 0.70", 2),
        ("ParchGrad's largest gain against Grad-CAM: mass on its quarter 0.50, Grad-CAM 0.20", 0),
    ], "no loss against Grad-CAM, where ParchGrad is nowhere worse"


def test_gains_are_by_the_first_measure_that_both_have():
    values = {
        "mosaic_mass": {"ParchGrad": [0.5, 0.6], "gradient": [NAN, NAN]},
        "insertion": {"ParchGrad": [0.5, 0.6], "gradient": [0.3, 0.5]},
    }
    assert reasons(results(values))[0] == (
        "ParchGrad's worst mass on its quarter: 0.50; its worst insertion: 0.50; "
        "its largest gain against gradient: insertion 0.50, gradient 0.30"
    )


def test_pictures_are_indices_of_what_was_shown():
    shown = [picture(0), picture(1), picture(2, "photograph"), picture(3, "photograph"), picture(4, "photograph")]
    values = {"object_mass": {"ParchGrad": [0.3, 0.1, 0.2]}}
    found = results(values, shown=shown, pictures={"object_mass": (2, 3, 4)})
    assert [index for _, index in choose(found, each=1)] == [2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_no_picture_twice_and_the_same_again(seed):
    generator = np.random.default_rng(seed)
    names = ("ParchGrad", "gradient", "Grad-CAM")
    values = {
        key: {name: generator.random(12) for name in names} for key in ("mosaic_mass", "object_mass", "insertion")
    }
    values["mosaic_hits"] = {name: generator.integers(0, 2, 12) for name in names}
    found = choose(results(values), each=3)
    indices = [index for _, index in found]
    assert len(set(indices)) == len(indices) > 8
    assert found == choose(results(values), each=3)


def test_nothing_to_choose_by():
    assert choose(results({"gini": {"ParchGrad": [0.5, 0.4]}})) == []
    assert choose(results({"mosaic_mass": {"ParchGrad": [NAN, NAN]}})) == []


def test_a_method_that_was_not_measured_is_refused():
    with pytest.raises(OptionError, match="'method' is 'ParchGrad'; allowed: gradient"):
        choose(results({"mosaic_mass": {"gradient": [0.5, 0.4]}}), "ParchGrad")
    with pytest.raises(OptionError, match="each"):
        choose(results({"mosaic_mass": {"ParchGrad": [0.5, 0.4]}}), each=0)
