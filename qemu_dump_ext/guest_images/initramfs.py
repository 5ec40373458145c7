"""Build the initial RAM disk of a guest: busybox, kernel modules and an `/init` of ours.

The same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shlex
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest_images.manifest import GuestImage
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

_CPIO_MAGIC = b"070701"  # "newc": Documentation/driver-api/early-userspace/buffer-format.rst
_CPIO_TRAILER = "TRAILER!!!"
_DIRECTORIES = ("bin", "dev", "fill", "modules", "proc", "sys")
_MODULE_FILE = re.compile(r"(?P<name>[^/]+)\.ko(?:\.(?:xz|gz|zst))?")

_INIT = """\
#!/bin/busybox sh
# $fill_mib comes from the kernel command line: MiB to copy from the disk into guest memory.
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
fail() {{ echo "init: $1 failed"; exit 1; }} # the kernel panics when init ends

for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    insmod "$module" || fail "insmod $module"
done
mkfifo /dev/never
for process in {processes}; do
    "/bin/$process" &
done
if [ -n "$fill_mib" ]; then
    mount -t tmpfs -o size=100% fill /fill
    # Direct, so that the page cache has no second copy.
    dd if=/dev/vda of=/fill/content bs=1M count="$fill_mib" iflag=direct 2>/dev/null || fail fill
fi
stty -echo
echo {kernel_log} >/dev/kmsg
echo # the firmware or the kernel may have left a line unfinished
echo {marker}
while :; do
    while read -r line; do
        (eval "$line") # a subshell, so that no mistake ends init
    done
    sleep 1
done
"""

_PROCESS = """\
#!/bin/busybox sh
read -r _ </dev/never
"""


class CpioEntry(Value):
    """A file, directory or character device of the archive.

    Attributes:
        name: Path without a leading slash.
        mode: `st_mode`.
        content: The content of a regular file.
        device: Major and minor number of a device.
    """

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def write_cpio(entries: Iterable[CpioEntry]) -> bytes:
    """Return an archive in the kernel's `newc` format; owner is root, every time is 0."""
    archive = bytearray()
    trailer = CpioEntry(_CPIO_TRAILER, 0)
    for inode, entry in enumerate((*entries, trailer), start=1):
        name = entry.name.encode() + b"\0"
        numbers = (
            inode,
            entry.mode,
            *(0, 0),  # uid, gid
            2 if stat.S_ISDIR(entry.mode) else 1,  # links
            0,  # mtime
            len(entry.content),
            *(0, 0),  # device of the file system
            *entry.device,
            len(name),
            0,  # checksum: none in this format
        )
        archive += _CPIO_MAGIC + b"".join(b"%08x" % number for number in numbers) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def read_module(path: Path) -> bytes:
    """Return a kernel module, decompressed."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            zstandard = import_package("zstandard", path.name)
            unpacked: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(data)
            return unpacked
        case _:
            return data


def module_dependencies(module: bytes) -> list[str]:
    """Return the names that the `.modinfo` section of a kernel module lists under `depends`.

    Packages come without `modules.dep`, which depmod writes at installation.
    """
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return match[1].decode().split(",") if match and match[1] else []


def load_order(modules_folder: Path, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return modules and their dependencies, each after what it needs, with content.

    Args:
        modules_folder: `lib/modules/RELEASE`.
        wanted: Names; `-` and `_` are the same. What is built into the kernel is left out.

    Raises:
        RequestError: The kernel does not have one of them.
    """
    files: dict[str, Path] = {}
    for path in sorted(modules_folder.rglob("*.ko*")):
        if match := _MODULE_FILE.fullmatch(path.name):
            files[_canonical(match["name"])] = path
    builtin_list = modules_folder / "modules.builtin"
    builtin = {_canonical(Path(line).stem) for line in builtin_list.read_text().splitlines()}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = _canonical(name)
        if name in ordered or name in builtin:
            return
        if name not in files:
            raise RequestError(f"kernel {modules_folder.name} has no module {name}")
        content = read_module(files[name])
        for dependency in module_dependencies(content):
            add(dependency)
        ordered[name] = content

    for name in wanted:
        add(name)
    return list(ordered.items())


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def build_initramfs(image: GuestImage, *, busybox: Path, modules_folder: Path, fill: bool) -> bytes:
    """Return the gzip-compressed initial RAM disk of a guest.

    Args:
        image: Says which modules and processes, and what `/init` says.
        busybox: A static one of the guest's architecture.
        modules_folder: `lib/modules/RELEASE` of its kernel.
        fill: Load the modules for the disk to fill guest memory from.

    Raises:
        RequestError: The kernel lacks a module.
    """
    init = _INIT.format(
        processes=" ".join(map(shlex.quote, image.processes)),
        kernel_log=shlex.quote(image.kernel_log),
        marker=shlex.quote(image.marker),
    )
    wanted = (*image.modules, *(image.fill_modules if fill else ()))
    program = stat.S_IFREG | 0o755
    entries = [CpioEntry(name, stat.S_IFDIR | 0o755) for name in _DIRECTORIES]
    entries += [
        CpioEntry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        CpioEntry("bin/busybox", program, busybox.read_bytes()),
        CpioEntry("init", program, init.encode()),
    ]
    entries += [CpioEntry(f"bin/{name}", program, _PROCESS.encode()) for name in image.processes]
    entries += [
        CpioEntry(f"modules/{number:03}-{name}.ko", stat.S_IFREG | 0o644, content)
        for number, (name, content) in enumerate(load_order(modules_folder, wanted))
    ]
    return gzip.compress(write_cpio(entries), compresslevel=1, mtime=0)
