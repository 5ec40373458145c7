"""A newer QEMU than the machine's, from another suite, unpacked and never installed.

It runs with its own C library through its own dynamic loader. `/proc/PID/exe` of such a process is
the loader, not QEMU.
"""

from __future__ import annotations

import fcntl
import subprocess
from functools import cache as once

from qemu_dump_ext.guest_images.manifest import default_cache
from qemu_dump_ext.qemu.monitor_text import parse_version
from qemu_dump_ext.structures.dialect import QemuVersion
from tests.support.unpacked_package import fetch_unpacked

_SUITE = "sid"
_ARCHITECTURE = "amd64"
_TRIPLET = "x86_64-linux-gnu"
_DATA_FOLDERS = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


@once
def own_qemu_version() -> QemuVersion:
    """Return the version of the machine's own QEMU."""
    words = ["qemu-system-x86_64", "--version"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return parse_version(text.partition("version")[2])


def own_qemu_is_newer() -> bool:
    """Tell whether the machine's own QEMU is one that the tests call newer: 9.1 or later."""
    return own_qemu_version() >= (9, 1, 0)


def refusal_of_own_qemu() -> str:
    """Return what the machine's own QEMU says where it cannot dump a target."""
    if own_qemu_version() >= (10, 0, 0):
        return "dumping guest memory is not supported on this target"
    return "this feature or command is not currently supported"


def newer_qemu_command(target: str = "x86_64", package: str = "qemu-system-x86") -> list[str]:
    """Return how the command line of QEMU begins, after fetching it (40 MB) if needed.

    Args:
        target: QEMU's name of the target.
        package: Which has its emulator.

    Raises:
        DumpError: It cannot be had, or this is not Debian.
    """
    cache = default_cache()
    name = f"{package}-{_SUITE}"
    root = (cache / name).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            fetch_unpacked(package, root, cache=cache, architecture=_ARCHITECTURE, suite=_SUITE)
    loader = root / f"usr/lib/{_TRIPLET}/ld-linux-x86-64.so.2"
    libraries = sorted({str(path.parent) for path in (root / "usr/lib" / _TRIPLET).rglob("*.so.*")})
    command = ["env", f"QEMU_MODULE_DIR={root}/usr/lib/{_TRIPLET}/qemu"]
    command += [str(loader), "--library-path", ":".join(libraries)]
    command += [str(root / f"usr/bin/qemu-system-{target}")]
    for folder in _DATA_FOLDERS:
        command += ["-L", str(root / folder)]
    return command
