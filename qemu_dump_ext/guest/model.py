"""The domain: what a guest is to a dump, and what the engine wants from a door.

The protocols live here, with their user; memory sources, QMP and gdb implement them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RamBlock:
    """A range of guest physical memory that `dump-guest-memory` includes.

    Attributes:
        gpa: First guest physical address.
        size: In bytes; need not be a multiple of a page.
        name: QEMU's memory region behind it.
        region_offset: Offset of `gpa` inside that region, in bytes.
    """

    gpa: int
    size: int
    name: str
    region_offset: int

    @property
    def end(self) -> int:
        """First guest physical address behind the block."""
        return self.gpa + self.size


@dataclass(frozen=True)
class Vcpu:
    """One guest CPU.

    Attributes:
        index: QEMU's cpu_index.
        registers: Values by register name of the architecture. A register that no source gives
            is an absent key, never 0.
    """

    index: int
    registers: Mapping[str, int]
