"""transformers: Adafactor, whose second moment is kept as rows and columns except for vectors."""

from __future__ import annotations

from optwatch.hooks.adapters.base import Named

TRANSFORMERS = Named("transformers", {})
