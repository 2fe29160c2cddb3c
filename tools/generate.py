"""Write every generated file, or with ``--check`` say which ones are out of date.

Each file has a module that writes it: ``python -m MODULE PATH``. Run through ``make generate`` and ``make lint``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: generated file, and the module that writes it to the path given
GENERATED = {
    "docs/metrics.md": "optwatch.metrics.docs",
    "optwatch/dashboards/optimizer.json": "dashboards.build",
    "optwatch/dashboards/memory.json": "dashboards.build",
    "optwatch/dashboards/fleet.json": "dashboards.build",
    "optwatch/dashboards/monitor.json": "dashboards.build",
    "deploy/prometheus/optwatch.rules.yml": "deploy.prometheus.rules",
    "deploy/kubernetes/overlays/prometheus-operator/prometheusrule.yaml": "deploy.kubernetes.generate",
    "deploy/kubernetes/overlays/prometheus-operator/dashboards.yaml": "deploy.kubernetes.generate",
}


def write(module: str, path: Path) -> None:
    """Let ``module`` write ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", module, str(path)], check=True, cwd=ROOT)


def outdated() -> list[str]:
    """The generated files that differ from what their module writes now."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for name, module in GENERATED.items():
            fresh = Path(directory, name)
            write(module, fresh)
            if not (ROOT / name).exists() or fresh.read_bytes() != (ROOT / name).read_bytes():
                found.append(name)
    return found


def main() -> int:
    """Write or check; the exit code is 1 when a file is out of date."""
    if sys.argv[1:] == ["--check"]:
        names = outdated()
        for name in names:
            sys.stderr.write(f"{name} is out of date: run `make generate` and commit it\n")
        return 1 if names else 0
    for name, module in GENERATED.items():
        write(module, ROOT / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
