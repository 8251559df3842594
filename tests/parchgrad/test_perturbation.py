"""Curves of insertion, deletion, MoRF, LeRF and ROAD against plain loops, closed forms and pytorch-grad-cam."""

import math

import numpy as np
import pytest
import torch

from parchgrad.errors import OptionError
from parchgrad.evaluation.imputation import impute, imputed
from parchgrad.evaluation.perturbation import (
    Curve,
    aopc,
    blurred,
    counts_of,
    deletion,
    gap,
    insertion,
    log_odds,
    perturbed,
    pixel_order,
    probability,
    removal,
    road,
    steps,
    zeros,
)

H, W, CLASSES = 4, 6, 3


def linear(seed=0, classes=CLASSES):
    """A linear network on 3 x 4 x 6 in float64: its weights `(classes, 3, 4, 6)` and predict."""
    weight = torch.randn(classes, 3, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
    return weight, lambda images: torch.einsum("bchw,kchw->bk", images, weight)


def example(seed=1, count=2):
    """Images, and maps without ties."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, H, W, generator=generator, dtype=torch.float64)
    return images, torch.randn(count, H, W, generator=generator, dtype=torch.float64)


def softmax_by_hand(image, weight, target):
    """Of one picture, value by value."""
    logits = []
    for k in range(len(weight)):
        total = 0.0
        for c in range(3):
            for y in range(H):
                for x in range(W):
                    total += float(image[c, y, x]) * float(weight[k, c, y, x])
        logits.append(total)
    return math.exp(logits[target]) / sum(math.exp(logit) for logit in logits)


def places_by_hand(saliency, least_first=False):
    """Pixels (y, x) by value, ties by row and column."""
    places = [(y, x) for y in range(H) for x in range(W)]
    sign = 1 if least_first else -1
    return sorted(places, key=lambda at: (sign * float(saliency[at]), at[0] * W + at[1]))


def scores_by_hand(start, end, places, counts, weight, target):
    found = []
    for count in counts:
        picture = start.clone()
        for y, x in places[:count]:
            for c in range(3):
                picture[c, y, x] = end[c, y, x]
        found.append(softmax_by_hand(picture, weight, target))
    return found


def trapezia(fractions, scores):
    area = 0.0
    for i in range(1, len(fractions)):
        area += (fractions[i] - fractions[i - 1]) * (scores[i] + scores[i - 1]) / 2
    return area


@pytest.mark.parametrize("step", [5, 6, 24, 100])
@pytest.mark.parametrize("substrate", [zeros, blurred])
def test_deletion_and_insertion_equal_a_loop_over_pixels(step, substrate):
    weight, predict = linear()
    images, saliency = example()
    targets = [2, 0]
    counts = [*range(0, 24, step), 24]
    fractions = [count / 24 for count in counts]
    removed = deletion(predict, images, saliency, targets, step=step, substrate=substrate, batch_size=3)
    given = insertion(predict, images, saliency, targets, step=step, substrate=substrate, batch_size=3)
    for i, target in enumerate(targets):
        places, ground = places_by_hand(saliency[i]), substrate(images)[i]
        for curve, start, end in ((removed, images[i], ground), (given, ground, images[i])):
            by_hand = scores_by_hand(start, end, places, counts, weight, target)
            np.testing.assert_allclose(curve.fractions, fractions, rtol=1e-15)
            np.testing.assert_allclose(curve.scores[i], by_hand, rtol=1e-12)
            assert curve.area()[i] == pytest.approx(trapezia(fractions, by_hand), rel=1e-12)


def test_the_substrates_unless_told_are_zeros_and_the_blur():
    _, predict = linear()
    images, saliency = example()
    same = deletion(predict, images, saliency, [0, 1], step=7, substrate=zeros)
    np.testing.assert_array_equal(deletion(predict, images, saliency, [0, 1], step=7).scores, same.scores)
    same = insertion(predict, images, saliency, [0, 1], step=7, substrate=blurred)
    np.testing.assert_array_equal(insertion(predict, images, saliency, [0, 1], step=7).scores, same.scores)


def test_the_steps_of_a_picture_of_224_are_its_rows():
    assert steps(224 * 224, 224) == [224 * i for i in range(225)]
    assert steps(10, 4) == [0, 4, 8, 10]
    assert counts_of([0.29, 0.295, 1], 100) == [29, 29, 100], "rounded down, but not by what floats lack"
    curve = Curve(np.arange(225) / 224, np.random.default_rng(0).random((1, 225)))
    s = curve.scores[0]
    # The area of RISE's own code.
    assert curve.area()[0] == pytest.approx((s.sum() - s[0] / 2 - s[-1] / 2) / 224, rel=1e-12)
    assert Curve(np.array([0, 0.5, 1]), np.full((1, 3), 0.25)).area()[0] == 0.25


def test_the_blur_is_that_of_rise():
    """The kernel from its definition: a Gaussian of radius 20 folded into eleven by mirrors; 0 around the image."""
    gaussian = {d: math.exp(-d * d / 50) for d in range(-20, 21)}
    line = [0.0] * 11
    for i in range(11):
        for d, value in gaussian.items():
            at = (i + d) % 22
            line[i] += value / sum(gaussian.values()) * ((at if at < 11 else 21 - at) == 5)
    assert sum(line) == pytest.approx(1)
    assert min(line) / max(line) > 0.8, "flatter than a Gaussian cut off"
    image = torch.randn(1, 3, 13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = torch.zeros_like(image)
    for y in range(13):
        for x in range(5):
            for dy in range(-5, 6):
                for dx in range(-5, 6):
                    if 0 <= y + dy < 13 and 0 <= x + dx < 5:
                        by_hand[0, :, y, x] += line[dy + 5] * line[dx + 5] * image[0, :, y + dy, x + dx]
    torch.testing.assert_close(blurred(image), by_hand, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("least_first", [False, True])
@pytest.mark.parametrize("fractions", [(0.0, 0.1, 0.5, 1.0), (0.25, 0.29), None])
def test_morf_and_lerf_equal_a_loop_over_pixels(least_first, fractions):
    weight, predict = linear()
    images, saliency = example()
    curve = removal(predict, images, saliency, [1, 0], least_first=least_first, fractions=fractions, batch_size=4)
    counts = list(range(25)) if fractions is None else [int(f * 24) for f in fractions]
    np.testing.assert_allclose(curve.fractions, np.array(counts) / 24)
    for i, target in enumerate([1, 0]):
        places = places_by_hand(saliency[i], least_first)
        by_hand = scores_by_hand(images[i], torch.zeros_like(images[i]), places, counts, weight, target)
        np.testing.assert_allclose(curve.scores[i], by_hand, rtol=1e-12)
        if counts[0] == 0:
            drops = [by_hand[0] - value for value in by_hand]
            assert aopc(curve)[i] == pytest.approx(sum(drops) / len(drops), rel=1e-10, abs=1e-14)


def test_patches_go_whole_by_their_sums():
    weight, predict = linear()
    images, saliency = example(count=1)
    sums = {}
    for y in range(H):
        for x in range(W):
            sums[y // 2, x // 2] = sums.get((y // 2, x // 2), 0) + float(saliency[0, y, x])
    curve = removal(predict, images, saliency, [1], patch=2, fractions=None)
    np.testing.assert_allclose(curve.fractions, np.arange(7) / 6)
    places = []
    for py, px in sorted(sums, key=lambda at: -sums[at]):
        places += [(2 * py + a, 2 * px + b) for a in (0, 1) for b in (0, 1)]
    by_hand = scores_by_hand(images[0], torch.zeros(3, H, W), places, range(0, 25, 4), weight, 1)
    np.testing.assert_allclose(curve.scores[0], by_hand, rtol=1e-12)
    half = removal(predict, images, saliency, [1], patch=2, fractions=(0, 0.5, 0.6))
    np.testing.assert_allclose(half.scores[0], [by_hand[0], by_hand[3], by_hand[3]], rtol=1e-12)
    with pytest.raises(OptionError, match="patch"):
        removal(predict, images, saliency, [1], patch=4)


def test_equal_values_go_by_index_in_both_orders():
    saliency = np.array([[[0.0, 2.0, -0.0], [2.0, 1.0, 0.0]]])
    assert pixel_order(saliency).tolist() == [[1, 3, 4, 0, 2, 5]]
    assert pixel_order(saliency, least_first=True).tolist() == [[0, 2, 5, 4, 1, 3]]
    large = np.random.default_rng(0).integers(0, 3, (2, 40, 50))
    for order, flat in zip(pixel_order(large), large.reshape(2, -1), strict=True):
        assert order.tolist() == sorted(range(2000), key=lambda i: (-flat[i], i))


def test_the_score_is_softmax_or_log_odds():
    logits = torch.tensor([[1.0, -2.0, 0.5], [200.0, 0.0, -3.0]])
    targets = torch.tensor([2, 0])
    p = probability(logits, targets)
    e = [math.exp(v) for v in (1.0, -2.0, 0.5)]
    assert p[0].item() == pytest.approx(e[2] / sum(e), rel=1e-12)
    odds = log_odds(logits, targets)
    assert odds[0].item() == pytest.approx(math.log(p[0] / (1 - p[0])), rel=1e-12)
    assert odds[1].item() == pytest.approx(200 - math.log(1 + math.exp(-3)), rel=1e-12), "it does not saturate"
    two = torch.tensor([[3.0, -1.5]])
    assert log_odds(two, torch.tensor([1])).item() == pytest.approx(-4.5), "of two classes, as Shrikumar et al."


def test_of_an_additive_network_log_odds_fall_by_what_is_removed():
    """Two classes, one with logit 0: the log-odds are the sum of what is left, so every curve has a closed form."""
    weight, _ = linear(classes=1)
    images, _ = example(count=3)

    def predict(x):
        return torch.cat([torch.einsum("bchw,kchw->bk", x, weight), torch.zeros(len(x), 1, dtype=x.dtype)], dim=1)

    true = (images * weight).sum(dim=1)
    flat = -np.sort(-true.reshape(3, -1).numpy(), axis=1)
    left = flat.sum(axis=1, keepdims=True) - np.cumsum(np.pad(flat, ((0, 0), (1, 0))), axis=1)
    curve = removal(predict, images, true, [0] * 3, fractions=None, score=log_odds)
    np.testing.assert_allclose(curve.scores, left, atol=1e-12)
    np.testing.assert_allclose(aopc(curve), (left[:, :1] - left).mean(axis=1), atol=1e-12)
    # From zeros, what is given back is what was taken away.
    given = insertion(predict, images, true, [0] * 3, step=1, substrate=zeros, score=log_odds)
    np.testing.assert_allclose(given.scores, left[:, :1] - left, atol=1e-12)


def test_no_map_beats_the_true_one_of_an_additive_network():
    weight, _ = linear(classes=1)
    images, _ = example(count=1)

    def predict(x):
        return torch.cat([torch.einsum("bchw,kchw->bk", x, weight), torch.zeros(len(x), 1, dtype=x.dtype)], dim=1)

    true = (images * weight).sum(dim=1)
    maps = torch.cat([true, -true, torch.randn(40, H, W, generator=torch.Generator().manual_seed(5))])
    all_images, targets = images.expand(42, -1, -1, -1), [0] * 42
    morf = removal(predict, all_images, maps, targets, fractions=None)
    lerf = removal(predict, all_images, maps, targets, fractions=None, least_first=True)
    assert (morf.scores[0] <= morf.scores + 1e-12).all()
    assert (lerf.scores[0] >= lerf.scores - 1e-12).all()
    assert (lerf.scores[0] >= morf.scores[0] - 1e-12).all()
    for figures in (aopc(morf), -morf.area(), gap(morf, lerf)):
        assert (figures[0] > figures[2:]).all()
        assert (figures[1] < figures[2:]).all()
    assert (insertion(predict, all_images, maps, targets, step=1, substrate=zeros).area().argmax()) == 0
    assert abs(gap(morf, lerf)[2:].mean()) < 0.2 * gap(morf, lerf)[0]
    assert gap(morf, lerf)[1] == pytest.approx(-gap(morf, lerf)[0])


MEASURES = (
    insertion,
    deletion,
    removal,
    lambda *a, **k: removal(*a, least_first=True, patch=2, **k),
    road,
    lambda *a, **k: road(*a, least_first=True, **k),
)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_map_that_orders_nothing_has_nan_and_costs_nothing(measure):
    """And leaves the maps beside it as they are alone."""
    _, predict = linear()
    images, saliency = example(count=5)
    saliency[0] = 0
    saliency[1, 2, 3] = math.nan
    saliency[2] = 0.3
    saliency[3, 0, 0], saliency[3, 0, 1] = math.inf, -math.inf
    seen = []

    def watched(x):
        seen.append(len(x))
        return predict(x)

    curve = measure(watched, images, saliency, [0, 1, 2, 0, 1])
    assert np.isnan(curve.scores[:4]).all()
    assert np.isnan(curve.area()[:4]).all()
    assert sum(seen) == len(curve.fractions)
    np.testing.assert_array_equal(curve.scores[4:], measure(predict, images[4:], saliency[4:], [1]).scores)
    nothing = measure(predict, images[:2], np.zeros((2, H, W)), [0, 1])
    assert np.isnan(nothing.scores).all()
    assert nothing.scores.shape == (2, len(nothing.fractions))


@pytest.mark.parametrize("measure", MEASURES)
def test_batches_are_bounded_and_do_not_matter(measure):
    _, predict = linear()
    images, saliency = example(count=3)
    seen = []

    def watched(x):
        seen.append(len(x))
        return predict(x)

    one = measure(watched, images, saliency, [0, 1, 2], batch_size=4)
    assert max(seen) == 4
    assert seen[:-1] == [4] * (len(seen) - 1), "batches go on from one image to the next"
    assert sum(seen) == one.scores.size
    other = measure(predict, images, saliency.numpy(), [0, 1, 2], batch_size=1)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-12)
    assert one.scores.shape == (3, len(one.fractions))


def test_pictures_are_made_one_by_one_and_keep_their_values():
    image, order = torch.ones(3, 2, 2), np.array([2, 0, 3, 1])
    pictures = perturbed(image, torch.zeros(3, 2, 2), order, [0, 1, 1, 4])
    assert iter(pictures) is pictures
    found = list(pictures)
    assert [int(p.sum()) for p in found] == [12, 9, 9, 0]
    assert found[1][:, 1, 0].tolist() == [0, 0, 0]
    assert image.sum() == 12


def by_hand_imputed(image, missing):
    """The system of one equation per missing pixel, dense, by loops."""
    places = [tuple(at) for at in np.argwhere(missing)]
    number = {at: i for i, at in enumerate(places)}
    matrix, right = np.zeros((len(places),) * 2), np.zeros((len(places), len(image)))
    for (y, x), i in number.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                at = (y + dy, x + dx)
                if at == (y, x) or not (0 <= at[0] < missing.shape[0] and 0 <= at[1] < missing.shape[1]):
                    continue
                weight = 1 / 6 if abs(dy) + abs(dx) == 1 else 1 / 12
                matrix[i, i] += weight
                if at in number:
                    matrix[i, number[at]] -= weight
                else:
                    right[i] += weight * image[:, at[0], at[1]]
    filled = image.copy()
    for at, values in zip(places, np.linalg.solve(matrix, right), strict=True):
        filled[:, at[0], at[1]] = values
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(7, 9), (1, 12), (13, 2)])
def test_imputation_solves_the_system_of_the_neighbours(share, shape):
    generator = np.random.default_rng(3)
    image = generator.normal(size=(3, *shape))
    missing = np.zeros(shape, bool)
    missing.flat[generator.permutation(missing.size)[: int(share * missing.size)]] = True
    before = image.copy()
    filled = impute(image, missing)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(filled[:, ~missing], image[:, ~missing])
    np.testing.assert_allclose(filled, by_hand_imputed(image, missing), rtol=1e-9, atol=1e-12)
    # What was there is not read, not even by way of 0 * NaN.
    hidden = np.where(missing, math.nan, image)
    np.testing.assert_array_equal(impute(hidden, missing), filled)


def test_imputation_of_a_ramp_is_the_ramp():
    """Of a linear picture every inner pixel is its neighbours' mean; at the edge that is so of an even one alone."""
    y, x = np.mgrid[:9, :8]
    missing = np.zeros((9, 8), bool)
    missing[2:7, 1:6] = True
    ramp = np.stack([2.0 * y - 3 * x, x, np.ones((9, 8))])
    np.testing.assert_allclose(impute(ramp, missing), ramp, atol=1e-12)
    missing[:, :5] = True
    np.testing.assert_allclose(impute(ramp, missing)[2], 1, atol=1e-12)
    generator = np.random.default_rng(0)
    image = generator.normal(size=(3, 9, 8))
    filled = impute(image, missing)
    for channel, known in zip(filled, image[:, ~missing], strict=True):
        assert known.min() <= channel.min() <= channel.max() <= known.max()


def test_nothing_missing_and_everything_missing():
    image = np.random.default_rng(0).normal(size=(3, 4, 4))
    np.testing.assert_array_equal(impute(image, np.zeros((4, 4), bool)), image)
    with pytest.raises(OptionError, match="missing"):
        impute(image, np.ones((4, 4), bool))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # It asks numpy about tensors.
@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_imputation_is_that_of_grad_cam(percentile):
    """pytorch-grad-cam's imputer is right; only its choice of pixels is not, for maps with ties (below).

    Its `percentile` is what is kept, and it takes float32.
    """
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="grad-cam is not installed")
    confidence = pytest.importorskip("pytorch_grad_cam.metrics.perturbation_confidence")
    generator = torch.Generator().manual_seed(2)
    image, saliency = torch.randn(3, 12, 10, generator=generator), torch.rand(12, 10, generator=generator)
    count = 120 - math.ceil(119 * percentile / 100)
    for least_first, remove in (
        (False, confidence.RemoveMostRelevantFirst),
        (True, confidence.RemoveLeastRelevantFirst),
    ):
        expected = remove(percentile, theirs.NoisyLinearImputer(noise=0))(image, saliency)
        order = pixel_order(saliency[None], least_first=least_first)[0]
        (found,) = imputed(image, order, [count], noise=0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_map_with_ties_loses_as_many_pixels_as_any():
    """Where pytorch-grad-cam is not right: it takes all that is not below a quantile's value.

    Of a map that is 0 on half of its pixels it takes all of them where 90 % are asked for: nothing to impute from.
    """
    confidence = pytest.importorskip(
        "pytorch_grad_cam.metrics.perturbation_confidence", reason="grad-cam is not installed"
    )
    saliency = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    saliency[:5] = 0
    kept = []
    confidence.RemoveMostRelevantFirst(10, lambda _, mask: kept.append(int(mask.sum())))(None, saliency)
    assert kept == [0]
    image = torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(1))
    (found,) = imputed(image, pixel_order(saliency[None])[0], counts_of([0.9], 100), noise=0)
    assert int((found == image).all(dim=0).sum()) == 10


