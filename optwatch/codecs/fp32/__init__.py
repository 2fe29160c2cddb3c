"""Plain fp32: the exact state."""
