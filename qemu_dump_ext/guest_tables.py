"""Read page tables of a stopped guest, and collect what they map."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from qemu_dump_ext.architectures._declaration import Architecture
from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest import GuestMemory, RamBlock, Vcpu
from qemu_dump_ext.memory_mapping import NativeMappingList, Segment
from qemu_dump_ext.page_table_walk import MemoryMap, PageTableRoot, PageTableWalker, WalkBudget

_CHUNK = 1 << 16
_CHUNKS_KEPT = 512


class TableReader:
    """Reads tables, with what lies around them: tables are often neighbours. Bounded cache."""

    def __init__(self, memory: GuestMemory, ram_blocks: Sequence[RamBlock]) -> None:
        self._memory = memory
        self._blocks = ram_blocks
        self._ends = [block.end for block in ram_blocks]
        self._chunks: dict[tuple[int, int], bytes] = {}

    def __call__(self, gpa: int, size: int) -> bytes:
        """Return guest memory; what is in no RAM block, and what cannot be read, is zero."""
        parts = []
        end = gpa + size
        while gpa < end:
            index = bisect_right(self._ends, gpa)
            block = self._blocks[index] if index < len(self._blocks) else None
            if block is None or block.gpa >= end:
                parts.append(bytes(end - gpa))
                break
            if gpa < block.gpa:
                parts.append(bytes(block.gpa - gpa))
                gpa = block.gpa
            start = max(gpa & -_CHUNK, block.gpa)
            chunk = self._chunk(start, min((gpa & -_CHUNK) + _CHUNK, block.end))
            part = chunk[gpa - start : end - start]
            parts.append(part)
            gpa += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, start: int, end: int) -> bytes:
        found = self._chunks.get((start, end))
        if found is None:
            if len(self._chunks) >= _CHUNKS_KEPT:
                self._chunks.clear()
            buffer = bytearray(end - start)
            try:
                self._memory.read_into(start, memoryview(buffer))
            except GuestMemoryFaultError:
                buffer = bytearray(end - start)
            found = self._chunks[start, end] = bytes(buffer)
        return found


def page_table_roots(
    architecture: Architecture, vcpu: Vcpu, *, native: bool
) -> Sequence[PageTableRoot]:
    """Return where the page tables of a vCPU begin; empty where it uses none.

    Raises:
        SourceError: No source gives a register that tells.
    """
    if architecture.page_table_roots is None:
        return ()
    try:
        return architecture.page_table_roots(vcpu.registers, native)
    except KeyError as error:
        raise SourceError(
            f"vCPU {vcpu.index}: no source gives {error}, which paging needs"
        ) from error


def roots_of_vcpus(
    architecture: Architecture, vcpus: Sequence[Vcpu], *, native: bool
) -> list[PageTableRoot]:
    """Return the page tables of all vCPUs, in the order of QEMU's walk."""
    return [root for vcpu in vcpus for root in page_table_roots(architecture, vcpu, native=native)]


def collect_mappings(
    roots: Sequence[PageTableRoot],
    reader: TableReader,
    memory_ranges: Sequence[tuple[int, int]],
    *,
    native: bool,
    budget: WalkBudget | None = None,
) -> list[Segment]:
    """Walk page tables.

    Args:
        roots: Where they begin.
        reader: Of tables.
        memory_ranges: Where pages count: (first, end), ascending.
        native: Collect QEMU's list of mappings, not what is right.
        budget: Other than usual.

    Returns:
        QEMU's list, or everything that is mapped, unmerged.

    Raises:
        RequestError: The tables are hostile.

    Source:
        QEMU softmmu/memory_mapping.c qemu_get_guest_memory_mapping().
    """
    walker = PageTableWalker(
        reader,
        MemoryMap(memory_ranges),
        whole_pages=native,
        repeat=native,
        budget=budget or WalkBudget(),
    )
    if native:
        mappings = NativeMappingList()
        for root in roots:
            walker.walk(root, mappings.add_run)
        return mappings.segments()
    runs: list[Segment] = []
    for root in roots:
        walker.walk(root, lambda gva, gpa, size, _: runs.append(Segment(gva, gpa, size)))
    return runs
