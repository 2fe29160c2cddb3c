"""The dashboard "optwatch optimizer": its variables and rows."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard

from dashboards import machine, state, training
from dashboards.panels import DATASOURCE, Panel, Row, build, place
from dashboards.queries import RUN, series

UID = "optwatch-optimizer"
TITLE = "optwatch optimizer"
ROWS = (
    training.OVERVIEW,
    training.HEALTH,
    state.GRADIENTS,
    state.UPDATES,
    state.STATE,
    machine.MEMORY,
    machine.MONITOR,
)

#: Metrics that are on no panel, each with its reason.
EXEMPT: dict[str, str] = {
    "optwatch.scalar": "its names are the training loop's own: a panel of them is made by hand",
    "optwatch.training.tokens": "not every loop counts them: a panel without data would be no use",
    "optwatch.training.samples": "not every loop counts them: a panel without data would be no use",
    "optwatch.events": "annotations show when something happened better than a panel does",
    "optwatch.last_event_timestamp": "annotations show when something happened better than a panel does",
    "optwatch.host_memory.peak": "for the gate; the panel of resident memory shows it as it grows",
    "optwatch.otlp_exports": "only of agents that push",
    "optwatch.otlp_failures": "only of agents that push",
}

#: Variable -> the query that lists its values; each narrows the next.
VARIABLES = {
    "run": f"label_values({series('rank_up')}, run_id)",
    "optimizer": f"label_values({series('steps', RUN)}, optimizer)",
    "group": f"label_values({series('gradient.norm', RUN)}, group)",
}


_ALL = dashboard.VariableOption(selected=True, text="All", value="$__all")


def _variable(name: str, query: str) -> builders.QueryVariable:
    variable = (
        builders.QueryVariable(name)
        .label(name)
        .datasource(DATASOURCE)
        .query({"query": query, "refId": name, "qryType": 1})
        .definition(query)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(
            dashboard.VariableSort.ALPHABETICAL_DESC
            if name == "run"
            else dashboard.VariableSort.ALPHABETICAL_ASC
        )
    )
    if name == "run":
        return variable
    # ".+" and not ".*", which would match series that lack the label.
    return variable.multi(True).include_all(True).all_value(".+").current(_ALL)


def generate() -> dashboard.Dashboard:
    """Return the dashboard as Grafana's model."""
    builder = (
        builders.Dashboard(TITLE)
        .uid(UID)
        .description(
            "One training run: step health, gradients, updates, the error of storing optimizer state, memory."
        )
        .tags(["optwatch"])
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .with_variable(builders.DatasourceVariable("datasource").label("data source").type("prometheus"))
    )
    for name, query in VARIABLES.items():
        builder = builder.with_variable(_variable(name, query))
    board = builder.build()
    # Own grid and ids: the builder's automatic layout overflows the 24 columns.
    board.panels = [
        _element(item, position, number) for number, (item, position) in enumerate(place(ROWS), start=1)
    ]
    return board


def _element(
    item: Row | Panel, position: dashboard.GridPos, number: int
) -> dashboard.Panel | dashboard.RowPanel:
    if isinstance(item, Panel):
        return build(item, position, number).build()
    row = builders.Row(item.title).id(number).grid_pos(position).build()
    row.collapsed = False
    return row
