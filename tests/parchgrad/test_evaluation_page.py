"""An evaluation's page: every figure in its cell, sentences no stronger than their intervals, hostile text as text."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from parchgrad.evaluation.cases import Case
from parchgrad.evaluation.measures import MEASURES, SECTIONS
from parchgrad.evaluation_page import charts, pictures, verdict, write_page
from tests.parchgrad.results import Unavailable, curves, picture, results, row

NAN = math.nan
HOSTILE = "<script>alert(1)</script> \"quoted\" & 'single' {{ 7 * 7 }} </style><img src=x onerror=alert(2)>"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: every element with its attributes, all text, tables as rows of cells."""

    def __init__(self, raw):
        super().__init__(convert_charrefs=True)
        self.raw, self.open, self.attributes, self.names, self.texts, self.styles = raw, [], [], [], [], []
        self.tables, self.ids = [], []
        self.feed(raw)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([tag, found, ""])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1][2] += data

    def rows(self, caption):
        """The rows of the table with this caption, each cell (tag, attributes, text)."""
        place = self.captions().index(caption)
        return [[(tag, found, " ".join(text.split())) for tag, found, text in line] for line in self.tables[place]]

    def captions(self):
        return re.findall(r"<caption[^>]*>(.*?)</caption>", self.raw)

    def cell(self, caption, method, measure):
        lines = self.rows(caption)
        heads = next(line for line in lines if line[0][2] == "method")
        column = next(i for i, (_, _, text) in enumerate(heads) if text.startswith(measure))
        return next(line for line in lines if line[0][2] == method)[column]


def page_of(found, path, cases=()):
    write_page(found, cases, path)
    return Page(path.read_text(encoding="utf-8"))


def values_of(mean, count=12, spread=0.02, seed=0):
    """Values with exactly this mean."""
    noise = np.random.default_rng(seed).normal(0, spread, count)
    return mean + noise - noise.mean()


def case(names, size=(32, 48), reason="ParchGrad's worst mass: 0.12", **shown):
    generator = np.random.default_rng(0)
    mask = np.zeros(size, bool)
    mask[8:20, 8:20] = True
    return Case(
        reason, picture(0, **shown), generator.integers(0, 255, (*size, 3), np.uint8), mask,
        {name: generator.random(size) for name in names},
        {name: {"mosaic_mass": 0.25, "mosaic_hits": float(name == "ParchGrad")} for name in names},
    )  # fmt: skip


@pytest.fixture
def full():
    """Every measure of six methods, but for some cells; curves and a cascade."""
    names = ("random map", "gradient", "SmoothGrad", "Grad-CAM", "ParchGrad", "ParchGrad, random channels")
    values = {
        measure.key: {name: values_of(0.2 + 0.1 * n + 0.001 * m, seed=7 * n + m) for n, name in enumerate(names)}
        for m, measure in enumerate(MEASURES)
    }
    values["object_hits"]["SmoothGrad"][:] = NAN
    values["object_mass"]["Grad-CAM"][:3] = NAN
    for key in ("classes_similarity", "channels_similarity"):
        values[key] = {"ParchGrad": values[key]["ParchGrad"]}
    return results(
        values,
        costs={"random map": 1.0, "SmoothGrad": 26.0, "Grad-CAM": 2.6, "ParchGrad": 1.9, "gradient": None},
        curves={"insertion": curves(names), "deletion": curves(names)},
        layers=("top", "middle", "bottom"),
        cascade={name: np.array([0.5, 0.3, 0.1]) for name in names},
        unavailable=(Unavailable("LRP", "zennit is not installed."),),
        notes=("The table contrasts ten classes.",),
        settings={
            "model": {"name": "net", "sha256": "ab" * 32},
            "data": {"root": "/photographs/of mine/val/"},
            "places": {},
            "methods": {"ParchGrad": {"quantile": 0.1}},
            "seed": 3,
            "effort": {"road": [0.1, 0.3]},
            "command": ["parchgrad", "evaluate", "a model", "--report", "out.html"],
        },
    )


# --- the figures ---

CAPTIONS = {
    "mosaics": "Four photographs in one picture · Boxes and masks: methods by measures",
    "objects": "Four photographs in one picture · Boxes and masks: methods by measures",
    "perturbation": "What happens when pixels go: methods by measures",
    "checks": "Is it an explanation at all?: methods by measures",
    "shape": "Sparse or spread: methods by measures",
}


# The others stand in the table of the sanity checks, and only there.
IN_TABLES = [one for one in MEASURES if one.key not in verdict.REPLACED]


def column_of(page, measure):
    """The measure's place: titles repeat, so by the link of its head."""
    heads = re.findall(r'<th scope="col"><a href="#m-(\w+)"', page.raw)
    own = [one.key for one in IN_TABLES if CAPTIONS[one.section] == CAPTIONS[measure.section]]
    assert [key for key in heads if key in own] == own
    return 2 + own.index(measure.key)


