"""``optwatch demo``: train a small transformer on text that every Python carries, and watch it live."""

from optwatch.cli.demo.run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
