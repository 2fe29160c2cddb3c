#!/bin/sh
# Slurm's Prolog, run by root on every node of a job: start the user's agent, unless it runs already. It writes a target
# for each run to the file_sd directory and takes it away again. Training does not depend on it: this never fails a job.
. "$(dirname "$0")/optwatch.conf"
[ -n "${SLURM_JOB_USER:-}" ] || exit 0

as_user() {
  if [ "$(id -un)" = "$SLURM_JOB_USER" ]; then "$@"; else runuser -u "$SLURM_JOB_USER" -- "$@"; fi
}

export OPTWATCH_STORE
# setsid and closed descriptors: slurmd would wait for whoever holds its pipes.
as_user setsid "$OPTWATCH_PYTHON" -m optwatch.agent --nice 10 --host "$OPTWATCH_HOST" --file-sd "$OPTWATCH_FILE_SD" \
  --advertise "${SLURMD_NODENAME:-$(hostname)}" --exit-when-idle "$OPTWATCH_IDLE" </dev/null >/dev/null 2>&1 &
exit 0
