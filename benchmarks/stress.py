"""What storage formats do to AdamW's update under gradients that are hard on them, and the peers' optimizers beside.

    python -m benchmarks.stress [--results DIRECTORY]

Every format of this package, and every optimizer of bitsandbytes, torchao and pytorch_optimizer that is installed,
runs on the same gradients as torch.optim.AdamW (the scenarios of tests/scenarios.py). A cell says how the updates of
the last thirty steps compare with the exact ones: RMS / largest element / normalised RMS error; 1 / 1 / 0 is perfect.
One thread, some minutes. Writes stress.md, stress.json and stress.svg.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.stress_plot import plot
from optwatch.codecs import FORMATS
from optwatch.optim import AdamW
from tests.scenarios import BETA1, BETA2, ELEMENTS, EPS, SCENARIOS, compare, drift

RESULTS = Path(__file__).parent / "results"
OPTIONS: dict[str, Any] = {"lr": 1.0, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": 0.0}
SPREADS = (0.0, 1.5, 3.0)  # of the gradients whose average the second table follows
Make = Callable[[Tensor], torch.optim.Optimizer]


class Entry(NamedTuple):
    """A line of the table."""

    label: str
    make: Make
    own: bool


def own_entries() -> Iterator[Entry]:
    """Every format, on the CPU kernels, as a training run has it."""
    for name in FORMATS:

        def make(param: Tensor, name: str = name) -> torch.optim.Optimizer:
            return AdamW([param], state=name, backend="cpu", **OPTIONS)

        yield Entry(name, make, own=True)


def peer_entries() -> Iterator[Entry]:
    """The optimizers of installed peers."""
    for module, name in (
        ("torchao", "AdamW8bit"),
        ("torchao", "AdamWFp8"),
        ("torchao", "AdamW4bit"),
        ("bitsandbytes", "AdamW8bit"),
        ("pytorch_optimizer", "FlashAdamW"),
    ):
        try:
            kind = getattr(
                importlib.import_module(f"{module}.optim" if module == "torchao" else module), name
            )
        except (ImportError, AttributeError):
            try:
                kind = getattr(importlib.import_module(f"{module}.optim"), name)
            except (ImportError, AttributeError) as error:
                print(f"not compared: {module} {name}: {error}", file=sys.stderr)
                continue
        version = importlib.metadata.version(module)
        yield Entry(
            f"{module} {version} {name}", lambda param, kind=kind: kind([param], **OPTIONS), own=False
        )


def state_bytes(make: Make) -> float:
    """Bytes of state an element, counted over every tensor inside; the step count is left out."""
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = make(param)
    param.grad = torch.full_like(param, 1e-4)
    optimizer.step()
    seen: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                count(inner)
        elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            # A map that all tensors share is no state of one of them.
            for name in value.__tensor_flatten__()[0]:
                if name != "qmap":
                    count(getattr(value, name))
        elif isinstance(value, Tensor) and value.numel() not in {1, 256}:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()

    count(dict(optimizer.state[param]))
    return sum(seen.values()) / ELEMENTS


def measure(entry: Entry) -> dict[str, Any]:
    """One line: bytes, the comparison for each scenario, the drift of own formats."""
    line: dict[str, Any] = {"label": entry.label, "own": entry.own, "bytes": state_bytes(entry.make)}
    line["scenarios"] = {name: compare(entry.make, scenario) for name, scenario in SCENARIOS.items()}
    line["drift"] = [drift(entry.make, spread) for spread in SPREADS] if entry.own else None
    print(f"{entry.label:45}", *(cell(c) for c in line["scenarios"].values()), flush=True)
    return line


def cell(values: tuple[float, ...]) -> str:
    """Three figures."""
    return "/".join(f"{value:.2g}" for value in values[:2]) + f"/{values[2]:.3g}"


def table(lines: list[dict[str, Any]], machine: str) -> str:
    """The markdown file."""
    out = [
        "# Storage formats under hard gradients",
        "",
        "`python -m benchmarks.stress`: the update of AdamW with its state in a storage format, relative to the exact",
        "one. RMS / largest element / normalised RMS error; 1 / 1 / 0 is perfect. Bytes are those of both moments.",
        "",
        machine,
        "",
        "| | bytes a parameter | " + " | ".join(name.replace("_", " ") for name in SCENARIOS) + " |",
        "|---" * (len(SCENARIOS) + 2) + "|",
    ]
    for line in lines:
        label = f"`{line['label']}`" if line["own"] else line["label"]
        cells = " | ".join(cell(tuple(line["scenarios"][name])) for name in SCENARIOS)
        out.append(f"| {label} | {line['bytes']:.4g} | {cells} |")
    out += [
        "",
        "Mean of stored over exact / of exact over stored second moment after 4,000 steps of gradients of 1e-6 whose",
        "sizes are spread log-normally. The first is 1 where the average is unbiased, the second where the mean square",
        "of the update is.",
        "",
        "| | " + " | ".join(f"spread {spread:g}" for spread in SPREADS) + " |",
        "|---" * (len(SPREADS) + 1) + "|",
    ]
    for line in lines:
        if line["drift"]:
            pairs = " | ".join("{:.3f} / {:.3f}".format(*pair) for pair in line["drift"])
            out.append(f"| `{line['label']}` | {pairs} |")
    return "\n".join([*out, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the files go")
    directory = parser.parse_args().results
    torch.set_num_threads(1)
    torch.compiler.set_stance(
        "force_eager"
    )  # torchao compiles its step, which takes longer than it saves here
    lines = [measure(entry) for entries in (own_entries(), peer_entries()) for entry in entries]
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()} CPU, one thread."
    machine += " The lines of this package's formats are of its CPU kernels."
    directory.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "lines": lines}
    (directory / "stress.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "stress.md").write_text(table(lines, machine))
    (directory / "stress.svg").write_text(plot(result))


if __name__ == "__main__":
    main()
