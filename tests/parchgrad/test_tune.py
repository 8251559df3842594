"""Choosing defaults: a network whose right setting is known, figures against loops, and everything that is refused."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, OptionError, TableError, UncoveredTargetError
from parchgrad.evaluation import tune as tune_module
from parchgrad.evaluation.images import mosaics_of
from parchgrad.evaluation.report import (
    classes_left_out_line,
    grid_table,
    left_out_line,
    measured_table,
    natural_width,
    tune_text,
)
from parchgrad.evaluation.tune import Grid, choose, halves, hit_intervals, intervals, mosaic_seeds, tune
from parchgrad.evidence import digest_of
from parchgrad.explainer import Explainer
from parchgrad.patterns import match
from parchgrad.preprocessing import Preprocessing
from parchgrad.quantiles import quantile_of_layers
from parchgrad.sources import ImageFolder
from parchgrad.tables import LayerTable, SelectionTable, load_table

LABELS = ("red", "green", "blue", "white", "never")
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "white": (235, 235, 235)}
PREPROCESSING = Preprocessing(size=(6, 6), resize=6, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CHANNELS = 10


class Colours(nn.Module):
    """Channel c < 4 fires on class c's colour only, the other six on everything; each logit sums its own and those.

    A little of the other classes' channels is in each logit too, and a shortcut passes the second convolution:
    where branches merge, `conserve` matters.
    """

    def __init__(self):
        super().__init__()
        self.detect = nn.Conv2d(3, CHANNELS, 1)
        self.carry = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        with torch.no_grad():
            colours = [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], *[[0.3, 0.2, 0.3]] * 6]
            self.detect.weight[...] = torch.tensor(colours)[..., None, None]
            self.detect.bias[...] = torch.tensor([-0.3, -0.3, -0.3, -2.0, *[1.0] * 6])
            self.carry.weight[...] = torch.eye(CHANNELS)[..., None, None]

    def forward(self, images):
        found = torch.relu(self.detect(images))
        z = (torch.relu(self.carry(found)) + found).mean((2, 3))
        common = 0.3 * z[:, :4].sum(dim=1, keepdim=True) + z[:, 4:].sum(dim=1, keepdim=True)
        return torch.cat([z[:, :4], z[:, :1] * 0], dim=1) + common


def colour_table(order, **defaults):
    """A table whose row for class c has the channels in `order(c)`."""
    rank = torch.stack([torch.tensor(order(c)).argsort() for c in range(4)]).to(torch.int16)
    layer = LayerTable(
        log_p=torch.log((rank.double() + 1) / CHANNELS),
        rank=rank,
        mean=torch.zeros(CHANNELS, dtype=torch.float64),
        std=torch.ones(CHANNELS, dtype=torch.float64),
    )
    return SelectionTable(
        name="colours",
        model_name="",
        weights_sha256="",
        labels=LABELS,
        classes=(0, 1, 2, 3),
        layers={"detect": layer, "carry": layer},
        images_per_class=(2,) * 4,
        built={"by": "tests"},
        defaults=Defaults(**{"quantile": 0.5, **defaults}),
    )


def own_channel_first(c):
    return [c, *range(4, CHANNELS), *(other for other in range(4) if other != c)]


def own_channel_last(c):
    return [*range(4, CHANNELS), *(other for other in range(4) if other != c), c]


@pytest.fixture
def explainer():
    return Explainer(Colours().eval(), colour_table(own_channel_first))


@pytest.fixture
def source(tmp_path):
    """12 noisy images of each colour."""
    generator = np.random.default_rng(0)
    names, targets = [], []
    for target, colour in enumerate(COLOURS.values()):
        (tmp_path / "held_out" / str(target)).mkdir(parents=True)
        for i in range(12):
            pixels = np.array(colour) + generator.integers(-20, 20, (6, 6, 3))
            names.append(f"{target}/{i:02}.png")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "held_out" / names[-1])
            targets.append(target)
    return ImageFolder(str(tmp_path / "held_out"), names, np.array(targets))


def tuned(explainer, source, **options):
    return tune(explainer, source, PREPROCESSING, **{"mosaics": 12, "seed": 1, **options})


def test_the_setting_that_alone_points_right_is_chosen(explainer, source):
    """One channel of ten is the class's own: with it alone the whole map lies in the target's quarter."""
    result = tuned(explainer, source)
    assert result.chosen == Defaults(quantile=0.05)  # selects one channel, as 0.1 does, which is left out
    assert result.reason.startswith("better than the current defaults, on both halves")
    row = next(r for r in result.measured if r.kind == "setting" and r.defaults == result.chosen)
    assert row.mass.mean == pytest.approx(1.0)
    assert row.hits.mean == pytest.approx(1.0)
    assert row.over_current.low > 0.3
    assert row.share == pytest.approx(2 / 20)
    assert result.beats_control


@pytest.mark.parametrize("criterion", ["mass", "hits", "both"])
def test_every_row_is_the_mean_of_one_map_at_a_time(explainer, source, criterion):
    """Mass and hits of each row, and the paired differences, by loops over single explanations."""
    grid = Grid(quantiles=(0.1, (0.6, 0.2)), gammas=(math.inf, 2.0), conserve=("none", "exact"))
    result = tuned(explainer, source, grid=grid, criterion=criterion, batch_size=3)
    control = tune_module.random_control(explainer, 1)
    parts = halves(source, source.classes, 1)
    for rows, half, seed in zip((result.rows, result.measured), parts, mosaic_seeds(1), strict=True):
        scores = {}
        for i, row in enumerate(rows):
            loop = []
            for picture in mosaics_of(half, PREPROCESSING, 12, seed).pictures:
                if row.defaults is None:
                    options = {"rule": False}
                else:
                    options = {n: getattr(row.defaults, n) for n in ("quantile", "gamma", "layers", "conserve")}
                side = control if row.kind == "random" else explainer
                explained = side.explain(picture.image[None], picture.target, **options)
                saliency = explained.saliency()[0].double().numpy()
                inside = sum(saliency[y, x] for y, x in np.ndindex(*saliency.shape) if picture.mask[y, x])
                peaks = [picture.mask[at] for at in np.ndindex(*saliency.shape) if saliency[at] == saliency.max()]
                loop.append((inside / saliency.sum(), sum(peaks) / len(peaks)) if saliency.any() else (0.0, 0.0))
            scores[i] = np.array(loop)
            assert row.mass.mean == pytest.approx(scores[i][:, 0].mean(), abs=1e-6)
            assert row.hits.mean == pytest.approx(scores[i][:, 1].mean(), abs=1e-6)
        column = {"mass": [0], "hits": [1], "both": [0, 1]}[criterion]
        value = {i: scores[i][:, column].mean(axis=1) for i in scores}
        current = next(i for i, r in enumerate(rows) if r.kind == "setting" and r.defaults == result.rows[0].defaults)
        plain = next(i for i, r in enumerate(rows) if r.kind == "gradient")
        for i, row in enumerate(rows):
            assert row.over_current.mean == pytest.approx((value[i] - value[current]).mean(), abs=1e-6)
            assert row.over_gradient.mean == pytest.approx((value[i] - value[plain]).mean(), abs=1e-6)
    kinds = [row.kind for row in result.rows]
    assert kinds.count("random") == kinds.count("gradient") == 1


def test_a_map_without_mass_has_none_in_the_target_and_does_not_point_there(explainer, source, monkeypatch):
    def nothing(_, picture, settings):
        return np.zeros((len(settings), *picture.image.shape[1:]))

    monkeypatch.setattr(tune_module, "_maps", nothing)
    result = tuned(explainer, source)
    assert {(row.mass.mean, row.hits.mean) for row in result.rows} == {(0, 0)}
    assert result.chosen == explainer.table.defaults


def test_batches_change_nothing(explainer, source):
    one, many = (tuned(explainer, source, batch_size=size) for size in (1, 64))
    assert one.chosen == many.chosen
    assert [row.mass.mean for row in one.rows] == pytest.approx([row.mass.mean for row in many.rows], abs=1e-6)


def test_the_halves_are_measured_on_mosaics_drawn_apart(explainer, source, monkeypatch):
    """As many images of each class in both: with one seed the same classes and targets in every mosaic."""
    drawn = []

    def spied(half, *arguments, **options):
        made = mosaics_of(half, *arguments, **options)
        drawn.append([picture.target for picture in made.pictures])
        return made

    monkeypatch.setattr(tune_module, "mosaics_of", spied)
    tuned(explainer, source)
    first, second = drawn
    assert first != second
    assert mosaic_seeds(1) == mosaic_seeds(1)
    assert len({*mosaic_seeds(0), *mosaic_seeds(1)}) == 4


def test_intervals_are_those_of_the_t_test():
    """By the textbook: mean +- t(0.975, n - 1) s / sqrt(n); 2.0452 is in every table for 29 degrees of freedom."""
    generator = np.random.default_rng(5)
    values = np.stack([generator.random(30), generator.random(30) < 0.3, np.full(30, 0.25), np.zeros(30)])
    for row, interval in zip(values, intervals(values), strict=True):
        mean = sum(row) / 30
        half = 2.0452296 * math.sqrt(sum((v - mean) ** 2 for v in row) / 29) / math.sqrt(30)
        assert dataclasses.astuple(interval) == pytest.approx((mean, mean - half, mean + half), abs=1e-7)
    assert intervals(values[:1])[0] == intervals(values)[0]


def test_intervals_of_hits_are_wilsons():
    """By the formula; all hits and no hits have a width."""
    hits = np.array([[1.0] * k + [0.0] * (30 - k) for k in (0, 1, 12, 30)])
    z = 1.959964
    for row, interval in zip(hits, hit_intervals(hits), strict=True):
        p = row.mean()
        centre = (p + z * z / 60) / (1 + z * z / 30)
        half = z / (1 + z * z / 30) * math.sqrt(p * (1 - p) / 30 + z * z / 3600)
        assert dataclasses.astuple(interval) == pytest.approx((p, centre - half, centre + half), abs=1e-6)
    (tied,) = hit_intervals(np.array([[0.5, 0.75, 1.0, *[0.0] * 27]]))
    assert tied.mean == pytest.approx(2.25 / 30)
    assert tied.low < tied.mean < tied.high


def noisy(*leads, noise=0.02, mosaics=60):
    """Scores of settings that lead a common one by `leads`, with a little noise: pairing tells them apart."""
    generator = np.random.default_rng(0)
    common = generator.random(mosaics)
    own = generator.normal(0, noise, (len(leads), mosaics))
    return common + np.array(leads)[:, None] + own - own.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("leads", "shares", "expected"),
    [
        ((0.0, -0.1, -0.2), (1.0, 0.1, 0.1), (0, 0, "the current defaults are the best")),
        ((0.0, 0.001, -0.2), (1.0, 0.1, 0.1), (1, 0, "no setting is shown to be better than the current")),
        ((0.0, 0.1, 0.2), (1.0, 0.1, 0.5), (2, 2, "both halves; the best")),
        ((0.0, 0.2, 0.201), (1.0, 0.1, 0.5), (2, 1, "the cheapest of those shown to be less than 0.01 behind")),
        ((0.0, 0.201, 0.2), (1.0, 0.1, 0.5), (1, 1, "both halves; the best")),
        ((0.0, 0.2, 0.201), (1.0, 0.5, 0.5), (2, 2, "both halves; the best")),
        ((0.0, 0.18, 0.2), (1.0, 0.1, 0.5), (2, 2, "both halves; the best")),
    ],
    ids=[
        "current-best",
        "tied-with-current",
        "clear-best",
        "tie-to-the-cheapest",
        "best-is-cheapest",
        "equal-cost",
        "cheaper-but-behind",
    ],
)
def test_the_rule_of_choosing(leads, shares, expected):
    best, chosen, why = choose(noisy(*leads), shares)
    assert (best, chosen) == expected[:2]
    assert expected[2] in why


def test_current_defaults_as_good_as_the_best_stay_if_they_are_the_cheapest():
    """The other is better, but by less than the margin."""
    values = noisy(0.0, 0.004, noise=0.002)
    best, chosen, why = choose(values, (0.1, 0.5))
    assert (best, chosen) == (1, 0)
    assert "the current defaults are the cheapest of those shown to be less than 0.01 behind" in why
    assert choose(values, (0.5, 0.1))[:2] == (1, 1)


@pytest.mark.parametrize("noise", [0.5, 0.06])
def test_a_cheap_setting_that_may_be_far_behind_is_not_as_good(noise):
    """Too noisy to be told from the best: that is no evidence that it is as good."""
    values = noisy(0.0, 0.3, 0.299)
    own = np.random.default_rng(1).normal(0, noise, values.shape[1])
    values[2] += own - own.mean()
    assert choose(values, (1.0, 0.5, 0.1))[:2] == (1, 1)


def test_halves_share_no_image_and_split_every_class(source):
    first, second = halves(source, source.classes, seed=3)
    assert not set(first.names) & set(second.names)
    assert sorted([*first.names, *second.names]) == source.names
    assert np.bincount(first.targets).tolist() == np.bincount(second.targets).tolist() == [6, 6, 6, 6]
    assert halves(source, source.classes, seed=3)[0].names == first.names
    assert halves(source, source.classes, seed=4)[0].names != first.names


def test_the_second_half_of_the_images_is_what_is_measured(explainer, source, monkeypatch):
    """A lead that was only in the first half is not believed: in the second all images are alike."""
    first, second = halves(source, source.classes, 1)
    grey = dataclasses.replace(second, names=[second.names[0]] * len(second))
    monkeypatch.setattr(tune_module, "halves", lambda *_: (first, grey))
    result = tuned(explainer, source)
    assert result.chosen == explainer.table.defaults
    assert result.reason == "the lead of another setting over the current defaults did not show again"
    assert result.proposed == Defaults(quantile=0.05)
    assert result.confirmed is result.record["confirmed"] is False
    assert result.record["expected"]["decided"] == ["over_random"]
    assert result.record["expected"]["over_before"]["mean"] == 0
    row = next(r for r in result.measured if r.kind == "setting" and r.defaults == result.chosen)
    assert result.record["expected"]["mass"] == row.mass.to_json()


def test_current_defaults_that_are_best_stay(source):
    explainer = Explainer(Colours().eval(), colour_table(own_channel_first, quantile=0.1, conserve="none"))
    result = tuned(explainer, source)
    assert result.chosen == explainer.table.defaults
    assert [row.kind for row in result.measured] == ["setting", "random", "gradient"]
    assert result.confirmed is result.record["confirmed"] is None
    assert "defaults unchanged" in tune_text(result, explainer.table)


def test_a_table_that_says_nothing_is_refused(source, tmp_path):
    explainer = Explainer(Colours().eval(), colour_table(own_channel_last))
    result = tuned(explainer, source, mosaics=30)
    assert not result.beats_control
    with pytest.raises(TableError, match=r"'colours' points no better than random channels: mass is .* above theirs"):
        result.applied(explainer.table)


def test_the_record_says_how_the_defaults_were_chosen(explainer, source, tmp_path):
    result = tuned(explainer, source, mosaics=30)
    saved = result.applied(explainer.table).save(tmp_path / "table")
    loaded = load_table(saved.folder)
    assert loaded.defaults == result.chosen
    assert loaded.built["by"] == "tests"
    record = loaded.built["tuned"]
    assert record == json.loads(json.dumps(result.record))
    assert record["data"] == "held_out"
    assert record["data_sha256"] == source.fingerprint()
    assert record["mosaics"] == {"choosing": 30, "measuring": 30}
    assert record["before"]["quantile"] == 0.5
    assert Defaults.from_json(record["chosen"]) == result.chosen
    assert record["expected"]["mass"]["mean"] == pytest.approx(1.0)
    assert record["proposed"] == record["chosen"]
    assert record["confirmed"] is True
    assert record["expected"]["decided"] == ["over_random", "over_before"], "they had to be above 0"
    assert record["images"] == {"there": 48, "choosing": 24, "measuring": 24}
    assert record["intervals"] == {"mass": "t", "hits": "wilson", "differences": "paired t"}
    assert len(record["grid"]) == len(result.rows)
    assert str(tmp_path) not in json.dumps(record)


def test_few_mosaics_are_measured_but_no_choice_is_written(explainer, source):
    result = tuned(explainer, source, mosaics=29)
    with pytest.raises(OptionError, match="'mosaics' is 29; allowed: at least 30 for a choice to be written"):
        result.applied(explainer.table)


def test_images_of_the_table_are_left_out_of_both_halves(explainer, source, monkeypatch):
    """Four of each class's twelve are left: two in each half, and no other is ever in a mosaic."""
    used = {digest_of(source.path(i).read_bytes()).hex() for i in range(len(source)) if i % 3}
    parts = []

    def spied(*arguments):
        parts.extend(halves(*arguments))
        return parts

    monkeypatch.setattr(tune_module, "halves", spied)
    result = tuned(explainer, source, used=used)
    left = {source.name(i) for i in range(0, len(source), 3)}
    assert sorted([*parts[0].names, *parts[1].names]) == sorted(left)
    assert [np.bincount(part.targets).tolist() for part in parts] == [[2, 2, 2, 2]] * 2
    assert set(result.left_out.used) == set(source.names) - left
    assert result.record["images_left_out"] == {"used": 32, "unreadable": 0}
    line = left_out_line(result.left_out)
    assert line == "Of 48 images looked at, 32 that the table was built from were left out."


