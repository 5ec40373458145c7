"""Equal pages are found, and nothing else is taken for equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.pages import dedup
from qemu_dump_ext.pages.dedup import PageDeduplicator, deduplicator
from qemu_dump_ext.pages.pipeline import Buffer, Extent, Piece
from tests.support.plain_memory import PlainMemory

_PAGE = 64
_BASE = 0x1000


class _AtHand:
    """Memory of some blocks, by gpa, and what was read of it."""

    name = "at hand"
    is_slow = False
    is_at_hand = True

    def __init__(self, blocks: Mapping[int, bytes]) -> None:
        self.reads: list[tuple[int, int]] = []
        self._blocks = blocks

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        self.reads.append((gpa, len(buffer)))
        begin, content = max(item for item in self._blocks.items() if item[0] <= gpa)
        assert gpa - begin + len(buffer) <= len(content), "more than a block is read"
        buffer[:] = content[gpa - begin :][: len(buffer)]

    def close(self) -> None:
        pass


def _contents(numbers: Sequence[int]) -> bytes:
    """Return a page for each number; 0: zeros."""
    return b"".join(number.to_bytes(1, "little") * _PAGE for number in numbers)


def _memory(content: bytes) -> tuple[_AtHand, list[RamBlock]]:
    block = RamBlock(_BASE, len(content), "ram", 0)
    return _AtHand({_BASE: content}), [block]


def _stored(pages: PageDeduplicator, content: bytes, piece_pages: int) -> list[bytes]:
    """Return each page of `content` as a reader of the dump would find it; check what is stored."""
    of_slots: dict[int, bytes] = {}
    found: list[bytes] = []
    for start in range(0, len(content), piece_pages * _PAGE):
        part = bytearray(content[start : start + piece_pages * _PAGE])
        before = bytes(part)
        extent = Extent(_BASE + start, len(part), 0)
        equal = pages.take_out(Piece(_BASE + start, len(part), (extent,)), Buffer(memoryview(part)))
        stored = [bytes(part[at : at + _PAGE]) for at in range(0, len(part), _PAGE)]
        whole = [before[at : at + _PAGE] for at in range(0, len(before), _PAGE)]
        for page, slot in zip(equal.from_slots.tolist(), equal.slots.tolist(), strict=True):
            assert not any(stored[page])
            stored[page] = of_slots[slot]
        for page, original in zip(equal.copies.tolist(), equal.originals.tolist(), strict=True):
            assert not any(stored[page])
            assert original < page
            stored[page] = stored[original]
        assert stored == whole
        for page, slot in zip(equal.fresh.tolist(), equal.fresh_slots.tolist(), strict=True):
            of_slots[slot] = stored[page]
        found += stored
    return found


def _blanked(pages: PageDeduplicator, content: bytes) -> int:
    """Return how many pages that are not zero are left out, in pieces of four."""
    count = 0
    for start in range(0, len(content), 4 * _PAGE):
        part = bytearray(content[start : start + 4 * _PAGE])
        piece = Piece(_BASE + start, len(part), (Extent(_BASE + start, len(part), 0),))
        equal = pages.take_out(piece, Buffer(memoryview(part)))
        count += len(equal.from_slots) + len(equal.copies)
    return count


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_page_is_what_it_was(numbers, piece_pages):
    content = _contents(numbers)
    memory, blocks = _memory(content)
    _stored(PageDeduplicator(np, memory, blocks, _PAGE, len(numbers)), content, piece_pages)


def test_all_but_the_first_are_left_out():
    content = _contents([1, 2, 2, 0, 1, 3, 1, 0, 3, 3, 3, 2])
    memory, blocks = _memory(content)
    assert _blanked(PageDeduplicator(np, memory, blocks, _PAGE, 12), content) == 7


@pytest.mark.parametrize("together", [1, 3, 100])
@pytest.mark.parametrize("fingerprint", [1, 1 << 63])
def test_a_forged_fingerprint_makes_no_pages_equal(monkeypatch, fingerprint, together):
    """All pages have the same one."""
    monkeypatch.setattr(dedup, "_COMPARED_SIZE", together * _PAGE)
    monkeypatch.setattr(
        PageDeduplicator,
        "_fingerprints_of",
        lambda _, rows: rows.any(axis=1).astype(np.uint64) * np.uint64(fingerprint),
    )
    numbers = [1, 2, 1, 3, 0, 2, 2, 1, 4, 4, 1, 5, 5, 5]
    content = _contents(numbers)
    memory, blocks = _memory(content)
    for piece_pages in (1, 2, 3, 14):
        _stored(PageDeduplicator(np, memory, blocks, _PAGE, 14), content, piece_pages)


def test_more_contents_than_can_be_remembered():
    numbers = [n % 251 + 1 for n in range(5000)]
    content = b"".join(n.to_bytes(4, "little") * (_PAGE // 4) for n in range(1, 3001)) + _contents(
        numbers[:500]
    )
    memory, blocks = _memory(content)
    pages = PageDeduplicator(np, memory, blocks, _PAGE, 10)
    assert pages.slot_count < 3000
    _stored(pages, content, 7)


def test_a_page_of_two_blocks_is_not_read_again():
    content = _contents([1, 2, 1])
    blocks = [RamBlock(_BASE, 96, "a", 0), RamBlock(_BASE + 96, 96, "b", 0)]
    memory = _AtHand({_BASE: content[:96], _BASE + 96: content[96:]})
    pages = PageDeduplicator(np, memory, blocks, _PAGE, 3)
    extents = (Extent(_BASE, 96, 0), Extent(_BASE + 96, 96, 96))
    equal = pages.take_out(Piece(_BASE, 192, extents), Buffer(memoryview(bytearray(content))))
    assert equal.fresh.tolist() == [0]
    assert (equal.copies.tolist(), equal.originals.tolist()) == ([2], [0])
    twice = pages.take_out(Piece(_BASE, 192, extents), Buffer(memoryview(bytearray(content))))
    assert twice.from_slots.tolist() == [0, 2]


def test_runs_of_pages_are_read_again_at_once_within_a_block():
    content = _contents(range(1, 9))
    blocks = [RamBlock(_BASE, 5 * _PAGE, "a", 0), RamBlock(_BASE + 5 * _PAGE, 3 * _PAGE, "b", 0)]
    memory = _AtHand({_BASE: content[: 5 * _PAGE], _BASE + 5 * _PAGE: content[5 * _PAGE :]})
    pages = PageDeduplicator(np, memory, blocks, _PAGE, 1 << 20)
    extents = (Extent(_BASE, 5 * _PAGE, 0), Extent(_BASE + 5 * _PAGE, 3 * _PAGE, 5 * _PAGE))
    piece = Piece(_BASE, len(content), extents)
    pages.take_out(piece, Buffer(memoryview(bytearray(content))))
    memory.reads.clear()
    equal = pages.take_out(piece, Buffer(memoryview(bytearray(content))))
    assert len(equal.from_slots) == 8
    assert memory.reads == [(_BASE, 5 * _PAGE), (_BASE + 5 * _PAGE, 3 * _PAGE)]


def test_memory_that_is_not_at_hand_is_not_read_twice():
    memory = PlainMemory()
    assert deduplicator(memory, [RamBlock(_BASE, _PAGE, "ram", 0)], _PAGE, 1) is None
