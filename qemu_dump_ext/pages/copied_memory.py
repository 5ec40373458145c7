"""A copy of guest memory, so that the guest runs again while the dump is written.

Only what is populated and not zero is copied: into anonymous memory, or into a nameless file where
memory is short.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qemu_dump_ext.guest.memory import GuestMemory, is_sparse
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.pages._copy_store import CopyStore, open_copy_store
from qemu_dump_ext.pages.pipeline import piece_size, populated_ranges


class CopiedMemory:
    """Guest memory as it was.

    Attributes:
        name: Of the source that it was copied from.
        size: Of the copy, in bytes.
        where: It is kept, in words.
    """

    is_slow = False
    is_at_hand = True

    def __init__(self, name: str, store: CopyStore, where: str) -> None:
        self.name = name
        self.where = where
        self.size = 0
        self._store = store
        self._starts: list[int] = []
        self._extents: list[tuple[int, int, int]] = []

    def take(
        self,
        memory: GuestMemory,
        blocks: Sequence[RamBlock],
        advance: Callable[[int], None],
    ) -> None:
        """Copy all of `memory`; `advance` is told the bytes of each piece.

        Raises:
            GuestMemoryFaultError: It cannot be read.
            DumpWriteError: The copy cannot be written.
        """
        may_be_zero = not is_sparse(memory)
        most = piece_size(memory)
        for block in blocks:
            for start, end in populated_ranges(memory, block.gpa, block.end):
                for gpa in range(start, end, most):
                    size = min(most, end - gpa)
                    view = self._store.fill(self.size, size, partial(memory.read_into, gpa))
                    if not may_be_zero or any(view.tobytes().strip(b"\0")[:1]):
                        self._append(gpa, size)
                    advance(size)

    def _append(self, gpa: int, size: int) -> None:
        last = self._extents[-1] if self._extents else None
        if last is not None and last[1] == gpa:
            self._extents[-1] = (last[0], gpa + size, last[2])
        else:
            self._starts.append(gpa)
            self._extents.append((gpa, gpa + size, self.size))
        self.size += size

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return what was copied."""
        end = gpa + size
        found = []
        for index in range(max(0, bisect_right(self._starts, gpa) - 1), len(self._starts)):
            low, high, _ = self._extents[index]
            if low >= end:
                break
            if high > gpa:
                found.append((max(low, gpa), min(high, end)))
        return found

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on; what was not copied is zero."""
        position = gpa
        end = gpa + len(buffer)
        for low, high in [*self.populated(gpa, len(buffer)), (end, end)]:
            if low > position:
                buffer[position - gpa : low - gpa] = bytes(low - position)
            if high > low:
                index = bisect_right(self._starts, low) - 1
                first, _, offset = self._extents[index]
                self._store.read_into(offset + low - first, buffer[low - gpa : high - gpa])
            position = high

    def close(self) -> None:
        """Give the copy up; harmless when repeated."""
        self._store.close()


@contextmanager
def room_for_copy(
    memory: GuestMemory, blocks: Sequence[RamBlock], directory: Path
) -> Iterator[CopiedMemory]:
    """Make room for a copy of guest memory, for the time of a `with` block.

    Args:
        memory: To be copied.
        blocks: What of it.
        directory: For a file, where memory is short.

    Raises:
        DumpWriteError: There is no room.
    """
    size = sum(
        end - start
        for block in blocks
        for start, end in populated_ranges(memory, block.gpa, block.end)
    )
    store, where = open_copy_store(size, directory, needed=size)
    copied = CopiedMemory(memory.name, store, where)
    try:
        yield copied
    finally:
        copied.close()
