"""Low-bit optimizers that measure their own quantisation error, and the monitor that shows it.

Names are loaded on first use: the agent, which is a separate process on every node, imports this package
without paying for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optwatch import optim as optim
    from optwatch.hooks import Watch as Watch
    from optwatch.hooks import watch as watch

__version__ = "0.1.0"
__all__ = ["Watch", "__version__", "optim", "watch"]

_EXPORTS = {"Watch": "optwatch.hooks", "optim": "optwatch.optim", "watch": "optwatch.hooks"}


def __getattr__(name: str) -> Any:
    """Load an exported name from the floor that owns it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'optwatch' has no attribute {name!r}; it exports {', '.join(__all__)}")
    module = importlib.import_module(_EXPORTS[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the exported names, loaded or not."""
    return sorted(__all__)
