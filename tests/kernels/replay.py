"""What a CUDA graph does, on CPU tensors: it records the work of a step and does it again without any Python of ours.

Recorded are torch's operations, below Python, and the launches of Triton's kernels, each with the very tensors that it
was given. Nothing is done then, except that results get their place. A replay does it all in order and writes the
results to these places. Everything that Python computed in between is frozen, as are addresses. What a graph could not
hold is an error: reading a number on the host, and memory from outside that nobody keeps once the capture is over.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from triton.runtime.interpreter import InterpretedFunction

from optwatch.kernels import capture

Work = Callable[[], object]
READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")


class _Outside:
    """A tensor from before the capture, or one that Python made in it; held no longer than its owner does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.form = tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, (
            "the graph would read memory that nobody keeps: made on the host in the capture"
        )
        dtype, *form = self.form
        return torch.empty(0, dtype=dtype).set_(storage, *form)


class _Recorder(TorchDispatchMode):
    """Notes every operation, with tensors of its own as they are and others weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, list[Any], Any, list[torch.Tensor]]] = []
        self.own: dict[int, torch.UntypedStorage] = {}  # made by recorded operations

    def note(self, function: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        flat, form = tree_flatten((args, kwargs))
        self.steps.append((function, [self._weakly(one) for one in flat], form, results))

    def _weakly(self, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        known = self.own.get(storage._cdata)
        return value if known is not None else _Outside(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            raise AssertionError(f"the graph would wait for the device: {name}")
        inputs = {
            t.untyped_storage()._cdata
            for t in tree_flatten((args, kwargs or {}))[0]
            if isinstance(t, torch.Tensor)
        }
        if func._schema.is_mutable:
            self.note(func, args, kwargs or {}, [])
            return args[0] if func._schema.returns else None
        made = func(*args, **(kwargs or {}))
        results = [t for t in tree_flatten(made)[0] if isinstance(t, torch.Tensor)]
        fresh = [t for t in results if t.untyped_storage()._cdata not in inputs]
        if fresh:  # and no view
            self.note(func, args, kwargs or {}, fresh)
        for tensor in fresh:
            self.own[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return made


class Graph:
    """A step that was recorded."""

    def __init__(self, recorder: _Recorder) -> None:
        self._kept = recorder.own
        self._work: list[Work] = []
        for function, flat, form, results in recorder.steps:
            args, kwargs = tree_unflatten(
                [one.tensor() if isinstance(one, _Outside) else one for one in flat], form
            )
            self._work.append(_again(function, args, kwargs, results))

    @torch.no_grad()
    def replay(self) -> None:
        for work in self._work:
            work()


def _again(function: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> Work:
    def work() -> None:
        made = function(*args, **kwargs)
        if results and not function._schema.name.startswith("aten::empty"):
            for old, new in zip(results, tree_flatten(made)[0], strict=True):
                old.copy_(new)

    return work


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Graph]]:
    """Record what is done inside; the function that it gives makes the graph afterwards."""
    recorder = _Recorder()
    launch = InterpretedFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        with _disable_current_modes():
            recorder.note(lambda *a, **k: launch(kernel, *a, **k), args, options, [])

    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        patch.setattr(capture, "capturing", lambda device: True)
        with recorder:
            yield lambda: _made(recorder)


def _made(recorder: _Recorder) -> Graph:
    gc.collect()
    return Graph(recorder)
