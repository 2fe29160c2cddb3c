"""The optimizer dashboard: up to date, well laid out, explained, and about metrics and labels that exist."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from pathlib import Path

import promql_parser
import pytest

from optwatch.metrics.catalogue import CATALOGUE
from promql import Labels, selectors

if sys.version_info < (3, 11):
    pytest.skip("platform: grafana-foundation-sdk needs Python 3.11", allow_module_level=True)

with warnings.catch_warnings():
    # The SDK recommends the second version of the model, which the Grafana releases in use do not read.
    warnings.filterwarnings("ignore", "Prefer using dashboardv2", DeprecationWarning)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    from dashboards import build, optimizer

ROOT = Path(__file__).parents[2]
BOARD = json.loads(build.generate())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
VARIABLES = BOARD["templating"]["list"]
#: Grafana's own ids of units, as far as they are used here; "suffix: x" writes x behind the number.
UNITS = {"none", "short", "s", "bytes", "percentunit", "watt", "celsius"}


def _title(value: object) -> str:
    return value["title"] if isinstance(value, dict) and "title" in value else ""


def _plain(expr: str) -> str:
    """The expression with Grafana's intervals filled in, as Prometheus gets it."""
    return expr.replace("$__rate_interval", "5m").replace("$__range", "1h")


def test_is_up_to_date() -> None:
    """The committed file is what the generator writes."""
    committed = (ROOT / build.DEFAULT_PATH).read_text(encoding="utf-8")
    assert committed == build.generate(), "run `make generate` and commit the result"


def test_survives_the_sdk() -> None:
    """Grafana's model reads the file and writes the same: no field is misspelt or of another version."""
    again = json.loads(json.dumps(Dashboard.from_json(BOARD), cls=JSONEncoder))
    assert again == BOARD


def test_names_and_sizes() -> None:
    """Grafana's limits, and what makes links to the dashboard last."""
    assert BOARD["uid"] == "optwatch-optimizer"
    assert len(BOARD["uid"]) <= 40
    assert BOARD["schemaVersion"] == 42
    assert len(build.generate().encode()) < 256 * 1024
    assert "__inputs" not in BOARD


def test_ids_and_titles_are_unique() -> None:
    """Every panel can be linked to and talked about."""
    ids = [panel["id"] for panel in BOARD["panels"]]
    titles = [panel["title"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(set(titles)) == len(titles)


def test_grid() -> None:
    """Nothing leaves the 24 columns, nothing overlaps, and every panel stands below its row's heading."""
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in itertools.combinations(BOARD["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one['title']} and {other['title']} overlap"
    order = [panel["gridPos"]["y"] for panel in BOARD["panels"]]
    assert order == sorted(order)


def test_rows() -> None:
    """The rows a reader looks for, in their order."""
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Overview", "Step health", "Gradients", "Updates", "Optimizer state", "Memory", "The monitor itself",
    ]  # fmt: skip


@pytest.mark.parametrize("panel", PANELS, ids=_title)
def test_panel_is_explained(panel: dict) -> None:
    """Each panel has a unit, and says what it shows and what good looks like."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS or unit.startswith("suffix: ")
    assert "Good: " in panel["description"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=_title)
def test_expression(panel: dict, target: dict) -> None:
    """Every series, matcher, `by` and legend label exists, and the window of a rate follows the zoom."""
    labels = Labels().of(_plain(target["expr"]))
    assert labels is not None
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert shown <= labels, f"the legend shows {sorted(shown - labels)}; the series have {sorted(labels)}"
    assert set(re.findall(r"\[(.*?)\]", target["expr"])) <= {"$__rate_interval", "$__range"}


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=_title)
def test_expression_is_about_the_chosen_run(panel: dict, target: dict) -> None:
    """A series of a run is narrowed to the run, the optimizers and the groups chosen above."""
    variables = {"run_id": "$run", "optimizer": "$optimizer", "group": "$group"}
    matched_run = False
    for selector in selectors(promql_parser.parse(_plain(target["expr"]))):
        spec = CATALOGUE.sample(selector.name)
        assert spec is not None
        found = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        wanted = {label: value for label, value in variables.items() if label in spec.labels}
        assert found.items() >= wanted.items(), f"{selector.name} in {panel['title']}"
        matched_run |= "run_id" in wanted
    assert matched_run, "series that belong to no run are joined to the agents that serve the run"


def test_variables() -> None:
    """A data source, then run, optimizer and group; each query names a metric and a label that exist."""
    assert [variable["name"] for variable in VARIABLES] == ["datasource", "run", "optimizer", "group"]
    for variable in VARIABLES[1:]:
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found
        labels = Labels().of(found[1])
        assert labels is not None
        assert found[2] in labels
        assert variable["datasource"]["uid"] == "${datasource}"
        # ".*" would match series that do not have the label at all.
        assert not variable["includeAll"] or variable["allValue"] == ".+"


def test_every_metric_is_shown_or_exempt() -> None:
    """A new metric gets a panel, or a reason why not."""
    shown = set()
    for _, target in TARGETS:
        for selector in selectors(promql_parser.parse(_plain(target["expr"]))):
            spec = CATALOGUE.sample(selector.name)
            assert spec is not None
            shown.add(spec.name)
    assert shown | set(optimizer.EXEMPT) == set(CATALOGUE)
    assert not shown & set(optimizer.EXEMPT), "no longer exempt: it is on a panel"
    assert all(optimizer.EXEMPT.values()), "say why"


@pytest.mark.parametrize(
    ("expr", "complaint"),
    [
        ("optwatch_nonsense", "nothing publishes"),
        ('optwatch_rank_up{gpu="x"}', "has no label gpu"),
        ("max by (group) (optwatch_rank_up)", "not among the labels"),
        ("optwatch_step_duration_seconds", "take its _bucket"),
        (
            "histogram_quantile(0.5, sum by (rank) (rate(optwatch_step_duration_seconds_bucket[5m])))",
            "needs the label le",
        ),
        ("optwatch_rank_up / optwatch_moment_norm", "never match"),
        ("optwatch_rank_up * on (slot) optwatch_moment_norm", "not on the left"),
        ("max without (rank) (optwatch_rank_up)", "with `by`"),
    ],
)
def test_the_check_of_expressions_finds_mistakes(expr: str, complaint: str) -> None:
    """The check that the tests above rely on does fail."""
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        Labels().of(expr)
