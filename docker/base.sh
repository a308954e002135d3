# shellcheck shell=bash
# What the two proofs of the image, docker/prove.sh and docker/engine.sh, share.

log() { printf '[%(%H:%M:%S)T] == %s\n' -1 "$*"; }
die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# need_root_and TOOL...: each is a command, and a Debian package of the same name.
need_root_and() {
    [ "$(id -u)" = 0 ] || die "must run as root (debootstrap, namespaces)"
    local tool
    for tool; do command -v "$tool" >/dev/null || die "$tool is missing: apt-get install $*"; done
}

# make_debian SUITE FOLDER PACKAGES: the host's certificate bundle goes in, because where a proxy signs the traffic, what
# is installed inside has to know it.
make_debian() {
    debootstrap --variant=minbase --include="ca-certificates,$3" "$1" "$2" >"$2.log" 2>&1 ||
        { tail -20 "$2.log" >&2; die "no Debian $1"; }
    cp /etc/ssl/certs/ca-certificates.crt "$2/etc/ssl/certs/ca-certificates.crt"
}

# The stand-in for the pinned Python image: a Debian with the same minor version of Python, in the folder named. The two
# variables have to be set in the image made of it; the Dockerfile knows nothing of either.
make_python_base() { make_debian bookworm "$1" python3,python3-venv,python3-dev && ln -s /usr/bin/python3 "$1/usr/local/bin/python"; }
# shellcheck disable=SC2034 # read by who sources this
base_environment=(SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt)