@pytest.mark.parametrize("least_first", [False, True])
def test_road_equals_a_loop(least_first):
    weight, predict = linear()
    images, saliency = example()
    curve = road(predict, images, saliency, [2, 1], least_first=least_first, noise=0, batch_size=5)
    counts = [2, 4, 7, 9, 12, 14, 16, 19, 21]
    np.testing.assert_allclose(curve.fractions, np.array(counts) / 24)
    for i, target in enumerate([2, 1]):
        places = places_by_hand(saliency[i], least_first)
        for j, count in enumerate(counts):
            missing = np.zeros((H, W), bool)
            for at in places[:count]:
                missing[at] = True
            picture = by_hand_imputed(images[i].numpy(), missing)
            assert curve.scores[i, j] == pytest.approx(softmax_by_hand(picture, weight, target), rel=1e-9)


def test_roads_gap_is_positive_for_a_true_map_and_changes_sign_with_it():
    weight, predict = linear(seed=4)
    images, _ = example(seed=8, count=6)
    targets = [i % CLASSES for i in range(6)]
    true = (images * (weight[targets] - weight.mean(dim=0))).sum(dim=1)
    morf = road(predict, images, true, targets)
    lerf = road(predict, images, true, targets, least_first=True)
    assert gap(morf, lerf).mean() > 0.05
    by_hand = [
        sum(b - a for a, b in zip(m, le, strict=True)) / 9 for m, le in zip(morf.scores, lerf.scores, strict=True)
    ]
    np.testing.assert_allclose(gap(morf, lerf), by_hand, rtol=1e-12)
    np.testing.assert_allclose(gap(lerf, morf), -gap(morf, lerf))


