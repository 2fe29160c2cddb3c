"""Floor 5: exporters show what the agent knows; each walks the catalogue and is one file.

`optwatch.exporters.base` is what they share; import the exporter you want from its own module, since each brings
its own dependency.
"""

from optwatch.exporters.base import Exporter, HistogramValue, Point, Snapshot

__all__ = ["Exporter", "HistogramValue", "Point", "Snapshot"]
