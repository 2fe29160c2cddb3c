"""The table and the picture of a convergence result."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

REFERENCE = "fp32"
HEAD = (
    "| | bytes a parameter | loss by seed, on data held out | mean of the last batches | mean difference "
    "| of the noise | within |"
)
WIDTH, ROW, LEFT, TOP, GAP = 840, 26, 170, 30, 60


class Line(NamedTuple):
    """One format on one task."""

    kind: str
    bytes: float | None
    losses: list[float]  # on data held out, by seed
    train: float  # mean over the last batches and the seeds
    differences: list[float]  # from fp32's, by seed

    @property
    def mean(self) -> float:
        """The mean difference from fp32."""
        return statistics.fmean(self.differences)


def lines(document: dict[str, Any], task: str) -> tuple[list[Line], float]:
    """Every format's line, and the standard deviation of fp32's loss over the seeds."""
    runs, seeds = document["runs"], document["settings"]["seeds"]
    kinds = list(dict.fromkeys(key.partition(" ")[0] for key in runs))

    def of(kind: str, field: str) -> list[float]:
        return [runs[f"{kind} {task} {seed}"][field] for seed in seeds]

    reference = of(REFERENCE, "held_out")
    found = [
        Line(
            kind,
            runs[f"{kind} {task} {seeds[0]}"].get("bytes"),
            of(kind, "held_out"),
            statistics.fmean(of(kind, "train")),
            [a - b for a, b in zip(of(kind, "held_out"), reference, strict=True)],
        )
        for kind in kinds
    ]
    return found, statistics.stdev(reference)


def report(document: dict[str, Any]) -> str:
    """The markdown file."""
    settings = document["settings"]
    out = [
        "# Convergence with low-bit state",
        "",
        f"`{document['command']}`: AdamW, {settings['steps']} steps, {len(settings['seeds'])} seeds; one seed fixes",
        "the initial weights and all batches, so runs of a seed differ in the storage format alone. A format is within",
        "the seed noise if its mean difference from fp32 is no larger, either way, than the standard deviation of fp32",
        "over the seeds.",
        "",
        f"torch {settings['torch']}, {settings['machine']}. Options: "
        + ", ".join(f"{name} {value}" for name, value in settings["options"].items())
        + "; warm-up over a tenth, then cosine.",
    ]
    for task, about in settings["tasks"].items():
        found, noise = lines(document, task)
        out += [
            "",
            f"## {task}",
            "",
            f"{about['data']}; rate {about['lr']:g}. Standard deviation of fp32's final loss over the seeds:",
            f"{noise:.4f}.",
            "",
            HEAD,
            "|---|---|---|---|---|---|---|",
        ]
        for line in found:
            size = "" if line.bytes is None else f"{line.bytes:.2f}"
            losses = ", ".join(f"{loss:.4f}" for loss in line.losses)
            verdict = "" if line.kind == REFERENCE else "yes" if abs(line.mean) <= noise else "no"
            share = "" if line.kind == REFERENCE else f"{abs(line.mean) / noise:.2f}"
            out.append(
                f"| `{line.kind}` | {size} | {losses} | {line.train:.4f} | {line.mean:+.4f} | {share} | {verdict} |"
            )
    return "\n".join([*out, ""])


def plot(document: dict[str, Any]) -> str:
    """The picture as SVG text: each run's difference from the fp32 run of its seed; the band is the seed noise."""
    body: list[str] = []
    top = TOP
    for task in document["settings"]["tasks"]:
        found, noise = lines(document, task)
        shown = [line for line in found if line.kind != REFERENCE]
        reach = 1.15 * max(noise, *(abs(d) for line in shown for d in line.differences))
        body += panel(task, shown, noise, reach, top)
        top += ROW * len(shown) + GAP
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - GAP + 30}">',
        "<style>text {font: 12px sans-serif}</style>",
        f'<rect width="{WIDTH}" height="{top - GAP + 30}" fill="white"/>',
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def panel(task: str, shown: list[Line], noise: float, reach: float, top: int) -> list[str]:
    """One task: a row for each format, a dot for each seed, a bar at their mean."""

    def across(value: float) -> float:
        return round(LEFT + (value + reach) / (2 * reach) * (WIDTH - LEFT - 20), 1)

    bottom, wide = top + ROW * len(shown), across(noise) - across(-noise)
    out = [
        f'<text x="{LEFT}" y="{top - 10}">{task}: final loss less fp32\'s of the same seed; band: its deviation</text>',
        f'<rect x="{across(-noise)}" y="{top}" width="{wide:.1f}" height="{bottom - top}" fill="#dce9f5"/>',
        f'<line x1="{across(0)}" y1="{top}" x2="{across(0)}" y2="{bottom}" stroke="#555"/>',
    ]
    out += [
        f'<text x="{across(value)}" y="{bottom + 15}" text-anchor="middle">{value:+.4f}</text>'
        for value in (-noise, noise)
    ]
    for i, line in enumerate(shown):
        y = top + ROW * i + ROW / 2
        out.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{line.kind}</text>')
        out += [f'<circle cx="{across(d)}" cy="{y}" r="3.5" fill="#1f77b4"/>' for d in line.differences]
        x = across(line.mean)
        out.append(f'<line x1="{x}" y1="{y - 8}" x2="{x}" y2="{y + 8}" stroke="#d62728" stroke-width="2"/>')
    return out
