"""Floor 5: the agent, one process per node and user, which reads all boards and serves one address.

Importing it loads neither torch nor an exporter: `serve` is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optwatch.agent.settings import Settings

if TYPE_CHECKING:
    from optwatch.agent.service import serve as serve

__all__ = ["Settings", "serve"]


def __getattr__(name: str) -> Any:
    """Load ``serve`` on first use."""
    if name != "serve":
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}"
        )
    from optwatch.agent.service import serve  # noqa: PLC0415 - the point of this function

    return serve
