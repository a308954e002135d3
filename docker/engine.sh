#!/usr/bin/env bash
# Proves `make image`, `make docker-repro` and compose.yaml with a real engine where none is installed: makes a Debian 13
# with its docker, buildx and compose, starts it in namespaces of its own (mounts, processes, network), and runs there
# what a user would, as uid 1234 on a clean clone of HEAD. docker/engine-checks.sh is what runs inside.
#
#   docker/engine.sh [options for `docker build`, such as --build-arg FLASH_ATTN=2.8.3.post2]
#
# Needs root, debootstrap and slirp4netns (`apt-get install debootstrap slirp4netns`), a Debian mirror and PyPI, 40 GB
# free under ${TMPDIR:-/var/tmp} and about 30 minutes on 2 cores. Changes no network rule of the machine, leaves neither
# a process nor a file behind. Exit code 0: every check held. Not proved by it: the pinned base image, and a GPU.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=base.sh
source "$repo/docker/base.sh"

# Becomes the first process of the machine: what it leaves running ends with it.
enter() {
    mount --bind "$1" "$1"
    cd "$1"
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount --rbind /sys/fs/cgroup sys/fs/cgroup
    mount --rbind /dev dev
    mount -t tmpfs -o mode=755 tmpfs run
    mount -t tmpfs tmpfs tmp
    mkdir host && pivot_root . host
    umount -l /host && rmdir /host
    hostname proof
    shift
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        /home/me/colintern/docker/engine-checks.sh "$@" </dev/null
}
if [ "${1:-}" = --enter ]; then enter "${@:2}"; fi

need_root_and debootstrap slirp4netns
work=$(mktemp -d "${TMPDIR:-/var/tmp}/engine-proof.XXXXXX")
chmod 755 "$work"
machine=$work/machine running='' network=''
clean_up() {
    if [ -n "$running" ]; then # its first process takes all others of the machine along
        xargs -r kill -KILL <"/proc/$running/task/$running/children" && wait "$running" || true
    fi
    if [ -n "$network" ]; then kill "$network" && wait "$network" || true; fi 2>/dev/null # ends with the machine
    rm -rf --one-file-system "$work"
    find /sys/fs/cgroup -depth -path "*/engine-proof-$$*" -type d -exec rmdir {} + 2>/dev/null || true
}
trap clean_up EXIT
trap 'exit 143' TERM INT

log "a machine: Debian 13 with its docker, buildx and compose"
make_debian trixie "$machine" docker.io,docker-cli,docker-buildx,docker-compose,git,make
log "stand-in base: Debian 12 with its Python"
make_python_base "$machine/base"
echo nameserver 10.0.2.3 >"$machine/etc/resolv.conf" # slirp4netns asks who the host asks
printf '127.0.0.1 localhost proof\n' >"$machine/etc/hosts"
chroot "$machine" useradd --create-home --uid 1234 --shell /bin/bash --groups docker me
git -c safe.directory="$repo" -c safe.directory="$repo/.git" clone -q --no-hardlinks "$repo" "$machine/home/me/colintern"
chroot "$machine" chown -R me:me /home/me

unshare --mount --net --pid --ipc --uts --fork --kill-child \
    "$0" --enter "$machine" "--cgroup-parent=/engine-proof-$$" "${base_environment[*]}" "$@" &
running=$!
until [ "$(readlink "/proc/$running/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
slirp4netns --configure --mtu=1400 --disable-host-loopback "$running" tap0 >"$work/network.log" 2>&1 &
network=$!
code=0
wait "$running" || code=$?
running=''
[ "$code" = 0 ] || die "a check failed ($code), see above"
