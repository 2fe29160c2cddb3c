"""What a step does besides its own work, counted and not timed: operations, new memory, and the host waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What on a GPU makes the host wait for a number.
READS = {"item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__"}


class Scene(Protocol):
    """Something that is trained."""

    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        """One step."""


class _Operations(TorchDispatchMode):
    """Counts operations, collectives among them, and the bytes of storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = self.new_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.collectives += func.namespace in ("c10d", "_c10d_functional")
        known = {storage for value in tree_leaves((args, kwargs)) if (storage := _storage(value))}
        made = {storage for value in tree_leaves(result) if (storage := _storage(value))} - known
        self.new_bytes += sum(size for _, size in made)
        return result


def _storage(value: object) -> tuple[int, int] | None:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return None
    storage = value.untyped_storage()  # type: ignore[attr-defined] # it is a tensor
    return storage.data_ptr(), storage.nbytes()


class _Reads(TorchFunctionMode):
    """Counts numbers that the host takes out of tensors, but for an optimizer's counter of steps, which lies there."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.reads = 0
        steps = (state.get("step") for state in optimizer.state.values() if isinstance(state, dict))
        self._steps = {step.data_ptr() for step in steps if isinstance(step, torch.Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], torch.Tensor) and args[0].data_ptr() not in self._steps:
            self.reads += 1
        return func(*args, **(kwargs or {}))


def counted(
    scene: Scene, watching: Callable[[], contextlib.AbstractContextManager[None]], step: int
) -> dict[str, int]:
    """What the ``step``-th watched step does more than an unwatched one."""
    with watching():
        for _ in range(step - 1):
            scene.step()
        watched = _one(scene)
    plain = _one(scene)
    return {name: watched[name] - plain[name] for name in watched}


def _one(scene: Scene) -> dict[str, int]:
    with _counting(scene.optimizer) as (operations, reads):
        scene.step()
    return {
        "operations": operations.operations,
        "collectives": operations.collectives,
        "new_bytes": operations.new_bytes,
        "reads": reads.reads,
    }


@contextlib.contextmanager
def _counting(optimizer: torch.optim.Optimizer) -> Iterator[tuple[_Operations, _Reads]]:
    with _Operations() as operations, _Reads(optimizer) as reads:
        yield operations, reads
