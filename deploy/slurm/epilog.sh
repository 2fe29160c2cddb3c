#!/bin/sh
# Slurm's Epilog, run by root on every node of a job: end the user's agent when this was the user's last job here.
. "$(dirname "$0")/optwatch.conf"
[ -n "${SLURM_JOB_USER:-}" ] || exit 0

others=$(squeue --noheader --format=%A --user="$SLURM_JOB_USER" --nodelist="${SLURMD_NODENAME:-$(hostname)}" 2>/dev/null |
  grep -cvx "${SLURM_JOB_ID:-none}")
[ "$others" -eq 0 ] || exit 0

# The agent says where it is, in a file that only the user (and root) can read; SIGTERM is a clean end.
boards=${OPTWATCH_DIR:-/dev/shm/optwatch-$(id -u "$SLURM_JOB_USER")}
pid=$(sed -n 's/.*"pid": *\([0-9][0-9]*\).*/\1/p' "$boards/agent.json" 2>/dev/null)
if [ -n "$pid" ] && [ "$(stat --format=%U "/proc/$pid" 2>/dev/null)" = "$SLURM_JOB_USER" ] &&
  grep -qz 'optwatch[.]agent' "/proc/$pid/cmdline"; then
  kill -TERM "$pid"
fi
exit 0
