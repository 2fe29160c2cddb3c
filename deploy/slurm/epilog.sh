#!/bin/sh
# Slurm's Epilog, run by root on every node of a job: end the user's agent when this was the user's last job here, after
# Prometheus has had the time to see how the run ended. Nobody waits for that.
. "$(dirname "$0")/optwatch.conf"
[ -n "${SLURM_JOB_USER:-}" ] || exit 0

if [ "${1:-}" != later ]; then
  setsid "$0" later </dev/null >/dev/null 2>&1 &
  exit 0
fi
sleep "${OPTWATCH_LINGER:-60}"

# The next job of this user may have begun meanwhile.
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
