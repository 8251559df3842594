"""Comparing methods: scores against hand counts, Grad-CAM against its formula, mosaics of a folder."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parchgrad.build import ImageFolder, build_table
from parchgrad.errors import OptionError
from parchgrad.evaluation.compare import Picture, compare, grad_cam, mosaics_of, standard_methods
from parchgrad.explainer import Explainer
from parchgrad.models import add_model, build_network, load_model
from parchgrad.preprocessing import Preprocessing, read_image
from parchgrad.tables import Defaults
from tests.oracles.tolerance import assert_close, assert_each_close, relative_l2
from tests.parchgrad.networks import batch, build, table_for
from tests.parchgrad.test_build import write_images


def pictures(count=5):
    """Pictures whose mask is the left column of 2 x 2."""
    mask = np.array([[True, False], [True, False]])
    return [Picture(torch.full((3, 2, 2), float(i)), i % 2, mask) for i in range(count)]


def test_scores_are_means_over_the_pictures():
    """Maps known by hand: mass 3/4 and a hit, mass 1/4 and no hit, and none at all, by the picture's number."""
    right = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    wrong = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    maps = [right, wrong, right, torch.zeros(2, 2), right]

    def method(images, targets):
        assert targets == [int(i) % 2 for i in images[:, 0, 0, 0]]
        return torch.stack([maps[int(i)] for i in images[:, 0, 0, 0]])

    seen = []
    (score,) = compare(
        {"mine": method}, pictures(), batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    mass, hits = np.array([0.75, 0.25, 0.75, 0.0, 0.75]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    assert (score.method, score.pictures) == ("mine", 5)
    assert score.mass == pytest.approx(mass.mean())
    assert score.mass_error == pytest.approx(mass.std() / math.sqrt(5))
    assert score.hits == pytest.approx(hits.mean())
    assert score.hits_error == pytest.approx(hits.std() / math.sqrt(5))
    assert score.gini == pytest.approx(0.625)
    assert seen[-1] == (5, 5)


def test_every_method_sees_every_picture():
    calls = {"one": [], "other": []}

    def method(name):
        def maps(images, targets):
            calls[name] += images[:, 0, 0, 0].tolist()
            return torch.ones(len(images), 2, 2)

        return maps

    scores = compare({name: method(name) for name in calls}, pictures(), batch_size=3)
    assert [s.method for s in scores] == ["one", "other"]
    assert calls["one"] == calls["other"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_standard_methods_are_what_they_say():
    model = build()
    table = table_for(model, quantile=0.3)
    explainer, images, targets = Explainer(model, table), batch(2), [1, 3]
    methods = standard_methods(explainer, cam_layer="join", quantile=0.4)
    plain = {"rule": False}
    expected = {
        "gradient": plain,
        "input x gradient": {**plain, "method": "input_x_gradient"},
        "integrated gradients (25)": {**plain, "method": "integrated_gradients", "steps": 25},
        "ParchGrad": {"quantile": 0.4},
    }
    for name, options in expected.items():
        assert_each_close(
            methods[name](images, targets), explainer.explain(images, targets, **options).saliency(), 1e-12
        )
    control = methods["ParchGrad, random channels"](images, targets)
    assert relative_l2(control, methods["ParchGrad"](images, targets)) > 0.05
    again = standard_methods(explainer, seed=0, quantile=0.4)["ParchGrad, random channels"](images, targets)
    other = standard_methods(explainer, seed=1, quantile=0.4)["ParchGrad, random channels"](images, targets)
    assert torch.equal(again, control)
    assert relative_l2(other, control) > 0.05
    assert "Grad-CAM" in methods
    assert "Grad-CAM" not in standard_methods(explainer)


@pytest.mark.parametrize("covered", [(4, 0, 2), (0, 2)], ids=str)
def test_the_control_covers_the_same_classes(covered):
    model = build()
    methods = standard_methods(Explainer(model, table_for(model, covered=covered)))
    assert methods["ParchGrad, random channels"](batch(2), [0, 2]).isfinite().all()


def test_grad_cam_equals_its_formula():
    """relu of the activations' sum weighted by their mean gradients, enlarged to the image."""
    model = build()
    images, targets = batch(2), [1, 3]
    kept = []
    handle = model.join.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = model(images)
    handle.remove()
    (grad,) = torch.autograd.grad(logits[range(2), targets].sum(), kept[0])
    cam = F.relu((grad.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True)).detach()
    expected = F.interpolate(cam, images.shape[2:], mode="bilinear")[:, 0]
    assert_each_close(grad_cam(Explainer(model, table_for(model)), "join")(images, targets), expected, 1e-10)


@pytest.fixture
def folder(tmp_path, tiny_model):
    for seed, label in enumerate(("cat", "dog", "tree", "bus", "fish")):
        write_images(tmp_path / label, 3, seed)
    return ImageFolder.scan(tmp_path, tiny_model)


@pytest.fixture
def tiny_model(tmp_path_factory):
    architecture = "tests.parchgrad.factories:small"
    return load_model(
        add_model(
            "net",
            architecture=architecture,
            weights=build_network(architecture, 5).state_dict(),
            labels=["cat", "dog", "tree", "bus", "fish"],
            preprocessing=Preprocessing(size=(12, 10), resize=14),
            models_dir=tmp_path_factory.mktemp("models"),
        )
    )


def test_mosaics_hold_four_classes_and_the_target_in_its_place(folder, tiny_model):
    made = mosaics_of(folder, tiny_model.preprocessing, 8, seed=3)
    single = {}
    for sample in folder.samples:
        tensor = tiny_model.preprocessing.apply(read_image(sample.path))[0]
        single[tensor.numpy().tobytes()] = folder.classes[sample.row]
    assert len(made) == 8
    for number, picture in enumerate(made):
        assert picture.image.shape == (3, 24, 20)
        quarters = [picture.image[:, r : r + 12, c : c + 10].contiguous() for r in (0, 12) for c in (0, 10)]
        classes = [single[quarter.numpy().tobytes()] for quarter in quarters]
        assert len(set(classes)) == 4
        place = number % 4
        assert classes[place] == picture.target
        expected = np.zeros((24, 20), bool)
        expected[place // 2 * 12 : place // 2 * 12 + 12, place % 2 * 10 : place % 2 * 10 + 10] = True
        assert np.array_equal(picture.mask, expected)
    again = mosaics_of(folder, tiny_model.preprocessing, 8, seed=3)
    assert_close(again[5].image, made[5].image, 0.0)
    other = mosaics_of(folder, tiny_model.preprocessing, 8, seed=4)
    assert any(relative_l2(other[i].image, made[i].image) > 0 for i in range(8))


def test_mosaics_need_four_classes(folder, tiny_model):
    few = dataclasses.replace(folder, samples=tuple(s for s in folder.samples if s.row < 3))
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        mosaics_of(few, tiny_model.preprocessing, 8, seed=0)


def test_native_images_of_different_sizes_fit_into_one_mosaic(folder, tiny_model):
    native = dataclasses.replace(tiny_model.preprocessing, rule="native", min_side=8, max_side=64)
    assert mosaics_of(folder, native, 4, seed=0)[0].image.shape == (3, 24, 20)


def test_the_control_follows_a_table_with_a_normality_filter(tmp_path, tiny_model):
    for seed, label in enumerate(("cat", "dog", "tree")):
        write_images(tmp_path / label, 3, seed)
    table = build_table(tiny_model, tmp_path, defaults=Defaults(normality_filter=True))
    methods = standard_methods(Explainer(tiny_model, table))
    assert methods["ParchGrad, random channels"](torch.randn(2, 3, 12, 10), [0, 1]).isfinite().all()


def test_a_wrong_grad_cam_layer_is_refused():
    model = build()
    with pytest.raises(OptionError, match="Option 'cam_layer' is 'nowhere'"):
        grad_cam(Explainer(model, table_for(model)), "nowhere")
