"""What runs beside optwatch: configuration for Prometheus, made from the catalogue."""
