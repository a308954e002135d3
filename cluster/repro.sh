#!/usr/bin/env bash
# dvc pull, dvc repro, dvc push on a machine that may be taken away; skypilot.yaml and slurm.sh start it.
#
#   cluster/repro.sh                            in the repository, its environment activated
#   COLINTERN_KEPT=/mnt/bucket cluster/repro.sh   the machine's disk goes with it: keep there what a rerun goes on from
#
# Exit 0: done and pushed; 75: stopped by SIGTERM, SIGINT or SIGUSR1, the same command goes on; else as DVC does.
set -euo pipefail
set -m # each step gets a process group, to which a signal can be sent as a terminal does
shopt -s nullglob
kept=${COLINTERN_KEPT:-} every=${COLINTERN_KEPT_SECONDS:-60}
step='' asked=''

# Ctrl-C, not SIGTERM: DVC waits for its stage then, and the trainer saves and exits with 75.
trap 'asked=yes; [ -z "$step" ] || kill -INT -- "-$step" 2>/dev/null || true' TERM INT USR1

run() {
  local code=0
  [ -z "$asked" ] || exit 75
  "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  wait "$step" || code=$?
  step=''
  if [ "$code" != 0 ] && [ -n "$asked" ]; then exit 75; fi
  return "$code"
}

# Finished checkpoints and evaluation tasks, to the bucket. Copies cut short harm nobody: a checkpoint's files.json has
# the hash of each of its files, and training goes on from the newest that is whole. The two newest stay there.
keep() {
  local folder old
  for folder in .scratch/train-*/ .scratch/eval-*/; do
    mkdir -p "$kept/$folder"
    for file in "$folder"*; do
      [ "$(basename "$file")" = saving ] || cp -ru "$file" "$kept/$folder" || echo "warning: $file is not whole in $kept"
    done
    for old in $(printf '%s\n' "$kept/$folder"checkpoint-* | sort -V | head -n -2); do rm -rf "$old"; done
  done
}

take() {
  if [ -d "$kept/.scratch" ]; then cp -r "$kept/.scratch" .; fi
}

ended() {
  code=$?
  trap '' TERM INT USR1
  [ -z "${keeper:-}" ] || { kill -- "-$keeper" 2>/dev/null && wait "$keeper" 2>/dev/null; } || true
  [ -z "$kept" ] || [ "$code" = 0 ] || keep
  exit "$code"
}

if dvc status --quiet; then echo "nothing to do: dvc.lock has this run"; exit 0; fi
trap ended EXIT
if [ -n "$kept" ]; then
  take
  while sleep "$every"; do keep; done &
  keeper=$!
fi
run dvc pull --run-cache || echo "warning: not all of dvc.lock is in the remote; dvc repro makes what is missing"
run dvc repro -f -s fetch-data # pages and base are no outs: this machine has none
run dvc repro verify
run dvc push --run-cache
run dvc repro
run dvc push --run-cache
if [ -n "$kept" ]; then
  mkdir -p "$kept/results"
  cp -r dvc.lock params.yaml metrics plots "$kept/results/" # they are in git, and this clone goes away
  kill -- "-$keeper" && wait "$keeper" || true
  for folder in "$kept"/.scratch/train-*/; do # only now: until the push, only they had the run
    [ -d ".scratch/$(basename "$folder")" ] || rm -rf "$folder"
  done
  echo "results: $kept/results, to be copied into a clone and committed"
fi
