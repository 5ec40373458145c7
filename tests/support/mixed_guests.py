"""x86_64 guests with pages of every kind that a kernel tells apart, made by a program of ours."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import GuestImage, default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.page_flags import PageFlags
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

MEMORY_MIB = 512
_BALLOONED_MIB = 32
_SECTOR = 512
_MODULES = ("virtio_pci", "virtio_blk", "virtio_balloon")
_SOURCE = Path(__file__).parent / "guest_programs/mixer.c"
_OFFLINE = "echo offline >/sys/devices/system/memory/memory$n/state && break 2"
# Each line by itself is a command of the guest's shell.
_MIX = f"""while :; do for n in 2 1 3; do {_OFFLINE}; done; sleep 1; done
dd if=/dev/vda of=/bin/mixer bs=512; chmod +x /bin/mixer
mkswap /dev/vdb; swapon /dev/vdb
echo 8 >/proc/sys/vm/nr_hugepages
echo always >/sys/kernel/mm/transparent_hugepage/enabled
echo 1 >/sys/kernel/mm/ksm/run; echo 5000 >/sys/kernel/mm/ksm/pages_to_scan
mkdir /huge /tmp; mount -t tmpfs -o huge=always huge /huge
dd if=/dev/vda of=/huge/file bs=1M count=16
dd if=/dev/vdb of=/dev/null bs=1M count=16
mixer >/tmp/mixed &
while ! grep -q "mixer is" /tmp/mixed; do sleep 1; done
while grep -q '^0' /sys/kernel/mm/ksm/pages_sharing; do sleep 1; done
cat /tmp/mixed; grep . /sys/kernel/mm/ksm/pages_sharing /sys/devices/system/memory/memory*/state
grep -E 'AnonHuge|ShmemHuge|HugePages_Total|SwapCached|HardwareCorrupted|MemFree' /proc/meminfo
echo it is "mixed"
"""


def of_suite(suite: str | None) -> GuestImage:
    """Return the x86_64 image with the kernel of a suite of Debian; None: the usual one."""
    image = find_image("x86_64")
    if suite is None:
        return replace(image, modules=_MODULES)
    packages = {"debian": replace(image.packages["debian"], suite=suite, debug_symbols=None)}
    name = f"x86_64-{suite}"
    return replace(image, name=name, packages=packages, devices=(), modules=_MODULES)


@dataclass(frozen=True)
class MixedGuest:
    """A guest that stands still.

    Attributes:
        machine: The guest.
        flags: What its kernel said of its pages just before.
        told: What is in its memory, by its console.
    """

    machine: BootedGuest
    flags: PageFlags
    told: str


@contextmanager
def mixed_guest(suite: str | None, folder: Path) -> Iterator[MixedGuest]:
    """Boot a guest, fill its memory with pages of all kinds, and stop it.

    Args:
        suite: Of its kernel, as of `of_suite`.
        folder: For disks of the guest.
    """
    image = of_suite(suite)
    program, swap = folder / "mixer", folder / "swap"
    argv = ["gcc", "-O1", "-static", "-o", str(program), str(_SOURCE)]
    subprocess.run(argv, check=True)
    size = program.stat().st_size
    with program.open("r+b") as file:
        file.truncate(-(-size // _SECTOR) * _SECTOR)
    with swap.open("wb") as file:
        file.truncate(64 << 20)
    arguments = ["-device", "virtio-balloon,id=balloon"]
    for name, path in (("program", program), ("swap", swap)):
        arguments += ["-drive", f"id={name},if=none,format=raw,file={path}"]
        arguments += ["-device", f"virtio-blk,drive={name}"]
    with BootedGuest(
        image,
        ImageStore(default_cache()).fetch(image),
        memory_mib=MEMORY_MIB,
        # Where the kernel itself lies, no memory can be taken offline.
        kernel_arguments="movablecore=256M nokaslr",
        arguments=arguments,
    ) as guest:
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            guest.send_console(_MIX)
            guest.wait_for_console(re.compile("^it is mixed", re.MULTILINE), timeout_seconds=300)
            wanted = MEMORY_MIB - _BALLOONED_MIB << 20
            qmp.execute("balloon", value=wanted)
            wait_until(
                lambda: qmp.execute("query-balloon")["actual"] == wanted, "the balloon is blown up"
            )
            flags = PageFlags(guest)
            qmp.execute("stop")
        yield MixedGuest(guest, flags, guest.console_text())
