#!/usr/bin/env bash
# One training run on several machines, each with the same number of GPUs. On each of them, in one folder that all see:
#
#   NODES=2 NODE=0 HEAD=10.0.0.1 GPUS=8 cluster/torchrun.sh      NODE=1 on the second, and so on
#
# before it on one of them: dvc repro verify; after it there: dvc repro, which evaluates. With arguments, those are run
# instead. Under Slurm: srun, whose variables training understands, see docs/clusters.md.
set -euo pipefail
[ $# -gt 0 ] || set -- --no-python cluster/rank.sh
exec python -m torch.distributed.run --nnodes "${NODES:?machines}" --node-rank "${NODE:?number of this one, from 0}" \
  --master-addr "${HEAD:?address of the first}" --master-port "${PORT:-29500}" --nproc-per-node "${GPUS:-1}" "$@"
