"""Manifests for Kubernetes, some of them generated."""
