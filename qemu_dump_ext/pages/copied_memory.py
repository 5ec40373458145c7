"""A copy of guest memory, so that the guest runs again while the dump is written.

Only what is populated and not zero is copied: into anonymous memory, or into a nameless file where
memory is short.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.guest.memory import GuestMemory, SparseMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.pages.pipeline import PIECE_SIZE, populated_ranges

_MAP_NORESERVE = 0x4000
_MEMORY_SHARE = 2
"""A copy in memory takes at most this part of what is available: one half."""


class _Store(Protocol):
    # Where the copy is; offsets in bytes.
    def fill(self, offset: int, size: int, read: Callable[[memoryview], None]) -> memoryview: ...

    def read_into(self, offset: int, buffer: memoryview) -> None: ...

    def close(self) -> None: ...


class _MemoryStore:
    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # No MADV_HUGEPAGE: the kernel moves other memory to make some, for twice the time.
        with refused_as(DumpWriteError, f"copy {size >> 20} MiB of guest memory"):
            self._area = mmap.mmap(-1, size, flags)
        self._view = memoryview(self._area)

    def fill(self, offset: int, size: int, read: Callable[[memoryview], None]) -> memoryview:
        view = self._view[offset : offset + size]
        read(view)
        return view

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._view[offset : offset + len(buffer)]

    def close(self) -> None:
        # Somebody may still hold a part of it after an error; it goes with the last of them.
        with contextlib.suppress(BufferError):
            self._view.release()
            self._area.close()


class _FileStore:
    def __init__(self, size: int, directory: Path) -> None:
        with refused_as(DumpWriteError, f"look at {directory}"):
            room = os.statvfs(directory)
        free = room.f_bavail * room.f_frsize
        if room.f_blocks and size > free:  # a tmpfs without a limit counts no blocks
            raise DumpWriteError(
                f"no room for --snapshot: {size >> 20} MiB of guest memory fit neither into half"
                f" of the available memory nor into the {free >> 20} MiB left in {directory}"
            )
        with refused_as(DumpWriteError, f"create a file in {directory}"):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed in close()
        self._buffer = memoryview(bytearray(PIECE_SIZE))

    def fill(self, offset: int, size: int, read: Callable[[memoryview], None]) -> memoryview:
        view = self._buffer[:size]
        read(view)
        left = view
        try:
            while left:
                written = os.pwrite(self._file.fileno(), left, offset)
                offset += written
                left = left[written:]
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise DumpWriteError(f"cannot write the copy of guest memory: {reason}") from error
        return view

    def read_into(self, offset: int, buffer: memoryview) -> None:
        while buffer:
            with refused_as(DumpWriteError, "read the copy of guest memory"):
                count = os.preadv(self._file.fileno(), [buffer], offset)
            if not count:
                raise DumpWriteError("the copy of guest memory became shorter")
            offset += count
            buffer = buffer[count:]

    def close(self) -> None:
        self._file.close()


class CopiedMemory:
    """Guest memory as it was.

    Attributes:
        name: Of the source that it was copied from.
        size: Of the copy, in bytes.
        where: It is kept, in words.
    """

    is_slow = False
    is_at_hand = True

    def __init__(self, name: str, store: _Store, where: str) -> None:
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
        may_be_zero = not isinstance(memory, SparseMemory)
        for block in blocks:
            for start, end in populated_ranges(memory, block.gpa, block.end):
                for gpa in range(start, end, PIECE_SIZE):
                    size = min(PIECE_SIZE, end - gpa)
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
    store: _Store
    if size <= available_memory() // _MEMORY_SHARE:
        store, where = _MemoryStore(max(size, mmap.PAGESIZE)), "in memory"
    else:
        store, where = _FileStore(size, directory), f"in a nameless file in {directory}"
    copied = CopiedMemory(memory.name, store, where)
    try:
        yield copied
    finally:
        copied.close()


def available_memory() -> int:
    """Return how much memory may be used without swapping, in bytes."""
    available = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text("ascii")
        available = int(text.partition("MemAvailable:")[2].split()[0]) << 10
    # A container may be allowed less than the machine has.
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text("utf-8").partition("0::/")[2].splitlines()[0]
        folder = Path("/sys/fs/cgroup") / group
        limit = int((folder / "memory.max").read_text("ascii"))
        used = int((folder / "memory.current").read_text("ascii"))
        available = min(available, max(0, limit - used))
    return available
