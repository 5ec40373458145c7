"""Linux of every target in the manifest but x86_64, each booted once for all tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, load_manifest
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

IMAGES = {name: image for name, image in load_manifest().items() if name != "x86_64"}
# QEMU 7.2 cannot load the kernel; the package has a QEMU that can.
NEWER_QEMU = {"loongarch64": "qemu-system-misc"}
# gdb 13 does not know the architecture at all: it shows nothing of a core.
NOT_BY_GDB = ("loongarch64",)
# What a gdb without symbols has to be told to connect at all.
BEFORE_CONNECTING = {
    "loongarch64": ["set architecture alpha"],
    "mips64el": ["set architecture mips:isa64r2", "set endian little"],
    "mipsel": ["set architecture mips:isa32r2", "set endian little"],
}
# The emulator translates what the running code may reach; the first vCPU must be in the kernel, and
# not in firmware, for which an address is translated to itself.
KERNEL_ADDRESSES = {
    "mips64el": 0xFFFFFFFF80000000,
    "mipsel": 0x80000000,
    "riscv64": 0xFFFFFFFF80000000,
}


def of_guests(*names: str) -> pytest.MarkDecorator:
    """Run a test with each of these guests; those of one guest run one behind the other."""
    return pytest.mark.parametrize("guest", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def guest(request: pytest.FixtureRequest) -> Iterator[BootedGuest]:
    """A stopped guest, one target after the other, with everything that it logs on its console."""
    image = IMAGES[request.param]
    arguments = re.sub(r"\bquiet\b", "ignore_loglevel", image.kernel_arguments)
    newer = NEWER_QEMU.get(image.name)
    command = newer_qemu_command(image.target, newer) if newer else None
    files = ImageStore(default_cache()).fetch(image)
    with BootedGuest(replace(image, kernel_arguments=arguments), files, command=command) as booted:
        with RawQmp(booted.qmp_sockets[1]) as qmp:
            stop_in_kernel(qmp, KERNEL_ADDRESSES.get(image.name))
        yield booted


def gpas_of(qmp: RawQmp, guest: BootedGuest, gva: int) -> set[int]:
    """Return the pages (gpa in 4 KiB) to which QEMU's own MMU translates an address, per vCPU."""
    answers = [
        qmp.execute(
            "human-monitor-command", **{"command-line": f"gva2gpa {gva:#x}", "cpu-index": vcpu}
        )
        for vcpu in range(guest.image.cpus)
    ]
    # For some targets it tells the page only.
    return {int(answer[5:], 16) >> 12 for answer in answers if answer.startswith("gpa: ")}


def stop_in_kernel(qmp: RawQmp, address: int | None) -> None:
    """Stop a guest where its first vCPU is in its kernel; with no address, wherever it is."""

    def is_in_kernel() -> bool:
        qmp.execute("stop")
        if address is None:
            return True
        line = {"command-line": f"gva2gpa {address:#x}"}
        answer = qmp.execute("human-monitor-command", **line)
        if answer.startswith("gpa: ") and int(answer[5:], 16) != address:
            return True
        qmp.execute("cont")
        return False

    wait_until(is_in_kernel, "the guest is in its kernel")
