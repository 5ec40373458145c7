"""The memory of the guest of a few pages, without its process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest.model import RamBlock
from tests.support.fake_guest import BLOCKS, PAGE, content_of


class PlainMemory:
    """Guest memory that is all read.

    Attributes:
        faults_at: A gpa that cannot be read; None: all can.
    """

    name = "plain"
    is_slow = False

    def __init__(self, faults_at: int | None = None) -> None:
        self.faults_at = faults_at

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        end = gpa + len(buffer)
        if self.faults_at is not None and gpa <= self.faults_at < end:
            raise GuestMemoryFaultError(gpa, len(buffer), "it is broken there")
        block = _block_at(gpa)
        buffer[:] = content_of(block)[gpa - block.gpa : end - block.gpa]

    def close(self) -> None:
        """Hold nothing."""


class KnownMemory(PlainMemory):
    """Guest memory of which it is known where it is not zero; nothing else is read."""

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return the pages that have content, or parts of them, each by itself."""
        block = _block_at(gpa)
        edges = sorted({gpa, gpa + size, *range(block.gpa, block.end, PAGE)})
        inside = [edge for edge in edges if gpa <= edge <= gpa + size]
        content = content_of(block)
        return [
            (low, high)
            for low, high in pairwise(inside)
            if any(content[low - block.gpa : high - block.gpa])
        ]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        end = gpa + len(buffer)
        known = self.populated(gpa, len(buffer))
        assert known[0][0] == gpa, "zeros are read"
        assert known[-1][1] == end, "zeros are read"
        super().read_into(gpa, buffer)


def _block_at(gpa: int) -> RamBlock:
    return next(block for block in BLOCKS if block.gpa <= gpa < block.end)
