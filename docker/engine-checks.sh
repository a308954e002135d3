#!/usr/bin/env bash
# The first process of the machine that docker/engine.sh makes: starts the engine and does what a user does, as uid 1234.
#   engine-checks.sh OPTION_OF_DOCKERD VARIABLES_OF_THE_BASE [options for docker build]
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=base.sh
source "$(dirname "${BASH_SOURCE[0]}")/base.sh"
home=/home/me clone=/home/me/colintern said=/var/log/said

# as_user COMMAND: a line of shell in the clone, as a login has it; what it says is kept in $said.
as_user() { runuser -l me -c "cd $clone && $1" >"$said" 2>&1; }
# say PATTERN: the lines of what was said, at least one.
say() { grep -E "$1" "$said" || fails "nobody said $1"; }
fails() { tail -40 "$said"; die "$*"; }
# holds COMMAND, ends CODE COMMAND: how it must end.
holds() { as_user "$1" || fails "$1 ended with $?"; }
ends() {
    local code=0
    as_user "$2" || code=$?
    [ "$code" = "$1" ] || fails "$2 ended with $code, not $1"
}

start_engine() {
    until [ -e /sys/class/net/tap0 ]; do sleep 0.1; done
    dockerd "$1" >/var/log/dockerd.log 2>&1 &
    local waited=0
    until docker info >/dev/null 2>&1; do
        { kill -0 $! && [ $((waited += 1)) -lt 60 ]; } || { tail -20 /var/log/dockerd.log; die "no engine"; }
        sleep 1
    done
    holds 'docker version -f "docker {{.Server.Version}}"; docker buildx version; docker compose version; id'
    cat "$said"
}

check_image() {
    log "make image"
    tar -C /base -c . | docker import -c "ENV $1" - stand-in-base >/dev/null
    rm -rf /base
    holds "make image IMAGE_ARGS='--build-arg PYTHON_IMAGE=stand-in-base ${*:2}'"
    say 'within the budget'
    holds 'docker image inspect -f "{{.Config.User}} {{.Config.Entrypoint}} {{.Config.Cmd}}" colintern'
    cat "$said"
}

check_refusals() {
    log "compose refuses: no user named, no cache folder, no GPU"
    ends 15 'docker compose run --rm cpu true'
    say 'COLINTERN_USER'
    ends 1 'COLINTERN_USER=1234:1234 docker compose run --rm cpu true'
    say "does not exist: $home/.cache/huggingface"
    [ ! -e $home/.cache ] || die "docker made $home/.cache"
    holds 'mkdir -p ~/.cache/huggingface ~/.cache/colintern-dvc'
    ends 1 'COLINTERN_USER=1234:1234 docker compose run --rm gpu true'
    say 'could not select device driver "nvidia" with capabilities: \[\[gpu\]\]'
    ends 2 'COLINTERN_USER=0:0 docker compose run --rm cpu true'
    say 'runs as root'
}

# stop_at_step COMMAND: `docker stop` once training has made a step.
stop_at_step() {
    log "docker stop in the training of: $1"
    runuser -l me -c "cd $clone && $1" >"$said" 2>&1 &
    local waited=0 code=0 begun
    until grep -q '^step ' "$said"; do
        { kill -0 $! && [ $((waited += 1)) -lt 1200 ]; } || fails "no step"
        sleep 1
    done
    begun=$SECONDS
    docker ps -q | xargs docker stop >/dev/null
    echo "stopped after $((SECONDS - begun)) s"
    wait $! || code=$?
    [ "$code" = 2 ] || fails "make ended with $code, not 2"
    say '^(SIG|error|ERROR|make:)'
    (cd $clone/.scratch && ls -d train-*/checkpoint-*)
}

check_sbom() {
    log "what make image-sbom reads from the image; docker/checks.sh makes the list of it"
    holds "docker run --rm --entrypoint sh colintern -c 'cd /opt/venv/lib/python3*/site-packages && tar -c *.dist-info' | tar -t | grep -c '/METADATA$'"
    cat "$said"
}

check_owner() {
    local foreign
    foreign=$(find $home ! -uid 1234 -print -quit)
    [ -z "$foreign" ] || die "$foreign does not belong to the user"
    [ -n "$(ls -A $home/.cache/colintern-dvc)" ] || die "DVC's hashes were not kept"
    echo "every file below $home belongs to uid 1234"
}

check_repro() {
    stop_at_step 'make docker-repro'
    log "make docker-repro again: goes on to its end, with the metrics in git"
    holds 'time make docker-repro'
    say '^(resuming from|demo, mean|real)'
    # dvc.lock too holds the hash of the adapter's identity.json, which names Python to its last number.
    holds 'git status --porcelain -- . ":!dvc.lock" && git diff -- metrics plots'
    [ ! -s "$said" ] || fails "the clone is not as it was committed"
    check_owner
    log "make docker-repro once more: nothing runs"
    holds 'make docker-repro'
    say 'up to date'
    ! grep '^Running' "$said" || die "a stage ran"
}

check_experiment() {
    local command='make docker-repro CMD="dvc exp run -n slower -S lr=0.004"'
    log "$command"
    holds "$command"
    say '^(Running|demo, mean|Ran experiment)'
    holds 'make -s docker-repro CMD="dvc exp list"'
    say 'slower'
    as_user 'git diff params.yaml'
    say '^[+]lr: 0.004'
    check_owner
}

start_engine "$1"
check_image "${@:2}"
check_refusals
check_sbom
check_repro
check_experiment
log "all checks held"
