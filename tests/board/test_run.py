"""Who a process says it is."""

from __future__ import annotations

import os

import pytest

from optwatch.board.run import run_facts


def test_launchers_name_the_run_and_the_rank() -> None:
    """Torchrun's variables, and Slurm's; an own name wins."""
    torchrun = {"TORCHELASTIC_RUN_ID": "job/7", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    facts = run_facts(None, torchrun)
    assert (facts["run_id"], facts["rank"], facts["world_size"], facts["local_rank"]) == ("job-7", 3, 8, 1)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1"}
    facts = run_facts(None, slurm)
    assert (facts["run_id"], facts["rank"], facts["world_size"], facts["job_id"]) == ("42", 5, 6, "42")
    assert run_facts("mine", torchrun)["run_id"] == "mine"
    assert run_facts(None, {**torchrun, "OPTWATCH_RUN_ID": "ours"})["run_id"] == "ours"


def test_without_a_launcher_every_run_has_a_new_name() -> None:
    """Torchrun without --rdzv-id says "none", which is no name."""
    first, second = run_facts(None, {}), run_facts(None, {"TORCHELASTIC_RUN_ID": "none"})
    assert first["run_id"] != second["run_id"]
    assert (first["rank"], first["world_size"]) == (0, 1)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 81, "ä"])
def test_a_bad_name_is_refused(name: str) -> None:
    """It becomes a file name and a label."""
    with pytest.raises(ValueError, match="run_id="):
        run_facts(name, {})


def test_ranks_of_a_nameless_torchrun_share_an_id() -> None:
    """On one node by their parent, on several by where they meet."""
    one = {
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500",
        "LOCAL_WORLD_SIZE": "2",
    }
    ids = {run_facts(None, {**one, "WORLD_SIZE": "2", "RANK": rank})["run_id"] for rank in "01"}
    assert ids == {f"torchrun-{os.getppid()}-29500"}
    assert run_facts(None, {**one, "WORLD_SIZE": "4"})["run_id"] == "torchrun-n1-29500"


@pytest.mark.parametrize(
    ("environment", "pod"),
    [
        ({"HOSTNAME": "machine"}, ""),
        ({"HOSTNAME": "train-0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "train-0"),
        ({"HOSTNAME": "machine", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "train-0"}, "train-0"),
    ],
)
def test_the_pod_is_named_in_kubernetes_only(environment: dict[str, str], pod: str) -> None:
    """By the downward API, or by its host name; elsewhere a host is no pod."""
    assert run_facts(None, environment)["pod"] == pod
