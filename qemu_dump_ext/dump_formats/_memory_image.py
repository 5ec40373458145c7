"""Guest memory as it is, between a head and a tail: in order, or with holes for zeros."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from qemu_dump_ext.dump_formats._declaration import ProgressCallback
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.pages.pipeline import (
    Buffer,
    Piece,
    PieceWork,
    ResultT,
    cut,
    populated_ranges,
    read_through,
)
from qemu_dump_ext.pages.zero_pages import runs_with_content
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.value import Value

_FILE_BLOCK = 4096
_SMALLEST_HOLE = 8
"""Blocks of zeros; smaller holes cost more in writes than they save."""
_NOTHING = memoryview(b"")
_ZEROS = memoryview(bytes(1 << 20))


class Area(Value):
    """A range of guest physical memory that is in the file as it is.

    Attributes:
        gpa: First guest physical address.
        size: In bytes.
        blocks: What there is of it, by ascending gpa; the rest is zero.
    """

    gpa: int
    size: int
    blocks: tuple[RamBlock, ...]

    @property
    def end(self) -> int:
        """First guest physical address behind it."""
        return self.gpa + self.size


class MemoryImage(Value):
    """A file.

    Attributes:
        head: From its start to the first byte of guest memory.
        areas: In the order of the file.
        tail: Behind guest memory.
        granule: Bytes of which pieces of an area are multiples.
    """

    head: bytes
    areas: tuple[Area, ...]
    tail: bytes = b""
    granule: int = 1

    @property
    def memory_size(self) -> int:
        """Bytes of guest memory in the file."""
        return sum(area.size for area in self.areas)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.head) + self.memory_size + len(self.tail)

    @property
    def ascends(self) -> bool:
        """Whether an address is in the file at most once, and tells its place."""
        ends = (area.end for area in self.areas)
        return all(end <= area.gpa for end, area in zip(ends, self.areas[1:], strict=False))


def write_image(
    request: DumpRequest,
    image: MemoryImage,
    memory: GuestMemory,
    sink: Sink,
    progress: ProgressCallback,
) -> None:
    """Write a file; holes are left where the request and the sink allow it.

    Raises:
        DumpWriteError: It cannot be written.
        GuestMemoryFaultError: Memory cannot be read.
    """

    def read_all(work: PieceWork[ResultT]) -> None:
        pieces = (
            piece
            for area in image.areas
            for piece in cut(memory, area.blocks, area.gpa, area.end, image.granule)
        )
        read_through(memory, pieces, work, progress, threads=request.threads)

    if request.sparse and image.ascends and sink.can_leave_holes():
        populated = sum(
            end - start
            for area in image.areas
            for block in area.blocks
            for start, end in populated_ranges(memory, block.gpa, block.end)
        )
        sink.require_room(image.size - image.memory_size + populated)
        sink.write_at(0, image.head)
        read_all(_places_content(sink, image))
        sink.write_at(image.size - len(image.tail), image.tail)
        sink.set_size(image.size)
    else:
        sink.require_room(image.size)
        sink.write(image.head)
        read_all(_writes_in_order(sink))
        sink.write(image.tail)


def _writes_in_order(sink: Sink) -> PieceWork[tuple[int, memoryview]]:
    # For pipes, and files that are to have no holes.
    def consume(content: tuple[int, memoryview]) -> None:
        left, view = content
        if view:
            sink.write(view)
            return
        while left:
            some = min(left, len(_ZEROS))
            sink.write(_ZEROS[:some])
            left -= some

    return PieceWork(
        lambda piece, buffer: (piece.size, buffer.view),
        lambda piece: (piece.size, _NOTHING),
        consume,
    )


def _places_content(sink: Sink, image: MemoryImage) -> PieceWork[None]:
    # What is not zero, at its place in a new file. The workers write.
    starts = [area.gpa for area in image.areas]
    offsets = places_of(image.areas, len(image.head))

    def write(piece: Piece, buffer: Buffer) -> None:
        index = bisect_right(starts, piece.gpa) - 1
        offset = offsets[index] + piece.gpa - starts[index]
        for start, end in runs_with_content(buffer.view, _FILE_BLOCK, _SMALLEST_HOLE):
            sink.write_at(offset + start, buffer.view[start:end])

    return PieceWork(write, lambda _: None, lambda _: None)


def places_of(areas: Sequence[Area] | Sequence[RamBlock], first: int) -> list[int]:
    """Return the file offset of each area, of which the first one has the offset `first`."""
    return list(accumulate((area.size for area in areas), initial=first))
