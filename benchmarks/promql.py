"""How long panels and annotations take, over six hours of 64 ranks with 16 groups, in a real Prometheus.

    python -m benchmarks promql

One metric of each set of labels is made up and loaded (`promtool tsdb create-blocks-from openmetrics`); the others of
the set are asked for under its name: what a query costs follows from the number of its series. The Debian packages of
tests/install-debian-packages must be there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import promql_parser

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
os.environ["PATH"] += os.pathsep + str(ROOT / ".tools" / "usr" / "bin")

from deploy.prometheus.recordings import RECORDINGS  # noqa: E402 - the paths come first
from optwatch.metrics.catalogue import CATALOGUE  # noqa: E402
from prometheus_server import PrometheusServer  # noqa: E402
from promql import selectors  # noqa: E402

RANKS, GROUPS, HOURS, SCRAPE = 64, 16, 6, 30
STEP = 30  # seconds: six hours on a panel of 720 points
END = int(time.time()) // 7200 * 7200
VALUES = {
    "rank": [str(i) for i in range(RANKS)],
    "group": [f"blocks {i}" for i in range(GROUPS)],
    "slot": ["exp_avg", "exp_avg_sq"],
    "state": ["running", "finished", "failed", "lost"],
    "gpu": [f"GPU-{i}" for i in range(8)],
    "run_id": ["run"],
}
FILLED = {"$__rate_interval": "2m", "$__range": "6h", "$run": "run", "$job": ".+"}
FILLED |= {f"${name}": ".+" for name in ("optimizer", "group", "rank")}
Shape = tuple[tuple[str, ...], str]


def shapes() -> dict[str, tuple[str, Shape]]:
    """Series name -> the name under which it is asked for, and the shape of that."""
    found: dict[str, tuple[str, Shape]] = {}
    first: dict[Shape, str] = {}
    for spec in CATALOGUE.values():
        for sample in spec.samples:
            labels = (*spec.labels, "le") if sample.endswith("_bucket") else spec.labels
            shape = (tuple(sorted(labels)), spec.instrument + sample.removeprefix(spec.prometheus))
            found[sample] = (first.setdefault(shape, sample), shape)
    for rule in RECORDINGS:
        shape = (tuple(sorted(rule.labels)), "recorded")
        found[rule.record] = (first.setdefault(shape, rule.record), shape)
    return found


def label_sets(labels: tuple[str, ...], bounds: tuple[float, ...]) -> Iterator[str]:
    """Every combination of the labels' values, as a series has them."""
    parts = [""]
    for name in (*labels, "instance", "job"):
        values = [*map(str, bounds), "+Inf"] if name == "le" else VALUES.get(name, ["x"])
        parts = [f'{part},{name}="{value}"' for part in parts for value in values]
    for part in parts:
        yield part[1:]


def write(path: Path, wanted: dict[str, Shape]) -> int:
    """The samples as OpenMetrics; returns the number of series."""
    times = [END - 3600 * HOURS + SCRAPE * i for i in range(3600 * HOURS // SCRAPE)]
    bounds = CATALOGUE["optwatch.step_duration"].buckets
    count = 0
    with path.open("w", encoding="ascii") as file:
        for name, (labels, kind) in wanted.items():
            file.write(f"# TYPE {name} unknown\n")
            rising = kind.startswith(("counter", "histogram"))
            for number, series in enumerate(label_sets(labels, bounds)):
                count += 1
                file.writelines(
                    f"{name}{{{series}}} {(i * 30 + number) if rising else (i * 7 + number) % 101 + 1} {at}\n"
                    for i, at in enumerate(times)
                )
        file.write("# EOF\n")
    return count


def panels() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and expression of every query."""
    for path in sorted((ROOT / "optwatch" / "dashboards").glob("*.json")):
        board = json.loads(path.read_bytes())
        asked = [
            (panel["title"], target["expr"])
            for panel in board["panels"]
            for target in panel.get("targets", ())
        ]
        # They are the same on all dashboards, but for how the run is chosen.
        marks = board["annotations"]["list"] if path.stem == "optimizer" else ()
        asked += [(f"annotation: {mark['name']}", mark["expr"]) for mark in marks]
        for title, query in asked:
            expr = query
            for name, value in FILLED.items():
                expr = expr.replace(name, value)
            yield path.stem, title, expr


def substitute(expr: str, wanted: dict[str, Shape]) -> str:
    """The expression over the metrics that are loaded, which are added to ``wanted``."""
    known = shapes()
    for name in {found.name for found in selectors(promql_parser.parse(expr))} & set(known):
        other, wanted[known[name][0]] = known[name]
        expr = re.sub(rf"(?<![\w:]){re.escape(name)}(?![\w:])", other, expr)
    return expr


def measure(server: PrometheusServer, expr: str) -> tuple[float, int]:
    """Seconds of the best of three, and the number of series that came."""
    query = {"query": expr, "start": END - 3600 * HOURS, "end": END - SCRAPE, "step": STEP}
    address = f"{server.url}/api/v1/query_range?{urllib.parse.urlencode(query)}"
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with urllib.request.urlopen(address) as answer:
            body = answer.read()
        best = min(best, time.perf_counter() - start)
    return best, len(json.loads(body)["data"]["result"])


def main() -> None:
    queries = list(panels())
    wanted: dict[str, Shape] = {}
    asked = [(board, title, substitute(expr, wanted)) for board, title, expr in queries]
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory, "samples.txt")
        series = write(text, wanted)
        data = Path(directory, "prometheus", "data")
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", str(text), str(data)]
        subprocess.run(command, check=True)
        text.unlink()
        with PrometheusServer(data.parent, "http://127.0.0.1:1/metrics") as server:
            rows = [(*measure(server, expr), board, title) for board, title, expr in asked]
    report(sorted(rows, reverse=True), series)


def report(rows: list[tuple[float, int, str, str]], series: int) -> None:
    """Write benchmarks/results/promql.md."""
    head = (
        f"`python -m benchmarks promql`: {len(rows)} queries of the four dashboards over {HOURS} hours of {RANKS} ranks"
        f" × {GROUPS} groups, scraped every {SCRAPE} s, {STEP} s between points; best of three. {series:,} series were"
        f" loaded. Prometheus 2.42 (Debian), {os.cpu_count()} cores of an {platform.machine()} machine, shared with"
        " other work.\n"
    )
    lines = [
        "# Panel queries\n",
        head,
        f"The slowest takes {rows[0][0]:.2f} s, the median {rows[len(rows) // 2][0] * 1e3:.0f} ms.\n",
        "| dashboard | panel | seconds | series shown |\n|---|---|---|---|",
        *(f"| {board} | {title} | {seconds:.3f} | {count} |" for seconds, count, board, title in rows[:20]),
    ]
    path = ROOT / "benchmarks" / "results" / "promql.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
