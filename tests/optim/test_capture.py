"""Steps in CUDA graphs, on a GPU; without one they are proved by ``tests/kernels/interpreted_capture.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optwatch import optim

CASES: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.AdamW, {"state": "int8", "max_grad_norm": 1.0, "nonfinite": "skip"}),
    (optim.LAMB, {"state": "bf16", "weights": "split8"}),
    (optim.SGD, {"state": "int4", "momentum": 0.9}),
    (optim.Lion, {"state": "fp32", "nonfinite": "zero"}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_replays_train_as_steps_do(kind: Any, options: dict[str, Any]) -> None:
    """As torch's documentation captures a whole training step: warm up beside, capture, replay with new inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8)).cuda().bfloat16()
    twin = copy.deepcopy(model)
    lr = torch.tensor(1e-2, device="cuda")
    ours = kind(model.parameters(), lr=lr, capturable=True, **options)
    plain = kind(twin.parameters(), lr=1e-2, **options)
    batches = [torch.randn(32, 64, device="cuda", dtype=torch.bfloat16) for _ in range(10)]
    batches[5][0, 0] = float("nan") if options.get("nonfinite") == "skip" else 0.0
    batch = batches[0].clone()

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        net(inputs).float().square().mean().backward()
        optimizer.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for inputs in batches[:3]:
            batch.copy_(inputs)
            step(model, ours, batch)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, ours, batch)
    for inputs in batches[3:]:
        batch.copy_(inputs)
        lr.mul_(0.9)
        graph.replay()
    for number, inputs in enumerate(batches):
        if number >= 3:
            plain.param_groups[0]["lr"] = float(torch.tensor(plain.param_groups[0]["lr"]) * 0.9)
        step(twin, plain, inputs)
    saved, expected = ours.state_dict()["state"], plain.state_dict()["state"]
    assert {i: float(s["step"]) for i, s in saved.items()} == {
        i: float(s["step"]) for i, s in expected.items()
    }
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-3)
