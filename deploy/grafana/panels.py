"""The pieces dashboards are made of: a query, five kinds of panel, a row, and the variables and links all share.

No panel knows what it shows: expressions and descriptions are in service.py, explanations.py and capacity.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import bargauge, common, heatmap, stat, table, text, timeseries
from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

TAG = "parchgrad"
COLUMNS = 24  # of Grafana's grid
HEIGHT = 8
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

# The label matchers of every expression. All of a variable is `.*`, so that what has no model (a request refused before
# it named one), and what has no namespace, is shown as well.
JOB = 'namespace=~"$namespace", job=~"$job"'
INSTANCE = f'{JOB}, instance=~"$instance"'
MODEL = f'{INSTANCE}, model=~"$model"'
VERSION = "{{model}}/{{version}}"  # legend of a model's version
INTERVAL = "$__rate_interval"  # Grafana's own, about four scrapes at least

Panel = Builder[model.Panel]


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of its series, with {{labels}}."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Limit:
    """Where a value turns from good to doubtful to bad; `below`: small values are the bad ones."""

    doubtful: float
    bad: float
    below: bool = False

    def build(self) -> Builder[model.ThresholdsConfig]:
        colours = ("red", "orange", "green") if self.below else ("green", "orange", "red")
        first, second = sorted((self.doubtful, self.bad))
        steps = [
            model.Threshold(value=value, color=colour)
            for value, colour in zip((None, first, second), colours, strict=True)
        ]
        return boards.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


PLAIN = boards.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps([model.Threshold(value=None, color="blue")])


@dataclass(frozen=True)
class Row:
    """A heading and what stands under it, from left to right; a line is full at `COLUMNS`."""

    title: str
    panels: Sequence[Panel]


def _query(number: int, query: Query, *, instant: bool = False) -> queries.Dataquery:
    """Over the range shown; `instant`: of its end alone."""
    made = (
        queries.Dataquery()
        .ref_id(chr(ord("A") + number))
        .datasource(SOURCE)
        .expr(query.expr)
        .legend_format(query.legend)
    )
    return made.instant() if instant else made.range()


def over_time(
    title: str,
    description: str,
    unit: str,
    *asked: Query,
    width: int = 8,
    stack: bool = False,
    limit: Limit | None = None,
    most: float | None = None,
    least: float | None = 0.0,
) -> Panel:
    """Lines over time; `stack`: areas on each other. `limit`: dashed lines; `least`, `most`: ends of the axis."""
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(HEIGHT)
        .unit(unit)
        .legend(legend)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .show_points(VisibilityMode.NEVER)
        .line_width(1)
        .fill_opacity(30 if stack else 5)
        .thresholds(limit.build() if limit else PLAIN)
    )
    if limit:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    if stack:
        panel = panel.stacking(common.StackingConfig().group("A").mode(StackingMode.NORMAL))
    if least is not None:
        panel = panel.min(least)
    if most is not None:
        panel = panel.max(most)
    for number, query in enumerate(asked):
        panel = panel.with_target(_query(number, query))
    return panel


def heat_map(title: str, description: str, unit: str, histogram: str, matchers: str, *, width: int = 8) -> Panel:
    """How many observations fell into each bucket of `histogram`, over time."""
    query = Query(f"sum by (le) (increase({histogram}_bucket{{{matchers}}}[$__rate_interval]))", "{{le}}")
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(HEIGHT)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .reverse(False)
        )
        .cell_gap(1)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
        .show_legend()
        .show_tooltip()
        .hide_y_histogram()
        .with_target(_query(0, query).format(PromQueryFormat.HEATMAP))
    )


def number(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    limit: Limit | None = None,
    absent: str = "No data",
) -> Panel:
    """The value of this moment in large digits, coloured by `limit`; `absent`, in grey, where there is none.

    Asked for the moment: of a range the last value stands there, green, long after its service is gone.
    """
    gone = model.SpecialValueMap(
        options=model.DashboardSpecialValueMapOptions(
            match=model.SpecialValueMatch.NULL_AND_NAN,
            result=model.ValueMappingResult(text=absent, color="#808080", index=0),
        )
    )
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(4)
        .unit(unit)
        .no_value(absent)
        .mappings([gone])
        .thresholds(limit.build() if limit else PLAIN)
        .color_scheme(boards.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.VALUE)
        .with_target(_query(0, query, instant=True))
    )


def bars(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 8,
    limit: Limit | None = None,
) -> Panel:
    """One bar a series: its latest value."""
    return (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(HEIGHT)
        .unit(unit)
        .min(0)
        .thresholds(limit.build() if limit else PLAIN)
        .color_scheme(boards.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .display_mode(BarGaugeDisplayMode.BASIC)
        .orientation(VizOrientation.HORIZONTAL)
        .with_target(_query(0, query, instant=True))
    )


def listing(title: str, description: str, expr: str, columns: Sequence[str], *, width: int = COLUMNS) -> Panel:
    """A table of the labels `columns` of what `expr` finds now, in this order."""
    order = {name: place for place, name in enumerate(columns)}
    shown = model.DataTransformerConfig(
        id_val="organize",
        options={"excludeByName": {"Time": True, "Value": True}, "indexByName": order, "renameByName": {}},
    )
    query = queries.Dataquery().ref_id("A").datasource(SOURCE).expr(expr).instant().format(PromQueryFormat.TABLE)
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(5)
        .show_header(True)  # without any option `options` is null, which older Grafanas do not take
        .with_transformation(shown)
        .with_target(query)
    )


def page(title: str, content: str, *, height: int) -> Panel:
    """Text as it is, in Markdown."""
    return text.Panel().title(title).span(COLUMNS).height(height).mode(TextMode.MARKDOWN).content(content)


def board(uid: str, title: str, description: str) -> boards.Dashboard:
    """A dashboard without rows or variables, with links to the others and the runbook."""
    links = (
        boards.DashboardLink("ParchGrad")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
    )
    return (
        boards.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .link(links)
    )


def watched(uid: str, title: str, description: str, rows: Sequence[Row]) -> model.Dashboard:
    """A dashboard of rows, with the variables datasource, namespace, job, model and instance."""
    made = (
        board(uid, title, description)
        .with_variable(boards.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("namespace", "Namespace", "parchgrad_workers"))
        .with_variable(_choice("job", "Job", 'parchgrad_workers{namespace=~"$namespace"}'))
        .with_variable(_choice("model", "Model", f"parchgrad_model_info{{{JOB}}}"))
        .with_variable(_choice("instance", "Instance", f"parchgrad_workers{{{JOB}}}"))
    )
    for row in rows:
        made = made.with_row(boards.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(panel)
    built = made.build()
    for place, one in enumerate(built.panels or (), start=1):
        one.id_val = place  # links to a panel hold it
    return built


def _choice(label: str, title: str, series: str) -> boards.QueryVariable:
    """Any of the values that `label` has in `series`, all of them at first."""
    return (
        boards.QueryVariable(label)
        .label(title)
        .datasource(SOURCE)
        .query({"query": f"label_values({series}, {label})", "refId": f"{label}Values"})
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )


def mean(histogram: str, matchers: str, *by: str, window: str = INTERVAL) -> str:
    """Mean observation of a histogram or summary in `window`, per `by`."""
    group = f"sum by ({', '.join(by)})" if by else "sum"
    return (
        f"{group} (rate({histogram}_sum{{{matchers}}}[{window}]))"
        f" / ({group} (rate({histogram}_count{{{matchers}}}[{window}])) > 0)"
    )


def signed_mean(histogram: str, matchers: str, *by: str, window: str = INTERVAL) -> str:
    """As `mean`, of observations that may be negative: their sum falls, which rate() would take for a restart."""
    group = f"sum by ({', '.join(by)})" if by else "sum"
    return (
        f"{group} (delta({histogram}_sum{{{matchers}}}[{window}]))"
        f" / ({group} (delta({histogram}_count{{{matchers}}}[{window}])) > 0)"
    )


def quantile(share: float, histogram: str, matchers: str, *by: str) -> str:
    """`share` of the observations of a histogram lie below, per `by`."""
    group = ", ".join((*by, "le"))
    return f"histogram_quantile({share}, sum by ({group}) (rate({histogram}_bucket{{{matchers}}}[$__rate_interval])))"


def rate(counter: str, matchers: str, *by: str) -> str:
    """Events of a counter a second, per `by`."""
    group = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{group} (rate({counter}{{{matchers}}}[$__rate_interval]))"
