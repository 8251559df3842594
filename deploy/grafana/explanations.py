"""The explanations dashboard: do the maps, and what the model sees, still look as they did."""

from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    JOB,
    MODEL,
    VERSION,
    Limit,
    Panel,
    Query,
    Row,
    bars,
    heat_map,
    mean,
    number,
    over_time,
    rate,
    signed_mean,
    watched,
)

UID = "parchgrad-explanations"
DEFAULT = f'{MODEL}, options="default"'  # maps made under the table's own options; callers' own differ as they please
RECORDED = f'{JOB}, model=~"$model"'  # recording rules have no instance
VERSIONS = ("model", "version")
SAMPLED = "1h"  # of sampled images (one in a hundred) a minute mostly has none
CHANGED = (
    "0.5 * sum by (namespace, job, model, version) (abs("
    f"(parchgrad:class_share:ratio30m{{{RECORDED}}} or 0 * parchgrad:class_share:history1d{{{RECORDED}}}) - "
    f"(parchgrad:class_share:history1d{{{RECORDED}}} or 0 * parchgrad:class_share:ratio30m{{{RECORDED}}})))"
    f" and on (namespace, job, model, version) parchgrad:class_share:history1d{{{RECORDED}}}"
)


def _course(
    title: str, description: str, unit: str, now: str, recorded: str, *, width: int = 8, latest: str = "now"
) -> Panel:
    """A mean now, over the alerts' window, and over the day before that: alerts compare the last two."""
    return over_time(
        title,
        description,
        unit,
        Query(now, f"{VERSION} {latest}"),
        Query(f"{recorded}{{{RECORDED}}}", f"{VERSION} window"),
        Query(f"{recorded.rpartition(':')[0]}:history1d{{{RECORDED}}}", f"{VERSION} day before"),
        width=width,
        least=None,
    )


NOW = Row(
    "Now",
    (
        number(
            "Maps",
            "Maps made a second with the rule; 0 while explanations are asked for means that all are shed.",
            "img/s",
            Query(rate("parchgrad_map_gini_count", MODEL), "maps"),
        ),
        number(
            "Own options",
            "Share of the maps made under the table's own options, which the panels below show.",
            units.PercentUnit,
            Query(
                f"{rate('parchgrad_map_gini_count', DEFAULT)} / ({rate('parchgrad_map_gini_count', MODEL)} > 0)",
                "own options",
            ),
        ),
        number(
            "Drift alerts",
            "Alerts on explanations that fire; each names its signal.",
            units.Short,
            Query(
                'count(ALERTS{alertname=~"Parchgrad.+(Drifts|Shift|Spreads?)", alertstate="firing"}) or vector(0)',
                "firing",
            ),
            limit=Limit(1, 3),
        ),
        number(
            "Predictions unlike the day before",
            "Share of the last half hour's predictions that would have to be of another class; alert above 0.3.",
            units.PercentUnit,
            Query(f"max({CHANGED})", "other classes"),
            limit=Limit(0.2, 0.3),
            absent="no day before yet",
        ),
        number(
            "Cost of a map",
            "Device time of an image explained over one only predicted; a jump means another backward pass or method.",
            units.Short,
            Query(f"max(parchgrad_explain_cost_ratio{{{MODEL}}} > 0)", "times"),
        ),
        number(
            "Watched",
            "Images a minute that were looked at in full (PARCHGRAD_WATCH_RATE); 0 leaves the lower rows empty.",
            units.Short,
            Query(f"60 * {rate('parchgrad_watched_total', MODEL)}", "a minute"),
        ),
    ),
)

MAPS = Row(
    "Maps: shape and place (all maps made with the rule, under the table's own options)",
    (
        _course(
            "Sparsity",
            "Mean Gini index of the maps, 0 flat to 1 one point; blur and noise move it from the day before.",
            units.Short,
            mean("parchgrad_map_gini", DEFAULT, *VERSIONS),
            "parchgrad:map_gini:mean30m",
        ),
        heat_map(
            "Sparsity, all of it",
            "Gini indices of the maps; a second cloud is a second kind of picture.",
            units.Short,
            "parchgrad_map_gini",
            DEFAULT,
        ),
        _course(
            "Mass at the border",
            "Mean share of the maps' mass near the border; a frame or a watermark raises it.",
            units.PercentUnit,
            mean("parchgrad_map_border_share", DEFAULT, *VERSIONS),
            "parchgrad:map_border_share:mean30m",
        ),
        heat_map(
            "Mass at the border, all of it",
            "Share of each map's mass near the border; a cloud near 1 is an artefact.",
            units.PercentUnit,
            "parchgrad_map_border_share",
            DEFAULT,
        ),
        over_time(
            "Centre",
            "Mean centre of the maps, 0 left or top to 1; far from the day before, objects or cropping changed.",
            units.PercentUnit,
            Query(mean("parchgrad_map_centroid", DEFAULT, *VERSIONS, "axis"), f"{VERSION} {{{{axis}}}} now"),
            Query(f"parchgrad:map_centroid:mean30m{{{RECORDED}}}", f"{VERSION} {{{{axis}}}} window"),
            Query(f"parchgrad:map_centroid:history1d{{{RECORDED}}}", f"{VERSION} {{{{axis}}}} day before"),
            least=0,
            most=1,
        ),
        _course(
            "Layers left as they are",
            "Mean share of layers in which the rule had nothing to do; towards 1 maps are plain gradients.",
            units.PercentUnit,
            mean("parchgrad_map_identity_share", DEFAULT, *VERSIONS),
            "parchgrad:map_identity_share:mean30m",
        ),
    ),
)

