"""What one file of this folder must declare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from qemu_dump_ext.guest.model import DescriptorMonitor, GuestMemory, Monitor, RamBlock, Stub


@dataclass(frozen=True)
class SourceContext:
    """What a source may use to get at memory.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, where the door has one.
        ram_blocks: Of the guest, by ascending gpa.
        addresses: Of QEMU's sockets to which this process is connected: a path or HOST:PORT.
        qmp: QEMU's QMP, where the door has one.
    """

    monitor: Monitor
    stub: Stub | None
    ram_blocks: Sequence[RamBlock]
    addresses: Sequence[str] = ()
    qmp: DescriptorMonitor | None = None


@dataclass(frozen=True)
class MemorySource:
    """One way to read guest physical memory.

    Attributes:
        name: The word behind `--memory`; equal to the name of the file.
        rank: `auto` tries the lowest first: the fastest.
        open: Returns the memory for the time of a `with` block, or raises SourceError with the
            reason why it cannot be had here.
    """

    name: str
    rank: int
    open: Callable[[SourceContext], AbstractContextManager[GuestMemory]]