def test_too_few_unused_images_are_refused(explainer, source):
    used = {digest_of(source.path(i).read_bytes()).hex() for i in range(len(source)) if i != 30}
    message = "holds usable images of 0 classes, a mosaic needs 4: 4 have fewer than 2 that can be read and"
    with pytest.raises(DataError, match=message):
        tuned(explainer, source, used=used)


def test_a_class_of_too_few_images_is_left_out_while_four_remain(source, tmp_path):
    """A fifth class of one image, which the network takes for black: the others are measured as without it."""
    table = colour_table(own_channel_first)
    layer = table.layers["carry"]
    layer = dataclasses.replace(layer, log_p=layer.log_p[[0, 1, 2, 3, 0]], rank=layer.rank[[0, 1, 2, 3, 0]])
    five = dataclasses.replace(
        table, classes=(0, 1, 2, 3, 4), images_per_class=(2,) * 5, layers=dict.fromkeys(table.layers, layer)
    )
    (tmp_path / "held_out" / "4").mkdir()
    Image.new("RGB", (6, 6)).save(tmp_path / "held_out" / "4" / "00.png")
    more = ImageFolder(source.root, [*source.names, "4/00.png"], np.append(source.targets, 4))
    result = tuned(Explainer(Colours().eval(), five), more)
    assert result.left_out.classes == (4,)
    assert result.classes == 4
    assert result.record["classes"] == 4
    assert result.record["classes_left_out"] == [4]
    assert classes_left_out_line(result.left_out, five) == (
        "Left out, with fewer than 2 usable images: class 4 (never)."
    )
    assert classes_left_out_line(tuned(Explainer(Colours().eval(), table), source).left_out, table) is None