def test_every_method_and_measure_has_its_cell(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    for measure in IN_TABLES:
        column = column_of(page, measure)
        lines = {line[0][2]: line for line in page.rows(CAPTIONS[measure.section]) if len(line) > column}
        for method in full.rows:
            tag, _, text = lines[method.name][column]
            assert tag == "td"
            cell = full.cells[measure.key].get(method.name)
            if cell is None:
                assert text.startswith("– ")
            else:
                one = cell.interval
                assert text.startswith(f"{one.mean:.3f}")
                assert f"{one.low:.3f}–{one.high:.3f}" in text
        chance = lines["chance"][column][2] if "chance" in lines else None
        if chance is not None:
            assert chance == (
                "– depends on the model and the pictures" if measure.chance is None else f"{measure.chance:g}"
            )


def test_marks_say_better_or_worse_than_the_gradient_whatever_the_direction(tmp_path):
    values = {
        "mosaic_mass": {"gradient": values_of(0.4), "A": values_of(0.6, seed=1), "B": values_of(0.2, seed=2)},
        "deletion": {"gradient": values_of(0.4), "A": values_of(0.6, seed=1), "B": values_of(0.2, seed=2)},
        "gini": {"gradient": values_of(0.4), "A": values_of(0.6, seed=1), "B": values_of(0.2, seed=2)},
    }
    values["mosaic_mass"]["C"] = values["mosaic_mass"]["gradient"] + values_of(0.0, seed=3)
    page = page_of(results(values), tmp_path / "page.html")
    mass, deletion, gini = (
        lambda method, c=caption, m=measure: page.cell(f"{c}: methods by measures", method, m)
        for caption, measure in (
            ("Four photographs in one picture", "mass"),
            ("What happens when pixels go", "deletion"),
            ("Sparse or spread", "Gini"),
        )
    )
    assert "▲ better than gradient" in mass("A")[2]
    assert "▼ worse than gradient" in mass("B")[2]
    assert "▲" not in mass("C")[2]
    assert "▼" not in mass("C")[2]
    assert "than gradient" not in mass("gradient")[2]
    assert "▼ worse than gradient" in deletion("A")[2]
    assert "▲ better than gradient" in deletion("B")[2]
    assert "than gradient" not in gini("A")[2]
    assert [mass(name)[1].get("class") for name in ("gradient", "A", "B", "C")] == [None, "best", None, None]
    assert [deletion(name)[1].get("class") for name in ("gradient", "A", "B")] == [None, None, "best"]
    assert [gini(name)[1].get("class") for name in ("gradient", "A", "B")] == [None, None, None]


def test_a_baseline_is_no_candidate_for_the_best_of_the_checks(tmp_path):
    values = {"max_sensitivity": {name: values_of(mean) for name, mean in
                                  (("random map", 0.1), ("gradient", 0.4), ("Grad-CAM", 0.2))}}  # fmt: skip
    assert framed(values, tmp_path) == {"Grad-CAM"}


def framed(values, tmp_path, **fields):
    """Whose cell of the only measure has a frame."""
    (key,) = values
    (measure,) = (one for one in MEASURES if one.key == key)
    (section,) = (one for one in SECTIONS if one.key == measure.section)
    page = page_of(results(values, **fields), tmp_path / "page.html")
    caption = f"{section.title}: methods by measures"
    return {name for name in values[key] if page.cell(caption, name, measure.title)[1].get("class") == "best"}


def test_nothing_is_framed_of_few_photographs(tmp_path):
    values = {"gradient": values_of(0.3, count=9), "Grad-CAM": values_of(0.5, count=9)}
    assert framed({"deletion": values}, tmp_path) == set()
    values = {"gradient": values_of(0.3, count=10), "Grad-CAM": values_of(0.5, count=10)}
    assert framed({"deletion": values}, tmp_path) == {"gradient"}
    values = {"gradient": values_of(0.3), "Grad-CAM": np.r_[0.1, np.full(11, NAN)]}
    assert framed({"deletion": values | {"LRP": values_of(0.4)}}, tmp_path) == {"gradient"}
    shown = [picture(i, group="the same") for i in range(12)]
    assert framed({"deletion": {"gradient": values_of(0.3), "LRP": values_of(0.4)}}, tmp_path, shown=shown) == set()


def test_nothing_is_framed_that_is_no_better_than_chance(tmp_path):
    assert framed({"entropy_rise": {"gradient": values_of(-1.0), "Grad-CAM": values_of(-0.5)}}, tmp_path) == set()
    assert framed({"entropy_rise": {"gradient": values_of(-1.0), "Grad-CAM": values_of(0.1)}}, tmp_path) == {"Grad-CAM"}
    high = {"input x gradient": values_of(1.5), "integrated gradients": values_of(1.2)}
    assert framed({"completeness_gap": high}, tmp_path) == set()


def test_what_reads_the_same_is_framed_alike(tmp_path):
    values = {"gradient": values_of(0.5), "Grad-CAM": values_of(0.50004), "LRP": values_of(0.4)}
    assert framed({"insertion": values}, tmp_path) == {"gradient", "Grad-CAM"}
    del values["LRP"]
    assert framed({"insertion": values}, tmp_path) == set(), "all alike: none is best"


def test_a_missing_cell_says_why(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    (_, found, text) = page.cell(CAPTIONS["objects"], "SmoothGrad", "hits within 15 px")
    assert (found["title"], text) == (reason := "has no value on any of the pictures", f"– {reason}")
    assert "hits within 15 px: SmoothGrad has no value on any of the pictures." in page.text
    assert "hits: SmoothGrad" not in page.text
    partly = next(line for line in page.rows(CAPTIONS["objects"]) if line[0][2] == "Grad-CAM")
    assert "n = 9" in partly[4][2]


def test_costs_and_how_many_pictures(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    lines = {line[0][2]: line[1][2] for line in page.rows(CAPTIONS["mosaics"]) if len(line) > 2}
    assert (lines["SmoothGrad"], lines["ParchGrad"], lines["gradient"]) == ("26.0", "1.9", "–")
    assert "the map of one class should lie on its quarter. Such a picture is a mosaic. 12 mosaics." in page.text


def test_pictures_are_counted_by_measure_where_they_differ(tmp_path):
    shown = [picture(i, group=f"p{i % 2}") for i in range(4)]
    values = {"max_sensitivity": {"gradient": [0.1]}, "entropy_rise": {"gradient": [0.1, 0.2, 0.3, 0.2]}}
    page = page_of(results(values, shown=shown), tmp_path / "page.html")
    heads = next(line for line in page.rows(CAPTIONS["checks"]) if line[0][2] == "method")
    assert [text for _, _, text in heads[2:]] == [
        "max-sensitivity lower is better 1 picture",
        "eMPRT higher is better 4 pictures",
    ]
    page = page_of(results({"entropy_rise": values["entropy_rise"]}, shown=shown), tmp_path / "page.html")
    assert "4 mosaics of 2 photographs." in page.text
    assert "4 mosaics, of 3 classes" in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (-0.05, "−0.050"), (-0.0001, "0.000"), (12.345, "12.3"), (-1234.5, "−1,234"), (3e8, "3.0e+08"),
     (NAN, "–"), (math.inf, "–")],
)  # fmt: skip
def test_numbers(value, text):
    assert verdict.number(value) == text


# --- the sentences ---


def verdict_of(values, costs=None, **fields):
    return verdict.sentences(results({"mosaic_mass": values}, costs, **fields))


def test_first_beyond_chance():
    (said,) = verdict_of(
        {"gradient": values_of(0.3), "Grad-CAM": values_of(0.45, seed=1), "ParchGrad": values_of(0.6, seed=2)}
    )
    assert said.startswith(
        "In mass on mosaics (12 mosaics), ParchGrad is first of the 3 methods that cost at most about three forward "
        "passes: 0.600, next Grad-CAM 0.450; it is ahead of each beyond chance (95 % interval of the difference from "
        "Grad-CAM, 0.1"
    )
    assert said.endswith(", widened for 2 comparisons).")


def test_a_tie_is_called_one():
    (said,) = verdict_of({"Grad-CAM": values_of(0.45, spread=0.1), "ParchGrad": values_of(0.46, spread=0.1, seed=2)})
    assert said.startswith(
        "In mass on mosaics (12 mosaics), ParchGrad cannot be told apart from Grad-CAM, of the 2 methods"
    )
    assert "0 lies in the 95 % interval of the difference from Grad-CAM, −0." in said
    assert "first" not in said
    assert "comparisons" not in said


def test_a_lower_mean_within_the_interval_is_a_tie_too():
    (said,) = verdict_of({"Grad-CAM": values_of(0.47, spread=0.1), "ParchGrad": values_of(0.45, spread=0.1, seed=2)})
    assert "ParchGrad cannot be told apart from Grad-CAM" in said


def test_of_those_level_every_better_mean_is_named():
    values = {name: values_of(0.5, spread=0.3, seed=n) for n, name in enumerate("ABCDE")}
    (said,) = verdict_of(values | {"ParchGrad": values_of(0.49, spread=0.3, seed=9), "F": values_of(0.48, spread=0.3)})
    named = said[said.index("apart from ") : said.index(" and 1 other, of the 7")].removeprefix("apart from ")
    assert sorted(named.split(", ")) == ["A", "B", "C", "D", "E"]


def test_not_first_is_said_as_plainly_and_names_every_better_mean():
    found = {
        "gradient": values_of(0.3),
        "Grad-CAM": values_of(0.65, seed=1),
        "LRP": values_of(0.7, seed=3),
        "SmoothGrad": values_of(0.68, spread=0.9, seed=4),
        "ParchGrad": values_of(0.6, seed=2),
    }
    (said,) = verdict_of(found)
    assert said.startswith(
        "In mass on mosaics (12 mosaics), ParchGrad, 0.600, is not first of the 5 methods that cost at most about "
        "three forward passes: LRP 0.700 and Grad-CAM 0.650 are better beyond chance (95 % interval of the difference "
        "from LRP, 0.0"
    )
    assert said.endswith("; SmoothGrad 0.680, better too, within chance.")


def test_intervals_are_widened_for_the_number_of_methods():
    """Of many equal methods one looks distinct by chance; an interval of one comparison would call it so."""
    ours = values_of(0.5, count=30, spread=0.1)
    other = ours + values_of(0.045, count=30, spread=0.1, seed=1)
    alone = {"ParchGrad": ours, "other": other}
    assert "is not first" in verdict_of(alone, resamples=999)[0]
    many = alone | {f"method {n}": values_of(0.3, count=30, seed=n) for n in range(20)}
    assert "cannot be told apart from other" in verdict_of(many, resamples=999)[0]
    found = results({"mosaic_mass": alone}, resamples=999)
    narrow, wide = (verdict.gap(found, "mosaic_mass", "ParchGrad", "other", n) for n in (1, 21))
    assert wide.low < narrow.low < narrow.high < wide.high
    del many["ParchGrad"]
    assert "widened for 210 comparisons" in verdict_of(many, resamples=999)[0], "the first of 21: one of all pairs"


def test_who_is_level_need_not_be_the_next():
    """SmoothGrad's mean is lower than Grad-CAM's, but so uneven that it cannot be told from ParchGrad's."""
    values = {
        "Grad-CAM": values_of(0.5),
        "ParchGrad": values_of(0.6, seed=1),
        "SmoothGrad": values_of(0.45, spread=0.5),
    }
    (said,) = verdict_of(values)
    assert "ParchGrad cannot be told apart from SmoothGrad, of the 3 methods" in said


@pytest.mark.parametrize("groups", [1, 9])
def test_of_few_photographs_nothing_is_claimed(groups):
    shown = [picture(i, group=f"photograph {i % groups}") for i in range(12)]
    values = {"Grad-CAM": values_of(0.2), "ParchGrad": values_of(0.9, seed=1)}
    (said,) = verdict_of(values, shown=shown)
    values["SmoothGrad"] = values_of(0.95, seed=2)
    (also,) = verdict_of(values, costs={"SmoothGrad": 26.0}, shown=shown)
    assert said == also, "of dearer methods neither"
    assert said == (
        f"In mass on mosaics (12 mosaics of {verdict.plural(groups, 'photograph')}), no method is told from another: "
        "these are too few to compare, at least 10 photographs are needed. The means: ParchGrad 0.900, Grad-CAM 0.200."
    )


def test_a_method_with_few_values_is_left_out_of_the_comparison_and_named():
    few = np.r_[np.full(8, NAN), 0.95, 0.9, 0.99, 0.97]
    values = {"Grad-CAM": values_of(0.4), "LRP": few, "ParchGrad": values_of(0.6, seed=1)}
    (said,) = verdict_of(values)
    assert "is first of the 2 methods that" in said
    assert "next Grad-CAM 0.400" in said
    assert said.endswith("; too few photographs to compare it with LRP.")


def test_lower_is_better_turns_the_lead():
    found = results({"deletion": {"Grad-CAM": values_of(0.4), "ParchGrad": values_of(0.2, seed=1)}})
    (said,) = verdict.sentences(found)
    assert said.startswith("In deletion (12 mosaics), ParchGrad is first of the 2 methods")
    lead = verdict.gap(found, "deletion", "ParchGrad", "Grad-CAM")
    assert lead.low < lead.mean < lead.high
    assert lead.mean == pytest.approx(0.2)


def test_dearer_methods_and_other_settings_are_told_apart():
    values = {
        "Grad-CAM": values_of(0.4),
        "ParchGrad": values_of(0.6, seed=1),
        "ParchGrad quantile 0.05": values_of(0.7, seed=2),
        "SmoothGrad": values_of(0.8, seed=3),
    }
    (said,) = verdict_of(values, costs={"SmoothGrad": 26.0})
    assert "ParchGrad is first of the 2 methods that cost at most about three" in said
    assert said.endswith(
        " Not compared, the best of several: ParchGrad in another setting, ParchGrad quantile 0.05, 0.700 and "
        "SmoothGrad, at 26 passes, 0.800."
    )


@pytest.mark.parametrize(("passes", "among"), [(2.9, 3), (3.2, 3), (3.4, 2)])
def test_costs_are_compared_to_half_a_pass(passes, among):
    values = {"gradient": values_of(0.3), "Grad-CAM": values_of(0.5, seed=1), "ParchGrad": values_of(0.7, seed=2)}
    (said,) = verdict_of(values, costs={"Grad-CAM": passes})
    assert f"first of the {among} methods that cost at most about three" in said


def test_parchgrad_is_compared_whatever_it_costs():
    values = {"gradient": values_of(0.3), "Grad-CAM": values_of(0.5, seed=1)}
    (said,) = verdict_of(values)
    assert said.startswith("In mass on mosaics (12 mosaics), Grad-CAM is first of the 2 methods")
    assert said.endswith("ParchGrad was not measured.")
    (said,) = verdict_of(values | {"ParchGrad": values_of(0.9, seed=2)}, costs={"ParchGrad": 4.2})
    assert "ParchGrad is first of the 3 methods" in said
    assert said.endswith("ParchGrad itself costs more, about 4.")
    (said,) = verdict_of(values | {"ParchGrad": values_of(0.9, seed=2)}, costs={"ParchGrad": None})
    assert said.endswith("The cost of ParchGrad was not measured.")


def test_without_costs_all_methods_are_compared():
    values = {"Grad-CAM": values_of(0.4), "ParchGrad": values_of(0.6, seed=1)}
    (said,) = verdict_of(values, costs={"Grad-CAM": None, "ParchGrad": None})
    assert "ParchGrad is first of the 2 methods: 0.600" in said
    assert "cost" not in said


def test_a_name_with_a_comma_is_quoted():
    values = {
        "Grad-CAM": values_of(0.4),
        "ParchGrad": values_of(0.6, seed=1),
        "ParchGrad, q 0.05": values_of(0.7, seed=2),
    }
    assert "ParchGrad in another setting, “ParchGrad, q 0.05”, 0.700." in verdict_of(values)[0]
    (said,) = verdict.sentences(results({"channels_similarity": {"ParchGrad, q 0.05": values_of(0.8)}}))
    assert said.endswith(": “ParchGrad, q 0.05” fails: its map stays more alike than not.")


def test_one_method_is_compared_with_nothing():
    assert verdict_of({"ParchGrad": [0.5, 0.6]}) == [
        "In mass on mosaics (2 mosaics), only ParchGrad was measured of the methods that cost at most about three "
        "forward passes: 0.550."
    ]


def test_the_other_measures_in_one_sentence_and_those_of_few_pictures_in_another():
    pair = {"Grad-CAM": values_of(0.4), "ParchGrad": values_of(0.6, seed=1)}
    tie = {"Grad-CAM": values_of(0.4, spread=0.1), "ParchGrad": values_of(0.39, spread=0.1, seed=1)}
    found = {"mosaic_mass": pair, "object_mass": pair, "deletion": pair, "lerf_aopc": pair, "road": tie, "gini": pair}
    among = (
        "Among the same methods, ParchGrad is first beyond chance in mass on boxes and masks (12 mosaics); not to be "
        "told apart from the best of the others in ROAD (12 mosaics; better mean: Grad-CAM); not first, beyond chance, "
        "in deletion (12 mosaics; better mean: Grad-CAM) and LeRF AOPC (12 mosaics; better mean: Grad-CAM)."
    )
    assert verdict.sentences(results(found))[1:] == [among]
    one = {"Grad-CAM": [0.3], "ParchGrad": [0.07]}
    found = {"mosaic_mass": pair, "insertion": one, "deletion": one}
    assert verdict.sentences(results(found))[1:] == ["Insertion and deletion: of 1 mosaic, too few to compare."]
    found |= {"morf_aopc": one, "road": one}
    assert verdict.sentences(results(found))[1:] == ["Insertion and 3 other measures: of 1 mosaic, too few to compare."]


def test_who_fails_the_sanity_checks():
    values = {
        "random map": np.ones(12),
        "guided backprop": values_of(0.8),
        "LRP": values_of(0.55, spread=0.2),
        "ParchGrad": values_of(0.2),
    }
    (said,) = verdict.sentences(results({"cascade": values}))
    assert said == (
        "Sanity check, all weights drawn anew (12 mosaics): guided backprop fails: its map stays more alike than not; "
        "1 method less alike than not; 1 method not clear."
    ), "baselines look at no model; 0.5 is in LRP's interval"
    (said,) = verdict.sentences(results({"cascade": {"LRP": np.ones(12), "ParchGrad": values_of(0.2)}}))
    assert "LRP fails: its map stays the same;" in said, "who should look at the model and does not"
    blind = {"ParchGrad, instance-wise": np.ones(12), "ParchGrad": values_of(0.2)}
    (said,) = verdict.sentences(results({"classes_similarity": blind}))
    assert "not looked at by “ParchGrad, instance-wise”; 1 method less" in said, "it may do without the table's classes"
    assert "fails" not in said
    many = {f"ParchGrad {n}": values_of(0.8, seed=n) for n in range(3)}
    (said,) = verdict.sentences(results({"channels_similarity": many}))
    assert said.endswith(": ParchGrad in all 3 settings fail: their maps stay more alike than not.")


@pytest.mark.parametrize("count", [1, 9])
def test_where_nothing_could_be_tested_nothing_is_reassuring(count):
    values = {"gradient": values_of(0.1, count=count), "ParchGrad": values_of(0.1, count=count)}
    assert verdict.sentences(results({"cascade": values, "channels_similarity": values})) == [
        "Sanity checks with all weights drawn anew and random channels for each class: of "
        f"{verdict.plural(count, 'mosaic')}, too few to tell of any method whether its map changes."
    ]
    values = {"gradient": values_of(0.1), "ParchGrad": np.r_[np.full(9, 0.1), np.full(3, NAN)]}
    (said,) = verdict.sentences(results({"cascade": values}))
    assert said.endswith(": 1 method less alike than not; 1 method with too few photographs to tell.")
    values = {"random map": np.ones(12), "gradient": np.full(12, NAN)}
    assert verdict.sentences(results({"cascade": values})) == [
        "Sanity check, all weights drawn anew: could not be made, no method has a map left to compare."
    ]


def test_sanity_states_stand_on_the_page(full, tmp_path):
    full.values["cascade"]["Grad-CAM"][:] = values_of(0.9)
    full.values["cascade"]["SmoothGrad"][:] = values_of(0.55, spread=0.2)
    full.values["cascade"]["gradient"][:] = values_of(0.45, spread=0.2)
    full.values["cascade"]["ParchGrad"][:] = values_of(0.1)
    full.values["cascade"]["random map"][:] = 1.0
    page = page_of(full, tmp_path / "page.html")
    lines = {line[0][2]: line for line in page.rows("Sanity checks: what of the map survives")}
    assert lines["Grad-CAM"][1][2].startswith("more alike 0.900")
    assert lines["ParchGrad"][1][2].startswith("less alike 0.100")
    assert lines["SmoothGrad"][1][2].startswith("not clear 0.550")
    assert lines["random map"][1][2].startswith("not looked at 1.000")
    assert lines["gradient"][1][2].startswith("not clear 0.450")
    assert lines["Grad-CAM"][2][2].startswith("–")
    assert "Some similarity is left to every method" in page.text
    assert "0.5, is our reading" in page.text
    assert not re.search("[✓✕]", page.styles[0] + page.text)


def test_the_cascade_stands_once(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    heads = re.findall(r'<th scope="col"><a href="#m-(\w+)"', page.raw)
    assert sorted(heads) == sorted(one.key for one in full.measures)


# --- the drawings ---


def test_dots_lie_where_their_numbers_are(full):
    measures = [one for one in full.measures if one.section == "mosaics"]
    chart = charts.dot_chart(full, measures)
    assert [dot.row.name for dot in chart.rows] == full.ranking("mosaic_mass")
    ticks = chart.ticks[0]
    assert (ticks[0].at, ticks[0].label, ticks[-1].at) == (0, "0", 100)
    whole = float(ticks[-1].label)
    for dot in chart.rows:
        one, strip = full.cells["mosaic_mass"][dot.row.name].interval, dot.strips[0]
        assert (strip.dot, strip.low, strip.high) == pytest.approx(
            (100 * one.mean / whole, 100 * one.low / whole, 100 * one.high / whole)
        )
    assert chart.chances[0] == pytest.approx(25 / whole)


def test_curves_end_where_their_values_do(full):
    plot = charts.curves(full, "insertion", "Insertion", "pixels")
    kinds = {line.name: line.kind for line in plot.lines}
    assert kinds == {
        "random map": "chance", "gradient": "reference", "SmoothGrad": "other", "Grad-CAM": "cam", "ParchGrad": "ours",
        "ParchGrad, random channels": "other",
    }  # fmt: skip
    assert plot.lines[-1].name == "ParchGrad", "drawn over the others"
    first = next(line for line in plot.lines if line.name == "random map").points.split()
    assert first[0] == f"{plot.x(0):.1f},{plot.y(0):.1f}"
    assert first[-1] == f"{plot.x(1):.1f},{plot.y(1):.1f}"


def test_the_cascade_begins_with_the_model_itself(full):
    plot = charts.cascade(full)
    assert [tick.label for tick in plot.x_ticks] == ["the model", "top", "middle", "bottom"]
    assert all(line.points.split()[0] == f"{plot.x(0):.1f},{plot.y(1):.1f}" for line in plot.lines)


def test_names_in_the_scatter_do_not_meet(full):
    names = [f"method number {n}" for n in range(25)]
    found = results({"mosaic_mass": {name: values_of(0.3 + 0.01 * (n % 3), seed=n) for n, name in enumerate(names)}})
    plot = charts.scatter(found, MEASURES[0])
    boxes = []
    for mark in plot.marks:
        if mark.label:
            x, y, anchor = mark.label
            width = charts.LETTER * len(mark.row.name)
            left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
            boxes.append((left, y - 11, left + width, y + 3))
    assert 1 <= len(boxes) < 25
    for i, a in enumerate(boxes):
        assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in boxes[:i])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.1, 0.62], (0, 0.2, 0.4, 0.6, 0.8)),
        ([-0.3, 0.2], (-0.3, -0.2, -0.1, 0, 0.1, 0.2)),
        ([0, 0], (0, 0.2, 0.4, 0.6, 0.8, 1)),
        ([NAN, 70], (0, 20, 40, 60, 80)),
    ],
)
def test_scales_are_round_and_hold_their_values(values, ticks):
    assert charts.Axis.of(values).ticks == pytest.approx(ticks)


