"""Whether the page tables of a vCPU, in a dump's memory, lead to where that vCPU is."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.architectures import Architecture, PageTableRoot
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.errors import DumpError
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.paging.tables import TableReader, roots_of_vcpus
from qemu_dump_ext.paging.walk import translate


class _Memory:
    """A dump as guest memory."""

    name = "dump"
    is_slow = False

    def __init__(self, dump: DumpFile) -> None:
        self._dump = dump

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        self._dump.read_into(gpa, buffer)

    def close(self) -> None:
        """Leave the dump to its owner."""


def page_tables_lead(
    dump: DumpFile, blocks: Sequence[RamBlock], architecture: Architecture, vcpu: Vcpu
) -> bool | None:
    """Tell whether page tables lead to where a vCPU is; None where it uses none.

    Args:
        dump: Has the memory.
        blocks: Where that is.
        architecture: Of the guest.
        vcpu: With its registers.
    """
    counter = vcpu.registers.get(architecture.program_counter)
    try:
        roots = roots_of_vcpus(architecture, [vcpu], native=False)
    except DumpError:
        return None
    roots = [root for root in roots if isinstance(root, PageTableRoot)]
    if not roots or counter is None:
        return None
    tables = TableReader(_Memory(dump), blocks)
    return any(translate(root, tables, counter) is not None for root in roots)
