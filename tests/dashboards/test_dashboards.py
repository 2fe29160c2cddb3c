"""The dashboards: up to date, well laid out, explained, and about metrics and labels that exist."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator
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
    from dashboards.board import VARIABLES, Board
    from deploy.prometheus.alerts import ALERTS
    from deploy.prometheus.recordings import RECORDINGS

ROOT = Path(__file__).parents[2]
BOARDS = tuple(build.BOARDS.values())
JSON = {board.name: json.loads(build.generate(board)) for board in BOARDS}
PANELS = [
    (board, panel) for board in BOARDS for panel in JSON[board.name]["panels"] if panel["type"] != "row"
]
TARGETS = [(board, panel, target) for board, panel in PANELS for target in panel["targets"]]
RECORDED = {rule.record: rule.labels for rule in RECORDINGS}
LABELS = Labels(RECORDED)
#: Grafana's own ids of units, as far as they are used here; "suffix: x" writes x behind the number.
UNITS = {"none", "sci", "short", "string", "s", "bytes", "percentunit", "watt", "celsius"}
#: Label -> the variable that chooses its values.
CHOICES = {"run_id": "run", "optimizer": "optimizer", "group": "group", "rank": "rank", "job": "job"}

every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def _id(value: object) -> str:
    if isinstance(value, dict):
        return value.get("title", "")
    return value.name


def _plain(expr: str) -> str:
    """The expression with Grafana's intervals filled in, as Prometheus gets it."""
    return expr.replace("$__rate_interval", "5m").replace("$__range", "1h")


def _selectors(expr: str) -> Iterator[tuple[str, frozenset[str], dict[str, str]]]:
    """Name, labels and matchers of every series that an expression reads."""
    for selector in selectors(promql_parser.parse(_plain(expr))):
        spec = CATALOGUE.sample(selector.name)
        labels = spec.labels if spec else RECORDED.get(selector.name, ("job",) * (selector.name == "up"))
        yield selector.name, frozenset(labels), {one.name: one.value for one in selector.matchers.matchers}


@every_board
def test_is_up_to_date(board: Board) -> None:
    """The committed file is what the generator writes."""
    committed = (ROOT / build.FOLDER / f"{board.name}.json").read_text(encoding="utf-8")
    assert committed == build.generate(board), "run `make generate` and commit the result"


def test_no_other_file_is_shipped() -> None:
    """What `optwatch dashboards` installs is what is made here."""
    assert {path.name for path in (ROOT / build.FOLDER).iterdir()} == {
        f"{name}.json" for name in build.BOARDS
    }


@every_board
def test_survives_the_sdk(board: Board) -> None:
    """Grafana's model reads the file and writes the same: no field is misspelt or of another version."""
    again = json.loads(json.dumps(Dashboard.from_json(JSON[board.name]), cls=JSONEncoder))
    assert again == JSON[board.name]


@every_board
def test_names_and_sizes(board: Board) -> None:
    """Grafana's limits, and what makes links to the dashboard last."""
    made = JSON[board.name]
    assert made["uid"] == f"optwatch-{board.name}"
    assert len(made["uid"]) <= 40
    assert made["schemaVersion"] == 42
    assert len(build.generate(board).encode()) < 256 * 1024
    assert "__inputs" not in made


def test_ids_and_titles_are_unique() -> None:
    """Every panel can be linked to and talked about, titles over all dashboards."""
    for made in JSON.values():
        ids = [panel["id"] for panel in made["panels"]]
        assert len(set(ids)) == len(ids)
    titles = [panel["title"] for _, panel in PANELS]
    assert len(set(titles)) == len(titles)


@every_board
def test_grid(board: Board) -> None:
    """Nothing leaves the 24 columns, nothing overlaps, and every panel stands below its row's heading."""
    panels = JSON[board.name]["panels"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in itertools.combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one['title']} and {other['title']} overlap"
    order = [panel["gridPos"]["y"] for panel in panels]
    assert order == sorted(order)


