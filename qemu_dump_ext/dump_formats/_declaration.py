"""What one file of this folder must declare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.sinks import Sink

ProgressCallback = Callable[[int], None]
"""Gets the bytes of guest memory that have been added to the dump since the last call."""


@dataclass(frozen=True)
class DumpFormat:
    """One file format.

    Attributes:
        name: Equal to the name of the file.
        check: Refuses what the request and the sink alone make impossible, before the guest is
            stopped.
        write: Writes a whole dump. Everything that it can refuse, it refuses before it reads
            guest memory or writes the first byte.
    """

    name: str
    check: Callable[[DumpRequest, Sink], None]
    write: Callable[[DumpRequest, DumpPlan, GuestMemory, Sink, ProgressCallback], None]
