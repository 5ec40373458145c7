"""A copy of guest memory that a migration stream fills, page by page, in any order.

Each page is kept where it is in its RAM block, one block behind the other: what is zero in the
guest is a hole in the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.model import RamBlock, block_at
from qemu_dump_ext.pages._copy_store import CopyStore, open_copy_store
from qemu_dump_ext.structures.migration import StreamBlock

_GATHERED = 1 << 20
"""Bytes of pages that follow each other, and are put into the copy at once."""
_OBJECTS = "/objects/"


class StreamedMemory:
    """Guest memory as it was when the stream began.

    Attributes:
        size: Of the copy, in bytes.
        where: It is kept, in words; empty until the stream begins.
    """

    name = "background-snapshot"
    is_slow = False
    is_at_hand = True

    def __init__(
        self, blocks: Sequence[RamBlock], directory: Path, advance: Callable[[int], None]
    ) -> None:
        """Prepare.

        Args:
            blocks: Of guest memory that is wanted, by ascending gpa.
            directory: For a file, where memory is short.
            advance: Is told of every piece; may raise.
        """
        self.size = 0
        self.where = ""
        self._blocks = blocks
        self._directory = directory
        self._advance = advance
        self._store: CopyStore | None = None
        self._page_size = 0
        self._stored = bytearray()
        self._bases: list[int] = []
        self._base_of_region: dict[str, int] = {}
        self._gathered = bytearray()
        self._gathered_at = 0

    def begin(self, blocks: Sequence[StreamBlock], page_size: int) -> None:
        """Make room for the RAM blocks that are wanted.

        Raises:
            SourceError: One is not in the stream.
            DumpWriteError: There is no room.
        """
        self._page_size = page_size
        numbers = {region: self._number_of(region, blocks) for region in self._regions()}
        wanted = sorted(set(numbers.values()))
        total = 0
        self._bases = [-1] * len(blocks)
        for number in wanted:
            self._bases[number] = total
            total += -(-blocks[number].size // page_size) * page_size
        self._base_of_region = {region: self._bases[n] for region, n in numbers.items()}
        self._stored = bytearray(total // page_size)
        self._store, self.where = open_copy_store(total, self._directory)

    def _regions(self) -> dict[str, int]:
        """Return how long each region must be at least."""
        sizes: dict[str, int] = {}
        for block in self._blocks:
            end = block.region_offset + block.size
            sizes[block.name] = max(end, sizes.get(block.name, 0))
        return sizes

    def _number_of(self, region: str, blocks: Sequence[StreamBlock]) -> int:
        """Return which block of the stream a memory region is."""
        size = self._regions()[region]
        fitting = [
            number
            for number, block in enumerate(blocks)
            if block.size >= size
            and (block.name in {region, _OBJECTS + region} or block.name.endswith(f"/{region}"))
        ]
        exact = [number for number in fitting if blocks[number].name == region] or fitting
        if len(exact) != 1:
            raise SourceError(f"QEMU's stream has {len(exact)} RAM blocks {region!r}, not one")
        return exact[0]

    def page(self, block: int, offset: int, data: memoryview, _place: int) -> None:
        """Keep a page."""
        base = self._bases[block]
        if base < 0:
            return
        position = base + offset
        self._stored[position // self._page_size] = 1
        if position != self._gathered_at + len(self._gathered) or (
            len(self._gathered) >= _GATHERED
        ):
            self._put()
            self._gathered_at = position
        self._gathered += data

    def fill(self, block: int, offset: int, byte: int) -> None:
        """Keep a page that is one byte over and over."""
        base = self._bases[block]
        if base < 0 or (not byte and not self._stored[(base + offset) // self._page_size]):
            return
        self.page(block, offset, memoryview(bytes((byte,)) * self._page_size), 0)

    def end(self) -> None:
        """Know that nothing more comes."""
        self._put()
        self.size = self._page_size * self._stored.count(1)

    def _put(self) -> None:
        if self._gathered and self._store is not None:
            self._store.write(self._gathered_at, memoryview(self._gathered))
            self._advance(len(self._gathered))
            self._gathered = bytearray()

    def _position(self, gpa: int, size: int) -> int:
        block = block_at(self._blocks, gpa)
        if block is None or gpa + size > block.end:
            raise GuestMemoryFaultError(gpa, size, "it is not in QEMU's stream")
        return self._base_of_region[block.name] + block.region_offset + gpa - block.gpa

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        position, page = self._position(gpa, size), self._page_size
        shift, end = gpa - position, position + size
        found = []
        last = -(-end // page)
        start = self._stored.find(1, position // page, last)
        while start >= 0:
            stop = self._stored.find(0, start, last)
            stop = last if stop < 0 else stop
            found.append((max(start * page, position) + shift, min(stop * page, end) + shift))
            start = self._stored.find(1, stop, last)
        return found

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        position = self._position(gpa, len(buffer))
        if self._store is not None:
            self._store.read_into(position, buffer)

    def close(self) -> None:
        """Give the copy up; harmless when repeated."""
        if self._store is not None:
            self._store.close()
