"""A dump whose memory stands in the file as it is, in extents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex, merged
from qemu_dump_ext.errors import GuestMemoryFaultError

_PAGE = 4096
"""The smallest page of any kernel, in bytes."""
ZEROES = 1 << 63
"""Place of memory that the file does not have, so that it reads as zero."""


class ExtentDump(DumpFile):
    """What reads memory in extents; who opens it sets `index`, settled.

    Attributes:
        index: Where each piece of guest memory is in the file.
    """

    index: ExtentIndex

    def _note_areas(self) -> list[tuple[int, int]]:
        return []

    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest memory in the dump, ascending, merged."""
        return self.index.ranges()

    def stored_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what has data, ascending, merged."""
        return merged((gpa, size) for gpa, size, place in self.index.extents() if place < ZEROES)

    def readable_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what has data in the file; of a page that is cut, nothing."""
        for gpa, size in merged(self._readable_pieces()):
            end = gpa + size
            ((_, behind),) = self.index.pieces(end, 1)
            if behind is not None and behind < ZEROES:
                end -= end % _PAGE
            if end > gpa:
                yield gpa, end - gpa

    def _readable_pieces(self) -> Iterator[tuple[int, int]]:
        for gpa, size, place in self.index.extents():
            if place < ZEROES:
                for start, end in self.image.readable(place, size):
                    yield gpa + start - place, end - start

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return (gpa, end) of what is in the file, holes left out."""
        found: list[tuple[int, int]] = []
        for length, place in self.index.pieces(gpa, size):
            if place is not None and place < ZEROES:
                for start, end in self.image.stored(place, length):
                    low, high = gpa + start - place, gpa + end - place
                    if found and found[-1][1] == low:
                        low = found.pop()[0]
                    found.append((low, high))
            gpa += length
        return found

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa`."""
        done = 0
        for size, place in self.index.pieces(gpa, len(buffer)):
            part = buffer[done : done + size]
            if place is None:
                raise GuestMemoryFaultError(gpa + done, size, "not in the dump")
            if place >= ZEROES:
                part[:] = bytes(size)
            else:
                self.image.read_into(place, part)
            done += size
