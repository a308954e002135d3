#!/usr/bin/env bash
# One worker of a study that many share; start as many as there are GPUs, whenever and wherever.
#
#   COLINTERN_STORAGE=postgresql+psycopg://... cluster/tune.sh NAME TRIALS
#   sbatch --array=0-7 cluster/tune.sh NAME TRIALS      eight workers, in one repository on a shared file system
#
# TRIALS is the study's total over all workers. The address holds a password: it comes from the environment alone, which
# `ps` does not show, and is never printed. The repository must have run once: dvc pull, or dvc repro.
#
#SBATCH --job-name=colintern-tune
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-tune-%A-%a.log
#SBATCH --signal=B:USR1@120
set -euo pipefail
case ${COLINTERN_STORAGE:?the address of the study, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE} in
  postgresql*) ;;
  *) echo "COLINTERN_STORAGE: workers on several machines need a postgresql+psycopg:// address" >&2; exit 2 ;;
esac
: "${1:?name of the study}" "${2:?trials of the study, over all workers}"
if [ -n "${SLURM_JOB_ID:-}" ]; then
  cd "$SLURM_SUBMIT_DIR"
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

colintern tune --study "$1" --trials "$2" &
work=$!
trap 'kill -TERM "$work" 2>/dev/null || true' TERM USR1
while kill -0 "$work" 2>/dev/null; do wait "$work" || true; done
code=0
wait "$work" || code=$?
if [ "$code" = 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
