"""Where a copy of guest memory is kept: anonymous memory, or a nameless file."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.pages.pipeline import PIECE_SIZE

_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
"""Since Linux 5.14; Python has no name for either."""
_MEMORY_SHARE = 2
"""A copy in memory takes at most this part of what is available: one half."""


class CopyStore(Protocol):
    """Where the copy is; offsets in bytes. What was never written reads as zero."""

    def fill(self, offset: int, size: int, read: Callable[[memoryview], None]) -> memoryview:
        """Have `read` fill a part, and return it; only valid until the next one."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put a part in."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Take a part out."""

    def close(self) -> None:
        """Give everything back; harmless when repeated."""


class _Promised:
    # Memory of copies whose pages were not all touched yet: others are not to count on it, too.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._size = 0

    def take(self, size: int) -> bool:
        with self._lock:
            if size > (available_memory() - self._size) // _MEMORY_SHARE:
                return False
            self._size += size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._size -= size


_PROMISED = _Promised()


class _MemoryStore:
    def __init__(self, size: int) -> None:
        self._promised = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # No MADV_HUGEPAGE: the kernel moves other memory to make some, for twice the time.
        with refused_as(DumpWriteError, f"copy {size >> 20} MiB of guest memory"):
            self._area = mmap.mmap(-1, size, flags)
        self._view = memoryview(self._area)

    def fill(self, offset: int, size: int, read: Callable[[memoryview], None]) -> memoryview:
        view = self._view[offset : offset + size]
        # Memory that is asked for at once is there sooner than page by page, as it is filled.
        with contextlib.suppress(OSError):
            self._area.madvise(_MADV_POPULATE_WRITE, offset, size)
        read(view)
        return view

    def write(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + len(data)] = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._view[offset : offset + len(buffer)]

    def close(self) -> None:
        _PROMISED.give_back(self._promised)
        self._promised = 0
        # Somebody may still hold a part of it after an error; it goes with the last of them.
        with contextlib.suppress(BufferError):
            self._view.release()
            self._area.close()


class _FileStore:
    def __init__(self, size: int, directory: Path) -> None:
        with refused_as(DumpWriteError, f"create a file in {directory}"):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed in close()
            try:
                os.ftruncate(self._file.fileno(), size)
            except OSError:
                self._file.close()
                raise
        self._buffer = memoryview(bytearray(PIECE_SIZE))

    def fill(self, offset: int, size: int, read: Callable[[memoryview], None]) -> memoryview:
        view = self._buffer[:size]
        read(view)
        self.write(offset, view)
        return view

    def write(self, offset: int, data: memoryview) -> None:
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                offset += written
                data = data[written:]
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise DumpWriteError(f"cannot write the copy of guest memory: {reason}") from error

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


def open_copy_store(size: int, directory: Path, needed: int | None = None) -> tuple[CopyStore, str]:
    """Make room for a copy: in memory, or in a file where memory is short.

    Args:
        size: Of all that may be written, in bytes.
        directory: For the file.
        needed: How much will be written, where that is known.

    Returns:
        The room, and in words where it is.

    Raises:
        DumpWriteError: There is no room.
    """
    if _PROMISED.take(size := max(size, mmap.PAGESIZE)):
        try:
            return _MemoryStore(size), "in memory"
        except BaseException:
            _PROMISED.give_back(size)
            raise
    if needed is not None:
        _require_room(needed, directory)
    return _FileStore(size, directory), f"in a nameless file in {directory}"


def _require_room(size: int, directory: Path) -> None:
    with refused_as(DumpWriteError, f"look at {directory}"):
        room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and size > free:  # a tmpfs without a limit counts no blocks
        raise DumpWriteError(
            f"no room for --snapshot: {size >> 20} MiB of guest memory fit neither into half"
            f" of the available memory nor into the {free >> 20} MiB left in {directory}"
        )


def available_memory() -> int:
    """Return how much memory may be used without swapping, in bytes."""
    available = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text("utf-8")
        available = int(text.partition("MemAvailable:")[2].split()[0]) << 10
    # A container may be allowed less than the machine has.
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text("utf-8").partition("0::/")[2].splitlines()[0]
        folder = Path("/sys/fs/cgroup") / group
        limit = int((folder / "memory.max").read_text("utf-8"))
        used = int((folder / "memory.current").read_text("utf-8"))
        available = min(available, max(0, limit - used))
    return available
