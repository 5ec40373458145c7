"""The domain: what a guest is to a dump, and what the engine wants from a door.

The protocols live here, with their user; memory sources, QMP and gdb implement them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qemu_dump_ext.value import Value


class RamBlock(Value):
    """A range of guest physical memory that `dump-guest-memory` includes.

    Attributes:
        gpa: First guest physical address.
        size: The size in bytes; need not be a multiple of a page.
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

    def part(self, gpa: int, end: int) -> RamBlock:
        """Return what of the block lies between two of its addresses."""
        offset = self.region_offset + gpa - self.gpa
        return replace(self, gpa=gpa, size=end - gpa, region_offset=offset)


def block_at(blocks: Sequence[RamBlock], gpa: int) -> RamBlock | None:
    """Return the one of `blocks`, which go by ascending gpa, that has the byte at `gpa`."""
    index = bisect_right(blocks, gpa, key=lambda block: block.end)
    found = blocks[index] if index < len(blocks) else None
    return found if found is not None and found.gpa <= gpa else None


class Vcpu(Value):
    """One guest CPU.

    Attributes:
        index: QEMU's cpu_index.
        registers: Values by register name of the architecture. A register that no source gives
            is an absent key, never 0.
    """

    index: int
    registers: Mapping[str, int]
