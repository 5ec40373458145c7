"""Which of a kdump's pages have descriptors that lead nowhere, or to the page of zeroes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.pages.zero_pages import numpy_or_none
from qemu_dump_ext.structures.c_struct import Abi
from qemu_dump_ext.structures.kdump import PAGE_DESCRIPTOR, PAGE_DESCRIPTOR_SIZE

if TYPE_CHECKING:
    from qemu_dump_ext.dump_readers.kdump import KdumpFile

_AT_ONCE = 1 << 14
"""Descriptors that are looked at together."""
_ZERO_RUN = 256
"""Pages; shorter runs of zeros cost more to step over than to read."""
_FAULTY = re.compile(rb"\x01+")


def faulty_runs(dump: KdumpFile) -> Iterator[tuple[int, int]]:
    """Yield the first rank and the first one behind of pages that are not in the file.

    Their descriptors are empty, impossible, or lead to what was cut off. A run may end where
    another one begins.
    """
    for first in range(0, dump.page_count, _AT_ONCE):
        count = min(_AT_ONCE, dump.page_count - first)
        rank = first
        for low, high in _readable_ranks(dump, first, count):
            if low > rank:
                yield rank, low
            for match in _FAULTY.finditer(_faults(dump, low, high - low)):
                yield low + match.start(), low + match.end()
            rank = high
        if rank < first + count:
            yield rank, first + count


def _readable_ranks(dump: KdumpFile, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield the ranks of whole descriptors that are in the file: first, and first behind."""
    size = PAGE_DESCRIPTOR_SIZE
    offset = dump.descriptors_offset + first * size
    for start, end in dump.image.readable(offset, count * size):
        low, high = first - (offset - start) // size, first + (end - offset) // size
        if low < high:
            yield low, high


def _faults(dump: KdumpFile, rank: int, count: int) -> bytes:
    """Return a byte for each descriptor: 1 where its page is not in the file."""
    numpy = numpy_or_none() if dump.image.is_whole else None
    if numpy is not None:
        return _faults_by_numpy(numpy, dump, rank, count)
    readable = dump.image.readable
    good = [
        dump.descriptor_fault(one) is None
        and any(end - start == one[1] for start, end in readable(one[0], one[1]))
        for one in dump.read_descriptors(rank, count)
    ]
    return bytes(not one for one in good)


def _faults_by_numpy(numpy: ModuleType, dump: KdumpFile, rank: int, count: int) -> bytes:
    """Do the same by what `KdumpFile.descriptor_fault` says, for all descriptors at once."""
    order = "<" if dump.byte_order == "little" else ">"
    fields = [("offset", f"{order}i8"), ("size", f"{order}u4"), ("flags", f"{order}u4")]
    table = numpy.frombuffer(
        dump.read_descriptor_table(rank, count), dtype=[*fields, ("page_flags", f"{order}u8")]
    )
    offset, size, flags = (table[name].astype("i8") for name, _ in fields)
    page = dump.page_size
    good = (size > 0) & (size <= page) & ((flags != 0) | (size == page))
    good &= (offset >= dump.data_offset) & (offset <= dump.image.size - size)
    good &= numpy.isin(flags, [0, *dump.codecs_by_flag])
    faults: bytes = (~good).tobytes()
    return faults


def zero_runs(dump: KdumpFile, ranks: range) -> Iterator[tuple[int, int]]:
    """Yield the first rank and the first one behind of long runs of pages of zeroes, ascending.

    Args:
        dump: The dump.
        ranks: Of the pages to look at; all of them have descriptors.
    """
    try:
        if any(dump.zero_page):
            return
        zero = PAGE_DESCRIPTOR.bind(Abi(dump.byte_order, 8, 8)).codec.pack(
            *dump.zero_page_descriptor
        )
    except CorruptDumpError:
        return
    wanted = zero * _ZERO_RUN
    start = end = ranks.start
    for first in range(ranks.start, ranks.stop, _AT_ONCE):
        count = min(_AT_ONCE, ranks.stop - first)
        data = memoryview(dump.read_descriptor_table(first, count))
        for number in range(0, count - _ZERO_RUN + 1, _ZERO_RUN):
            place = number * PAGE_DESCRIPTOR_SIZE
            if data[place : place + len(wanted)] != wanted:
                continue
            if first + number != end:
                if end > start:
                    yield start, end
                start = first + number
            end = first + number + _ZERO_RUN
    if end > start:
        yield start, end
