"""Sampled blocks: the estimated error of one step and the accumulated one of a shadow, against the whole truth."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
import torchao.optim
from torch import nn

import optwatch
from hooks.boards import published
from optwatch.agent.rows import TableView
from optwatch.optim import SGD, AdamW, Lion

LR, BETAS, EPS, STEPS = 1e-2, (0.9, 0.99), 1e-8, 12
SHAPES = ((512, 512), (400, 510), (100,))
#: The share of blocks that the documentation names: ten blocks of the larger tensor, eight of the other.
SHARE = 0.01
#: The reference can do the format; without a kernel it says once that it is slow.
BACKENDS = {"int4": "reference"}


pytestmark = pytest.mark.usefixtures("eager")


def parameters() -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=gen)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    """Of magnitudes that differ from row to row, as in real models."""
    gen = torch.Generator().manual_seed(100 + step)
    made = [torch.randn(shape, generator=gen) for shape in SHAPES]
    for grad in made:
        grad.mul_(torch.randn(len(grad), generator=gen).mul(0.5).exp().view(-1, *(1,) * (grad.dim() - 1)))
    return made


def steps(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int = STEPS, first: int = 0
) -> None:
    for step in range(first, first + count):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()


def points(directory: Path) -> dict[tuple[str, ...], float]:
    """The newest values of every table, by metric and its labels but the optimizer's."""
    found = published(directory)
    values = {}
    for index, table in enumerate(found.reader.schema.tables):
        view = TableView(table, {"run_id": "r", "rank": "0"})
        for record in found.records:
            if record.tables[index] is not None:
                view.take(record.tables[index])
        for name, point in view.points():
            labels = [v for k, v in point.labels.items() if k not in ("run_id", "rank", "optimizer", "group")]
            values[(name.removeprefix("optwatch."), *labels)] = point.value
    return values


