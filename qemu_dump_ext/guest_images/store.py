"""What has been fetched: a folder for each guest, complete or absent."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest_images.debian_packages import (
    Distribution,
    Package,
    PackageArchive,
    this_distribution,
    unpack,
    unpack_members,
)
from qemu_dump_ext.guest_images.manifest import GuestImage, PackageSpec
from qemu_dump_ext.value import Value

_KERNEL_PACKAGES = re.compile(r"linux-(?:image|modules|binary|base)-.+")
"""The package named image may have only some of the parts, and depend on those with the others."""
_BUSYBOX_PACKAGE = "busybox-static"
_RECORD_NAME = "image.json"
_MIB = 1 << 20

Report = Callable[[str], None]
"""Is told, in a few words, what is being done."""


def _be_quiet(_step: str) -> None:
    pass


class FetchedImage(Value):
    """The files of a guest.

    Attributes:
        folder: Has all of them.
        release: `uname -r`.
        version: The version of the kernel's meta package, which its debug symbols' has too.
        kernel: What QEMU boots.
        busybox: Static, of the guest's architecture.
        modules_folder: `lib/modules/RELEASE`.
        vmlinux: The kernel's vmlinux with DWARF; None: not fetched.
        system_map: None: not fetched.
    """

    folder: Path
    release: str
    version: str
    kernel: Path
    busybox: Path
    modules_folder: Path
    vmlinux: Path | None
    system_map: Path | None


class ImageStore:
    """A cache folder.

    Attributes:
        folder: May be used by several processes at once, and be deleted when none does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, image: GuestImage) -> FetchedImage | None:
        """Return what has been fetched of a guest; None: nothing, or of other packages."""
        folder = self.folder / image.name
        try:
            record = json.loads((folder / _RECORD_NAME).read_text("utf-8"))
        except FileNotFoundError:
            return None
        if record["packages"] not in [asdict(spec) for spec in image.packages.values()]:
            return None
        root = folder / "root"
        debug = folder / "debug/usr/lib/debug/boot"
        return FetchedImage(
            folder=folder,
            release=record["release"],
            version=record["version"],
            kernel=root / record["kernel"],
            busybox=root / record["busybox"],
            modules_folder=root / record["modules"],
            vmlinux=next(debug.glob("vmlinux-*"), None),
            system_map=next(debug.glob("System.map-*"), None),
        )

    def fetch(
        self, image: GuestImage, *, debug_symbols: bool = False, report: Report = _be_quiet
    ) -> FetchedImage:
        """Return the files of a guest, downloading what is not there yet.

        Args:
            image: Which one.
            debug_symbols: Also its `vmlinux` and `System.map`.
            report: Is told the steps.

        Raises:
            RequestError: The manifest has no packages for this distribution.
            SourceError: The packages cannot be had.
        """
        with self._locked():
            fetched = self.find(image)
            complete = fetched and (fetched.vmlinux or not debug_symbols)
            if fetched and complete:
                return fetched
            distribution = this_distribution(image.packages)
            spec = image.packages[distribution.name]
            archive = self.archive(distribution, spec.architecture, spec.suite)
            report(f"reading the package index ({spec.architecture})")
            if complaint := archive.update():
                report(f"going on with part of the index, or an old one: {complaint}")
            if not fetched:
                fetched = self._fetch_kernel(image, spec, archive, report)
            if debug_symbols:
                self._fetch_debug_symbols(spec, archive, fetched, report)
            complete_image = self.find(image)
        if complete_image is None:
            raise SourceError(f"{self.folder / image.name} vanished")
        return complete_image

    def archive(
        self, distribution: Distribution, architecture: str, suite: str | None
    ) -> PackageArchive:
        """Return the packages of an architecture and suite, with the index kept in this cache."""
        return PackageArchive(
            self.folder / "apt", distribution=distribution, architecture=architecture, suite=suite
        )

    def fill_disk(self, size_mib: int) -> Path:
        """Return a file of at least `size_mib` MiB of what file systems are made of, never zeros.

        Its content is this machine's libraries, so that it compresses like a real guest's memory.
        """
        path = self.folder / "fill.raw"
        with self._locked():
            if not path.exists() or path.stat().st_size < size_mib * _MIB:
                with self._aside("fill.raw") as aside:
                    _write_file_content(aside, size_mib * _MIB)
                    aside.replace(path)
        return path

    def _fetch_kernel(
        self, image: GuestImage, spec: PackageSpec, archive: PackageArchive, report: Report
    ) -> FetchedImage:
        kernel_packages = archive.find_with_dependencies(spec.kernel, _KERNEL_PACKAGES)
        packages = [*kernel_packages, archive.find(_BUSYBOX_PACKAGE)]
        size_mib = sum(package.size for package in packages) / _MIB
        named = max(kernel_packages, key=_size)
        report(f"downloading {named.name} {named.version}, {size_mib:.0f} MiB")
        with self._aside(image.name) as aside:
            root = aside / "root"
            downloads = aside / "downloads"
            for folder in (root, downloads):
                folder.mkdir(parents=True)
            archives = archive.download(packages, downloads)
            report("unpacking")
            unpack(archives, root)
            shutil.rmtree(downloads)
            kernel = _only(root, "boot/vmlinu[xz]-*", "usr/lib/modules/*/vmlinu[xz]")
            modules = _only(root, "lib/modules/*", "usr/lib/modules/*")
            record = {
                "packages": asdict(spec),
                "release": modules.name,
                "version": kernel_packages[0].version,
                "kernel": str(kernel.relative_to(root)),
                "busybox": str(_only(root, "bin/busybox", "usr/bin/busybox").relative_to(root)),
                "modules": str(modules.relative_to(root)),
            }
            (aside / _RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            shutil.rmtree(self.folder / image.name, ignore_errors=True)
            aside.rename(self.folder / image.name)
        fetched = self.find(image)
        if fetched is None:
            raise SourceError(f"{self.folder / image.name} vanished")
        return fetched

    def _fetch_debug_symbols(
        self, spec: PackageSpec, archive: PackageArchive, fetched: FetchedImage, report: Report
    ) -> None:
        if spec.debug_symbols is None:
            raise RequestError("the manifest names no debug symbols for this guest")
        try:
            packages = archive.find_with_dependencies(
                spec.debug_symbols, _KERNEL_PACKAGES, fetched.version
            )
        except SourceError as error:
            raise SourceError(
                f"the archive no longer has the debug symbols of {fetched.version}",
                hint=f"delete {fetched.folder} and fetch again",
            ) from error
        package = max(packages, key=_size)
        report(f"downloading {package.name} {package.version}, {package.size / _MIB:.0f} MiB")
        with self._aside("debug") as aside:
            downloads, root = aside / "downloads", aside / "root"
            for folder in (root, downloads):
                folder.mkdir(parents=True)
            [download] = archive.download([package], downloads)
            report("unpacking")
            # The modules' symbols, two thirds of the package, stay where they are.
            unpack_members(download, ["./usr/lib/debug/boot/*"], root)
            root.rename(fetched.folder / "debug")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise SourceError(f"cannot use {self.folder}: {error}", hint="--cache DIR") from error

    @contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        """Give a path that is not there yet; whatever is left of it is removed."""
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.folder))
        try:
            yield folder / "new"
        finally:
            shutil.rmtree(folder)


def _size(package: Package) -> int:
    return package.size


def _only(root: Path, *patterns: str) -> Path:
    found = sorted(path for pattern in patterns for path in root.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"the packages have {len(found)} files {' or '.join(patterns)}, not one")
    return found[0]


def _write_file_content(path: Path, size: int) -> None:
    """Write `size` bytes taken from the files of `/usr/lib`, again and again if they are few."""
    written = 0
    with path.open("wb") as disk:
        while written < size:
            before = written
            for folder, subfolders, names in os.walk("/usr/lib"):
                subfolders.sort()
                for name in sorted(names):
                    source = Path(folder, name)
                    if written < size and source.is_file() and not source.is_symlink():
                        written += disk.write(source.read_bytes()[: size - written])
            if written == before:
                raise SourceError("/usr/lib has no content to fill guest memory with")
