"""A whole dashboard: its rows under the variables, annotations and links that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard

from dashboards.panels import DATASOURCE, Panel, Row, build, place
from dashboards.queries import ANY_JOB, CHOSEN_RUNS, OPTIMIZER, RUN, THIS_RUN, series

TAG = "optwatch"

#: Variable -> the query that lists its values; each narrows the next. Every dashboard has all of them, hidden where
#: nothing on it would change, so that links keep the selection there and back.
VARIABLES = {
    "job": f"label_values({series('rank_up')}, job)",
    "run": f"label_values({series('rank_up', ANY_JOB)}, run_id)",
    "optimizer": f"label_values({series('steps', CHOSEN_RUNS)}, optimizer)",
    "group": f"label_values({series('gradient.norm', CHOSEN_RUNS)}, group)",
    "rank": f"label_values({series('rank_up', CHOSEN_RUNS)}, rank)",
}


class Mark(NamedTuple):
    """An annotation: a line across every panel where the expression has a value, or at the time that is its value."""

    name: str
    color: str
    title: str
    expr: str
    value_is_time: bool = False
    step: str = "60s"


def _event(name: str, event: str, color: str) -> Mark:
    """The newest event of a kind, at the very time at which it happened; Grafana counts in milliseconds."""
    newest = series("last_event_timestamp", f'{RUN}, event="{event}"')
    expr = f"max by (run_id, rank) ({newest}) * 1000"
    # Asked for at each scrape: it is seen when it has happened, and so is one soon after another.
    return Mark(name, color, name + ", rank {{rank}}", expr, value_is_time=True, step="15s")


_STATE, _ASKED = (series(f"optimizer.{name}", OPTIMIZER) for name in ("state", "state_expected"))
_BY_TYPE = f"sum by (run_id, optimizer, dtype) ({_STATE})"
#: Seen in the bytes: no loader was told. A type that was not there a minute ago; or more of one that was, in small
#: tensors, beyond what was asked for. Within a minute, the step of the query, so that it is found in every zoom.
_CONVERTED = (
    f"({_BY_TYPE} > 0)"
    f" unless on (run_id, optimizer, dtype) ({_STATE} offset 1m > 0)"
    f" and on (run_id, optimizer) ({_STATE} offset 1m > 0)"
    f" or ({_BY_TYPE} > 1.05 * sum by (run_id, optimizer, dtype) ({_STATE} offset 1m))"
    f" and on (run_id, optimizer) (sum by (run_id, optimizer) ({_STATE}) != sum by (run_id, optimizer) ({_ASKED}))"
)

MARKS = (
    _event("resume", "resume", "blue"),
    _event("checkpoint", "checkpoint", "green"),
    _event("skipped steps", "skipped_step", "orange"),
    _event("learning rate change", "learning_rate_change", "yellow"),
    _event("out of memory", "oom", "red"),
    _event("format conversion", "format_conversion", "purple"),
    Mark("silent conversion", "purple", "More state of {{optimizer}} is stored as {{dtype}}", _CONVERTED),
)


@dataclass(frozen=True)
class Board:
    """One dashboard; ``shown`` are the variables that change something on it."""

    name: str
    description: str
    rows: tuple[Row, ...]
    shown: tuple[str, ...] = tuple(VARIABLES)
    many_runs: bool = False

    @property
    def uid(self) -> str:
        """What links and Grafana's API know it by; never changed."""
        return f"optwatch-{self.name}"

    def generate(self) -> dashboard.Dashboard:
        """Return the dashboard as Grafana's model."""
        link = (
            builders.DashboardLink("optwatch").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG])
        ).include_vars(include_vars=True)
        builder = (
            builders.Dashboard(f"optwatch {self.name}")
            .uid(self.uid)
            .description(self.description)
            .tags([TAG])
            .editable()
            .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
            .time("now-1h", "now")
            .refresh("30s")
            .link(link.keep_time(keep_time=True))
            .with_variable(builders.DatasourceVariable("datasource").label("data source").type("prometheus"))
        )
        for name, query in VARIABLES.items():
            builder = builder.with_variable(self._variable(name, query))
        for mark in MARKS:
            builder = builder.annotation(self._annotation(mark))
        board = builder.build()
        # Own grid and ids: the builder's automatic layout overflows the 24 columns.
        board.panels = [
            _element(item, position, number)
            for number, (item, position) in enumerate(place(self.rows), start=1)
        ]
        return board

    def _variable(self, name: str, query: str) -> builders.QueryVariable:
        newest_first = name == "run"
        variable = (
            builders.QueryVariable(name)
            .label(name)
            .datasource(DATASOURCE)
            .query({"query": query, "refId": name, "qryType": 1})
            .definition(query)
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(
                dashboard.VariableSort.ALPHABETICAL_DESC
                if newest_first
                else dashboard.VariableSort.NUMERICAL_ASC
            )
        )
        if name not in self.shown:
            variable = variable.hide(dashboard.VariableHide.HIDE_VARIABLE)
        if name == "run":
            # Without an `allValue` "All" is the list of runs, which the job has narrowed.
            return variable.multi(True).include_all(True).current(_ALL) if self.many_runs else variable
        # "All" aggregates. ".+" and not ".*", which would match series that lack the label.
        return variable.multi(True).include_all(True).all_value(".+").current(_ALL)

    def _annotation(self, mark: Mark) -> builders.AnnotationQuery:
        expr = mark.expr.replace(THIS_RUN, CHOSEN_RUNS) if self.many_runs else mark.expr
        query = builders.AnnotationQuery().name(mark.name).datasource(DATASOURCE).icon_color(mark.color)
        query = query.expr(expr).title_format(mark.title).step(mark.step).enable(enable=True).hide(hide=False)
        return query.use_value_for_time(mark.value_is_time)


_ALL = dashboard.VariableOption(selected=True, text="All", value="$__all")


def _element(
    item: Row | Panel, position: dashboard.GridPos, number: int
) -> dashboard.Panel | dashboard.RowPanel:
    if isinstance(item, Panel):
        return build(item, position, number).build()
    row = builders.Row(item.title).id(number).grid_pos(position).build()
    row.collapsed = False
    return row
