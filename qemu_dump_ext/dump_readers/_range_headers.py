"""What files of LiME and of AVML have in common: a header before each range of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from struct import Struct
from typing import Any

from qemu_dump_ext.dump_readers._declaration import LISTED_MAX
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError
from qemu_dump_ext.value import Value

_HEADER = Struct("<4sIQQ8x")
"""magic, version, s_addr, e_addr (of the last byte), reserved; little-endian whatever the guest."""
RANGE_HEADER_SIZE = _HEADER.size
_READ_SIZE = 1 << 20


class RangeHeader(Value):
    """One range of memory.

    Attributes:
        offset: Of the header in the file.
        first: First guest physical address.
        size: In bytes.
    """

    offset: int
    first: int
    size: int


def read_range_header(
    image: DumpImage, offset: int, magic: bytes, version: int
) -> RangeHeader | None:
    """Return the header at an offset; None where there is none."""
    found, its_version, first, last = _HEADER.unpack(image.read(offset, _HEADER.size))
    if (found, its_version) != (magic, version) or not first <= last < (1 << 64) - 1:
        return None
    return RangeHeader(offset, first, last + 1 - first)


def describe_ranges(ranges: Sequence[RangeHeader]) -> Mapping[str, Callable[[], Any]]:
    """Return what `inspect` shows of the headers."""
    return {
        "stored_range_count": lambda: len(ranges),
        "stored_ranges": lambda: [asdict(one) for one in ranges[:LISTED_MAX]],
    }


def verify_memory(
    dump: DumpFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    """Verify a dump of a format that has memory and nothing else."""
    report.remarks.append("the format has no registers")
    read_memory(dump, report, pool, progress)


def read_memory(
    dump: DumpFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    """Read all memory that a dump says to have; add what cannot be read to a report."""
    stored = list(dump.stored_ranges())
    total = sum(size for _, size in stored)
    readable = list(dump.readable_ranges())
    report.memory_bytes = sum(size for _, size in readable)
    if report.memory_bytes < total and not dump.image.problems:
        report.add_problem(f"{total - report.memory_bytes} bytes of memory are not in the file")
    pieces = (
        (start, min(_READ_SIZE, end - start))
        for gpa, size in readable
        for low, end in dump.populated(gpa, size)
        for start in range(low, end, _READ_SIZE)
    )

    def read(piece: tuple[int, int]) -> tuple[int, CorruptDumpError | GuestMemoryFaultError | None]:
        try:
            dump.read(*piece)
        except (CorruptDumpError, GuestMemoryFaultError) as error:
            return piece[1], error
        return piece[1], None

    done = 0
    for size, error in pool.map(read, pieces):
        done += size
        if error is not None:
            report.add_problem(error)
        progress(done, total)
