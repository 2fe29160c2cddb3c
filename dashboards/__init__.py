"""Grafana dashboards as code, made from the catalogue; needs grafana-foundation-sdk (Python 3.11 or newer)."""
