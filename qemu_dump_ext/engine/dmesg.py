"""The kernel's log of a guest: of a live one, or of a dump."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from qemu_dump_ext.architectures import Architecture, Core, all_architectures
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers.kdump import KdumpFile
from qemu_dump_ext.errors import (
    CorruptDumpError,
    GuestMemoryFaultError,
    SourceError,
    UnsupportedTargetError,
)
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.linux.kernel_log import LogRecord, read_kernel_log
from qemu_dump_ext.linux.kernel_memory import KernelMemory, read_utsname
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.memory_sources import open_memory
from qemu_dump_ext.qemu.probe import probe_guest
from qemu_dump_ext.qemu.run_state import stopped
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_text

_UNKNOWN = "Unknown"
"""The machine in a kdump by QEMU of all but x86, and since 9.2 of every target."""

_RANGES_MAX = 1 << 20
"""More than a guest's memory has with every page left out that makedumpfile can leave out."""


@dataclass(frozen=True)
class GuestLog:
    """What was found.

    Attributes:
        records: Oldest first.
        remarks: Where the kernel's own description came from, if it had to be searched for.
        vmcoreinfo: That description: the text of VMCOREINFO.
    """

    records: Sequence[LogRecord]
    remarks: Sequence[str]
    vmcoreinfo: bytes


@dataclass(frozen=True)
class _Guest:
    architecture: Architecture
    core: Core
    memory: GuestMemory
    ram_blocks: Sequence[RamBlock]
    vcpus: Sequence[Vcpu] = ()

    def log(self, vmcoreinfo: bytes, kernel: str | None, seconds: float = math.inf) -> GuestLog:
        remarks: Sequence[str] = ()
        byte_order = self.core.byte_order
        if not vmcoreinfo or kernel is not None:
            search = NoteSearch(
                self.architecture,
                byte_order,
                self.memory,
                self.ram_blocks,
                self.vcpus,
                seconds=seconds,
            )
            result = search.find(kernel)
            if result.chosen is None:
                raise SourceError("; ".join(result.remarks), hint="is it a Linux guest?")
            vmcoreinfo, remarks = result.chosen.text, result.remarks
        kernel_memory = KernelMemory(self.architecture, self.memory, self.ram_blocks, vmcoreinfo)
        records = read_kernel_log(
            vmcoreinfo, kernel_memory.read, byte_order, kernel_memory.word_size
        )
        return GuestLog(tuple(records), remarks, vmcoreinfo)


def log_of_guest(access: GuestAccess, *, memory: str, kernel: str | None) -> GuestLog:
    """Read the log of a live guest; it is stopped meanwhile.

    Args:
        access: The ways to the guest.
        memory: Name of the memory source, or `auto`.
        kernel: Which kernel's, as `NoteSearch.find` takes it; None: the live one.

    Raises:
        SourceError: The guest cannot be reached, or has no log that can be read.
        RequestError: There is no such kernel.
    """
    with stopped(access.monitor):
        found = probe_guest(access)
        context = access.source_context(found.ram_blocks)
        core = found.architecture.select_core(found.vcpus, found.ram_blocks, MENDED, found.machine)
        with open_memory(memory, context) as opened:
            guest = _Guest(found.architecture, core, opened.memory, found.ram_blocks, found.vcpus)
            return guest.log(vmcoreinfo_text(found.guest_note or b"", core.byte_order), kernel)


class _DumpMemory:
    """A dump as guest memory; it begins at the gpa that the dump counts as 0.

    Where the dump is damaged, there is no memory: the rest of it is read all the same.
    """

    name = "dump"

    def __init__(self, dump: DumpFile, architecture: Architecture) -> None:
        self._dump = dump
        self._first = 0
        ranges = list(islice(dump.memory_ranges(), _RANGES_MAX + 1))
        if len(ranges) > _RANGES_MAX:
            raise CorruptDumpError(
                f"memory in more than {_RANGES_MAX} ranges: no guest has so many"
            )
        if architecture.pfn_from_phys_base and isinstance(dump, KdumpFile) and ranges:
            # QEMU's own dumps count from 0 nevertheless.
            base = dump.sub_header["phys_base"]
            self._first = base if ranges[0][0] < base else 0
        self.blocks = [RamBlock(self._first + gpa, size, "", 0) for gpa, size in ranges]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        try:
            self._dump.read_into(gpa - self._first, buffer)
        except CorruptDumpError as error:
            raise GuestMemoryFaultError(gpa, len(buffer), str(error)) from error

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        first = self._first
        return [
            (start + first, end + first) for start, end in self._dump.populated(gpa - first, size)
        ]

    def close(self) -> None:
        """Leave the dump to its owner."""


def log_of_dump(dump: DumpFile, *, kernel: str | None, seconds: float = math.inf) -> GuestLog:
    """Read the log in a dump.

    Args:
        dump: Not used by anyone else meanwhile.
        kernel: Which kernel's, as `NoteSearch.find` takes it; None: the live one.
        seconds: How long VMCOREINFO may be searched for, where the dump has none.

    Raises:
        SourceError: It has no log that can be read.
        RequestError: There is no such kernel.
        CorruptDumpError: The dump's headers or notes are damaged.
    """
    architecture, core = _architecture_of(dump)
    memory = _DumpMemory(dump, architecture)
    guest = _Guest(architecture, core, memory, memory.blocks)
    return guest.log(dump.vmcoreinfo or b"", kernel, seconds)


def _architecture_of(dump: DumpFile) -> tuple[Architecture, Core]:
    machine = dump.header.get("e_machine", dump.header.get("machine"))
    fitting = [
        (architecture, core)
        for architecture in all_architectures().values()
        for core in architecture.cores
        if (core.byte_order, core.word_size) == (dump.byte_order, dump.word_size)
        and architecture.kernel_page_tables is not None
    ]
    for architecture, core in fitting:
        if machine in {core.e_machine, core.uname_machine, architecture.qemu_uname_machine} - {
            _UNKNOWN
        }:
            return architecture, core
    if machine in {_UNKNOWN, ""}:
        # The kernel's own name is found only where addresses are translated rightly.
        for architecture, core in fitting:
            memory = _DumpMemory(dump, architecture)
            name = read_utsname(memory, architecture, memory.blocks, dump.vmcoreinfo or b"")
            if name.machine and name.machine == core.uname_machine:
                return architecture, core
    raise UnsupportedTargetError(f"the kernel's log of a guest of machine {machine!r} is not read")
