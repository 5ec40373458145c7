#!/bin/sh
# The quick tests, or others, on Debian 13 (Python 3.13, QEMU 10, gdb 16), in a root of its own:
#   sh tests/on_debian13.sh DIRECTORY [WORDS OF PYTEST]
# Needs root, debootstrap, git and 10 GB in DIRECTORY, which is kept: the next run brings the last commit.
# Nothing outside of DIRECTORY is changed; mounts are in a namespace that ends with it.
set -eu
cd "$(dirname "$0")/.."
root=${1:?"a directory for a root of Debian 13"}
shift
[ "$#" -gt 0 ] || set -- tests/unit tests/contract tests/static tests/in_gdb tests/oracle/test_doors.py \
    tests/hmp/test_dump_command.py tests/collector/test_causes.py

if [ ! -e "$root/etc/debian_version" ]; then
    debootstrap --variant=minbase --include=ca-certificates,git,python3,python3-venv trixie "$root"
fi
# Names are resolved, and packages fetched, as this host does it.
for file in /etc/hosts /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    [ ! -e "$file" ] || cp "$file" "$root$file"
done
apt-config dump Acquire | grep -v IndexTargets >"$root/etc/apt/apt.conf.d/00host"
[ -e "$root/repository" ] || git clone -q . "$root/repository"
git -C "$root/repository" fetch -q "$PWD" HEAD
git -C "$root/repository" reset -q --hard FETCH_HEAD

# shellcheck disable=SC2016 # the inner shells expand
exec unshare --mount --propagation private sh -c '
    root=$1; shift
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/dev/shm"
    mkdir -p "$root/before"
    cd "$root"
    pivot_root . before
    umount --lazy /before
    cd /repository
    exec env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 TMPDIR=/tmp \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt sh tests/run.sh "$@"
' sh "$(realpath "$root")" "$@"
