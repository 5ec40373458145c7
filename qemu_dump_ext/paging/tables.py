"""Read page tables of a stopped guest, and collect what they map."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

from qemu_dump_ext.architectures import (
    AddressWindow,
    Architecture,
    PageTableRoot,
    Translation,
    phys_base,
)
from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu, block_at
from qemu_dump_ext.paging.segments import NativeMappingList, Segment
from qemu_dump_ext.paging.walk import MemoryMap, PageTableWalker, WalkBudget

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
        end = gpa + size
        if size >= _CHUNK and (many := self._read_at_once(gpa, end)) is not None:
            return many
        parts = []
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

    def _read_at_once(self, gpa: int, end: int) -> bytes | None:
        """Return what is read once only; None where that is not all memory that can be read."""
        block = block_at(self._blocks, gpa)
        if block is None or end > block.end:
            return None
        buffer = bytearray(end - gpa)
        try:
            self._memory.read_into(gpa, memoryview(buffer))
        except GuestMemoryFaultError:
            return None
        return bytes(buffer)

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


def roots_of_vcpus(
    architecture: Architecture, vcpus: Sequence[Vcpu], *, native: bool
) -> list[Translation]:
    """Return where the page tables of all vCPUs begin, in the order of QEMU's walk.

    Args:
        architecture: The architecture of the guest.
        vcpus: The vCPUs of the guest.
        native: Whether they are read as QEMU's dump-guest-memory does, for what it does at all.

    Raises:
        SourceError: No source gives a register that tells.
    """
    tables = architecture.page_table_roots
    if tables is None or (native and not architecture.paged_by_qemu):
        return []
    roots: list[Translation] = []
    for vcpu in vcpus:
        try:
            roots += tables(vcpu.registers, native)
        except KeyError as error:
            raise SourceError(
                f"vCPU {vcpu.index}: no source gives {error}, which paging needs"
            ) from error
    return roots


def kernel_translations(
    architecture: Architecture, vmcoreinfo: bytes, ram_blocks: Sequence[RamBlock]
) -> Sequence[Translation]:
    """Return how a Linux kernel's own addresses are translated; empty where it is not known.

    Args:
        architecture: The architecture of the guest.
        vmcoreinfo: What the kernel says of itself; untrusted.
        ram_blocks: Where the guest has memory, by ascending gpa.
    """
    if architecture.kernel_page_tables is None:
        return ()
    base = phys_base(architecture, vmcoreinfo)
    if base is None and architecture.phys_base_is_lowest and ram_blocks:
        base = ram_blocks[0].gpa
    return architecture.kernel_page_tables(vmcoreinfo, base)


def collect_mappings(
    roots: Sequence[Translation],
    reader: TableReader,
    memory_ranges: Sequence[tuple[int, int]],
    *,
    native: bool,
    budget: WalkBudget | None = None,
) -> list[Segment]:
    """Walk page tables.

    Args:
        roots: Where they begin, and what is mapped without any.
        reader: The reader of tables.
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
            if isinstance(root, PageTableRoot):
                walker.walk(root, mappings.add_run)
        return mappings.segments()
    segments: list[Segment] = []
    for root in roots:
        if isinstance(root, AddressWindow):
            segments.append(Segment(root.gva, root.gpa, root.size))
            continue
        segments += mapped_by(walker, root)
    return segments


def mapped_by(walker: PageTableWalker, root: PageTableRoot) -> list[Segment]:
    """Return what the tables of one root map, unmerged, but for what the walker has seen.

    Raises:
        RequestError: The tables are hostile.
    """
    runs: list[tuple[int, int, int]] = []
    walker.walk(root, partial(_append, runs))
    return [Segment(*part) for run in runs for part in root.parts(*run)]


def _append(
    runs: list[tuple[int, int, int]], gva: int, gpa: int, size: int, _page_size: int
) -> None:
    runs.append((gva, gpa, size))
