"""Find pages whose content an earlier page of the dump has, so that it is packed and stored once.

Pages that may be equal are found by a fingerprint, and then compared: nothing rests on the
fingerprint, which a guest could forge. The earlier page is read again for that, so this is for
memory at hand. What is remembered is bounded: a newer page takes the place of an older one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qemu_dump_ext.guest.memory import GuestMemory, is_at_hand
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.pages.pipeline import PIECE_SIZE, Buffer, Piece
from qemu_dump_ext.pages.zero_pages import numpy_if_loaded
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORD = 8
_SLOTS_MAX = 1 << 20
"""Contents that are remembered, for 16 bytes each here, and what the caller knows of them."""
_SLOTS_MIN = 1 << 10
_COMPARED_SIZE = 1 << 17
"""Bytes of pages that are compared together: they stay in the processor's cache."""
_SAMPLES = 16
"""Words of a page that are weighted; the others are added up."""
_ODD = 0x9E3779B97F4A7C15
"""Multiplied with it, modulo 2^64, numbers are scattered: 2^64 divided by the golden ratio."""


class EqualPages(Value):
    """The pages of a piece that are not to be stored, because an earlier one is equal.

    Numbers of pages count within the piece, in ascending order.

    Attributes:
        from_slots: Pages that are equal to one of an earlier piece.
        slots: Where the caller finds what it knows of that one, for each of `from_slots`.
        copies: Pages that are equal to an earlier one of this piece.
        originals: Which, for each of `copies`.
        fresh: Pages that are stored and remembered.
        fresh_slots: Where, for each of `fresh`; the last one stays where a slot is there twice.
    """

    from_slots: NDArray[Any]
    slots: NDArray[Any]
    copies: NDArray[Any]
    originals: NDArray[Any]
    fresh: NDArray[Any]
    fresh_slots: NDArray[Any]


