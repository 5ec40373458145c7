"""What a dump has of a guest, with the face of one that stands still."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from qemu_dump_ext.architectures import Architecture, Core, all_architectures
from qemu_dump_ext.dump_readers import DumpFile
from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError, UnsupportedTargetError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.linux.kernel_memory import read_utsname
from qemu_dump_ext.structures.elf_notes import encode_note
from qemu_dump_ext.structures.vmcoreinfo import VMCOREINFO_NOTE_NAME

_UNKNOWN = "Unknown"
"""The machine in a kdump by QEMU of all but x86, and since 9.2 of every target."""
_RANGES_MAX = 1 << 20
"""More than a guest's memory has with every page left out that makedumpfile can leave out."""


class _DumpMemory:
    """A dump as guest memory; it begins at the gpa that the dump counts as 0.

    Where the dump is damaged, there is no memory: the rest of it is read all the same.
    """

    name = "dump"
    is_slow = False
    is_at_hand = True

    def __init__(self, dump: DumpFile, architecture: Architecture) -> None:
        self._dump = dump
        self._first = 0
        ranges = list(islice(dump.memory_ranges(), _RANGES_MAX + 1))
        if len(ranges) > _RANGES_MAX:
            raise CorruptDumpError(
                f"memory in more than {_RANGES_MAX} ranges: no guest has so many"
            )
        base = dump.phys_base
        if architecture.pfn_from_phys_base and base is not None and ranges:
            # QEMU's own dumps count from 0 nevertheless.
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


class StoredGuest(GuestView):
    """The guest in a dump.

    Attributes:
        dump: Stays its opener's to close.
    """

    def __init__(self, dump: DumpFile, *, search_seconds: float = math.inf) -> None:
        """Find out what guest it was.

        Args:
            dump: Not used by anyone else meanwhile.
            search_seconds: How long VMCOREINFO may be searched for, where the dump has none.

        Raises:
            UnsupportedTargetError: Nothing tells.
            CorruptDumpError: The dump's headers or notes are damaged.
        """
        super().__init__()
        self.dump = dump
        self._search_seconds = search_seconds
        self.architecture, self.core = _architecture_of(dump)
        self._memory = _DumpMemory(dump, self.architecture)
        self.ram_blocks = self._memory.blocks
        self.vcpus = ()

    @property
    def memory(self) -> GuestMemory:
        """Guest physical memory, as far as it is in the dump."""
        return self._memory

    def _known_vmcoreinfo(self) -> Vmcoreinfo | None:
        text = self.dump.vmcoreinfo
        if not text:
            return None
        return Vmcoreinfo(encode_note(VMCOREINFO_NOTE_NAME, 0, text, self.core.byte_order), text)


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
