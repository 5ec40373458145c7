"""What the first process in the namespaces of a libvirtd runs: `COMMAND DIRECTORY...`.

It makes everything private that libvirtd writes to, but for the directories named; says so by a
line; and then collects its dead, as the first process of a system does, until its standard input
ends. With it, everything in the namespaces ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.support.private_mounts import make_private, mount

_PRIVATE = ("/tmp", "/var/tmp", "/run", "/var/lib", "/var/cache", "/var/log", "/etc/libvirt")
COMMAND = (sys.executable, "-E", "-s", "-m", "tests.support.libvirt_namespace")
"""Runs this file, in the directory of the repository."""
_USERS = {
    "passwd": "libvirt-qemu:x:64055:64055::/:/bin/false\nsomebody:x:12345:12345::/:/bin/sh\n",
    "group": "libvirt-qemu:x:64055:\nsomebody:x:12345:\n",
}
_QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
"""
"""Of a host that has no systemd, no udev, and no other daemon of libvirt's."""


def _set_up(shared: list[str]) -> None:
    mount("--make-rprivate", "/")
    mount("-t", "proc", "proc", "/proc")
    make_private(_PRIVATE, shared)
    for name, line in _USERS.items():
        copy = Path("/run") / name
        copy.write_text(Path("/etc", name).read_text() + line)
        mount("--bind", str(copy), f"/etc/{name}")
    for name in ("lib", "cache", "log"):
        Path("/var", name, "libvirt").mkdir(mode=0o755)
    Path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    Path("/var/lib/dbus").mkdir()
    Path("/var/lib/dbus/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False, stderr=subprocess.DEVNULL)


def _end_with_standard_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    _set_up(sys.argv[1:])
    print("ready", flush=True)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    child = threading.Event()
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
        child.wait(0.02)
