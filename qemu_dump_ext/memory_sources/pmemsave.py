"""Memory through QEMU's `pmemsave`: piece by piece through a file that both sides can open.

Needs only a monitor, and a directory that this process and QEMU share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest import GuestMemory, Monitor
from qemu_dump_ext.memory_sources._declaration import MemorySource, SourceContext
from qemu_dump_ext.shared_directory import quote_for_monitor, shared_directory


class PmemsaveMemory:
    """Guest memory by `pmemsave`."""

    name = "pmemsave"

    def __init__(self, monitor: Monitor, directory: Path) -> None:
        self._monitor = monitor
        path = directory / "memory"
        # The file exists before QEMU opens it: what QEMU on another host, or in another mount
        # namespace, writes under this name does not appear in ours.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._name_for_qemu = quote_for_monitor(path)

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        size = len(buffer)
        os.ftruncate(self._descriptor, 0)
        answer = self._monitor.execute(f"pmemsave {gpa:#x} {size:#x} {self._name_for_qemu}")
        if answer.strip():
            raise GuestMemoryFaultError(gpa, size, f"QEMU's pmemsave: {answer.strip()}")
        received = os.preadv(self._descriptor, [buffer], 0)
        if received != size:
            raise GuestMemoryFaultError(
                gpa,
                size,
                f"QEMU's file does not appear here ({received} bytes came):"
                " QEMU is on another host or in another mount namespace",
            )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    with shared_directory() as directory:
        memory = PmemsaveMemory(context.monitor, directory)
        try:
            yield memory
        finally:
            memory.close()


SOURCE = MemorySource("pmemsave", 30, _open)
