"""The host's side of a Triton step, on a stand-in for the CUDA driver: it compiles for sm_90 and records launches."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from optwatch.codecs import FORMATS
from optwatch.kernels import PlanSpec, PlanTensor
from optwatch.kernels.triton.driver import TritonPlan
from optwatch.kernels.triton.passes import gradients
from optwatch.kernels.triton.step import fold, step
from optwatch.rules import RULES

CPU = torch.device("cpu")
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)


class Recorder(DriverBase):
    """As much of a driver as launching needs; ``launches`` holds (kernel, grid)."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        self.utils = self
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def get_benchmarker(self) -> None:
        return None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return (1, 2, 100, 0) if OLD else (1, 2, 100, 0, 1024)

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *args: Any, **options: Any) -> None:
            self.launches.append((source.fn.__name__, (x, y, z)))

        return launch


@pytest.fixture
def launches() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    recorder, before = Recorder(), dict(vars(driver))
    driver.set_active(recorder)
    yield recorder.launches
    for kernel in (step, fold, gradients):
        kernel.device_caches.clear()
    gc.collect()  # compiled kernels unload themselves from the driver that is active when they go
    vars(driver).update(before)  # reset_active() would look for a real one


def plan_of(sizes: list[int], name: str = "adamw") -> tuple[TritonPlan, PlanSpec]:
    rule = RULES[name]
    codecs = tuple(FORMATS["int8"][slot.kind] for slot in rule.slots)
    spec = PlanSpec(rule, codecs, torch.float32, torch.float32)
    tensors = [PlanTensor(torch.zeros(n), tuple(codec.allocate(n, CPU) for codec in codecs)) for n in sizes]
    return TritonPlan(spec, tensors), spec


def run(plan: TritonPlan, sizes: list[int], lr: float, full: bool = False) -> None:
    rule, n = plan.spec.rule, len(sizes)
    scalars = np.full((n, len(rule.scalars)), lr, np.float32)
    plan.run([torch.ones(n) for n in sizes], scalars, np.zeros((n, len(rule.slots) + 1, 2), np.uint32), full)


@pytest.mark.parametrize(
    ("rule", "sizes"), [("adamw", [5000]), ("adamw", [5000] * 300), ("sgd", [5000, 5000])]
)
def test_two_launches_a_step(
    launches: list[tuple[str, tuple[int, ...]]], rule: str, sizes: list[int]
) -> None:
    """One launch for the step and one for the fold, however many tensors; three fields in each step, all in some."""
    plan, spec = plan_of(sizes, rule)
    run(plan, sizes, 1e-3)
    run(plan, sizes, 1e-3, full=True)
    assert launches == [
        ("step", (len(sizes), 1, 1)),
        ("fold", (len(sizes), 3, 1)),
        ("step", (len(sizes), 1, 1)),
        ("fold", (len(sizes), spec.columns, 1)),
    ]


def test_nothing_recompiles(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    """Neither other hyperparameters nor other numbers of tensors and elements make another kernel."""
    for sizes, lr in (([5000], 1e-3), ([5000], 0.0), ([1 << 20, 17, 100], 1.0), ([16] * 16, -2.0)):
        plan, _ = plan_of(sizes)
        run(plan, sizes, lr)
    (caches,) = step.device_caches.values()
    assert len(caches[0]) == 1
    assert len(launches) == 8


def test_a_decided_step(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    """A pass over the gradients and its fold come first; more steps under way make no other kernel."""
    sizes = [5000, 20_000]
    plan, spec = plan_of(sizes)
    grads = [torch.ones(n) for n in sizes]
    for under_way in (1, 3, 1):
        plan.sum_gradients(grads)
        scalars = np.zeros((under_way, 2, len(spec.rule.scalars)), np.float32)
        numbers = np.zeros((under_way, 2, 3, 2), np.uint32)
        plan.run_decided(grads, scalars, numbers, False, False, torch.zeros(5, dtype=torch.float64), True)
    assert (
        launches
        == [("gradients", (3, 1, 1)), ("fold", (2, 3, 1)), ("step", (3, 1, 1)), ("fold", (2, 3, 1))] * 3
    )
    (caches,) = step.device_caches.values()
    assert len(caches[0]) == 1


def test_nothing_to_do(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    """Tensors without elements launch nothing."""
    plan, _ = plan_of([0, 0])
    run(plan, [0, 0], 1e-3)
    assert not launches


def test_what_a_step_sends() -> None:
    """Addresses, 0 where there is no gradient, skipped steps, scalars and keys, each where the kernel reads it."""
    plan, _ = plan_of([100, 200])
    grad = torch.ones(200)
    scalars = np.arange(16, dtype=np.float32).reshape(2, 8)
    keys = np.arange(12, dtype=np.uint32).reshape(2, 3, 2) + 0xFFFFFF00
    known = np.array([3, 5], np.int32)
    addresses, sent_known, sent_scalars, sent_keys = plan.inputs.copy([None, grad], scalars, keys, known)
    assert sent_known.tolist() == [3, 5]
    assert addresses.tolist() == [0, grad.data_ptr()]
    assert np.array_equal(sent_scalars.numpy(), scalars.ravel())
    assert np.array_equal(sent_keys.numpy(), keys.ravel())


def test_items_cover_each_tensor_once() -> None:
    """The items of a tensor follow each other, and tensors without elements have none."""
    plan, _ = plan_of([0, 1, 16384, 0, 16385])
    assert plan.items.tolist() == [[1, 0], [2, 0], [4, 0], [4, 1]]
    assert plan.starts.tolist() == [0, 0, 1, 2, 2, 4]
