"""Draws the stress table: the error of the update in each scenario, one mark for each format or optimizer.

python -m benchmarks.stress_plot RESULT.json PICTURE.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, TOP = 840, 44, 150, 30
LOWEST, HIGHEST = 1e-3, 100.0  # of the axis, logarithmic
COLOURS = ("#7f7f7f", "#9c755f", "#1f77b4", "#17a2b8", "#9467bd", "#2ca02c")  # own formats
PEERS = ("#d62728", "#ff7f0e", "#e377c2", "#8c564b", "#bcbd22")


def plot(result: dict[str, Any]) -> str:
    """The picture as SVG text: filled circles are own formats, crosses the peers."""
    lines = [line for line in result["lines"] if line["label"] != "fp32"]
    scenarios = list(lines[0]["scenarios"])
    legend = 18 * math.ceil(len(lines) / 2)
    height = TOP + ROW * len(scenarios) + 45 + legend
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        "<style>text {font: 12px sans-serif}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18">normalised RMS error of the update (less is better)</text>',
    ]
    bottom = TOP + ROW * len(scenarios)
    for power in range(round(math.log10(LOWEST)), round(math.log10(HIGHEST)) + 1):
        x = across(10.0**power)
        out.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{10.0**power:g}</text>')
    colours = style(lines)
    for i, name in enumerate(scenarios):
        y = TOP + ROW * i
        out.append(
            f'<text x="{LEFT - 12}" y="{y + ROW / 2 + 4}" text-anchor="end">{name.replace("_", " ")}</text>'
        )
        for k, line in enumerate(lines):
            height_in_row = y + 4 + (ROW - 8) * k / max(len(lines) - 1, 1)
            out.append(mark(across(line["scenarios"][name][2]), height_in_row, colours[k], own=line["own"]))
    for k, line in enumerate(lines):
        x, y = LEFT + 300 * (k % 2), bottom + 40 + 18 * (k // 2)
        out.append(mark(x, y - 4, colours[k], own=line["own"]))
        out.append(f'<text x="{x + 10}" y="{y}">{line["label"]}, {line["bytes"]:.4g} bytes</text>')
    return "\n".join([*out, "</svg>", ""])


def style(lines: list[dict[str, Any]]) -> list[str]:
    """A colour for each line."""
    own, peers = iter(COLOURS[1:]), iter(PEERS)
    return [next(own if line["own"] else peers) for line in lines]


def across(value: float) -> float:
    """Where a value lies on the axis."""
    share = math.log(min(max(value, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return round(LEFT + share * (WIDTH - LEFT - 20), 1)


def mark(x: float, y: float, colour: str, *, own: bool) -> str:
    """A circle, or a cross for a peer."""
    y = round(y, 1)
    if own:
        return f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'
    return f'<path d="M{x - 4} {y - 4}l8 8m0 -8l-8 8" stroke="{colour}" stroke-width="2"/>'


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(plot(json.loads(Path(sys.argv[1]).read_text())))