def test_reading_is_counted_and_comes_before_the_maps(explainer, source):
    seen = []
    tuned(
        explainer, source, reading=lambda *now: seen.append(("images", *now)),
        progress=lambda *now: seen.append(("maps", *now)),
    )  # fmt: skip
    images = [now for now in seen if now[0] == "images"]
    assert seen[: len(images)] == images
    assert images == [("images", done, 48) for done in (12, 24, 36, 48, 48)]


def test_a_grid_tries_every_combination_once_and_the_current_defaults_first():
    table = colour_table(own_channel_first, gamma=2.0)
    settings = Grid(quantiles=(0.1, 0.15, 0.5, (0.5, 0.1)), gammas=(math.inf, 2)).settings(table)
    found = [(tune_module.quantile_text(s, table.layer_names), s.gamma, s.layers) for s in settings]
    upper = ("carry",)
    assert found == [
        ("0.5", 2.0, ("*",)),  # the table's; 0.15 selects as many as 0.1, the pair is 0.1 in the upper half alone
        ("0.1", math.inf, ("*",)),
        ("0.1", math.inf, upper),
        ("0.1", 2.0, ("*",)),
        ("0.1", 2.0, upper),
        ("0.5", math.inf, ("*",)),
        ("0.5", math.inf, upper),
        ("0.5", 2.0, upper),
        ("0.5/0.1", math.inf, ("*",)),
        ("0.5/0.1", 2.0, ("*",)),
    ]
    assert quantile_of_layers(settings[-1].quantile, table.layer_names) == {"detect": 0.5, "carry": 0.1}


