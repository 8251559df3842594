"""A study finds what its measures find one picture at a time, keeps it, and goes on after an end."""

import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from parchgrad.errors import EvaluationError, InUseError, OptionError, WorkerError
from parchgrad.evaluation import maps as figures
from parchgrad.evaluation import perturbation, sanity
from parchgrad.evaluation.cost import Cost
from parchgrad.evaluation.images import Picture
from parchgrad.evaluation.intervals import Interval, difference_interval, mean_interval
from parchgrad.evaluation.journal import Journal, journal_in
from parchgrad.evaluation.methods import Method, Unavailable
from parchgrad.evaluation.results import Cell, Results
from parchgrad.evaluation.study import CURVE_POINTS, Effort, Subject, cases_of, key_of, study
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing
from tests.parchgrad.networks import Branching, build, table_for

SIDE = 24
EFFORT = Effort(curves=2, checks=2, step=64, road=(0.25, 0.5), depths=3, noises=2, rounds=1, resamples=200)
SETTINGS = {"model": {"name": "net"}, "seed": 0}


@pytest.fixture(scope="module")
def explainer():
    network = build(Branching)
    return Explainer(network, table_for(network))


def picture(number, side=SIDE, target=None, mask=True):
    generator = torch.Generator().manual_seed(number)
    place = np.zeros((side, side), bool)
    place[: side // 2, number % side :] = True
    group = f"photo {number}.png"
    return Picture(
        torch.randn(3, side, side, generator=generator, dtype=torch.float64), number % 5 if target is None else target,
        place if mask else None, name=group if side == SIDE else f"mosaic {number}", group=group,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(explainer):
    """Photographs, most with the class that the network finds; two of the others have no place."""
    found = []
    for number in range(6):
        one = picture(number, mask=number not in (1, 4))
        predicted = int(explainer.predict(one.image[None]).argmax())
        found.append(replace(one, target=predicted if number not in (0, 3) else (predicted + 1) % 5))
    return found, [picture(number, 2 * SIDE) for number in range(3)]


def methods_of(explainer):
    """The gradient, a map that knows nothing, and ParchGrad, which does not answer class 4."""

    def gradient(by, **options):
        return lambda images, targets: by.explain(images, targets, **options).saliency()

    def rows(height, width):
        return torch.arange(1.0, height + 1)[:, None].expand(height, width)

    def ours(images, targets):
        saliency = explainer.explain(images, targets, quantile=0.5).saliency()
        saliency[torch.tensor(targets) == 4] = math.nan
        return saliency

    def of(network, **options):
        return gradient(Explainer(network, explainer.table), **options)

    return [
        Method("rows", "baseline", "Darker below.", lambda x, t: rows(*x.shape[2:]).expand(len(x), -1, -1).clone()),
        Method("gradient", "gradient", "The gradient.", gradient(explainer, rule=False), lambda n: of(n, rule=False)),
        Method(
            "input x gradient", "gradient", "Times input.",
            gradient(explainer, rule=False, method="input_x_gradient"),
            lambda n: of(n, rule=False, method="input_x_gradient"),
            attributions=lambda x, t: explainer.explain(x, t, rule=False, method="input_x_gradient").attributions,
        ),
        Method(
            "ParchGrad", "parchgrad", "Ours.", ours, lambda n: of(n, quantile=0.5), explain={"quantile": 0.5},
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def subject(explainer, pictures):
    photographs, mosaics = pictures
    labels = [f"class {index}" for index in range(5)]
    return Subject(
        explainer, methods_of(explainer), mosaics, photographs, labels, Preprocessing((SIDE, SIDE), "stretch"), 4
    )


@pytest.fixture(scope="module")
def results(subject):
    return study(subject, EFFORT, SETTINGS, unavailable=[Unavailable("LRP", "no rule")], notes=["a note"])


def alone(method, one):
    return method.maps(one.image[None], [one.target])[0].double().numpy()


def by_name(methods, name):
    (found,) = (method for method in methods if method.name == name)
    return found


@pytest.mark.parametrize("name", ["rows", "gradient", "input x gradient", "ParchGrad"])
def test_place_and_shape_are_those_of_each_picture_alone(subject, results, name):
    method = by_name(subject.methods, name)
    for key, measure in (
        ("object_mass", figures.mass_share),
        ("object_density", figures.area_weighted_mass),
        ("object_hits", figures.pointing_game),
    ):
        expected = [
            measure(alone(method, one), one.mask) if one.mask is not None else math.nan for one in subject.photographs
        ]
        np.testing.assert_allclose(results.values[key][name], expected, rtol=1e-4, err_msg=key)
    for key, measure in (
        ("gini", figures.gini),
        ("hoyer", figures.hoyer),
        ("entropy", lambda saliency: figures.entropy(saliency, normalised=True)),
    ):
        expected = [measure(alone(method, one)) for one in subject.photographs]
        np.testing.assert_allclose(results.values[key][name], expected, rtol=1e-4, err_msg=key)
    for key, measure in (("mosaic_mass", figures.mass_share), ("mosaic_hits", figures.pointing_hit)):
        expected = [measure(alone(method, one), one.mask) for one in subject.mosaics]
        np.testing.assert_allclose(results.values[key][name], expected, rtol=1e-4, err_msg=key)


def test_expensive_measures_are_of_the_first_photographs_whose_class_is_found(subject, results):
    offset = len(subject.mosaics)
    assert results.pictures["insertion"] == (offset + 1, offset + 2)
    assert results.pictures["cascade"] == (offset + 1, offset + 2)
    assert [results.shown[index].name for index in results.pictures["road"]] == ["photo 1.png", "photo 2.png"]
    assert [one.predicted for one in results.shown[offset:]] == [False, True, True, False, True, True]


@pytest.mark.parametrize("name", ["rows", "gradient"])
def test_curves_are_those_of_each_photograph_alone(subject, results, name):
    method, predict = by_name(subject.methods, name), subject.explainer.predict
    curves = []
    for row, index in enumerate((1, 2)):
        one = subject.photographs[index]
        given = (predict, one.image[None], alone(method, one)[None], [one.target])
        inserted = perturbation.insertion(*given, step=64)
        morf, lerf = (perturbation.removal(*given, least_first=least) for least in (False, True))
        odds = [perturbation.removal(*given, least_first=least, score=perturbation.log_odds) for least in (False, True)]
        roads = [perturbation.road(*given, least_first=least, fractions=(0.25, 0.5)) for least in (False, True)]
        expected = {
            "insertion": inserted.area(),
            "deletion": perturbation.deletion(*given, step=64).area(),
            "morf_aopc": perturbation.aopc(morf),
            "lerf_aopc": perturbation.aopc(lerf),
            "log_odds_gap": perturbation.gap(*odds),
            "road": perturbation.gap(*roads),
        }
        for key, value in expected.items():
            assert results.values[key][name][row] == pytest.approx(value[0], abs=1e-4), key
        curves.append(np.interp(np.linspace(0, 1, CURVE_POINTS), inserted.fractions, inserted.scores[0]))
    drawn = results.curves["insertion"][name]
    np.testing.assert_allclose(drawn.mean, np.mean(curves, axis=0), atol=1e-4)
    assert drawn.images == 2


def test_checks_are_those_of_their_own_functions(subject, results):
    method = by_name(subject.methods, "input x gradient")
    chosen = [subject.photographs[index] for index in (1, 2)]
    images, targets = torch.stack([one.image for one in chosen]), [one.target for one in chosen]
    network = subject.explainer.model
    expected = {
        "max_sensitivity": sanity.max_sensitivity(method.maps, images, targets, samples=2).largest,
        "completeness_gap": sanity.completeness_gap(
            method.attributions(images, targets), subject.explainer.predict, images, targets
        ).relative,
        "entropy_rise": sanity.entropy_rise(method.of, network, images, targets).rise,
        "cascade": sanity.cascade(method.of, network, images, targets).similarity[-1],
    }
    for key, value in expected.items():
        assert np.isfinite(value).all(), key
        np.testing.assert_allclose(results.values[key]["input x gradient"], value, rtol=1e-3, atol=1e-4, err_msg=key)
    table = sanity.table_randomisation(subject.explainer, images, targets, quantile=0.5)
    np.testing.assert_allclose(results.values["classes_similarity"]["ParchGrad"], table.classes, atol=1e-4)
    np.testing.assert_allclose(results.values["channels_similarity"]["ParchGrad"], table.channels, atol=1e-4)
    assert set(results.values["classes_similarity"]) == {"ParchGrad"}
    assert set(results.values["completeness_gap"]) == {"input x gradient"}


def test_a_method_that_looks_at_no_network_survives_random_weights(results):
    assert results.values["cascade"]["rows"] == pytest.approx([1, 1])
    assert results.values["entropy_rise"]["rows"] == pytest.approx([0, 0])
    assert results.cascade["rows"] == pytest.approx([1, 1, 1])
    assert len(results.layers) == 3


def test_what_is_not_answered_is_not_measured_and_nothing_is_zero(explainer, pictures):
    """A target without a row has NaN; a map of zeros lies nowhere and points nowhere."""
    photographs, mosaics = pictures
    four = replace(mosaics[0], target=4)
    nothing = Method("nothing", "baseline", "Zero.", lambda x, t: torch.zeros(len(x), *x.shape[2:]))
    subject = Subject(
        explainer, [*methods_of(explainer), nothing], [four, mosaics[1]], photographs[2:3], ["a"] * 5,
        Preprocessing((SIDE, SIDE), "stretch"),
    )  # fmt: skip
    found = study(subject, replace(EFFORT, curves=0, checks=0), SETTINGS)
    assert math.isnan(found.values["mosaic_mass"]["ParchGrad"][0])
    assert found.values["mosaic_mass"]["ParchGrad"][1] > 0
    assert found.cells["mosaic_mass"]["ParchGrad"].interval.left_out == 1
    assert found.values["mosaic_mass"]["nothing"].tolist() == [0, 0]
    assert found.values["mosaic_hits"]["nothing"].tolist() == [0, 0]
    assert math.isnan(found.values["gini"]["nothing"][0])
    assert "insertion" not in found.values
    assert found.curves == {}


def test_photographs_that_the_network_finds_none_of_have_no_curves(subject):
    lost = replace(subject, photographs=[subject.photographs[0], subject.photographs[3]])
    found = study(lost, EFFORT, SETTINGS)
    assert "The network finds the class of none of the photographs: no curves and no checks." in found.notes
    assert set(found.values) == {
        "mosaic_mass",
        "mosaic_hits",
        "object_mass",
        "object_density",
        "object_hits",
        "gini",
        "hoyer",
        "entropy",
    }


def test_cells_are_means_with_intervals_and_differences_from_the_gradient(results):
    values = results.values["mosaic_mass"]
    groups = [results.shown[index].group for index in results.pictures["mosaic_mass"]]
    cell = results.cells["mosaic_mass"]["ParchGrad"]
    assert cell.interval == mean_interval(values["ParchGrad"], groups, resamples=200)
    assert cell.difference == difference_interval(values["ParchGrad"], values["gradient"], groups, resamples=200)
    assert results.cells["mosaic_mass"]["gradient"].difference is None
    best = results.ranking("mosaic_mass")
    assert best == sorted(best, key=lambda name: -values[name].mean())
    assert results.ranking("deletion")[0] == min(
        results.values["deletion"], key=lambda name: results.values["deletion"][name].mean()
    )


def test_what_batches_hold_does_not_matter(subject, results):
    again = study(replace(subject, batch_size=1), EFFORT, SETTINGS)
    for key, by_method in results.values.items():
        for name, values in by_method.items():
            np.testing.assert_allclose(again.values[key][name], values, rtol=1e-3, atol=1e-4, err_msg=f"{key} {name}")


def counting(subject, calls):
    def counted(method):
        def maps(images, targets):
            calls.append(method.name)
            return method.maps(images, targets)

        return replace(method, maps=maps)

    return replace(subject, methods=[counted(method) for method in subject.methods])


def same(one: Results, other: Results):
    first, second = ({k: v for k, v in found.to_json().items() if k != "methods"} for found in (one, other))
    assert first == second


def test_an_ended_run_goes_on_where_it_was(subject, tmp_path):
    whole = study(subject, EFFORT, SETTINGS)
    every = []
    study(counting(subject, every), EFFORT, SETTINGS)
    folder, seen = tmp_path / "unfinished", []

    def stop(done, total):
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), journal_in(folder, key_of(SETTINGS)) as journal:
        study(subject, EFFORT, SETTINGS, journal=journal, progress=stop)
    kept = len((folder / "journal.jsonl").read_text().splitlines()) - 1
    assert kept == 4  # costs and three of places; the first word of progress is before any work is counted
    calls = []
    with journal_in(folder, key_of(SETTINGS)) as journal:
        assert len(journal.found) == kept
        again = study(counting(subject, calls), EFFORT, SETTINGS, journal=journal)
    same(again, whole)
    assert 0 < len(calls) < len(every)
    assert not folder.exists()


def interrupted(folder, key="key", **pieces):
    """What a run finds that records `pieces` and is then ended."""
    before = {}
    try:
        with journal_in(folder, key) as journal:
            before |= journal.found
            for piece, found in pieces.items():
                journal.record(piece, found)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return before


def test_a_line_cut_off_is_dropped_and_what_is_no_journal_is_refused(tmp_path):
    folder = tmp_path / "unfinished"
    path = folder / "journal.jsonl"
    assert interrupted(folder, one={"a": 1}, two={"b": math.nan}) == {}
    path.write_bytes(path.read_bytes()[:-5])
    assert interrupted(folder, three={}) == {"one": {"a": 1}}
    with pytest.raises(EvaluationError, match="other options"):
        interrupted(folder, "another")
    assert set(interrupted(folder)) == {"one", "three"}
    path.write_text("no journal\n")
    with pytest.raises(EvaluationError, match="no journal"):
        interrupted(folder)
    with journal_in(folder, "key", restart=True) as journal:
        assert journal.found == {}
        with pytest.raises(InUseError):
            interrupted(folder)
    assert not folder.exists()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_processes_find_the_same(subject, results, monkeypatch):
    several = replace(subject, workers=2)
    same(replace(study(several, EFFORT, SETTINGS), unavailable=results.unavailable, notes=results.notes), results)
    for one, other in zip(cases_of(several, results, each=1), cases_of(subject, results, each=1), strict=True):
        assert one.shown == other.shown
        for name, saliency in one.maps.items():
            np.testing.assert_array_equal(saliency, other.maps[name])
    assert not multiprocessing.active_children()


def broken(subject, end):
    def maps(images, targets):
        if images.shape[2] == SIDE:
            end()
        return torch.ones(len(images), *images.shape[2:])

    return replace(subject, methods=[Method("broken", "baseline", "Breaks.", maps)], workers=2)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_an_error_in_a_process_comes_out_and_a_killed_one_is_named(subject, monkeypatch):
    def refuse():
        raise OptionError("quantile", 2, "less")

    monkeypatch.setattr("parchgrad.evaluation.study.costs", lambda methods, *_, **__: {"broken": Cost(1, 1, 1)})
    with pytest.raises(OptionError, match="'quantile' is 2"):
        study(broken(subject, refuse), EFFORT, SETTINGS)
    with pytest.raises(WorkerError, match="fewer --workers"):
        study(broken(subject, lambda: os.kill(os.getpid(), signal.SIGKILL)), EFFORT, SETTINGS)
    assert not multiprocessing.active_children()


def test_the_key_is_of_what_decides(tmp_path):
    assert key_of(SETTINGS | {"command": "a"}) == key_of(SETTINGS | {"command": "b"})
    assert key_of(SETTINGS | {"seed": 1}) != key_of(SETTINGS)


def test_json_holds_everything_and_no_nan(results, tmp_path):
    path = tmp_path / "out.json"
    results.write_json(path)
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["settings"] == SETTINGS
    assert read["notes"] == ["a note"]
    assert read["unavailable"] == [{"name": "LRP", "reason": "no rule"}]
    assert [row["name"] for row in read["methods"]] == ["rows", "gradient", "input x gradient", "ParchGrad"]
    values = read["values"]["object_mass"]
    assert values["methods"]["gradient"][1] is None  # no place
    assert values["methods"]["gradient"][2] == pytest.approx(results.values["object_mass"]["gradient"][2])
    assert read["pictures"][values["pictures"][2]]["name"] == "photo 2.png"
    assert read["cells"]["mosaic_mass"]["rows"]["interval"]["mean"] == pytest.approx(
        results.values["mosaic_mass"]["rows"].mean()
    )


def test_parquet_holds_every_value_a_row(results, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "out.parquet"
    results.write_parquet(path)
    table = parquet.read_table(path)
    assert json.loads(table.schema.metadata[b"parchgrad.settings"]) == SETTINGS
    found = table.to_pylist()
    assert len(found) == sum(len(values) for by_method in results.values.values() for values in by_method.values())
    (one,) = (
        row for row in found
        if (row["picture"], row["measure"], row["method"]) == ("mosaic 1", "mosaic_mass", "ParchGrad")
    )  # fmt: skip
    assert one["value"] == results.values["mosaic_mass"]["ParchGrad"][1]
    assert (one["kind"], one["target"]) == ("mosaic", 1)


def test_progress_ends_where_it_says(subject):
    seen = []
    study(subject, EFFORT, SETTINGS, journal=Journal(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_cases_have_every_methods_own_map(subject, results):
    cases = cases_of(subject, results, each=1)
    assert cases
    for case in cases:
        pictures = {one.name: one for one in (*subject.mosaics, *subject.photographs)}
        one = pictures[case.shown.name]
        assert case.pixels.shape == (*one.image.shape[1:], 3)
        for method in subject.methods:
            expected = alone(method, one)
            if np.isfinite(expected).all():
                np.testing.assert_allclose(case.maps[method.name], expected, rtol=1e-4, atol=1e-6)
        index = results.shown.index(case.shown)
        for name, values in case.figures.items():
            for key, value in values.items():
                expected = results.values[key][name][results.pictures[key].index(index)]
                assert value == expected or (math.isnan(value) and math.isnan(expected))


def test_a_seed_of_the_gradient_is_none_of_the_study(subject):
    """`explain` may name the seed of a gradient: the table's randomisation has a draw of its own."""
    (ours,) = [method for method in subject.methods if method.name == "ParchGrad"]
    seeded = replace(ours, explain={"quantile": 0.5, "seed": "probability_weighted_logit"})
    found = study(replace(subject, methods=[seeded]), EFFORT, SETTINGS)
    assert np.isfinite(found.values["channels_similarity"]["ParchGrad"]).all()


def test_the_seed_draws_noise_weights_and_tables(subject, results):
    other = study(subject, replace(EFFORT, seed=5), SETTINGS)
    for key in ("max_sensitivity", "cascade", "channels_similarity"):
        assert not np.array_equal(other.values[key]["ParchGrad"], results.values[key]["ParchGrad"]), key
    np.testing.assert_array_equal(other.values["mosaic_mass"]["ParchGrad"], results.values["mosaic_mass"]["ParchGrad"])


def test_a_map_that_vanishes_under_random_weights_was_not_tested(subject):
    def of(network):
        return lambda images, targets: torch.zeros(len(images), *images.shape[2:])

    (gradient,) = [method for method in subject.methods if method.name == "gradient"]
    found = study(replace(subject, methods=[replace(gradient, of=of)]), EFFORT, SETTINGS)
    assert "cascade" not in found.cells or "gradient" not in found.cells["cascade"]
    assert "gradient" not in found.cells["entropy_rise"]


def test_differences_of_few_photographs_are_not_marked():
    few = Interval(0.5, 0.4, 0.6, 9, 9, 0, "bca")
    many = replace(few, maps=10, images=10)
    assert not Cell(few, few).distinct
    assert Cell(many, many).distinct
    assert not Cell(many, replace(many, low=-0.1)).distinct


def test_a_step_is_a_row_of_the_picture():
    assert Effort().pixels(224, 224) == 224
    assert Effort().pixels(32, 48) == 48
    assert Effort(step=7).pixels(224, 224) == 7
    assert Effort(rows=14).pixels(224, 224) == 14 * 224
    assert Effort(rows=14).pixels(16, 16) == 2 * 16
