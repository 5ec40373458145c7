"""Memory as the monitor shows it, a byte at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qemu_dump_ext.guest.access import Monitor, SourceContext
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.memory_sources import MemorySource, monitor_read


class ShownMemory:
    """Guest memory through the text of `xp`."""

    name = "toy"
    is_slow = True

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        buffer[:] = monitor_read(self._monitor, gpa, len(buffer))

    def close(self) -> None:
        """Hold nothing."""


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    yield ShownMemory(context.monitor)


SOURCE = MemorySource("toy", 1, _open)
