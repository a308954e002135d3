#!/usr/bin/env bash
# One process of a launcher's: the first runs the stage through DVC, which records it; the others take part. Each asks
# first whether there is anything to do, and the run cache is not asked: others would wait for a stage that never starts.
set -euo pipefail
rank=${RANK:-${SLURM_PROCID:?started by torchrun or srun}}
if dvc status -q train; then
  [ "$rank" != 0 ] || echo "train: nothing has changed since it ran, nothing to do"
  exit 0
fi
if [ "$rank" = 0 ]; then
  exec dvc repro --no-run-cache -s train
fi
exec python -m stages.train
