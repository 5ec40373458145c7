"""Cut the RAM blocks of a guest down to a range. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.paging.segments import Segment
from qemu_dump_ext.plan.request import MemoryRange
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.structures.dialect import Dialect


def blocks_within(
    blocks: Sequence[RamBlock], wanted: MemoryRange, dialect: Dialect, granule: int = 1
) -> list[RamBlock]:
    """Return what of `blocks` lies in a range, as QEMU's `begin` and `length` select it.

    Args:
        blocks: The blocks by ascending gpa.
        wanted: The range; it may cover several blocks, holes, and addresses outside all blocks.
        dialect: Has the words for what is refused.
        granule: Both ends are moved outwards to a multiple of it, in bytes: the pages of a kdump
            are whole.

    Raises:
        RequestError: The range is empty, or no memory is in it.

    Source:
        QEMU dump/dump.c dump_init(), dump_calculate_size(), dump_filtered_memblock_start().
    """
    if not wanted.length:
        raise RequestError(
            "parameter 'length' expects a non-zero size"
            if dialect.names_wrong_parameters
            else "Invalid parameter 'length'"
        )
    begin = wanted.begin // granule * granule
    end = -(-wanted.end // granule) * granule
    found = []
    for block in blocks:
        low, high = max(block.gpa, begin), min(block.end, end)
        if low < high:
            found.append(block.part(low, high))
    if not found:
        raise RequestError(
            "dump: no guest memory to dump",
            hint="guest memory: "
            + ", ".join(f"{block.gpa:#x}-{block.end - 1:#x}" for block in blocks[:8]),
        )
    return found


def filter_native(segments: Iterable[Segment], wanted: MemoryRange) -> list[Segment]:
    """Cut QEMU's list down to a range as QEMU does.

    Source: QEMU softmmu/memory_mapping.c memory_mapping_filter().
    """
    kept = []
    for segment in segments:
        gva, gpa, size = segment.gva, segment.gpa, segment.size
        if gpa >= wanted.end or gpa + size <= wanted.begin:
            continue
        if gpa < wanted.begin:
            size -= wanted.begin - gpa
            if gva:
                gva = (gva + wanted.begin - gpa) & U64_MAX
            gpa = wanted.begin
        kept.append(Segment(gva, gpa, min(size, wanted.end - gpa)))
    return kept