def test_every_other_curve_has_a_drawing_with_its_name(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    for plot in (charts.curves(full, "insertion", "Insertion", "pixels"), charts.cascade(full)):
        assert [line.name for line in plot.others] == ["SmoothGrad", "ParchGrad, random channels"]
        assert plot.compared.name == "ParchGrad"
        for line in plot.others:
            assert page.raw.count(f'<use href="#{line.id}">') == 1
            assert re.search(
                rf'<use href="#{line.id}"></use></g></svg>\s*<figcaption>{line.name}</figcaption>', page.raw
            )
    without = results({"gini": {"gradient": [0.5]}}, curves={"insertion": curves(("SmoothGrad", "gradient"))})
    assert charts.curves(without, "insertion", "Insertion", "pixels").compared.name == "gradient"
    assert "Mean over 4 pictures." in page.text
    one = results({"gini": {"gradient": [0.5]}}, curves={"insertion": curves(["gradient"], images=1)})
    assert "Mean over 1 picture." in page_of(one, tmp_path / "page.html").text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_is_drawn_stands_out_from_its_ground(full, tmp_path):
    style = page_of(full, tmp_path / "page.html").styles[0]
    drawn = dict(re.findall(r"--(ours|gradient|peer|cam|quiet): (#\w{6})", style))
    drawn["other"] = re.search(r"svg \.other \{ stroke: (#\w{6})", style)[1]
    drawn["chance"] = re.search(r"\.strip \.level \{[^}]*dashed (#\w{6})", style)[1]
    assert len(drawn) == 7
    for colour in drawn.values():
        assert 1.05 / (luminance(colour) + 0.05) >= 3
        assert (luminance("#eef5fa") + 0.05) / (luminance(colour) + 0.05) >= 3, "and from our row's"
    assert "opacity" not in style


# --- pictures ---


def pixels_of(address):
    head, _, data = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int)


