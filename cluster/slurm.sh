#!/usr/bin/env bash
# The pipeline as a Slurm job that may be preempted or run out of time: it goes back into the queue, and goes on.
#
#   sbatch cluster/slurm.sh        in the repository, on a file system that the nodes share, after `make env`
#
#SBATCH --job-name=colintern
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.log
# To this script, two minutes before its time is up: the step under way and its checkpoint fit in.
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
# shellcheck disable=SC1091
source .venv/bin/activate

# In the background, so that this shell takes signals while it waits.
cluster/repro.sh &
work=$!
trap 'kill -TERM "$work" 2>/dev/null || true' TERM USR1
while kill -0 "$work" 2>/dev/null; do wait "$work" || true; done
code=0
wait "$work" || code=$?
if [ "$code" = 75 ]; then
  echo "stopped with a checkpoint; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
