"""Run by Python at its start under ``optwatch run``: waits for torch.optim, then goes out of the way.

Imports nothing that a start of Python has not imported already. The user's own ``sitecustomize`` runs as it would
without this one, and so does every process that is started from here. A process that takes no optimizer step notices
nothing at all.
"""

from __future__ import annotations

import importlib
import os
import sys

TYPE_CHECKING = False  # typing would have to be imported
if TYPE_CHECKING:
    from typing import Any

_MODULE = "torch.optim.optimizer"


class _Finder:
    """Finds one module like everybody else does, and does something when it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As `importlib.abc.MetaPathFinder` has it."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _after_loading(spec.loader)
                return spec
        return None


def _after_loading(loader: Any) -> None:
    original = loader.exec_module

    def exec_module(module: Any) -> None:
        original(module)
        register = getattr(module, "register_optimizer_step_pre_hook", None)
        if register is not None:
            register(_before_step)

    loader.exec_module = exec_module


def _before_step(optimizer: Any, *_: object) -> None:
    """The hook of every optimizer's step; from the first call on it is optwatch's."""
    global _before
    if _before is None:
        try:
            _before = importlib.import_module("optwatch.integrations.every_optimizer").before_step
        except Exception:  # noqa: BLE001 - another Python, without optwatch: training comes first
            _before = _nothing
    _before(optimizer)


_before_step._torchdynamo_disable = True  # type: ignore[attr-defined]  # noqa: SLF001 - a compiled step just calls it


def _nothing(_: object) -> None:
    """Do nothing."""


_before: Any = None


def _make_room() -> None:
    """Leave ``sys.path``, and run the ``sitecustomize`` that Python would have found there."""
    from importlib.machinery import PathFinder  # noqa: PLC0415
    from importlib.util import module_from_spec  # noqa: PLC0415

    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would have to be imported
    sys.path[:] = [entry for entry in sys.path if not entry or os.path.abspath(entry) != here]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder())
    _make_room()
