#!/usr/bin/env bash
# Proves the Dockerfile where there is no container engine and no image registry: runs every line of it with buildah in
# a chroot, on a Debian made here with the same minor version of Python, and then runs the image as a user without name:
# entry point, compiler, size, SBOM, experiments, and this repository's own training, stopped and gone on with.
#
#   docker/prove.sh [options for `buildah bud`, such as --build-arg FLASH_ATTN=2.8.3.post2]
#
# Needs .venv (`make env`), root, buildah and debootstrap (`apt-get install buildah debootstrap`), a Debian mirror and
# PyPI, 45 GB free under ${TMPDIR:-/var/tmp} and about 20 minutes on 2 cores. Leaves nothing behind. Exit code 0: every check held.
# Not proved by it: the pinned base image itself, and anything that needs a GPU.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stranger=12345 # the uid the image is run as; no passwd file knows it
# shellcheck source-path=SCRIPTDIR source=base.sh
source "$repo/docker/base.sh"
need_root_and buildah debootstrap
[ -x "$repo/.venv/bin/cyclonedx-py" ] || die "$repo/.venv has no cyclonedx-py, which lists the image's packages: make env"

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

make_base() {
    make_python_base "$work/rootfs"
    local container
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add -q "$container" "$work/rootfs" / >/dev/null
    "${buildah[@]}" config "${base_environment[@]/#/--env=}" "$container"
    "${buildah[@]}" commit -q "$container" localhost/stand-in-base >/dev/null
    "${buildah[@]}" rm "$container" >/dev/null
    rm -rf "$work/rootfs"
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
# shellcheck source-path=SCRIPTDIR source=checks.sh
source docker/checks.sh
check_all
log "all checks held"
