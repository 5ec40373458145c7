#!/bin/sh
# All tests, from nothing: everything they need is installed first.
set -eu
cd "$(dirname "$0")/.."
. images/set_up.sh

set_up "gcc python3-dev liblzo2-dev binutils cpio bzip2 lzop xz-utils zstd socat util-linux gdb gdb-multiarch \
    gdbserver crash groff-base makedumpfile qemu-user-static chromium openssh-sftp-server \
    qemu-system-x86 qemu-system-arm qemu-system-ppc qemu-system-mips qemu-system-sparc qemu-system-misc qemu-guest-agent \
    systemd libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients" "dev"
# On all CPUs; what a module or a guest shares stays in one process. The unit tests come last: none of
# their files takes so long that other CPUs have nothing to do in the end.
status=0
.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || status=$?
[ "$status" -eq 1 ] || exit "$status"
echo "These failed beside others. What passes alone is a test that does not bear a busy machine, and is to be mended:"
exec .venv/bin/python -m pytest -n 0 --last-failed --maxfail 1 -v "$@"
