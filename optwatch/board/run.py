"""Who this process is: the facts that tell one rank of one run from all others."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Mapping

#: A scheduler's own name of a run that all its ranks share, best first. The second is set by torchrun, but is the
#: word "none" unless it was given.
RUN_VARIABLES = ("OPTWATCH_RUN_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")


def run_facts(
    run_id: str | None, environment: Mapping[str, str] = os.environ
) -> dict[str, str | int | float]:
    """run_id, rank, world_size, local_rank, host, job_id, pod, pid and start_time of this process.

    ``run_id`` may hold letters, digits, ``.``, ``_`` and ``-``; a ``ValueError`` says so. By default it is taken from
    the launcher, else made up from the time.
    """
    if run_id is None:
        found = (environment.get(name, "") for name in RUN_VARIABLES)
        run_id = next((name for name in found if name and name != "none"), None) or _torchrun_id(environment)
        run_id = re.sub(r"[^\w.-]", "-", run_id)[:80] if run_id else _new_run_id()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,79}", run_id, re.ASCII):
        raise ValueError(f"run_id={run_id!r}: expected up to 80 letters, digits, '.', '_' and '-'")
    return {
        "run_id": run_id,
        "rank": _number(environment, "RANK", "SLURM_PROCID"),
        "world_size": _number(environment, "WORLD_SIZE", "SLURM_NTASKS", default=1),
        "local_rank": _number(environment, "LOCAL_RANK", "SLURM_LOCALID"),
        "host": socket.gethostname(),
        "job_id": environment.get("SLURM_JOB_ID") or environment.get("JOB_NAME") or "",
        "pod": _pod(environment),
        "pid": os.getpid(),
        "start_time": time.time(),
    }


def _pod(environment: Mapping[str, str]) -> str:
    """The pod's name: POD_NAME by the convention of the downward API, else what Kubernetes calls the host."""
    inside = "KUBERNETES_SERVICE_HOST" in environment
    return environment.get("POD_NAME") or (environment.get("HOSTNAME", "") if inside else "")


def _torchrun_id(environment: Mapping[str, str]) -> str | None:
    """What the ranks of a nameless torchrun have in common: on one node their parent, else where they meet.

    A fixed port of the same master comes again with the next job: give such jobs a ``--rdzv-id``.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    port = environment.get("MASTER_PORT", "0")
    if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
        return f"torchrun-{os.getppid()}-{port}"
    return f"torchrun-{environment.get('MASTER_ADDR', '')}-{port}"


def _new_run_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)


def _number(environment: Mapping[str, str], *names: str, default: int = 0) -> int:
    for name in names:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return default
