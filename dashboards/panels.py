"""The few words in which a dashboard is written: queries, panels, rows; and their place on the grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboard_builders
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

COLUMNS = 24

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

Builder: TypeAlias = stat.Panel | table.Panel | timeseries.Panel
#: Colour from a value on, in rising order; the first step begins at minus infinity.
Steps: TypeAlias = tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series."""

    expr: str
    legend: str


class Link(NamedTuple):
    """Where a click on a value leads; the address may name the value's labels as Grafana does."""

    title: str
    url: str


@dataclass(frozen=True)
class Panel:
    """One panel; `description` says what it shows and what good looks like."""

    title: str
    unit: str
    description: str
    queries: Sequence[Query]
    kind: Literal["stat", "table", "timeseries"] = "timeseries"
    width: int = 8
    height: int = 8
    steps: Steps = ()
    minimum: float | None = None
    decimals: int | None = None
    log: bool = False
    stacked: bool = False
    no_value: str = ""
    links: Sequence[Link] = ()


@dataclass(frozen=True)
class Row:
    """A heading and the panels below it, placed from left to right."""

    title: str
    panels: Sequence[Panel] = field(default_factory=tuple)


def place(rows: Sequence[Row]) -> Iterator[tuple[Row | Panel, dashboard.GridPos]]:
    """Give every heading and panel its place: left to right, a new line where the width is used up."""
    top = 0
    for row in rows:
        yield row, dashboard.GridPos(h=1, w=COLUMNS, x=0, y=top)
        top += 1
        left = line = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, line = top + line, 0, 0
            yield panel, dashboard.GridPos(h=panel.height, w=panel.width, x=left, y=top)
            left += panel.width
            line = max(line, panel.height)
        top += line


def build(panel: Panel, position: dashboard.GridPos, number: int) -> Builder:
    """Return the builder of one panel."""
    builder = {"stat": _stat, "table": _table, "timeseries": _timeseries}[panel.kind](panel)
    builder = builder.id(number).title(panel.title).description(panel.description).grid_pos(position)
    # The marks of a logarithmic axis are powers of ten, which a plain number shows as 0 where they are small.
    unit = "sci" if panel.log and panel.unit == "none" else panel.unit
    builder = builder.datasource(DATASOURCE).unit(unit)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        builder = builder.with_target(_target(query, letter, panel.kind))
    if panel.minimum is not None:
        builder = builder.min(panel.minimum)
    if panel.decimals is not None:
        builder = builder.decimals(panel.decimals)
    if panel.no_value:
        builder = builder.no_value(panel.no_value)
    if panel.links:
        links = [dashboard_builders.DashboardLink(link.title).url(link.url) for link in panel.links]
        builder = builder.data_links(links)
    steps = [dashboard.Threshold(color=color, value=value) for color, value in panel.steps]
    if steps:
        thresholds = (
            dashboard_builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
        )
        builder = builder.thresholds(thresholds)
    return builder


def _target(query: Query, letter: str, kind: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(DATASOURCE).expr(query.expr).ref_id(letter)
    target = target.legend_format(query.legend)
    if kind == "timeseries":
        return target.range()
    return target.instant().format(PromQueryFormat.TABLE if kind == "table" else PromQueryFormat.TIME_SERIES)


def _stat(panel: Panel) -> stat.Panel:
    last = common_builders.ReduceDataOptions().calcs(["lastNotNull"])
    builder = stat.Panel().reduce_options(last).graph_mode(common.BigValueGraphMode.NONE)
    scheme = "thresholds" if panel.steps else "fixed"
    color = dashboard_builders.FieldColor().mode(dashboard.FieldColorModeId(scheme))
    builder = builder.color_scheme(color if panel.steps else color.fixed_color("text"))
    named = len(panel.queries) > 1 or "{{" in panel.queries[0].legend
    mode = common.BigValueTextMode.VALUE_AND_NAME if named else common.BigValueTextMode.VALUE
    # Names above the figures: beside them, both get too small to read in a narrow panel.
    return builder.text_mode(mode).wide_layout(False)


def _table(panel: Panel) -> table.Panel:  # noqa: ARG001 - one signature for all kinds
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
    first = {"run_id": 0, "rank": 1, "optimizer": 2}
    options = {"excludeByName": hidden, "indexByName": first, "renameByName": {}}
    organize = dashboard.DataTransformerConfig(id_val="organize", options=options)
    return table.Panel().with_transformation(organize)


#: Unit -> how high the axis reaches at least: one that is all zeros would reach up to a hundred.
_SOFT_MAXIMUM = {"percentunit": 0.01, "short": 1, "suffix: /s": 1}


def _timeseries(panel: Panel) -> timeseries.Panel:
    legend = (
        common_builders.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    builder = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).fill_opacity(0)
    # A gap in the line is a value that was absent: never bridged.
    builder = builder.show_points(common.VisibilityMode.AUTO).span_nulls(False)
    if panel.minimum == 0 and panel.unit in _SOFT_MAXIMUM:
        builder = builder.axis_soft_max(_SOFT_MAXIMUM[panel.unit])
    if panel.stacked:
        stacking = common_builders.StackingConfig().mode(common.StackingMode.NORMAL)
        builder = builder.stacking(stacking).fill_opacity(30)
    if panel.log:
        scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
        builder = builder.scale_distribution(scale)
    if panel.steps:
        lines = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        builder = builder.thresholds_style(lines)
    return builder
