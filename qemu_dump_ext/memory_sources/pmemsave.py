"""Memory through QEMU's `pmemsave`: piece by piece through a file that both sides can open.

Needs only a monitor, and a directory that this process and QEMU share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.access import AsyncMonitor, Monitor, SourceContext
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.memory_sources._declaration import MemorySource
from qemu_dump_ext.memory_sources._pieces import FILE_COUNT, FilePlace, PiecewiseMemory
from qemu_dump_ext.qemu.shared_directory import quote_for_monitor, shared_directory


class SavedPieces:
    """Has QEMU save ranges."""

    piece_size = 8 << 20  # /dev/shm of a container may have 64 MiB

    def __init__(self, monitor: Monitor, directory: Path) -> None:
        self._monitor = monitor
        self._paths = [directory / f"memory{number}" for number in range(FILE_COUNT)]
        # The files exist before QEMU opens them: what QEMU on another host, or in another mount
        # namespace, writes under these names does not appear in ours.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._files: list[int] = []
        try:
            with refused_as(SourceError, f"create a file in {directory}"):
                for path in self._paths:
                    self._files.append(os.open(path, flags, 0o600))
        except SourceError:
            self.close()
            raise

    @property
    def is_async(self) -> bool:
        """Tell whether QEMU writes while something else is done."""
        return isinstance(self._monitor, AsyncMonitor)

    def begin(self, file: int, gpa: int, size: int) -> Callable[[], FilePlace]:
        """Ask for a range."""
        descriptor = self._files[file]
        os.ftruncate(descriptor, 0)
        command = f"pmemsave {gpa:#x} {size:#x} {quote_for_monitor(self._paths[file])}"
        if isinstance(self._monitor, AsyncMonitor):
            answer = self._monitor.begin(command)
        else:
            answer = partial(self._monitor.execute, command)

        def place() -> FilePlace:
            text = answer().strip()
            if "Could not open" in text:
                is_here = self._paths[file].exists()
                raise SourceError(
                    f"QEMU's pmemsave: {text}",
                    hint="QEMU is in another mount namespace, or of another user"
                    if is_here
                    else "somebody removed it during the dump",
                )
            if text:
                raise GuestMemoryFaultError(gpa, size, f"QEMU's pmemsave: {text}")
            received = os.fstat(descriptor).st_size
            if received != size and os.fstatvfs(descriptor).f_bavail == 0:
                raise SourceError(f"no room is left in {self._paths[file].parent}")
            if received != size:
                raise SourceError(
                    f"QEMU's file does not appear here ({received} of {size} bytes came):"
                    " QEMU is on another host or in another mount namespace"
                )
            return FilePlace(descriptor, 0)

        return place

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    with shared_directory(FILE_COUNT * SavedPieces.piece_size) as directory:
        pieces = SavedPieces(context.monitor, directory)
        memory = PiecewiseMemory("pmemsave", context.ram_blocks, pieces)
        try:
            yield memory
        finally:
            memory.close()


SOURCE = MemorySource("pmemsave", 30, _open)
