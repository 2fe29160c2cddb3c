"""A step needs no temporary of a parameter's size; what it keeps is to the byte what was predicted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from optwatch import optim
from optwatch.codecs import FORMATS
from optwatch.kernels import reference
from tests.optim.training import FORMATS_ON_BACKENDS, parameters, train

ELEMENTS = 1 << 22
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KINDS = [getattr(optim, name) for name in optim.__all__ if name[0].isupper()]
KINDS = [kind for kind in KINDS if issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer]


def resident(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize(("state", "backend"), FORMATS_ON_BACKENDS)
def test_a_step_needs_no_temporary_of_a_parameters_size(
    state: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest resident memory in a step with full statistics, over that before it: half a tensor of 16 MiB.

    The reference works in chunks of a constant length, here of one that is small beside this parameter.
    """
    monkeypatch.setattr(reference, "CHUNK", 1 << 16)
    if not RESET.exists():
        pytest.skip("platform: the peak of resident memory is Linux's")
    param = nn.Parameter(torch.randn(ELEMENTS))
    optimizer = optim.AdamW([param], state=state, backend=backend)
    optimizer.subscribe(lambda _: None)
    param.grad = torch.randn(ELEMENTS)
    optimizer.step()
    RESET.write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    optimizer.step()
    assert resident("VmHWM") - before < ELEMENTS * 4 // 2


@pytest.mark.gpu
@pytest.mark.parametrize("state", FORMATS)
def test_a_step_on_a_gpu_needs_none_either(state: str) -> None:
    """By torch's allocator: a step with full statistics, clipping and skipping takes a hundredth of the parameter."""
    param = nn.Parameter(torch.randn(ELEMENTS, device="cuda"))
    optimizer = optim.AdamW([param], state=state, max_grad_norm=1.0, nonfinite="skip")
    optimizer.subscribe(lambda _: None)
    param.grad = torch.randn_like(param)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < ELEMENTS * 4 // 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_predicted_bytes_are_the_actual_ones(
    kind: type[optim.Optimizer], state: str, dtype: torch.dtype
) -> None:
    """Every optimizer, format and memory layout; before the first step both are nothing."""
    params = parameters(dtype)
    options = {"momentum": 0.9} if kind in (optim.SGD, optim.RMSprop) else {}
    optimizer = kind(params, state=state, **options)
    assert optimizer.state_bytes() == optimizer.expected_state_bytes() == {}
    train(optimizer, params, range(1))
    assert optimizer.state_bytes() == optimizer.expected_state_bytes()
    assert sum(optimizer.state_bytes().values()) > 0
