"""What is neither parameters, gradients nor state: the panel's queries on given series, through promtool."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from debian import program

if sys.version_info < (3, 11):
    pytest.skip("platform: grafana-foundation-sdk needs Python 3.11", allow_module_level=True)

with warnings.catch_warnings():
    # The SDK recommends the second version of the model, which the Grafana releases in use do not read.
    warnings.filterwarnings("ignore", "Prefer using dashboardv2", DeprecationWarning)
    from dashboards import memory

pytestmark = pytest.mark.integration

R, OTHER = 'run_id="r", rank="{0}"', 'run_id="other", rank="0"'
A = f'{R}, optimizer="AdamW", dtype="float32", device="{{1}}"'
#: Two ranks with a GPU each and some state on the host; only the first has gradients; and another run.
SERIES = {
    f'optwatch_allocator_allocated_bytes{{{R.format(0)}, gpu="GPU-a"}}': 1000,
    f'optwatch_allocator_allocated_bytes{{{R.format(1)}, gpu="GPU-b"}}': 900,
    f'optwatch_allocator_allocated_bytes{{{OTHER}, gpu="GPU-a"}}': 5000,
    f"optwatch_parameter_bytes{{{A.format(0, 'cuda:0')}}}": 100,
    f"optwatch_parameter_bytes{{{A.format(1, 'cuda:1')}}}": 100,
    f"optwatch_gradient_bytes{{{A.format(0, 'cuda:0')}}}": 50,
    f'optwatch_optimizer_state_bytes{{{A.format(0, "cuda:0")}, slot="exp_avg"}}': 25,
    f'optwatch_optimizer_state_bytes{{{A.format(1, "cuda:1")}, slot="exp_avg"}}': 25,
    f'optwatch_optimizer_state_bytes{{{A.format(0, "cpu")}, slot="step"}}': 8,
    f"optwatch_host_memory_rss_bytes{{{R.format(0)}}}": 4000,
    f"optwatch_host_memory_rss_bytes{{{R.format(1)}}}": 3000,
}


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (memory.rest("allocator.allocated", "cuda.*"), 1900 - 200 - 50 - 50),
        (memory.rest("host_memory.rss", "cpu"), 7000 - 8),
    ],
    ids=["GPUs", "host"],
)
def test_what_is_left(expr: str, expected: int, tmp_path: Path) -> None:
    """Each kind of device is reckoned with its own; a part that is absent takes nothing; another run is another."""
    evaluate(expr, SERIES, [{"labels": "{}", "value": expected}], tmp_path)


def test_without_a_gpu_it_is_absent(tmp_path: Path) -> None:
    """Not zero."""
    host = {name: value for name, value in SERIES.items() if "allocator" not in name}
    evaluate(memory.rest("allocator.allocated", "cuda.*"), host, [], tmp_path)


def evaluate(expr: str, series: dict[str, int], samples: list[dict[str, object]], tmp_path: Path) -> None:
    """Have Prometheus itself find these samples, with everything of one run chosen."""
    expr = expr.replace("$run", "r").replace("$rank", ".+").replace("$optimizer", ".+")
    test = {
        "rule_files": [],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": f"{value}x5"} for name, value in series.items()],
                "promql_expr_test": [{"expr": expr, "eval_time": "3m", "exp_samples": samples}],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(test))
    command = [str(program("promtool")), "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
