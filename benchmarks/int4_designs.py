"""The designs that the format int4 was chosen from, each with one part changed: their error in every scenario.

    python -m benchmarks.int4_designs

Codecs are functions of flat state here, without packing, so that a design is a line. One thread, two minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from optwatch.codecs.int4.codec import POWERS, THRESHOLDS
from tests.scenarios import BETA1, BETA2, ELEMENTS, EPS, SCENARIOS, Scenario, gradients

Store = Callable[[Tensor], Tensor]  # flat state -> what the next step reads


def powers(
    exponents: Sequence[float] = POWERS, thresholds: Sequence[float] = THRESHOLDS, *, noise: float = 0.0,
    signed: bool = True, in_roots: bool = False,
) -> Store:  # fmt: skip
    """First moments on levels (k / 8)**p; ``noise`` is the width of the stochastic rounding, 1 for all of a gap."""
    top = 8 if signed else 7
    roots = torch.arange(-7, top + 1) / top
    levels = torch.stack([roots.sign() * roots.abs() ** p for p in exponents])

    def store(values: Tensor) -> Tensor:
        x = values.view(-1, 64)
        largest, at = x.abs().max(1, keepdim=True)
        scale = largest.clamp(min=1e-37) * (x.gather(1, at).sign() if signed else 1.0)
        mean = x.abs().mean(1, keepdim=True)
        power = (
            (mean < largest * torch.tensor(thresholds)).sum(1) if thresholds else torch.zeros(len(x)).long()
        )
        table, scaled = levels[power], (x / scale).clamp(-1, 1)
        above = torch.searchsorted(table, scaled, right=True).clamp(1, table.shape[1] - 1)
        low, high = table.gather(1, above - 1), table.gather(1, above)
        part = (scaled - low) / (high - low)
        if in_roots:
            p = torch.tensor(exponents)[power][:, None]
            low_root, high_root, root = (z.sign() * z.abs() ** (1 / p) for z in (low, high, scaled))
            part = (root - low_root) / (high_root - low_root)
        up = part > 0.5 + noise * (torch.rand_like(part) - 0.5)
        return (torch.where(up, high, low) * scale).view(-1)

    return store


def logarithms(deviations: float = 2.0, unbiased: str = "logarithm") -> Store:
    """Second moments on fifteen codes between the block's largest value and the end of its grid."""

    def store(values: Tensor) -> Tensor:
        v = values.view(-1, 256)
        some = v > 0
        octaves = torch.log2(v.clamp(min=1e-37))
        count = some.sum(1, keepdim=True).clamp(min=1)
        mean = (octaves * some).sum(1, keepdim=True) / count
        deviation = (((octaves - mean) ** 2 * some).sum(1, keepdim=True) / count).sqrt()
        high = torch.where(some, octaves, -torch.inf).amax(1, keepdim=True)
        low = (
            torch.where(some, octaves, torch.inf).amin(1, keepdim=True).maximum(mean - deviations * deviation)
        )
        step = ((high - low) / 14).clamp(min=2.0**-10)
        position = ((octaves - low) / step).clamp(0, 14)
        below = position.floor().clamp(max=13)
        part = position - below
        chance = {
            "logarithm": part,
            "value": torch.expm1(part * step * math.log(2)) / torch.expm1(step * math.log(2)),
            "nearest": (part > 0.5).float(),
        }[unbiased]
        up = torch.rand_like(part) < chance
        return torch.where(some, torch.exp2(low + (below + up) * step), 0.0).view(-1)

    return store


def designs() -> Iterator[tuple[str, Store, Store]]:
    """What is changed, and the two codecs."""
    yield "as chosen", powers(), logarithms()
    yield "v unbiased in the value", powers(), logarithms(unbiased="value")
    yield "v rounded to nearest", powers(), logarithms(unbiased="nearest")
    yield "v from smallest to largest", powers(), logarithms(math.inf)
    yield "m: p = 1", powers([1.0], []), logarithms()
    yield "m: p = 2", powers([2.0], []), logarithms()
    yield "m: p = 1.5 or 3", powers([1.5, 3.0], [0.2]), logarithms()
    yield "m: p = 2, 15 codes, scale without sign", powers([2.0], [], signed=False), logarithms()
    yield "m: p = 2, nearest root", powers([2.0], [], in_roots=True), logarithms()
    yield "m rounded stochastically", powers(noise=1.0), logarithms()
    yield "m half stochastically", powers(noise=0.5), logarithms()


def error(first: Store, second: Store, scenario: Scenario) -> float:
    """The normalised RMS error of the last thirty updates."""
    torch.manual_seed(0)
    m, v, exact_m, exact_v = (torch.zeros(ELEMENTS) for _ in range(4))
    errors = []
    for step, grad in enumerate(gradients(scenario), 1):
        m, exact_m = (BETA1 * x + (1 - BETA1) * grad for x in (m, exact_m))
        v, exact_v = (BETA2 * x + (1 - BETA2) * grad * grad for x in (v, exact_v))
        if step > scenario.steps - 30:
            correction = 1 - BETA2**step
            u, exact = (a / ((b / correction).sqrt() + EPS) for a, b in ((m, v), (exact_m, exact_v)))
            errors.append(float((u - exact).norm() / exact.norm()))
        m, v = first(m), second(v)
    return sum(errors) / len(errors)


def main() -> None:
    torch.set_num_threads(1)
    print("| | " + " | ".join(name.replace("_", " ") for name in SCENARIOS) + " |")
    print("|---" * (len(SCENARIOS) + 1) + "|")
    for label, first, second in designs():
        cells = (f"{error(first, second, scenario):.3f}" for scenario in SCENARIOS.values())
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