def test_rows() -> None:
    """The rows a reader looks for, in their order."""
    rows = {
        name: [panel["title"] for panel in made["panels"] if panel["type"] == "row"]
        for name, made in JSON.items()
    }
    assert rows == {
        "optimizer": [
            "Overview", "Step health", "What the loop reported", "Gradients", "Updates", "Optimizer state",
            "From sampled blocks",
        ],
        "memory": ["Optimizer state", "What the run holds", "Device memory"],
        "fleet": ["Runs", "Ranks", "GPUs of the runs"],
        "monitor": ["Overview", "What watching costs", "What is missing"],
    }  # fmt: skip


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=_id)
def test_panel_is_explained(board: Board, panel: dict) -> None:
    """Each panel has a unit, and says what good looks like and what to do else; a runbook that it names exists."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS or unit.startswith("suffix: ")
    good = panel["description"].partition("Good: ")[2]
    assert re.search(r"\belse\b", good), "say what to do where it is not good"
    named = set(re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", panel["description"]))
    assert named <= {alert.name for alert in ALERTS}
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)


@pytest.mark.parametrize(("board", "panel", "target"), TARGETS, ids=_id)
def test_expression(board: Board, panel: dict, target: dict) -> None:
    """Every series, matcher, `by` and legend label exists, and the window of a rate follows the zoom."""
    labels = LABELS.of(_plain(target["expr"]))
    assert labels is not None
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert shown <= labels, f"the legend shows {sorted(shown - labels)}; the series have {sorted(labels)}"
    windows = set(re.findall(r"\[(.*?)\]", target["expr"]))
    # A forecast is made from the same half hour at every zoom.
    assert windows <= ({"30m"} if "predict_linear" in target["expr"] else {"$__rate_interval", "$__range"})


@pytest.mark.parametrize(("board", "panel", "target"), TARGETS, ids=_id)
def test_expression_is_about_what_was_chosen(board: Board, panel: dict, target: dict) -> None:
    """A series is narrowed to the run, ranks, optimizers and groups chosen above, or joined to one that is."""
    chosen = False
    for name, labels, matchers in _selectors(target["expr"]):
        if name == "ALERTS":  # of all runs, and of devices and agents, which have none
            return
        wanted = {label for label, variable in CHOICES.items() if label in labels and variable in board.shown}
        for label in wanted:
            assert matchers.get(label) == f"${CHOICES[label]}", f"{name} is not narrowed by {label}"
        chosen |= bool(wanted & {"run_id"}) or matchers.get("job") == "$job"
    assert chosen, "series that belong to no run are joined to the agents that serve it, or chosen by job"


@every_board
def test_variables(board: Board) -> None:
    """The same on every dashboard, so that links keep the selection; each query names what exists."""
    variables = JSON[board.name]["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", *VARIABLES]
    for variable in variables[1:]:
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found
        labels = LABELS.of(found[1])
        assert labels is not None
        assert found[2] in labels
        assert variable["datasource"]["uid"] == "${datasource}"
        assert (variable.get("hide", 0) == 0) == (variable["name"] in board.shown)
        # ".*" would match series that do not have the label at all.
        if variable["name"] != "run":
            assert variable["allValue"] == ".+"
            assert variable["current"]["value"] == "$__all", "aggregated unless something is chosen"


@every_board
def test_links_keep_the_selection(board: Board) -> None:
    """One link leads to all dashboards of the project, with time and variables."""
    (link,) = JSON[board.name]["links"]
    assert link["type"] == "dashboards"
    assert set(link["tags"]) <= set(JSON[board.name]["tags"])
    assert link["includeVars"]
    assert link["keepTime"]


def test_values_lead_to_the_run_that_they_are_about() -> None:
    """From the fleet to a dashboard that exists, with the time, the choice above, and a run by a label of the value."""
    links = [
        (target, link["url"])
        for _, panel, target in TARGETS
        for link in panel["fieldConfig"]["defaults"].get("links", ())
    ]
    assert len(links) >= 20
    for target, url in links:
        path, _, query = url.partition("?")
        assert path.removeprefix("/d/") in {f"optwatch-{name}" for name in build.BOARDS}
        assert {"${__url_time_range}", "${datasource:queryparam}", "${job:queryparam}"} < set(
            query.split("&")
        )
        label = re.search(r"var-run=\$\{__(?:field\.labels|data\.fields)\.(\w+)\}$", query)
        assert label
        assert label[1] in LABELS.of(_plain(target["expr"]))


@every_board
def test_annotations(board: Board) -> None:
    """Events are marked on every dashboard; each is about the chosen runs and shows labels that exist."""
    marks = JSON[board.name]["annotations"]["list"]
    names = {mark["name"] for mark in marks}
    assert names >= {"resume", "checkpoint", "format conversion", "skipped steps", "out of memory"}
    for mark in marks:
        labels = LABELS.of(mark["expr"])
        assert labels is not None
        assert set(re.findall(r"\{\{(\w+)\}\}", mark["titleFormat"])) <= labels
        for name, _, matchers in _selectors(mark["expr"]):
            assert matchers["run_id"] == "$run", name
        assert mark["useValueForTime"] == ("timestamp" in mark["expr"])
        assert ('run_id=~"$run"' in mark["expr"]) == board.many_runs


def test_every_metric_is_shown_or_exempt() -> None:
    """A new metric gets a panel or an annotation on one of the dashboards, or a reason why not."""
    source = {rule.record: rule.expr for rule in RECORDINGS}
    shown = set()
    queue = [target["expr"] for _, _, target in TARGETS]
    queue += [mark["expr"] for made in JSON.values() for mark in made["annotations"]["list"]]
    while queue:
        for name, _, _ in _selectors(queue.pop()):
            if name in source:
                queue.append(source[name])
            elif name not in {"up", "ALERTS"}:
                spec = CATALOGUE.sample(name)
                assert spec is not None
                shown.add(spec.name)
    assert shown | set(optimizer.EXEMPT) == set(CATALOGUE)
    assert not shown & set(optimizer.EXEMPT), "no longer exempt: it is shown"
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
