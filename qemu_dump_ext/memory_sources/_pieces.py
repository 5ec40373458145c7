"""Guest memory that QEMU writes into files of ours, in large pieces, one of them ahead.

While the dump works on a piece, QEMU writes the next one. QEMU's monitor is busy for the time of
one piece only, and no piece outlives its command: nothing has to be cancelled.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Protocol

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.value import Value

FILE_COUNT = 2
_GAP = 64 << 10
"""Bytes; less between two ranges that are wanted is not worth another piece."""
_RANGES_MAX = 1 << 12
"""Of more, more of what is between them is read along: each costs QEMU milliseconds."""
_LARGEST_GAP = 1 << 40
_SHORT = 256 << 10
"""Bytes; a shorter read at another place is not the beginning of a long one."""


class FilePlace(Value):
    """Where a piece is.

    Attributes:
        descriptor: The descriptor of the file.
        offset: The offset in it, in bytes.
    """

    descriptor: int
    offset: int


class PieceWriter(Protocol):
    """Has QEMU write guest memory into files."""

    @property
    def piece_size(self) -> int:
        """How much is asked for at a time, in bytes."""

    @property
    def is_async(self) -> bool:
        """Tell whether QEMU writes as soon as it is asked, and not when it is waited for."""

    def begin(self, file: int, gpa: int, size: int) -> Callable[[], FilePlace]:
        """Ask for a range, in one RAM block, in the file of this number, below FILE_COUNT.

        Returns:
            Waits until it is there; raises SourceError where it does not come.

        Raises:
            SourceError: QEMU cannot be asked.
        """

    def close(self) -> None:
        """Give back the files."""


class _Piece(Value):
    gpa: int
    end: int
    file: int
    wait: Callable[[], FilePlace]

    def has(self, gpa: int) -> bool:
        """Tell whether the piece has the byte at `gpa`."""
        return self.gpa <= gpa < self.end


class PiecewiseMemory:
    """Guest memory by pieces."""

    is_slow = False

    def __init__(self, name: str, ram_blocks: Sequence[RamBlock], writer: PieceWriter) -> None:
        """Read `ram_blocks`, which go by ascending gpa."""
        self.name = name
        self._blocks = ram_blocks
        self._starts = [block.gpa for block in ram_blocks]
        self._wanted = [(block.gpa, block.end) for block in ram_blocks]
        self._writer = writer
        self._here: tuple[_Piece, FilePlace] | None = None
        self._ahead: _Piece | None = None
        self._read_up_to = -1

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        index = bisect_right(self._starts, gpa) - 1
        if index < 0 or gpa + len(buffer) > self._blocks[index].end:
            raise GuestMemoryFaultError(gpa, len(buffer), "no RAM block is there")
        while buffer:
            piece, place = self._piece_at(index, gpa, len(buffer))
            part = buffer[: piece.end - gpa]
            _fill(part, place.descriptor, place.offset + gpa - piece.gpa, gpa)
            gpa += len(part)
            buffer = buffer[len(part) :]
        self._read_up_to = gpa

    def foretell(self, parts: Sequence[RamBlock]) -> None:
        """Read nothing ahead but what lies in these parts of RAM blocks, by ascending gpa."""
        gap = _GAP
        self._wanted = list(self._joined(parts, gap))
        while len(self._wanted) > _RANGES_MAX and gap < _LARGEST_GAP:
            gap *= 4
            self._wanted = list(self._joined(parts, gap))

    def _joined(self, parts: Sequence[RamBlock], gap: int) -> Iterator[tuple[int, int]]:
        begin = end = limit = 0  # of the range that grows, and of the RAM block around it
        for part in parts:
            if part.end <= limit and part.gpa - end < gap:
                end = part.end
                continue
            if begin < end:
                yield begin, end
            begin, end = part.gpa, part.end
            limit = self._blocks[bisect_right(self._starts, begin) - 1].end
        if begin < end:
            yield begin, end

    def close(self) -> None:
        """Wait for what QEMU is writing, and give back the files."""
        with uninterrupted():
            self._forget_ahead()
            self._here = None
            self._writer.close()

    def _piece_at(self, index: int, gpa: int, size: int) -> tuple[_Piece, FilePlace]:
        if self._here is not None and self._here[0].has(gpa):
            return self._here
        is_long = size >= _SHORT or gpa == self._read_up_to
        self._here = None  # its file is written to, and an error leaves it so
        if self._ahead is not None and self._ahead.has(gpa):
            piece, self._ahead = self._ahead, None
        else:
            self._forget_ahead()
            end = min(gpa + size, self._blocks[index].end)
            if is_long:
                wanted = self._wanted_behind(gpa)
                if wanted is not None and wanted[0] <= gpa:
                    end = max(end, wanted[1])
                end = min(gpa + self._writer.piece_size, end)
            piece = self._ask(gpa, end, 0)
        self._here = piece, piece.wait()
        if is_long and self._writer.is_async:
            self._ask_ahead(piece)
        return self._here

    def _wanted_behind(self, gpa: int) -> tuple[int, int] | None:
        """Return begin and end of the first wanted range that ends behind an address."""
        index = bisect_right(self._wanted, gpa, key=itemgetter(1))
        return self._wanted[index] if index < len(self._wanted) else None

    def _ask_ahead(self, here: _Piece) -> None:
        wanted = self._wanted_behind(here.end)
        if wanted is None:
            return
        gpa = max(here.end, wanted[0])
        self._ahead = self._ask(gpa, min(gpa + self._writer.piece_size, wanted[1]), 1 - here.file)

    def _ask(self, gpa: int, end: int, file: int) -> _Piece:
        return _Piece(gpa, end, file, self._writer.begin(file, gpa, end - gpa))

    def _forget_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            with contextlib.suppress(SourceError):  # nobody wants it
                ahead.wait()


def _fill(buffer: memoryview, descriptor: int, offset: int, gpa: int) -> None:
    size = len(buffer)
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise GuestMemoryFaultError(gpa, size, "QEMU's file is too short")
        offset += count
        buffer = buffer[count:]
