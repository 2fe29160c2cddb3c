"""State that is put into ``optimizer.state`` from outside is what the next step uses."""

from __future__ import annotations

import pytest
import torch

from optwatch.optim import AdamW


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("whole", [True, False], ids=["a new dict", "new tensors in the same dict"])
def test_replaced_state_is_used(whole: bool, backend: str | None) -> None:
    """Stock PyTorch's loaders replace the dict of a parameter, people replace tensors in it: neither is ignored."""
    param = torch.nn.Parameter(torch.randn(3000, generator=torch.Generator().manual_seed(0)))
    optimizer = AdamW([param], state="int8", backend=backend)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    resumed = {"step": optimizer.state[param]["step"].clone(), **optimizer.dequantized_state(param)}
    if whole:
        optimizer.state[param] = resumed
    else:
        optimizer.state[param].clear()
        optimizer.state[param].update(resumed)
    before = optimizer.dequantized_state(param)
    param.grad = torch.ones_like(param)
    optimizer.step()
    after = optimizer.dequantized_state(param)
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"] * 0.9 + 0.1)
    assert float(optimizer.state[param]["step"]) == 3
    sizes = {kind.slot: size for kind, size in optimizer.state_bytes().items()}
    assert sizes["exp_avg"] == sizes["exp_avg_sq"] == 4 * 3000


def test_deleted_state_begins_anew() -> None:
    """A parameter whose state was deleted starts from nothing, as in torch.optim."""
    params = [torch.nn.Parameter(torch.ones(500)) for _ in range(2)]
    optimizer = AdamW(params, state="int8")
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    del optimizer.state[params[0]]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [1.0, 3.0]
