"""Attacks against the formulas by hand, captum's own PGD, bounds, and what a change does to maps and channels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.robust import PGD

import parchgrad
from parchgrad.attacks.attack import KINDS, Attack
from parchgrad.attacks.comparison import Movement, compare
from parchgrad.attacks.corruptions import corrupted, quality_of
from parchgrad.attacks.gradients import STEP_SHARE, Attacker
from parchgrad.errors import AbandonedError, OptionError
from parchgrad.evaluation.maps import top_overlap
from parchgrad.preprocessing import Preprocessing, read_image
from tests.parchgrad.networks import Branching, build, table_for

ROOT = Path(parchgrad.__file__).parent.parent
# A mean and a deviation of each colour: who forgets them moves a colour too far.
PREPROCESSING = Preprocessing(size=(12, 12), rule="stretch", mean=(0.4, 0.5, 0.6), std=(0.1, 0.25, 0.5))


def noise_picture(seed=0, size=12):
    """With black and white in it, where the bounds of a pixel hold."""
    picture = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    picture[:2], picture[2:4] = 0, 255
    return picture


def pixels_of(picture):
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())[None].double() / 255


def on_pixels(network):
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return lambda pixels: network((pixels - mean) / std)


def each_loss(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


@pytest.fixture(scope="module")
def network():
    return build(Branching)


@pytest.fixture(scope="module")
def scenes():
    """The bundled model, which has learnt something, and one of its pictures."""
    model = parchgrad.load_model(ROOT / "models" / "scenes")
    explainer = parchgrad.Explainer(model, parchgrad.load_table(ROOT / "selection_tables" / "scenes", model))
    sample = next(iter(sorted((model.folder / "samples").iterdir())))
    image, _ = model.preprocessing.apply(read_image(sample))
    return explainer, model.preprocessing, model.preprocessing.restore(image)


@pytest.mark.parametrize("goal", [None, 2])
def test_fgsm_is_its_formula(network, goal):
    picture, label, levels = noise_picture(), 1, 3
    pixels = pixels_of(picture).requires_grad_()
    loss = F.cross_entropy(on_pixels(network)(pixels), torch.tensor([label if goal is None else goal]))
    (gradient,) = torch.autograd.grad(loss, pixels)
    sign = gradient.sign()[0].permute(1, 2, 0).numpy() * (1 if goal is None else -1)
    expected = np.clip(picture + levels * sign, 0, 255)
    found = Attacker(network, PREPROCESSING).perturbed(picture, Attack("fgsm", levels, goal=goal), label)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")  # captum's own loop does it
def test_pgd_is_captums_from_the_same_start(network, monkeypatch):
    """captum's loop, its start replaced by ours: the only part of it that cannot be given a seed."""
    picture, label, attack = noise_picture(), 1, Attack("pgd", 4, steps=5, seed=3)
    found = Attacker(network, PREPROCESSING).perturbed(picture, attack, label)
    centre, radius = pixels_of(picture), attack.strength / 255
    noise = torch.rand(centre.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = (centre - radius).clamp(min=0), (centre + radius).clamp(max=1)
    theirs = PGD(on_pixels(network), each_loss, 0.0, 1.0)
    theirs.fgsm.zero_thresh = 0
    monkeypatch.setattr(theirs, "_random_point", lambda *_: low + (high - low) * noise)
    expected = theirs.perturb(
        centre.requires_grad_(), radius, STEP_SHARE * radius / 5, 5, torch.tensor([label]), random_start=True
    )
    np.testing.assert_array_equal(found, np.rint(expected[0].permute(1, 2, 0).detach().numpy() * 255))


def test_pgd_on_a_trained_network(scenes):
    explainer, preprocessing, picture = scenes
    attacker = Attacker(explainer.network, preprocessing)
    label = int(explainer.predict(preprocessing.normalise(_image(picture))[None]).argmax())
    fgsm, pgd = (attacker.perturbed(picture, Attack(kind, 4), label) for kind in ("fgsm", "pgd"))
    for changed in (fgsm, pgd):
        assert np.abs(changed.astype(int) - picture).max() == 4
    assert attacker.loss(pgd, label) >= attacker.loss(fgsm, label) > attacker.loss(picture, label)
    goal = (label + 1) % len(explainer.model.labels)
    sought = attacker.perturbed(picture, Attack("pgd", 4, goal=goal), label)
    assert attacker.loss(sought, goal) < attacker.loss(picture, goal)
    assert np.array_equal(pgd, attacker.perturbed(picture, Attack("pgd", 4), label))
    assert not np.array_equal(pgd, attacker.perturbed(picture, Attack("pgd", 4, seed=1), label))


def test_a_confident_prediction_is_attacked_all_the_same():
    """The gradient of its cross-entropy is 0 in float32, and below the 1e-6 under which captum sees none."""
    network = build(Branching, dtype=torch.float32)
    with torch.no_grad():
        network.head.weight *= 1000
    picture = noise_picture()
    attacker = Attacker(network, PREPROCESSING)
    label = int(np.argmin([attacker.loss(picture, k) for k in range(network.head.out_features)]))
    assert attacker.loss(picture, label) < 1e-8
    assert np.abs(attacker.perturbed(picture, Attack("fgsm", 2), label).astype(int) - picture).mean() > 1


def test_the_callers_network_is_untouched():
    network = build(Branching).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    Attacker(network, PREPROCESSING).perturbed(noise_picture(), Attack("pgd", 4, steps=2), 0)
    assert network.training
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_identity_and_more_changes_more(network, kind):
    attacker, picture = Attacker(network, PREPROCESSING), np.asarray(_smooth_image())
    before = picture.copy()
    full = 8 if KINDS[kind].levels else 1.0
    changed = [attacker.perturbed(picture, Attack(kind, full * share), 0) for share in (0, 0.5, 1)]
    assert np.array_equal(changed[0], picture)
    assert changed[0] is not picture
    distances = [float(np.abs(one.astype(float) - picture).mean()) for one in changed]
    assert distances[0] < distances[1] < distances[2]
    assert np.array_equal(picture, before)


def test_corruptions():
    picture = np.asarray(_smooth_image())
    noisy = [corrupted(picture, Attack("noise", 0.2, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])
    flat = np.full((256, 256, 3), 128, np.uint8)
    assert np.std(corrupted(flat, Attack("noise", 0.25)).astype(float)) == pytest.approx(16, rel=0.01)
    assert np.array_equal(corrupted(flat, Attack("blur", 1.0)), flat)
    step = flat.copy()
    step[:, :128], step[:, 128:] = 0, 255
    inside = corrupted(step, Attack("blur", 0.5))[128, :, 0] / 255
    assert inside[127] + inside[128] == pytest.approx(1, abs=0.01)
    assert inside[128 + 3] == pytest.approx(0.81, abs=0.01)  # Phi(3.5 / 4): the deviation is 4 of 256 pixels
    assert [quality_of(s) for s in (1e-9, 0.5, 1)] == [95, 50, 5]
    marked = corrupted(flat, Attack("watermark", 1.0))
    assert (marked == 255).any()
    assert (marked == 0).any()
    assert not np.array_equal(marked, corrupted(flat, Attack("watermark", 1.0, text="OTHER")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "fog"}, "attack"),
        ({"strength": 1.5}, "whole number of levels"),
        ({"strength": 65}, r"0\.\.64"),
        ({"kind": "blur", "strength": 1.01}, r"\[0, 1\]"),
        ({"kind": "blur", "strength": float("nan")}, r"\[0, 1\]"),
        ({"kind": "blur", "strength": 1, "goal": 2}, "only fgsm and pgd seek a class"),
        ({"steps": 41}, r"1\.\.40"),
        ({"text": "two\nlines"}, "printable"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(options, said):
    with pytest.raises(OptionError, match=said):
        Attack(**{"kind": "fgsm", "strength": 1, **options})


def test_an_attack_ends_between_steps(network):
    answers = iter([True, True, False])
    with pytest.raises(AbandonedError):
        Attacker(network, PREPROCESSING).perturbed(noise_picture(), Attack("pgd", 4, steps=9), 0, lambda: next(answers))
    with pytest.raises(OptionError, match="class"):
        Attacker(network, PREPROCESSING).perturbed(noise_picture(), Attack("fgsm", 1, goal=99), 0)


def test_comparison(network):
    explainer = parchgrad.Explainer(network, table_for(network, quantile=0.4))
    before, after = noise_picture(), noise_picture(1)
    same = compare(explainer, PREPROCESSING, before, before)
    assert same.movement.agreement == pytest.approx(1)
    assert (same.movement.overlap, same.movement.shift) == (1, 0)
    assert all(not one.excited and not one.inhibited and one.size == 0 for one in same.layers)
    found = compare(explainer, PREPROCESSING, before, after, most=3)
    assert [one.layer for one in found.layers] == list(explainer.layer_names)
    inputs = torch.stack([PREPROCESSING.normalise(_image(one)) for one in (before, after)]).double()
    gap, reference = explainer.gap_features(inputs).double().numpy(), explainer.reference
    for one, here in zip(found.layers, reference.places().values(), strict=True):
        std = np.where(reference.std[here] > 0, reference.std[here], np.inf)
        change = (gap[1] - gap[0])[here] / std
        for named, order in ((one.excited, -change), (one.inhibited, change)):
            assert [c.channel for c in named] == [i for i in np.argsort(order, kind="stable")[:3] if order[i] < 0]
            assert [c.change for c in named] == pytest.approx([change[c.channel] for c in named])
    old = int(explainer.predict(inputs[:1]).argmax())
    assert found.old == old
    ranks = explainer.table.rank[explainer.table.rows(torch.tensor([old]))][0].numpy()
    for one, here in zip(found.layers, reference.places().values(), strict=True):
        for channel in one.excited + one.inhibited:
            assert channel.of_old == (ranks[here][channel.channel] < max(1, int(0.4 * one.channels)))
    sought = compare(explainer, PREPROCESSING, before, before, goal=(old + 1) % 3)
    assert (sought.changed, sought.new) == (False, (old + 1) % 3)
    assert set(sought.after.maps) == {old, sought.new}


def test_a_class_without_a_row_has_no_map(network):
    explainer = parchgrad.Explainer(network, table_for(network, covered=[0]))
    picture = next(one for one in map(noise_picture, range(50)) if _predicted(explainer, one) != 0)
    found = compare(explainer, PREPROCESSING, picture, noise_picture(7))
    assert found.movement is None
    assert found.old not in found.before.maps
    assert not any(channel.of_old for layer in found.layers for channel in layer.excited + layer.inhibited)


def test_movement_of_maps():
    a, b = np.zeros((10, 10)), np.zeros((10, 10))
    a[0, :], b[-1, :] = 1, 1
    moved = Movement.of(a, b)
    assert moved.shift == pytest.approx(9 / np.hypot(10, 10))
    assert (moved.overlap, top_overlap(a, a)) == (0, 1)
    b[0, :5], b[-1, 5:] = 1, 0
    assert top_overlap(a, b) == pytest.approx(5 / 15)


def test_without_captum_the_others_work():
    code = """
import sys; sys.modules["captum"] = None
import numpy as np, torch
from parchgrad.attacks.attack import Attack
from parchgrad.attacks.gradients import Attacker
from parchgrad.preprocessing import Preprocessing
net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
attacker = Attacker(net, Preprocessing(size=(8, 8), rule="stretch"))
picture = np.zeros((8, 8, 3), np.uint8)
print(attacker.perturbed(picture, Attack("noise", 1.0), 0).any())
try:
    attacker.perturbed(picture, Attack("fgsm", 1), 0)
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = "An attack by the gradient needs captum, which is not installed: pip install 'parchgrad[attack]'.\n"
    assert (found.stdout, found.stderr) == ("True\n" + said, "")


def _image(picture):
    import PIL.Image

    return PIL.Image.fromarray(picture)


def _smooth_image():
    import PIL.Image

    return PIL.Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def _predicted(explainer, picture):
    return int(explainer.predict(PREPROCESSING.normalise(_image(picture))[None].double()).argmax())


def test_the_common_part_of_maps_counts_no_pixel_that_says_nothing() -> None:
    empty, one, other = np.zeros((3, 10, 10))
    one[2, 3] = other[7, 7] = 1.0
    assert np.isnan(top_overlap(empty, empty))
    assert np.isnan(top_overlap(empty, one))
    assert (top_overlap(one, other), top_overlap(one, one)) == (0, 1)
