#!/usr/bin/env bash
# One process of a launcher's: the first runs the stage through DVC, which records it; the others take part.
set -euo pipefail
if [ "${RANK:-${SLURM_PROCID:?started by torchrun or srun}}" = 0 ]; then
  exec dvc repro -s train
fi
exec python -m stages.train
