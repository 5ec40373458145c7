"""Memory at the addresses of the Windows kernel, as QEMU's own debugger reads it.

Source: QEMU softmmu/physmem.c cpu_memory_rw_debug(); target/i386/helper.c
x86_cpu_get_phys_page_attrs_debug().
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qemu_dump_ext.architectures import AddressWindow, Architecture, PageTableRoot, Translation
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu, block_at
from qemu_dump_ext.pages.patched_memory import PatchedMemory
from qemu_dump_ext.paging.tables import TableReader, roots_of_vcpus
from qemu_dump_ext.paging.walk import translate_by
from qemu_dump_ext.structures.c_struct import U32_MAX, U64_MAX
from qemu_dump_ext.structures.win_dmp import PAGE_SIZE
from qemu_dump_ext.value import Value

_EVERYTHING = AddressWindow(0, U64_MAX + 1, 0)
_32_BITS = 32


class WindowsGuest(Value):
    """A guest that does not change, and may run Windows.

    Attributes:
        architecture: Of the guest.
        vcpus: In QEMU's order.
        memory: Guest physical memory.
        ram_blocks: Where the guest has memory, by ascending gpa.
    """

    architecture: Architecture
    vcpus: Sequence[Vcpu]
    memory: GuestMemory
    ram_blocks: Sequence[RamBlock]

    def system_memory(self, directory_table_base: int, vcpu: Vcpu | None = None) -> SystemMemory:
        """Return memory as a process of the guest sees it.

        Args:
            directory_table_base: Of that process.
            vcpu: Whose mode decides how tables are read; None: the first one.

        Raises:
            SourceError: No source gives a register that tells.
        """
        deciding = vcpu or self.vcpus[0]
        registers: Mapping[str, int] = {**deciding.registers, "cr3": directory_table_base}
        roots = roots_of_vcpus(
            self.architecture, [replace(deciding, registers=registers)], native=False
        )
        return SystemMemory(roots or (_EVERYTHING,), self.memory, self.ram_blocks)


class SystemMemory:
    """Guest memory through page tables, and what is stored in it without the guest seeing that.

    Attributes:
        patches: What was stored: gpa and bytes, in order.
        pointer_size: Of code in this mode, in bytes; None: there are no page tables.
    """

    def __init__(
        self,
        translations: Sequence[Translation],
        memory: GuestMemory,
        ram_blocks: Sequence[RamBlock],
    ) -> None:
        """Begin with nothing stored.

        Args:
            translations: From virtual to physical addresses.
            memory: Guest physical memory.
            ram_blocks: Where the guest has memory, by ascending gpa.
        """
        self.patches: list[tuple[int, bytes]] = []
        self._memory = memory
        self._blocks = ram_blocks
        self._translations = translations
        narrow = any(
            isinstance(one, PageTableRoot) and one.geometry.address_bits == _32_BITS
            for one in translations
        )
        self._mask = U32_MAX if narrow else U64_MAX
        paged = any(isinstance(one, PageTableRoot) for one in translations)
        self.pointer_size = (4 if narrow else 8) if paged else None
        self._lay_patches()

    def _lay_patches(self) -> None:
        self._patched = PatchedMemory(self._memory, self.patches)
        self._tables = TableReader(self._patched, self._blocks)

    def read_some(self, gva: int, size: int) -> tuple[bytes, bool]:
        """Return memory up to what cannot be had, and whether that is all of it.

        What is mapped to no memory counts as zeros that cannot be had.

        Raises:
            GuestMemoryFaultError: Memory that the guest has cannot be read.
        """
        data = bytearray()
        while len(data) < size:
            place = self._place(gva + len(data), size - len(data))
            if place is None:
                return bytes(data), False
            gpa, count = place
            part = bytearray(count)
            if block_at(self._blocks, gpa) is None:
                return bytes(data + part), False
            self._patched.read_into(gpa, memoryview(part))
            data += part
        return bytes(data), True

    def read(self, gva: int, size: int) -> bytes | None:
        """Return memory, or None where not all of it can be had; errors as `read_some`."""
        data, whole = self.read_some(gva, size)
        return data if whole else None

    def read_integer(self, gva: int, size: int) -> int | None:
        """Return an unsigned integer of `size` bytes, or None likewise; errors as `read_some`."""
        data = self.read(gva, size)
        return None if data is None else int.from_bytes(data, "little")

    def store(self, gva: int, data: bytes) -> bool:
        """Have all later reads, and the dump, see `data` at an address; False where it is none."""
        done = 0
        patches: list[tuple[int, bytes]] = []
        while done < len(data):
            place = self._place(gva + done, len(data) - done)
            if place is None or block_at(self._blocks, place[0]) is None:
                return False
            gpa, count = place
            patches.append((gpa, data[done : done + count]))
            done += count
        self.patches += patches
        self._lay_patches()
        return True

    def _place(self, gva: int, size: int) -> tuple[int, int] | None:
        """Return gpa and size of what lies in one page, and in one RAM block or in none."""
        gva &= self._mask
        found = translate_by(self._translations, self._tables, gva)
        if found is None:
            return None
        gpa, left = found
        block = block_at(self._blocks, gpa)
        end = gpa + left if block is None else block.end
        return gpa, min(size, PAGE_SIZE - gva % PAGE_SIZE, left, end - gpa)