def test_layer_names_are_no_patterns():
    """A module's name may hold what a glob pattern would read as a choice of letters."""
    table = colour_table(own_channel_first)
    layer = table.layers["carry"]
    table = dataclasses.replace(table, layers=dict.fromkeys(("a[01]", "a0", "b", "c[x]"), layer))
    grid = Grid(quantiles=((0.5, 0.1), 0.2), gammas=(math.inf,))
    _, pair, _, _, upper = grid.settings(table)
    assert quantile_of_layers(pair.quantile, table.layer_names) == {"a[01]": 0.5, "a0": 0.5, "b": 0.1, "c[x]": 0.1}
    assert match(table.layer_names, upper.layers) == ("b", "c[x]")
    assert tune_module.layers_text(upper, table.layer_names) == "upper-half"


class Unread:
    """A source that may be asked what it holds, but not read."""

    root = "unread"

    def __init__(self, targets):
        self.targets = np.array(targets)
        self.classes = tuple(np.unique(self.targets).tolist())

    def take(self, indices):
        return Unread(self.targets[indices])

    def __len__(self):
        return len(self.targets)


FOUR = [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (FOUR, {"criterion": "gini"}, OptionError, "'criterion' is 'gini'; allowed: mass, hits, both"),
        (FOUR, {"mosaics": 3}, OptionError, "'mosaics' is 3"),
        (FOUR, {"grid": Grid(quantiles=(0.1, 1.5))}, OptionError, "'quantile' is 1.5; allowed: a number in"),
        (FOUR, {"grid": Grid(quantiles=())}, OptionError, "'quantiles' is ()"),
        (FOUR, {"grid": Grid(quantiles=((0.1, 0.2, 0.3),))}, OptionError, "'quantiles' is (0.1, 0.2, 0.3)"),
        (FOUR, {"grid": Grid(gammas=(-1.0,))}, OptionError, "'gamma' is -1.0"),
        (FOUR, {"grid": Grid(layers=(("nowhere.*",),))}, OptionError, "'layers' is 'nowhere.*'"),
        (FOUR, {"grid": Grid(layers=("some",))}, OptionError, "'layers' is 'some'; allowed: 'all', 'upper-half'"),
        (FOUR, {"grid": Grid(conserve=("energy",))}, OptionError, "'conserve' is 'energy'"),
        (FOUR[:6], {}, DataError, "holds images of 3 classes; a mosaic needs 4"),
        ([*FOUR, 4, 4], {}, UncoveredTargetError, "no row for target 4 (never)"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_any_work(explainer, targets, options, error, message):
    with pytest.raises(error) as raised:
        tuned(explainer, Unread(targets), **options)
    assert message in str(raised.value)


def test_a_table_for_instance_wise_selection_is_refused(source):
    explainer = Explainer(Colours().eval(), colour_table(own_channel_first, selection="instance"))
    with pytest.raises(TableError, match="default selection is 'instance', tuning expects 'class'"):
        tuned(explainer, source)


def test_progress_counts_every_map_and_ends_at_the_total(explainer, source):
    seen = []
    result = tuned(explainer, source, progress=lambda done, total: seen.append((done, total)))
    maps = 12 * (len(result.rows) + len(result.measured))
    assert seen[-1] == (maps, maps)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_grid_is_printed_with_the_chosen_row_marked(explainer, source):
    from rich.console import Console

    result, names = tuned(explainer, source), explainer.layer_names
    console = Console(width=130, file=io.StringIO())
    console.print(grid_table(result, names))
    console.print(measured_table(result, names))
    lines = console.file.getvalue().splitlines()
    (marked,) = [line for line in lines[: len(result.rows) + 5] if "chosen" in line]
    assert marked.split()[:5] == ["chosen,", "best", "0.05", "inf", "all"]
    assert sum(line.strip().startswith("random ") for line in lines) == 3
    assert sum(bool(line.strip()) and line.split()[0] == "gradient" for line in lines) == 2
    text = tune_text(result, explainer.table)
    assert text[0] == "defaults changed"
    assert any("chosen    quantile 0.05, gamma inf, layers all" in line for line in text)
    assert any("expected  mass 1.000 ±0.000; hits 1.00 0.76-1.00" in line for line in text)
    assert any("12 of four from 24 images, and 12 from 24 others" in line for line in text)


@pytest.mark.parametrize(
    ("width", "gone"),
    [(None, []), (110, []), (100, ["over gradient"]), (80, ["over gradient", "kept", "hits"]), (20, None)],
)
def test_a_narrow_grid_leaves_columns_out(explainer, source, width, gone):
    view = grid_table(tuned(explainer, source), explainer.layer_names, width)
    missing = [n for n in ("over gradient", "kept", "hits") if n not in {c.header for c in view.columns}]
    if gone is not None:
        assert set(missing) <= set(gone)
        assert width is None or natural_width(view) <= width
    assert {"mass", "over current", "quantile"} <= {c.header for c in view.columns}
    assert ("kept:" in view.caption) == ("kept" not in missing)