def test_a_map_is_drawn_with_its_maximum_ringed_and_the_mask_outlined():
    image = np.full((100, 200, 3), 90, np.uint8)
    saliency = np.zeros((100, 200))
    saliency[25, 150] = 1.0
    mask = np.zeros((100, 200), bool)
    mask[:, :100] = True
    drawn = pixels_of(pictures.explained(image, saliency, mask, side=400))
    assert drawn.shape == (200, 400, 3)
    ring = drawn[51, 301 + 7]
    assert ring[2] - ring[0] > 80, "cyan"
    assert drawn[100, 196:204].max() > 200, "a white line between the halves"
    assert drawn[100, 0].max() < 120, "none along the picture's edge"
    whole = pixels_of(pictures.photograph(image, None))
    assert whole.shape == (pictures.LARGE // 2, pictures.LARGE, 3)
    assert np.abs(whole - 90).max() < 6


def test_the_gallery_shows_every_method_and_says_where_there_is_no_map(full, tmp_path):
    given = case(("random map", "gradient", "ParchGrad", "SmoothGrad"), label="<b>fish</b>")
    given.maps["SmoothGrad"][0, 0] = NAN
    page = page_of(full, tmp_path / "page.html", [given])
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert alts == ["the picture, target <b>fish</b>", "map of ParchGrad", "map of random map", "map of gradient"]
    assert page.texts.count("no map of this class") == 3, "SmoothGrad, Grad-CAM and the control"
    assert "ParchGrad's worst mass: 0.12" in page.texts
    assert re.search(r"ParchGrad mass 0.25 , hit\b", page.text)
    assert re.search(r"gradient mass 0.25 , miss\b", page.text)


def test_a_map_of_zeros_is_no_miss(full, tmp_path):
    given = case(("gradient", "ParchGrad"))
    given.maps["gradient"][:] = 0
    page = page_of(full, tmp_path / "page.html", [given])
    assert re.search(r"gradient zeros only , mass 0.25\s", page.text)
    assert "miss" not in page.texts


# --- the page ---


def assert_self_contained(page):
    for tag, name, value in page.attributes:
        if name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
            assert value.startswith(("#", "data:image/jpeg;base64,")), (tag, name, value[:80])
            if value.startswith("#"):
                assert value[1:] in page.ids, value
        assert not name.startswith("on")
    assert not {"script", "link", "iframe", "object", "base"} & set(page.names)
    assert len(page.styles) == 1
    assert not re.search(r"url\(|@import|@font-face", page.styles[0])
    assert not re.search(r"https?://|//\w+\.\w", page.raw.split("<body>")[0])
    assert page.ids == list(dict.fromkeys(page.ids)), "ids are unique"


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(full, tmp_path):
    page = page_of(full, tmp_path / "page.html", [case(("gradient", "ParchGrad"))])
    assert_self_contained(page)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page.raw


def test_hostile_text_is_text(tmp_path):
    name = f"ParchGrad {HOSTILE}"
    given = results(
        {"mosaic_mass": {"gradient": values_of(0.3), name: values_of(0.5, seed=1)}, "cascade": {name: [0.9, 0.9]}},
        shown=[picture(i, label=HOSTILE, name=HOSTILE) for i in range(12)],
        settings={"model": HOSTILE, "data": [HOSTILE], HOSTILE: HOSTILE, "command": HOSTILE},
        unavailable=(Unavailable(HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        curves={"insertion": curves([name])},
        layers=(HOSTILE,),
        cascade={name: np.array([0.5])},
        rows=(row("gradient"), row(name, words=HOSTILE, source=HOSTILE, library=HOSTILE, options={HOSTILE: HOSTILE})),
    )
    page = page_of(given, tmp_path / "page.html", [case([name], label=HOSTILE, reason=HOSTILE, name=HOSTILE)])
    assert "<script" not in page.raw
    assert "<img src=x" not in page.raw
    assert page.styles[0].count("alert") == 0
    assert_self_contained(page)
    assert page.texts.count(HOSTILE) >= 8
    assert "49" not in page.texts


def test_settings_notes_and_what_was_unavailable(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    assert {line[0][2]: line[1][2] for line in page.rows("Settings of this evaluation")} == {
        "model.name": "net",
        "model.sha256": "ab" * 32,
        "data.root": "val",
        "places": "none",
        "seed": "3",
        "effort.road": "0.1, 0.3",
    }
    assert "of mine" not in page.text
    assert "parchgrad evaluate 'a model' --report out.html" in page.texts
    assert "it names the folders of the machine" in page.text
    assert "The table contrasts ten classes." in page.texts
    assert "zennit is not installed." in page.texts
    assert "Saliency maps of net on val" in page.text
    assert "199 times" in page.text
    for measure in MEASURES:
        assert f"m-{measure.key}" in page.ids
        assert measure.source in page.text
    for method in full.rows:
        assert f"What {method.name} is." in page.text


@pytest.mark.parametrize(
    "found",
    [
        results({"mosaic_mass": {"ParchGrad": [0.5, 0.6]}}),
        results({"mosaic_mass": {"gradient": [0.5]}}),
        results({"mosaic_mass": {"gradient": [NAN, NAN]}}),
        results(
            {"gini": {"random map": [0.5, 0.5], "ParchGrad": [0.7, 0.7]}}, costs={"random map": None, "ParchGrad": None}
        ),
        results({"insertion": {"gradient": [0.5, 0.2], "Grad-CAM": [0.3, NAN]}}),
        results({"cascade": {"gradient": [0.5, 0.2]}}),
        results({}, rows=(row("gradient"),)),
    ],
    ids=["one method", "one picture", "no value", "no cost", "no ParchGrad", "only checks", "nothing measured"],
)
def test_pages_of_little(found, tmp_path):
    page = page_of(found, tmp_path / "page.html")
    assert_self_contained(page)
    assert not {"curves", "gallery"} & set(page.ids)
    assert "nan" not in page.text.lower().split()


def test_of_one_picture_there_is_no_interval(tmp_path):
    found = results({"mosaic_mass": {"gradient": [0.5]}})
    page = page_of(found, tmp_path / "page.html")
    assert page.cell("Four photographs in one picture: methods by measures", "gradient", "mass")[2].endswith(
        "no interval"
    )
    assert charts.scatter(found, MEASURES[0]) is None, "one method is not compared by cost"
    assert "scatter" not in [value for _, name, value in page.attributes if name == "class"]


def test_tables_have_captions_and_heads(full, tmp_path):
    page = page_of(full, tmp_path / "page.html")
    assert len(page.captions()) == len(page.tables)
    assert all("scope" in found for table in page.tables for line in table for tag, found, _ in line if tag == "th")
    drawn = re.findall(r'<(?:svg|div)[^>]*role="img"[^>]*>', page.raw)
    assert len(drawn) > 15
    assert all('aria-label="' in start for start in drawn)


@pytest.mark.parametrize("command", ["parchgrad evaluate x", None])
def test_the_command_line(command, tmp_path):
    page = page_of(results({"gini": {"gradient": [0.5, 0.6]}}, settings={"command": command}), tmp_path / "page.html")
    assert ("pre" in page.names) == (command is not None)
    assert "Saliency maps of a model" in page.text
