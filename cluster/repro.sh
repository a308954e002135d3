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

# Finished checkpoints and evaluation tasks, to the bucket. An empty file NAME.whole beside a copy says that it is whole:
# an object store has no renaming of folders. The two newest checkpoints stay there.
keep() {
  local folder entry there old
  for folder in .scratch/train-*/ .scratch/eval-*/; do
    mkdir -p "$kept/$folder"
    for entry in "$folder"*; do
      there=$kept/$entry
      case $entry in */saving | *.partial) continue ;; esac
      if [ -f "$entry" ]; then
        cmp -s "$entry" "$there" || cp "$entry" "$there" || true
      elif [ ! -e "$there.whole" ]; then
        rm -rf "$there"
        if cp -r "$entry" "$there"; then
          : >"$there.whole"
        elif [ -e "$entry" ]; then # else a newer checkpoint has taken its place meanwhile
          echo "warning: $entry could not be copied to $kept"
        fi
      fi
    done
    while read -r old; do rm -rf "$old" "$old.whole"; done < <(
      find "$kept/$folder" -maxdepth 1 -type d -name 'checkpoint-*' | sort -V | head -n -2
    )
  done
}

take() {
  local there entry
  for there in "$kept"/.scratch/*/*; do
    entry=.scratch/${there#"$kept"/.scratch/}
    mkdir -p "$(dirname "$entry")"
    if [ ! -e "$entry" ] && [[ $entry != *.whole ]] && { [ -f "$there" ] || [ -e "$there.whole" ]; }; then
      cp -r "$there" "$entry"
    fi
  done
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
    here=.scratch/$(basename "$folder")
    if [ ! -d "$here" ] || [ -e "$here/ended" ]; then rm -rf "$folder"; fi
  done
  echo "results: $kept/results, to be copied into a clone and committed"
fi
