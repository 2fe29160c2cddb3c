"""The table of `benchmarks.cpu`, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

METHOD = (
    "Both sides take turns in one process; median over {} processes, with the lowest and the highest of them. The "
    "times are medians of a step. With avx2 int8 has a target of its own; where the processor has more, ours is held "
    "to it and torch keeps its best. Largest load average while measuring:"
)


def report(document: dict[str, Any]) -> str:
    """The result document as a page: where and how it was measured, and a row for each case and instruction set."""
    machine, settings = document["machine"], document["settings"]
    loads = [sample["load_average"] for row in document["results"] for sample in row["processes"]]
    model = machine.get("cpu_model_name", machine["processor"])
    versions = f"Python {machine['python_version']}, " + ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items()
    )
    lines = [
        "# Steps on the CPU",
        "",
        f"    {document['command']}",
        "",
        f"{model}, {machine['cores']} cores, {machine['threads']} threads; {versions}.",
        "",
        METHOD.format(settings["processes"]) + (f" {max(loads):.1f}." if loads else " unknown."),
    ]
    if settings["quick"]:
        lines += ["", "**Tiny sizes: these figures show that it works, and nothing else.**"]
    header = ("what", "against", "ISA", "ours", "other", "measured", "lowest–highest", "target", "reached")
    rows = [cells(row) for row in document["results"]]
    widths = [max(len(column) for column in columns) for columns in zip(header, *rows, strict=True)]
    table = [header, tuple("-" * width for width in widths), *rows]
    lines += [
        "",
        *("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in table),
        "",
    ]
    lines += notes(document)
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    start = (row["what"], row["against"], row["isa"])
    sign = "≥" if row["more_is_better"] else "≤"
    target = "" if row["target"] is None else f"{sign} {row['target']:g} {row['unit']}"
    if row["measured"] is None:
        return (*start, "", "", "not measured", "", target, "")
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    times = (milliseconds(row["ours_ms"]), milliseconds(row["other_ms"]))
    spread = f"{number(row['lowest'])}–{number(row['highest'])}"
    return (*start, *times, f"{number(row['measured'])} {row['unit']}", spread, target, reached)


def notes(document: dict[str, Any]) -> list[str]:
    """What does not fit into a row: the cost of watching by two clocks, and what could not be measured."""
    speeds = [p["copied"] / 1e9 for row in document["results"] for p in row["processes"] if "copied" in p]
    found = []
    if speeds:
        low, middle, high = min(speeds), statistics.median(speeds), max(speeds)
        found.append(
            f"- A process copied memory at {low:.0f} to {high:.0f} GB/s (median {middle:.0f}), read and written: the "
            "faster, the harder for 8 bits, whose steps are bound by arithmetic."
        )
    for row in document["results"]:
        if row["problem"]:
            count = len(row["processes"])
            found.append(f"- {row['name']}, {row['isa']}, {count} processes measured: {row['problem']}")
        accounts = [value for process in row["processes"] for value in process.get("µs a step", ())]
        if accounts:
            account = statistics.median(accounts)
            clock = 1e3 * (row["ours_ms"] - row["other_ms"])
            found.append(
                f"- {row['name']}, {row['isa']}: watching accounts for {account:.1f} µs a step, "
                f"{account / 10 / row['other_ms']:.2g} % of it; by the clock a watched step, its share of the full "
                f"statistics included, takes {clock:.0f} µs longer."
            )
    return [*found, ""] if found else found


def milliseconds(value: float) -> str:
    """A time with three digits."""
    return f"{value:#.3g} ms" if value < 1000 else f"{value:.0f} ms"


def number(value: float) -> str:
    """Ratios near one need three decimals, large ones none."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
