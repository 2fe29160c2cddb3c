"""Write healthy.txt.xz: an hour of a healthy node, from a Prometheus that scraped it every 15 seconds.

``python tests/alerts/record.py http://127.0.0.1:9090 [END]`` keeps the series that the rules read, one a line: the
series, a tab, and its values in promtool's notation. Timestamps count from the first scrape, as promtool's clock does.

What is there was recorded from a GPT-2 of 4.8 million parameters on a CPU: two ranks with AdamW and int8 state, and one
with Lion and bf16 state, each with warm-up and gradient clipping, from the 1st step on.
"""

from __future__ import annotations

import json
import lzma
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import promql_parser
import yaml

FILE = Path(__file__).with_name("healthy.txt.xz")
RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "optwatch.rules.yml"
STEP, SAMPLES = 15, 240


def read_series() -> set[str]:
    """Names of all published series that some rule reads."""
    names: set[str] = set()

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            names.add(node.vector_selector.name)
        elif isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
        return True

    for rule in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        promql_parser.walk(promql_parser.parse(rule["expr"]), visit)
    return {name for name in names if ":" not in name}


def main() -> None:
    url, end = sys.argv[1], float(sys.argv[2]) if sys.argv[2:] else time.time()
    start = end - STEP * SAMPLES
    lines = []
    for name in sorted(read_series()):
        query = urllib.parse.urlencode({"query": name, "start": start, "end": end, "step": STEP})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}") as answer:
            found = json.load(answer)["data"]["result"]
        for one in found:
            labels = ", ".join(f'{k}="{v}"' for k, v in sorted(one["metric"].items()) if k != "__name__")
            values = {round((at - start) / STEP): float(value) for at, value in one["values"]}
            shift = start if "timestamp" in name else 0.0
            words = [f"{values[i] - shift:.6g}" if i in values else "_" for i in range(SAMPLES + 1)]
            lines.append(f"{name}{{{labels}}}\t{' '.join(words)}\n")
    FILE.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(lines)} series, {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
