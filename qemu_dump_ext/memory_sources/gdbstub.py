"""Memory through the gdbstub, in the physical memory mode that QEMU's stub has since 4.1.

Slow (every byte is two hexadecimal digits in a packet), and needs nothing but the stub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import SourceContext, Stub
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.memory_sources._declaration import MemorySource

_QUERY_MODE = "qqemu.PhyMemMode"
_SET_MODE = "Qqemu.PhyMemMode:"


class StubMemory:
    """Guest memory by packets of the remote protocol."""

    name = "gdbstub"
    is_slow = True

    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        self._stub.read(gpa, buffer)

    def close(self) -> None:
        """Hold nothing."""


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    stub = context.stub
    if stub is None:
        raise SourceError("no gdbstub is connected", hint="use gdb, or --gdb ADDRESS")
    before = stub.packet(_QUERY_MODE)
    if before not in {"0", "1"} or stub.packet(f"{_SET_MODE}1") != "OK":
        raise SourceError("the stub has no physical memory mode (QEMU has it since 4.1)")
    try:
        stub.flush()
        yield StubMemory(stub)
    finally:
        stub.packet(f"{_SET_MODE}{before}")
        stub.flush()


SOURCE = MemorySource("gdbstub", 90, _open)
