"""What one file of this folder must declare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from qemu_dump_ext.guest.access import SourceContext
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.value import Value


class MemorySource(Value):
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