SEEN = Row(
    "What the model sees (a sample: PARCHGRAD_WATCH_RATE)",
    (
        _course(
            "Agreement with the plain gradient",
            "Mean rank correlation of a map and the plain gradient's; it leaves the day before's when pictures change.",
            units.Short,
            signed_mean("parchgrad_map_gradient_agreement", MODEL, *VERSIONS, window=SAMPLED),
            "parchgrad:map_gradient_agreement:mean6h",
            latest="last hour",
        ),
        over_time(
            "Distance from the table",
            "Root mean square of the selected channels' deviations from the table's means, in its deviations, mean and "
            "worst layer of an hour; a mean of 1 to 1.3 is usual, each model's own day is what counts.",
            units.Short,
            Query(mean("parchgrad_activation_distance", MODEL, *VERSIONS, window=SAMPLED), f"{VERSION} mean"),
            Query(
                "max by (model, version) "
                f"({mean('parchgrad_activation_distance', MODEL, *VERSIONS, 'layer', window=SAMPLED)})",
                f"{VERSION} worst layer",
            ),
            Query(
                f"max by (model, version) (parchgrad:activation_distance:history1d{{{RECORDED}}})",
                f"{VERSION} worst layer, day before",
            ),
        ),
        over_time(
            "Shift from the table",
            "Mean signed deviation of the selected channels in an hour, lowest and highest layer; away from 0 they are "
            "dimmer or brighter than in the table's images.",
            units.Short,
            Query(f"min({signed_mean('parchgrad_activation_shift', MODEL, 'layer', window=SAMPLED)})", "lowest layer"),
            Query(signed_mean("parchgrad_activation_shift", MODEL, window=SAMPLED), "mean"),
            Query(f"max({signed_mean('parchgrad_activation_shift', MODEL, 'layer', window=SAMPLED)})", "highest layer"),
            least=None,
        ),
        bars(
            "Distance by layer, six hours",
            "The same distance, the ten farthest layers: early ones move with blur and noise, late ones with contents.",
            units.Short,
            Query(f"topk(10, max by (layer) (parchgrad:activation_distance:mean6h{{{RECORDED}}}))", "{{layer}}"),
        ),
        bars(
            "Distance by class, six hours",
            "The same by the class explained, the ten farthest: one class apart is a change of its pictures.",
            units.Short,
            Query(
                f"topk(10, {mean('parchgrad_class_activation_distance', MODEL, 'class_label', window='6h')} >= 0)",
                "{{class_label}}",
            ),
        ),
        over_time(
            "Watched images",
            "Sampled images a minute by result; `failed` should be none, `skipped` are those there was no time for.",
            units.Short,
            Query(f"60 * {rate('parchgrad_watched_total', MODEL, 'result')}", "{{result}}"),
            stack=True,
        ),
    ),
)

PREDICTIONS = Row(
    "Predictions",
    (
        over_time(
            "Class mix",
            "Share of each predicted class, rare ones as `other`; a class that takes over means other pictures.",
            units.PercentUnit,
            Query(
                f"{rate('parchgrad_predicted_total', MODEL, 'class_label')}"
                f" / on () group_left () (sum(rate(parchgrad_predicted_total{{{MODEL}}}[$__rate_interval])) > 0)",
                "{{class_label}}",
            ),
            stack=True,
            most=1.0,
        ),
        _course(
            "Confidence",
            "Mean probability of the predicted class; a fall means pictures that the model does not know.",
            units.PercentUnit,
            mean("parchgrad_confidence", MODEL, *VERSIONS),
            "parchgrad:confidence:mean30m",
        ),
        heat_map(
            "Confidence, all of it",
            "Probabilities of the predicted classes; mass below 0.5 is guessing.",
            units.PercentUnit,
            "parchgrad_confidence",
            MODEL,
        ),
    ),
)


def dashboard() -> Dashboard:
    rows = (NOW, MAPS, SEEN, PREDICTIONS)
    return watched(UID, "ParchGrad: explanations", "Quality and drift of the maps, and of what the model sees.", rows)
