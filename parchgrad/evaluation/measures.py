"""What an evaluation measures: every measure's name, meaning, direction, level of chance and source; no computing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One figure of a map; `key` names it in files, `title` on a page."""

    key: str
    title: str
    section: str  # of SECTIONS
    better: str | None  # `higher`, `lower`, or None where neither is better by itself
    chance: float | None  # what a map of random numbers has; None where that depends on model and pictures
    says: str  # one sentence for a reader who has never seen it
    source: str


@dataclass(frozen=True)
class Section:
    """Measures of the same pictures, under one heading."""

    key: str
    title: str
    says: str


SECTIONS = (
    Section(
        "mosaics",
        "Four photographs in one picture",
        "Four photographs of different classes make one picture; the map of one class should lie on its quarter.",
    ),
    Section(
        "objects",
        "Boxes and masks",
        "Somebody has marked where the object is; the map of its class should lie there.",
    ),
    Section(
        "perturbation",
        "What happens when pixels go",
        "Pixels are taken away, or given back, in the order of the map; a map that names what the prediction rests on "
        "makes the target's probability fall, or rise, early.",
    ),
    Section(
        "checks",
        "Is it an explanation at all?",
        "A map that stays when the model's weights, or the table, are replaced by chance explains neither; one that "
        "jumps with invisible noise explains little.",
    ),
    Section(
        "shape",
        "Sparse or spread",
        "How many pixels carry the map. A sparse map is easier to read; by itself it is no better: one wrong pixel "
        "is sparse too.",
    ),
)

MEASURES = (
    Measure(
        "mosaic_mass", "mass", "mosaics", "higher", 0.25,
        "Share of the map's mass on the target's quarter.",
        "grid pointing game, Böhle, Fritz, Schiele 2021; mass accuracy, Arras, Osman, Samek 2022",
    ),
    Measure(
        "mosaic_hits", "hits", "mosaics", "higher", 0.25,
        "Share of maps whose maximum lies on the target's quarter.",
        "pointing game, Zhang et al. 2018, on the grid of Böhle, Fritz, Schiele 2021",
    ),
    Measure(
        "object_mass", "mass", "objects", "higher", None,
        "Share of the map's mass on the object: inside the union of its boxes, cut to the crop, or its mask.",
        "mass accuracy, Arras, Osman, Samek 2022",
    ),
    Measure(
        "object_density", "density", "objects", "higher", 1.0,
        "The same over the object's share of the picture, so that large and small objects count alike.",
        "weighted inside-total relevance ratio, Kohlbrenner et al. 2020",
    ),
    Measure(
        "object_hits", "hits within 15 px", "objects", "higher", None,
        "Share of maps whose maximum lies on the object or at most 15 pixels beside it.",
        "pointing game, Zhang et al. 2018",
    ),
    Measure(
        "insertion", "insertion", "perturbation", "higher", None,
        "Area under the target's probability while pixels are given back to a blurred picture, most relevant first.",
        "RISE, Petsiuk, Das, Saenko 2018",
    ),
    Measure(
        "deletion", "deletion", "perturbation", "lower", None,
        "Area under the target's probability while pixels are set to the mean colour, most relevant first.",
        "RISE, Petsiuk, Das, Saenko 2018",
    ),
    Measure(
        "morf_aopc", "MoRF AOPC", "perturbation", "higher", None,
        "How far the target's probability has fallen, on average over the tenths of the pixels taken away, most "
        "relevant first.",
        "Samek et al. 2017",
    ),
    Measure(
        "lerf_aopc", "LeRF AOPC", "perturbation", "lower", None,
        "The same, least relevant first: what the map calls irrelevant should not matter.",
        "Samek et al. 2017",
    ),
    Measure(
        "log_odds_gap", "log-odds gap", "perturbation", "higher", 0.0,
        "Mean gap between the two orders' log-odds, least relevant first minus most relevant first.",
        "log-odds, Shrikumar, Greenside, Kundaje 2017; both orders, Samek et al. 2017",
    ),
    Measure(
        "road", "ROAD", "perturbation", "higher", 0.0,
        "Mean gap between the two orders' probabilities where the pixels taken away are imputed from those beside "
        "them, so that their outline gives nothing away.",
        "Rong et al. 2022, noisy linear imputation",
    ),
    Measure(
        "max_sensitivity", "max-sensitivity", "checks", "lower", None,
        "The largest relative change of the map under noise of 0.02 in the normalised picture.",
        "Yeh et al. 2019",
    ),
    Measure(
        "completeness_gap", "completeness gap", "checks", "lower", 1.0,
        "How far the signed attributions are from adding up to the logit's rise over the mean colour, relative to it; "
        "only for methods that claim to.",
        "Sundararajan, Taly, Yan 2017",
    ),
    Measure(
        "entropy_rise", "eMPRT", "checks", "higher", 0.0,
        "Relative rise of the entropy of the map's values when all weights are drawn anew; 0: it does not look at "
        "the model.",
        "Hedström et al. 2024",
    ),
    Measure(
        "cascade", "cascade", "checks", "lower", None,
        "Rank correlation with the map when all layers' weights are drawn anew; 1: it does not look at the model.",
        "Adebayo et al. 2018",
    ),
    Measure(
        "classes_similarity", "other classes", "checks", "lower", None,
        "Rank correlation with the map when every class has another class's channels; 1: it does not look at the "
        "table. Of methods with a table.",
        "ours, after Adebayo et al. 2018",
    ),
    Measure(
        "channels_similarity", "random channels", "checks", "lower", None,
        "Rank correlation with the map when every class's channels are in random order; 1: it does not look at the "
        "table. Of methods with a table.",
        "ours, after Adebayo et al. 2018",
    ),
    Measure(
        "gini", "Gini", "shape", None, None,
        "0: the same on every pixel; near 1: all on few.",
        "Chalasani et al. 2020",
    ),
    Measure(
        "hoyer", "Hoyer", "shape", None, None,
        "0: the same on every pixel; 1: all on one.",
        "Hurley, Rickard 2009",
    ),
    Measure(
        "entropy", "entropy", "shape", None, None,
        "Of the map as shares of its mass, over that of an even map: 1 is even, 0 all on one pixel.",
        "complexity, Bhatt, Weller, Moura 2020",
    ),
)  # fmt: skip