def exact_moments(count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Adam's moments in float64 after ``count`` steps."""
    m = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    v = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for step in range(count):
        for i, grad in enumerate(gradients(step)):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * grad.double()
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * grad.double().square()
    return list(zip(m, v, strict=True))


def adam_update(m: torch.Tensor, v: torch.Tensor, step: int) -> torch.Tensor:
    root = (v.double() / (1 - BETAS[1] ** step)).sqrt() + EPS
    return m.double() / (1 - BETAS[0] ** step) / root * LR


def ratio(errors: list[torch.Tensor], values: list[torch.Tensor]) -> float:
    total = sum(e.square().sum() for e in errors) / sum(x.square().sum() for x in values)
    return float(total.sqrt())


def drift(stored: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """The true accumulated errors of the quantised tensors, the first two."""
    exact = exact_moments()[:2]
    roots = [(a[1].sqrt(), b[1].double().sqrt()) for a, b in zip(exact, stored, strict=True)]
    updates = [(adam_update(*a, STEPS), adam_update(*b, STEPS)) for a, b in zip(exact, stored, strict=True)]
    return {
        "exp_avg": ratio([a[0] - b[0] for a, b in zip(exact, stored, strict=True)], [a[0] for a in exact]),
        "exp_avg_sq": ratio([a - b for a, b in roots], [a for a, _ in roots]),
        "update": ratio([a - b for a, b in updates], [a for a, _ in updates]),
    }


def own_drift(state: str) -> dict[str, float]:
    params = parameters()
    optimizer = AdamW(params, lr=LR, betas=BETAS, eps=EPS, state=state, backend=BACKENDS.get(state))
    steps(optimizer, params)
    return drift([tuple(optimizer.dequantized_state(p).values()) for p in params[:2]])


def foreign_drift(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict[str, float]:
    return drift(decoded(optimizer, params))


def decoded(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for param in params[:2]:
        state = optimizer.state[param]
        if "state1" in state:
            decode = bitsandbytes.functional.dequantize_blockwise
            pair = [
                decode(state[f"state{i}"], absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256)
                for i in (1, 2)
            ]
        else:
            pair = [plain(state[key]) for key in ("exp_avg", "exp_avg_sq")]
        found.append((pair[0], pair[1]))
    return found


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Torchao keeps what is no multiple of its blocks in fp32."""
    return tensor.clone() if type(tensor) is torch.Tensor else tensor.dequantize().clone()


def shown_drift(found: dict[tuple[str, ...], float], name: str) -> dict[str, float]:
    return {
        "exp_avg": found["shadow_moment_error.ratio", name, "exp_avg"],
        "exp_avg_sq": found["shadow_moment_error.ratio", name, "exp_avg_sq"],
        "update": found["shadow_update_error.ratio", name],
    }


def watched(optimizer, params, directory: Path, **options) -> dict[tuple[str, ...], float]:
    with optwatch.watch(optimizer, every=STEPS - 1, directory=directory, agent=False, **options):
        steps(optimizer, params)
        return points(directory)


def test_the_shadow_of_our_own(directory: Path) -> None:
    """One per cent of the blocks tells the accumulated error within 20 %, of another format, too."""
    params = parameters()
    optimizer = AdamW(params, lr=LR, betas=BETAS, eps=EPS, state="int8")
    found = watched(optimizer, params, directory, shadow=SHARE, what_if=["int4"])
    assert shown_drift(found, "int8") == pytest.approx(own_drift("int8"), rel=0.2)
    assert shown_drift(found, "int4") == pytest.approx(own_drift("int4"), rel=0.2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(bitsandbytes.optim.AdamW8bit, "bitsandbytes 8-bit"), (torchao.optim.AdamW4bit, "torchao 4-bit")],
)
def test_the_shadow_of_others(directory: Path, kind, name: str) -> None:
    """The same of bitsandbytes and torchao."""
    params = parameters()
    optimizer = kind(params, lr=LR, betas=BETAS, eps=EPS)
    found = watched(optimizer, params, directory, shadow=SHARE)
    assert shown_drift(found, name) == pytest.approx(foreign_drift(optimizer, params), rel=0.2)


def test_everything_shadowed_is_the_truth(directory: Path) -> None:
    """With all blocks the shadow is no estimate, but for the last, partial blocks."""
    params = parameters()
    optimizer = AdamW(params, lr=LR, betas=BETAS, eps=EPS, state="int8")
    found = watched(optimizer, params, directory, shadow=1)
    assert shown_drift(found, "int8") == pytest.approx(own_drift("int8"), rel=2e-2)


@pytest.mark.parametrize("kind", [bitsandbytes.optim.AdamW8bit, torchao.optim.AdamW8bit])
def test_the_error_of_one_step(directory: Path, kind) -> None:
    """The estimate for a foreign optimizer: the newest step in float64 from the stored state before it."""
    params = parameters()
    optimizer = kind(params, lr=LR, betas=BETAS, eps=EPS)
    with optwatch.watch(optimizer, every=STEPS - 1, directory=directory, agent=False):
        steps(optimizer, params, STEPS - 1)
        before = decoded(optimizer, params)
        steps(optimizer, params, 1, first=STEPS - 1)
        found = points(directory)
    errors: dict[str, list[torch.Tensor]] = {"exp_avg": [], "exp_avg_sq": [], "update": []}
    values: dict[str, list[torch.Tensor]] = {"exp_avg": [], "exp_avg_sq": [], "update": []}
    for old, new, grad in zip(before, decoded(optimizer, params), gradients(STEPS - 1), strict=False):
        m = BETAS[0] * old[0].double() + (1 - BETAS[0]) * grad.double()
        v = BETAS[1] * old[1].double() + (1 - BETAS[1]) * grad.double().square()
        pairs = {
            "exp_avg": (m, new[0].double()),
            "exp_avg_sq": (v.sqrt(), new[1].double().sqrt()),
            "update": (adam_update(m, v, STEPS), adam_update(*new, STEPS)),
        }
        for name, (exact, stored) in pairs.items():
            values[name].append(exact)
            errors[name].append(exact - stored)
    truth = {name: ratio(errors[name], values[name]) for name in errors}
    shown = {
        "exp_avg": found["estimated_quantization_error.ratio", "exp_avg"],
        "exp_avg_sq": found["estimated_quantization_error.ratio", "exp_avg_sq"],
        "update": found[("estimated_update_quantization_error.ratio",)],
    }
    assert shown == pytest.approx(truth, rel=0.2)
    assert not any(
        key[0] in ("quantization_error.ratio", "update.norm", "weights_unchanged.ratio") for key in found
    )


def test_a_shadow_begins_anew_with_a_checkpoint(directory: Path) -> None:
    """Loading one is no error of the format; nor is a step that left a parameter out."""
    params = parameters()
    optimizer = AdamW(params, lr=LR, betas=BETAS, eps=EPS, state="int8")
    with optwatch.watch(optimizer, every=1, directory=directory, agent=False, shadow=0.05):
        steps(optimizer, params, 3)
        saved = optimizer.state_dict()
        usual = points(directory)["shadow_moment_error.ratio", "int8", "exp_avg"]
        steps(optimizer, params, 3, first=50)
        optimizer.load_state_dict(saved)
        steps(optimizer, params, 1, first=3)
        assert points(directory)["shadow_moment_error.ratio", "int8", "exp_avg"] < 2 * usual
        params[0].grad = None
        optimizer.step()
        assert points(directory)["shadow_moment_error.ratio", "int8", "exp_avg"] < 2 * usual


@pytest.mark.parametrize("kind", [AdamW, Lion, SGD, bitsandbytes.optim.Lion8bit, bitsandbytes.optim.SGD8bit])
def test_rules_with_decay_and_signs(directory: Path, kind) -> None:
    """Any rule can be shadowed; nothing of it goes wrong, and errors are those of eight bits."""
    params = parameters()
    own = kind.__module__.startswith("optwatch")
    options = {"state": "int8"} if own else {}
    options |= {"momentum": 0.9} if "SGD" in kind.__name__ else {}
    optimizer = kind(params, lr=LR, weight_decay=0.1, **options)
    with optwatch.watch(
        optimizer, every=2, directory=directory, agent=False, shadow=0.02, what_if="int8_dynamic"
    ):
        steps(optimizer, params, 5)
        found = points(directory)
        assert set(published(directory).counters.values()) >= {0.0}
    moments = [value for key, value in found.items() if key[0] == "shadow_moment_error.ratio"]
    assert len(moments) >= 2
    assert all(0 < value < 0.05 for value in moments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shadow": 1.5}, "shadow=1.5: expected a share of the blocks"),
        ({"shadow": 0.1, "what_if": "int3"}, "unknown state format 'int3'"),
        ({"what_if": "int4"}, "what_if='int4': expected each format once, and a share of blocks for shadow="),
        ({"shadow": 0.1, "what_if": ["int4", "int4"]}, "expected each format once"),
    ],
)
def test_arguments(arguments: dict[str, object], message: str) -> None:
    """Wrong ones are refused at once, by name."""
    with pytest.raises(ValueError, match=message):
        optwatch.watch(AdamW([nn.Parameter(torch.ones(3))]), **arguments)


def test_a_shadow_of_clipped_and_skipped_steps(directory: Path) -> None:
    """It sees the gradients as the step did: its error stays that of eight bits."""
    params = parameters()
    optimizer = AdamW(params, lr=LR, betas=BETAS, eps=EPS, state="int8", max_grad_norm=0.5, nonfinite="skip")
    with optwatch.watch(optimizer, every=1, directory=directory, agent=False, shadow=0.05):
        steps(optimizer, params, 3)
        params[0].grad[0, 0] = float("nan")
        optimizer.step()
        steps(optimizer, params, 3, first=4)
        found = points(directory)
    assert 0 < found["shadow_moment_error.ratio", "int8", "exp_avg"] < 0.03
    assert 0 < found["shadow_update_error.ratio", "int8"] < 0.05
