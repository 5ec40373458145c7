"""makedumpfile of other architectures, unpacked and never installed, run by QEMU's user mode.

It reads dumps of its own architecture alone.
"""

from __future__ import annotations

import fcntl

from qemu_dump_ext.guest_images.manifest import default_cache
from tests.support.unpacked_package import fetch_unpacked

# By image: the architecture as Debian calls it, and QEMU's program for it.
_ARCHITECTURES = {
    "aarch64": ("arm64", "qemu-aarch64-static"),
    "i386": ("i386", "qemu-i386-static"),
    "ppc64le": ("ppc64el", "qemu-ppc64le-static"),
    "s390x": ("s390x", "qemu-s390x-static"),
}


def foreign_makedumpfile(image: str) -> list[str]:
    """Return how the command line of makedumpfile for an image begins, after fetching it if needed.

    Args:
        image: Name of the image.

    Raises:
        DumpError: It cannot be had, or this is not Debian.
    """
    architecture, emulator = _ARCHITECTURES[image]
    cache = default_cache()
    root = (cache / f"makedumpfile-{architecture}").absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".makedumpfile-{architecture}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            fetch_unpacked("makedumpfile", root, cache=cache, architecture=architecture, suite=None)
    # By its own loader: links in the package lead out of the folder.
    loader = min(root.glob("lib/*/ld*.so.*"))
    libraries = ":".join(str(folder) for folder in (*root.glob("lib/*"), *root.glob("usr/lib/*")))
    program = str(root / "usr/bin/makedumpfile")
    return [emulator, str(loader), "--library-path", libraries, program]
