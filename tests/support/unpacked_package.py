"""A Debian package of another suite or architecture, unpacked with all it needs, not installed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qemu_dump_ext.guest_images.debian_packages import PackageArchive, this_distribution, unpack


def fetch_unpacked(
    package: str, root: Path, *, cache: Path, architecture: str, suite: str | None
) -> None:
    """Unpack a package into `root`, which appears when it is complete.

    Args:
        package: Its name.
        root: A folder in `cache` that is not there yet.
        cache: Where apt's files are, too.
        architecture: As Debian names it.
        suite: None: that of this machine.

    Raises:
        DumpError: It cannot be had, or this is not Debian.
    """
    archive = PackageArchive(
        cache / "apt",
        distribution=this_distribution(["debian"]),
        architecture=architecture,
        suite=suite,
    )
    archive.update()
    with tempfile.TemporaryDirectory(prefix=f".{package}-", dir=cache) as name:
        downloads, unpacked = Path(name, "downloads"), Path(name, "root")
        downloads.mkdir()
        unpacked.mkdir()
        unpack(archive.download_closure([package], downloads), unpacked)
        unpacked.rename(root)
