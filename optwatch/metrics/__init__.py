"""Floor 0: the catalogue of metrics and the fields they are summed from; no torch, no exporter."""
