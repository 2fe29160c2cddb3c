"""Write what the overlay takes from elsewhere: ``python -m deploy.kubernetes.generate PATH [RUNBOOKS]``.

The name of the file chooses: prometheusrule or dashboards. RUNBOOKS is the address below which docs/runbooks are found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from deploy.prometheus import rules

ROOT = Path(__file__).parents[2]
HEAD = "# Made by `make generate`; do not edit.\n"


def prometheusrule(runbooks: str = rules.RUNBOOKS) -> list[dict[str, Any]]:
    """The rule file as a PrometheusRule."""
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "optwatch"},
            "spec": yaml.safe_load(rules.generate(runbooks)),
        }
    ]


def dashboards() -> list[dict[str, Any]]:
    """A ConfigMap for each dashboard, with the label that Grafana's sidecar looks for."""
    paths = sorted((ROOT / "optwatch" / "dashboards").glob("*.json"))
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"optwatch-dashboard-{path.stem}", "labels": {"grafana_dashboard": "1"}},
            # Without spaces: a ConfigMap holds a megabyte, and `kubectl apply` a quarter of that.
            "data": {
                path.name: json.dumps(
                    json.loads(path.read_bytes()), separators=(",", ":"), ensure_ascii=False
                )
            },
        }
        for path in paths
    ]


def main() -> None:
    """Write the file that the path names."""
    path = Path(sys.argv[1])
    documents = prometheusrule(*sys.argv[2:]) if path.stem == "prometheusrule" else dashboards()
    text = yaml.safe_dump_all(documents, sort_keys=False, width=1 << 20, allow_unicode=True)
    path.write_text(HEAD + text, encoding="utf-8")


if __name__ == "__main__":
    main()
