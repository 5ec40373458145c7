"""A kdump that makedumpfile has split into several files, read as one.

Source: makedumpfile makedumpfile.c (--split, --reassemble): every part has all of the headers and
bitmaps, and the pages of its own range of page frames.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._extent_index import merged
from qemu_dump_ext.dump_readers.kdump import KdumpFile
from qemu_dump_ext.errors import GuestMemoryFaultError, RequestError
from qemu_dump_ext.guest.memory import ReadPacked
from qemu_dump_ext.structures.elf_notes import Note

_HINT = "name all files that makedumpfile --split wrote, and no others"


class SplitKdump(DumpFile):
    """All parts of one kdump; what they have in common is that of the first."""

    def __init__(self, parts: Sequence[KdumpFile]) -> None:
        first = parts[0]
        self.parts = parts
        self.image, self.reader = first.image, first.reader
        self.format = f"{first.format}-split"
        self.byte_order, self.word_size = first.byte_order, first.word_size
        self.page_size, self.header = first.page_size, first.header
        self._starts = [_range_of(part)[0] * part.page_size for part in parts]

    @property
    def files(self) -> Sequence[DumpFile]:
        """The parts."""
        return self.parts

    def close(self) -> None:
        """Close all files."""
        for part in self.parts:
            part.close()

    @property
    def notes(self) -> tuple[Note, ...]:
        """The notes, which every part has."""
        return self.parts[0].notes

    def _note_areas(self) -> list[tuple[int, int]]:
        return []

    @property
    def vmcoreinfo(self) -> bytes | None:
        """VMCOREINFO, which every part has."""
        return self.parts[0].vmcoreinfo

    @property
    def phys_base(self) -> int | None:
        """Physical minus link address of the kernel, as every part says it."""
        return self.parts[0].phys_base

    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest memory in all parts, ascending, merged."""
        return merged(found for part in self.parts for found in part.memory_ranges())

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the pages of both bitmaps, ascending, merged."""
        return self.parts[0].covered_ranges()

    def stored_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what all parts say to have, ascending, merged."""
        return self.memory_ranges()

    def readable_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what can be read of all parts, ascending, merged."""
        return merged(found for part in self.parts for found in part.readable_ranges())

    def _pieces(self, gpa: int, size: int) -> Iterator[tuple[KdumpFile, int, int]]:
        """Yield part, gpa and size of what makes up a range."""
        end = gpa + size
        index = bisect_right(self._starts, gpa) - 1
        while gpa < end:
            last = index + 1 == len(self._starts)
            stop = end if last else min(self._starts[index + 1], end)
            if index < 0:
                raise GuestMemoryFaultError(gpa, size, "not in the dump")
            yield self.parts[index], gpa, stop - gpa
            gpa, index = stop, index + 1

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return (gpa, end) but for long runs of zeros."""
        return [
            found
            for part, first, length in self._pieces(gpa, size)
            for found in part.populated(first, length)
        ]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa`."""
        for part, first, length in self._pieces(gpa, len(buffer)):
            part.read_into(first, buffer[first - gpa : first - gpa + length])

    def packed_pages(self, codec: str, page_size: int) -> ReadPacked | None:
        """Return what reads pages as they are packed, where all parts have such."""
        found = [part.packed_pages(codec, page_size) for part in self.parts]
        readers = [read for read in found if read is not None]
        if len(readers) < len(found):
            return None

        def read_packed(gpas: Sequence[int]) -> Iterator[bytes | memoryview | None]:
            for index, some in groupby(gpas, lambda gpa: bisect_right(self._starts, gpa) - 1):
                yield from readers[index](list(some))

        return read_packed


def join_parts(files: Sequence[DumpFile]) -> DumpFile:
    """Return the dump that several files are, which then belong to it.

    Raises:
        RequestError: They are not all of one dump, or one is missing.
    """
    parts = sorted(
        (file for file in files if isinstance(file, KdumpFile) and file.part is not None),
        key=_range_of,
    )
    if len(parts) != len(files):
        raise RequestError("a file is no part of a split kdump", hint=_HINT)
    ranges = [_range_of(part) for part in parts]
    headers = [dict(part.header) for part in parts]
    if any(header != headers[0] for header in headers):
        raise RequestError("these are parts of different dumps", hint=_HINT)
    whole = [(0, 0), *ranges, (parts[0].max_mapnr, parts[0].max_mapnr)]
    for (_, end), (start, _) in pairwise(whole):
        if start < end:
            raise RequestError(f"two parts have the page {start:#x}", hint=_HINT)
        if start > end:
            raise RequestError(
                f"one part of a split dump is missing: that of the pages {end:#x} to"
                f" {start - 1:#x}",
                hint=_HINT,
            )
    return SplitKdump(parts)


def is_part(dump: DumpFile) -> bool:
    """Tell whether a dump is one of several files."""
    return isinstance(dump, KdumpFile) and dump.part is not None


def _range_of(part: KdumpFile) -> tuple[int, int]:
    return part.part or (0, 0)
