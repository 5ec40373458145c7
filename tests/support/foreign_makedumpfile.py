"""makedumpfile of other architectures and newer ones, unpacked and never installed.

It reads dumps of its own architecture alone; that of another one is run by QEMU's user mode.
"""

from __future__ import annotations

import fcntl
from mmap import mmap
from pathlib import Path

from qemu_dump_ext.guest_images.manifest import default_cache
from tests.support.unpacked_package import fetch_unpacked

NEWER = "sid"
"""A suite whose makedumpfile (1.7.8) tells pages of kernels up to 7.0 apart."""
_OF_LINUX_6_1 = "bookworm"
"""That of Debian 13 (1.7.6) does not tell pages of its own Linux 6.12 apart."""
# By target: the architecture as Debian calls it, and QEMU's program for it.
_ARCHITECTURES = {
    "aarch64": ("arm64", "qemu-aarch64-static"),
    "i386": ("i386", "qemu-i386-static"),
    "arm": ("armhf", "qemu-arm-static"),
    "ppc64le": ("ppc64el", "qemu-ppc64le-static"),
    "riscv64": ("riscv64", "qemu-riscv64-static"),
    "s390x": ("s390x", "qemu-s390x-static"),
    "x86_64": ("amd64", None),
}
_SAME_LENGTH = b"OFFSET(page.compound_info)", b"OFFSET(page.compound_head)"


def foreign_makedumpfile(image: str, suite: str) -> list[str]:
    """Return how the command line of makedumpfile for an image begins, after fetching it if needed.

    Args:
        image: Name of the image.
        suite: Of Debian.

    Raises:
        DumpError: It cannot be had, or this is not Debian.
    """
    architecture, emulator = _ARCHITECTURES[image]
    cache = default_cache()
    name = f"makedumpfile-{architecture}-{suite}"
    root = (cache / name).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            fetch_unpacked(
                "makedumpfile", root, cache=cache, architecture=architecture, suite=suite
            )
    # By its own loader: links in the package lead out of the folder.
    loader = min(path for path in root.glob("**/ld*.so.[0-9]") if not path.is_symlink())
    libraries = ":".join(str(folder) for folder in (*root.glob("lib/*"), *root.glob("usr/lib/*")))
    program = str(root / "usr/bin/makedumpfile")
    words = [str(loader), "--library-path", libraries, program]
    return words if emulator is None else [emulator, *words]


def makedumpfile_for(image: str, release: str) -> list[str]:
    """Return one that tells the pages of an image's kernel apart; as `foreign_makedumpfile`.

    Args:
        image: Name of the image.
        release: Of its kernel.
    """
    if not release.startswith("6.1."):
        return foreign_makedumpfile(image, NEWER)
    return ["makedumpfile"] if image == "x86_64" else foreign_makedumpfile(image, _OF_LINUX_6_1)


def make_known_to_released_ones(dump: Path) -> None:
    """Let makedumpfile 1.7.8 tell pages of Linux 7.1 and newer apart, in an ELF core.

    The kernel renamed an entry of VMCOREINFO whose meaning for pages like these is the same
    (d50569612c29). makedumpfile knows the new name since f50c015, which is in no release.
    """
    with dump.open("r+b") as file, mmap(file.fileno(), 0) as content:
        earlier, known = _SAME_LENGTH
        if (at := content.find(earlier, 0, 1 << 20)) >= 0:
            content[at : at + len(known)] = known
