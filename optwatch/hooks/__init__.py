"""Watching a training loop from inside: probes, the board they feed, and the agent's start."""

from __future__ import annotations

from optwatch.hooks.session import Watch
from optwatch.hooks.watch import watch

__all__ = ["Watch", "watch"]