def test_the_noise_is_small_seeded_and_on_what_is_imputed_alone():
    image = torch.randn(3, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = np.random.default_rng(0).permutation(900)
    (plain,) = imputed(image, order, [600], noise=0)
    (noisy,) = imputed(image, order, [600])
    (again,) = imputed(image, order, [600], seed=0)
    (other,) = imputed(image, order, [600], seed=1)
    missing = np.zeros(900, bool)
    missing[order[:600]] = True
    difference = (noisy - plain).reshape(3, -1).numpy()
    assert (difference[:, ~missing] == 0).all()
    assert difference[:, missing].std() == pytest.approx(0.01, rel=0.1)
    assert abs(difference.mean()) < 0.001
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"fractions": ()}, "fractions"),
        ({"fractions": (0.5, 0.2)}, "fractions"),
        ({"fractions": (0.5, 1.2)}, "fractions"),
        ({"fractions": (math.nan,)}, "fractions"),
        ({"patch": 0}, "patch"),
        ({"targets": [0]}, "targets"),
        ({"saliency": np.ones((2, H, W + 1))}, "saliency"),
        ({"saliency": np.ones((H, W))}, "saliency"),
    ],
)
def test_what_is_no_option_is_refused(change, option):
    _, predict = linear()
    images, saliency = example()
    given = {"saliency": saliency, "targets": [0, 1], **change}
    with pytest.raises(OptionError, match=f"'{option}'"):
        removal(predict, images, **given)


def test_other_refusals():
    _, predict = linear()
    images, saliency = example()
    with pytest.raises(OptionError, match="'fractions'"):
        road(predict, images, saliency, [0, 1], fractions=(0.5, 1.0))
    with pytest.raises(OptionError, match="'noise'"):
        road(predict, images, saliency, [0, 1], noise=-0.1)
    with pytest.raises(OptionError, match="'step'"):
        deletion(predict, images, saliency, [0, 1], step=0)
    morf, other = (removal(predict, images, saliency, [0, 1], fractions=f) for f in ((0.1, 0.5), (0.1, 0.6)))
    with pytest.raises(OptionError, match="'fractions'"):
        gap(morf, other)
    with pytest.raises(OptionError, match="begins at 0"):
        aopc(morf)
