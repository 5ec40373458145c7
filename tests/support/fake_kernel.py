"""Guest memory made up in a test: kernels with a name, a VMCOREINFO, page tables and a log."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest.model import RamBlock, Vcpu

KERNEL_MAP = 0xFFFFFFFF80000000
UTS_AT, TABLES_AT, NOTE_AT, TEXT_AT, LOG_AT = 0x10000, 0x20000, 0x30000, 0x32000, 0x40000
"""From the kernel's first byte on."""


class FlatMemory:
    """RAM from 0 on."""

    name = "flat"
    is_slow = False

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.blocks = [RamBlock(0, size, "ram", 0)]
        self.reads = self.largest_read = 0

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        if gpa < 0 or gpa + len(buffer) > len(self.data):
            raise GuestMemoryFaultError(gpa, len(buffer), "no memory")
        self.reads += 1
        self.largest_read = max(self.largest_read, len(buffer))
        buffer[:] = self.data[gpa : gpa + len(buffer)]

    def close(self) -> None:
        pass

    def put(self, gpa: int, content: bytes) -> None:
        self.data[gpa : gpa + len(content)] = content

    def put_entries(self, gpa: int, entries: dict[int, int]) -> None:
        for index, entry in entries.items():
            struct.pack_into("<Q", self.data, gpa + 8 * index, entry)


def vmcoreinfo(release: str, phys_base: int, *lines: str) -> bytes:
    known = (
        f"OSRELEASE={release}",
        "PAGESIZE=4096",
        f"SYMBOL(init_uts_ns)={KERNEL_MAP + UTS_AT:x}",
        "OFFSET(uts_namespace.name)=4",
        f"SYMBOL(swapper_pg_dir)={KERNEL_MAP + TABLES_AT:x}",
        f"NUMBER(phys_base)={phys_base}",
    )
    return "".join(f"{line}\n" for line in (*known, *lines)).encode()


def elf_note(text: bytes) -> bytes:
    header = struct.pack("<III", 11, len(text), 0) + b"VMCOREINFO\0\0"
    return header + text + b"\0" * (-len(text) % 4)


def plant_kernel(
    memory: FlatMemory, phys_base: int, release: str, *lines: str, named: str | None = None
) -> int:
    """Put a kernel at `phys_base`, a multiple of 2 MiB; return the gpa of its page tables.

    Args:
        memory: Where.
        phys_base: Its first byte.
        release: What its VMCOREINFO says.
        lines: More of VMCOREINFO.
        named: What its own name says; `release` if None.
    """
    text = vmcoreinfo(release, phys_base, *lines)
    memory.put(phys_base + NOTE_AT, elf_note(text))
    memory.put(phys_base + TEXT_AT, text)
    strings = ("Linux", "(none)", named or release, "#1 SMP", "x86_64", "")
    memory.put(phys_base + UTS_AT + 4, b"".join(s.encode().ljust(65, b"\0") for s in strings))
    top = phys_base + TABLES_AT
    memory.put_entries(top, {511: top + 0x1000 | 1})
    memory.put_entries(top + 0x1000, {510: top + 0x2000 | 1})
    memory.put_entries(top + 0x2000, {i: phys_base + (i << 21) | 0x81 for i in range(2)})
    return top


def vcpus_with(*roots: int) -> Sequence[Vcpu]:
    """Return vCPUs in long mode, each with page tables."""
    return [
        Vcpu(index, {"cr0": 0x80000011, "cr3": root, "cr4": 0x20, "efer": 0x500})
        for index, root in enumerate(roots)
    ]
