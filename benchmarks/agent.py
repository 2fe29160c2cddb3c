"""What the agent and the board cost: start, memory, CPU time, scrapes, and the writing of a step.

    python -m benchmarks agent [--seconds 30]

Eight processes write boards of 1,000 tensors, twenty steps a second, one in fifty with full statistics (watch()'s
default), and the agent runs with its default settings. Then a day of jobs that come and go passes on a simulated clock,
over real boards. Results go to benchmarks/results/agent.json and agent.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from optwatch.board import (
    BoardReader,
    BoardWriter,
    Histogram,
    HistogramSeries,
    Schema,
    Series,
    Table,
    TensorInfo,
    find_agent,
)
from optwatch.metrics.catalogue import CATALOGUE

RESULTS = Path(__file__).parent / "results"
RANKS, TENSORS, HERTZ, EVERY = 8, 1000, 20.0, 50
SCRAPERS = 10
ADAMW = {"optimizer": "AdamW"}
# Figure -> (limit, unit, what it is).
LIMITS = {
    "start_seconds": (1.0, "s", "from the start of the process to the first answered scrape"),
    "start_cpu_seconds": (None, "s", "CPU time of the agent until then"),
    "cpu_percent": (10.0, "% of a core", "CPU time of the agent, a scrape every 5 s included"),
    "resident_mb": (
        96.0,
        "MB",
        "resident memory of the agent at its peak, the live page's first question included",
    ),
    "samples_dropped": (0.0, "", "steps that were overwritten before the agent read them, of all ranks"),
    "scrape_ms_median": (None, "ms", "a scrape of a newer poll, median"),
    "scrape_cpu_ms": (None, "ms", "CPU time of the agent for such a scrape, the polls before it included"),
    "crowd_ms_median": (None, "ms", "a scrape by each of ten scrapers at once, two rounds a second, median"),
    "crowd_ms_p99": (50.0, "ms", "the same, 99th percentile"),
    "page_ms": (None, "ms", "the live page's first question: the history of the run, of all ranks"),
    "publish_cheap_us": (60.0, "µs", "BoardWriter.publish without full statistics, median"),
    "publish_full_us": (120.0, "µs", "the same with full statistics, median"),
    "find_agent_us": (None, "µs", "find_agent, median"),
    "series": (None, "", "series in the scrape"),
    "series_of_a_rank": (300.0, "", "series of the rank that has most"),
    "board_kib": (None, "KiB", "size of a board"),
    "exit_seconds": (2.0, "s", "from SIGTERM to the end of the process, with a collector that never answers"),
    "churn_jobs": (None, "", "jobs of two ranks in a simulated day, a new one every ten minutes"),
    "churn_growth_mb": (1.0, "MB", "resident memory after that day, over that after its first three hours"),
    "churn_ranks_most": (None, "", "ranks that were served at once, at most"),
    "churn_series_left": (0.0, "", "series of ranks that are left when the last grace period is over"),
}


def schema(rank: int) -> Schema:
    """The series of a rank with one optimizer over four parameter groups."""
    tensors = tuple(
        TensorInfo(f"transformer.h.{i}.mlp.weight", f"blocks_{i % 6}", 1 << 16) for i in range(TENSORS)
    )
    place = {"dtype": "float32", "device": "cuda:0"}
    slots = [{**ADAMW, **place, "slot": slot} for slot in ("exp_avg", "exp_avg_sq")]
    names = ("optwatch.optimizer.state", "optwatch.optimizer.state_expected")
    gauges = [Series(name, labels) for name in names for labels in slots]
    gauges += [Series(f"optwatch.{n}", {**ADAMW, **place}) for n in ("parameter", "gradient", "parameters")]
    gauges += [Series("optwatch.learning_rate", {**ADAMW, "param_group": str(i)}) for i in range(4)]
    counters = [Series(f"optwatch.{n}", ADAMW) for n in ("steps", "steps_skipped", "nonfinite_elements")]
    seconds = CATALOGUE["optwatch.step_duration"].buckets
    return Schema(
        run={"run_id": "benchmark", "rank": rank, "world_size": RANKS, "host": "node", "pid": os.getpid()},
        gauges=tuple(gauges),
        counters=(*counters, Series("optwatch.overhead")),
        infos=(
            Series("optwatch.optimizer", {**ADAMW, "rule": "adamw", "codec": "int8", "backend": "triton"}),
        ),
        histograms=(
            HistogramSeries("optwatch.step_duration", {}, seconds),
            HistogramSeries("optwatch.optimizer_step_duration", ADAMW, seconds),
        ),
        tables=(Table("AdamW", ("exp_avg", "exp_avg_sq"), (False, True), tensors),),
    )


def publisher(writer: BoardWriter, full: bool) -> Callable[[int], None]:
    """A function that publishes one step."""
    made = writer.schema
    random = np.random.default_rng(0)
    rows = random.random((TENSORS, made.tables[0].width if full else 3))
    gauges, counters = random.random(len(made.gauges)), random.random(len(made.counters))
    histograms = [Histogram(h.bounds) for h in made.histograms]

    def publish(step: int) -> None:
        sums = [(h.counts, h.sum) for h in histograms]
        writer.publish(step, time.time(), gauges, [rows], counters, sums)

    return publish


def write(directory: str, rank: int) -> None:
    """A rank: twenty steps a second, until killed."""
    writer = BoardWriter.create(directory, schema(rank))
    cheap, full = publisher(writer, full=False), publisher(writer, full=True)
    step = 0
    while True:
        step += 1
        (full if step % EVERY == 1 else cheap)(step)
        time.sleep(1 / HERTZ)


def measure_board(directory: Path) -> dict[str, float]:
    """Medians of writing a step, in microseconds."""
    writer = BoardWriter.create(directory, schema(99))
    found: dict[str, float] = {"board_kib": writer.path.stat().st_size / 1024}
    for name, full in (("publish_cheap_us", False), ("publish_full_us", True)):
        publish = publisher(writer, full)
        found[name] = 1e6 * statistics.median(timed(lambda: publish(1)) for _ in range(3000))  # noqa: B023 - called at once
    BoardReader(writer.path).poll()
    writer.close()
    writer.path.unlink()
    return found


def measure_agent(directory: Path, seconds: float) -> dict[str, float]:
    """Start, memory, CPU time and scrapes of an agent over eight boards."""
    writers = [
        subprocess.Popen([sys.executable, __file__, "--write", directory, str(r)]) for r in range(RANKS)
    ]
    while len(list(directory.glob("*.board"))) < RANKS:
        time.sleep(0.05)
    started = time.perf_counter()
    log = (directory / "log").open("wb")
    agent = subprocess.Popen(
        [sys.executable, "-m", "optwatch.agent", "--dir", directory, "--port", "0"],
        stderr=log,
        env={**os.environ, "OPTWATCH_STORE": f"{directory}/store"},  # not among the user's own runs
    )
    try:
        while not (url := find_agent(directory)):
            time.sleep(0.002)
        get(url)
        found = {"start_seconds": time.perf_counter() - started, "start_cpu_seconds": cpu_seconds(agent.pid)}
        time.sleep(2)
        used, begin = cpu_seconds(agent.pid), time.monotonic()
        while time.monotonic() - begin < seconds:
            time.sleep(5)
            get(url)
        found["cpu_percent"] = 100 * (cpu_seconds(agent.pid) - used) / (time.monotonic() - begin)
        scrapes = []
        used = cpu_seconds(agent.pid)
        for _ in range(40):
            time.sleep(0.55)  # longer than between two polls
            scrapes.append(1e3 * timed(lambda: get(url)))
        found["scrape_cpu_ms"] = 1e3 * (cpu_seconds(agent.pid) - used) / len(scrapes)
        found["scrape_ms_median"] = statistics.median(scrapes)
        crowded = crowd(url, rounds=40)
        found["crowd_ms_median"] = statistics.median(crowded)
        found["crowd_ms_p99"] = statistics.quantiles(crowded, n=100)[-1]
        lines = [line for line in get(url).decode().splitlines() if not line.startswith("#")]
        found["series"] = len(lines)
        found["series_of_a_rank"] = max(
            sum(f'rank="{rank}"' in line for line in lines) for rank in range(RANKS)
        )
        dropped = [line for line in lines if line.startswith("optwatch_samples_dropped_total")]
        found["samples_dropped"] = sum(float(line.split()[-1]) for line in dropped)
        history = url.replace("/metrics", "/api/history?run=benchmark")
        found["page_ms"] = 1e3 * timed(lambda: get(history))
        found["resident_mb"] = peak_resident(agent.pid) / 1e6
        found["find_agent_us"] = 1e6 * statistics.median(
            timed(lambda: find_agent(directory)) for _ in range(500)
        )
        return found
    finally:
        for process in (agent, *writers):
            process.kill()
            process.wait()
        log.close()


def measure_exit(directory: Path) -> dict[str, float]:
    """The end of an agent that has snapshots for a collector which takes connections and says nothing."""
    directory.mkdir(mode=0o700)
    publisher(BoardWriter.create(directory, schema(0)), full=True)(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        agent = subprocess.Popen(
            [sys.executable, "-m", "optwatch.agent", "--dir", directory, "--port", "0", "--store", directory / "store",
             "--otlp-endpoint", endpoint, "--otlp-interval", "0.1"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not find_agent(directory):
            time.sleep(0.01)
        time.sleep(2)  # the queue is full
        started = time.perf_counter()
        agent.terminate()
        agent.wait()
        return {"exit_seconds": time.perf_counter() - started}


def crowd(url: str, rounds: int) -> list[float]:
    """Milliseconds of each scrape of so many rounds, in each of which all scrapers ask at once."""
    taken: list[float] = []

    def ask() -> None:
        taken.append(1e3 * timed(lambda: get(url)))

    for _ in range(rounds):
        threads = [threading.Thread(target=ask) for _ in range(SCRAPERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.5)
    return taken


def churn(directory: Path) -> dict[str, float]:
    """A day of jobs, polled every 10 s of a simulated clock; a job lives for 25 minutes."""
    from optwatch.agent.boards import Boards
    from optwatch.agent.collect import Collector
    from optwatch.agent.nvml import NvmlSampler
    from optwatch.exporters.prometheus import PrometheusExporter

    tick, between, life, grace, day = 10.0, 600.0, 1500.0, 300.0, 86400.0
    now, jobs, most, early = 0.0, 0, 0, 0.0
    time.monotonic = lambda: now
    boards, exporter = Boards(directory, grace), PrometheusExporter()
    collector = Collector(boards, NvmlSampler(1.0, 1.0), 300)
    running: dict[BoardWriter, float] = {}
    while now < day + life + 2 * grace:
        if now < day and now % between == 0:
            jobs += 1
            for rank in range(2):
                made = schema(rank)
                made = replace(made, run={**made.run, "run_id": f"job-{jobs}"})
                running[BoardWriter.create(directory, made)] = now + life
        for writer, end in list(running.items()):
            publisher(writer, full=now % 500 == 0)(int(now))
            if now >= end:
                writer.close()
                del running[writer]
        boards.poll()
        most = max(most, len(boards.ranks))
        if now % 300 == 0:
            exporter.accept(collector.snapshot())
            body = exporter.render()[1]
        if now == 3 * 3600:
            early = peak_resident(os.getpid())
        now += tick
    exporter.accept(collector.snapshot())
    body = exporter.render()[1]
    return {
        "churn_jobs": jobs,
        "churn_growth_mb": (peak_resident(os.getpid()) - early) / 1e6,
        "churn_ranks_most": most,
        "churn_series_left": body.count(b'rank="'),
    }


def measure_churn() -> dict[str, float]:
    """`churn` in a process of its own, whose memory is nobody else's."""
    done = subprocess.run([sys.executable, __file__, "--churn"], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def get(url: str) -> bytes:
    """One scrape as Prometheus does it."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        body: bytes = answer.read()
        return body


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_resident(pid: int) -> int:
    """The largest resident memory so far, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def report(found: dict[str, float], seconds: float) -> str:
    """The results as a table."""
    rows = []
    for name, (limit, unit, what) in LIMITS.items():
        wanted = f"≤ {limit:g}" if limit is not None else ""
        rows.append(f"| {what} | {found[name]:.3g} {unit} | {wanted} |")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    head = [
        "# The agent and the board",
        "",
        f"{RANKS} boards x {TENSORS} tensors x {HERTZ:g} steps/s, full statistics every {EVERY} steps,",
        f"for {seconds:g} s.",
        f"{machine}, load average {os.getloadavg()[0]:.1f} by this and other work.",
        "",
        "    python -m benchmarks agent",
        "",
        "| figure | measured | wanted |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def main() -> int:
    """Measure, write the results, and say whether all limits are kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--write", nargs=2, metavar=("DIRECTORY", "RANK"), help=argparse.SUPPRESS)
    parser.add_argument("--churn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write[0], int(options.write[1]))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="optwatch-benchmark-", dir=memory) as name:
        if options.churn:
            print(json.dumps(churn(Path(name))))
            return 0
        found = {
            **measure_board(Path(name)),
            **measure_agent(Path(name), options.seconds),
            **measure_exit(Path(name, "exit")),
            **measure_churn(),
        }
    RESULTS.mkdir(exist_ok=True)
    limits = {name: limit for name, (limit, _, _) in LIMITS.items() if limit is not None}
    facts = {
        "command": "python -m benchmarks agent",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    (RESULTS / "agent.json").write_text(
        json.dumps({**facts, "limits": limits, "results": found}, indent=2) + "\n"
    )
    (RESULTS / "agent.md").write_text(text := report(found, options.seconds))
    print(text)
    return any(found[name] > limit for name, limit in limits.items())


if __name__ == "__main__":
    sys.exit(main())
