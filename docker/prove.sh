#!/usr/bin/env bash
# Proves the Dockerfile where there is no container engine and no image registry: runs every line of it with buildah in
# a chroot, on a Debian made here with the same minor version of Python, and then runs the image as a user without name.
#
#   docker/prove.sh [options for `buildah bud`, such as --build-arg FLASH_ATTN=2.8.3.post2]
#
# Needs root, buildah and debootstrap (`apt-get install buildah debootstrap`), a Debian mirror and PyPI, 45 GB free
# under ${TMPDIR:-/var/tmp} and about 15 minutes on 2 cores. Leaves nothing behind. Exit code 0: every check held.
# Not proved by it: the pinned base image itself, and anything that needs a GPU.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stranger=12345 # the uid the image is run as; no passwd file knows it
log() { printf '[%(%H:%M:%S)T] == %s\n' -1 "$*"; }
die() { echo "prove.sh: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root (chroot, debootstrap)"
for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install buildah debootstrap"
done

work=$(mktemp -d "${TMPDIR:-/var/tmp}/image-proof.XXXXXX")
chmod 755 "$work"
export TMPDIR=$work # buildah's blobs and cache mounts go there too
buildah=(buildah --root "$work/storage" --runroot "$work/runroot")
clean_up() {
    "${buildah[@]}" rm --all >/dev/null 2>&1 || log "no containers to remove"
    # The overlay driver leaves mounts behind; the newest goes first, one lies on top of another.
    local mounts
    mounts=$(awk -v under="$work/" 'index($2, under) == 1 {print $2}' /proc/mounts | tac)
    [ -z "$mounts" ] || xargs umount <<<"$mounts"
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT

# The stand-in for the pinned Python image. The host's certificate bundle goes into this base only, never into the
# Dockerfile: where a proxy signs the traffic, the build inside the chroot has to know it.
make_base() {
    debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,ca-certificates \
        bookworm "$work/rootfs" >"$work/debootstrap.log" 2>&1 || { tail -20 "$work/debootstrap.log" >&2; return 1; }
    ln -s /usr/bin/python3 "$work/rootfs/usr/local/bin/python"
    cp /etc/ssl/certs/ca-certificates.crt "$work/rootfs/etc/ssl/certs/ca-certificates.crt"
    local container
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add -q "$container" "$work/rootfs" / >/dev/null
    "${buildah[@]}" config --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
        --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$container"
    "${buildah[@]}" commit -q "$container" localhost/stand-in-base >/dev/null
    "${buildah[@]}" rm "$container" >/dev/null
    rm -rf "$work/rootfs"
}

# in_image FOLDER COMMAND...: as `docker run --user 12345:12345 -v repo:repo:ro -v demo:demo -w FOLDER` would.
in_image() {
    local folder=$1
    shift
    "${buildah[@]}" run --isolation chroot --user "$stranger:$stranger" --workingdir "$folder" \
        --volume "$repo:$repo:ro" --volume "$work/demo:$work/demo" "$image" -- "$@"
}

# The pipeline in miniature, laid out as ours is: a library, a script in stages/, a parameter, a metric.
write_demo() {
    mkdir -p "$work/demo/stages" "$work/demo/colintern"
    cd "$work/demo"
    echo 'WEIGHT = 1' >colintern/__init__.py
    echo 'lr: 1' >params.yaml
    cat >stages/train.py <<-'PY'
		import json, pathlib
		import colintern
		lr = int(pathlib.Path("params.yaml").read_text().split(":")[1])
		pathlib.Path("metrics.json").write_text(json.dumps({"score": lr * colintern.WEIGHT}))
	PY
    cat >dvc.yaml <<-'YAML'
		stages:
		  train:
		    cmd: python -m stages.train
		    deps: [stages/train.py, colintern/__init__.py]
		    params: [lr]
		    metrics: [metrics.json: {cache: false}]
	YAML
    chown -R "$stranger:$stranger" "$work/demo"
    cd "$repo"
}

# expect NAME SCORE LR: the experiment or branch stands in DVC's table with these two figures.
expect() {
    in_image "$work/demo" dvc exp show -A --csv >"$work/table.csv"
    grep -Eq "^($1,|,$1,).*,$2,$3," "$work/table.csv" || die "no $1 with score,lr $2,$3 in $(cat "$work/table.csv")"
    echo "$1: score $2 at lr $3"
}

check_environment() {
    log "uid $stranger without passwd entry: imports"
    in_image / id
    in_image / python -c "
import os, getpass, pathlib, torch, transformers, peft, mteb, dvc
print('python', os.sys.version.split()[0], 'torch', torch.__version__, 'CUDA', torch.version.cuda,
      'transformers', transformers.__version__, 'peft', peft.__version__, 'dvc', dvc.__version__)
print('user', getpass.getuser(), 'home', pathlib.Path.home(), 'sum', torch.ones(3).cuda().sum().item()
      if torch.cuda.is_available() else torch.ones(3).sum().item())
for folder in (pathlib.Path.home(), os.environ['HF_HOME'], os.environ['DVC_SITE_CACHE_DIR']):
    probe = pathlib.Path(folder, 'probe'); probe.write_text('x'); probe.unlink()
"
    in_image / dvc --version
    log "the mounted repository belongs to $(stat -c %U "$repo"): git status"
    in_image "$repo" git status --short --branch | head -3
    if [ -f colintern/cli.py ]; then
        log "the mounted repository's own command"
        in_image "$repo" colintern --help | head -2
    fi
}

check_experiments() {
    log "dvc in a repository of uid $stranger, no identity configured: repro, two experiments, one in a copy, one queued"
    in_image "$work/demo" sh -ec 'git init -q -b main && dvc init -q && git add -A && git commit -qm start && dvc repro -q
        git add -A && git commit -qm repro && dvc exp run -q -S lr=2 -n second && dvc exp run -q -S lr=3 -n third'
    expect main 1 1
    expect second 2 2
    expect third 3 3
    # Each copy must run the library it was queued with, whatever happens to the main checkout afterwards.
    in_image "$work/demo" sh -ec 'echo "WEIGHT = 10" >colintern/__init__.py && dvc exp run -q --temp -S lr=4 -n copied
        echo "WEIGHT = 100" >colintern/__init__.py && dvc exp run -q --queue -S lr=5 -n queued
        echo "WEIGHT = 7" >colintern/__init__.py && dvc exp run -q --run-all'
    expect copied 40 4
    expect queued 500 5
    in_image "$work/demo" git log -1 --format='committed as %an <%ae>'
}

make_base_and_build() {
    log "stand-in base: Debian bookworm with its Python"
    make_base
    log "building the Dockerfile"
    "${buildah[@]}" bud --isolation chroot --build-arg PYTHON_IMAGE=localhost/stand-in-base \
        --tag localhost/colintern-proof "$@" "$repo"
}

cd "$repo"
make_base_and_build "$@"
image=$("${buildah[@]}" from localhost/colintern-proof)
write_demo
log "image size: $(du -sh "$("${buildah[@]}" mount "$image")" | cut -f1)"
check_environment
check_experiments
log "all checks held"
