"""Whether training with low-bit state ends where training with fp32 state ends: a small GPT and a small ViT.

    python -m benchmarks.convergence [--results DIRECTORY] [--again FORMAT ...]

AdamW with its state in every format, and torch.optim.AdamW, over three seeds. A seed fixes the initial weights and all
batches, so that runs of one seed differ in nothing but the state. The rule for "within the seed noise": over the seeds,
the mean difference of the final loss from fp32's is no larger, either way, than the standard deviation of fp32's own
final loss. Loss is that on data held out; see benchmarks/convergence_tasks.py for the tasks.

One thread, about half an hour. Each run is kept in convergence.json as it ends, and a later call goes on from there;
``--again`` repeats the runs of a format. Writes convergence.json, convergence.md and convergence.svg.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence_report import plot, report
from benchmarks.convergence_tasks import TASKS, Task, schedule
from optwatch.codecs import FORMATS
from optwatch.optim import AdamW, Optimizer

RESULTS = Path(__file__).parent / "results"
TORCH = "torch.optim.AdamW"
SEEDS, STEPS, LAST = (0, 1, 2), 500, 50
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def settings(tasks: dict[str, Task], steps: int) -> dict[str, Any]:
    """What a result depends on; runs under other settings are not continued."""
    return {
        "steps": steps,
        "seeds": list(SEEDS),
        "last": LAST,
        "options": {
            name: list(value) if isinstance(value, tuple) else value for name, value in OPTIONS.items()
        },
        "tasks": {name: {"data": task.data, "lr": task.rate} for name, task in tasks.items()},
        "torch": torch.__version__,
        "machine": f"Python {platform.python_version()}, {platform.machine()} CPU, one thread",
    }


def train(task: Task, kind: str, seed: int, steps: int) -> dict[str, float]:
    """One run: the loss on held-out data, the mean loss of the last batches, bytes of state for each parameter."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer: torch.optim.Optimizer
    if kind == TORCH:
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, **OPTIONS)
    else:
        optimizer = AdamW(model.parameters(), lr=task.rate, state=kind, seed=seed, **OPTIONS)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = task.rate * schedule(step, steps)
        optimizer.zero_grad()
        loss = task.train(model, seed, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = task.held_out(model)
    last = losses[-LAST:]
    found = {"held_out": held_out, "train": sum(last) / len(last)}
    if isinstance(optimizer, Optimizer):
        found["bytes"] = sum(optimizer.state_bytes().values()) / sum(p.numel() for p in model.parameters())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the files go")
    parser.add_argument("--again", nargs="*", default=[], choices=[TORCH, *FORMATS], metavar="FORMAT")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try the benchmark")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*slow reference backend")
    tasks = {name: make() for name, make in TASKS.items()}
    file = given.results / "convergence.json"
    wanted = settings(tasks, given.steps)
    document = json.loads(file.read_text()) if file.exists() else {}
    if document.get("settings") != wanted:
        document = {"command": "python -m benchmarks.convergence", "settings": wanted, "runs": {}}
    runs = {key: run for key, run in document["runs"].items() if key.partition(" ")[0] not in given.again}
    document["runs"] = runs
    given.results.mkdir(parents=True, exist_ok=True)
    for kind, seed, name in product([TORCH, *FORMATS], SEEDS, tasks):
        key = f"{kind} {name} {seed}"
        if key in runs:
            continue
        start = time.process_time()
        runs[key] = train(tasks[name], kind, seed, given.steps)
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(
            f"{key:30} {runs[key]['held_out']:.4f} {time.process_time() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    (given.results / "convergence.md").write_text(report(document))
    (given.results / "convergence.svg").write_text(plot(document))


if __name__ == "__main__":
    main()