class PageDeduplicator:
    """Remembers the contents of pages, piece by piece.

    Attributes:
        slot_count: How many contents it remembers at most.
    """

    def __init__(
        self,
        numpy: ModuleType,
        memory: GuestMemory,
        blocks: Sequence[RamBlock],
        page_size: int,
        page_count: int,
    ) -> None:
        """Begin with nothing.

        Args:
            numpy: The package.
            memory: From which an earlier page is read again.
            blocks: What there is in it, by ascending gpa.
            page_size: In bytes, a multiple of 8.
            page_count: Of the whole dump.
        """
        bits = page_count.bit_length()
        self.slot_count = min(max(1 << bits, _SLOTS_MIN), _SLOTS_MAX)
        self._numpy = numpy
        self._memory = memory
        self._page_size = page_size
        self._block_starts = numpy.array([block.gpa for block in blocks], dtype=numpy.uint64)
        self._fingerprints = numpy.zeros(self.slot_count, dtype=numpy.uint64)
        self._gpas = numpy.zeros(self.slot_count, dtype=numpy.uint64)
        self._again = bytearray(PIECE_SIZE // page_size * page_size)
        # Spread over the page, and always the same, so that a dump does not depend on chance.
        words = page_size // _WORD
        numbers = numpy.arange(1, _SAMPLES + 1, dtype=numpy.uint64)
        self._columns = ((2 * numbers - 1) * words // (2 * _SAMPLES)).astype(numpy.int64)
        self._weights = numbers * numpy.uint64(_ODD) | numpy.uint64(1)

    def take_out(self, piece: Piece, buffer: Buffer) -> EqualPages:
        """Make zeros of the pages of a filled buffer that are not to be stored.

        Raises:
            GuestMemoryFaultError: An earlier page cannot be read again.
        """
        numpy = self._numpy
        rows = numpy.frombuffer(buffer.view, dtype=numpy.uint64).reshape(
            -1, self._page_size // _WORD
        )
        fingerprints = self._fingerprints_of(rows)
        # Pages of zeros have a fingerprint of 0; hardly any other page has.
        pages = numpy.flatnonzero(fingerprints)
        unique, first, group = numpy.unique(
            fingerprints[pages], return_index=True, return_inverse=True
        )
        leaders = pages[first]
        of_leader = leaders[group]
        follows = pages != of_leader
        copies, originals = pages[follows], of_leader[follows]
        same = self._are_equal(rows, copies, rows, originals)
        copies, originals = copies[same], originals[same]

        slots = self._slots_of(unique)
        known = numpy.flatnonzero(self._fingerprints[slots] == unique)
        known = known[self._is_same(rows, leaders[known], self._gpas[slots[known]])]
        slot_of_page = numpy.full(len(rows), -1, dtype=numpy.int64)
        slot_of_page[leaders[known]] = slots[known]
        slot_of_page[copies] = slot_of_page[originals]

        is_fresh = numpy.ones(len(unique), dtype=bool)
        is_fresh[known] = False
        is_fresh &= self._can_be_read_again(piece, leaders)
        fresh, fresh_slots = leaders[is_fresh], slots[is_fresh]
        self._fingerprints[fresh_slots] = unique[is_fresh]
        self._gpas[fresh_slots] = piece.gpa + fresh * self._page_size

        here = slot_of_page[copies] < 0
        from_slots = numpy.flatnonzero(slot_of_page >= 0)
        rows[from_slots] = 0
        rows[copies] = 0
        return EqualPages(
            from_slots,
            slot_of_page[from_slots],
            copies[here],
            originals[here],
            fresh,
            fresh_slots,
        )

    def _fingerprints_of(self, rows: NDArray[Any]) -> NDArray[Any]:
        sums = rows.sum(axis=1)
        samples = (rows[:, self._columns] * self._weights).sum(axis=1)
        fingerprints: NDArray[Any] = (sums * self._numpy.uint64(_ODD)) ^ samples
        return fingerprints

    def _slots_of(self, fingerprints: NDArray[Any]) -> NDArray[Any]:
        bits = self.slot_count.bit_length() - 1
        mixed = fingerprints * self._numpy.uint64(_ODD)
        shifted: NDArray[Any] = (mixed >> self._numpy.uint64(64 - bits)).astype(self._numpy.int64)
        return shifted

    def _is_same(self, rows: NDArray[Any], pages: NDArray[Any], gpas: NDArray[Any]) -> NDArray[Any]:
        numpy, size = self._numpy, self._page_size
        wanted, which = numpy.unique(gpas, return_inverse=True)
        again = memoryview(self._again)[: len(wanted) * size]
        # Pages that follow each other are read at once, within one RAM block.
        block = numpy.searchsorted(self._block_starts, wanted, side="right")
        breaks = numpy.flatnonzero((numpy.diff(wanted) != size) | (numpy.diff(block) != 0)) + 1
        edges = [0, *breaks.tolist(), len(wanted)]
        for begin, end in pairwise(edges):
            if end > begin:
                self._memory.read_into(int(wanted[begin]), again[begin * size : end * size])
        earlier = numpy.frombuffer(again, dtype=numpy.uint64).reshape(-1, rows.shape[1])
        return self._are_equal(rows, pages, earlier, which)

    def _are_equal(
        self,
        rows: NDArray[Any],
        numbers: NDArray[Any],
        others: NDArray[Any],
        other_numbers: NDArray[Any],
    ) -> NDArray[Any]:
        """Return which pages have the content of others, by the numbers of the rows of each."""
        same: NDArray[Any] = self._numpy.empty(len(numbers), dtype=bool)
        count = max(_COMPARED_SIZE // self._page_size, 1)
        for first in range(0, len(numbers), count):
            some = slice(first, first + count)
            equal = rows[numbers[some]] == others[other_numbers[some]]
            equal.all(axis=1, out=same[some])
        return same

    def _can_be_read_again(self, piece: Piece, pages: NDArray[Any]) -> NDArray[Any]:
        # A page that is put together of several RAM blocks cannot be, at one go.
        whole: NDArray[Any] = self._numpy.zeros(len(pages), dtype=bool)
        starts = pages * self._page_size
        for extent in piece.extents:
            end = extent.offset + extent.size
            whole |= (starts >= extent.offset) & (starts + self._page_size <= end)
        return whole


def deduplicator(
    memory: GuestMemory, blocks: Sequence[RamBlock], page_size: int, page_count: int
) -> PageDeduplicator | None:
    """Return what finds equal pages; None where that would cost more than it saves.

    Args:
        memory: Guest memory.
        blocks: What there is in it, by ascending gpa.
        page_size: In bytes, a multiple of 8.
        page_count: Of the whole dump.
    """
    numpy = numpy_if_loaded()
    if numpy is None or not is_at_hand(memory):
        return None
    return PageDeduplicator(numpy, memory, blocks, page_size, page_count)
